# Sourced by the other scripts: the virtual environment .venv of this checkout, made and filled once.
# PYTHON names the interpreter to make it with (3.11 or 3.12). EXTRAS says what to install in addition to the package
# itself: "[dev,log]" unless it is set; scripts/test.sh sets "[dev,log,docs]", which holds everything.
VENV=.venv
EXTRAS=${EXTRAS-[dev,log]}
WANTED=$(cat setup.py pyproject.toml constraints.txt constraints-docs.txt scripts/env.sh | sha256sum | cut -d' ' -f1)
if [ ! -x "$VENV/bin/python" ]; then
  for PYTHON in ${PYTHON:-python3.11 python3.12 python3}; do
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && break
    PYTHON=
  done
  [ -n "$PYTHON" ] || { echo "error: Python 3.11 or 3.12 is needed; name it with PYTHON=/path/to/python" >&2; exit 2; }
  echo "making $VENV with $("$PYTHON" --version)"
  "$PYTHON" -m venv "$VENV"
fi
case "$(cat "$VENV/installed" 2>/dev/null)" in
  "$WANTED $EXTRAS" | "$WANTED [dev,log,docs]") ;;
  *)
    echo "installing into $VENV (once; a few minutes)"
    # torch first and pinned: on a machine without a GPU, a CPU build that pip already knows of satisfies the pin.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-docs.txt -e ".$EXTRAS"
    echo "$WANTED $EXTRAS" > "$VENV/installed"
    ;;
esac
export PATH="$PWD/$VENV/bin:$PATH"

#!/usr/bin/env bash
# From a fresh machine (Python 3.11 or 3.12, no GPU) to a retrofitted, exported and served model:
#   bash scripts/quickstart.sh           about a quarter of an hour on 2 cores, the install included
#   bash scripts/quickstart.sh --fresh   train again instead of keeping finished runs
# Everything lands in runs/quickstart. A second call installs nothing and continues finished runs.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
case "${1:-}" in
  "" | --fresh) ;;
  *) echo "error: unknown flag $1; known: --fresh" >&2; exit 2 ;;
esac
EXTRAS='[train]' source scripts/env.sh  # what the tests need is not installed here
installed=$SECONDS
OUT=runs/quickstart
# Runs of other code, text or weights are not continued.
KEY=$( (cat configs/quickstart*.yaml checkpoints/base/*; python --version; git rev-parse HEAD 2>/dev/null || true) | sha256sum | cut -d' ' -f1)
if [ "${1:-}" = --fresh ] || [ "$(cat $OUT/key 2>/dev/null)" != "$KEY" ]; then rm -rf $OUT; fi
mkdir -p $OUT
echo "$KEY" > $OUT/key

echo "== retrofit to CR 4"
torchrun train.py --config configs/quickstart.yaml --output $OUT/retrofit --resume auto
echo "== control: the same tokens without compression"
torchrun train.py --config configs/quickstart-control.yaml --output $OUT/control --resume auto
trained=$SECONDS

echo "== export, evaluation, pictures"
python scripts/quickstart_report.py $OUT

PROMPT='class Queue:
    """A first-in, first-out queue."""

    def __init__(self, maxsize=0):
'
echo "== generation from DMC + TCQ (rotated, trellis-coded), 4 bit"
dmc generate $OUT/cr4-hf --policy dmc --codec tcq --bits 4 --max-tokens 80 --temperature 0 --prompt "$PROMPT"
echo "== generation from DMC + GEAR (published recipe), 4 bit"
dmc generate $OUT/cr4-hf --policy dmc --codec gear --bits 4 --max-tokens 80 --temperature 0 --prompt "$PROMPT"
echo
echo "install $((installed - started)) s, training $((trained - installed)) s, the rest $((SECONDS - trained)) s"
echo "written: $OUT/results.json, table.md, loss.png, heads.png, segments.html, cr4-hf (the exported model)"

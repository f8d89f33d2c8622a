#!/usr/bin/env bash
# From a fresh machine (Python 3.11 or 3.12, no GPU) to a retrofitted, exported and served model:
#   bash scripts/quickstart.sh             minutes on 2 cores, the install included
#   bash scripts/quickstart.sh --fresh     train again instead of keeping finished runs
#   bash scripts/quickstart.sh --compare   train other methods on the same tokens too: late eviction, DMS, merging at once
# Everything lands in runs/quickstart. A second call installs nothing and continues finished runs.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
FRESH=
COMPARE=
for flag in "$@"; do
  case "$flag" in
    --fresh) FRESH=1 ;;
    --compare) COMPARE=1 ;;
    *) echo "error: unknown flag $flag; known: --fresh, --compare" >&2; exit 2 ;;
  esac
done
EXTRAS='[train]' source scripts/env.sh  # what the tests need is not installed here
installed=$SECONDS
OUT=runs/quickstart
# Runs of other code, text or weights are not continued.
KEY=$( (cat configs/*.yaml checkpoints/decisions/* checkpoints/base/*; python --version; git rev-parse HEAD 2>/dev/null || true) | sha256sum | cut -d' ' -f1)
if [ -n "$FRESH" ] || [ "$(cat $OUT/key 2>/dev/null)" != "$KEY" ]; then rm -rf $OUT; fi
mkdir -p $OUT
echo "$KEY" > $OUT/key

# The second run of a pair; the core that is free after it compiles the CPU kernels of the evaluation ahead.
second() {  # name, its arguments ...
  local running
  trap 'kill "$running" 2> /dev/null || true' TERM
  torchrun --standalone train.py --output "$OUT/$1" --resume auto "${@:2}" &
  running=$!
  wait "$running" || exit
  python -c "from dmc import LLM; [LLM('checkpoints/base', codec=codec) for codec in ('tcq-4bit', 'gear-4bit')]" &
  running=$!
  wait "$running"
}

# Two runs at a time, one thread each; the second writes to a file.
pair() {  # name, its arguments ..., --, name, its arguments ...
  local first=$1 arguments=() status=0 beside
  shift
  while [ "$1" != -- ]; do arguments+=("$1"); shift; done
  shift
  second "$@" > "$OUT/$1.log" 2>&1 &
  beside=$!
  trap 'kill $beside 2> /dev/null || true' EXIT
  torchrun --standalone train.py --output "$OUT/$first" --resume auto "${arguments[@]}" || status=$?
  [ "$status" = 0 ] || exit "$status"
  wait "$beside" || { status=$?; tail -n 20 "$OUT/$1.log" >&2; exit "$status"; }
  trap - EXIT
}
echo "== retrofit to CR 4; beside it a control, the same tokens without compression ($OUT/control.log)"
pair retrofit --config configs/quickstart.yaml -- control --config configs/quickstart-control.yaml
if [ -n "$COMPARE" ]; then
  echo "== the same tokens by merging at once; beside it DMS ($OUT/dms.log)"
  SHORT=(dmc.ramp_steps_per_unit=20 dmc.hold_steps=60 optim.decay_steps=60 run.threads=1)  # as many steps
  pair merge-at-once --config configs/merge-at-once.yaml "${SHORT[@]}" -- dms --config configs/dms-quickstart.yaml "${SHORT[@]}"
  echo "== the same tokens by late eviction: the retrofit's recipe, dropping where it merges"
  torchrun --standalone train.py --config configs/quickstart.yaml dmc.method=dms --output $OUT/late-eviction --resume auto
fi
trained=$SECONDS

echo "== export, evaluation, pictures"
python scripts/quickstart_report.py $OUT ${COMPARE:+--all-budgets}

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

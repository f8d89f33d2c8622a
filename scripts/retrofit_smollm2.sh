#!/usr/bin/env bash
# SmolLM2-135M (or another small Llama) retrofitted for real, on one GPU: to CR 2, 3, 4 ... by distillation, beside the
# same continued pretraining without compression, exported, scored, drawn, and generated from.
#   MODEL=models/SmolLM2-135M TEXT='books/*.jsonl.xz' bash scripts/retrofit_smollm2.sh            every step
#   LIMIT=500 bash scripts/retrofit_smollm2.sh retrofit                                           some of them
# Steps: data retrofit control report needle generate. A training step that LIMIT (seconds) stops ends with 75: call it
# again and it goes on. From the environment:
#   MODEL, TEXT   Hugging Face directory; files, patterns or directories of text (scripts/prepare_data.py)
#   HELD_OUT      share of the documents that are held out (0.005)
#   TARGET        compression ratio to end at (4)
#   OUT           folder of everything (runs/smollm2)
#   EXTRA         settings for both training runs, such as "optim.global_batch=64"
#   RETROFIT      settings for the retrofit alone, such as "dmc.hold_steps=800" (the control takes its steps from it)
#   PYTHON        interpreter (python3)
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-models/SmolLM2-135M} TEXT=${TEXT:-} TARGET=${TARGET:-4} HELD_OUT=${HELD_OUT:-0.005} OUT=${OUT:-runs/smollm2} PYTHON=${PYTHON:-python3}
STEPS="data retrofit control report needle generate"
RECIPE=configs/smollm2-135m-distill.yaml
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

train() { # OUTPUT SETTING...
  local output=$1 code=0 limit=()
  shift
  [ -z "${LIMIT:-}" ] || limit=(timeout --preserve-status -s USR1 -k 120 "$LIMIT")
  # shellcheck disable=SC2086
  "${limit[@]}" "$PYTHON" train.py --config "$RECIPE" --model "$MODEL" --output "$output" --resume auto \
    data.text="$OUT/corpus" parallel.distributed_optimizer=false parallel.overlap=false "$@" ${EXTRA:-} || code=$?
  [ "$code" != 75 ] || echo "stopped by the time limit; call this step again" >&2
  return "$code"
}

of_retrofit() { # steps | export: of the run as it was configured
  local config="$OUT/retrofit/config.json"
  [ -f "$config" ] || { echo "error: $config is not there: run the step retrofit first" >&2; return 2; }
  "$PYTHON" - "$config" "$1" <<'PY'
import sys
from dmc.training.config import load
from dmc.training.schedule import Schedule
config = load(sys.argv[1])  # JSON is YAML
if sys.argv[2] == "steps":
    print(Schedule(config).steps)
else:
    print(f"{sys.argv[1][:-len('/retrofit/config.json')]}/cr{config.dmc.target_cr:g}-hf")
PY
}

step() {
  local steps model
  case $1 in
    data)
      [ -d "$OUT/corpus" ] && return
      [ -n "$TEXT" ] || { echo "error: TEXT names no text; set it to files, patterns or directories" >&2; exit 2; }
      # shellcheck disable=SC2086
      "$PYTHON" scripts/prepare_data.py $TEXT --tokenizer "$MODEL" --output "$OUT/corpus" --held-out "$HELD_OUT" ;;
    retrofit)
      # shellcheck disable=SC2086
      train "$OUT/retrofit" dmc.target_cr="$TARGET" ${RETROFIT:-} ;;
    control)
      steps=$(of_retrofit steps)  # a command of its own: its failure ends the script
      train "$OUT/control" dmc.method=none distill.weight=0 distill.lm_weight=1 run.steps="$steps" ;;
    report) "$PYTHON" scripts/quickstart_report.py "$OUT" ;;
    needle)
      model=$(of_retrofit export)
      "$PYTHON" -m dmc.cli eval "$model" --needle --codec tcq --json "$OUT/needle.json" ;;
    generate)
      model=$(of_retrofit export)
      "$PYTHON" -m dmc.cli generate "$model" --codec tcq --bits 4 --temperature 0 --max-tokens 80 \
        --prompt "The history of the lighthouse begins" ;;
  esac
}

# shellcheck disable=SC2086
[ "${1:-}" = --list ] && { printf '%s\n' $STEPS; exit 0; }
for name in "$@"; do
  [[ " $STEPS " = *" $name "* ]] || { echo "error: unknown step $name; known: $STEPS" >&2; exit 2; }
done
mkdir -p "$OUT"
# shellcheck disable=SC2068
for name in ${@:-$STEPS}; do
  echo "== $name"
  step "$name"
done

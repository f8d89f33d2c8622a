#!/usr/bin/env bash
# The whole test suite in a virtual environment of its own:
#   bash scripts/test.sh            lint, layout, types and the fast tests (what CI runs)
#   bash scripts/test.sh --slow     the slow ones too
#   bash scripts/test.sh --cov tests/data      coverage of these tests, printed per file
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=${EXTRAS-[dev,log,docs]}  # a test builds the site
source scripts/env.sh
WORKERS=${DMC_TEST_WORKERS:-$(env -u OMP_NUM_THREADS nproc | awk '{print ($1 < 2) ? $1 : 2}')}  # nproc obeys that variable
export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
mypy
# One worker per core, two at most (DMC_TEST_WORKERS changes it): tests start processes of their own. A file's tests stay together.
exec python -m pytest -q -n "$WORKERS" --dist loadfile "$@"

#!/usr/bin/env bash
# Lint and test in .venv. `--fast`, as the first argument, leaves out the tests marked slow; all
# other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv requirements-dev.txt
tier=()
if [ "${1-}" = --fast ]; then
  tier=(-m "not slow")
  shift
fi
# A test process per core, of one thread. The few tests of two threads leave the core to others
# while their threads wait for each other.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
ruff check .
ruff format --check .
python -m pytest -n auto --maxprocesses 8 --dist worksteal --durations 15 "${tier[@]}" "$@"

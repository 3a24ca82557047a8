#!/usr/bin/env bash
# Lint and test in .venv; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv requirements-dev.txt
# Threads of a test that wait for each other leave the core to whoever else has work.
export OMP_WAIT_POLICY=passive
ruff check .
ruff format --check .
python -m pytest "$@"

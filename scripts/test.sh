#!/usr/bin/env bash
# Lint and test in .venv; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest "$@"

#!/usr/bin/env bash
# The fast tests on the lowest versions of requirements.txt and on the newest there are, each in an
# environment of its own below $1 (several GB each); by hand, since wheels are large. Each prints a
# row for benchmarks/results/versions.md.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?a folder for the environments} python=${PYTHON:-python3}
unset PYTHONPATH PYTHONHOME
lowest=$(sed -n 's/>=\([0-9.]*\)$/==\1.*/p' requirements.txt)
newest=$(sed -n 's/>=.*//p' requirements.txt)
for set in lowest newest; do
  [ -x "$folder/$set/bin/python" ] || "$python" -m venv "$folder/$set"
  "$folder/$set/bin/python" -m pip install --quiet --upgrade ${!set} \
    duckdb faiss-cpu hypothesis matplotlib optuna pyarrow pytest pytest-xdist
  result=$(OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PATH="$folder/$set/bin:$PATH" \
    "$folder/$set/bin/python" -m pytest -n auto -m "not slow" | tail -1) || true
  "$folder/$set/bin/python" - "$set" "$result" <<'END'
import sys
from importlib.metadata import version
names = ["torch", "numpy", "tqdm", "tensorboard"]
row = [sys.argv[1], sys.version.split()[0], *map(version, names), sys.argv[2].strip("= ")]
print("|", " | ".join(row), "|")
END
done

# Sourced by quickstart.sh and test.sh: `use_venv FILE` makes .venv, installs the requirements FILE
# with constraints.txt if that has not happened yet, and puts its python first on the PATH.
#   PYTHON=python3.12   the Python that it is made with
#   SYSTEM_TORCH=1      use the packages of that Python, torch above all, and install what lacks

use_venv() {
  local python=${PYTHON:-python3} options=() limits=(-c constraints.txt) kind stamp
  unset PYTHONPATH PYTHONHOME  # packages of another Python
  export PIP_USER=0
  if ! kind=$("$python" -c 'import sys; print(sys.version)' 2>/dev/null); then
    echo "error: $python does not run; name a Python 3.10 or newer with PYTHON=..." >&2
    return 1
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $python is Python $kind; name one from 3.10 on with PYTHON=..." >&2
    return 1
  fi
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    echo "error: $python has no venv; on Debian or Ubuntu: apt install python3-venv" >&2
    return 1
  fi
  if [ -n "${SYSTEM_TORCH-}" ]; then
    kind="$kind with its packages" options=(--system-site-packages) limits=()
  fi
  stamp=$( (cat "$1" requirements*.txt constraints.txt; echo "$kind") | cksum | tr ' ' '-')
  exec 9>>.venv.lock
  if command -v flock >/dev/null; then flock 9; fi  # two at once wait for each other
  # A .venv of another Python, or one that was not finished, is made anew.
  if [ "$(cat .venv/.made-with 2>/dev/null)" != "$kind" ] || ! .venv/bin/python -c '' 2>/dev/null; then
    "$python" -m venv --clear ${options[@]+"${options[@]}"} .venv
    if [ -n "${SYSTEM_TORCH-}" ]; then  # of a virtual environment too, whose packages venv passes over
      "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    fi
    echo "$kind" >.venv/.made-with
  fi
  if [ ! -e ".venv/.installed-$stamp" ]; then
    echo "installing $1 into .venv, once: about 250 MB where torch is there or its CPU wheel is taken, 2.8 GB"
    echo "with the CUDA wheel, which pip takes on Linux; docs/questions.md says how to choose"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" \
      ${limits[@]+"${limits[@]}"}
    touch ".venv/.installed-$stamp"
  fi
  exec 9>&-
  export PATH="$PWD/.venv/bin:$PATH"
}

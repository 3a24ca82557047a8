# Sourced by quickstart.sh and test.sh: `use_venv FILE` makes .venv, installs the requirements FILE
# with constraints.txt if that has not happened yet, and puts its python first on the PATH.

use_venv() {
  local python=${PYTHON:-python3} stamp
  if ! "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      { echo "error: Python 3.11 or newer is needed; name one with PYTHON=..." >&2; return 1; }
    echo "error: this Python has no venv; on Debian or Ubuntu: apt install python3-venv" >&2
    return 1
  fi
  stamp=$(cat "$1" requirements.txt constraints.txt | sha256sum | cut -c1-16)
  if [ ! -e ".venv/.installed-$stamp" ]; then
    echo "installing $1 into .venv (once; the download is the slow part)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" -c constraints.txt
    touch ".venv/.installed-$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}

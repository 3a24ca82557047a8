"""scripts/venv.sh makes the environment that quickstart.sh and test.sh run in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "venv.sh"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a blank and a letter beyond ASCII in its name, and nothing to install."""
    folder = tmp_path / "mein Ordner é"
    folder.mkdir()
    shutil.copy(SCRIPT, folder)
    for name in ("requirements.txt", "constraints.txt"):
        (folder / name).touch()
    return folder


def use_venv(folder: Path, **variables: str) -> subprocess.Popen:
    show = "import os, sys; print(sys.prefix, os.environ.get('PYTHONPATH'))"
    command = f'set -e; source ./venv.sh; use_venv requirements.txt; python -c "{show}"'
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def assert_is_used(process: subprocess.Popen, folder: Path) -> None:
    out, error = process.communicate()
    assert out.splitlines()[-1:] == [f"{folder}/.venv None"], error


@pytest.mark.slow
def test_a_venv_that_was_not_finished_is_made_anew_and_a_whole_one_stays(folder):
    first, second = use_venv(folder), use_venv(folder)  # two at once wait for each other
    for process in (first, second):
        assert_is_used(process, folder)
    (folder / ".venv" / "mark").touch()
    assert_is_used(use_venv(folder, PYTHONPATH=str(folder), PIP_USER="1"), folder)
    assert (folder / ".venv" / "mark").exists()
    (folder / ".venv" / ".made-with").unlink()  # as after a kill
    assert_is_used(use_venv(folder), folder)
    assert not (folder / ".venv" / "mark").exists()


def test_a_python_that_does_not_run_is_named(folder):
    process = use_venv(folder, PYTHON="python2.99")
    _, error = process.communicate()
    assert "error: python2.99 does not run; name a Python 3.10 or newer with PYTHON=..." in error


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="not run in a virtual environment")
def test_system_torch_sees_the_packages_of_a_virtual_environment_too(folder):
    for seen, variables in (False, {}), (True, {"SYSTEM_TORCH": "1"}):
        assert_is_used(use_venv(folder, **variables), folder)
        command = [folder / ".venv" / "bin" / "python", "-c", "import numpy"]
        assert (subprocess.run(command, capture_output=True).returncode == 0) == seen

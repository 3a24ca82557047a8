"""Imports between the rooms of the house go one way; run-time packages are the four promised."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"simplified_hstu", "hstu_components", "dot_product_similarity"}
# A folder, or a module at the top -> what it may import of ours.
ALLOWED = {
    "ops": {"ops"},
    "files": {"files"},
    **{part: {"ops", "hstu_components"} for part in PARTS},
    "model": {"ops", *PARTS},
    "dataset": {"files"},
    "engine": {"ops", "files", "engine", "model", "dataset", *PARTS},
}
ALLOWED["main"] = set(ALLOWED)
# And of others; pyarrow is optional, inside a function; triton comes with torch.
PACKAGES = {
    "ops": {"torch", "triton"},
    "files": {"numpy", "torch", "pyarrow"},
    **{name: {"numpy", "torch"} for name in (*PARTS, "model", "dataset")},
    **{name: {"numpy", "torch", "tqdm"} for name in ("engine", "main")},
}
FOLDERS = ("ops", "files", "engine")
MODULES = sorted(p for place in (".", *FOLDERS) for p in (ROOT / place).glob("*.py"))


def room(path: Path) -> str:
    return path.stem if path.parent == ROOT else path.parent.name


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    names = {name.split(".")[0] for name in imported(path)}
    assert names & ALLOWED.keys() <= ALLOWED[room(path)]
    others = names - ALLOWED.keys() - set(sys.stdlib_module_names)
    assert others <= PACKAGES[room(path)]


def test_triton_is_imported_in_one_file():
    using_triton = {p for p in MODULES if any(n.startswith("triton") for n in imported(p))}
    assert using_triton == {ROOT / "ops/triton_attention.py"}


def test_torch_stays_out_of_the_data_files():
    using_torch = {p.stem for p in ROOT.glob("files/*.py") if "torch" in imported(p)}
    assert using_torch == {"checkpoint"}


def test_six_modules_stand_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == ALLOWED.keys() - {*FOLDERS}


@pytest.mark.parametrize("name", ["model", "simplified_hstu", "hstu_components", "dataset"])
def test_what_a_notebook_imports_reads_no_flags_and_shows_no_bar(name):
    assert not imported(ROOT / f"{name}.py") & {"tqdm", "argparse"}


# As `python FOLDER/NAME.py` finds modules: pytest's own path would hide that one is not found.
IMPORT_EACH = """
import importlib, os, sys
import torch
sys.path[0] = sys.argv[1]
failed = []
for name in sys.argv[2:]:
    if not os.fork():
        importlib.import_module(name)
        os._exit(0)
    if os.wait()[1]:
        failed.append(name)
sys.exit(f"do not start: {failed}" if failed else 0)
"""


@pytest.mark.parametrize("folder", ["scripts", "benchmarks"])
def test_every_script_finds_what_it_imports(folder, tmp_path):
    scripts = sorted((ROOT / folder).glob("*.py"))
    names = [path.stem for path in scripts if '__name__ == "__main__"' in path.read_text()]
    assert len(names) > 7
    command = [sys.executable, "-c", IMPORT_EACH, str(ROOT / folder), *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Imports between our modules go one way, and run-time packages are the four that are promised."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Module -> what it may import of ours, directly.
ALLOWED = {
    "atomic_io": set(),
    "safe_pickle": {"atomic_io"},
    "checkpoint": {"atomic_io"},
    "json_stream": {"atomic_io"},
    "feature_cache": {"atomic_io"},
    "features": {"atomic_io", "feature_cache", "json_stream"},
    "item_vectors": {"atomic_io", "feature_cache", "safe_pickle"},
    "data_folder": {"atomic_io", "safe_pickle"},
    "data_writer": {"atomic_io", "data_folder", "features"},
    "dataset": {"atomic_io", "data_folder"},
    "distributed": set(),
    "hstu_components": {"distributed"},
    "simplified_hstu": {"hstu_components"},
    "dot_product_similarity": set(),
    "model": {"hstu_components", "simplified_hstu", "dot_product_similarity"},
    "optimizer": {"distributed"},
    "metrics": set(),
    "flags": set(),
    "interrupts": set(),
    "run_log": {"distributed"},
    "run_setup": {
        "atomic_io",
        "data_folder",
        "dataset",
        "distributed",
        "features",
        "flags",
        "interrupts",
        "item_vectors",
    },
}
ALLOWED["updates"] = {
    "atomic_io", "distributed", "hstu_components", "interrupts", "model", "optimizer"
}  # fmt: skip
ALLOWED["run_state"] = {"atomic_io", "checkpoint", "distributed", "model", "updates"}
ALLOWED["evaluation"] = {"distributed", "interrupts", "metrics", "updates"}
ALLOWED["export"] = set(ALLOWED) - {
    "updates",
    "evaluation",
    "run_state",
    "metrics",
    "safe_pickle",
    "data_writer",
    "optimizer",
}
ALLOWED["main"] = set(ALLOWED) - {"data_writer"}
PACKAGES = {"torch", "numpy", "tqdm", "pyarrow"}  # pyarrow: optional, inside a function


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_every_module_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_go_one_way(module):
    names = imported(ROOT / f"{module}.py")
    assert names & ALLOWED.keys() <= ALLOWED[module]
    assert names - ALLOWED.keys() - set(sys.stdlib_module_names) <= PACKAGES


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("model", {"tqdm", "argparse", "logging", "pathlib"}),
        ("dataset", {"argparse", "tqdm"}),
        ("checkpoint", {"argparse"}),
        ("hstu_components", {"argparse", "logging", "pathlib"}),
        ("simplified_hstu", {"argparse", "logging", "pathlib"}),
    ],
)
def test_modules_do_not_contain_what_belongs_elsewhere(module, forbidden):
    assert not imported(ROOT / f"{module}.py") & forbidden

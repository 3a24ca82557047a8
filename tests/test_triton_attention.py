"""The Triton attention without a GPU: interpreted against its definition, and compiled for GPUs."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")
SOURCE = CASES.parent.parent / "ops/triton_attention.py"
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.skipif(torch.__version__ < "2.7", reason="Triton's attention needs torch 2.7"),
]
SLOW = [
    "three tiles", "four heads", "three heads, no time bias", "no position bias", "no bias",
    "many short sequences", "checkpointing", "self-check",
]  # fmt: skip


def run_cases(folder: Path, *arguments: str) -> Any:
    interpret = {"TRITON_INTERPRET": "1"} if arguments[0] == "interpret" else {}
    env = os.environ | interpret | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, str(CASES), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_values_and_all_gradients_equal_the_definition(tmp_path):
    (errors,) = run_cases(tmp_path, "interpret", "small").values()
    assert len(errors) == 5
    assert all(error < 1e-12 for error in errors)


@pytest.mark.slow
def test_every_shape_and_choice_of_biases_equals_the_definition(tmp_path):
    found = run_cases(tmp_path, "interpret", *SLOW)
    # Its inputs are rounded as the kernels' are, so its errors are those of fp32 and of fp16.
    in_fp32, in_fp16 = found.pop("self-check")
    assert in_fp32 < 1e-5
    assert 1e-5 < in_fp16 < 0.01
    assert found.pop("checkpointing") == [0.0] * 10
    assert all(error < 1e-12 for errors in found.values() for error in errors)


def assert_fits(kernels: dict[str, dict[str, int]], most_spilled: int) -> None:
    for name, kernel in kernels.items():
        assert kernel["spilled"] <= most_spilled, name
        assert kernel["shared"] <= 99 << 10, name  # what a program has on sm_89
        assert kernel["mma"], f"{name} has no matrix instructions"
        assert not kernel["wgmma"], f"{name}: see BLOCK"


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_without_spills(tmp_path):
    assert_fits(run_cases(tmp_path, "compile", "80", "bf16", "50"), 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "width", "most_spilled"),
    [("89", "fp32", "128", 128), ("90", "bf16", "64", 32), ("90", "fp32", "50", 32)],
)
def test_kernels_compile_for_other_gpus_and_widths(
    tmp_path, capability, dtype, width, most_spilled
):
    assert_fits(run_cases(tmp_path, "compile", capability, dtype, width), most_spilled)


@pytest.mark.slow
def test_a_block_compiles_as_one_graph_for_batches_of_all_lengths(tmp_path):
    assert run_cases(tmp_path, "trace") == [1] * 5


def test_changed_kernels_are_no_cached_ones_for_torch_compile(tmp_path):
    """Its cache on disk knows operators by their names."""
    copy = tmp_path / "changed.py"
    copy.write_text(SOURCE.read_text() + "# changed")
    spec = importlib.util.spec_from_file_location("changed", copy)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    tuned = importlib.import_module("ops.triton_attention")
    assert str(changed._gated_attention) != str(tuned._gated_attention)


def test_every_launch_is_in_an_operator():
    """Elsewhere wrap_triton keeps a wrapper of each launch for good."""

    def launches(tree: ast.AST) -> int:
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        return sum(getattr(call.func, "id", None) == "wrap_triton" for call in calls)

    tree = ast.parse(SOURCE.read_text())
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    operators = [f for f in functions if "triton_op" in map(name_of, f.decorator_list)]
    assert sum(map(launches, operators)) == launches(tree) == 5


def name_of(decorator: ast.expr) -> str | None:
    return getattr(getattr(decorator, "func", None), "id", None)


def test_sums_have_one_order():
    """No atomic operation: two runs give equal bits."""
    names = {
        n.attr for n in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(n, ast.Attribute)
    }
    assert not [name for name in names if "atomic" in name]

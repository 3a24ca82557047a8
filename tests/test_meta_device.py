"""A whole training step, validation and export without a GPU: nothing waits, order is fixed."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import Any

import conftest
import pytest
import test_gpu
import torch
from meta_device import Operations, make_batch, patch_torch, prepare

import dataset
import engine.training_setup
import hstu_components
import ops.attention
import ops.infonce
import ops.rows
from engine import training_step
from engine.evaluation import evaluate

FEATURES = {
    "ids": ["--item_features=none", "--user_features=none", "--mm_emb_id"],
    "features": [
        "--item_features=all",
        "--user_features=all",
        "--target_action",
        "--mix_previous=2",
        "--num_heads=2",
        "--time_head",
        "--id_dropout=0.3",
    ],
}
PRECISIONS = ["fp32", "bf16", "fp16"]
# Operations on CUDA whose result depends on which thread comes first: those that torch's
# use_deterministic_algorithms replaces or refuses. Of copies to rows, distinct ones are fine.
NOT_ORDERED = re.compile(
    r"aten\.(index_add|scatter_add|scatter_reduce|scatter_?\.src|index_put|put_|index_reduce|histc"
    r"|bincount|kthvalue|median|embedding_dense_backward|_embedding_bag\w*backward|index_select_back"
    r"|cumsum_?\.|nll_loss2d|gather_backward|segment_reduce|max_pool|avg_pool|grid_sampler)"
)


@pytest.fixture(autouse=True)
def _meta(monkeypatch):
    patch_torch(monkeypatch)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("negatives", ["all", "mixed"])
@pytest.mark.parametrize("dense_rows", [3, 20_000])
def test_a_training_step_waits_for_no_number(
    data, monkeypatch, precision, features, negatives, dense_rows
):
    monkeypatch.setattr(hstu_components, "DENSE_ROWS", dense_rows)
    run = prepare(data, *FEATURES[features], f"--precision={precision}", f"--negatives={negatives}")
    run.training_step([make_batch(run)], epoch=1, step=1)


@pytest.mark.parametrize("wait", [".item()", "mask", "repeats", "two devices"])
def test_a_wait_in_a_step_is_found(data, monkeypatch, wait):
    waits = {
        ".item()": lambda x: x.sum().item(),
        "mask": lambda x: x[x > 0],
        "repeats": lambda x: x.repeat_interleave(torch.ones_like(x[:, 0]).long(), 0),
        "two devices": lambda x: x + torch.ones(x.shape),
    }
    run = prepare(data, *FEATURES["ids"])
    plain = run.model.output_postprocessor.forward
    monkeypatch.setattr(
        run.model.output_postprocessor, "forward", lambda x: (waits[wait](x), plain(x))[1]
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        run.training_step([make_batch(run)], epoch=1, step=1)


def count_copies(monkeypatch) -> list[torch.Size]:
    """Let Tensor.cpu give zeros, and note what was asked for."""
    copied = []

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.shape)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", to_host)
    return copied


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("removes_seen", [True, False])
@pytest.mark.parametrize("features", FEATURES)
def test_validation_waits_at_its_end_alone(data, monkeypatch, precision, removes_seen, features):
    run = prepare(data, *FEATURES[features])
    copied = count_copies(monkeypatch)
    batches = [make_batch(run, "valid", size) for size in (3, 4, 2)]
    ranking = evaluate(run.model, batches, removes_seen, precision)
    assert len(ranking.ranks) == 9
    assert len(copied) == 8 and set(copied) == {(9,), (1,)}


def count_operations(run, monkeypatch) -> Operations:
    """Of the second step: the first one makes the optimiser's state."""
    operations = Operations()
    attention = ops.attention._GatedAttention
    operations.watch(monkeypatch, attention, "forward", "attention")
    operations.watch(monkeypatch, attention, "backward", "attention")
    form = SimpleNamespace(**run.model.hstu.attention._asdict())
    operations.watch(monkeypatch, form, "prepare", "attention")
    monkeypatch.setattr(run.model.hstu, "attention", form)
    operations.watch(monkeypatch, ops.infonce._InfoNCE, "forward", "loss")
    operations.watch(monkeypatch, ops.infonce._InfoNCE, "backward", "loss")
    operations.watch(monkeypatch, dataset.Batch, "to", "copies")
    operations.watch(monkeypatch, training_step, "clip_gradients", "optimiser")
    operations.watch(monkeypatch, run.training_step.optimizer, "step", "optimiser")
    batch = make_batch(run)
    run.training_step([batch], epoch=1, step=1)
    with operations:
        run.training_step([batch], epoch=1, step=2)
    return operations


def test_a_step_keeps_to_its_launches_on_a_gpu(data, monkeypatch):
    """But for the attention, which has its own count: that of its form for a GPU."""
    run = prepare(data, *FEATURES["ids"], "--history_residual=off")
    operations = count_operations(run, monkeypatch)
    assert operations.total("loss") <= 19  # the twentieth sums its rows' gradient
    assert operations.total("optimiser") <= 40
    assert operations.total("rest") <= 77
    assert operations.total("copies") <= 2  # of integers and of floats


@pytest.mark.parametrize(("num_blocks", "most"), [(2, 165), (8, 315)])
def test_a_step_with_triton_keeps_to_its_launches(data, monkeypatch, num_blocks, most):
    """The operations, in which a block's passes are one each, and what these two launch."""
    pytest.importorskip("triton")
    tuned, kernels = importlib.import_module("ops.triton_attention"), Counter()

    def wrap(kernel: Any) -> Any:
        return defaultdict(lambda: lambda *_, **__: kernels.update([kernel.__name__]))

    monkeypatch.setattr(tuned, "wrap_triton", wrap)
    monkeypatch.setattr(engine.training_setup, "choose_kernels", lambda *_: "triton")
    flags = ["--history_residual=off", f"--num_blocks={num_blocks}"]
    operations = count_operations(prepare(data, *FEATURES["ids"], *flags), monkeypatch)
    # Of two steps, forward and backward pass.
    assert kernels.total() == 2 * (2 + 3) * num_blocks
    own = [n for part in operations.parts.values() for name, n in part.items() if "hstu." in name]
    assert own == [num_blocks, num_blocks]
    own_launches = 2 + 3 + 2  # kernels, and partial sums that are set to zero and added up
    assert operations.total(*operations.parts) + (own_launches - 2) * num_blocks <= most
    assert not [name for part in operations.parts.values() for name in part
                if NOT_ORDERED.match(name)]  # fmt: skip


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dense_rows", [3, 20_000])
def test_a_step_on_a_gpu_adds_nothing_up_in_any_order(data, monkeypatch, features, dense_rows):
    monkeypatch.setattr(hstu_components, "DENSE_ROWS", dense_rows)
    monkeypatch.setattr(ops.rows, "SMALL_TABLE", 3)
    run = prepare(data, *FEATURES[features], "--negatives=mixed")
    parts = count_operations(run, monkeypatch).parts
    found = {(part, name) for part in parts for name in parts[part] if NOT_ORDERED.match(name)}
    # Under this mode, torch takes sparse gradients on the meta device for merged ones; torch 2.6
    # does not, and counts distinct rows, in whole numbers.
    assert found <= {("optimiser", "aten.cumsum.default")}
    ordered = "ordered aten.embedding_dense_backward.default"
    assert (ordered in parts["rest"]) == (dense_rows > 3)
    assert ordered in parts["attention"]  # of the time bias


def test_the_tests_of_a_gpu_ask_for_fixtures_that_are_there():
    known = {"tmp_path", "monkeypatch"} | {
        name for name, value in vars(conftest).items() if hasattr(value, "_fixture_function")
    }
    for name, function in inspect.getmembers(test_gpu, inspect.isfunction):
        if name.startswith("test_"):
            marks = getattr(function, "pytestmark", [])
            names = [mark.args[0] for mark in marks if mark.name == "parametrize"]
            given = {arg for n in names for arg in (n.split(",") if isinstance(n, str) else n)}
            assert set(inspect.signature(function).parameters) <= known | given, name


@pytest.mark.parametrize("features", FEATURES)
def test_a_training_step_is_one_that_torch_calls_deterministic(data, monkeypatch, features):
    """On the CPU, which like CUDA refuses operations that have no fixed order."""
    monkeypatch.setattr(engine.training_setup, "pick_device", lambda _: torch.device("cpu"))
    run = prepare(data, *FEATURES[features], "--negatives=mixed")
    torch.use_deterministic_algorithms(True)
    try:
        for step in (1, 2):  # the second finds the optimiser's state
            run.training_step([make_batch(run)], epoch=1, step=step)
    finally:
        torch.use_deterministic_algorithms(False)

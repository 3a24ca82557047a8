"""What only a CUDA device can show. The rest of the suite runs on the CPU."""

from __future__ import annotations

import copy
import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from test_attention import TUNED, random_bias, random_inputs
from test_attention import run as run_attention
from test_main import run, scalars, weights
from test_model import make_batch, make_model

from engine.kernels import MOST_ERROR, choose_kernels, largest_error, why_not_triton
from engine.training_setup import compile_blocks
from engine.training_step import TrainingStep
from model import find_kernels
from simplified_hstu import HSTU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_attention_and_its_gradients_are_those_of_the_cpu():
    grads = []
    for device in ("cpu", "cuda"):
        inputs = {name: x.detach().to(device) for name, x in random_inputs().items()}
        inputs["offsets"] = inputs["offsets"].cpu()
        leaves = [inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()]
        bias = random_bias().to(device)
        output = run_attention(TUNED, inputs, bias)
        grads.append(
            [output, *torch.autograd.grad(output.square().sum(), [*leaves, *bias.parameters()])]
        )
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("precision", MOST_ERROR)
@pytest.mark.parametrize(("num_heads", "width"), [(1, 50), (2, 64), (4, 128)])
@pytest.mark.parametrize(("time_bias", "position_bias"), [("request", True), ("off", False)])
def test_triton_attention_and_its_gradients_are_those_of_the_definition(
    precision, num_heads, width, time_bias, position_bias
):
    config = SimpleNamespace(
        maxlen=70, hidden_units=64, num_heads=num_heads, attention_dim=width, linear_dim=width,
        position_bias=position_bias, time_bias=time_bias,
    )  # fmt: skip
    # The last device is not the current one, where there are several.
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    assert why_not_triton(device, config, precision) is None


@pytest.mark.parametrize("most_programs", [1, 2048], ids=["several blocks each", "a block each"])
def test_two_passes_of_triton_attention_give_equal_bits(most_programs, monkeypatch):
    """And right ones: of a program that sums the biases' gradients of several blocks, too."""
    monkeypatch.setattr(
        importlib.import_module("ops.triton_attention"), "MOST_PROGRAMS", most_programs
    )
    tuned = find_kernels("triton").attention
    found = []
    for _ in range(2):
        inputs = {name: x.detach().cuda() for name, x in random_inputs().items()}
        inputs["offsets"] = inputs["offsets"].cpu()
        leaves = [inputs[name].float().requires_grad_() for name in ("x", "weight")]
        bias = random_bias().float().cuda()
        output = run_attention(tuned, inputs | {"x": leaves[0], "weight": leaves[1]}, bias)
        leaves += bias.parameters()
        found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    config = SimpleNamespace(
        maxlen=70, hidden_units=64, num_heads=2, attention_dim=64, linear_dim=64,
        position_bias=True, time_bias="request",
    )  # fmt: skip
    assert largest_error(tuned, torch.device("cuda"), config, "fp32") <= MOST_ERROR["fp32"]


@pytest.mark.parametrize("negatives", ["all", "mixed"])
def test_the_loss_is_that_of_the_cpu(tiny, negatives):
    batch = make_batch(tiny, negatives=negatives, num_negatives=6)
    model = make_model(tiny)
    expected = model(batch)
    torch.testing.assert_close(model.cuda()(batch.to("cuda")).cpu(), expected, rtol=1e-4, atol=1e-5)


def test_a_step_never_waits_for_the_device(tmp_path, data, monkeypatch):
    """But for lists of values, whose number decides shapes: this data is trained without them."""
    step = TrainingStep.__call__

    def strict_step(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run(tmp_path, data, "--device=cuda", "--item_features=100", "--user_features=none",
        "--log_every=1000", name="warm")  # fmt: skip
    monkeypatch.setattr(TrainingStep, "__call__", strict_step)
    run(tmp_path, data, "--device=cuda", "--item_features=100", "--user_features=none",
        "--log_every=1000")  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("negatives", ["all", "mixed"])
def test_training_on_the_gpu_lowers_the_loss(tmp_path, data, precision, negatives):
    output_dir = run(tmp_path, data, "--device=cuda", f"--precision={precision}", "--num_epochs=8",
                     f"--negatives={negatives}", "--num_negatives=8")  # fmt: skip
    losses = [loss for _, loss in scalars(output_dir, "Loss/train_epoch")]
    assert losses[-1] < losses[0]
    assert all(weight.isfinite().all() for weight in weights(output_dir).values())


def make_hstu(maxlen: int) -> tuple[HSTU, str]:
    """One block with the attention of --kernels auto, and its name."""
    shape = {"num_heads": 1, "attention_dim": 64, "linear_dim": 64, "maxlen": maxlen}
    config = SimpleNamespace(**shape, hidden_units=64, position_bias=True, time_bias="request")
    kernels = choose_kernels("auto", torch.device("cuda"), config)
    hstu = HSTU(
        1, "request", hidden_units=64, dropout_rate=0.0, has_position_bias=True, **shape,
        attention=find_kernels(kernels).attention,
    )  # fmt: skip
    return hstu.cuda(), kernels


def test_a_compiled_run_trains_and_validates(tmp_path, data):
    output_dir = run(tmp_path, data, "--device=cuda", "--compile", "--num_epochs=8")
    losses = [loss for _, loss in scalars(output_dir, "Loss/train_epoch")]
    assert losses[-1] < losses[0]


def test_compiled_blocks_give_the_same_for_all_lengths_without_compiling_again():
    hstu, kernels = make_hstu(maxlen=300)
    compiled = copy.deepcopy(hstu)
    compile_blocks(compiled, kernels)
    torch._dynamo.reset()
    for lengths in ([50, 20, 7], [60, 44, 3, 2], [290, 5], [5], [1, 1, 1]):
        x, times = torch.randn(sum(lengths), 64).cuda(), torch.arange(sum(lengths)).cuda()
        offsets = torch.tensor([0, *itertools.accumulate(lengths)])
        with torch._dynamo.config.patch(error_on_recompile=lengths[0] != 50):
            y = compiled(x.requires_grad_(), offsets, times, times)
            y.sum().backward()
        torch.testing.assert_close(y, hstu(x, offsets, times, times), rtol=1e-4, atol=1e-5)


def test_a_long_history_needs_no_square_of_memory():
    hstu, _ = make_hstu(maxlen=8192)
    torch.cuda.reset_peak_memory_stats()
    x = torch.randn(2 * 8192, 64, device="cuda", requires_grad=True)
    times = torch.arange(2 * 8192, device="cuda")
    before = torch.cuda.max_memory_allocated()
    hstu(x, torch.tensor([0, 8192, 16384]), times, times).sum().backward()
    # Less than a dense form's scores of one sequence, of which its backward pass holds several.
    assert torch.cuda.max_memory_allocated() - before < 8192 * 8192 * 4

"""Which forms a run computes with, and why not Triton's."""

from __future__ import annotations

import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from test_main import run
from torch.torch_version import TorchVersion

from engine import kernels
from engine.kernels import choose_kernels, largest_error
from files.atomic_io import DataError
from files.checkpoint import load_newest_state
from model import KERNELS
from simplified_hstu import Attention

CUDA = torch.device("cuda")
CONFIG = SimpleNamespace(
    maxlen=40, hidden_units=7, num_heads=2, attention_dim=6, linear_dim=4, position_bias=True,
    time_bias="request",
)  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which nothing speaks against Triton."""
    attention = SimpleNamespace(MOST_WIDTH=128, prepare=None, gated_attention=None)
    monkeypatch.setitem(sys.modules, "ops.triton_attention", attention)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.0+cu126"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(kernels, "largest_error", lambda *_: 1e-6)


def test_auto_takes_triton_on_a_gpu_and_torch_on_a_cpu(gpu):
    assert choose_kernels("auto", CUDA, CONFIG) == "triton"
    assert choose_kernels("auto", torch.device("cpu"), CONFIG) == "torch"


@pytest.mark.parametrize("asked", ["torch", "plain"])
def test_what_needs_no_triton_is_not_checked(asked, monkeypatch):
    monkeypatch.setattr(kernels, "why_not_triton", None)
    assert choose_kernels(asked, CUDA, CONFIG) == asked


def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "ops.triton_attention", None)


def with_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cu124"))


def on_an_old_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


def with_wide_queries(monkeypatch):
    monkeypatch.setattr(CONFIG, "attention_dim", 129)


def with_wide_values(monkeypatch):
    monkeypatch.setattr(CONFIG, "linear_dim", 200)


def with_wrong_numbers(monkeypatch):
    monkeypatch.setattr(kernels, "largest_error", lambda *_: float("nan"))


def with_a_broken_compiler(monkeypatch):
    def fail(*_):
        raise RuntimeError("no C compiler\nfound")

    monkeypatch.setattr(kernels, "largest_error", fail)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_triton, "triton cannot be imported"),
        (with_old_torch, r"it needs torch 2\.7, not 2\.6\.0"),
        (on_an_old_card, r"it needs compute capability 8\.0, not 7\.5"),
        (with_wide_queries, "--attention_dim 129 is above 128"),
        (with_wide_values, "--linear_dim 200 is above 128"),
        (with_wrong_numbers, "its self-check is off by nan"),
        (with_a_broken_compiler, "its self-check failed: RuntimeError: no C compiler$"),
    ],
)
def test_a_reason_against_triton_is_one_line_and_torch_or_an_error(
    gpu, monkeypatch, caplog, change, reason
):
    change(monkeypatch)
    with caplog.at_level(logging.INFO, "hstu"):
        assert choose_kernels("auto", CUDA, CONFIG) == "torch"
    assert re.search("^attention without Triton: .*" + reason, caplog.messages[-1])
    with pytest.raises(DataError, match=f"--kernels triton: .*{reason.removesuffix('$')}"):
        choose_kernels("triton", CUDA, CONFIG)


def test_a_self_check_that_breaks_cuda_ends_the_run_with_one_line(gpu, monkeypatch):
    def fail(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "largest_error", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    expected = r"broke CUDA \(RuntimeError: an illegal .* encountered\); use --kernels torch"
    with pytest.raises(DataError, match=expected):
        choose_kernels("auto", CUDA, CONFIG)


def test_triton_on_a_cpu_is_an_error_in_one_line():
    with pytest.raises(DataError, match="it needs a CUDA device, not cpu; use --kernels auto"):
        choose_kernels("triton", torch.device("cpu"), CONFIG)


@pytest.mark.parametrize("precision", kernels.MOST_ERROR)
def test_the_self_check_passes_a_right_form_and_leaves_random_numbers_alone(precision):
    before = torch.get_rng_state()
    error = largest_error(KERNELS["torch"].attention, torch.device("cpu"), CONFIG, precision)
    assert error < kernels.MOST_ERROR[precision] / 2
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", kernels.MOST_ERROR)
def test_the_self_check_finds_a_form_that_forgets_a_bias(precision):
    prepare, gated_attention, _ = KERNELS["torch"].attention

    def forgetful(x, weight, bias, *rest):
        with_half = SimpleNamespace(
            position_weight=bias.position_weight, time_weight=bias.time_weight * 0.5
        )
        return gated_attention(x, weight, with_half, *rest)

    form = Attention(prepare, forgetful)
    error = largest_error(form, torch.device("cpu"), CONFIG, precision)
    assert error > kernels.MOST_ERROR[precision]


def test_a_resume_with_other_kernels_says_that_last_bits_differ(tmp_path, tiny, caplog):
    run(tmp_path, tiny, "--num_epochs=1", "--kernels=plain")
    assert load_newest_state(tmp_path / "run")["kernels"] == "plain"
    with caplog.at_level(logging.INFO, "hstu"):
        run(tmp_path, tiny, "--num_epochs=1", "--kernels=plain")
        assert "last bits" not in caplog.text
        run(tmp_path, tiny, "--num_epochs=1", "--kernels=torch")
    assert "computed with the plain kernels, and this run with torch: last bits" in caplog.text

"""InfoNCE in chunks against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import infonce_loss as definition
from ops import infonce
from ops.infonce import infonce_loss

TEMPERATURE = 0.3


def loss_case(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float]:
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(113, 5, generator=generator, dtype=torch.float64).requires_grad_()
    rows = torch.randn(38, 5, generator=generator, dtype=torch.float64).requires_grad_()
    target_index = torch.randint(0, 38, (113,), generator=generator)
    target_index[[0, 7]] = -1
    negative_index = None
    if case != "all items":
        negative_index = torch.randperm(38, generator=generator)[:19]
    log_q = None
    if case == "logQ":
        log_q = torch.randn(19, generator=generator, dtype=torch.float64)
    return queries, rows, target_index, negative_index, log_q, TEMPERATURE


@pytest.fixture(params=["one chunk", "chunks", "threads"])
def chunk(request, monkeypatch):
    """All queries at once, two by two, or in chunks of six: two for each of three threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    sizes = {"one chunk": (1 << 20, 1 << 20), "chunks": (32, 1 << 20), "threads": (96, 1)}
    logits, queries = sizes[request.param]
    monkeypatch.setattr(infonce, "THREAD_LOGITS", logits)
    monkeypatch.setattr(infonce, "THREAD_QUERIES", queries)


@pytest.fixture(params=["gpu", "gpu chunks"])
def gpu_form(request, monkeypatch):
    """What a GPU computes, on the CPU; at once or seven queries at a time."""
    monkeypatch.setattr(infonce, "_by_threads", infonce._in_few_kernels)
    if request.param == "gpu chunks":
        monkeypatch.setattr(infonce, "GPU_LOGITS", 7 * 39)


@pytest.mark.parametrize("case", ["all items", "some items", "logQ"])
def test_the_form_of_a_gpu_equals_the_definition(case, gpu_form):
    test_value_and_gradients_equal_the_definition(case, None)


@pytest.mark.parametrize("case", ["all items", "some items", "logQ"])
def test_a_share_of_a_batch_without_any_event_loses_nothing(case, gpu_form):
    queries, rows, target_index, *rest = loss_case(case)
    loss = infonce_loss(queries[:0], rows, target_index[:0], *rest)
    loss.backward()
    assert loss.item() == 0.0
    assert not queries.grad.any() and not rows.grad.any()


@pytest.mark.parametrize("case", ["all items", "some items", "logQ"])
def test_value_and_gradients_equal_the_definition(case, chunk):
    queries, rows, *rest = loss_case(case)
    found, expected = infonce_loss(queries, rows, *rest), definition(queries, rows, *rest)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads, expected_grads = (torch.autograd.grad(3 * x, (queries, rows)) for x in (found, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_the_loss_passes_gradcheck():
    queries, rows, *rest = loss_case("logQ")
    assert torch.autograd.gradcheck(lambda q, r: infonce_loss(q, r, *rest), (queries, rows))


@pytest.mark.parametrize("form", [definition, infonce_loss], ids=["definition", "tuned"])
def test_a_batch_without_any_target_loses_nothing(form):
    queries, rows, target_index, *rest = loss_case("some items")
    loss = form(queries, rows, target_index.fill_(-1), *rest)
    loss.backward()
    assert loss.item() == 0.0
    assert not queries.grad.any() and not rows.grad.any()


@pytest.mark.parametrize("form", [definition, infonce_loss], ids=["definition", "tuned"])
def test_the_loss_is_finite_and_right_for_a_tiny_temperature(form):
    queries = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
    rows = torch.nn.functional.normalize(torch.randn(9, 5), dim=1)
    found = form(queries, rows, torch.arange(6), None, None, 1e-4)
    expected = definition(queries.double(), rows.double(), torch.arange(6), None, None, 1e-4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)

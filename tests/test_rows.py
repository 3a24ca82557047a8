"""Rows of a table, and the ordered sums that are their gradients."""

from __future__ import annotations

import torch

from ops.rows import sum_rows, take_rows

R, D = 7, 3
INDEX = torch.tensor([5, 0, 5, 2, 2, 5, 6])
ORDER = INDEX.argsort(stable=True), torch.tensor([0, 1, 1, 3, 3, 3, 6, 7])


def test_rows_and_their_gradient_are_those_of_indexing():
    rows = torch.randn(R, D, dtype=torch.float64).requires_grad_()
    weights = torch.randn(len(INDEX), D, dtype=torch.float64)
    grads = []
    for taken in (take_rows(rows, INDEX, ORDER), take_rows(rows, INDEX), rows[INDEX]):
        assert torch.equal(taken, rows[INDEX])
        grads += torch.autograd.grad((taken * weights).sum(), rows)
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(grads[1], grads[2], rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda r: take_rows(r, INDEX, ORDER).square(), rows)


def test_a_rows_values_are_summed_in_the_order_given():
    """In float32, 1e8 + 1 - 1e8 is 0 or 1, as the order says."""
    values = torch.tensor([[1e8], [1.0], [-1e8]])
    bounds = torch.tensor([0, 3])
    assert sum_rows(values, (torch.tensor([0, 1, 2]), bounds)).item() == 0
    assert sum_rows(values, (torch.tensor([0, 2, 1]), bounds)).item() == 1


def test_no_values_at_all_sum_to_zeros():
    empty = torch.empty(0, dtype=torch.int64), torch.zeros(R + 1, dtype=torch.int64)
    assert torch.equal(sum_rows(torch.empty(0, D), empty), torch.zeros(R, D))

"""Rows of a table, and the ordered sums that are their gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import ops.rows as rows_module
from ops.collectives import sparse_rows
from ops.rows import SMALL_TABLE, sum_rows, take_rows, take_table_rows

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


def test_an_order_of_fewer_rows_leaves_the_last_ones_without_gradient():
    rows = torch.randn(R + 2, D).requires_grad_()
    (grad,) = torch.autograd.grad(take_rows(rows, INDEX, ORDER).sum(), rows)
    assert torch.equal(
        grad, rows.detach().new_zeros(R + 2, D).index_add(0, INDEX, torch.ones(7, D))
    )


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("are_distinct", [False, True])
def test_a_tables_gradient_is_that_of_an_embedding(is_sparse, are_distinct):
    """Whose padding row, 0, has none."""
    ids = torch.tensor([1, 3, 4, 6]) if are_distinct else torch.tensor([3, 0, 3, 6])
    table, weights = torch.randn(R, D).requires_grad_(), torch.randn(4, D)
    expected = (F.embedding(ids, table, padding_idx=0) * weights).sum()
    found = (take_table_rows(table, ids, is_sparse, are_distinct) * weights).sum()
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(loss, table)[0] for loss in (found, expected)]
    assert grads[0].is_sparse == is_sparse
    torch.testing.assert_close(grads[0].to_dense(), grads[1])
    assert not is_sparse or grads[0].is_coalesced() == are_distinct


@pytest.mark.parametrize("num_rows", [SMALL_TABLE, SMALL_TABLE + 1])
def test_the_forms_of_a_gpu_give_a_tables_gradient(num_rows):
    """By a product for a small table, by sums that split a frequent row for others."""
    ids = torch.randint(0, num_rows, (301,)).masked_fill_(torch.rand(301) < 0.5, 3)
    table, grad = torch.randn(num_rows, D), torch.randn(301, D)
    context = SimpleNamespace(
        saved_tensors=(ids,), num_rows=num_rows, is_sparse=False, are_distinct=False
    )
    found, *_ = rows_module._TakeTableRows.backward(context, grad)
    table.requires_grad_()
    (expected,) = torch.autograd.grad(F.embedding(ids, table, padding_idx=0), table, grad)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_gradient_merged_without_a_wait_is_the_coalesced_one():
    """The form of a GPU: what is left over are zeros of row 0."""
    grad = sparse_rows(torch.tensor([5, 0, 2, 5, 5]), torch.randn(5, D), R)
    expected = grad.coalesce()
    merged = rows_module._merge_rows_without_wait(grad)
    assert merged.is_coalesced() and merged.indices().tolist() == [[0, 2, 5, 0, 0]]
    torch.testing.assert_close(merged.values()[:3], expected.values())
    assert not merged.values()[3:].any()


def test_a_gradient_of_no_row_is_merged_without_a_wait():
    """As a process has of a table, if no sequence of a small last batch is its."""
    grad = sparse_rows(torch.empty(0, dtype=torch.int64), torch.empty(0, D), R)
    merged = rows_module._merge_rows_without_wait(grad)
    assert merged.is_coalesced() and merged.shape == (R, D) and merged._nnz() == 0

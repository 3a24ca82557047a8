"""Rows of a table by index, with gradients that are summed in the same order every time.

torch sums the gradients of a row that is taken several times by atomic additions on CUDA, in the
order in which threads happen to come. Here the order is given. On the CPU this takes a fifth of the
time of torch's own sum, which has the same bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.collectives import sparse_rows

Order = tuple[Tensor, Tensor]
SMALL_TABLE = 64  # rows of which the gradient on a GPU is a matrix product: of action types, say


def take_rows(rows: Tensor, index: Tensor, order: Order | None = None) -> Tensor:
    """(R, D) -> (n, D): rows[index].

    Args:
        rows: float.
        index: (n,) int64 in 0..R-1.
        order: what `sum_rows` needs for the gradient, int64: (n,) the places of `index`, those of
            row 0 first; and (R + 1,) where those of each row begin, or fewer where the last rows
            are not taken. None: gradients are not needed, or may be summed in any order.
    """
    if order is None:
        return rows.index_select(0, index)
    return _TakeRows.apply(rows, index, *order)


def sum_rows(values: Tensor, order: Order) -> Tensor:
    """(n, D) -> (R, D): the sum of each row's values; `order` as in `take_rows`."""
    places, bounds = order
    return F.embedding_bag(places, values, bounds, mode="sum", include_last_offset=True)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index, places, bounds):
        ctx.save_for_backward(places, bounds)
        ctx.num_rows = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        sums = sum_rows(grad.contiguous(), ctx.saved_tensors)
        if len(sums) < ctx.num_rows:
            sums = F.pad(sums, (0, 0, 0, ctx.num_rows - len(sums)))
        return sums, None, None, None


def take_table_rows(
    table: Tensor, ids: Tensor, is_sparse: bool, are_distinct: bool = False
) -> Tensor:
    """(X + 1, D) -> (n, D): table[ids], where row 0 gets no gradient.

    As F.embedding, but on a GPU nothing waits for the device, and sums have an order.

    Args:
        table: float; row 0 is padding, and zero.
        ids: (n,) int64 in 0..X.
        is_sparse: the gradient is a sparse tensor of these rows.
        are_distinct: the ids rise, and none is 0; so the gradient needs no sort.
    """
    if table.device.type == "cpu" and not (is_sparse or are_distinct):
        return F.embedding(ids, table, padding_idx=0)
    return _TakeTableRows.apply(table, ids, is_sparse, are_distinct)


class _TakeTableRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, ids, is_sparse, are_distinct):
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.is_sparse, ctx.are_distinct = len(table), is_sparse, are_distinct
        return table.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        if not ctx.are_distinct:
            grad = grad * (ids > 0)[:, None]
        if ctx.is_sparse:
            table_grad = sparse_rows(ids, grad, ctx.num_rows, ctx.are_distinct)
            return table_grad, None, None, None
        rows = torch.arange(ctx.num_rows + 1, device=ids.device)
        if ctx.are_distinct:
            order = rows[: len(ids)], torch.searchsorted(ids, rows)
            table_grad = sum_rows(grad.contiguous(), order)
        elif ctx.num_rows <= SMALL_TABLE:  # in few kernels, however often a row is taken
            table_grad = (ids == rows[:-1, None]).to(grad.dtype) @ grad
        else:
            table_grad = sum_unsorted(grad, ids, ctx.num_rows)
        return table_grad, None, None, None


def merge_rows(grad: Tensor) -> Tensor:
    """A table's sparse gradient, (X + 1, D), with the values of each row summed: coalesced.

    As Tensor.coalesce. On a GPU nothing waits for the number of distinct rows: as many are kept as
    there were, and those left over are zeros of row 0, the padding.
    """
    if grad.is_coalesced() or grad.device.type == "cpu":
        return grad.coalesce()
    return _merge_rows_without_wait(grad)


def _merge_rows_without_wait(grad: Tensor) -> Tensor:
    rows, places = grad._indices()[0].sort(stable=True)
    is_first = torch.cat([rows.new_ones(1), rows.diff().clamp(max=1)])[: len(rows)]  # may be none
    group = is_first.cumsum(0) - 1  # (n,) rising: which of the distinct rows
    firsts = torch.searchsorted(group, torch.arange(len(rows), device=rows.device))
    distinct = F.pad(rows, (0, 1))[firsts]  # (n,), n is the place of the 0 for those left over
    values = grad._values().index_select(0, places)
    sums = sum_unsorted(values, group, len(rows))
    return sparse_rows(distinct, sums, len(grad), is_coalesced=True)


def sum_unsorted(values: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """(n, D) -> (num_rows, D): the sum of each row's values, `ids` (n,), in the same order always.

    A row that is most of them is split over threads, unlike in `sum_rows`.
    """
    was_on, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)  # or on CUDA it adds up atomically
    fills, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,  # else a third of its launches would fill what is written anyway
    )
    try:
        return torch.ops.aten.embedding_dense_backward(values, ids, num_rows, -1, False)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(was_on, warn_only=warns)

"""InfoNCE and its gradients in one pass over chunks of queries; `model.infonce_loss` defines it.

Only the logits of a chunk exist at a time: in the CPU's cache, or in few kernels of a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.rows import take_rows

# Logits of a chunk, in floats: on the CPU 4 MB a thread, so that the passes over a chunk stay in
# the cache; on a GPU 256 MB, and as many for their softmax, in few kernels.
THREAD_LOGITS, GPU_LOGITS = 1 << 20, 1 << 26
# With fewer queries per thread in a chunk, threads share its products as BLAS likes.
THREAD_QUERIES = 64
# Up to here exponentials do not overflow, nor do sums of millions of them. A cosine is at most 1,
# so only temperatures below 1 / 60 need their largest logit subtracted first.
SAFE_LOGIT = 60.0


class LossRows(NamedTuple):
    """The rows that a loss takes, and how: what follows from its indices alone."""

    index: Tensor  # (T + M,) int64, row of each query's positive (0: none), then of each negative
    own_column: Tensor  # (T,) int64, which of the negatives is the query's positive; M: none
    weights: Tensor  # (T,) float, each query's share of the mean; 0 without a target
    places: Tensor | None = None  # these two: order of `index` as in ops.rows.take_rows; None: any
    bounds: Tensor | None = None


def infonce_loss(
    queries: Tensor,
    rows: Tensor,
    target_index: Tensor,
    negative_index: Tensor | None,
    negative_log_q: Tensor | None,
    temperature: float,
    loss_rows: LossRows | None = None,
) -> Tensor:
    """As `model.infonce_loss`; `loss_rows`: of these indices, where they are known already."""
    if loss_rows is None:
        loss_rows = index_rows(target_index, negative_index, len(rows), queries.dtype)
    index, own_column, weights, *order = loss_rows
    used = take_rows(rows, index, order if order[0] is not None else None)  # (T + M, D)
    options = weights, negative_log_q, temperature, torch.is_grad_enabled()
    return _InfoNCE.apply(queries, used, own_column, *options)


def index_rows(
    target_index: Tensor,
    negative_index: Tensor | None,
    num_rows: int,
    dtype: torch.dtype = torch.float32,
) -> LossRows:
    """LossRows without an order; arguments as in `infonce_loss`, `num_rows`: R."""
    rows = torch.arange(num_rows, device=target_index.device)
    negative_index = rows if negative_index is None else negative_index
    M = len(negative_index)
    columns = torch.full_like(rows, M).index_copy_(0, negative_index, rows[:M])
    positives = target_index.clamp(min=0)
    weights = (target_index >= 0).to(dtype)
    weights /= weights.sum().clamp(min=1)
    return LossRows(torch.cat([positives, negative_index]), columns[positives], weights)


class _InfoNCE(torch.autograd.Function):
    """The loss, and its gradients in the forward pass: as it is a scalar, they only get scaled."""

    @staticmethod
    def forward(ctx, queries, used, own_column, weights, log_q, temperature, needs_grad):
        form = _by_threads if queries.device.type == "cpu" else _in_few_kernels
        loss, *grads = form(queries, used, own_column, weights, log_q, temperature, needs_grad)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return *torch._foreach_mul(ctx.saved_tensors, grad), None, None, None, None, None


def _in_few_kernels(
    queries: Tensor,
    used: Tensor,
    own_column: Tensor,
    weights: Tensor,
    log_q: Tensor | None,
    temperature: float,
    needs_grad: bool,
) -> tuple[Tensor, ...]:
    """Loss, and gradients of queries (T, D) and of used rows (T + M, D), for a GPU."""
    T, M = len(queries), len(used) - len(queries)
    if not T:  # with several processes, one may have no sequence of a small batch
        return queries.sum(), queries, torch.zeros_like(used)
    positives, negatives = used.split([T, M])
    scale = (weights / temperature)[:, None]  # (T, 1)
    shares, losses = queries * scale, []  # (T, D)
    query_grad, used_grad = torch.empty_like(queries), torch.empty_like(used)
    size = max(1, GPU_LOGITS // (M + 1))
    for start in range(0, T, size):
        part, is_first = slice(start, min(start + size, T)), start == 0
        # M negatives, then the positive.
        logits = queries.new_empty(part.stop - start, M + 1)
        product = logits[None, :, :M]
        product.baddbmm_(queries[None, part], negatives.T[None], beta=0, alpha=1 / temperature)
        if log_q is not None:
            product -= log_q
        logits.scatter_(1, own_column[part, None], -torch.inf)
        cosines = (queries[part] * positives[part]).sum(1)
        torch.div(cosines, temperature, out=logits[:, M])
        log_p = logits.log_softmax(1)
        losses.append(weights[part] @ log_p[:, M])
        if not needs_grad:
            continue
        p = log_p.exp_()
        p[:, M] -= 1  # p times scale: gradient of the cosines
        torch.mm(p[:, :M], negatives, out=query_grad[part])
        query_grad[part].addcmul_(p[:, M:], positives[part])
        torch.mul(p[:, M:], shares[part], out=used_grad[part])
        used_grad[T:].addmm_(p[:, :M].T, shares[part], beta=0 if is_first else 1)
    return -sum(losses[1:], losses[0]), query_grad.mul_(scale), used_grad


def _by_threads(
    queries: Tensor,
    used: Tensor,
    own_column: Tensor,
    weights: Tensor,
    log_q: Tensor | None,
    temperature: float,
    needs_grad: bool,
) -> tuple[Tensor, ...]:
    """As `_in_few_kernels`, for the CPU: without gradients, only the loss."""
    T, M = len(queries), len(used) - len(queries)
    size, parts = _chunk_shape(T, M + 1)
    inputs = queries / temperature, used[:T], own_column, weights
    if padding := -T % parts:  # queries without a target
        inputs = (F.pad(x, (0, 0) * (x.dim() - 1) + (0, padding)) for x in inputs)
    q, positive, own_column, weights = inputs
    positive_logit = (q * positive).sum(1)  # (T,)
    is_safe = 1 / temperature <= SAFE_LOGIT
    peak, total = torch.zeros_like(positive_logit), torch.empty_like(positive_logit)  # (T,)
    # A query's logits: M negatives, then its positive, whose vector is zero in the products.
    negatives = F.pad(used[T:], (0, 0, 0, 1)).expand(parts, -1, -1)  # (parts, M + 1, D)
    query_grad, negative_grad = torch.empty_like(q), queries.new_zeros(negatives.shape)
    by_thread = partial(Tensor.unflatten, dim=0, sizes=(parts, -1))  # (c, .) -> (parts, c', .)
    buffer = queries.new_empty(min(size, len(q)), M + 1)
    for start in range(0, len(q), size):
        part = slice(start, start + size)
        logits = buffer[: len(q[part])]  # (c, M + 1)
        torch.bmm(by_thread(q[part]), negatives.mT, out=by_thread(logits))
        if log_q is not None:
            logits[:, :M] -= log_q
        logits.scatter_(1, own_column[part, None], -torch.inf)
        logits[:, M] = positive_logit[part]
        if not is_safe:
            torch.amax(logits, 1, out=peak[part])
            logits -= peak[part, None]
        exps = logits.exp_()
        torch.sum(exps, 1, out=total[part])
        if needs_grad:
            torch.bmm(by_thread(exps), negatives, out=by_thread(query_grad[part]))
            shares = q[part] * (weights[part] / total[part])[:, None]
            negative_grad.baddbmm_(by_thread(exps).mT, by_thread(shares))
    loss = weights @ (total.log() + peak - positive_logit)
    if not needs_grad:
        return (loss,)
    scale = weights / total  # (T,), exps * scale: gradient of the logits
    positive_grad = (torch.exp(positive_logit - peak) * scale - weights)[:, None]  # of its logit
    query_grad.mul_(scale[:, None]).addcmul_(positive_grad, positive).div_(temperature)
    used_grad = torch.empty_like(used)
    torch.mul(positive_grad[:T], q[:T], out=used_grad[:T])
    torch.sum(negative_grad[:, :M], 0, out=used_grad[T:])  # over the threads
    return loss, query_grad[:T], used_grad


def _chunk_shape(num_queries: int, width: int) -> tuple[int, int]:
    """Queries in a chunk, and the number of equal parts that it is cut into, one for each thread.

    So all products of a thread are of the same queries, and their logits stay in its own cache;
    BLAS would divide each product in its own way.
    """
    threads, size = torch.get_num_threads(), THREAD_LOGITS // width
    if min(size, num_queries // threads) < THREAD_QUERIES:
        return max(1, threads * THREAD_LOGITS // width), 1
    return threads * size, threads

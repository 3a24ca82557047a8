"""InfoNCE and its gradients in one pass over chunks of queries; `model.infonce_loss` defines it.

Only the logits of a chunk exist at a time: in the CPU's cache, or in few kernels of a GPU.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of a chunk, in floats: on the CPU 4 MB a thread, so that the passes over a chunk stay in
# the cache; on a GPU 256 MB in few kernels.
THREAD_LOGITS, GPU_LOGITS = 1 << 20, 1 << 26
# With fewer queries per thread in a chunk, threads share its products as BLAS likes.
THREAD_QUERIES = 64
# Up to here exponentials do not overflow, nor do sums of millions of them. A cosine is at most 1,
# so only temperatures below 1 / 60 need their largest logit subtracted first.
SAFE_LOGIT = 60.0


def infonce_loss(
    queries: Tensor,
    rows: Tensor,
    target_index: Tensor,
    negative_index: Tensor | None,
    negative_log_q: Tensor | None,
    temperature: float,
) -> Tensor:
    """As `model.infonce_loss`."""
    indices = target_index, negative_index, negative_log_q
    return _InfoNCE.apply(queries, rows, *indices, temperature, torch.is_grad_enabled())


class _InfoNCE(torch.autograd.Function):
    """The loss, and its gradients in the forward pass: as it is a scalar, they only get scaled."""

    @staticmethod
    def forward(ctx, queries, rows, target_index, negative_index, log_q, temperature, needs_grad):
        negatives = rows if negative_index is None else rows.index_select(0, negative_index)
        M, num_queries = len(negatives), len(queries)
        size, parts = _chunk_shape(queries, M + 1)
        padding = -num_queries % parts  # queries without a target
        queries = F.pad(queries, (0, 0, 0, padding))
        target_index = F.pad(target_index, (0, padding), value=-1)
        positives = target_index.clamp(min=0)
        weights = (target_index >= 0).to(queries.dtype)
        weights /= weights.sum().clamp(min=1)  # (T,), each query's share of the mean
        own_column = positives  # (T,)
        if negative_index is not None:
            own_column = _column_of_each_row(rows, negative_index)[positives]
        q, positive = queries / temperature, rows.index_select(0, positives)  # (T, D)
        positive_logit = (q * positive).sum(1)  # (T,)
        is_safe = 1 / temperature <= SAFE_LOGIT
        peak, total = torch.zeros_like(positive_logit), torch.empty_like(positive_logit)  # (T,)
        # A query's logits: M negatives, then its positive, whose vector is zero in the products.
        negatives = F.pad(negatives, (0, 0, 0, 1)).expand(parts, -1, -1)  # (parts, M + 1, D)
        query_grad, negative_grad = torch.empty_like(queries), queries.new_zeros(negatives.shape)
        by_thread = partial(Tensor.unflatten, dim=0, sizes=(parts, -1))  # (c, .) -> (parts, c', .)
        buffer = queries.new_empty(min(size, len(queries)), M + 1)
        for start in range(0, len(queries), size):
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
            return loss
        scale = weights / total  # (T,), exps * scale: gradient of the logits
        positive_grad = torch.exp(positive_logit - peak) * scale - weights  # (T,), of its logit
        query_grad.mul_(scale[:, None]).addcmul_(positive_grad[:, None], positive).div_(temperature)
        row_grad = torch.zeros_like(rows).index_add_(0, positives, positive_grad[:, None] * q)
        negative_grad = negative_grad.sum(0)[:M]  # over the threads
        if negative_index is None:
            row_grad += negative_grad
        else:
            row_grad.index_add_(0, negative_index, negative_grad)
        ctx.save_for_backward(query_grad[:num_queries], row_grad)
        return loss

    @staticmethod
    def backward(ctx, grad):
        query_grad, row_grad = ctx.saved_tensors
        return query_grad * grad, row_grad * grad, None, None, None, None, None


def _chunk_shape(queries: Tensor, width: int) -> tuple[int, int]:
    """Queries in a chunk, and the number of equal parts that it is cut into, one for each thread.

    So on the CPU all products of a thread are of the same queries, and their logits stay in its own
    cache; BLAS would divide each product in its own way.
    """
    if queries.device.type != "cpu":
        return max(1, GPU_LOGITS // width), 1
    threads, size = torch.get_num_threads(), THREAD_LOGITS // width
    if min(size, len(queries) // threads) < THREAD_QUERIES:
        return max(1, threads * THREAD_LOGITS // width), 1
    return threads * size, threads


def _column_of_each_row(rows: Tensor, negative_index: Tensor) -> Tensor:
    """(R,) int64: each row's column among the M negatives; M, one too many, if it is not there."""
    M = len(negative_index)
    columns = torch.full((len(rows),), M, device=rows.device)
    return columns.index_copy_(0, negative_index, torch.arange(M, device=rows.device))

"""HSTU's layers: relative attention bias, pointwise attention over packed sequences, the encoder.

Letters used throughout the package (arXiv 2402.17152 has n, d, h for N, D, H):
    B    sequences in the batch
    T    events in the batch, the sequences laid end to end
    N    longest history, `maxlen`
    D    embedding width
    H    heads
    dqk  query and key width per head
    dv   value and gate width per head
    R    distinct items in the batch
    M    negatives
    X    items
    K    cut-off of a ranking
    G, L sequences in an attention rectangle and its length (only here)
"reference" is facebookresearch/generative-recommenders, research/modeling/sequential/hstu.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Edge of an attention tile. Tiles above the diagonal are not computed.
TILE = 128
# Cells of a rectangle: on the CPU such that a tile's scores stay in the cache (8 sequences of 200
# events); on a GPU few large kernels are better, and this bounds a score tensor to 256 MB.
CPU_CELLS = 8 * 200 * 200
GPU_CELLS = 1 << 26
# Time buckets grow by e ** 0.301 = 1.35, not by two: the reference divides a natural logarithm by
# log10(2). Kept, because the published results have it.
BUCKET_LOG_WIDTH = 0.301
NUM_TIME_BUCKETS = 129
NORM_EPS = 1e-6
INIT_STD = 0.02


class Tile(NamedTuple):
    """Some queries of a rectangle and every key that one of them may see."""

    rows: slice  # queries
    keys: slice  # 0 .. rows.stop
    distances: Tensor  # (rows, keys) int64: query position minus key position, not below 0
    time_buckets: Tensor | None  # (G, rows, keys) int64 in 0..128


class Rectangle(NamedTuple):
    """Neighbouring sequences of a packed batch, padded to one length for the attention alone."""

    events: slice  # its rows of the packed batch
    shape: tuple[int, int]  # G, L
    cells: Tensor | None  # each event's cell in 0..G*L-1, int64; None: no gaps
    tiles: list[Tile]

    def pad(self, x: Tensor) -> Tensor:
        """(T, H, C) packed -> (G, H, L, C) with zeros in the gaps."""
        return _pad(x[self.events], self.shape, self.cells).transpose(1, 2)

    def unpad_into(self, packed: Tensor, x: Tensor) -> None:
        """Copy (G, H, L, C) to this rectangle's rows of (T, H, C)."""
        x = x.transpose(1, 2).flatten(0, 1)  # (G * L, H, C)
        packed[self.events] = x if self.cells is None else x[self.cells]


def _pad(x: Tensor, shape: tuple[int, int], cells: Tensor | None) -> Tensor:
    if cells is not None:
        x = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy_(0, cells, x)
    return x.reshape(*shape, *x.shape[1:])


def cut_rectangles(
    offsets: Tensor, key_times: Tensor, query_times: Tensor | None
) -> list[Rectangle]:
    """The batch's attention rectangles, with everything in them that all blocks share.

    Batches come ordered by length, so a rectangle has few gaps; any order is correct.

    Args:
        offsets: (B + 1,) int64 on the CPU: the cuts need no wait for the device.
        key_times: (T,) int64 seconds.
        query_times: (T,) int64 seconds, or None for no time buckets.
    """
    lengths = offsets.diff().tolist()
    max_cells = CPU_CELLS if key_times.device.type == "cpu" else GPU_CELLS
    rectangles, first, longest = [], 0, 0
    for end, length in enumerate(lengths):
        if end > first and (end + 1 - first) * max(longest, length) ** 2 > max_cells:
            rectangles.append(_rectangle(offsets[first : end + 1], longest, key_times, query_times))
            first, longest = end, 0
        longest = max(longest, length)
    rectangles.append(_rectangle(offsets[first:], longest, key_times, query_times))
    return rectangles


def _rectangle(offsets: Tensor, length: int, key_times, query_times) -> Rectangle:
    events = slice(int(offsets[0]), int(offsets[-1]))
    shape = (len(offsets) - 1, length)
    cells = None
    if events.stop - events.start < shape[0] * shape[1]:
        gaps = torch.arange(shape[0]) * length - (offsets[:-1] - offsets[0])  # (G,)
        cells = torch.arange(events.stop - events.start) + gaps.repeat_interleave(offsets.diff())
        cells = cells.to(key_times.device, non_blocking=True)
    keys_ = _pad(key_times[events], shape, cells)  # (G, L)
    queries_ = None if query_times is None else _pad(query_times[events], shape, cells)
    starts = range(0, length, TILE)
    tiles = [_tile(slice(i, min(i + TILE, length)), keys_, queries_) for i in starts]
    return Rectangle(events, shape, cells, tiles)


def _tile(rows: slice, key_times: Tensor, query_times: Tensor | None) -> Tile:
    keys = slice(0, rows.stop)
    positions = torch.arange(rows.stop, device=key_times.device)
    distances = (positions[rows, None] - positions).clamp_(min=0)  # (rows, keys)
    buckets = None
    if query_times is not None:
        buckets = time_buckets(query_times[:, rows, None] - key_times[:, None, keys])
    return Tile(rows, keys, distances, buckets)


def time_buckets(seconds: Tensor) -> Tensor:
    """floor(ln(max(1, |seconds|)) / 0.301), at most 128, as int64 (reference bucketization_fn)."""
    logs = seconds.abs().clamp_(min=1).float().log_()
    return logs.div_(BUCKET_LOG_WIDTH).long().clamp_(max=NUM_TIME_BUCKETS - 1)


class RelativeAttentionBias(nn.Module):
    """A learnt scalar per distance in positions and per bucket of elapsed time, shared by heads.

    Reference RelativeBucketedTimeAndPositionBasedBias; ours has no weights for the future.
    """

    def __init__(self, maxlen: int, has_position: bool, has_time: bool):
        super().__init__()
        self.position_weight = _bias_weight(maxlen) if has_position else None
        self.time_weight = _bias_weight(NUM_TIME_BUCKETS) if has_time else None


def _bias_weight(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size).normal_(std=INIT_STD))


class PointwiseAttention(torch.autograd.Function):
    """(1 / N) sum over j <= i of SiLU(q_i k_j + position_bias + time_bias) v_j, tile by tile.

    Without a softmax a tile needs nothing from its neighbours, so scores live for one tile only:
    they are computed again in the backward pass and memory grows with T. Zeros in the gaps of a
    rectangle keep the gaps out of every sum. tests/test_simplified_hstu.py has the plain form.
    """

    @staticmethod
    def forward(ctx, q, k, v, position_weight, time_weight, rectangles, causal_mask, scale):
        """q, k: (T, H, dqk); v: (T, H, dv); weights (N,) and (129,) or None -> (T, H, dv)."""
        biases = (position_weight, time_weight)
        out = torch.empty_like(v)
        for rectangle in rectangles:
            q_, k_, v_ = (rectangle.pad(x) for x in (q, k, v))  # (G, H, L, .)
            out_ = torch.empty_like(v_)
            for tile in rectangle.tiles:
                scores = _scores(q_, k_, tile, *biases)  # (G, H, rows, keys)
                weights = _hide_future(F.silu(scores), tile, causal_mask)
                out_[:, :, tile.rows] = weights @ v_[:, :, tile.keys]
            rectangle.unpad_into(out, out_.mul_(scale))
        ctx.save_for_backward(q, k, v, position_weight, time_weight, causal_mask)
        ctx.rectangles, ctx.scale = rectangles, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, position_weight, time_weight, causal_mask = ctx.saved_tensors
        biases = (position_weight, time_weight)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        bias_grads = [None if w is None else torch.zeros_like(w) for w in biases]
        for rectangle in ctx.rectangles:
            q_, k_, v_, out_grad = (rectangle.pad(x) for x in (q, k, v, grad_out * ctx.scale))
            q_grad, k_grad, v_grad = (torch.zeros_like(x) for x in (q_, k_, v_))
            for tile in rectangle.tiles:
                scores = _scores(q_, k_, tile, *biases)  # (G, H, rows, keys)
                weights = _hide_future(F.silu(scores), tile, causal_mask)
                row_grad = out_grad[:, :, tile.rows]
                v_grad[:, :, tile.keys] += weights.mT @ row_grad
                weight_grad = _hide_future(row_grad @ v_[:, :, tile.keys].mT, tile, causal_mask)
                score_grad = torch.ops.aten.silu_backward(weight_grad, scores)
                q_grad[:, :, tile.rows] = score_grad @ k_[:, :, tile.keys]
                k_grad[:, :, tile.keys] += score_grad.mT @ q_[:, :, tile.rows]
                _add_bias_grads(bias_grads, score_grad, tile)
            for packed, padded in zip(grads, (q_grad, k_grad, v_grad), strict=True):
                rectangle.unpad_into(packed, padded)
        return *grads, *bias_grads, None, None, None


def _scores(q, k, tile: Tile, position_weight, time_weight) -> Tensor:
    scores = q[:, :, tile.rows] @ k[:, :, tile.keys].mT  # (G, H, rows, keys)
    if position_weight is not None:
        scores += position_weight[tile.distances]  # (rows, keys)
    if time_weight is not None:
        by_cell = time_weight.index_select(0, tile.time_buckets.flatten())
        scores += by_cell.view_as(tile.time_buckets)[:, None]  # (G, 1, rows, keys)
    return scores


def _hide_future(cells: Tensor, tile: Tile, causal_mask: Tensor) -> Tensor:
    """Zero, in place, the cells of the diagonal tile whose key comes after the query."""
    size = tile.rows.stop - tile.rows.start
    cells[..., tile.rows] *= causal_mask[:size, :size]
    return cells


def _add_bias_grads(bias_grads: list[Tensor | None], score_grad: Tensor, tile: Tile) -> None:
    position_grad, time_grad = bias_grads
    by_cell = score_grad.sum(1, dtype=torch.promote_types(score_grad.dtype, torch.float32))
    if position_grad is not None:
        position_grad.scatter_add_(0, tile.distances.flatten(), by_cell.sum(0).flatten())
    if time_grad is not None:
        time_grad.scatter_add_(0, tile.time_buckets.flatten(), by_cell.flatten())


class HSTUAttention(nn.Module):
    """One HSTU block on packed events, paper equations 1 to 3.

        U, V, Q, K = split(SiLU(LayerNorm(x) W))
        y = x + W_o dropout(U * LayerNorm(A V))

    LayerNorms have no weights, W no bias, and logits no 1 / sqrt(dqk), all as in the reference.
    """

    def __init__(
        self,
        hidden_units: int,
        num_heads: int,
        attention_dim: int,
        linear_dim: int,
        dropout_rate: float,
        maxlen: int,
        has_time_bias: bool,
        has_position_bias: bool,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.split_sizes = [linear_dim, linear_dim, attention_dim, attention_dim]  # U V Q K
        self.scale = 1.0 / maxlen
        self.layer_norm = nn.LayerNorm(hidden_units, NORM_EPS, elementwise_affine=False)
        self.qkv_proj = nn.Linear(hidden_units, num_heads * sum(self.split_sizes), bias=False)
        self.relative_bias = RelativeAttentionBias(maxlen, has_position_bias, has_time_bias)
        self.attention_norm = nn.LayerNorm(num_heads * linear_dim, NORM_EPS, False)
        self.dropout = nn.Dropout(dropout_rate)
        self.output_proj = nn.Linear(num_heads * linear_dim, hidden_units)
        nn.init.normal_(self.qkv_proj.weight, std=INIT_STD)
        nn.init.xavier_uniform_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)

    def forward(self, x: Tensor, rectangles: list[Rectangle], causal_mask: Tensor) -> Tensor:
        """Events (T, D), each attending to its own sequence's past and itself -> (T, D)."""
        u, v, q, k = self.project(x)  # (T, H, dv or dqk)
        weights = self.relative_bias.position_weight, self.relative_bias.time_weight
        attended = PointwiseAttention.apply(q, k, v, *weights, rectangles, causal_mask, self.scale)
        return self.gate(x, u, attended)  # (T, D)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """U, V, Q, K of each event."""
        projected = F.silu(self.qkv_proj(self.layer_norm(x)))  # (T, H * (2 dv + 2 dqk))
        projected = projected.unflatten(-1, (self.num_heads, -1))  # (T, H, 2 dv + 2 dqk)
        return projected.split(self.split_sizes, dim=-1)

    def gate(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        """What the block adds to x, and x."""
        gated = u.flatten(1) * self.attention_norm(attended.flatten(1))  # (T, H * dv)
        return x + self.output_proj(self.dropout(gated))  # (T, D)


class HSTU(nn.Module):
    """A stack of HSTU blocks over packed sequences.

    Args:
        time_bias: whose time a query has. "request": that of the event to be predicted, as in the
            reference; "event": that of the event itself; "off": no time bias.
        gradient_checkpointing: keep a block's input only and compute the block again on the way
            back; less memory, about a third more time.
    """

    def __init__(
        self,
        num_blocks: int,
        time_bias: str,
        gradient_checkpointing: bool = False,
        **block: Any,
    ):
        super().__init__()
        self.time_bias = time_bias
        self.gradient_checkpointing = gradient_checkpointing
        has_time_bias = time_bias != "off"
        self.blocks = nn.ModuleList(
            HSTUAttention(has_time_bias=has_time_bias, **block) for _ in range(num_blocks)
        )
        # True: the key is not after the query. One tile's worth; shared by all blocks.
        causal = torch.ones(TILE, TILE, dtype=torch.bool).tril_()
        self.register_buffer("_causal_mask", causal, persistent=False)

    def forward(
        self, x: Tensor, offsets: Tensor, timestamps: Tensor, target_timestamps: Tensor
    ) -> Tensor:
        """Events to outputs, each a function of its sequence's events up to itself.

        Args:
            x: (T, D) float, sequences end to end.
            offsets: (B + 1,) int64 on the CPU; sequence b is x[offsets[b]:offsets[b + 1]].
            timestamps: (T,) int64 seconds, of the events.
            target_timestamps: (T,) int64 seconds, of the events to be predicted.

        Returns:
            (T, D) float.
        """
        query_times = {"request": target_timestamps, "event": timestamps, "off": None}
        rectangles = cut_rectangles(offsets, timestamps, query_times[self.time_bias])
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rectangles, self._causal_mask, use_reentrant=False)
            else:
                x = block(x, rectangles, self._causal_mask)
        return x  # (T, D)

    def compile_blocks(self) -> None:
        """Compile what stands around each block's attention, once for all lengths.

        The attention itself loops over rectangles, whose number and shapes follow the lengths.
        """
        for block in self.blocks:
            block.project = torch.compile(block.project, dynamic=True)
            block.gate = torch.compile(block.gate, dynamic=True)

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
    T'   T and the gaps of the rectangles (only here)
"reference" is facebookresearch/generative-recommenders, research/modeling/sequential/hstu.py.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hstu_components import INIT_STD, Dropout

# Queries in an attention tile. Keys after a tile's last query are not computed.
TILE = 128
# Scores of a tile: on the CPU 2 MB, such that the passes over them stay in the cache; on a GPU few
# large kernels are better, and this bounds a score tensor to 256 MB.
CPU_SCORES = 1 << 19
GPU_SCORES = 1 << 26
# Least length in a rectangle, by its longest: leaves 6 to 9 % of gaps in MovieLens' batches.
SHORTEST = 0.7
# Cells of a batch up to which time buckets are kept for all blocks, a byte each, or while there are
# few the eight of an index; and scores for the way back, in each block. With more, each use
# computes them again and memory grows with T.
KEPT_BUCKETS = 1 << 26
KEPT_INDICES = 1 << 22
KEPT_SCORES = 1 << 22
# Time buckets grow by e ** 0.301 = 1.35, not by two: the reference divides a natural logarithm by
# log10(2). Kept, because the published results have it.
BUCKET_LOG_WIDTH = 0.301
NUM_TIME_BUCKETS = 129
# The bias of a key after its query: SiLU and its derivative are exactly zero there, as long as the
# other terms of a score stay below 9,000.
FUTURE = -1e4
NORM_EPS = 1e-6


class Tile(NamedTuple):
    """Some queries of a rectangle and every key that one of them may see."""

    rows: slice  # queries
    times: tuple[Tensor, Tensor] | None  # (G, rows) and (G, keys) float64 seconds, or no buckets
    kept_buckets: Tensor | None  # (G, rows * keys) uint8 or int64 in 0..128

    @property
    def keys(self) -> slice:
        return slice(0, self.rows.stop)

    def time_buckets(self) -> Tensor | None:
        """(G, rows * keys) int64 in 0..128; None without times."""
        if self.times is None:
            return None
        if self.kept_buckets is not None:
            return self.kept_buckets.long()
        query_times, key_times = self.times
        return time_buckets(query_times[:, :, None] - key_times[:, None]).flatten(1)


class Rectangle(NamedTuple):
    """Neighbouring sequences, each filled up with gaps at its end to the length of the longest.

    A gap comes after all of its sequence's events, so causality hides it from them.
    """

    rows: slice  # its part of the batch with gaps
    shape: tuple[int, int]  # G, L
    tiles: list[Tile]

    @property
    def num_cells(self) -> int:
        return self.shape[0] * self.shape[1] ** 2


def cut_rectangles(
    offsets: Tensor, key_times: Tensor, query_times: Tensor | None, num_heads: int
) -> tuple[list[Rectangle], Tensor]:
    """The batch's attention rectangles, with everything in them that all blocks share.

    Batches come ordered by length, so there are few gaps; any order is correct.

    Args:
        offsets: (B + 1,) int64 on the CPU: the cuts need no wait for the device. No sequence is
            empty.
        key_times: (T,) int64 seconds.
        query_times: (T,) int64 seconds, or None for no time buckets.
        num_heads: whose scores lie side by side.

    Returns:
        The rectangles, end to end over the batch with gaps, and each event's row there, (T,) int64.
    """
    lengths, device = offsets.diff(), key_times.device
    num_scores = CPU_SCORES if device.type == "cpu" else GPU_SCORES
    bounds = _rectangle_bounds(lengths.tolist(), num_scores // num_heads)
    longest = [int(lengths[a:b].max()) for a, b in bounds]
    strides = torch.tensor(longest).repeat_interleave(torch.tensor([b - a for a, b in bounds]))
    starts = F.pad(strides.cumsum(0), (1, 0))  # (B + 1,) of the batch with gaps
    events = torch.arange(int(offsets[-1])) + (starts - offsets)[:-1].repeat_interleave(lengths)
    events = events.to(device, non_blocking=True)  # (T,)
    times = None
    if query_times is not None:
        # float64 is exact up to 2^53, and faster to subtract than int64.
        times = torch.stack([query_times, key_times], 1).double()  # (T, 2)
        times = times.new_zeros(int(starts[-1]), 2).index_copy_(0, events, times)
    shapes = [(b - a, L) for (a, b), L in zip(bounds, longest, strict=True)]
    num_cells = sum(G * L**2 for G, L in shapes)
    kept = torch.int64 if num_cells <= KEPT_INDICES else torch.uint8  # type of the kept buckets
    if num_cells > KEPT_BUCKETS:
        kept = None
    rectangles = [
        _rectangle(slice(int(starts[a]), int(starts[b])), shape, times, kept)
        for (a, b), shape in zip(bounds, shapes, strict=True)
    ]
    return rectangles, events


def _rectangle_bounds(lengths: list[int], max_cells: int) -> list[tuple[int, int]]:
    """First sequence, and the one after the last, of each rectangle."""
    firsts, longest = [0], 0
    for end, length in enumerate(lengths):
        longest = max(longest, length)
        is_large = (end + 1 - firsts[-1]) * min(longest, TILE) * longest > max_cells
        if end > firsts[-1] and (is_large or length < SHORTEST * longest):
            firsts.append(end)
            longest = length
    return list(itertools.pairwise([*firsts, len(lengths)]))


def _rectangle(
    rows: slice, shape: tuple[int, int], times: Tensor | None, kept: torch.dtype | None
) -> Rectangle:
    if times is not None:
        times = times[rows].view(*shape, 2)  # (G, L, 2)
    size = -(-shape[1] // -(-shape[1] // TILE))  # tiles of equal size, if possible
    starts = range(0, shape[1], size)
    tiles = [_tile(slice(i, min(i + size, shape[1])), times, kept) for i in starts]
    return Rectangle(rows, shape, tiles)


def _tile(rows: slice, times: Tensor | None, kept: torch.dtype | None) -> Tile:
    if times is None:
        return Tile(rows, None, None)
    tile = Tile(rows, (times[:, rows, 0], times[:, : rows.stop, 1]), None)
    return tile if kept is None else tile._replace(kept_buckets=tile.time_buckets().to(kept))


def time_buckets(seconds: Tensor) -> Tensor:
    """floor(ln(max(1, |seconds|)) / 0.301), at most 128, int64 (reference bucketization_fn)."""
    highest = math.exp((NUM_TIME_BUCKETS - 0.5) * BUCKET_LOG_WIDTH)  # the last bucket's middle
    return seconds.float().abs().clamp_(1, highest).log_().div_(BUCKET_LOG_WIDTH).long()


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


class GatedAttention(torch.autograd.Function):
    """U * LayerNorm(A V), rectangle by rectangle and tile by tile (paper equations 1 to 3).

        U, V, Q, K = SiLU(x W)
        A V = (1 / N) sum over j <= i of SiLU(q_i k_j + position_bias + time_bias) v_j

    Without a softmax a tile needs nothing from its neighbours. So scores live for one tile only,
    the backward pass computes them again unless they are few, and memory grows with T. What is kept
    is used up on the way back. tests/test_simplified_hstu.py has the plain form.

    inference_mode: the many small operations inside need none of autograd's bookkeeping.
    """

    @staticmethod
    def forward(ctx, x, weight, position_weight, time_weight, rectangles, sizes, maxlen):
        """Events and gaps (T', D), weight (H * sum of sizes, D) -> (T', H * dv).

        Biases (N,) and (129,) or None; `sizes`: dv, dv, dqk, dqk, the widths of U, V, Q, K.
        """
        biases = _position_table(x, position_weight, maxlen), time_weight
        num_heads = len(weight) // sum(sizes)
        out = x.new_empty(len(x), num_heads * sizes[0])
        keeps_scores = sum(r.num_cells for r in rectangles) * num_heads <= KEPT_SCORES
        ctx.kept_scores, ctx.kept = [], []
        # Types are chosen by now; in CUDA's autocast the norm would give float32.
        with torch.autocast(x.device.type, enabled=False), torch.inference_mode():
            for rectangle in rectangles:
                rows, heads = rectangle.rows, (rectangle.shape[0], num_heads)
                projected = _by_head(x[rows] @ weight.T, heads)
                activated = F.silu(projected)
                u, v, q, k = activated.split(sizes, -1)  # (G * H, L, .)
                shares = v / maxlen  # before the sum, which would leave the range of float16
                attended = torch.empty_like(v)  # A V
                for tile in rectangle.tiles:
                    scores, weights = _weights(q, k, tile, tile.time_buckets(), *biases)
                    if keeps_scores:
                        ctx.kept_scores.append((scores, weights))
                    attended[:, tile.rows] = torch.bmm(weights, shares[:, tile.keys])
                normed, _, rstd = torch.native_layer_norm(
                    _by_event(attended, heads), out.shape[1:], None, None, NORM_EPS
                )  # (G * L, H * dv), (G * L, 1)
                # The way back is of N A V.
                ctx.kept.append((projected, activated, normed, rstd / maxlen))
                torch.mul(_by_event(u, heads), normed, out=out[rows])
        ctx.save_for_backward(x, weight, position_weight, time_weight)
        ctx.rectangles, ctx.sizes, ctx.maxlen = rectangles, sizes, maxlen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, weight, position_weight, time_weight = ctx.saved_tensors
        biases = _position_table(x, position_weight, ctx.maxlen), time_weight
        num_heads = len(weight) // sum(ctx.sizes)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight.T, dtype=_sum_dtype(x))
        position_grad = time_grad = None
        if position_weight is not None:
            position_grad = x.new_zeros(TILE, len(biases[0]), dtype=_sum_dtype(x))
        if time_weight is not None:
            most = max(rectangle.shape[0] for rectangle in ctx.rectangles)
            time_grad = x.new_zeros(most, NUM_TIME_BUCKETS, dtype=_sum_dtype(x))
        bias_grads = position_grad, time_grad
        # Of the type of a norm's statistics, on a GPU float32 even where x is not.
        zeros = x.new_zeros(len(x), 1, dtype=ctx.kept[0][-1].dtype)
        ones = torch.ones_like(zeros)
        with torch.inference_mode():
            for rectangle in reversed(ctx.rectangles):
                rows, heads = rectangle.rows, (rectangle.shape[0], num_heads)
                projected, activated, normed, rstd = ctx.kept.pop()
                u, *vqk = activated.split(ctx.sizes, -1)  # (G * H, L, .)
                grad = torch.empty_like(activated)
                u_grad, *vqk_grads = grad.split(ctx.sizes, -1)
                torch.mul(_by_head(grad_out[rows], heads), _by_head(normed, heads), out=u_grad)
                attended_grad = _norm_grad(
                    grad_out[rows] * _by_event(u, heads), normed, rstd, zeros[rows], ones[rows]
                )
                attended_grad = _by_head(attended_grad, heads)  # (G * H, L, dv)
                _attention_grads(
                    attended_grad, vqk, vqk_grads, rectangle, ctx.kept_scores, biases, bias_grads
                )
                grad = torch.ops.aten.silu_backward(grad, projected)
                grad = _by_event(grad, heads)  # (G * L, H * sum of sizes)
                torch.mm(grad, weight, out=x_grad[rows])
                weight_grad += x[rows].T @ grad  # faster than its transpose
        if position_grad is not None:
            position_grad = position_grad.sum(0)[: ctx.maxlen].flip(0)
        if time_grad is not None:
            time_grad = time_grad.sum(0)
        return x_grad, weight_grad.T, position_grad, time_grad, None, None, None


def _attention_grads(
    attended_grad: Tensor,
    vqk: list[Tensor],
    vqk_grads: list[Tensor],
    rectangle: Rectangle,
    kept_scores: list[tuple[Tensor, Tensor]],
    biases: tuple[Tensor, Tensor | None],
    bias_grads: tuple[Tensor | None, Tensor | None],
) -> None:
    """From the gradient of N A V, (G * H, L, dv), to those of v, q and k, (G * H, L, .).

    They are filled in, and those of the biases added to.
    """
    (v, q, k), (v_grad, q_grad, k_grad) = vqk, vqk_grads
    for tile in reversed(rectangle.tiles):
        rows, keys, buckets = tile.rows, tile.keys, tile.time_buckets()
        kept = kept_scores.pop() if kept_scores else _weights(q, k, tile, buckets, *biases)
        scores, weights = kept  # (G * H, rows, keys) each
        score_grad = torch.bmm(attended_grad[:, rows], v[:, keys].mT)
        score_grad = torch.ops.aten.silu_backward(score_grad, scores)
        # Not with out= or baddbmm_: into a slice, torch makes one product after the other. The last
        # tile comes first and has every key.
        put = Tensor.copy_ if tile is rectangle.tiles[-1] else Tensor.add_
        put(v_grad[:, keys], torch.bmm(weights.mT, attended_grad[:, rows]))
        put(k_grad[:, keys], torch.bmm(score_grad.mT, q[:, rows]))
        q_grad[:, rows] = torch.bmm(score_grad, k[:, keys])
        _add_bias_grads(
            *bias_grads, score_grad.unflatten(0, (rectangle.shape[0], -1)), tile, buckets
        )


def _by_head(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """(G * L, H * w) -> (G * H, L, w), for `heads` G, H; a view for one head."""
    return x.unflatten(0, (heads[0], -1)).unflatten(2, (heads[1], -1)).transpose(1, 2).flatten(0, 1)


def _by_event(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """(G * H, L, w) -> (G * L, H * w), the way back."""
    return x.unflatten(0, heads).transpose(1, 2).flatten(2).flatten(0, 1)


def _norm_grad(grad: Tensor, normed: Tensor, rstd: Tensor, zeros: Tensor, ones: Tensor) -> Tensor:
    """Gradient of LayerNorm's input, from that of its output and what it gave.

    (G * L, w), the last three (G * L, 1): but for its scale, it is the norm of what is normalised,
    of mean 0 and deviation 1.
    """
    grad, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad, normed, normed.shape[1:], zeros, ones, None, None, [True, False, False]
    )
    return grad.mul_(rstd)


def _position_table(like: Tensor, position_weight: Tensor | None, maxlen: int) -> Tensor:
    """(N - 1 + TILE,): the bias by key position minus query position, from -(N - 1) upwards."""
    weights = like.new_zeros(maxlen) if position_weight is None else position_weight.flip(0)
    return torch.cat([weights, weights.new_full((TILE - 1,), FUTURE)])


def _weights(
    q, k, tile: Tile, buckets: Tensor | None, position_table, time_weight
) -> tuple[Tensor, Tensor]:
    """Scores with their biases, and SiLU of them, (G * H, rows, keys) each."""
    rows, keys, maxlen = tile.rows, tile.keys, len(position_table) - TILE + 1
    # Row i is the table from N - 1 - i on.
    by_start = position_table.unfold(0, keys.stop, 1)[maxlen - rows.stop : maxlen - rows.start]
    bias = by_start.flip(0)  # (rows, keys)
    if buckets is not None:
        by_time = time_weight.expand(len(buckets), -1).gather(1, buckets)  # faster than an index
        bias = by_time.view(len(buckets), 1, *bias.shape).add_(bias)  # (G, 1, rows, keys)
        bias = bias.expand(-1, len(q) // len(buckets), -1, -1).flatten(0, 1)
    bias = bias.expand(len(q), -1, -1)  # (G * H, rows, keys)
    scores = bias.contiguous().to(q.dtype).baddbmm_(q[:, rows], k[:, keys].mT)
    return scores, F.silu(scores)


def _add_bias_grads(position_grad, time_grad, score_grad, tile: Tile, buckets) -> None:
    """Add (G, H, rows, keys) by distance and by bucket.

    Args:
        position_grad: (TILE, N - 1 + TILE), columns as in `_position_table`, a row for each query
            of a tile, or None.
        time_grad: (most sequences in a rectangle, 129), or None.
    """
    by_cell = score_grad[:, 0] if score_grad.shape[1] == 1 else score_grad.sum(1)
    by_cell = by_cell.to(_sum_dtype(by_cell))  # (G, rows, keys)
    if position_grad is not None:
        # Each row stands one column further left than the one above: a column has one distance.
        width = position_grad.shape[1]
        places = by_cell.shape[1:], (width - 1, 1), width - TILE - tile.rows.start
        position_grad.as_strided(*places).add_(by_cell.sum(0))
    if time_grad is not None:
        time_grad[: len(by_cell)].scatter_add_(1, buckets, by_cell.flatten(1))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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
        self.split_sizes = [linear_dim, linear_dim, attention_dim, attention_dim]  # U V Q K
        self.maxlen = maxlen
        self.layer_norm = nn.LayerNorm(hidden_units, NORM_EPS, elementwise_affine=False)
        self.qkv_proj = nn.Linear(hidden_units, num_heads * sum(self.split_sizes), bias=False)
        self.relative_bias = RelativeAttentionBias(maxlen, has_position_bias, has_time_bias)
        self.dropout = Dropout(dropout_rate)
        self.output_proj = nn.Linear(num_heads * linear_dim, hidden_units)
        nn.init.normal_(self.qkv_proj.weight, std=INIT_STD)
        nn.init.xavier_uniform_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)

    def forward(self, x: Tensor, rectangles: list[Rectangle]) -> Tensor:
        """Events and gaps (T', D), each attending to its sequence's past and itself."""
        # Autocast knows no autograd.Function: its inputs come in the type that it would choose.
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        gated = GatedAttention.apply(
            self.layer_norm(x).to(dtype),
            self.qkv_proj.weight.to(dtype),
            self.relative_bias.position_weight,
            self.relative_bias.time_weight,
            rectangles,
            self.split_sizes,
            self.maxlen,
        )  # (T', H * dv)
        return self.merge(x, gated)  # (T', D)

    def merge(self, x: Tensor, gated: Tensor) -> Tensor:
        """What the block adds to x, and x."""
        return x + self.output_proj(self.dropout(gated))


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
        self.time_bias, self.num_heads = time_bias, block["num_heads"]
        self.gradient_checkpointing = gradient_checkpointing
        has_time_bias = time_bias != "off"
        self.blocks = nn.ModuleList(
            HSTUAttention(has_time_bias=has_time_bias, **block) for _ in range(num_blocks)
        )

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
        if not len(x):  # a rank's share of a small batch
            return x
        query_times = {"request": target_timestamps, "event": timestamps, "off": None}
        rectangles, rows = cut_rectangles(
            offsets, timestamps, query_times[self.time_bias], self.num_heads
        )
        x = x.new_zeros(rectangles[-1].rows.stop, x.shape[1]).index_copy(0, rows, x)  # (T', D)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                # Otherwise than reentrant it would keep what GatedAttention keeps apart from
                # autograd; but so it sees nothing to do where only weights want a gradient.
                x = checkpoint(block, x.requires_grad_(), rectangles, use_reentrant=True)
            else:
                x = block(x, rectangles)
        return x.index_select(0, rows)  # (T, D)

    def compile_blocks(self) -> None:
        """Compile what stands around each block's attention, once for all lengths.

        The attention itself loops over rectangles, whose number and shapes follow the lengths.
        """
        for block in self.blocks:
            if isinstance(block, HSTUAttention):  # not one of your own
                block.merge = torch.compile(block.merge, dynamic=True)

"""HSTU's attention over padded groups of sequences, tile by tile, with its own backward pass.

`simplified_hstu.gated_attention` is the definition; arguments and results are the same. Letters as
there, and here alone: a padded group has G sequences of up to L events.

The batch is cut into groups of sequences of about the same length: padded as a whole, it would have
several times as many scores. As there is no softmax, a tile of scores needs no other tile. So only
one tile exists at a time, the backward pass computes the scores again (unless they are few), and
memory grows with T instead of N^2 (benchmarks/attention_memory.py).
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.rows import sum_unsorted

TILE = 128  # queries in a tile; keys after its last query are not computed
# Scores of a tile: 2 MB on the CPU, where they stay in its cache; 256 MB on a GPU, which is faster
# with few large kernels.
CPU_SCORES, GPU_SCORES = 1 << 19, 1 << 26
# A group's shortest sequence has at least this share of the events of its longest: so 6 to 9 % of a
# group is padding in MovieLens' batches.
SHORTEST = 0.7
# Up to this many (query, key) pairs in a batch, time buckets are computed once and shared by all
# blocks, a byte each, or of few pairs the 8 that a lookup wants (3 % of a step with 8 blocks); up
# to this many scores in a block are cached for the backward pass. Beyond, buckets and scores are
# computed again where they are used, so that memory grows with T.
CACHED_BUCKETS, CACHED_INT64_BUCKETS, CACHED_SCORES = 1 << 26, 1 << 22, 1 << 22
# As in simplified_hstu.
BUCKET_LOG_WIDTH = 0.301
NUM_TIME_BUCKETS = 129
NORM_EPS = 1e-6
# The bias of a key after its query: SiLU and its derivative are exactly 0 there, unless the other
# terms of a score exceed 9,000.
FUTURE = -1e4


def time_buckets(seconds: Tensor) -> Tensor:
    """As `simplified_hstu.time_buckets`, of float64 seconds, with fewer passes."""
    highest = math.exp((NUM_TIME_BUCKETS - 0.5) * BUCKET_LOG_WIDTH)  # in the last bucket
    return seconds.float().abs().clamp_(1, highest).log_().div_(BUCKET_LOG_WIDTH).long()


Biases = tuple[Tensor | None, Tensor | None]  # by position and by time, or their gradients


class Tile(NamedTuple):
    """Some queries of a group, and every key up to the last of them."""

    queries: slice
    times: tuple[Tensor, Tensor] | None  # (G, queries) and (G, keys) float64 seconds
    cached_buckets: Tensor | None  # (G, queries * keys) uint8 or int64 in 0..128

    @property
    def keys(self) -> slice:
        return slice(0, self.queries.stop)

    def time_buckets(self) -> Tensor | None:
        """(G, queries * keys) int64 in 0..128; None without a time bias."""
        if self.times is None:
            return None
        if self.cached_buckets is not None:
            return self.cached_buckets.long()
        query_times, key_times = self.times
        return time_buckets(query_times[:, :, None] - key_times[:, None]).flatten(1)


class Group(NamedTuple):
    """Consecutive sequences of the batch, each padded at its end to the length of the longest.

    Padding comes after a sequence's events, so it is never a key of theirs.
    """

    events: slice  # rows of the packed batch
    shape: tuple[int, int]  # G, L
    places: Tensor | None  # (events,) int64 row of each event in the padded group; None: no padding
    tiles: list[Tile]

    def pad(self, rows: Tensor) -> Tensor:
        """(events, w) -> (G * L, w), zero where there is no event."""
        if self.places is None:
            return rows
        padded = rows.new_zeros(math.prod(self.shape), rows.shape[1])
        return padded.index_copy_(0, self.places, rows)

    def unpad(self, padded: Tensor, out: Tensor | None = None) -> Tensor:
        """(G * L, w) -> (events, w), which `out` may be the place for."""
        if self.places is not None:
            return torch.index_select(padded, 0, self.places, out=out)
        return padded if out is None else out.copy_(padded)


class Groups(NamedTuple):
    """A packed batch, cut into groups; and its times, as in `prepare`."""

    groups: list[Group]
    key_times: Tensor
    query_times: Tensor | None


def prepare(
    offsets: Tensor, key_times: Tensor, query_times: Tensor | None, num_heads: int
) -> Groups:
    """Cut a packed batch into groups; arguments as `simplified_hstu.prepare`.

    Batches are ordered by length, for little padding; any order is correct. The offsets lie on the
    CPU, so that nothing waits for the device.
    """
    lengths, device = offsets.diff(), key_times.device
    num_scores = CPU_SCORES if device.type == "cpu" else GPU_SCORES
    bounds = _group_bounds(lengths.tolist(), num_scores // num_heads)
    shapes = [(b - a, int(lengths[a:b].max())) for a, b in bounds]
    num_pairs = sum(G * L**2 for G, L in shapes)
    cache_dtype = torch.int64 if num_pairs <= CACHED_INT64_BUCKETS else torch.uint8
    if num_pairs > CACHED_BUCKETS:
        cache_dtype = None
    groups = []
    for (a, b), shape in zip(bounds, shapes, strict=True):
        events = slice(int(offsets[a]), int(offsets[b]))
        group, times = Group(events, shape, _places(lengths[a:b], shape[1], device), []), None
        if query_times is not None:
            # float64 is exact up to 2^53, and faster to subtract than int64.
            pair = (t[events, None].double() for t in (query_times, key_times))
            times = [group.pad(t).view(shape) for t in pair]
        groups.append(group._replace(tiles=_tiles(shape[1], times, cache_dtype)))
    return Groups(groups, key_times, query_times)


def _group_bounds(lengths: list[int], max_scores: int) -> list[tuple[int, int]]:
    """First sequence, and the one after the last, of each group."""
    firsts, longest = [0], 0
    for end, length in enumerate(lengths):
        longest = max(longest, length)
        is_large = (end + 1 - firsts[-1]) * min(longest, TILE) * longest > max_scores
        if end > firsts[-1] and (is_large or length < SHORTEST * longest):
            firsts.append(end)
            longest = length
    return list(itertools.pairwise([*firsts, len(lengths)]))


def _places(lengths: Tensor, longest: int, device: torch.device) -> Tensor | None:
    """(events,) row of each event in the padded group; None if all sequences have one length."""
    if int(lengths.min()) == longest:
        return None
    firsts = torch.arange(len(lengths)) * longest  # the place of each sequence's first event
    shifts = (firsts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return (torch.arange(len(shifts)) + shifts).to(device, non_blocking=True)


def _tiles(length: int, times: list[Tensor] | None, cache_dtype: torch.dtype | None) -> list[Tile]:
    """`times`: (G, L) of the queries and of the keys."""
    size = -(-length // -(-length // TILE))  # tiles of equal size, if possible
    tiles = []
    for start in range(0, length, size):
        queries = slice(start, min(start + size, length))
        tile = Tile(queries, None, None)
        if times is not None:
            tile = tile._replace(times=(times[0][:, queries], times[1][:, tile.keys]))
        if times is not None and cache_dtype is not None:
            tile = tile._replace(cached_buckets=tile.time_buckets().to(cache_dtype))
        tiles.append(tile)
    return tiles


def gated_attention(
    x: Tensor,
    weight: Tensor,
    relative_bias: Any,
    sequences: Groups,
    widths: list[int],
    maxlen: int,
) -> Tensor:
    """U * LayerNorm(A V), (T, D) -> (T, H * dv); arguments as `simplified_hstu.gated_attention`."""
    # Autocast does not reach into an autograd.Function: its inputs get their type here.
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    biases = relative_bias.position_weight, relative_bias.time_weight
    options = sequences.groups, widths, maxlen
    return _GatedAttention.apply(x.to(dtype), weight.to(dtype), *biases, *options)


class _GatedAttention(torch.autograd.Function):
    """`gated_attention`, group by group and tile by tile.

    inference_mode spares the many small operations autograd's bookkeeping. What is cached for the
    backward pass is freed as it is used.
    """

    @staticmethod
    def forward(ctx, x, weight, position_weight, time_weight, groups, widths, maxlen):
        """`widths`: dv, dv, dqk, dqk, of U, V, Q, K; biases (N,) and (129,) or None."""
        biases = _position_table(x, position_weight, maxlen), time_weight
        num_heads = len(weight) // sum(widths)
        out = x.new_empty(len(x), num_heads * widths[0])
        num_pairs = sum(group.shape[0] * group.shape[1] ** 2 for group in groups)
        caches_scores = num_pairs * num_heads <= CACHED_SCORES
        ctx.cached_scores, ctx.cached = [], []
        # No autocast: on CUDA it would turn the norm into float32.
        with torch.autocast(x.device.type, enabled=False), torch.inference_mode():
            for group in groups:
                heads = group.shape[0], num_heads
                padded = group.pad(x[group.events])  # (G * L, D)
                projected = _by_head(padded @ weight.T, heads)
                activated = F.silu(projected)
                u, v, q, k = activated.split(widths, -1)  # (G * H, L, .)
                shares = v / maxlen  # before the sum, which may overflow in float16
                attended = torch.empty_like(v)  # A V
                for tile in group.tiles:
                    scores, weights = _weights(q, k, tile, tile.time_buckets(), biases)
                    if caches_scores:
                        ctx.cached_scores.append((scores, weights))
                    attended[:, tile.queries] = torch.bmm(weights, shares[:, tile.keys])
                normed, _, rstd = torch.native_layer_norm(
                    _by_event(attended, heads), out.shape[1:], None, None, NORM_EPS
                )  # (G * L, H * dv), (G * L, 1)
                # rstd / N: the backward pass starts from the gradient of N A V.
                ctx.cached.append((padded, projected, activated, normed, rstd / maxlen))
                group.unpad(_by_event(u, heads) * normed, out[group.events])
        ctx.save_for_backward(weight, position_weight, time_weight)
        ctx.groups, ctx.widths, ctx.maxlen = groups, widths, maxlen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        weight, position_weight, time_weight = ctx.saved_tensors
        biases = _position_table(weight, position_weight, ctx.maxlen), time_weight
        num_heads, sum_dtype = len(weight) // sum(ctx.widths), _sum_dtype(weight)
        x_grad = weight.new_empty(len(grad_out), weight.shape[1])
        weight_grad = torch.zeros_like(weight.T, dtype=sum_dtype)
        position_grad = time_grad = None
        if position_weight is not None:
            position_grad = weight.new_zeros(TILE, len(biases[0]), dtype=sum_dtype)
        if time_weight is not None:
            most = max(group.shape[0] for group in ctx.groups)
            time_grad = weight.new_zeros(most, NUM_TIME_BUCKETS, dtype=sum_dtype)
        with torch.inference_mode():
            for group in reversed(ctx.groups):
                heads = group.shape[0], num_heads
                padded, projected, activated, normed, rstd = ctx.cached.pop()
                u, *vqk = activated.split(ctx.widths, -1)  # (G * H, L, .)
                grad = torch.empty_like(activated)
                u_grad, *vqk_grads = grad.split(ctx.widths, -1)
                gated_grad = group.pad(grad_out[group.events])  # (G * L, H * dv)
                torch.mul(_by_head(gated_grad, heads), _by_head(normed, heads), out=u_grad)
                attended_grad = _norm_grad(gated_grad * _by_event(u, heads), normed, rstd)
                _attention_grads(
                    _by_head(attended_grad, heads), vqk, vqk_grads, group, ctx.cached_scores,
                    biases, (position_grad, time_grad),
                )  # fmt: skip
                grad = torch.ops.aten.silu_backward(grad, projected)
                grad = _by_event(grad, heads)  # (G * L, H * sum of widths), zero in the padding
                group.unpad(grad @ weight, x_grad[group.events])
                weight_grad += padded.T @ grad  # faster than its transpose
        if position_grad is not None:
            position_grad = position_grad.sum(0)[: ctx.maxlen].flip(0)
        if time_grad is not None:
            time_grad = time_grad.sum(0)
        return x_grad, weight_grad.T, position_grad, time_grad, None, None, None


def _attention_grads(
    attended_grad: Tensor,
    vqk: list[Tensor],
    vqk_grads: list[Tensor],
    group: Group,
    cached_scores: list[tuple[Tensor, Tensor]],
    biases: Biases,
    bias_grads: Biases,
) -> None:
    """From the gradient of N A V, (G * H, L, dv), to those of v, q and k, (G * H, L, .).

    Fills in `vqk_grads` and adds to `bias_grads`.
    """
    (v, q, k), (v_grad, q_grad, k_grad) = vqk, vqk_grads
    for tile in reversed(group.tiles):
        queries, keys, buckets = tile.queries, tile.keys, tile.time_buckets()
        cached = cached_scores.pop() if cached_scores else None
        scores, weights = cached or _weights(q, k, tile, buckets, biases)
        score_grad = torch.bmm(attended_grad[:, queries], v[:, keys].mT)
        score_grad = torch.ops.aten.silu_backward(score_grad, scores)
        # Not out= or baddbmm_: into a slice, they compute one product after the other. The last
        # tile comes first, and has every key.
        put = Tensor.copy_ if tile is group.tiles[-1] else Tensor.add_
        put(v_grad[:, keys], torch.bmm(weights.mT, attended_grad[:, queries]))
        put(k_grad[:, keys], torch.bmm(score_grad.mT, q[:, queries]))
        q_grad[:, queries] = torch.bmm(score_grad, k[:, keys])
        _add_bias_grads(bias_grads, score_grad.unflatten(0, (group.shape[0], -1)), tile, buckets)


def _by_head(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """(G * L, H * w) -> (G * H, L, w), for `heads` G, H; a view for one head."""
    return x.unflatten(0, (heads[0], -1)).unflatten(2, (heads[1], -1)).transpose(1, 2).flatten(0, 1)


def _by_event(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """(G * H, L, w) -> (G * L, H * w), the inverse of `_by_head`."""
    return x.unflatten(0, heads).transpose(1, 2).flatten(2).flatten(0, 1)


def _norm_grad(grad: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of a LayerNorm's input from that of its output, (G * L, w); `rstd`: (G * L, 1).

    `normed`, the output, has mean 0 and deviation 1, and the same gradient but for the factor rstd.
    """
    zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
    grad, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad, normed, normed.shape[1:], zeros, ones, None, None, [True, False, False]
    )
    return grad.mul_(rstd)


def _position_table(like: Tensor, position_weight: Tensor | None, maxlen: int) -> Tensor:
    """(N - 1 + TILE,): the bias by key position minus query position, from -(N - 1) on."""
    weights = like.new_zeros(maxlen) if position_weight is None else position_weight.flip(0)
    return torch.cat([weights, weights.new_full((TILE - 1,), FUTURE)])


def _weights(
    q: Tensor, k: Tensor, tile: Tile, buckets: Tensor | None, biases: Biases
) -> tuple[Tensor, Tensor]:
    """Scores with their biases, and SiLU of them, (G * H, queries, keys) each.

    `biases`: `_position_table`, and (129,) or None.
    """
    position_table, time_weight = biases
    queries, keys, maxlen = tile.queries, tile.keys, len(position_table) - TILE + 1
    # A query's row of biases is the table from N - 1 - its position on.
    by_start = position_table.unfold(0, keys.stop, 1)
    bias = by_start[maxlen - queries.stop : maxlen - queries.start].flip(0)  # (queries, keys)
    if buckets is not None:
        by_time = time_weight.expand(len(buckets), -1).gather(1, buckets)  # faster than indexing
        bias = by_time.view(len(buckets), 1, *bias.shape).add_(bias)  # (G, 1, queries, keys)
        bias = bias.expand(-1, len(q) // len(buckets), -1, -1).flatten(0, 1)
    bias = bias.expand(len(q), -1, -1)  # (G * H, queries, keys)
    scores = bias.contiguous().to(q.dtype).baddbmm_(q[:, queries], k[:, keys].mT)
    return scores, F.silu(scores)


def _add_bias_grads(
    bias_grads: Biases, score_grad: Tensor, tile: Tile, buckets: Tensor | None
) -> None:
    """Add a tile's score gradients, (G, H, queries, keys), by distance and by time bucket.

    `bias_grads`: (TILE, N - 1 + TILE), a row for each query of a tile, columns as in
    `_position_table`; and (most sequences in a group, 129). `buckets`: (G, queries * keys) int64.
    Each may be None.
    """
    position_grad, time_grad = bias_grads
    by_pair = score_grad[:, 0] if score_grad.shape[1] == 1 else score_grad.sum(1)
    by_pair = by_pair.to(_sum_dtype(by_pair))  # (G, queries, keys)
    if position_grad is not None:
        # Each row begins one column further left than the one above: a column is one distance.
        width = position_grad.shape[1]
        diagonal = by_pair.shape[1:], (width - 1, 1), width - TILE - tile.queries.start
        position_grad.as_strided(*diagonal).add_(by_pair.sum(0))
    if time_grad is not None and by_pair.device.type == "cpu":
        time_grad[: len(by_pair)].scatter_add_(1, buckets, by_pair.flatten(1))
    elif time_grad is not None:  # scatter_add_ would sum on CUDA in any order
        time_grad[0] += _sum_by_bucket(by_pair, buckets)


def _sum_by_bucket(by_pair: Tensor, buckets: Tensor) -> Tensor:
    """(129,): sums over all pairs, in the same order every time."""
    return sum_unsorted(by_pair.reshape(-1, 1), buckets.flatten(), NUM_TIME_BUCKETS).flatten()


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

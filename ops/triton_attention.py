"""HSTU's attention on CUDA: one Triton kernel per pass over the packed batch, nothing padded.

`simplified_hstu.gated_attention` is the definition; arguments and results are the same. Letters as
there. As there is no softmax, no row statistics are kept: the forward pass saves A V alone, and the
backward pass computes each tile of scores again, once by rows of queries (gradients of Q and of the
biases) and once by columns of keys (gradients of K and V). Every sum has one fixed order: there are
no atomics, and two runs give equal bits. Memory grows with T. Sums are float32.

Of each event, `activated` holds for each head the columns of U, V, Q and K; all kernels read them
in place. `first`: the first event of a sequence in the packed batch; int64, so that offsets are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

MOST_WIDTH = 128  # of queries and values; wider tiles spill
# Tiles of 32 x 32 hardly spill, and use no wgmma: kernels of several such products had illegal
# accesses in Triton 3.6 to 3.7 (triton-lang/triton #10486, #11366).
BLOCK = 32
# Programs per sequence and head that sum the biases' gradients; so many partial sums are kept.
MOST_PROGRAMS = 64
NORM_ELEMENTS = 2048  # of a program for norm and gate
# As in simplified_hstu.
BUCKET_LOG_WIDTH = tl.constexpr(0.301)
NUM_TIME_BUCKETS = tl.constexpr(129)
NORM_EPS = tl.constexpr(1e-6)
PADDED_BUCKETS = tl.constexpr(256)
# Plain tf32 would keep 10 bits of a float32; three products of it keep about all.
PRECISION = tl.constexpr("tf32x3")
# torch.compile caches blocks on disk by the names of their operators: a changed file has others.
VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


@triton.jit
def _load(table, events, is_event, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a table, (events, PADDED); 0 where there is no event, and beyond WIDTH."""
    columns = tl.arange(0, PADDED)
    places = table + events[:, None] * STRIDE + columns[None, :]
    return tl.load(places, mask=is_event[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(table, events, is_event, values, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, values.shape[1])
    places = table + events[:, None] * STRIDE + columns[None, :]
    values = values.to(table.dtype.element_ty)
    tl.store(places, values, mask=is_event[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _time_buckets(query_times, key_times, queries, keys, is_pair):
    """Of each pair of a tile, int32 in 0..128. Differences are int64: float32 loses seconds."""
    seconds = tl.load(query_times + queries, mask=is_pair, other=0)
    seconds = tl.abs(seconds - tl.load(key_times + keys, mask=is_pair, other=0))
    buckets = tl.log(tl.maximum(seconds, 1).to(tl.float32)) / BUCKET_LOG_WIDTH
    return tl.minimum(buckets.to(tl.int32), NUM_TIME_BUCKETS - 1)


@triton.jit
def _scores(
    a, b, first, query, key, is_pair, query_times, key_times, position_weight, time_weight,
    SUM: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr,
):  # fmt: skip
    """A tile: products of a and b, and the biases. `query`, `key`: positions, that broadcast."""
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=SUM)
    if HAS_POSITION:
        scores += tl.load(position_weight + (query - key), mask=is_pair, other=0.0)
    if HAS_TIME:
        buckets = _time_buckets(query_times, key_times, first + query, first + key, is_pair)
        scores += tl.load(time_weight + buckets, mask=is_pair, other=0.0)
    return scores


@triton.jit
def _forward_kernel(
    activated, offsets, key_times, query_times, position_weight, time_weight, attended, N,
    H: tl.constexpr, DV: tl.constexpr, DQK: tl.constexpr, PADDED_V: tl.constexpr,
    PADDED_QK: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A V of B queries of a sequence and head."""
    # No function loads from `offsets`: torch.compile would believe that its results may be written
    # to as a part of them, and copy the offsets.
    WIDTH: tl.constexpr = 2 * DV + 2 * DQK
    SUM: tl.constexpr = attended.dtype.element_ty
    head, sequence = tl.program_id(0) % H, tl.program_id(0) // H
    first = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - first).to(tl.int32)
    block = tl.program_id(1)
    if block * B >= length:
        return
    activated += head * WIDTH
    query = block * B + tl.arange(0, B)
    q = _load(activated + 2 * DV, first + query, query < length, H * WIDTH, DQK, PADDED_QK)
    sums = tl.zeros([B, PADDED_V], SUM)
    for start in range(0, block * B + 1, B):
        key = start + tl.arange(0, B)
        k = _load(activated + 2 * DV + DQK, first + key, key < length, H * WIDTH, DQK, PADDED_QK)
        v = _load(activated + DV, first + key, key < length, H * WIDTH, DV, PADDED_V)
        is_pair = (key[None, :] <= query[:, None]) & (query < length)[:, None]
        scores = _scores(
            q, k, first, query[:, None], key[None, :], is_pair, query_times, key_times,
            position_weight, time_weight, SUM, HAS_POSITION, HAS_TIME,
        )  # fmt: skip
        weights = tl.where(is_pair, scores / (1 + tl.exp(-scores)), 0.0).to(v.dtype)
        sums += tl.dot(weights, v, input_precision=PRECISION, out_dtype=SUM)
    _store(attended + head * DV, first + query, query < length, sums / N, H * DV, DV)


@triton.jit
def _pair_grads(scores, weights_grad, is_pair):
    """SiLU of scores and the scores' gradient, 0 where there is no pair."""
    share = 1 / (1 + tl.exp(-scores))
    scores_grad = weights_grad * share * (1 + scores * (1 - share))
    return tl.where(is_pair, scores * share, 0.0), tl.where(is_pair, scores_grad, 0.0)


@triton.jit
def _add_by_distance(scores_grad, carried, partials, distance, length, B: tl.constexpr):
    """Add a tile's gradients by distance, to those from `distance` - B on; return the carry.

    Row r is rolled by r columns, so that column c has pairs of distance c or c - B, plus that of
    the tile's corner. Those of c - B complete the tile before, which lies B distances nearer.
    """
    row, column = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    rolled = tl.gather(scores_grad, (row - column) & (B - 1), 1)
    complete = carried + tl.sum(tl.where(column > row, rolled, 0.0), 0)
    _add(partials, distance - B, complete, length, B)
    return tl.sum(tl.where(column > row, 0.0, rolled), 0)


@triton.jit
def _add(partials, start, values, length, B: tl.constexpr):
    distance = start + tl.arange(0, B)
    is_one = (distance >= 0) & (distance < length)
    values += tl.load(partials + distance, mask=is_one, other=0.0)
    tl.store(partials + distance, values, mask=is_one)


@triton.jit
def _add_by_bucket(time_sums, scores_grad, buckets, is_pair):
    """(256,) sums with those of a tile: its times are sorted, so its buckets are few."""
    least = tl.min(tl.where(is_pair, buckets, NUM_TIME_BUCKETS))
    most = tl.max(tl.where(is_pair, buckets, 0))
    columns = tl.arange(0, PADDED_BUCKETS)
    for bucket in range(least, most + 1):
        total = tl.sum(tl.where(buckets == bucket, scores_grad, 0.0))
        time_sums += tl.where(columns == bucket, total, 0.0)
    return time_sums


@triton.jit(do_not_specialize=["T"])
def _query_grads_kernel(
    activated, attended_grad, offsets, key_times, query_times, position_weight, time_weight,
    attended, grad, position_partials, time_partials, T,
    H: tl.constexpr, DV: tl.constexpr, DQK: tl.constexpr, PADDED_V: tl.constexpr,
    PADDED_QK: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Gradients of Q and partial sums of the biases', of every P-th block of a sequence and head.

    `position_partials`: (P * H, T), of each sequence by distance; `time_partials`: (B * H * P,
    129). Zero at first.
    """
    WIDTH: tl.constexpr = 2 * DV + 2 * DQK
    SUM: tl.constexpr = attended.dtype.element_ty
    head, sequence = tl.program_id(0) % H, tl.program_id(0) // H
    first = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - first).to(tl.int32)
    num_programs = tl.num_programs(1)
    partials = position_partials + (tl.program_id(1) * H + head).to(tl.int64) * T + first
    activated, attended_grad = activated + head * WIDTH, attended_grad + head * DV
    time_sums = tl.zeros([PADDED_BUCKETS], SUM)
    for block in range(tl.program_id(1), tl.cdiv(length, B), num_programs):
        query = block * B + tl.arange(0, B)
        q = _load(activated + 2 * DV, first + query, query < length, H * WIDTH, DQK, PADDED_QK)
        g = _load(attended_grad, first + query, query < length, H * DV, DV, PADDED_V)
        q_grad = tl.zeros([B, PADDED_QK], SUM)
        carried = tl.zeros([B], SUM)
        for step in range(0, block + 1):
            key = (block - step) * B + tl.arange(0, B)
            is_key = key < length
            k = _load(activated + 2 * DV + DQK, first + key, is_key, H * WIDTH, DQK, PADDED_QK)
            v = _load(activated + DV, first + key, is_key, H * WIDTH, DV, PADDED_V)
            is_pair = (key[None, :] <= query[:, None]) & (query < length)[:, None]
            scores = _scores(
                q, k, first, query[:, None], key[None, :], is_pair, query_times, key_times,
                position_weight, time_weight, SUM, HAS_POSITION, HAS_TIME,
            )  # fmt: skip
            weights_grad = tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=SUM)
            _, scores_grad = _pair_grads(scores, weights_grad, is_pair)
            q_grad += tl.dot(scores_grad.to(k.dtype), k, input_precision=PRECISION, out_dtype=SUM)
            if HAS_POSITION:
                carried = _add_by_distance(scores_grad, carried, partials, step * B, length, B)
            if HAS_TIME:
                buckets = _time_buckets(
                    query_times, key_times, first + query[:, None], first + key[None, :], is_pair
                )
                time_sums = _add_by_bucket(time_sums, scores_grad, buckets, is_pair)
        if HAS_POSITION:
            _add(partials, block * B, carried, length, B)
            tl.debug_barrier()  # the next block's sums are read by other threads
        _store(grad + head * WIDTH + 2 * DV, first + query, query < length, q_grad, H * WIDTH, DQK)
    if HAS_TIME:
        columns = tl.arange(0, PADDED_BUCKETS)
        program = (tl.program_id(0) * num_programs + tl.program_id(1)).to(tl.int64)
        places = time_partials + program * NUM_TIME_BUCKETS + columns
        tl.store(places, time_sums, mask=columns < NUM_TIME_BUCKETS)


@triton.jit
def _key_grads_kernel(
    activated, attended_grad, offsets, key_times, query_times, position_weight, time_weight,
    attended, grad,
    H: tl.constexpr, DV: tl.constexpr, DQK: tl.constexpr, PADDED_V: tl.constexpr,
    PADDED_QK: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Gradients of B rows of K and V of a sequence and head; tiles are (keys, queries)."""
    WIDTH: tl.constexpr = 2 * DV + 2 * DQK
    SUM: tl.constexpr = attended.dtype.element_ty
    head, sequence = tl.program_id(0) % H, tl.program_id(0) // H
    first = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - first).to(tl.int32)
    start = tl.program_id(1) * B
    if start >= length:
        return
    activated, attended_grad = activated + head * WIDTH, attended_grad + head * DV
    key = start + tl.arange(0, B)
    k = _load(activated + 2 * DV + DQK, first + key, key < length, H * WIDTH, DQK, PADDED_QK)
    v = _load(activated + DV, first + key, key < length, H * WIDTH, DV, PADDED_V)
    k_grad = tl.zeros([B, PADDED_QK], SUM)
    v_grad = tl.zeros([B, PADDED_V], SUM)
    for query_start in range(start, length, B):
        query = query_start + tl.arange(0, B)
        q = _load(activated + 2 * DV, first + query, query < length, H * WIDTH, DQK, PADDED_QK)
        g = _load(attended_grad, first + query, query < length, H * DV, DV, PADDED_V)
        is_pair = (key[:, None] <= query[None, :]) & (query < length)[None, :]
        scores = _scores(
            k, q, first, query[None, :], key[:, None], is_pair, query_times, key_times,
            position_weight, time_weight, SUM, HAS_POSITION, HAS_TIME,
        )  # fmt: skip
        weights_grad = tl.dot(v, tl.trans(g), input_precision=PRECISION, out_dtype=SUM)
        weights, scores_grad = _pair_grads(scores, weights_grad, is_pair)
        v_grad += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION, out_dtype=SUM)
        k_grad += tl.dot(scores_grad.to(q.dtype), q, input_precision=PRECISION, out_dtype=SUM)
    grad += head * WIDTH
    _store(grad + 2 * DV + DQK, first + key, key < length, k_grad, H * WIDTH, DQK)
    _store(grad + DV, first + key, key < length, v_grad, H * WIDTH, DV)


@triton.jit(do_not_specialize=["T", "num_sequences", "num_partials"])
def _position_grad_kernel(
    partials, offsets, position_grad, T, N, num_sequences, num_partials, B: tl.constexpr
):
    """Sums of (num_partials, T) over partials and sequences, of B distances."""
    distance = tl.program_id(0) * B + tl.arange(0, B)
    sums = tl.zeros([B, B], position_grad.dtype.element_ty)
    for start in range(0, num_sequences, B):
        sequence = start + tl.arange(0, B)
        first = tl.load(offsets + sequence, mask=sequence < num_sequences, other=0)
        end = tl.load(offsets + sequence + 1, mask=sequence < num_sequences, other=0)
        events = first[:, None] + distance[None, :]
        for partial in range(0, num_partials):
            places = partials + tl.cast(partial, tl.int64) * T + events
            sums += tl.load(places, mask=events < end[:, None], other=0.0)
    tl.store(position_grad + distance, tl.sum(sums, 0), mask=distance < N)


@triton.jit(do_not_specialize=["T"])
def _norm_gate_kernel(
    activated, attended, gated, gated_grad, grad, attended_grad, T, N,
    H: tl.constexpr, DV: tl.constexpr, DQK: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """U * LayerNorm(A V) of ROWS events; or the gradients of U and, divided by N, of A V.

    The latter if `gated` is None; else the last three tensors are.
    """
    WIDTH: tl.constexpr = H * DV
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, PADDED)[None, :]
    is_one = (row < T) & (column < WIDTH)
    place, gate = row * WIDTH + column, (row * H + column // DV) * (2 * DV + 2 * DQK) + column % DV
    x = tl.load(attended + place, mask=is_one, other=0.0)
    x = tl.where(is_one, x - (tl.sum(x, 1) / WIDTH)[:, None], 0.0)
    rstd = (1 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + NORM_EPS))[:, None]
    normed = x * rstd
    u = tl.load(activated + gate, mask=is_one, other=0.0).to(x.dtype)
    if gated is None:
        g = tl.load(gated_grad + place, mask=is_one, other=0.0).to(x.dtype)
        tl.store(grad + gate, (g * normed).to(grad.dtype.element_ty), mask=is_one)
        g *= u
        mean = (tl.sum(g, 1) / WIDTH)[:, None]
        shared = (tl.sum(g * normed, 1) / WIDTH)[:, None]
        g = (g - mean - normed * shared) * rstd / N
        tl.store(attended_grad + place, g.to(attended_grad.dtype.element_ty), mask=is_one)
    else:
        tl.store(gated + place, (u * normed).to(gated.dtype.element_ty), mask=is_one)


class PackedSequences(NamedTuple):
    """What the kernels need to know of a packed batch, shared by all blocks."""

    offsets: Tensor  # (B + 1,) int64 on the device
    longest: int  # events of the longest sequence, at least 2
    key_times: Tensor  # (T,) int64 seconds
    query_times: Tensor | None


def prepare(
    offsets: Tensor, key_times: Tensor, query_times: Tensor | None, num_heads: int
) -> PackedSequences:
    """Arguments as `simplified_hstu.prepare`; sequences may be in any order of lengths."""
    on_device = offsets.to(key_times.device, non_blocking=True)
    longest = max(2, int(offsets.diff().max()))  # torch.compile would compile again for 1
    return PackedSequences(on_device, longest, key_times, query_times)


def gated_attention(
    x: Tensor,
    weight: Tensor,
    relative_bias: Any,
    sequences: PackedSequences,
    widths: list[int],
    maxlen: int,
) -> Tensor:
    """U * LayerNorm(A V), (T, D) -> (T, H * dv); arguments as `simplified_hstu.gated_attention`."""
    activated = F.silu(F.linear(x, weight))  # (T, H * (2 dv + 2 dqk))
    biases = relative_bias.position_weight, relative_bias.time_weight
    return _gated_attention(activated, *sequences, *biases, widths[0], widths[2], maxlen)[0]


def _sizes(activated: Tensor, dv: int, dqk: int) -> tuple[dict[str, int], dict[str, int]]:
    """The constants of the attention's kernels, and of that for norm and gate."""
    H = activated.shape[1] // (2 * dv + 2 * dqk)
    sizes, padded = {"H": H, "DV": dv, "DQK": dqk}, triton.next_power_of_2(H * dv)
    pads = {"PADDED_V": _padded(dv), "PADDED_QK": _padded(dqk)}
    rows = {"ROWS": max(1, NORM_ELEMENTS // padded), "PADDED": padded}
    # Three products in the place of one in float32 want more registers.
    launch = {"B": BLOCK, "num_warps": 4 if activated.itemsize == 2 else 8, "num_stages": 2}
    return {**sizes, **pads, **launch}, {**sizes, **rows}


def _ceil_div(a: int, b: int) -> int:
    # With triton.cdiv, or len of a tensor, torch.compile would compile again for another batch.
    return -(-a // b)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))  # a product wants 16 at least


@triton_op(f"hstu::gated_attention_{VERSION}", mutates_args={})
def _gated_attention(
    activated: Tensor, offsets: Tensor, longest: int, key_times: Tensor,
    query_times: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
    dv: int, dqk: int, maxlen: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """U * LayerNorm(A V) in the type of `activated`, and A V in that of sums, (T, H * dv)."""
    T, (attention, norm) = activated.shape[0], _sizes(activated, dv, dqk)
    gated = activated.new_empty(T, norm["H"] * dv)
    attended = torch.empty_like(gated, dtype=torch.promote_types(gated.dtype, torch.float32))
    tables = _tables(offsets, key_times, query_times, position_weight, time_weight)
    grid = ((offsets.shape[0] - 1) * norm["H"], _ceil_div(longest, BLOCK))
    # Triton launches on the current device; that of a backward pass is its tensors' anyway.
    with torch.cuda.device_of(activated):
        wrap_triton(_forward_kernel)[grid](
            activated, *tables, attended, maxlen, **attention,
            HAS_POSITION=position_weight is not None, HAS_TIME=time_weight is not None,
        )  # fmt: skip
        wrap_triton(_norm_gate_kernel)[(_ceil_div(T, norm["ROWS"]),)](
            activated, attended, gated, None, None, None, T, maxlen, **norm
        )
    return gated, attended


def _tables(offsets: Tensor, *tables: Tensor | None) -> list[Tensor]:
    """With a tensor that no kernel reads in the place of each that there is not."""
    return [offsets, *(offsets if table is None else table for table in tables)]


@triton_op(f"hstu::gated_attention_grads_{VERSION}", mutates_args={})
def _gated_attention_grads(
    gated_grad: Tensor, activated: Tensor, attended: Tensor, offsets: Tensor, longest: int,
    key_times: Tensor, query_times: Tensor | None, position_weight: Tensor | None,
    time_weight: Tensor | None, dv: int, dqk: int, maxlen: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `activated` and of both biases; of a bias that there is not, (0,)."""
    T, (attention, norm) = activated.shape[0], _sizes(activated, dv, dqk)
    H, num_sequences, blocks = norm["H"], offsets.shape[0] - 1, _ceil_div(longest, BLOCK)
    has = {"HAS_POSITION": position_weight is not None, "HAS_TIME": time_weight is not None}
    grad = torch.empty_like(activated)
    attended_grad = torch.empty_like(attended, dtype=activated.dtype)
    grid = (_ceil_div(T, norm["ROWS"]),)
    wrap_triton(_norm_gate_kernel)[grid](
        activated, attended, None, gated_grad, grad, attended_grad, T, maxlen, **norm
    )
    programs = min(blocks, MOST_PROGRAMS)
    by_distance = attended.new_zeros(programs * H * has["HAS_POSITION"], T)
    by_bucket = attended.new_empty(
        num_sequences * H * programs * has["HAS_TIME"], NUM_TIME_BUCKETS.value
    )
    tables = _tables(offsets, key_times, query_times, position_weight, time_weight)
    wrap_triton(_query_grads_kernel)[(num_sequences * H, programs)](
        activated, attended_grad, *tables, attended, grad, by_distance, by_bucket, T,
        **attention, **has,
    )  # fmt: skip
    wrap_triton(_key_grads_kernel)[(num_sequences * H, blocks)](
        activated, attended_grad, *tables, attended, grad, **attention, **has
    )
    position_grad = attended.new_empty(maxlen * has["HAS_POSITION"])
    if has["HAS_POSITION"]:
        wrap_triton(_position_grad_kernel)[(_ceil_div(maxlen, BLOCK),)](
            by_distance, offsets, position_grad, T, maxlen, num_sequences, programs * H, BLOCK
        )
    time_grad = by_bucket.sum(0) if has["HAS_TIME"] else attended.new_empty(0)
    return grad, position_grad, time_grad


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    activated, offsets, longest, *tables, dv, dqk, maxlen = inputs
    ctx.set_materialize_grads(False)  # that of A V is none
    ctx.save_for_backward(activated, output[1], offsets, *tables)
    ctx.sizes = longest, dv, dqk, maxlen


def _backward(ctx: Any, gated_grad: Tensor, _: None) -> tuple:
    activated, attended, offsets, *tables = ctx.saved_tensors
    longest, *sizes = ctx.sizes
    grads = _gated_attention_grads(
        gated_grad.contiguous(), activated, attended, offsets, longest, *tables, *sizes
    )
    position_grad, time_grad = (
        None if weight is None else grad.to(weight.dtype)
        for weight, grad in zip(tables[2:], grads[1:], strict=True)
    )
    return grads[0], None, None, None, None, position_grad, time_grad, None, None, None


_gated_attention.register_autograd(_backward, setup_context=_save)

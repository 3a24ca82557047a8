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
BLOCK = tl.constexpr(32)
MOST_PROGRAMS = 2048  # or a few more, that sum the biases' gradients; each has its partial sums
NORM_ELEMENTS = 2048  # of a program for norm and gate
# As in simplified_hstu.
BUCKET_LOG_WIDTH, NORM_EPS = tl.constexpr(0.301), tl.constexpr(1e-6)
NUM_TIME_BUCKETS, PADDED_BUCKETS = tl.constexpr(129), tl.constexpr(256)
# Plain tf32 would keep 10 bits of a float32; three products of it keep about all.
PRECISION = tl.constexpr("tf32x3")
SUM = tl.constexpr(tl.float32)  # of all sums; the interpreter's tests have float64
# torch.compile caches blocks on disk by the names of their operators: a changed file has others.
VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


@triton.jit
def _load(table, rows, length, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a sequence's table, (rows, PADDED); 0 from `length` on, and beyond WIDTH."""
    columns = tl.arange(0, PADDED)[None, :]
    places = table + rows.to(tl.int64)[:, None] * STRIDE + columns
    return tl.load(places, mask=(rows < length)[:, None] & (columns < WIDTH), other=0.0)


@triton.jit
def _store(table, rows, length, values, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, values.shape[1])[None, :]
    places = table + rows.to(tl.int64)[:, None] * STRIDE + columns
    tl.store(places, values, mask=(rows < length)[:, None] & (columns < WIDTH))


@triton.jit
def _scores(a, b, query, key, first, length, key_times, query_times, position_weight, time_weight):
    """Of a tile of positions: a b^T with the biases, which ones are pairs, time buckets (or 0)."""
    is_pair = (key <= query) & (query < length)
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=SUM)
    buckets = tl.zeros(scores.shape, tl.int32)
    if time_weight is not None:
        seconds = tl.load(query_times + first + query, mask=query < length, other=0)
        seconds -= tl.load(key_times + first + key, mask=key < length, other=0)  # int64, exact
        log_seconds = tl.log(tl.maximum(tl.abs(seconds), 1).to(tl.float32))
        buckets = tl.minimum((log_seconds / BUCKET_LOG_WIDTH).to(tl.int32), NUM_TIME_BUCKETS - 1)
        scores += tl.load(time_weight + buckets, mask=is_pair, other=0.0)
    if position_weight is not None:
        scores += tl.load(position_weight + (query - key), mask=is_pair, other=0.0)
    return scores, is_pair, buckets


@triton.jit
def _forward_kernel(
    activated, offsets, key_times, query_times, position_weight, time_weight, attended, N,
    H: tl.constexpr, DV: tl.constexpr, DQK: tl.constexpr, PAD_V: tl.constexpr, PAD_QK: tl.constexpr,
):  # fmt: skip
    """A V of BLOCK queries of a sequence and head."""
    # No function loads from `offsets`: torch.compile would believe that its results may be written
    # to as a part of them, and copy the offsets.
    WIDTH: tl.constexpr = 2 * DV + 2 * DQK
    head, index = tl.program_id(0) % H, tl.program_id(0) // H
    first = tl.load(offsets + index)
    length = (tl.load(offsets + index + 1) - first).to(tl.int32)
    block = tl.program_id(1)
    if block * BLOCK >= length:
        return
    activated += (first * H + head) * WIDTH
    query = block * BLOCK + tl.arange(0, BLOCK)
    q = _load(activated + 2 * DV, query, length, H * WIDTH, DQK, PAD_QK)
    sums = tl.zeros([BLOCK, PAD_V], SUM)
    for start in range(0, block * BLOCK + 1, BLOCK):
        key = start + tl.arange(0, BLOCK)
        k = _load(activated + 2 * DV + DQK, key, length, H * WIDTH, DQK, PAD_QK)
        v = _load(activated + DV, key, length, H * WIDTH, DV, PAD_V)
        scores, is_pair, _ = _scores(
            q, k, query[:, None], key[None, :], first, length, key_times, query_times,
            position_weight, time_weight,
        )  # fmt: skip
        weights = tl.where(is_pair, scores / (1 + tl.exp(-scores)), 0.0).to(v.dtype)
        sums += tl.dot(weights, v, input_precision=PRECISION, out_dtype=SUM)
    _store(attended + (first * H + head) * DV, query, length, sums / N, H * DV, DV)


@triton.jit
def _pair_grads(scores, a, b, is_pair):
    """SiLU of scores, whose gradient is a b^T, and that of the scores; 0 where there is no pair."""
    weights_grad = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=SUM)
    share = 1 / (1 + tl.exp(-scores))
    scores_grad = weights_grad * share * (1 + scores * (1 - share))
    return tl.where(is_pair, scores * share, 0.0), tl.where(is_pair, scores_grad, 0.0)


@triton.jit
def _add_by_distance(scores_grad, carried, partials, distance, length):
    """Add a tile's gradients, and those carried, to distances below `distance`; return the others.

    Row r is rolled by r columns: column c then has the distance `distance` + c or, where c > r,
    BLOCK less, which no later tile of these queries has.
    """
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    rolled = tl.gather(scores_grad, (row - column) & (BLOCK - 1), 1)
    complete = carried + tl.sum(tl.where(column > row, rolled, 0.0), 0)
    _add(partials, distance - BLOCK, complete, length)
    return tl.sum(tl.where(column > row, 0.0, rolled), 0)


@triton.jit
def _add(partials, start, values, length):
    distance = start + tl.arange(0, BLOCK)
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


@triton.jit
def _query_grads_kernel(
    activated, attended_grad, offsets, key_times, query_times, position_weight, time_weight,
    grad, partials, N,
    H: tl.constexpr, DV: tl.constexpr, DQK: tl.constexpr, PAD_V: tl.constexpr, PAD_QK: tl.constexpr,
):  # fmt: skip
    """Gradients of Q and partial sums of the biases', of every P-th block of a sequence and head.

    `partials`: a row for each program, by distance (N) and by time bucket (129); zero at first.
    """
    WIDTH: tl.constexpr = 2 * DV + 2 * DQK
    head, index = tl.program_id(0) % H, tl.program_id(0) // H
    first = tl.load(offsets + index)
    length = (tl.load(offsets + index + 1) - first).to(tl.int32)
    program, num_programs = tl.program_id(1), tl.num_programs(1)
    partials += (tl.program_id(0).to(tl.int64) * num_programs + program) * (N + NUM_TIME_BUCKETS)
    activated += (first * H + head) * WIDTH
    time_sums = tl.zeros([PADDED_BUCKETS], SUM)
    for block in range(program, tl.cdiv(length, BLOCK), num_programs):
        query = block * BLOCK + tl.arange(0, BLOCK)
        q = _load(activated + 2 * DV, query, length, H * WIDTH, DQK, PAD_QK)
        g = _load(attended_grad + (first * H + head) * DV, query, length, H * DV, DV, PAD_V)
        q_grad = tl.zeros([BLOCK, PAD_QK], SUM)
        carried = tl.zeros([BLOCK], SUM)
        for step in range(0, block + 1):
            key = (block - step) * BLOCK + tl.arange(0, BLOCK)
            k = _load(activated + 2 * DV + DQK, key, length, H * WIDTH, DQK, PAD_QK)
            v = _load(activated + DV, key, length, H * WIDTH, DV, PAD_V)
            scores, is_pair, buckets = _scores(
                q, k, query[:, None], key[None, :], first, length, key_times, query_times,
                position_weight, time_weight,
            )  # fmt: skip
            _, scores_grad = _pair_grads(scores, g, v, is_pair)
            q_grad += tl.dot(scores_grad.to(k.dtype), k, input_precision=PRECISION, out_dtype=SUM)
            if position_weight is not None:
                carried = _add_by_distance(scores_grad, carried, partials, step * BLOCK, length)
            if time_weight is not None:
                time_sums = _add_by_bucket(time_sums, scores_grad, buckets, is_pair)
        if position_weight is not None:
            _add(partials, block * BLOCK, carried, length)
            tl.debug_barrier()  # the next block's sums are read by other threads
        _store(grad + (first * H + head) * WIDTH + 2 * DV, query, length, q_grad, H * WIDTH, DQK)
    columns = tl.arange(0, PADDED_BUCKETS)
    tl.store(partials + N + columns, time_sums, mask=columns < NUM_TIME_BUCKETS)


@triton.jit
def _key_grads_kernel(
    activated, attended_grad, offsets, key_times, query_times, position_weight, time_weight, grad,
    H: tl.constexpr, DV: tl.constexpr, DQK: tl.constexpr, PAD_V: tl.constexpr, PAD_QK: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK rows of K and V of a sequence and head; tiles are (keys, queries)."""
    WIDTH: tl.constexpr = 2 * DV + 2 * DQK
    head, index = tl.program_id(0) % H, tl.program_id(0) // H
    first = tl.load(offsets + index)
    length = (tl.load(offsets + index + 1) - first).to(tl.int32)
    activated += (first * H + head) * WIDTH
    grad += (first * H + head) * WIDTH
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = _load(activated + 2 * DV + DQK, key, length, H * WIDTH, DQK, PAD_QK)
    v = _load(activated + DV, key, length, H * WIDTH, DV, PAD_V)
    k_grad = tl.zeros([BLOCK, PAD_QK], SUM)
    v_grad = tl.zeros([BLOCK, PAD_V], SUM)
    for start in range(tl.program_id(1) * BLOCK, length, BLOCK):
        query = start + tl.arange(0, BLOCK)
        q = _load(activated + 2 * DV, query, length, H * WIDTH, DQK, PAD_QK)
        g = _load(attended_grad + (first * H + head) * DV, query, length, H * DV, DV, PAD_V)
        scores, is_pair, _ = _scores(
            k, q, query[None, :], key[:, None], first, length, key_times, query_times,
            position_weight, time_weight,
        )  # fmt: skip
        weights, scores_grad = _pair_grads(scores, v, g, is_pair)
        v_grad += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION, out_dtype=SUM)
        k_grad += tl.dot(scores_grad.to(q.dtype), q, input_precision=PRECISION, out_dtype=SUM)
    _store(grad + 2 * DV + DQK, key, length, k_grad, H * WIDTH, DQK)
    _store(grad + DV, key, length, v_grad, H * WIDTH, DV)


@triton.jit(do_not_specialize=["T"])
def _norm_gate_kernel(
    activated, attended, gated, gated_grad, grad, attended_grad, T, N,
    H: tl.constexpr, DV: tl.constexpr, DQK: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """U * LayerNorm(A V) of ROWS events; without `gated`, gradients of U and (over N) of A V."""
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
        tl.store(grad + gate, g * normed, mask=is_one)
        g *= u
        g -= (tl.sum(g, 1)[:, None] + normed * tl.sum(g * normed, 1)[:, None]) / WIDTH
        tl.store(attended_grad + place, g * rstd / N, mask=is_one)
    else:
        tl.store(gated + place, u * normed, mask=is_one)


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
    x: Tensor, weight: Tensor, relative_bias: Any, sequences: PackedSequences, widths: list[int],
    maxlen: int,
) -> Tensor:  # fmt: skip
    """U * LayerNorm(A V), (T, D) -> (T, H * dv); arguments as `simplified_hstu.gated_attention`."""
    activated = F.silu(F.linear(x, weight))  # (T, H * (2 dv + 2 dqk))
    biases = relative_bias.position_weight, relative_bias.time_weight
    return _gated_attention(activated, *sequences, *biases, widths[0], widths[2], maxlen)[0]


def _sizes(activated: Tensor, dv: int, dqk: int) -> tuple[dict[str, int], dict[str, int]]:
    """The constants of the attention's kernels, and of that for norm and gate."""
    H = activated.shape[1] // (2 * dv + 2 * dqk)
    # A product wants widths of 16 at least.
    padded, pad_v, pad_qk = map(triton.next_power_of_2, (H * dv, max(16, dv), max(16, dqk)))
    # Three products in the place of one in float32 want more registers.
    launch = {"num_warps": 4 if activated.itemsize == 2 else 8, "num_stages": 2}
    sizes = {"H": H, "DV": dv, "DQK": dqk}
    rows = {"ROWS": max(1, NORM_ELEMENTS // padded), "PADDED": padded}
    return sizes | {"PAD_V": pad_v, "PAD_QK": pad_qk} | launch, sizes | rows


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # with triton.cdiv, torch.compile would compile again for another batch


@triton_op(f"hstu::gated_attention_{VERSION}", mutates_args={})
def _gated_attention(
    activated: Tensor, offsets: Tensor, longest: int, key_times: Tensor,
    query_times: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
    dv: int, dqk: int, maxlen: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """U * LayerNorm(A V) in the type of `activated`, and A V in that of sums, (T, H * dv)."""
    (attention, norm), T = _sizes(activated, dv, dqk), activated.shape[0]
    gated = activated.new_empty(T, norm["H"] * dv)
    attended = torch.empty_like(gated, dtype=torch.promote_types(gated.dtype, torch.float32))
    tables = offsets, key_times, query_times, position_weight, time_weight
    grid = ((offsets.shape[0] - 1) * norm["H"], _ceil_div(longest, BLOCK.value))
    # Triton launches on the current device; that of a backward pass is its tensors' anyway.
    with torch.cuda.device_of(activated):
        wrap_triton(_forward_kernel)[grid](activated, *tables, attended, maxlen, **attention)
        wrap_triton(_norm_gate_kernel)[(_ceil_div(T, norm["ROWS"]),)](
            activated, attended, gated, None, None, None, T, maxlen, **norm
        )
    return gated, attended


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    activated, offsets, longest, *tables, dv, dqk, maxlen = inputs
    ctx.set_materialize_grads(False)  # that of A V is none
    ctx.save_for_backward(activated, output[1], offsets, *tables)
    ctx.sizes = longest, dv, dqk, maxlen


def _backward(ctx: Any, gated_grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    tensors, N = ctx.saved_tensors, ctx.sizes[-1]
    grad, sums = _gated_attention_grads(gated_grad.contiguous(), *tensors, *ctx.sizes)
    position_grad = None if tensors[5] is None else sums[:N]
    time_grad = None if tensors[6] is None else sums[N:]
    return grad, None, None, None, None, position_grad, time_grad, None, None, None


# An operator too: else each launch would be wrapped anew, and never freed.
@triton_op(f"hstu::gated_attention_grads_{VERSION}", mutates_args={})
def _gated_attention_grads(
    gated_grad: Tensor, activated: Tensor, attended: Tensor, offsets: Tensor, key_times: Tensor,
    query_times: Tensor | None, position_weight: Tensor | None, time_weight: Tensor | None,
    longest: int, dv: int, dqk: int, maxlen: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `activated`, and of the biases by distance and by time bucket, (N + 129,)."""
    (attention, norm), T = _sizes(activated, dv, dqk), activated.shape[0]
    grad = torch.empty_like(activated)
    attended_grad = torch.empty_like(attended, dtype=activated.dtype)
    num_heads = (offsets.shape[0] - 1) * norm["H"]  # of all sequences
    blocks = _ceil_div(longest, BLOCK.value)
    programs = min(blocks, _ceil_div(MOST_PROGRAMS, num_heads))
    partials = attended.new_zeros(num_heads * programs, maxlen + NUM_TIME_BUCKETS.value)
    tables = offsets, key_times, query_times, position_weight, time_weight
    inputs, grid = (activated, attended_grad, *tables), (num_heads, programs)
    wrap_triton(_norm_gate_kernel)[(_ceil_div(T, norm["ROWS"]),)](
        activated, attended, None, gated_grad, grad, attended_grad, T, maxlen, **norm
    )
    wrap_triton(_query_grads_kernel)[grid](*inputs, grad, partials, maxlen, **attention)
    wrap_triton(_key_grads_kernel)[(num_heads, blocks)](*inputs, grad, **attention)
    return grad, partials.sum(0)


_gated_attention.register_autograd(_backward, setup_context=_save)

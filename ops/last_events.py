"""A block for each sequence's last event alone: the last one, where no other event is asked for.

`simplified_hstu.HSTUAttention` defines it. A query per sequence makes a score per event and head,
so that nothing is padded or cut into tiles: one form for every device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.attention import NORM_EPS, time_buckets
from ops.rows import sum_rows


def block_of_last(block: Any, x: Tensor, sequences: Any, last_events: Tensor) -> Tensor:
    """(T, D) -> (B, D), the rows `last_events` of simplified_hstu.HSTUAttention's `forward`."""
    gated = _gated_attention(
        block.layer_norm(x),
        block.qkv_proj.weight,
        block.relative_bias,
        sequences,
        last_events,
        block.widths,
        block.maxlen,
    )  # (B, H * dv)
    return block.merge(x[last_events], gated)


def _gated_attention(
    x: Tensor,
    weight: Tensor,
    relative_bias: Any,
    sequences: Any,
    last: Tensor,
    widths: list[int],
    maxlen: int,
) -> Tensor:
    """U * LayerNorm(A V) of the events `last`, (T, D) -> (B, H * dv).

    The other arguments as `simplified_hstu.gated_attention`; `sequences` has the times that it was
    prepared from.
    """
    event = torch.arange(len(x), device=x.device)
    sequence = torch.searchsorted(last, event)  # (T,), in 0..B-1
    distances = last[sequence] - event  # (T,)
    u_rows, v_rows, q_rows, k_rows = weight.unflatten(0, (-1, sum(widths))).split(widths, 1)
    u, q = _project(x[last], u_rows, q_rows)  # (B, H, dv), (B, H, dqk)
    v, k = _project(x, v_rows, k_rows)  # (T, H, dv), (T, H, dqk)
    scores = (q[sequence] * k).sum(-1, dtype=torch.promote_types(k.dtype, torch.float32))  # (T, H)
    if relative_bias.position_weight is not None:
        scores = scores + relative_bias.position_weight.index_select(0, distances)[:, None]
    if relative_bias.time_weight is not None:
        seconds = sequences.query_times[last][sequence] - sequences.key_times
        buckets = time_buckets(seconds.double())
        scores = scores + relative_bias.time_weight.index_select(0, buckets)[:, None]
    weighted = (F.silu(scores) / maxlen)[..., None] * v  # (T, H, dv)
    bounds = F.pad(last + 1, (1, 0))  # (B + 1,), where each sequence begins
    attended = sum_rows(weighted.flatten(1), (event, bounds))  # (B, H * dv)
    return u.flatten(1) * F.layer_norm(attended, attended.shape[1:], eps=NORM_EPS)


def _project(x: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """SiLU(x W) for two of U, V, Q, K, whose `rows` of W are (H, w, D): (n, H, w) each."""
    projected = F.silu(F.linear(x, torch.cat(rows, 1).flatten(0, 1)))
    return projected.unflatten(1, (len(rows[0]), -1)).split([r.shape[1] for r in rows], 2)

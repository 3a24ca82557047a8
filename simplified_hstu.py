"""HSTU as the paper defines it: relative attention bias, pointwise attention, block, stack.

Letters used throughout the package; in brackets the symbol of the paper (arXiv 2402.17152):
    B           sequences in the batch
    T           input events in the batch, its sequences laid end to end
    N (n)       longest history, `maxlen`
    L           longest sequence of the batch, at most N
    D (d)       embedding width
    H (h)       heads
    dqk (d_qk)  query and key width per head
    dv (d_v)    value and gate width per head
    R           distinct items in the batch
    M           negatives
    X           items
    K           cut-off of a ranking
"Reference" is facebookresearch/generative-recommenders, research/modeling/sequential/hstu.py.
`gated_attention` is the definition, and slow (`--kernels plain`); `ops/attention.py` is tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from hstu_components import INIT_STD
from ops.dropout import Dropout

NORM_EPS = 1e-6  # the reference's
# Time buckets grow by e ** 0.301 = 1.35, as in the published results, and not by two: the reference
# divides a natural logarithm by log10(2). The tuned forms in ops/ repeat these numbers.
BUCKET_LOG_WIDTH, NUM_TIME_BUCKETS = 0.301, 129
BIAS_START = 0.5  # of rab's two parts; around the reference's 0, chance decides (docs/log.md)


def time_buckets(seconds: Tensor) -> Tensor:
    """floor(ln(max(1, |seconds|)) / 0.301), at most 128, int64 (reference bucketization_fn)."""
    log_seconds = seconds.abs().clamp(min=1).float().log()
    return (log_seconds / BUCKET_LOG_WIDTH).long().clamp(max=NUM_TIME_BUCKETS - 1)


class RelativeAttentionBias(nn.Module):
    """rab of equation 2, for all heads: learnt scalars per distance and per bucket of elapsed time.

    Reference RelativeBucketedTimeAndPositionBasedBias, but without weights for the future.
    """

    def __init__(self, maxlen: int, has_position: bool, has_time: bool):
        super().__init__()
        self.position_weight = nn.Parameter(torch.empty(maxlen)) if has_position else None
        self.time_weight = nn.Parameter(torch.empty(NUM_TIME_BUCKETS)) if has_time else None
        for weight in self.parameters():
            nn.init.normal_(weight, BIAS_START, INIT_STD)

    def forward(self, length: int, seconds: Tensor | None) -> Tensor:
        """The bias of each query (row) for each key, broadcastable to (B, 1, length, length).

        `seconds`: (B, length, length) int64, query time minus key time; None without a time bias.
        """
        bias = torch.zeros(())
        if self.position_weight is not None:
            position = torch.arange(length, device=self.position_weight.device)
            distances = (position[:, None] - position).clamp(min=0)  # (L, L)
            bias = _look_up(self.position_weight, distances)
        if self.time_weight is not None:
            bias = bias + _look_up(self.time_weight, time_buckets(seconds))[:, None]
        return bias


def _look_up(weight: Tensor, index: Tensor) -> Tensor:
    """weight[index], but with a gradient that a CPU sums in the same order every time."""
    return weight.index_select(0, index.flatten()).view(index.shape)


class PaddedSequences(NamedTuple):
    """What the definition needs to know of a packed batch, shared by all blocks."""

    lengths: list[int]  # B, events of each sequence
    seconds: Tensor | None  # (B, L, L) int64, query time minus key time

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), each sequence padded with zeros at its end."""
        return pad_sequence(x.split(self.lengths), batch_first=True)

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...)."""
        return torch.cat([row[:n] for row, n in zip(padded, self.lengths, strict=True)])


def prepare(
    offsets: Tensor, key_times: Tensor, query_times: Tensor | None, num_heads: int
) -> PaddedSequences:
    """What the attention of all blocks needs to know of a batch.

    `offsets`: (B + 1,) int64 on the CPU; sequence b is events offsets[b]..offsets[b + 1] - 1, at
    least one. `key_times`, `query_times`: (T,) int64 seconds; no query times, no time bias.
    `num_heads`: for the group sizes of a tuned form.
    """
    sequences = PaddedSequences(offsets.diff().tolist(), None)
    if query_times is not None:
        queries, keys = sequences.pad(query_times), sequences.pad(key_times)  # (B, L)
        sequences = sequences._replace(seconds=queries[:, :, None] - keys[:, None, :])
    return sequences


def gated_attention(
    x: Tensor,
    weight: Tensor,
    relative_bias: RelativeAttentionBias,
    sequences: PaddedSequences,
    widths: list[int],
    maxlen: int,
) -> Tensor:
    """U * LayerNorm(A V): equations 1 to 3 but for the last projection, (T, D) -> (T, H * dv).

    `weight`: (H * (2 dv + 2 dqk), D), of each head the rows of U, V, Q and K. `widths`: dv, dv,
    dqk, dqk. `maxlen`: N, by which attention is divided.
    """
    projected = F.silu(F.linear(x, weight))  # (T, H * (2 dv + 2 dqk)), equation 1
    padded = sequences.pad(projected).unflatten(-1, (-1, sum(widths)))  # (B, L, H, .)
    u, v, q, k = padded.transpose(1, 2).split(widths, dim=-1)  # (B, H, L, dv or dqk)
    rab = relative_bias(q.shape[2], sequences.seconds)  # (B, 1, L, L)
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()  # (L, L)
    weights = F.silu(q @ k.mT + rab) * mask / maxlen  # (B, H, L, L), A of equation 2
    attended = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # (B, L, H * dv)
    normed = F.layer_norm(attended, attended.shape[2:], eps=NORM_EPS)
    return sequences.unpad(u.transpose(1, 2).flatten(2) * normed)  # (T, H * dv), equation 3


class Attention(NamedTuple):
    """A form of the attention; what `prepare` returns is for its own functions alone."""

    prepare: Callable[..., Any]
    gated_attention: Callable[..., Tensor]
    block_of_last: Callable[..., Tensor] | None = None  # HSTUAttention of last events alone


DEFINITION = Attention(prepare, gated_attention)


class HSTUAttention(nn.Module):
    """One HSTU block on packed events, equations 1 to 3.

        U, V, Q, K = split(SiLU(LayerNorm(x) W))
        y = x + W_o dropout(U * LayerNorm(A V)),   A = SiLU(Q K^T + rab) / N, causal

    As in the reference, LayerNorms have no weights, W no bias, and scores no 1 / sqrt(dqk).
    """

    def __init__(
        self, hidden_units: int, num_heads: int, attention_dim: int, linear_dim: int,
        dropout_rate: float, maxlen: int, has_time_bias: bool, has_position_bias: bool,
        attention: Attention = DEFINITION,
    ):  # fmt: skip
        super().__init__()
        self.attention, self.maxlen = attention, maxlen
        self.widths = [linear_dim, linear_dim, attention_dim, attention_dim]  # of U, V, Q, K
        self.layer_norm = nn.LayerNorm(hidden_units, NORM_EPS, elementwise_affine=False)
        self.qkv_proj = nn.Linear(hidden_units, num_heads * sum(self.widths), bias=False)  # and U
        self.relative_bias = RelativeAttentionBias(maxlen, has_position_bias, has_time_bias)
        self.dropout = Dropout(dropout_rate)
        self.output_proj = nn.Linear(num_heads * linear_dim, hidden_units)
        nn.init.normal_(self.qkv_proj.weight, std=INIT_STD)
        nn.init.xavier_uniform_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)

    def forward(self, x: Tensor, sequences: Any) -> Tensor:
        """(T, D) -> (T, D); each event attends to itself and to those before it."""
        weight, rab = self.qkv_proj.weight, self.relative_bias
        gated = self.attention.gated_attention(
            self.layer_norm(x), weight, rab, sequences, self.widths, self.maxlen
        )  # (T, H * dv)
        return self.merge(x, gated)

    def merge(self, x: Tensor, gated: Tensor) -> Tensor:
        """(T, D) and (T, H * dv) -> (T, D), the last projection and the residual sum."""
        return x + self.output_proj(self.dropout(gated))


class HSTU(nn.Module):
    """A stack of `num_blocks` HSTU blocks over packed sequences.

    Args:
        time_bias: whose time a query has. "request": that of the event to be predicted, as in the
            reference; "event": that of the event itself; "off": no time bias.
        block: the other arguments of HSTUAttention.
    """

    def __init__(self, num_blocks: int, time_bias: str, **block: Any):
        super().__init__()
        self.time_bias, self.gradient_checkpointing = time_bias, False
        self.num_heads, self.maxlen = block["num_heads"], block["maxlen"]
        block["has_time_bias"] = time_bias != "off"
        self.blocks = nn.ModuleList(HSTUAttention(**block) for _ in range(num_blocks))
        self.attention = self.blocks[0].attention

    def forward(
        self, x: Tensor, offsets: Tensor, timestamps: Tensor, target_timestamps: Tensor,
        last_events: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(T, D) -> (T, D), each event from those of its sequence up to itself.

        `offsets`: (B + 1,) int64 on the CPU, as in `prepare`. `timestamps`, `target_timestamps`:
        (T,) int64 seconds, of the events and of those to be predicted. `last_events`: (B,) int64,
        the rows of each sequence's last event, if they alone are asked for: (B, D).
        """
        if not len(x):  # with several processes, one may have no sequence of a small batch
            return x
        times = {"request": target_timestamps, "event": timestamps, "off": None}[self.time_bias]
        sequences = self.attention.prepare(offsets, timestamps, times, self.num_heads)
        for block in self.blocks:
            is_final = block is self.blocks[-1] and type(block) is HSTUAttention  # not your own
            if last_events is not None and is_final and self.attention.block_of_last:
                return self.attention.block_of_last(block, x, sequences, last_events)
            if self.gradient_checkpointing and self.training:
                # Reentrant: else tuned attention keeps its cache. Then x must need a gradient.
                x = checkpoint(block, x.requires_grad_(), sequences, use_reentrant=True)
            else:
                x = block(x, sequences)  # (T, D)
        return x if last_events is None else x[last_events]

    @property
    def _causal_mask(self) -> Tensor:  # (N, N) bool, of queries and keys; for whoever looks at A
        return torch.ones(self.maxlen, self.maxlen, dtype=torch.bool).tril()

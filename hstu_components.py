"""What stands around the encoder: item table, feature encoders, pre- and postprocessor.

Letters as in simplified_hstu.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ops.dropout import Dropout
from ops.rows import take_rows, take_table_rows
from ops.sharded_table import ShardedEmbedding

INIT_STD = 0.02  # of item table, positions and everything added to them: see docs/log.md
L2_EPS = 1e-6
SUM_BLOCK = 128  # events that a matrix product adds up
# Up to this many rows a table's gradient is dense: faster for batches of 14,000 distinct items.
DENSE_ROWS = 20_000


class LocalEmbeddingModule(nn.Module):
    """The item table: a learnt vector per item id; row 0 (padding, or an unknown item) is zero."""

    def __init__(self, num_items: int, hidden_units: int, is_sharded: bool = False):
        """`is_sharded`: over the processes; drawn from the same random numbers, trained by rows."""
        super().__init__()
        if is_sharded:
            self.item_emb = ShardedEmbedding(num_items + 1, hidden_units)
            self.item_emb.draw(partial(nn.init.normal_, std=INIT_STD))
        else:
            self.item_emb = nn.Embedding(num_items + 1, hidden_units, padding_idx=0)
            init_embedding(self.item_emb)

    def forward(self, item_ids: Tensor, are_distinct: bool = False) -> Tensor:
        """(n,) int64 in 0..X -> (n, D); `are_distinct` as in `ops.rows.take_table_rows`."""
        table = self.item_emb
        if isinstance(table, ShardedEmbedding):
            return table(item_ids)
        return take_table_rows(table.weight, item_ids, table.sparse, are_distinct)


def init_embedding(embedding: nn.Embedding | nn.EmbeddingBag) -> None:
    """Normal, std 0.02, as in the reference; the row of the unknown value is zero."""
    nn.init.normal_(embedding.weight, std=INIT_STD)
    with torch.no_grad():
        embedding.weight[0] = 0


class SparseEncoder(nn.Embedding):
    """A learnt vector per value 1..size of a categorical feature; 0, unknown, is zero."""

    def __init__(self, hidden_units: int, size: int):
        super().__init__(size + 1, hidden_units, padding_idx=0)
        init_embedding(self)

    def forward(self, values: Tensor) -> Tensor:
        """(n,) int64 -> (n, D)."""
        return take_table_rows(self.weight, values, self.sparse)


class ArrayEncoder(nn.EmbeddingBag):
    """The mean of the vectors of a list's values 1..size; zero for an empty list."""

    def __init__(self, hidden_units: int, size: int):
        options = {"mode": "mean", "padding_idx": 0, "include_last_offset": True}
        super().__init__(size + 1, hidden_units, **options)
        init_embedding(self)

    def forward(self, values: Tensor, bags: Tensor) -> Tensor:
        """Flat int64 values and where each list begins, (n + 1,) int64 -> (n, D).

        0 is padding. On a GPU all lists are padded to one length.
        """
        if values.device.type == "cpu":
            return super().forward(values, bags)
        # The gradient of nn.EmbeddingBag has no order there, and a sparse one waits.
        vectors = take_table_rows(self.weight, values, self.sparse)
        n = len(bags) - 1
        lists = vectors.view(n, len(values) // max(1, n), self.embedding_dim)  # (n, longest, D)
        counts = (values > 0).view(lists.shape[:2]).sum(1, keepdim=True)
        return lists.sum(1) / counts.clamp(min=1)


def give_sparse_gradients(model: nn.Module) -> None:
    """Let the gradients of large tables, of items and of features, hold a batch's rows alone.

    For engine.optimizer.RowAdamW, and for batches that do not hold all items.
    """
    for module in model.modules():
        if isinstance(module, SparseEncoder | ArrayEncoder):
            module.sparse = module.num_embeddings > DENSE_ROWS
        elif isinstance(module, LocalEmbeddingModule):
            table = module.item_emb  # a shard's are sparse whatever its size
            is_whole = not isinstance(table, ShardedEmbedding)
            table.sparse = is_whole and table.num_embeddings > DENSE_ROWS


class ContinualEncoder(nn.Linear):
    """A number, standardised over all items (or users), times a learnt vector."""

    def __init__(self, hidden_units: int, size: int, mean: float, std: float):
        super().__init__(size, hidden_units, bias=False)
        self.mean, self.std = mean, std
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, values: Tensor) -> Tensor:
        """(n,) raw -> (n, D)."""
        return super().forward((values[:, None] - self.mean) / self.std)


class VectorEncoder(nn.Linear):
    """A projection of a fixed multimodal vector; `stand_in` for the items that have none."""

    def __init__(self, hidden_units: int, size: int, has_stand_in: bool, is_frozen: bool):
        """`is_frozen`: the projection stays the random one of the start."""
        super().__init__(size, hidden_units, bias=False)
        self.weight.requires_grad_(not is_frozen)
        nn.init.normal_(self.weight, std=INIT_STD)
        self.stand_in = nn.Parameter(torch.zeros(hidden_units)) if has_stand_in else None

    def forward(self, values: Tensor, present: Tensor) -> Tensor:
        """(n, W) zero where missing, (n,) bool -> (n, D)."""
        projected = super().forward(values.to(self.weight.dtype))
        if self.stand_in is None:
            return projected
        return torch.where(present[:, None], projected, self.stand_in)


# Feature kind -> encoder(hidden_units, size), for the last two with more of `encoder_arguments`. A
# kind of your own is one more entry here and one in files.features.PARSERS.
ENCODERS: dict[str, Callable[..., nn.Module]] = {"sparse": SparseEncoder, "array": ArrayEncoder}
ENCODERS |= {"continual": ContinualEncoder, "emb": VectorEncoder}


def encoder_arguments(
    feature: Any, missing_vector: str = "learnt", projection: str = "learnt"
) -> dict[str, Any]:
    """What a checkpoint stores of a files.feature_cache.Feature to build its encoder again.

    `missing_vector`: "learnt" or "zero", what stands for an absent multimodal vector. `projection`:
    "learnt" or "frozen", of multimodal vectors.
    """
    spec: dict[str, Any] = {"kind": feature.kind, "size": int(feature.size)}
    if feature.kind == "continual":
        values = feature.values[1:].astype(np.float64)
        spec |= {"mean": float(values.mean()), "std": float(values.std()) or 1.0}
    if feature.kind == "emb":
        is_complete = bool(feature.present[1:].all())
        spec["has_stand_in"] = missing_vector == "learnt" and not is_complete
        spec["is_frozen"] = projection == "frozen"
    return spec


def module_key(feature_id: str) -> str:
    """A name that nn.ModuleDict takes: no dots, and no clash with a method such as "type"."""
    return "feature_" + feature_id.replace("%", "%25").replace(".", "%2E")


class FeatureTables(nn.Module):
    """The static features of items (or users) as tensors that move with the model.

    They are data: no parameters, and not in the state dict. `features`: id ->
    files.feature_cache.Feature. `on_host`: vectors to leave where they are, in a memory map; a
    lookup copies its rows.
    """

    def __init__(self, features: Mapping[str, Any], on_host: Collection[str] = ()):
        super().__init__()
        self._host = {name: features[name] for name in on_host}
        self._longest = {
            name: int(np.diff(feature.offsets).max(initial=0))
            for name, feature in features.items()
            if feature.offsets is not None
        }
        for feature_id, feature in features.items():
            if feature_id in self._host:
                continue
            for field in ("values", "offsets", "present"):
                array = getattr(feature, field)
                tensor = None if array is None else torch.tensor(array)
                self.register_buffer(f"{module_key(feature_id)}_{field}", tensor, persistent=False)

    def lookup(self, feature_id: str, rows: Tensor) -> tuple[Tensor, ...]:
        """What the feature's encoder takes, for (n,) int64 rows.

        (values (n, ...),), or for vectors that may be missing (values (n, W), present (n,)), or for
        lists (flat values, offsets (n + 1,)), on a GPU with zeros up to the longest of all lists.
        """
        if feature_id in self._host:
            feature, host_rows = self._host[feature_id], rows.cpu().numpy()
            pair = feature.values[host_rows], feature.present[host_rows]
            return tuple(torch.from_numpy(array).to(rows.device) for array in pair)
        names = (f"{module_key(feature_id)}_{field}" for field in ("values", "offsets", "present"))
        values, offsets, present = (getattr(self, name) for name in names)
        if offsets is not None and values.device.type == "cpu":
            return gather_lists(values, offsets, rows)
        if offsets is not None:
            return pad_lists(values, offsets, rows, self._longest[feature_id])
        if present is not None:
            return values[rows], present[rows]
        return (values[rows],)


def gather_lists(values: Tensor, offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """values[offsets[i]:offsets[i + 1]] of all i in (n,) rows, joined; and where each begins."""
    lengths = offsets[rows + 1] - offsets[rows]
    bags = F.pad(lengths.cumsum(0), (1, 0))  # (n + 1,)
    shift = (offsets[rows] - bags[:-1]).repeat_interleave(lengths)
    return values[torch.arange(len(shift), device=rows.device) + shift], bags


def pad_lists(values: Tensor, offsets: Tensor, rows: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """As `gather_lists`, but with zeros after each list up to length `longest`.

    So the host knows the number of values, and does not wait for the device to count them.
    """
    starts, ends = offsets[rows, None], offsets[rows + 1, None]  # (n, 1)
    places = starts + torch.arange(longest, device=rows.device)  # (n, longest)
    padded = values[places.clamp(max=len(values) - 1)].masked_fill_(places >= ends, 0)
    return padded.flatten(), torch.arange(len(rows) + 1, device=rows.device) * longest


class LearnablePositionalEmbeddingInputFeaturesPreprocessor(nn.Module):
    """An event's input: item * sqrt(D) + position + action types + user, then dropout.

    Positions count from the oldest event kept. Reference input_features_preprocessors.py, class of
    the same name; action types and users are ours.
    """

    def __init__(
        self,
        maxlen: int,
        hidden_units: int,
        num_action_types: int,
        num_target_action_types: int,
        dropout_rate: float,
    ):
        """Action types of the event, or of the one to be predicted, are left out if there are 0."""
        super().__init__()
        self.scale = math.sqrt(hidden_units)
        self.pos_emb = nn.Embedding(maxlen, hidden_units)
        nn.init.normal_(self.pos_emb.weight, std=INIT_STD)
        sizes = num_action_types, num_target_action_types
        encoders = (SparseEncoder(hidden_units, size) if size else None for size in sizes)
        self.action_emb, self.target_action_emb = encoders
        self.dropout = Dropout(dropout_rate)

    def forward(
        self,
        items: Tensor,
        positions: Tensor,
        action_types: Tensor,
        target_action_types: Tensor,
        users: Tensor | None,
        position_order: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Inputs of the encoder, (T, D).

        `items`: (T, D) item tower outputs. `positions`: (T,) int64 in 0..N-1. `action_types`,
        `target_action_types`: (T,) int64, -1 unknown. `users`: (T, D) the users' vectors, or None.
        `position_order`: of `positions`, for `ops.rows.take_rows`.
        """
        by_position = take_rows(self.pos_emb.weight, positions, position_order)
        x = torch.add(by_position, items, alpha=self.scale)  # (T, D)
        if self.action_emb is not None:
            x = x + self.action_emb(action_types + 1)
        if self.target_action_emb is not None:
            x = x + self.target_action_emb(target_action_types + 1)
        if users is not None:
            x = x + users
        return self.dropout(x)


class MixPrevious(nn.Module):
    """Adds to an event's input learnt shares of the P inputs before it.

        y_t = x_t + w_1 * x_(t-1) + ... + w_P * x_(t-P)

    A causal convolution with a weight per distance and dimension, each 0 at first; nothing comes
    before a sequence's first event. Not in the paper; it helps short histories (docs/log.md).
    """

    def __init__(self, num_previous: int, hidden_units: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_previous, hidden_units))  # (P, D)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(T, D) -> (T, D); `positions`: (T,) int64, of each event in its sequence, from 0."""
        y = x
        for k, weight in enumerate(self.weights, 1):
            y = y + weight * x.roll(k, 0) * (positions >= k)[:, None]
        return y


class TimeHead(nn.Module):
    """In the place of a block's `qkv_proj`: W of equation 1, the last head's queries zero.

    So that head's A is SiLU(rab) / N: it weighs events by their time and position alone. Not in the
    paper; FuXi-Linear has such a channel of its own. docs/log.md says where it helps.
    """

    def __init__(self, projection: nn.Linear, num_heads: int, widths: Sequence[int]):
        """`widths`: dv, dv, dqk, dqk, of U, V, Q and K of a head, in the order of W's rows."""
        super().__init__()
        self.projection = projection
        mask = torch.ones(num_heads, sum(widths), 1)
        mask[-1, sum(widths[:2]) : sum(widths[:3])] = 0
        self.register_buffer("mask", mask.flatten(0, 1), persistent=False)  # (H * sum, 1)

    @property
    def weight(self) -> Tensor:
        return self.projection.weight * self.mask


class HistoryResidual(nn.Module):
    """Adds a history's items to its query, for logs in which users come back to what they had.

        q = x / |x| + 2 / sqrt(n) (v_1 + ... + v_n) + 2 v_n

    where v_j is the unit vector of the j-th of the n events so far. So a query is near the items of
    its history, above all the frequent and the newest ones, from the first training step on; HSTU
    alone hardly learns that where items are many and events few. Not in the paper; docs/log.md has
    what else was tried.
    """

    def forward(
        self, x: Tensor, items: Tensor, positions: Tensor, last_events: Tensor | None = None
    ) -> Tensor:
        """`x`, `items`: encoder and item tower outputs, (T, D). `positions`: (T,) int64 from 0.

        `last_events`: (B,) int64, the rows of which `x` is, if it is not of all.
        """
        v = F.normalize(items.float(), dim=1)
        event = torch.arange(len(items), device=items.device)
        first = event - positions  # (T,), of each event's sequence; rises
        order = event, torch.searchsorted(first, F.pad(event + 1, (1, 0)))
        # float64, or the sums over the events before a sequence would leave their error in it.
        sums = running_sums(v.double())  # (T, D)
        sums = (sums - take_rows(sums - v, first, order)).float()
        counts = positions[:, None] + 1  # n
        if last_events is not None:
            sums, counts, v = sums[last_events], counts[last_events], v[last_events]
        return F.normalize(x.float(), dim=1) + 2 * counts.rsqrt() * sums + 2 * v


def running_sums(x: Tensor) -> Tensor:
    """As x.cumsum(0), of (T, D), which on CUDA torch does not call deterministic."""
    blocks = F.pad(x, (0, 0, 0, -len(x) % SUM_BLOCK)).unflatten(0, (-1, SUM_BLOCK))
    within = x.new_ones(SUM_BLOCK, SUM_BLOCK).tril() @ blocks  # (blocks, SUM_BLOCK, D)
    before = x.new_ones(len(blocks), len(blocks)).tril(-1) @ within[:, -1]  # (blocks, D)
    return (within + before[:, None]).flatten(0, 1)[: len(x)]


class L2NormEmbeddingPostprocessor(nn.Module):
    """Unit vectors, so that a dot product is a cosine (reference class of the same name)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) float32, whatever the precision that computed x."""
        return _Normalise.apply(x.to(torch.promote_types(x.dtype, torch.float32)))


class _Normalise(torch.autograd.Function):
    """F.normalize with a third of the passes in the backward pass, 3 % of a step (docs/log.md).

    The gradient is that of vectors longer than L2_EPS.
    """

    @staticmethod
    def forward(ctx, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=L2_EPS)
        y = x / length
        ctx.save_for_backward(y, length)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, length = ctx.saved_tensors
        return (grad - y * (grad * y).sum(-1, keepdim=True)).div_(length)

"""HSTUModel: events and features to embeddings to InfoNCE. Letters as in simplified_hstu.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ops.attention
import ops.infonce
import ops.ranking
from dot_product_similarity import DotProductSimilarity
from hstu_components import (
    ENCODERS,
    FeatureTables,
    HistoryResidual,
    L2NormEmbeddingPostprocessor,
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
    LocalEmbeddingModule,
    MixPrevious,
    TimeHead,
    module_key,
)
from ops.last_events import block_of_last
from ops.rows import take_rows
from simplified_hstu import DEFINITION, HSTU, Attention

# Items embedded at once when a whole catalogue is: 16 MB of 1024-wide vectors. With 16 times as
# many a CPU embeds a third fewer per second: they have left its cache when they are projected.
CHUNK_ITEMS = 1 << 12


def infonce_loss(
    queries: Tensor,
    rows: Tensor,
    target_index: Tensor,
    negative_index: Tensor | None,
    negative_log_q: Tensor | None,
    temperature: float,
    loss_rows: Any = None,
) -> Tensor:
    """InfoNCE as it is defined; arguments as `HSTUModel.compute_infonce_loss`, rows of length 1.

    `loss_rows`: for a tuned form.
    """
    if negative_index is None:
        negative_index = torch.arange(len(rows), device=rows.device)
    weights = (target_index >= 0).to(queries.dtype)  # (T,)
    positives = target_index.clamp(min=0)
    positive = (queries * rows.index_select(0, positives)).sum(1) / temperature  # (T,)
    negative = queries @ rows.index_select(0, negative_index).T / temperature  # (T, M)
    if negative_log_q is not None:
        negative = negative - negative_log_q
    negative = negative.masked_fill(negative_index == positives[:, None], -torch.inf)
    losses = torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive  # (T,)
    return (losses * weights).sum() / weights.sum().clamp(min=1)


class Kernels(NamedTuple):
    """The functions that a model computes with: the definitions, or their tuned forms in ops/."""

    attention: Attention
    infonce_loss: Callable[..., Tensor]
    target_ranks: Callable[..., Tensor]
    top_k: Callable[..., tuple[Tensor, Tensor]]


_similarity = DotProductSimilarity()
_attention = Attention(ops.attention.prepare, ops.attention.gated_attention, block_of_last)
KERNELS = {
    "plain": Kernels(DEFINITION, infonce_loss, _similarity.target_ranks, _similarity.top_k),
    "torch": Kernels(
        _attention, ops.infonce.infonce_loss, ops.ranking.target_ranks, ops.ranking.top_k
    ),
}


def find_kernels(name: str) -> Kernels:
    """The forms of a key of KERNELS; or of "triton", tuned for CUDA, where Triton is installed."""
    if name != "triton":
        return KERNELS[name]
    tuned = importlib.import_module("ops.triton_attention")
    attention = Attention(tuned.prepare, tuned.gated_attention, block_of_last)
    return KERNELS["torch"]._replace(attention=attention)


@dataclass(frozen=True)
class HSTUConfig:
    """Everything that rebuilds the model, as checkpoints hold it; engine/flags.py has the defaults.

    `item_features` and `user_features`: feature id -> {"kind": str, "size": int, ...} where kind
    is a key of hstu_components.ENCODERS and the rest goes to the encoder (mean and std, say).
    """

    num_items: int
    num_action_types: int  # 0: inputs do not carry the action type
    num_target_action_types: int  # 0: nor that of the event to be predicted
    item_features: dict[str, dict[str, Any]]
    user_features: dict[str, dict[str, Any]]
    maxlen: int
    hidden_units: int
    num_blocks: int
    num_heads: int
    attention_dim: int
    linear_dim: int
    dropout_rate: float
    time_bias: str
    position_bias: bool
    infonce_temp: float
    item_ids_digest: str | None = None  # of the items that the rows stand for; None: not known
    action_names: list[str] | None = None  # of the action types; None: not known
    feature_digests: dict[str, str] | None = None  # of what features' numbers mean; None: not known
    removes_seen: bool = True  # rankings leave out what a user has seen; so its export does
    history_residual: bool = False  # the history's items are added to the query
    time_head: bool = False  # the last head attends by time and position alone
    mix_previous: int = 0  # an event's input has shares of so many before it
    id_dropout: float = 0.0  # share of id vectors left out in training, where items have features


class HSTUModel(nn.Module):
    """HSTU as a two-tower model: each event's output against the tower of each item.

    Args:
        config: shapes and switches.
        item_features: of each of config.item_features its files.feature_cache.Feature, rows 0..X;
            data, not weights.
        user_features: the same for users.
        on_host: item vectors that stay on the host; batches bring theirs in `item_vectors`.
        shards_items: each process has a part of the item table.
        kernels: "torch", "plain" or "triton", as `find_kernels`.
    """

    def __init__(
        self,
        config: HSTUConfig,
        item_features: Mapping[str, Any],
        user_features: Mapping[str, Any],
        on_host: Collection[str] = (),
        shards_items: bool = False,
        kernels: str = "torch",
    ):
        super().__init__()
        self.config, self.kernels = config, find_kernels(kernels)
        width = config.hidden_units
        self.embedding_module = LocalEmbeddingModule(config.num_items, width, shards_items)
        self.sparse_emb, self.emb_transform = nn.ModuleDict(), nn.ModuleDict()
        for feature_id, spec in (config.item_features | config.user_features).items():
            self._add_encoder(feature_id, **spec)
        self.item_tables = FeatureTables(item_features, on_host)
        self.user_tables = FeatureTables(user_features)
        action_types = config.num_action_types, config.num_target_action_types
        self.input_preprocessor = LearnablePositionalEmbeddingInputFeaturesPreprocessor(
            config.maxlen, width, *action_types, config.dropout_rate
        )
        mixed = config.mix_previous
        self.mix_previous = MixPrevious(mixed, width) if mixed else None
        self.hstu = HSTU(
            num_blocks=config.num_blocks,
            time_bias=config.time_bias,
            hidden_units=width,
            num_heads=config.num_heads,
            attention_dim=config.attention_dim,
            linear_dim=config.linear_dim,
            dropout_rate=config.dropout_rate,
            maxlen=config.maxlen,
            has_position_bias=config.position_bias,
            attention=self.kernels.attention,
        )
        if config.time_head:
            for block in self.hstu.blocks:
                block.qkv_proj = TimeHead(block.qkv_proj, config.num_heads, block.widths)
        self.history_residual = HistoryResidual() if config.history_residual else None
        self.output_postprocessor = L2NormEmbeddingPostprocessor()
        self.similarity = DotProductSimilarity()

    def _add_encoder(self, feature_id: str, kind: str, size: int, **statistics: Any) -> None:
        encoder = ENCODERS[kind](self.config.hidden_units, size, **statistics)
        modules = self.sparse_emb if kind in ("sparse", "array") else self.emb_transform
        modules[module_key(feature_id)] = encoder

    def _encoder(self, feature_id: str) -> nn.Module:
        key = module_key(feature_id)
        return self.sparse_emb[key] if key in self.sparse_emb else self.emb_transform[key]

    def forward(self, batch: Any) -> Tensor:
        """InfoNCE of predicting each event of the batch's sequences from those before it, scalar.

        `batch` is a dataset.Batch; so it is in `encode` and `predict`.
        """
        rows = self._rows(batch)  # (R, D)
        queries = self.encode(batch, rows)  # (T, D)
        return self._loss(batch, queries, rows, batch.target_index, batch.orders.get("loss"))

    def predict_with_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """`predict`, (B, D), and the InfoNCE of each sequence's last target, scalar."""
        rows = self._rows(batch)  # (R, D)
        queries = self.encode(batch, rows, only_last=True)  # (B, D)
        return queries, self._loss(batch, queries, rows, batch.target_index[batch.last_events()])

    def _rows(self, batch: Any) -> Tensor:
        vectors = batch.item_vectors
        return self.item_tower(batch.distinct_ids, vectors=vectors, are_distinct=True)  # (R, D)

    def _loss(
        self,
        batch: Any,
        queries: Tensor,
        rows: Tensor,
        target_index: Tensor,
        loss_rows: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        negatives = batch.negative_index, batch.negative_log_q
        return self.compute_infonce_loss(queries, rows, target_index, *negatives, loss_rows)

    def encode(self, batch: Any, rows: Tensor | None = None, only_last: bool = False) -> Tensor:
        """The query that follows each event: (T, D) float32 of length 1.

        `rows`: the item tower of batch.distinct_ids, if it is known already. `only_last`: of each
        sequence's last event alone, (B, D).
        """
        if rows is None:
            rows = self._rows(batch)  # (R, D)
        items = take_rows(rows, batch.item_index, batch.orders.get("items"))  # (T, D)
        actions, users = (batch.action_types, batch.target_action_types), self._users(batch)
        order = batch.orders.get("positions")
        x = self.input_preprocessor(items, batch.positions, *actions, users, order)  # (T, D)
        if self.mix_previous is not None:
            x = self.mix_previous(x, batch.positions)
        last = batch.last_events() if only_last else None
        x = self.hstu(x, batch.offsets, batch.timestamps, batch.target_timestamps, last)
        if self.history_residual is not None:
            x = self.history_residual(x, items, batch.positions, last)
        return self.output_postprocessor(x)  # (T, D), or (B, D)

    def _users(self, batch: Any) -> Tensor | None:
        if not self.config.user_features:
            return None
        ids = batch.user_ids
        users = self._encode_features(self.config.user_features, self.user_tables, ids, {})
        users = users * (ids > 0)[:, None]  # user 0 is unknown, not one of zeros
        return take_rows(users, batch.sequence_index, batch.orders.get("sequences"))  # (T, D)

    def predict(self, batch: Any) -> Tensor:
        """The query for each sequence's next event: (B, D) float32 of length 1."""
        return self.encode(batch, only_last=True)

    def item_tower(
        self,
        item_ids: Tensor,
        tables: FeatureTables | None = None,
        table_rows: Tensor | None = None,
        vectors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        are_distinct: bool = False,
    ) -> Tensor:
        """(n, D): id embedding plus every item feature, each at width D.

        Args:
            item_ids: (n,) int64 in 0..X; 0 is an item without a learnt vector.
            tables, table_rows: where the features are, if not in the catalogue's row `item_ids`:
                the tables of a candidate set, and rows of them, (n,) int64.
            vectors: feature id -> (n, W) and (n,) bool as VectorEncoder takes them, instead of a
                lookup.
            are_distinct: the ids rise, and none is 0, as in a batch's `distinct_ids`.
        """
        tables, rows = tables or self.item_tables, item_ids if table_rows is None else table_rows
        x = self.embedding_module(item_ids, are_distinct)  # (n, D)
        if not self.config.item_features:
            return x
        features = self._encode_features(self.config.item_features, tables, rows, vectors or {})
        if self.training and self.config.id_dropout:  # unscaled: a vector is left out as a whole
            is_left_out = torch.rand(len(x), 1, device=x.device) < self.config.id_dropout
            # Of an item without features nothing would be left.
            x = x.masked_fill(is_left_out & features.detach().any(1, keepdim=True), 0)
        return x + features

    def _encode_features(
        self, specs: Mapping, tables: FeatureTables, rows: Tensor, given: Mapping[str, tuple]
    ) -> Tensor:
        # Sorted: a checkpoint forgets the order of a config, and a sum's last bits depend on it.
        arguments = {name: given.get(name) or tables.lookup(name, rows) for name in sorted(specs)}
        encoded = (self._encoder(name)(*values) for name, values in arguments.items())
        return reduce(torch.add, encoded)  # (n, D); sum() would begin with a pass that adds 0

    def item_embeddings(self, item_ids: Tensor) -> Tensor:
        """(n, D) float32 of length 1, to compare with queries."""
        return torch.cat(list(self.item_embedding_chunks(item_ids)))

    def item_embedding_chunks(
        self,
        item_ids: Tensor,
        tables: FeatureTables | None = None,
        table_rows: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """As `item_embeddings`, (c, D) at a time in order; arguments as `item_tower`."""
        table_rows = item_ids if table_rows is None else table_rows
        chunks = zip(item_ids.split(CHUNK_ITEMS), table_rows.split(CHUNK_ITEMS), strict=True)
        for ids, rows in chunks:
            yield self.output_postprocessor(self.item_tower(ids, tables, rows))

    def compute_infonce_loss(
        self,
        queries: Tensor,
        rows: Tensor,
        target_index: Tensor,
        negative_index: Tensor | None,
        negative_log_q: Tensor | None = None,
        loss_rows: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Mean of -log(e^pos / (e^pos + sum of e^neg)), logits are cosines / temperature; scalar.

        Args:
            queries: (T, D) float32 of length 1.
            rows: (R, D) item tower outputs of distinct items.
            target_index: (T,) int64 rows of the positives; -1 has no target and counts nothing.
            negative_index: (M,) int64 distinct rows shared by all queries; a query's own positive
                among them is left out. None: all rows.
            negative_log_q: (M,) float32 subtracted from the negatives' logits, or None.
            loss_rows: the fields of ops.infonce.LossRows of these indices, if they are known.

        Float32 under autocast too, and zero where no event has a target.
        """
        with torch.autocast(queries.device.type, enabled=False):
            rows = self.output_postprocessor(rows)
            indices = target_index, negative_index, negative_log_q
            options = self.config.infonce_temp, loss_rows
            return self.kernels.infonce_loss(queries, rows, *indices, *options)

"""HSTUModel: events and features to embeddings to InfoNCE. Letters as in simplified_hstu.py."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dot_product_similarity import DotProductSimilarity
from hstu_components import (
    ENCODERS,
    FeatureTables,
    L2NormEmbeddingPostprocessor,
    LearnablePositionalEmbeddingInputFeaturesPreprocessor,
    LocalEmbeddingModule,
    module_key,
)
from simplified_hstu import HSTU

# Logits held at once, in floats: on the CPU 4 MB a thread, so that the passes over a chunk stay in
# the cache; on a GPU 256 MB in few kernels.
THREAD_LOGITS = 1 << 20
GPU_LOGITS = 1 << 26
# Least queries of a thread in a chunk; with fewer, threads share them as BLAS likes.
LANE_QUERIES = 64
# e to a logit up to this does not overflow, nor does a sum of millions. A cosine is at most 1, so
# only temperatures below 1 / 60 need their largest logit taken off first.
SAFE_LOGIT = 60.0
# The loss counts logits in bits: on the CPU 2^x takes half as long as e^x.
LN_2 = math.log(2)
# Matrix products are fastest with rows that begin at a multiple of 64 bytes.
COLUMN_STEP = 16
# Items embedded at once when a whole catalogue is: 16 MB of 1024-wide vectors. With 16 times as
# many a CPU embeds a third fewer per second: they have left its cache when they are projected.
CHUNK_ITEMS = 1 << 12


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


class HSTUModel(nn.Module):
    """HSTU as a two-tower model: the last event's output against the tower of each item.

    Args:
        config: shapes and switches.
        item_features: feature id -> features.Feature, rows 0..X, for each of
            config.item_features; data, not weights.
        user_features: the same for users.
        on_host: item vectors that stay on the host; batches bring theirs in `item_vectors`.
        shards_items: each rank holds a part of the item table.
    """

    def __init__(
        self,
        config: HSTUConfig,
        item_features: Mapping[str, Any],
        user_features: Mapping[str, Any],
        on_host: Collection[str] = (),
        shards_items: bool = False,
    ):
        super().__init__()
        self.config = config
        width = config.hidden_units
        self.embedding_module = LocalEmbeddingModule(config.num_items, width, shards_items)
        self.sparse_emb, self.emb_transform = nn.ModuleDict(), nn.ModuleDict()
        for feature_id, spec in (config.item_features | config.user_features).items():
            self._add_encoder(feature_id, **spec)
        self.item_tables = FeatureTables(item_features, on_host)
        self.user_tables = FeatureTables(user_features)
        self.input_preprocessor = LearnablePositionalEmbeddingInputFeaturesPreprocessor(
            config.maxlen,
            width,
            config.num_action_types,
            config.num_target_action_types,
            config.dropout_rate,
        )
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
        )
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
        return self._loss(batch, queries, rows, batch.target_index)

    def predict_with_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """`predict`, (B, D), and the InfoNCE of each sequence's last target, scalar."""
        rows = self._rows(batch)  # (R, D)
        last = batch.last_events()
        queries = self.encode(batch, rows)[last]  # (B, D)
        return queries, self._loss(batch, queries, rows, batch.target_index[last])

    def _rows(self, batch: Any) -> Tensor:
        return self.item_tower(batch.distinct_ids, vectors=batch.item_vectors)  # (R, D)

    def _loss(self, batch: Any, queries: Tensor, rows: Tensor, target_index: Tensor) -> Tensor:
        return self.compute_infonce_loss(
            queries, rows, target_index, batch.negative_index, batch.negative_log_q
        )

    def encode(self, batch: Any, rows: Tensor | None = None) -> Tensor:
        """The query that follows each event: (T, D) float32 of length 1.

        `rows`: the item tower of batch.distinct_ids, if it is known already.
        """
        if rows is None:
            rows = self._rows(batch)  # (R, D)
        lengths = batch.offsets.diff()
        starts = batch.offsets[:-1].repeat_interleave(lengths)
        positions = (torch.arange(len(starts)) - starts).to(rows.device, non_blocking=True)
        # Not rows[...]: its gradient is summed by several threads in any order.
        x = rows.index_select(0, batch.item_index)  # (T, D)
        users = self._users(batch.user_ids, lengths)
        actions = batch.action_types, batch.target_action_types
        x = self.input_preprocessor(x, positions, *actions, users)  # (T, D)
        x = self.hstu(x, batch.offsets, batch.timestamps, batch.target_timestamps)  # (T, D)
        return self.output_postprocessor(x)  # (T, D)

    def _users(self, user_ids: Tensor, lengths: Tensor) -> Tensor | None:
        if not self.config.user_features:
            return None
        users = self._encode_features(self.config.user_features, self.user_tables, user_ids, {})
        users = users * (user_ids > 0)[:, None]  # of user 0 nothing is known, not numbers of 0
        return users.repeat_interleave(  # (T, D)
            lengths.to(users.device), dim=0, output_size=int(lengths.sum())
        )

    def predict(self, batch: Any) -> Tensor:
        """The query for each sequence's next event: (B, D) float32 of length 1."""
        return self.encode(batch)[batch.last_events()]

    def item_tower(
        self,
        item_ids: Tensor,
        tables: FeatureTables | None = None,
        table_rows: Tensor | None = None,
        vectors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """(n, D): id embedding plus every item feature, each at width D.

        Args:
            item_ids: (n,) int64 in 0..X; 0 is an item without a learnt vector.
            tables, table_rows: where the features are, if not in the catalogue's row `item_ids`:
                the tables of a candidate set, and rows of them, (n,) int64.
            vectors: feature id -> (n, W) and (n,) bool as VectorEncoder takes them, instead of a
                lookup.
        """
        tables, rows = tables or self.item_tables, item_ids if table_rows is None else table_rows
        x = self.embedding_module(item_ids)  # (n, D)
        if not self.config.item_features:
            return x
        return x + self._encode_features(self.config.item_features, tables, rows, vectors or {})

    def _encode_features(
        self, specs: Mapping, tables: FeatureTables, rows: Tensor, given: Mapping[str, tuple]
    ) -> Tensor:
        # Sorted: a checkpoint forgets the order of a config, and a sum's last bits depend on it.
        arguments = {name: given.get(name) or tables.lookup(name, rows) for name in sorted(specs)}
        encoded = (self._encoder(name)(*values) for name, values in arguments.items())
        return reduce(torch.add, encoded)  # (n, D); sum() would begin with a pass that adds 0

    def item_embeddings(
        self,
        item_ids: Tensor,
        tables: FeatureTables | None = None,
        table_rows: Tensor | None = None,
    ) -> Tensor:
        """(n, D) float32 of length 1, to compare with queries; arguments as `item_tower`."""
        return torch.cat(list(self.item_embedding_chunks(item_ids, tables, table_rows)))

    def item_embedding_chunks(
        self,
        item_ids: Tensor,
        tables: FeatureTables | None = None,
        table_rows: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The rows of `item_embeddings` in order, (c, D) at a time, for those who keep none."""
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
    ) -> Tensor:
        """Mean of -log(e^pos / (e^pos + sum of e^neg)), logits are cosines / temperature; scalar.

        Args:
            queries: (T, D) float32 of length 1.
            rows: (R, D) item tower outputs of distinct items.
            target_index: (T,) int64 rows of the positives; -1 has no target and counts nothing.
            negative_index: (M,) int64 distinct rows shared by all queries; a query's own positive
                among them is left out. None: all rows.
            negative_log_q: (M,) float32 subtracted from the negatives' logits, or None.

        Float32 under autocast too, and zero where no event has a target.
        """
        with torch.autocast(queries.device.type, enabled=False):
            rows = self.output_postprocessor(rows)
            return InfoNCE.apply(
                queries,
                rows,
                target_index,
                negative_index,
                negative_log_q,
                self.config.infonce_temp,
                torch.is_grad_enabled(),
            )


class InfoNCE(torch.autograd.Function):
    """The loss and its gradients in one walk over chunks of queries.

    No more than a chunk's logits ever exist. Gradients are computed on the way forward, because
    the loss is a scalar: the backward pass only scales them. The plain form stands in
    tests/test_model.py.
    """

    @staticmethod
    def forward(ctx, queries, rows, target_index, negative_index, log_q, temperature, needs_grad):
        """As `compute_infonce_loss`, with queries and rows of length 1."""
        negatives = rows if negative_index is None else rows.index_select(0, negative_index)
        M = len(negatives)
        # A query's logits: M negatives, its positive, and nothing up to a multiple of 16 columns.
        width = -(-(M + 1) // COLUMN_STEP) * COLUMN_STEP
        negatives = F.pad(negatives, (0, 0, 0, width - M))  # (width, D)
        size, lanes = _chunk_shape(queries, width)
        num_queries = len(queries)
        gap = -num_queries % lanes  # filled with queries that have no target
        queries = F.pad(queries, (0, 0, 0, gap))
        target_index = F.pad(target_index, (0, gap), value=-1)
        has_target, positives = target_index >= 0, target_index.clamp(min=0)
        weights = has_target.to(queries.dtype)
        weights /= weights.sum().clamp(min=1)  # (T,), each query's share of the mean
        own_column = positives  # (T,)
        if negative_index is not None:
            own_column = _column_of_each_row(rows, negative_index)[positives]
        q, positive = queries / (temperature * LN_2), rows.index_select(0, positives)  # (T, D)
        positive_logit = (q * positive).sum(1)  # (T,), in bits as all logits
        log_q = None if log_q is None else log_q / LN_2
        is_safe = 1 / temperature <= SAFE_LOGIT
        peak, total = torch.zeros_like(positive_logit), torch.empty_like(positive_logit)
        query_grad = torch.empty_like(queries)
        negative_grad = negatives.new_zeros(lanes, *negatives.shape)  # each lane's part of the sum
        negatives = negatives.expand(lanes, -1, -1)
        by_lane = partial(Tensor.unflatten, dim=0, sizes=(lanes, -1))  # (c, .) -> (lanes, c', .)
        buffer = queries.new_empty(min(size, len(queries)), width)
        for start in range(0, len(queries), size):
            part = slice(start, start + size)
            logits = buffer[: len(q[part])]  # (c, width)
            torch.bmm(by_lane(q[part]), negatives.mT, out=by_lane(logits))
            if log_q is not None:
                logits[:, :M] -= log_q
            logits[:, M:] = -torch.inf
            logits.scatter_(1, own_column[part, None], -torch.inf)
            logits[:, M] = positive_logit[part]
            if not is_safe:
                torch.amax(logits, 1, out=peak[part])
                logits -= peak[part, None]
            exps = logits.exp2_()
            torch.sum(exps, 1, out=total[part])
            if needs_grad:
                torch.bmm(by_lane(exps), negatives, out=by_lane(query_grad[part]))
                shares = q[part] * (weights[part] / total[part])[:, None]
                negative_grad.baddbmm_(by_lane(exps).mT, by_lane(shares))
        loss = weights @ (total.log2() + peak - positive_logit)
        if not needs_grad:
            return loss.mul_(LN_2)
        scale = weights / total  # (T,), exps * scale: gradient of the logits
        of_positive = torch.exp2(positive_logit - peak) * scale - weights  # (T,)
        query_grad.mul_(scale[:, None]).addcmul_(of_positive[:, None], positive).div_(temperature)
        row_grad = torch.zeros_like(rows).index_add_(0, positives, of_positive[:, None] * q)
        negative_grad = negative_grad.sum(0)[:M]
        if negative_index is None:
            row_grad += negative_grad
        else:
            row_grad.index_add_(0, negative_index, negative_grad)
        ctx.save_for_backward(query_grad[:num_queries], row_grad.mul_(LN_2))
        return loss.mul_(LN_2)

    @staticmethod
    def backward(ctx, grad):
        query_grad, row_grad = ctx.saved_tensors
        return query_grad * grad, row_grad * grad, None, None, None, None, None


def _chunk_shape(queries: Tensor, width: int) -> tuple[int, int]:
    """Queries in a chunk of the loss, and lanes that they are cut into, as equal parts.

    On the CPU each thread has a lane: all its products are of the same queries, whose logits are in
    its own cache. BLAS shares a product out by itself, each one otherwise.
    """
    if queries.device.type != "cpu":
        return max(1, GPU_LOGITS // width), 1
    threads, size = torch.get_num_threads(), THREAD_LOGITS // width
    if min(size, len(queries) // threads) < LANE_QUERIES:
        return max(1, threads * THREAD_LOGITS // width), 1
    return threads * size, threads


def _column_of_each_row(rows: Tensor, negative_index: Tensor) -> Tensor:
    """(R,) int64: each row's column among the M negatives; M, one too many, if it is not there."""
    M = len(negative_index)
    columns = torch.full((len(rows),), M, device=rows.device)
    return columns.index_copy_(0, negative_index, torch.arange(M, device=rows.device))

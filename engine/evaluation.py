"""Ranks the whole catalogue for the targets of a split, in one process or in several."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from engine.metrics import ranking_metrics
from engine.signals import stop_signal
from engine.training_step import autocast
from model import HSTUModel
from ops.collectives import all_gather_rows
from ops.ranking import is_among
from ops.sharded_table import ShardedEmbedding, keep_own_items, sharded_target_ranks


class Ranking(NamedTuple):
    """Where the targets of a split's S sequences stand among all items, in the loader's order.

    Of several processes: those of the main process first, then of process 1, and so on.
    """

    ranks: Tensor  # (S,) int64 in 1..X, 1 is best; MISS: the target was left out
    target_ids: Tensor  # (S,) int64 in 1..X
    num_seen: Tensor  # (S,) int64, events of the whole history
    is_repeat: Tensor  # (S,) bool, the target is an item of that history
    target_actions: Tensor  # (S,) int64 action type of the target, -1 unknown
    target_cosines: Tensor  # (S,) float32 cosine of the query with its target
    other_cosines: Tensor  # (S,) float32, with another item, uniform (sharded: of the batch's)
    loss: float  # mean InfoNCE

    def metrics(self) -> dict[str, float]:
        return ranking_metrics(self.ranks) | {"loss": self.loss}

    def metrics_of(self, which: Tensor) -> dict[str, float]:
        """Of the targets where (S,) bool is True, and their number; empty if there are none."""
        ranks = self.ranks[which]
        return ranking_metrics(ranks) | {"targets": len(ranks)} if len(ranks) else {}


@torch.no_grad()
def evaluate(
    model: HSTUModel,
    loader: DataLoader,
    removes_seen: bool | None = None,
    precision: str = "fp32",
) -> Ranking:
    """Rank all items for every sequence's target; the model is in the same mode afterwards.

    Args:
        model: on its device.
        loader: batches of a split with targets, this process's share.
        removes_seen: leave the items of a history out of its ranking, where a target that is one
            of them is a miss; None: as in the model's training.
        precision: "fp32", "bf16" or "fp16", of the queries; items are always float32.

    Raises:
        Stopped: by a signal in a training, after a batch.
    """
    if removes_seen is None:
        removes_seen = model.config.removes_seen
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    item_ids = torch.arange(1, model.config.num_items + 1, device=device)
    chunks = model.item_embedding_chunks(item_ids)
    items = keep_own_items(chunks) if is_sharded(model) else torch.cat(list(chunks))
    parts, loss_sum = [], torch.zeros(1, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(0)  # not the global one: dropout draws from it
    for batch in loader:
        batch = batch.to(device)
        with autocast(device, precision):
            queries, loss = model.predict_with_loss(batch)
        ranked = _rank_targets(model, batch, queries, items, removes_seen, generator)
        target_ids, num_seen = batch.target_ids(), batch.seen_offsets.diff()
        is_repeat = is_among((batch.seen_ids, batch.seen_offsets), target_ids)
        actions = batch.target_action_types[batch.last_events()]
        parts.append((*ranked, target_ids, num_seen, is_repeat, actions))
        loss_sum += loss.double() * len(queries)
        stop_signal.check()
    model.train(was_training)
    columns = [all_gather_rows(torch.cat(column).cpu()) for column in zip(*parts, strict=True)]
    ranks, target_cosines, other_cosines, *of_targets = columns
    loss = all_gather_rows(loss_sum.cpu()).sum().item() / len(ranks)
    return Ranking(ranks, *of_targets, target_cosines, other_cosines, loss)


def is_sharded(model: HSTUModel) -> bool:
    return isinstance(model.embedding_module.item_emb, ShardedEmbedding)


def _rank_targets(
    model: HSTUModel,
    batch: Any,
    queries: Tensor,
    items: Tensor,
    removes_seen: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks and cosines of a batch's targets, and cosines of other items, (B,) each.

    `items`: (X, D), or where they are sharded this process's; other items are the batch's then.
    """
    target_ids = batch.target_ids()
    if not is_sharded(model):
        seen = (batch.seen_ids - 1, batch.seen_offsets) if removes_seen else None
        ranks = model.kernels.target_ranks(queries, items, target_ids - 1, seen)
        return ranks, *model.similarity.sample_scores(queries, items, target_ids - 1, generator)
    rows = model.item_embeddings(batch.distinct_ids)  # of the same items on all processes
    places = torch.searchsorted(batch.distinct_ids, target_ids)
    cosines = model.similarity.sample_scores(queries, rows, places, generator)
    seen = (batch.seen_ids, batch.seen_offsets) if removes_seen else None
    return sharded_target_ranks(queries, items, target_ids, cosines[0], seen), *cosines

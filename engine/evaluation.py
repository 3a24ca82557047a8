"""Ranks the whole catalogue for the targets of a split, on one rank or on several."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from engine.metrics import ranking_metrics
from engine.signals import stop_signals
from engine.training_step import Updater
from ops.collectives import gather_rows, num_ranks
from ops.ranking import is_among
from ops.sharded_table import keep_own_items, ranks_over_shards


class Ranking(NamedTuple):
    """Where the targets of a split's S sequences stand among all items, in the loader's order.

    Of several ranks one's sequences come behind another's.
    """

    ranks: Tensor  # (S,) int64 in 1..X, 1 is best
    target_ids: Tensor  # (S,) int64 in 1..X
    num_seen: Tensor  # (S,) int64, events of the whole history
    is_repeat: Tensor  # (S,) bool, the target is an item of that history
    of_targets: Tensor  # (S,) float32 cosine of the query with its target
    of_others: Tensor  # (S,) float32, with another item drawn uniformly (sharded: of the batch's)
    loss: float  # mean InfoNCE

    def metrics(self) -> dict[str, float]:
        return ranking_metrics(self.ranks) | {"loss": self.loss}

    def cold_metrics(self, item_counts: Tensor) -> dict[str, float]:
        """Of the targets that no training event has, and their number; empty if there are none.

        `item_counts`: (X + 1,), training events of each item.
        """
        return self._metrics_of(item_counts[self.target_ids] == 0)

    def repeat_metrics(self) -> dict[str, float]:
        """Of the targets that their users had before, and their number; empty if there are none."""
        return self._metrics_of(self.is_repeat)

    def _metrics_of(self, which: Tensor) -> dict[str, float]:
        ranks = self.ranks[which]
        return ranking_metrics(ranks) | {"targets": len(ranks)} if len(ranks) else {}


@torch.no_grad()
def evaluate(updater: Updater, loader: DataLoader, removes_seen: bool) -> Ranking:
    """Rank all items for every sequence's target.

    Args:
        updater: its model, as it is now; in training mode afterwards.
        loader: batches of a split with targets, this rank's share.
        removes_seen: leave the items of a history out of its ranking.

    Raises:
        DataError: the data changed.
        Stopped: by a signal.
    """
    loader.dataset.check_unchanged()
    model = updater.model.eval()
    check = updater.agree if num_ranks() > 1 else None  # of several ranks all stop or none
    item_ids = torch.arange(1, model.config.num_items + 1, device=updater.device)
    chunks = stop_signals.between(model.item_embedding_chunks(item_ids), check)
    items = keep_own_items(chunks) if updater.shards else torch.cat(list(chunks))
    parts, loss_sum = [], torch.zeros(1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)  # not the global one: dropout draws from it
    for batch in stop_signals.between(loader, check):
        batch = batch.to(updater.device)
        with updater.autocast():
            queries, loss = model.predict_with_loss(batch)
        ranked = _rank_targets(updater, batch, queries, items, removes_seen, generator)
        target_ids, num_seen = batch.target_ids(), batch.seen_offsets.diff()
        is_repeat = is_among((batch.seen_ids, batch.seen_offsets), target_ids)
        parts.append((*ranked, target_ids, num_seen, is_repeat))
        loss_sum += loss.item() * len(queries)
    model.train()
    columns = [gather_rows(torch.cat(column).cpu()) for column in zip(*parts, strict=True)]
    ranks, of_targets, of_others, target_ids, num_seen, is_repeat = columns
    loss = gather_rows(loss_sum).sum().item() / len(ranks)
    return Ranking(ranks, target_ids, num_seen, is_repeat, of_targets, of_others, loss)


def _rank_targets(
    updater: Updater,
    batch: Any,
    queries: Tensor,
    items: Tensor,
    removes_seen: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks and cosines of a batch's targets, and cosines of other items, (B,) each.

    `items`: (X, D), or where they are sharded this rank's; other items are the batch's then.
    """
    model, target_ids = updater.model, batch.target_ids()
    if not updater.shards:
        seen = (batch.seen_ids - 1, batch.seen_offsets) if removes_seen else None
        ranks = model.kernels.target_ranks(queries, items, target_ids - 1, seen)
        return ranks, *model.similarity.sample_scores(queries, items, target_ids - 1, generator)
    rows = model.item_embeddings(batch.distinct_ids)  # of the same items on all ranks
    places = torch.searchsorted(batch.distinct_ids, target_ids)
    seen = (batch.seen_ids, batch.seen_offsets) if removes_seen else None
    target_scores, other_scores = model.similarity.sample_scores(queries, rows, places, generator)
    ranks = ranks_over_shards(queries, items, target_ids, target_scores, seen)
    return ranks, target_scores, other_scores

"""The best items of users: of those in a split, or of all users that any split has events of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import Batch, MyDataset
from engine.run_log import progress_bar
from hstu_components import FeatureTables, gather_lists
from model import HSTUModel


class Catalogue(NamedTuple):
    """What is exported and ranked: all items, or a candidate set; n rows."""

    item_ids: Tensor  # (n,) int64, 0: not in the data
    tables: FeatureTables | None  # where the rows' features are; None: the model's own
    table_rows: Tensor  # (n,) int64
    ids: np.ndarray  # (n,) uint64, as they are exported
    id_kind: str  # "original", "re-id" or "retrieval"


class Best(NamedTuple):
    """What was found for some users."""

    user_ids: np.ndarray  # (b,) int64, as the batch has them
    queries: np.ndarray  # (b, D) float32 of length 1
    scores: np.ndarray  # (b, k) float32 cosines, best first; -inf: none left
    rows: np.ndarray  # (b, k) int64 rows of the catalogue; -1: none left


def recommend(
    model: HSTUModel,
    batches: Iterable[Batch],
    items: Tensor,
    item_ids: Tensor,
    top_k: int,
    removes_seen: bool,
    feature_users: Tensor | None = None,
) -> Iterator[Best]:
    """The top-k items of each batch's users; consume in `no_grad`.

    Args:
        batches: with the whole histories in `seen_ids`.
        items, item_ids: (n, D) float32 embeddings and (n,) int64 re-ids of the catalogue.
        removes_seen: leave out the items of a history.
        feature_users: (U + 1,) int64, by the user ids of the batches the user whose features the
            model gets, 0: nobody's; None: these users.
    """
    # The catalogue's rows ordered by item, and where each item's begin: candidates may share one.
    counts = torch.bincount(item_ids, minlength=model.config.num_items + 1)
    order, bounds, seen = item_ids.argsort(), F.pad(counts.cumsum(0), (1, 0)), None
    for batch in progress_bar(batches, desc="users"):
        batch = batch.to(items.device)
        users = batch.user_ids
        if feature_users is not None:
            batch = batch._replace(user_ids=feature_users[users])
        queries = model.predict(batch)  # (b, D)
        if removes_seen:
            seen_rows, offsets = gather_lists(order, bounds, batch.seen_ids)
            seen = seen_rows, offsets[batch.seen_offsets]
        top = model.kernels.top_k(queries, items, top_k, seen)
        yield Best(*(part.cpu().numpy() for part in (users, queries, *top)))


def newest_histories(
    data_dir: str | Path, targets: Mapping[str, str], *options: Any, **more: Any
) -> list[MyDataset]:
    """Of each user with events the sequence that ends last, or else is longest, of any split.

    All events are seen. `targets`: of the folder's splits. `options`: of MyDataset.
    """
    datasets = [
        MyDataset(data_dir, split, *options, whole_history=True, **more) for split in targets
    ]
    of = [ends_of(dataset) for dataset in datasets]
    splits = np.repeat(np.arange(len(of)), [len(users) for users, *_ in of])
    users, times, lengths = (np.concatenate(column) for column in zip(*of, strict=True))
    order = np.lexsort((splits, lengths, times, users))
    is_newest = np.ones(len(order), bool)
    is_newest[order[:-1][users[order][:-1] == users[order][1:]]] = False
    for number, dataset in enumerate(datasets):
        dataset.select(np.flatnonzero(is_newest[splits == number]))
    return [dataset for dataset in datasets if len(dataset)]


def ends_of(dataset: MyDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each sequence, seen as a whole: its user, its last event's time, its number of events."""
    events, offsets = dataset.sequences.events, dataset.sequences.offsets
    rows = np.flatnonzero(np.diff(offsets))
    is_known = dataset.sequences.has_times
    times = events["timestamp"][offsets[rows + 1] - 1] if is_known else np.zeros(len(rows))
    return dataset.user_ids, times, np.diff(offsets)[rows]

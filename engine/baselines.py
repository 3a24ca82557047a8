"""Rankings that need no model, by counts of the training's events: what a model has to beat.

Targets, items left out, ties and metrics are those of engine/evaluation.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from dot_product_similarity import MISS
from engine.metrics import ranking_metrics
from engine.run_log import summary
from files.sequences import BLOCK, EVENT_DTYPE, Split, gather_ranges, item_ids_of

log = logging.getLogger("hstu")

BASELINES = {
    "pop": "the most popular items",
    "recent": "the most popular items of the newest tenth of the training's events",
    "follow": "the items that followed the last one most often, then the most popular",
}
LAST_PART = 0.1  # of the training's events, for "recent"
SAMPLED_TIMES = 1 << 20  # of which its beginning is found
# Bounds of time and memory: training events whose transitions are counted, and (target, item)
# pairs that are compared. Beyond, every k-th sequence or target is taken.
MOST_EVENTS, MOST_PAIRS = 1 << 24, 1 << 26
CHUNK_PAIRS = 1 << 20  # compared at once


class Transitions(NamedTuple):
    """How often an item followed another; F pairs, ordered by the first, then the second."""

    keys: np.ndarray  # (F + 1,) int64: first * (X + 1) + second; the last is beyond all
    pairs: np.ndarray  # (F + 1, 2) int64: the second item, and how often
    offsets: np.ndarray  # (X + 2,) int64: item i is followed by offsets[i]:offsets[i + 1]

    def counts(self, firsts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """(n,) int64, how often each of `seconds` followed its one of `firsts`, (n,) each."""
        keys = firsts * (len(self.offsets) - 1) + seconds
        places = self.keys.searchsorted(keys)
        return np.where(self.keys[places] == keys, self.pairs[places, 1], 0)


class Queries(NamedTuple):
    """Some sequences of a split with a target each."""

    last_ids: np.ndarray  # (B,) int64, the newest item before the target
    target_ids: np.ndarray  # (B,) int64
    seen: tuple[np.ndarray, np.ndarray]  # (V,) int64 each: query and item to leave out, once each


def baseline_metrics(train: Split, split: Split, removes_seen: bool) -> dict[str, dict[str, float]]:
    """Of each of BASELINES the ranking metrics of a split's targets, and their number.

    `removes_seen`: as of `evaluate`. Without times there is no "recent"; without targets, none.

    Raises:
        DataError: an item id is out of range.
    """
    split.count_items()  # refuses an item id that is out of range
    popularity = train.count_items()
    transitions = count_transitions(train)
    nothing = tabulate(np.empty(0, np.int64), train.num_items)
    ways = {"pop": (popularity, nothing), "follow": (popularity, transitions)}
    recent = count_recent(train)
    if recent is not None:
        ways["recent"] = recent, nothing
    ranks = {name: [np.empty(0, np.int64)] for name in BASELINES if name in ways}
    for queries in read_queries(split, transitions, removes_seen):
        for name in ranks:
            ranks[name].append(target_ranks(queries, *ways[name]))
    found = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in ranks.items()}
    return {n: ranking_metrics(r) | {"targets": len(r)} for n, r in found.items() if len(r)}


def log_baselines(metrics: Mapping[str, Mapping[str, float]]) -> None:
    for name, values in metrics.items():
        log.info("  %-6s %s: %s", name, summary(values), BASELINES[name])


def count_recent(train: Split) -> np.ndarray | None:
    """(X + 1,) int64: how often each item occurs in the last part of the log; None without times.

    The part begins at a quantile of the times, so it holds all events of its first second.
    """
    if train.events.dtype != EVENT_DTYPE or not len(train.events):
        return None
    times = train.events["timestamp"]
    start = np.quantile(times[:: -(-len(times) // SAMPLED_TIMES)], 1 - LAST_PART)
    if start <= 0:
        return None
    counts = np.zeros(train.num_items + 1, np.int64)
    size = max(BLOCK, train.num_items)
    for first in range(0, len(times), size):
        events = train.events[first : first + size]
        counts += np.bincount(
            events["item_id"][events["timestamp"] >= start], minlength=len(counts)
        )
    return counts


def count_transitions(train: Split) -> Transitions:
    """Of neighbouring events in the sequences, or in every k-th of them where there are many."""
    step = -(-len(train.events) // MOST_EVENTS) or 1
    if step > 1:
        log.info("baselines: transitions are counted in every %d-th sequence", step)
    rows, keys = np.arange(len(train.offsets) - 1)[::step], []
    for some in np.array_split(rows, len(rows) // (BLOCK // 16) + 1):
        events, bounds = gather_ranges(train.events, train.offsets[some], train.offsets[some + 1])
        ids = item_ids_of(events).astype(np.int64)
        is_first = np.zeros(len(ids), bool)
        is_first[bounds[:-1][np.diff(bounds) > 0]] = True
        seconds = np.flatnonzero(~is_first)
        keys.append(ids[seconds - 1] * (train.num_items + 1) + ids[seconds])
    return tabulate(np.concatenate(keys), train.num_items)


def tabulate(keys: np.ndarray, num_items: int) -> Transitions:
    """Of pairs, (n,) int64 as `Transitions.keys`, as often as they occur."""
    keys, counts = np.unique(keys, return_counts=True)
    offsets = keys.searchsorted(np.arange(num_items + 2) * (num_items + 1))
    keys, counts = np.append(keys, 2**63 - 1), np.append(counts, 0)
    return Transitions(keys, np.stack([keys % (num_items + 1), counts], 1), offsets)


def read_queries(split: Split, transitions: Transitions, removes_seen: bool) -> Iterator[Queries]:
    """The split's sequences that have a target, so many at a time that memory is bounded."""
    starts, ends = split.offsets[:-1], split.offsets[1:]
    rows = np.flatnonzero(ends - starts > 1)
    last_ids = item_ids_of(split.events)[ends[rows] - 2].astype(np.int64)
    sizes = np.diff(transitions.offsets)[last_ids] + ends[rows] - starts[rows]
    step = -(-int(sizes.sum()) // MOST_PAIRS) or 1
    if step > 1:
        log.info("baselines: every %d-th of %d targets is ranked", step, len(rows))
    rows, last_ids, sizes = rows[::step], last_ids[::step], sizes[::step]
    cuts = np.flatnonzero(np.diff(sizes.cumsum() // CHUNK_PAIRS)) + 1
    for some, lasts in zip(np.split(rows, cuts), np.split(last_ids, cuts), strict=True):
        events, bounds = gather_ranges(split.events, starts[some], ends[some])
        ids = item_ids_of(events).astype(np.int64)
        targets, seen = ids[bounds[1:] - 1], np.empty(0, np.int64)
        if removes_seen:
            lines = np.repeat(np.arange(len(some)), np.diff(bounds))
            is_target = np.zeros(len(ids), bool)
            is_target[bounds[1:] - 1] = True
            seen = np.unique((lines * (split.num_items + 1) + ids)[~is_target])
        yield Queries(lasts, targets, np.divmod(seen, split.num_items + 1))


def target_ranks(queries: Queries, popularity: np.ndarray, transitions: Transitions) -> np.ndarray:
    """(B,) int64 rank of each target by its transitions from the last item, then by popularity.

    Ties count against the target, and one that is left out has the rank MISS, as in
    dot_product_similarity.py. `popularity`: (X + 1,) int64.
    """
    lasts, targets, (seen_lines, seen_ids) = queries
    own, own_follows = popularity[targets], transitions.counts(lasts, targets)  # (B,) each
    ranges = transitions.offsets[lasts], transitions.offsets[lasts + 1]
    pairs, bounds = gather_ranges(transitions.pairs, *ranges)
    followers, follows = pairs.T
    lines = np.repeat(np.arange(len(targets)), np.diff(bounds))

    def count(lines: np.ndarray, which: np.ndarray) -> np.ndarray:
        return np.bincount(lines[which], minlength=len(targets))

    def is_above(lines: np.ndarray, ids: np.ndarray, follows: np.ndarray) -> np.ndarray:
        """Whether items stand above a query's target, or tie with it; the target itself does."""
        is_tied = follows == own_follows[lines]
        return (follows > own_follows[lines]) | (is_tied & (popularity[ids] >= own[lines]))

    ranks = count(lines, is_above(lines, followers, follows))
    # Items that never followed the last one are above only targets that did not, either.
    others = len(popularity) - 1 - np.sort(popularity[1:]).searchsorted(own)
    others -= count(lines, popularity[followers] >= own[lines])
    ranks += np.where(own_follows == 0, others, 0)
    seen_follows = transitions.counts(lasts[seen_lines], seen_ids)
    ranks -= count(seen_lines, is_above(seen_lines, seen_ids, seen_follows))
    is_left_out = count(seen_lines, seen_ids == targets[seen_lines]) > 0
    return np.where(is_left_out, MISS, ranks)

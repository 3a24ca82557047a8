"""Sequences to batches: MyDataset, Batch, collate, sampler; save_emb and its reader."""

from __future__ import annotations

import logging
import math
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from files.atomic_io import DataError, atomic_write
from files.data_folder import (
    EVENT_DTYPE,
    USER_DTYPE,
    Sequences,
    as_records,
    check_split,
    gather,
    item_ids_of,
    open_split,
    read_manifest,
    split_path,
)

log = logging.getLogger("hstu")

_BLOCK = 1 << 16  # events looked at at once; 1 MB, which a cache holds
_SEQUENCES = 1 << 12  # whose events that are no targets are gathered at once
# A file up to this size is read whole when it is opened: a read for each sequence is half of a
# batch's time.
HELD_BYTES = 1 << 25
NEGATIVES = ("all", "batch", "uniform", "mixed")
EMB_DTYPES = {".fbin": np.dtype("<f4"), ".u64bin": np.dtype("<u8")}


class Draw(NamedTuple):
    """Which sequences make a batch, and the seed of its negatives; what a sampler yields."""

    indices: np.ndarray  # (B,) int64
    seed: tuple[int, ...]  # (seed, epoch, batch from 1)
    rank: int = 0  # which share of them a loader is to give
    num_ranks: int = 1


class Fetched(NamedTuple):
    """What MyDataset hands to its collate_fn."""

    sequences: Sequences  # of all ranks: their targets are negatives of each
    seen: Sequences | None  # whole histories without the target, for valid and test; own ones
    seed: tuple[int, ...]
    own: np.ndarray | None = None  # (B,) bool, True: one of this rank's sequences; None: all are


class Batch(NamedTuple):
    """A packed batch, sequences ordered by falling length. Letters as in simplified_hstu.py.

    Of several ranks each has its share of the sequences, which may be none, and all have the same
    distinct items and negatives, those of the whole batch.
    """

    distinct_ids: Tensor  # (R,) int64 in 1..X, rising: the items of the batch, each once
    item_index: Tensor  # (T,) int64, row of distinct_ids of the seen event
    target_index: Tensor  # (T,) int64, row of the event to be predicted; -1 none
    negative_index: Tensor | None  # (M,) int64, distinct rows; None: every row is a negative
    negative_log_q: Tensor | None  # (M,) float32 to subtract from the negatives' logits
    num_targets: Tensor  # () int64, on the CPU: of all ranks
    action_types: Tensor  # (T,) int64, -1 unknown
    timestamps: Tensor  # (T,) int64 seconds, 0 none
    target_action_types: Tensor  # (T,) int64, of the events to be predicted; -1 unknown
    target_timestamps: Tensor  # (T,) int64 seconds
    offsets: Tensor  # (B + 1,) int64, on the CPU: sequence b is rows offsets[b]:offsets[b + 1]
    user_ids: Tensor  # (B,) int64 in 1..num_users
    item_vectors: dict[str, tuple[Tensor, Tensor]] | None  # host vectors: (R, W) float32, (R,) bool
    seen_ids: Tensor | None  # (V,) int64, items of the whole histories; valid and test only
    seen_offsets: Tensor | None  # (B + 1,) int64 into seen_ids

    def to(self, device: torch.device | str) -> Batch:
        """Everything but what is said to stay on the device; asynchronous from pinned memory."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: tuple(map(move, pair)) for name, pair in value.items()}
            return None if value is None else value.to(device, non_blocking=True)

        stay = ("num_targets", "offsets")
        moved = {name: move(value) for name, value in self._asdict().items() if name not in stay}
        return self._replace(**moved)

    def last_events(self) -> Tensor:
        """(B,) int64, each sequence's last row."""
        return (self.offsets[1:] - 1).to(self.item_index.device)

    def target_ids(self) -> Tensor:
        """(B,) int64 in 1..X, the item of each sequence's last target."""
        return self.distinct_ids[self.target_index[self.last_events()]]


class MyDataset(Dataset):
    """Sequences of one split over memory-mapped files.

    Files open lazily in each process and never travel to a worker.

    Args:
        data_dir: a folder as docs/data_format.md describes it.
        split: "train", "valid" or "test".
        maxlen: events seen, N; the newest are kept.
        negatives: "all", "batch" (the batch's targets), "uniform", or "mixed" (both).
        num_negatives: distinct uniform ones per batch, for "uniform" and "mixed".
        item_counts: (X + 1,) how often each item occurs in training.
        target_counts: (X + 1,) how often it is a target there; given, an item that never is will
            not be a negative: it could only be pushed away, whatever its features say.
        has_logq: correct in-batch negatives for how often their items come (needs target_counts).
        holds_out: where a split's last events are its targets, keep them from the inputs; else they
            are seen, and what follows them is the target, which is unknown.
        request_time: Unix seconds of a query whose target is unknown; None: its last event's.
        request_action: action type of a target that is unknown; -1: unknown, too.
        host_vectors: feature id -> features.Feature of kind "emb" whose rows batches bring along.
        has_windows: of "train": a sequence with more events is cut into windows, each an index of
            its own, such that every event but the first is predicted once; else the newest alone.
        trust_pickle: of an indexer.pkl without a manifest, run whatever it holds.

    Raises:
        DataError: files are missing, or do not fit together; or there is no such action type.
        ValueError: no such `negatives`, or none of them.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        maxlen: int = 101,
        negatives: str = "all",
        num_negatives: int = 0,
        item_counts: np.ndarray | None = None,
        target_counts: np.ndarray | None = None,
        has_logq: bool = False,
        holds_out: bool = True,
        request_time: int | None = None,
        request_action: int = -1,
        host_vectors: Mapping[str, Any] | None = None,
        has_windows: bool = False,
        trust_pickle: bool = False,
    ):
        if negatives not in NEGATIVES or (negatives in ("uniform", "mixed") and num_negatives < 1):
            raise ValueError(f"negatives {negatives!r} with num_negatives {num_negatives}: no loss")
        self.data_dir, self.split, self.maxlen = Path(data_dir), split, maxlen
        self.negatives, self.num_negatives = negatives, num_negatives
        self.has_logq = has_logq
        self.request_time, self.request_action = request_time, request_action
        manifest = read_manifest(self.data_dir, trust=trust_pickle)
        self.num_items, self.num_users = manifest.num_items, manifest.num_users
        self.num_action_types = manifest.num_action_types
        if request_action >= self.num_action_types:
            raise DataError(
                f"--request_action {request_action}: the data has {self.num_action_types} action "
                "types, from 0"
            )
        self.host_vectors = dict(host_vectors or {})
        self.item_counts, self.target_counts = item_counts, target_counts
        self.trained_ids = np.arange(1, self.num_items + 1, dtype=np.int32)
        if target_counts is not None:
            self.trained_ids = np.flatnonzero(target_counts).astype(np.int32)
        if split not in manifest.targets:
            raise DataError(
                f"{self.data_dir}: no {split} split there, only {', '.join(manifest.targets)}"
            )
        self.target = manifest.targets[split] if holds_out else "none"
        self._maps: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None
        self._rows: dict[str, _Rows] = {}  # of the events, "", and of host_vectors
        events, offsets, users = self._open()
        self.has_timestamps = events.dtype == EVENT_DTYPE
        check_split(self.data_dir, split, offsets, users, self.num_users)
        self._stamps = self._read_stamps()
        warn_of_oddities(self.data_dir, split, events, offsets, users)
        shortest = 1 if self.target == "none" else 2
        is_usable = np.diff(offsets) >= shortest
        self._usable = None if is_usable.all() else np.flatnonzero(is_usable)
        if self._usable is not None:
            skipped = len(is_usable) - len(self._usable)
            log.warning(
                "%s: %d of %d sequences have fewer than %d events and are skipped, the first: %s",
                split, skipped, len(is_usable), shortest, _first(np.flatnonzero(~is_usable)),
            )  # fmt: skip
        self._windows = self._cut_windows(offsets) if has_windows and split == "train" else None
        if len(self):
            return
        if split == "train":
            raise DataError(
                f"{split_path(self.data_dir, split, 'data')}: no sequence has two events or more, "
                "so there is nothing to predict; write the split again"
            )
        log.warning("%s: no sequence to predict, so its results are left out", split)

    def _cut_windows(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(V,) sequence number of each window, and events behind its end; None: one a sequence."""
        rows = np.arange(len(offsets) - 1) if self._usable is None else self._usable
        counts = -(-(np.diff(offsets)[rows] - 1) // self.maxlen)
        if (counts == 1).all():
            return None
        firsts = np.repeat(counts.cumsum() - counts, counts)
        return np.repeat(rows, counts), self.maxlen * (np.arange(len(firsts)) - firsts)

    @property
    def is_cut(self) -> bool:
        """Whether an index is a window of a sequence, not a whole one."""
        return self._windows is not None

    def __len__(self) -> int:
        if self._windows is not None:
            return len(self._windows[0])
        if self._usable is not None:
            return len(self._usable)
        return len(self._open()[1]) - 1

    def indices_of(self, user_id: int) -> np.ndarray:
        """The user's sequences as `self[i]` takes them; none if they are too short."""
        _, offsets, users = self._open()
        owners = np.arange(1, len(offsets)) if users is None else users
        rows = self._usable if self._windows is None else self._windows[0]
        return np.flatnonzero((owners if rows is None else owners[rows]) == user_id)

    def __getitem__(self, index: int) -> Fetched:
        return self.__getitems__([index])

    def __getitems__(self, indices: Draw | Sequence[int]) -> Fetched:
        """The sequences `indices`, in one gather, ordered by falling length."""
        draw = indices if isinstance(indices, Draw) else Draw(np.asarray(indices), (0,))
        _, offsets, users = self._open()
        rows, num_behind = draw.indices, 0
        if self._windows is not None:
            rows, num_behind = (column[rows] for column in self._windows)
        elif self._usable is not None:
            rows = self._usable[rows]
        has_target = self.target != "none"
        ends = offsets[rows + 1] - num_behind
        starts = np.maximum(offsets[rows], ends - (self.maxlen + has_target))
        order = np.argsort(starts - ends, kind="stable")
        rows, starts, ends = rows[order], starts[order], ends[order]
        own = deal(len(rows), draw.rank, draw.num_ranks) if draw.num_ranks > 1 else None
        user_ids = (rows + 1 if users is None else users[rows]).astype(USER_DTYPE)
        kept = self._gather(starts, ends, user_ids)
        self._check(kept, rows, starts - offsets[rows])
        seen = None
        if self.split != "train":
            rows, user_ids = (rows, user_ids) if own is None else (rows[own], user_ids[own])
            seen = self._gather(offsets[rows], offsets[rows + 1] - has_target, user_ids)
            self._check(seen, rows, np.zeros_like(rows))
        return Fetched(kept, seen, draw.seed, own)

    def _gather(self, starts: np.ndarray, ends: np.ndarray, user_ids: np.ndarray) -> Sequences:
        events = self._rows[""].read(starts, ends)
        offsets = np.concatenate([[0], (ends - starts).cumsum()])
        return Sequences(as_records(events), offsets, user_ids)

    def collate_fn(self, fetched: Fetched | Sequence[Fetched]) -> Batch:
        """A Batch of what `__getitems__` returned, or of a list of `self[i]`."""
        if not isinstance(fetched, Fetched):
            fetched = _concatenate(fetched)
        sequences, seen, seed, own = fetched
        has_target = self.target != "none"
        lengths = np.diff(sequences.offsets) - has_target
        offsets = np.concatenate([[0], lengths.cumsum()])
        # Where each input, and the event after it, stands among the events.
        inputs = np.arange(offsets[-1]) + np.repeat(np.arange(len(lengths)) * has_target, lengths)
        last = offsets[1:] - 1
        nexts = inputs + 1
        if not has_target:
            nexts[last] = inputs[last]
        times = sequences.events["timestamp"].astype(np.int64)
        target_times = times[nexts]
        if not has_target and self.request_time is not None:
            target_times[last] = self.request_time
        has_next = np.full(len(inputs), self.split == "train")
        has_next[last] = has_target
        actions = sequences.events["action_type"].astype(np.int64)
        target_actions = actions[nexts]
        if not has_target:
            target_actions[last] = self.request_action
        items = self._index_items(sequences.events["item_id"], inputs, nexts, has_next, seed)
        arrays = items | {
            "action_types": actions[inputs],
            "timestamps": times[inputs],
            "target_action_types": target_actions,
            "target_timestamps": target_times,
            "offsets": offsets,
            "user_ids": sequences.user_ids.astype(np.int64),
        }
        if own is not None:
            arrays |= _share(arrays, own)
        arrays |= {
            "num_targets": np.asarray(has_next.sum()),
            "seen_ids": None if seen is None else seen.events["item_id"].astype(np.int64),
            "seen_offsets": None if seen is None else seen.offsets,
        }
        tensors = {k: None if v is None else torch.from_numpy(v) for k, v in arrays.items()}
        return Batch(**tensors, item_vectors=self._gather_vectors(items["distinct_ids"]))

    def _gather_vectors(self, item_ids: np.ndarray) -> dict[str, tuple[Tensor, Tensor]] | None:
        if not self.host_vectors:
            return None
        self._open()
        picked = {}
        for name, vectors in self.host_vectors.items():
            values = self._rows[name].read(item_ids, item_ids + 1)
            picked[name] = torch.from_numpy(values), torch.from_numpy(vectors.present[item_ids])
        return picked

    def _index_items(self, item_ids, inputs, nexts, has_next, seed) -> dict[str, np.ndarray | None]:
        """The item fields of Batch; draws the negatives."""
        if self.negatives == "all":
            distinct, event_rows = np.arange(1, self.num_items + 1), item_ids.astype(np.int64) - 1
            is_every = len(self.trained_ids) == self.num_items
            negative_index = None if is_every else self.trained_ids.astype(np.int64) - 1
        else:
            drawn = self._draw_uniform(seed)
            distinct, rows = np.unique(np.concatenate([item_ids, drawn]), return_inverse=True)
            event_rows, negative_index = np.split(rows, [len(item_ids)])
            if self.negatives != "uniform":
                is_negative = np.zeros(len(distinct), bool)
                is_negative[negative_index] = True
                is_negative[event_rows[nexts][has_next]] = True
                negative_index = np.flatnonzero(is_negative)
        target_index = np.where(has_next, event_rows[nexts], -1)
        log_q = None
        if self.has_logq and self.negatives in ("batch", "mixed"):
            log_q = self._log_q(distinct[negative_index], int(has_next.sum()))
        return {
            "distinct_ids": distinct.astype(np.int64),
            "item_index": event_rows[inputs],
            "target_index": target_index,
            "negative_index": negative_index,
            "negative_log_q": log_q,
        }

    def _draw_uniform(self, seed: tuple[int, ...]) -> np.ndarray:
        if self.negatives == "batch":
            return np.empty(0, np.int64)
        total = len(self.trained_ids)
        size, generator = min(self.num_negatives, total), np.random.default_rng(seed)
        return self.trained_ids[generator.choice(total, size, replace=False, shuffle=False)]

    def _log_q(self, item_ids: np.ndarray, num_targets: int) -> np.ndarray:
        """Log of how much likelier each negative was than one drawn uniformly, (M,) float32.

        An item is in the set if it is one of the batch's targets or among the uniform draws, so
        popular items come too often; with their logits lowered by this much, the sum over
        negatives estimates what the same number of uniform ones would give.
        """
        num_items = len(self.trained_ids)
        share = (self.target_counts[item_ids] + 1.0) / (self._total_count + num_items)
        uniform = 0 if self.negatives == "batch" else min(self.num_negatives, num_items)
        absent = np.exp(num_targets * np.log1p(-share)) * (1 - uniform / num_items)
        return np.log((1 - absent) / (len(item_ids) / num_items)).astype(np.float32)

    @cached_property
    def _total_count(self) -> int:
        """The sum of target_counts, taken once: there may be millions of items."""
        return int(self.target_counts.sum())

    def _open(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        if self._maps is None:
            events, offsets, users = open_split(self.data_dir, self.split)
            # In memory: a map of a file that is cut short ends the process.
            self._maps = events, np.array(offsets), None if users is None else np.array(users)
            tables = {"": self._maps[0]} | {k: v.values for k, v in self.host_vectors.items()}
            self._rows = {name: _Rows(table) for name, table in tables.items()}
        return self._maps

    def _read_stamps(self) -> dict[Path, tuple[int, int] | None]:
        """Size and time of change, in nanoseconds, of each file; None: not there."""
        paths = [split_path(self.data_dir, self.split, w) for w in ("data", "offsets", "users")]
        stats = {path: path.stat() if path.exists() else None for path in paths}
        return {path: stat and (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    def check_unchanged(self) -> None:
        """Refuse to go on over files that were written to.

        Raises:
            DataError: a file has another size or time of change than when it was opened.
        """
        for path, stamp in self._read_stamps().items():
            if stamp != self._stamps[path]:
                raise _changed(path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None, "_rows": {}}

    def _check(self, kept: Sequences, rows: np.ndarray, skipped: np.ndarray) -> None:
        """Refuse ids and action types out of range before they index anything.

        `rows`: (B,) sequence numbers; `skipped`: (B,) events cut off at each one's start.
        """
        # Each four times over: copied out of the records, they are read in a fraction of the time.
        ids, actions = (kept.events[name].copy() for name in ("item_id", "action_type"))
        bad_item = _first_outside(ids, 1, self.num_items)
        bad_action = _first_outside(actions, -1, self.num_action_types - 1)
        event = min(bad_item, bad_action)
        if event == len(ids):
            return
        b = int(np.searchsorted(kept.offsets, event, side="right")) - 1
        path = split_path(self.data_dir, self.split, "data")
        place = f"sequence {rows[b]} event {event - kept.offsets[b] + skipped[b]}"
        if event < bad_item:
            raise DataError(
                f"{path}: {place}: action type {actions[event]} is not in "
                f"-1..{self.num_action_types - 1}; write the split again"
            )
        raise _bad_item(path, place, ids[event], self.num_items)


def _first_outside(values: np.ndarray, low: int, high: int) -> int:
    """Place of the first value outside low..high; their number, if there is none."""
    # Where all is well two reductions are enough, a fraction of the time of three masks.
    if not len(values) or low <= values.min() <= values.max() <= high:
        return len(values)
    return int(((values < low) | (values > high)).argmax())


class _Rows:
    """Rows of an array; if it maps a file, they are read from there, or from a copy of a small one.

    Through the map a worker would come to own the file: each page it touches counts as its memory,
    with up to 2 MB around it. And a map of a file that is cut short ends the process.
    """

    def __init__(self, table: np.ndarray):
        self.table, self.file, self.held = table, None, table
        if not isinstance(table.base, mmap.mmap) or not table.flags.c_contiguous:
            return
        with suppress(FileNotFoundError):  # feature_cache.py drops a cache that it could not keep
            self.file = os.open(table.filename, os.O_RDONLY)
            weakref.finalize(self, os.close, self.file)
            is_small = table.nbytes <= HELD_BYTES
            self.held = self._read_file(np.array([0]), np.array([len(table)])) if is_small else None

    def read(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Rows starts[k]..ends[k]-1 of every k, joined.

        Raises:
            DataError: the file was cut short.
        """
        if self.held is None:
            return self._read_file(starts, ends)
        if self.file is not None:
            size = self.table.offset + self.table.nbytes
            if os.fstat(self.file).st_size < size:
                raise _changed(self.table.filename)
        lengths = ends - starts
        shifts = np.repeat(starts - (lengths.cumsum() - lengths), lengths)
        return self.held[np.arange(len(shifts)) + shifts]

    def _read_file(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        table, width = self.table, self.table.strides[0]
        places, sizes = table.offset + starts * width, (ends - starts) * width
        rows = np.empty(((ends - starts).sum(), *table.shape[1:]), table.dtype)
        target, filled = memoryview(rows.reshape(-1).view(np.uint8)), 0
        for place, size in zip(places.tolist(), sizes.tolist(), strict=True):
            filled += os.preadv(self.file, [target[filled : filled + size]], place)
        if filled < len(target):
            raise _changed(table.filename)
        return rows


def _changed(path: str | Path) -> DataError:
    return DataError(
        f"{path}: changed since this run opened it; write new data into a folder of their own, and "
        "start again"
    )


def _bad_item(path: Path, place: str, item_id: int, num_items: int) -> DataError:
    is_swapped = 1 <= item_id.byteswap() <= num_items
    hint = "; it looks big-endian" if is_swapped else " (0 is padding and never stored)"
    return DataError(
        f"{path}: {place}: item id {item_id} is not in 1..{num_items}{hint}; write the split again "
        "with dense item ids, little-endian"
    )


def warn_of_oddities(
    data_dir: Path, split: str, events: np.ndarray, offsets: np.ndarray, users: np.ndarray | None
) -> None:
    """Say, once each, what is legal and yet seldom meant: times that fall, users that come twice.

    One pass over the times, 0.2 s for 100 M events. The order stays that of the file: sorting here
    would change which event is the target, and the splits were cut by this order.
    """
    count, first = _falls(events, offsets) if events.dtype == EVENT_DTYPE else (0, [])
    if count:
        log.warning(
            "%s: events older than the one before: %d of %d, left where they are, the first: %s",
            split_path(data_dir, split, "data"), count, len(events),
            ", ".join(_place(offsets, event) for event in first),
        )  # fmt: skip
    counts = np.bincount(users) if users is not None else np.empty(0)
    if (counts > 1).any():
        repeated = np.flatnonzero(counts > 1)
        path = split_path(data_dir, split, "users")
        log.warning(
            "%s: users with several sequences: %d, the first: %s",
            path, len(repeated), _first(repeated),
        )  # fmt: skip


def _falls(events: np.ndarray, offsets: np.ndarray) -> tuple[int, list[int]]:
    """How many events are older than the one before them in their sequence, and the first three."""
    times, count, first = events["timestamp"], 0, []
    for start in range(1, len(events), _BLOCK):
        end = min(start + _BLOCK, len(events))
        is_fall = times[start:end] < times[start - 1 : end - 1]
        low, high = np.searchsorted(offsets, [start, end])
        is_fall[offsets[low:high] - start] = False  # a sequence's first event has none before it
        falls = np.flatnonzero(is_fall)
        count, first = count + len(falls), (first + (falls[:3] + start).tolist())[:3]
    return count, first


def _place(offsets: np.ndarray, event: int) -> str:
    k = int(np.searchsorted(offsets, event, side="right")) - 1
    return f"sequence {k} event {event - offsets[k]}"


def _first(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:3]))


def count_items(data_dir: str | Path, split: str, num_items: int) -> np.ndarray:
    """(X + 1,) int64: how often each item occurs in a split.

    Raises:
        DataError: an event's item id lies outside 1..num_items.
    """
    events, offsets, _ = open_split(Path(data_dir), split)
    # Half the time of np.add.at; int32, which no item's count leaves, since half the bytes stay in
    # the cache. bincount would make a block as long as the catalogue.
    counts = torch.zeros(num_items + 1, dtype=torch.int32)
    ones = torch.ones(_BLOCK, dtype=torch.int32)
    for start in range(0, len(events), _BLOCK):
        ids = np.ascontiguousarray(item_ids_of(events[start : start + _BLOCK]))
        event = _first_outside(ids, 1, num_items)
        if event < len(ids):
            path = split_path(Path(data_dir), split, "data")
            raise _bad_item(path, _place(offsets, start + event), ids[event], num_items)
        counts.scatter_add_(0, torch.from_numpy(ids.astype(np.int64)), ones[: len(ids)])
    return counts.numpy().astype(np.int64)


def count_targets(
    data_dir: str | Path, num_users: int, item_counts: np.ndarray, maxlen: int | None
) -> np.ndarray:
    """(X + 1,) int64: how often each item is a target in training, of its `item_counts` there.

    A sequence's first event is none, nor is one older than its newest `maxlen`, if that is given.

    Raises:
        DataError: the offsets or the users are wrong.
    """
    events, offsets, users = open_split(Path(data_dir), "train")
    check_split(Path(data_dir), "train", offsets, users, num_users)
    counts, starts, ends = item_counts.copy(), offsets[:-1], offsets[1:]
    firsts = starts + 1 if maxlen is None else np.maximum(starts + 1, ends - maxlen)
    firsts = np.minimum(firsts, ends)  # targets; there may be no events
    for k in range(0, len(starts), _SEQUENCES):
        some = slice(k, k + _SEQUENCES)
        others = gather(events, starts[some], firsts[some], None).events["item_id"]
        np.subtract.at(counts, others, 1)
    return counts


def deal(count: int, rank: int, num_ranks: int) -> np.ndarray:
    """(B,) bool: which of `count` sequences, ordered by length, are a rank's.

    Dealt there and back again, so that all ranks get about as many events.
    """
    lap, place = np.divmod(np.arange(count), num_ranks)
    return np.where(lap % 2, num_ranks - 1 - place, place) == rank


def _share(arrays: Mapping[str, np.ndarray], own: np.ndarray) -> dict[str, np.ndarray]:
    """What a batch holds per event and per sequence, of the sequences `own` alone."""
    lengths = np.diff(arrays["offsets"])
    events = np.repeat(own, lengths)
    names = ("item_index", "target_index", "action_types", "timestamps")
    names += ("target_action_types", "target_timestamps")
    share = {name: arrays[name][events] for name in names}
    share["offsets"] = np.concatenate([[0], lengths[own].cumsum()])
    return share | {"user_ids": arrays["user_ids"][own]}


def _concatenate(fetched: Sequence[Fetched]) -> Fetched:
    """Single sequences as one batch, ordered by falling length."""
    order = sorted(fetched, key=lambda one: -len(one.sequences.events))
    joined = [
        None if parts[0] is None else Sequences(
            np.concatenate([part.events for part in parts]),
            np.cumsum([0] + [len(part.events) for part in parts]),
            np.concatenate([part.user_ids for part in parts]),
        )
        for parts in ([one.sequences for one in order], [one.seen for one in order])
    ]  # fmt: skip
    return Fetched(*joined, seed=fetched[0].seed)


class BatchSampler(Sampler[Draw]):
    """Batches in an order that is a function of (seed, epoch), from any batch on.

    Args:
        num_sequences: how many there are.
        batch_size: sequences in a batch; the last batch may be smaller.
        seed: of order and negatives.
        is_shuffled: False keeps the order of the file.
        rank, num_ranks: batches are dealt to ranks; which batches there are does not depend on it.
    """

    def __init__(
        self,
        num_sequences: int,
        batch_size: int,
        seed: int,
        is_shuffled: bool,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.num_sequences, self.batch_size = num_sequences, batch_size
        self.seed, self.is_shuffled = seed, is_shuffled
        self.rank, self.num_ranks = rank, num_ranks
        self.epoch, self.first_batch = 0, 0

    def __iter__(self):
        order = np.arange(self.num_sequences)
        if self.is_shuffled:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        for batch in range(self.first_batch, self.num_batches):
            part = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            # From 1: numpy takes (seed, epoch) and (seed, epoch, 0) for one seed.
            yield Draw(part, (self.seed, self.epoch, batch + 1), self.rank, self.num_ranks)

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    @property
    def num_batches(self) -> int:
        return -(-self.num_sequences // self.batch_size)


# ------------------------------------------------------------------------------------- embeddings


def save_emb(emb: np.ndarray, save_path: str | Path) -> None:
    """Write a matrix as vector indexes read it: uint32 n, uint32 d, then the rows.

    Args:
        emb: (n, d) float for `*.fbin`; (n, d) or (n,) integers for `*.u64bin` (-1 is stored as
            2^64 - 1, int64's bits).
        save_path: ends in .fbin (float32) or .u64bin (uint64), all little-endian.

    Raises:
        DataError: a row is not finite: an index built on it would hang or be corrupt.
        ValueError: another suffix, or more than 2^31 - 1 rows or columns.
    """
    path = Path(save_path)
    with atomic_write(path, emb.nbytes) as file:
        file.writelines(emb_pieces(path, emb.shape, [emb]))


def emb_size(path: Path, shape: tuple[int, ...]) -> int:
    """Bytes of a file of that suffix with a matrix of that shape."""
    return 8 + math.prod(shape) * EMB_DTYPES[path.suffix].itemsize


def emb_pieces(
    path: Path, shape: tuple[int, ...], chunks: Iterable[np.ndarray]
) -> Iterator[bytes | memoryview]:
    """What `save_emb` writes to `path`, piece by piece: the header, then each chunk's bytes.

    Args:
        path: names the file in errors, which are those of `save_emb`, and its suffix the format.
        shape: (n, d) or (n,) of the matrix.
        chunks: its rows in order, (c, d) or (c,), any c.
    """
    if path.suffix not in EMB_DTYPES or len(shape) not in (1, 2) or max(shape) >= 2**31:
        raise ValueError(f"{path}: {shape} as {path.suffix!r} is no .fbin or .u64bin matrix")
    n, d = shape if len(shape) == 2 else (*shape, 1)
    yield np.array([n, d], "<u4").tobytes()
    row = 0
    for chunk in chunks:
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused below
            rows = np.ascontiguousarray(chunk, EMB_DTYPES[path.suffix]).reshape(len(chunk), d)
        if path.suffix == ".fbin" and not np.isfinite(rows).all():
            row += int(np.argmin(np.isfinite(rows).all(1)))
            raise DataError(f"{path}: row {row} is not finite; the model has diverged, lower --lr")
        yield rows.reshape(-1).data
        row += len(rows)
    assert row == n, f"{path}: {row} rows, but the header says {n}"


def load_emb(path: str | Path) -> np.ndarray:
    """(n, d) memory map of what `save_emb` wrote; `*.u64bin` as int64, so that -1 is -1 again.

    Raises:
        DataError: the size is not the one that the header says.
    """
    path = Path(path)
    dtype = EMB_DTYPES[path.suffix]
    header = np.fromfile(path, "<u4", 2)
    shape = tuple(int(size) for size in header)
    expected = emb_size(path, shape) if len(shape) == 2 else 8
    if path.stat().st_size != expected:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, but its header makes {expected}; "
            "the file is truncated, export again"
        )
    # Copy on write: torch warns of memory that it could not write to.
    matrix = np.memmap(path, dtype, "c", 8, shape) if all(shape) else np.empty(shape, dtype)
    return matrix.view("<i8") if path.suffix == ".u64bin" else matrix

"""The event sequences of a split on disk: opened, checked, gathered and counted.

docs/data_format.md describes every file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files.atomic_io import DataError

log = logging.getLogger("hstu")

EVENT_DTYPE = np.dtype([("item_id", "<i4"), ("action_type", "<i4"), ("timestamp", "<i8")])
OFFSET_DTYPE = np.dtype("<i8")
USER_DTYPE = np.dtype("<i4")
BLOCK = 1 << 16  # events read at once in a pass over all; 1 MB, which fits a cache


class Sequences(NamedTuple):
    """Events of some sequences laid end to end."""

    events: np.ndarray  # (E,) EVENT_DTYPE
    offsets: np.ndarray  # (B + 1,) int64: sequence b is events[offsets[b]:offsets[b + 1]]
    user_ids: np.ndarray  # (B,) int32 in 1..num_users


def gather_ranges(
    values: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """values[starts[k]:ends[k]] of every k, joined; and the (n + 1,) offsets of each among them."""
    lengths = ends - starts
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return np.asarray(values)[index], offsets


def gather(
    events: np.ndarray, starts: np.ndarray, ends: np.ndarray, user_ids: np.ndarray
) -> Sequences:
    """The events starts[b]..ends[b]-1 of each sequence."""
    picked, offsets = gather_ranges(events, starts, ends)
    return Sequences(as_records(picked), offsets, user_ids)


def as_records(events: np.ndarray) -> np.ndarray:
    """Records as they are; plain item ids as records without action and time."""
    if events.dtype == EVENT_DTYPE:
        return events
    records = np.zeros(len(events), EVENT_DTYPE)
    # A wider id stays out of range, and is refused, instead of wrapping to a valid one.
    records["item_id"], records["action_type"] = np.clip(events, -(2**31), 2**31 - 1), -1
    return records


def item_ids_of(events: np.ndarray) -> np.ndarray:
    return events["item_id"] if events.dtype == EVENT_DTYPE else events


# ------------------------------------------------------------------------------- opening and checks


def split_path(data_dir: Path, split: str, what: str) -> Path:
    return data_dir / f"{split}_{what}.bin"


def open_split(data_dir: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Events (EVENT_DTYPE or plain ids), offsets, and users or None, as memory maps.

    Raises:
        DataError: a file is missing, or sizes do not fit together.
    """
    offsets = map_file(split_path(data_dir, split, "offsets"), OFFSET_DTYPE)
    users_path = split_path(data_dir, split, "users")
    users = map_file(users_path, USER_DTYPE) if users_path.exists() else None
    path = split_path(data_dir, split, "data")
    num_events, data = int(offsets[-1]) if len(offsets) else 0, map_file(path, np.dtype("u1"))
    if not len(offsets) and not len(data) and split != "train":
        offsets = np.zeros(1, OFFSET_DTYPE)
    for dtype in (EVENT_DTYPE, np.dtype("<i4"), np.dtype("<i8")):
        if len(data) == num_events * dtype.itemsize:
            return data.view(dtype), offsets, users
    raise _bad(
        path,
        f"{len(data)} bytes, but {split}_offsets.bin describes {num_events} events, "
        f"{num_events * 16} bytes of records (or 4 or 8 bytes per plain item id). One of the two "
        "is truncated or from another run",
    )


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """A read-only memory map of a whole file."""
    if not path.is_file():
        raise _bad(path, "a folder" if path.is_dir() else "no such file")
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise _bad(path, f"{size} bytes is not a multiple of {dtype.itemsize}")
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


def check_split(
    data_dir: Path, split: str, offsets: np.ndarray, users: np.ndarray | None, num_users: int
) -> None:
    """Refuse offsets that do not start at 0 or fall, and users not one per sequence or unknown."""
    path, users_path = (split_path(data_dir, split, what) for what in ("offsets", "users"))
    if len(offsets) == 0 or offsets[0] != 0:
        found = "is empty" if len(offsets) == 0 else f"begins with {offsets[0]}"
        raise _bad(path, f"{found}, but the first offset is 0")
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if len(falls):
        before, k = falls[0], falls[0] + 1
        raise _bad(
            path, f"offset[{k}] = {offsets[k]} is below offset[{before}] = {offsets[before]}"
        )
    num_sequences = len(offsets) - 1
    if users is None and num_sequences > num_users:
        found = f"{num_sequences} sequences, but {num_users} users"
        raise _bad(path, f"{found}; name the user of each in {users_path.name}")
    if users is not None and len(users) != num_sequences:
        raise _bad(users_path, f"{len(users)} users, but {num_sequences} sequences")
    if users is not None and (k := first_outside(users, 1, num_users)) < len(users):
        raise _bad(users_path, f"sequence {k} has user {users[k]}, not in 1..{num_users}")


def _bad(path: Path, found: str) -> DataError:
    return DataError(f"{path}: {found}; write the split again")


def first_outside(values: np.ndarray, low: int, high: int) -> int:
    """Index of the first value not in low..high; len(values) if there is none."""
    if not len(values) or low <= values.min() <= values.max() <= high:
        return len(values)
    return int(((values < low) | (values > high)).argmax())


class Split:
    """The sequences of one split, opened and checked, to be read a batch at a time.

    Args:
        data_dir: a folder as docs/data_format.md describes it.
        name: "train", "valid" or "test".
        num_items, num_users, num_action_types: of the data, from its manifest.

    Raises:
        DataError: files are missing, or do not fit together.
    """

    def __init__(
        self, data_dir: Path, name: str, num_items: int, num_users: int, num_action_types: int
    ):
        self._arguments = data_dir, name, num_items, num_users, num_action_types
        self.data_dir, self.name = data_dir, name
        self.num_items, self.num_action_types = num_items, num_action_types
        self.events, self.offsets, self.users = open_split(data_dir, name)
        check_split(data_dir, name, self.offsets, self.users, num_users)
        self._stamps = self._read_stamps()

    def __reduce__(self) -> tuple:
        """Another process opens the files anew: no data travels to it."""
        return Split, self._arguments

    def read(self, rows: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Sequences:
        """The events starts[b]..ends[b]-1, which belong to sequence rows[b], of every b.

        Raises:
            DataError: an item id or an action type is out of range; before it indexes anything.
        """
        users = rows + 1 if self.users is None else self.users[rows]
        sequences = gather(self.events, starts, ends, users.astype(USER_DTYPE))
        # Contiguous copies of the two columns are checked in a fraction of the time.
        ids, actions = (sequences.events[name].copy() for name in ("item_id", "action_type"))
        highest = self.num_action_types - 1
        event = min(first_outside(ids, 1, self.num_items), first_outside(actions, -1, highest))
        if event == len(ids):
            return sequences
        b = int(np.searchsorted(sequences.offsets, event, side="right")) - 1
        place = starts[b] + event - sequences.offsets[b]
        if not 1 <= ids[event] <= self.num_items:
            raise self._bad_item(place, ids[event])
        raise _bad(
            self.path("data"),
            f"{self.place(place)}: action type {actions[event]} is not in -1..{highest}",
        )

    def _bad_item(self, event: int, item_id: int) -> DataError:
        found = f"{self.place(event)}: item id {item_id} is not in 1..{self.num_items}"
        return _bad(self.path("data"), f"{found} (0 is padding and never stored)")

    @property
    def has_times(self) -> bool:
        """Whether events are records, and not item ids alone."""
        return self.events.dtype == EVENT_DTYPE

    def path(self, what: str) -> Path:
        return split_path(self.data_dir, self.name, what)

    def place(self, event: int) -> str:
        """Where an event of the file is, for a message."""
        k = int(np.searchsorted(self.offsets, event, side="right")) - 1
        return f"sequence {k} event {event - self.offsets[k]}"

    def check_unchanged(self) -> None:
        """Refuse to go on over files that were written to.

        Raises:
            DataError: a file has another size or time of change than when it was opened.
        """
        for path, stamp in self._read_stamps().items():
            if stamp != self._stamps[path]:
                raise DataError(
                    f"{path}: changed since this run opened it; write new data into a folder of "
                    "their own, and start again"
                )

    def _read_stamps(self) -> dict[Path, tuple[int, int] | None]:
        """Size and time of change, in nanoseconds, of each file; None: not there."""
        paths = [self.path(what) for what in ("data", "offsets", "users")]
        stats = {path: path.stat() if path.exists() else None for path in paths}
        return {path: stat and (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    def warn_of_oddities(self) -> None:
        """Say what is legal and yet seldom meant: falling times, users that come twice.

        Events stay in the order of the file: sorting here would change which one is the target.
        """
        falls = self._falls() if self.has_times else []
        if len(falls):
            log.warning(
                "%s: events older than the one before: %d of %d, left where they are, the first: "
                "%s", self.path("data"), len(falls), len(self.events),
                ", ".join(map(self.place, falls[:3])),
            )  # fmt: skip
        counts = np.bincount(self.users) if self.users is not None else np.empty(0)
        if len(repeated := np.flatnonzero(counts > 1)):
            found = f"{len(repeated)}, the first: {', '.join(map(str, repeated[:3]))}"
            log.warning("%s: users with several sequences: %s", self.path("users"), found)

    def _falls(self) -> np.ndarray:
        """Events that are older than the one before in their sequence."""
        times, found = self.events["timestamp"], [np.empty(0, np.int64)]
        for start in range(1, len(times), BLOCK):
            end = min(start + BLOCK, len(times))
            is_fall = times[start:end] < times[start - 1 : end - 1]
            low, high = np.searchsorted(self.offsets, [start, end])
            is_fall[self.offsets[low:high] - start] = False  # a sequence's first has none before it
            found.append(np.flatnonzero(is_fall) + start)
        return np.concatenate(found)

    def count_items(self) -> np.ndarray:
        """(X + 1,) int64: how often each item occurs.

        Raises:
            DataError: an item id lies outside 1..num_items.
        """
        counts = np.zeros(self.num_items + 1, np.int64)
        size = max(BLOCK, self.num_items)  # as each block costs a pass over the counts
        for start in range(0, len(self.events), size):
            ids = np.ascontiguousarray(item_ids_of(self.events[start : start + size]))
            event = first_outside(ids, 1, self.num_items)
            if event < len(ids):
                raise self._bad_item(start + event, ids[event])
            counts += np.bincount(ids, minlength=len(counts))
        return counts

    def repeat_share(self) -> float:
        """Share of the sequences, of two events or more, whose last item is one of those before."""
        rows, num_repeats = np.flatnonzero(np.diff(self.offsets) > 1), 0
        for some in np.array_split(rows, len(rows) // (BLOCK // 16) + 1) if len(rows) else ():
            events, bounds = gather_ranges(self.events, self.offsets[some], self.offsets[some + 1])
            ids = item_ids_of(events)
            is_last_item = ids == np.repeat(ids[bounds[1:] - 1], np.diff(bounds))
            num_repeats += int((np.add.reduceat(is_last_item, bounds[:-1], dtype=int) > 1).sum())
        return num_repeats / max(1, len(rows))

    def places_of(self, action_types: Sequence[int]) -> np.ndarray:
        """Rising int64: where in the file events of these types are."""
        blocks = range(0, len(self.events), BLOCK)
        types = (self.events["action_type"][start : start + BLOCK] for start in blocks)
        found = [
            np.flatnonzero(np.isin(some, action_types)) + start
            for start, some in zip(blocks, types, strict=True)
        ]
        return np.concatenate(found or [np.empty(0, np.int64)])

    def count_targets(
        self,
        item_counts: np.ndarray,
        maxlen: int | None,
        action_types: Sequence[int] | None = None,
    ) -> np.ndarray:
        """(X + 1,) int64: how often each item is a training target, out of its `item_counts`.

        A sequence's first event is no target, nor is one older than its newest `maxlen` targets
        (None: all of them are), nor one of another type than `action_types` (None: all are).
        """
        starts, ends = self.offsets[:-1], self.offsets[1:]
        firsts = starts + 1 if maxlen is None else np.maximum(starts + 1, ends - maxlen)
        firsts = np.minimum(firsts, ends)  # of the targets; there may be no events
        if action_types is not None:
            places = self.places_of(action_types)
            places = places[places >= firsts[np.searchsorted(ends, places, "right")]]
            return np.bincount(item_ids_of(self.events[places]), minlength=len(item_counts))
        counts = item_counts.copy()
        for k in range(0, len(starts), BLOCK // 16):
            some = slice(k, k + BLOCK // 16)
            others, _ = gather_ranges(self.events, starts[some], firsts[some])
            np.subtract.at(counts, item_ids_of(others), 1)
        return counts


class SplitInMemory(Split):
    """Sequences that are in no file, to be read like those of one."""

    def __init__(self, sequences: Sequences, num_items: int, num_action_types: int):
        self.events, self.offsets, self.users = sequences
        self.num_items, self.num_action_types = num_items, num_action_types

    def path(self, what: str) -> Path:
        """As messages name them."""
        return Path("histories")


def last_two_of(
    action_types: np.ndarray, offsets: np.ndarray, wanted: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(S,) places of each sequence's last event of the wanted types, and of the one before.

    `action_types`: (E,) of all events. `offsets`: (S + 1,). -1: there is none.
    """
    places = np.flatnonzero(np.isin(action_types, wanted))
    rows = np.searchsorted(offsets, places, "right") - 1
    last, before = (np.full(len(offsets) - 1, -1) for _ in range(2))
    last[rows] = places  # of several places the last one stays
    is_earlier = places < last[rows]
    before[rows[is_earlier]] = places[is_earlier]
    return last, before


def order_of_rows(index: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Where `index`, (n,) in 0..num_rows-1, names each row: an order for ops.rows.take_rows.

    Int64: (n,) places in `index`, those of row 0 first; (num_rows + 1,) where each row's begin.
    """
    # numpy sorts 16 bits six times as fast.
    keys = index.astype(np.uint16) if num_rows <= 1 << 16 else index
    counts = np.bincount(index, minlength=num_rows)
    return np.argsort(keys, kind="stable"), np.concatenate([[0], counts.cumsum()])


def loss_rows(
    target_index: np.ndarray, negative_index: np.ndarray | None, num_rows: int
) -> tuple[np.ndarray, ...]:
    """The fields of ops.infonce.LossRows, as its `index_rows` has them, and the order.

    Arguments as Batch's fields of these names; `num_rows`: R.
    """
    negative_index = np.arange(num_rows) if negative_index is None else negative_index
    columns = np.full(num_rows, len(negative_index))
    columns[negative_index] = np.arange(len(negative_index))
    positives, has_target = np.maximum(target_index, 0), target_index >= 0
    weights = (has_target / max(1, has_target.sum())).astype(np.float32)
    index = np.concatenate([positives, negative_index])
    return index, columns[positives], weights, *order_of_rows(index, num_rows)


def event_places(offsets: np.ndarray) -> dict[str, np.ndarray]:
    """Batch's fields of these names: where each event of a packed batch is."""
    lengths = np.diff(offsets)
    return {
        "device_offsets": offsets,
        "positions": np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths),
        "sequence_index": np.repeat(np.arange(len(lengths)), lengths),
    }

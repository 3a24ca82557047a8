"""Sequences to batches: MyDataset, its negatives, Batch, BatchSampler.

Letters as in simplified_hstu.py. `PARSERS` is where a feature type is registered; `save_emb` and
`load_emb` write and read vectors.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from files.atomic_io import DataError
from files.data_folder import read_manifest
from files.embeddings import load_emb, save_emb  # noqa: F401
from files.features import PARSERS  # noqa: F401
from files.sequences import Sequences, Split, event_places, loss_rows, order_of_rows

log = logging.getLogger("hstu")

NEGATIVES = ("all", "batch", "uniform", "mixed")


class Draw(NamedTuple):
    """Which sequences make a batch, and the seed of its negatives; what a sampler yields."""

    indices: np.ndarray  # (B,) int64
    seed: tuple[int, ...]  # (seed, epoch, batch from 1)
    rank: int = 0  # of the process whose share the loader gives
    world_size: int = 1


class Fetched(NamedTuple):
    """What MyDataset hands to its collate_fn."""

    sequences: Sequences  # of all processes: their targets are negatives of each
    seen: Sequences | None  # whole histories without the target; None in training; own ones
    seed: tuple[int, ...]
    own: np.ndarray | None = None  # (B,) bool, True: a sequence of this process; None: all are


class Batch(NamedTuple):
    """A packed batch, sequences ordered by falling length.

    Of several processes each has its share of the sequences, which may be none, and all have the
    same distinct items and negatives, those of the whole batch.
    """

    distinct_ids: Tensor  # (R,) int64 in 1..X, rising: the items of the batch, each once
    item_index: Tensor  # (T,) int64, row of distinct_ids of the input event
    target_index: Tensor  # (T,) int64, row of the event to be predicted; -1 none
    negative_index: Tensor | None  # (M,) int64, distinct rows; None: every row is a negative
    negative_log_q: Tensor | None  # (M,) float32 to subtract from the negatives' logits
    num_targets: Tensor  # () int64, on the CPU: of all processes
    action_types: Tensor  # (T,) int64, -1 unknown
    timestamps: Tensor  # (T,) int64 seconds, 0 none
    target_action_types: Tensor  # (T,) int64, of the events to be predicted; -1 unknown
    target_timestamps: Tensor  # (T,) int64 seconds
    offsets: Tensor  # (B + 1,) int64, on the CPU: sequence b is rows offsets[b]:offsets[b + 1]
    device_offsets: Tensor  # the same, where the other fields are
    positions: Tensor  # (T,) int64 in 0..N-1, of each event in its sequence
    sequence_index: Tensor  # (T,) int64 in 0..B-1, the sequence of each event
    user_ids: Tensor  # (B,) int64 in 0..num_users; 0: unknown
    item_vectors: dict[str, tuple[Tensor, Tensor]]  # host vectors: (R, W) float32, (R,) bool
    seen_ids: Tensor | None  # (V,) int64, items of the whole histories; None in training
    seen_offsets: Tensor | None  # (B + 1,) int64 into seen_ids
    # Of training only: the order in which gradients are summed, (places, bounds) as ops.rows wants
    # it, of "items" (by item_index), "positions" and "sequences"; and of "loss" the fields of
    # ops.infonce.LossRows. Whoever replaces an index empties it: {} is right as well, but slower.
    orders: dict[str, tuple[Tensor, ...]]

    def to(self, device: torch.device | str) -> Batch:
        """On `device`, but for the fields on the CPU; asynchronous from pinned memory.

        Fields that share their memory, as after `pin_memory`, are copied in one piece.
        """
        copies: dict[tuple[int, torch.dtype], Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            key = storage.data_ptr(), tensor.dtype
            if key not in copies:
                copies[key] = tensor.new_empty(0).set_(storage).to(device, non_blocking=True)
            return copies[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

        if self.item_index.device == torch.device(device):
            return self
        moved = self._replace(num_targets=None, offsets=None)._map(move)
        return moved._replace(num_targets=self.num_targets, offsets=self.offsets)

    def pin_memory(self) -> Batch:
        """In pinned memory, the fields of one type side by side; a DataLoader calls this."""
        fields: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        self._map(lambda tensor: fields[tensor.dtype].append(tensor))
        parts = {}
        for dtype, tensors in fields.items():  # at multiples of 16, as Triton's self-check has them
            padded = [torch.constant_pad_nd(t.flatten(), (0, -t.numel() % 16)) for t in tensors]
            parts[dtype] = iter(torch.cat(padded).pin_memory().split([len(x) for x in padded]))
        return self._map(lambda t: next(parts[t.dtype])[: t.numel()].view(t.shape))

    def _map(self, function: Callable[[Tensor], Any]) -> Batch:
        def apply(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: tuple(map(function, fields)) for name, fields in value.items()}
            return None if value is None else function(value)

        return Batch(*map(apply, self))

    def last_events(self) -> Tensor:
        """(B,) int64, each sequence's last row."""
        return self.device_offsets[1:] - 1

    def target_ids(self) -> Tensor:
        """(B,) int64 in 1..X, the item of each sequence's last target."""
        return self.distinct_ids[self.target_index[self.last_events()]]


class Request(NamedTuple):
    """What is known of a query whose target is unknown."""

    time: int | None = None  # Unix seconds; None: that of the last event
    action: int = -1  # action type; -1: unknown


class Negatives:
    """The items that a batch's targets are to be told from, shared by all its queries.

    Args:
        num_items: X.
        kind: "all" items, the "batch"'s targets, "uniform" ones, or "mixed" (both of the latter).
        num_uniform: distinct uniform ones per batch, for "uniform" and "mixed".
        target_counts: (X + 1,) how often each item is a target in training.
        has_logq: correct in-batch negatives for how often their items come; needs target_counts.
        only_trained: an item that is never a target in training is no negative. It could only be
            pushed away, whatever its features say. Without features that is right: it would keep
            its random vector otherwise, and rank above the items that are pushed away.

    Raises:
        ValueError: no such kind, or no negatives at all.
    """

    def __init__(
        self,
        num_items: int,
        kind: str = "all",
        num_uniform: int = 0,
        target_counts: np.ndarray | None = None,
        has_logq: bool = False,
        only_trained: bool = False,
    ):
        if kind not in NEGATIVES or (kind in ("uniform", "mixed") and num_uniform < 1):
            raise ValueError(f"negatives {kind!r} with num_uniform {num_uniform}: no loss")
        self.num_items, self.kind, self.has_logq = num_items, kind, has_logq
        self.target_counts = target_counts
        self.pool = np.arange(1, num_items + 1, dtype=np.int32)
        if only_trained:
            self.pool = np.flatnonzero(target_counts).astype(np.int32)
        self.num_uniform = 0 if kind == "batch" else min(num_uniform, len(self.pool))

    def index(
        self, item_ids: np.ndarray, targets: np.ndarray, seed: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Batch's distinct_ids, each event's row of them (E,), negative_index, negative_log_q.

        `item_ids`: (E,), of all events of the batch. `targets`: (n,) int64 in 0..E-1, the events to
        be predicted. `seed`: decides the uniform negatives.
        """
        if self.kind == "all":
            distinct, event_rows = np.arange(1, self.num_items + 1), item_ids.astype(np.int64) - 1
            is_every = len(self.pool) == self.num_items
            return distinct, event_rows, None if is_every else self.pool.astype(np.int64) - 1, None
        drawn = np.empty(0, np.int64)
        if self.num_uniform:
            generator, options = np.random.default_rng(seed), {"replace": False, "shuffle": False}
            drawn = self.pool[generator.choice(len(self.pool), self.num_uniform, **options)]
        distinct, rows = np.unique(np.concatenate([item_ids, drawn]), return_inverse=True)
        event_rows, drawn_rows = np.split(rows, [len(item_ids)])
        distinct = distinct.astype(np.int64)
        if self.kind == "uniform":
            return distinct, event_rows, drawn_rows, None
        is_negative = np.zeros(len(distinct), bool)
        is_negative[drawn_rows] = True
        is_negative[event_rows[targets]] = True
        negative_index = np.flatnonzero(is_negative)
        log_q = self._log_q(distinct[negative_index], len(targets)) if self.has_logq else None
        return distinct, event_rows, negative_index, log_q

    def _log_q(self, item_ids: np.ndarray, num_targets: int) -> np.ndarray:
        """Log of how much likelier each negative was than one drawn uniformly, (M,) float32.

        The batch's targets are among the negatives, so popular items come too often. With their
        logits lowered by this much, the sum over negatives estimates what the same number of
        uniform ones would give.
        """
        num_items = len(self.pool)
        share = (self.target_counts[item_ids] + 1.0) / (self._num_targets + num_items)
        absent = np.exp(num_targets * np.log1p(-share)) * (1 - self.num_uniform / num_items)
        return np.log((1 - absent) / (len(item_ids) / num_items)).astype(np.float32)

    @cached_property
    def _num_targets(self) -> int:
        return int(self.target_counts.sum())


class MyDataset(Dataset):
    """Sequences of one split over memory-mapped files.

    Args:
        data_dir: a folder as docs/data_format.md describes it.
        split: "train", "valid" or "test".
        maxlen: events seen, N, the newest of a history.
        negatives: of its batches; None: all items.
        has_windows: of "train": a sequence with more events is cut into windows, each an index of
            its own, so that every event but the first is predicted once; else the newest alone.
        whole_history: the last events are seen, too, and what follows them is to be predicted.
        request: of queries whose target is unknown.
        target_actions: of "train": action types of the events to be predicted; None: any.
        host_vectors: feature id -> files.features.Feature of kind "emb", whose rows batches bring.
        trust_pickle: of an indexer.pkl without a manifest, run whatever it holds.
        sequences: instead of the folder's; what follows each of them is to be predicted.

    Raises:
        DataError: files are missing, or do not fit together; or there is no such action type.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        maxlen: int = 101,
        negatives: Negatives | None = None,
        *,
        has_windows: bool = False,
        whole_history: bool = False,
        request: Request = Request(),  # noqa: B008
        target_actions: Sequence[int] | None = None,
        host_vectors: Mapping[str, Any] | None = None,
        trust_pickle: bool = False,
        sequences: Split | None = None,
    ):
        self.data_dir, self.split, self.maxlen = Path(data_dir), split, maxlen
        self.target = "none"
        if sequences is None:
            manifest = read_manifest(self.data_dir, trust=trust_pickle)
            if split not in (targets := manifest.targets):
                raise DataError(f"{data_dir}: no {split} split there, only {', '.join(targets)}")
            self.target = "none" if whole_history else targets[split]
            sequences = Split(self.data_dir, split, *manifest[:3])
        self.sequences, self.num_items = sequences, sequences.num_items
        self.num_action_types = sequences.num_action_types
        self.negatives = negatives or Negatives(self.num_items)
        self.request, self.host_vectors = request, dict(host_vectors or {})
        if request.action >= (count := self.num_action_types):
            raise DataError(f"--request_action {request.action}: the data has {count} action types")
        self.target_actions = target_actions if split == "train" else None
        self.sequences.warn_of_oddities()
        self._rows, self._num_after = self._cut(has_windows and split == "train")
        if not len(self) and split == "train":
            reason = "no sequence has two events or more; write the split again"
            if self.target_actions is not None:
                reason = "no event to predict of --target_actions; name others"
            raise DataError(f"{self.sequences.path('data')}: {reason}")
        if not len(self):
            log.warning("%s: no sequence to predict, so its results are left out", split)

    def _cut(self, has_windows: bool) -> tuple[np.ndarray, np.ndarray]:
        """Per index: its sequence, and how many events of that follow the window; int64."""
        lengths = np.diff(self.sequences.offsets)
        shortest = 1 if self.target == "none" else 2
        rows, too_short = np.flatnonzero(lengths >= shortest), np.flatnonzero(lengths < shortest)
        if len(too_short):
            found = f"{len(too_short)} of {len(lengths)} sequences have fewer than {shortest}"
            first = ", ".join(map(str, too_short[:3]))
            log.warning("%s: %s events and are skipped, the first: %s", self.split, found, first)
        num_after = np.zeros(len(rows), np.int64)
        if has_windows:
            counts = -(-(lengths[rows] - 1) // self.maxlen)
            firsts = np.repeat(counts.cumsum() - counts, counts)
            rows = np.repeat(rows, counts)
            num_after = self.maxlen * (np.arange(len(firsts)) - firsts)
        if self.target_actions is not None:  # a window without a target would only cost time
            ends = self.sequences.offsets[rows + 1] - num_after
            firsts = np.maximum(self.sequences.offsets[rows] + 1, ends - self.maxlen)
            places = self.sequences.places_of(self.target_actions)
            has_target = np.searchsorted(places, ends) > np.searchsorted(places, firsts)
            rows, num_after = rows[has_target], num_after[has_target]
        return rows, num_after

    @property
    def is_cut(self) -> bool:
        """Whether an index is a window of a sequence, not always a whole one."""
        return bool(self._num_after.any())

    def __len__(self) -> int:
        return len(self._rows)

    def select(self, indices: np.ndarray) -> None:
        """Keep these indices alone, as 0, 1, ..."""
        self._rows, self._num_after = self._rows[indices], self._num_after[indices]

    @property
    def user_ids(self) -> np.ndarray:
        """(S,) the user of each index, in 1..num_users."""
        users = self.sequences.users
        return self._rows + 1 if users is None else users[self._rows]

    def indices_of(self, user_id: int) -> np.ndarray:
        """Which sequences are the user's; none if they are too short."""
        return np.flatnonzero(self.user_ids == user_id)

    def __getitem__(self, index: int) -> Fetched:
        return self.__getitems__([index])

    def __getitems__(self, indices: Draw | Sequence[int]) -> Fetched:
        """The sequences `indices`, in one gather, ordered by falling length."""
        draw = indices if isinstance(indices, Draw) else Draw(np.asarray(indices), (0,))
        rows, offsets = self._rows[draw.indices], self.sequences.offsets
        num_targets = int(self.target != "none")  # the last event of each sequence
        ends = offsets[rows + 1] - self._num_after[draw.indices]
        starts = np.maximum(offsets[rows], ends - (self.maxlen + num_targets))
        order = np.argsort(starts - ends, kind="stable")
        rows, starts, ends = rows[order], starts[order], ends[order]
        own = share_of(len(rows), draw.rank, draw.world_size) if draw.world_size > 1 else None
        sequences, seen = self.sequences.read(rows, starts, ends), None
        if self.split != "train" or not num_targets:
            rows = rows if own is None else rows[own]
            seen = self.sequences.read(rows, offsets[rows], offsets[rows + 1] - num_targets)
        return Fetched(sequences, seen, draw.seed, own)

    def collate_fn(self, fetched: Fetched) -> Batch:
        """A Batch of what `__getitems__` returned."""
        sequences, seen, seed, own = fetched
        item_ids = sequences.events["item_id"]
        times = sequences.events["timestamp"].astype(np.int64)
        actions = sequences.events["action_type"].astype(np.int64)
        inputs, offsets = np.arange(len(item_ids)), sequences.offsets
        is_known = self.target != "none"  # what follows the last input: the sequence's last event
        if is_known:
            inputs, offsets = np.delete(inputs, offsets[1:] - 1), offsets - np.arange(len(offsets))
        last = offsets[1:] - 1  # (B,) each sequence's last input
        nexts = np.minimum(inputs + 1, len(item_ids) - 1)  # events that follow the inputs
        target_times, target_actions = times[nexts], actions[nexts]
        if not is_known:
            target_times[last] = times[last] if self.request.time is None else self.request.time
            target_actions[last] = self.request.action
        has_target = np.full(len(inputs), is_known and self.split == "train")
        has_target[last] = is_known
        if self.target_actions is not None:
            has_target &= np.isin(target_actions, self.target_actions)
        targets = nexts[has_target]
        distinct, rows, negative_index, log_q = self.negatives.index(item_ids, targets, seed)
        arrays = {
            "item_index": rows[inputs],
            "target_index": np.where(has_target, rows[nexts], -1),
            "action_types": actions[inputs],
            "timestamps": times[inputs],
            "target_action_types": target_actions,
            "target_timestamps": target_times,
            "offsets": offsets,
            "user_ids": sequences.user_ids.astype(np.int64),
        }
        arrays = arrays if own is None else _share(arrays, own)
        arrays |= event_places(arrays["offsets"])
        arrays |= {
            "distinct_ids": distinct,
            "negative_index": negative_index,
            "negative_log_q": log_q,
            "num_targets": np.asarray(has_target.sum()),
            "seen_ids": None if seen is None else seen.events["item_id"].astype(np.int64),
            "seen_offsets": None if seen is None else seen.offsets,
        }
        tensors = {k: None if v is None else torch.from_numpy(v) for k, v in arrays.items()}
        vectors = {
            name: tuple(torch.from_numpy(np.asarray(a)[distinct]) for a in (v.values, v.present))
            for name, v in self.host_vectors.items()
        }
        orders = self._orders(arrays) if self.split == "train" else {}
        return Batch(**tensors, item_vectors=vectors, orders=orders)

    def _orders(self, arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[Tensor, ...]]:
        """`Batch.orders` of its other fields."""
        num_rows = len(arrays["distinct_ids"])
        orders = {
            "items": order_of_rows(arrays["item_index"], num_rows),
            "loss": loss_rows(arrays["target_index"], arrays["negative_index"], num_rows),
            "positions": order_of_rows(arrays["positions"], self.maxlen),
            "sequences": (np.arange(len(arrays["positions"])), arrays["offsets"]),
        }
        return {name: tuple(map(torch.from_numpy, pair)) for name, pair in orders.items()}


def share_of(count: int, rank: int, world_size: int) -> np.ndarray:
    """(B,) bool: which of `count` sequences, ordered by length, are a process's.

    In snake order (0 1 2 2 1 0 0 1 ...), so that all processes get about as many events.
    """
    lap, place = np.divmod(np.arange(count), world_size)
    return np.where(lap % 2, world_size - 1 - place, place) == rank


def _share(arrays: Mapping[str, np.ndarray], own: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of `arrays` that belong to the sequences `own`, (B,) bool."""
    lengths = np.diff(arrays["offsets"])
    events = np.repeat(own, lengths)
    share = {n: a[own if n == "user_ids" else events] for n, a in arrays.items() if n != "offsets"}
    return share | {"offsets": np.concatenate([[0], lengths[own].cumsum()])}


class BatchSampler(Sampler[Draw]):
    """Batches in an order that is a function of (seed, epoch), from any batch on.

    `batch_size`: sequences in a batch; the last batch may be smaller. `seed`: of order and
    negatives. `is_shuffled`: False keeps the order of the file. `rank`, `world_size`: of this
    process; all processes have the same batches.
    """

    def __init__(
        self, num_sequences: int, batch_size: int, seed: int, is_shuffled: bool, rank: int = 0,
        world_size: int = 1,
    ):  # fmt: skip
        self.num_sequences, self.batch_size = num_sequences, batch_size
        self.seed, self.is_shuffled = seed, is_shuffled
        self.rank, self.world_size = rank, world_size
        self.epoch, self.first_batch = 0, 0

    def __iter__(self):
        order = np.arange(self.num_sequences)
        if self.is_shuffled:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        for batch in range(self.first_batch, self.num_batches):
            part = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            # From 1: numpy takes (seed, epoch) and (seed, epoch, 0) for one seed.
            yield Draw(part, (self.seed, self.epoch, batch + 1), self.rank, self.world_size)

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    @property
    def num_batches(self) -> int:
        return -(-self.num_sequences // self.batch_size)

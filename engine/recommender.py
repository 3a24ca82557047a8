"""A trained model asked in the ids of a log: histories in, items and their scores out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset import MyDataset, Negatives, Request
from engine.export import read_request
from engine.setup import make_loader
from engine.top_items import Best, recommend
from engine.trained_model import load_model
from files.data_folder import Manifest, log_ids, read_manifest
from files.sequences import EVENT_DTYPE, USER_DTYPE, Sequences, SplitInMemory
from model import HSTUModel

BATCH_SIZE = 128  # histories


class History(NamedTuple):
    """What a user did, oldest first, in the ids of the log."""

    items: Sequence[Any]  # one at least
    times: Sequence[int] | None = None  # Unix seconds, one per item; None: not known
    actions: Sequence[Any] | None = None  # names or numbers of action types; None: not known
    user: Any = None  # whose features the model gets; None: nobody's


@torch.no_grad()
def recommend_histories(
    model: HSTUModel,
    manifest: Manifest,
    histories: Sequences,
    items: Tensor,
    top_k: int,
    removes_seen: bool,
    request: Request = Request(),  # noqa: B008
) -> Iterator[Best]:
    """The top-k items of histories, in batches in their order, whose `user_ids` are 0..S-1.

    Args:
        manifest: of the data folder that the model was opened with.
        histories: S of them, all their events seen; `user_ids`: whose features the model gets, 0:
            nobody's.
        items: (X, D) embeddings of all items.
        removes_seen, request: as of `recommend` and MyDataset.
    """
    count, device = len(histories.user_ids), next(model.parameters()).device
    users = torch.from_numpy(np.append(0, histories.user_ids).astype(np.int64)).to(device)
    numbered = histories._replace(user_ids=np.arange(1, count + 1, dtype=USER_DTYPE))
    sequences = SplitInMemory(numbered, manifest.num_items, manifest.num_action_types)
    options = model.config.maxlen, Negatives(manifest.num_items, "batch")
    dataset = MyDataset("", "test", *options, request=request, sequences=sequences)
    loader = make_loader(dataset, BATCH_SIZE, 0, device, num_workers=0)
    item_ids = torch.arange(1, manifest.num_items + 1, device=device)
    for best in recommend(model, loader, items, item_ids, top_k, removes_seen, users):
        order = best.user_ids.argsort()
        best = Best(*(part[order] for part in best))
        yield best._replace(user_ids=best.user_ids - 1)


class Recommender:
    """A checkpoint with the items of a data folder.

    Args:
        path: a model_*.pt.
        data_dir: the folder that it was trained on, or one that extends it, as of `load_model`.
        device: cpu, cuda or cuda:N.
        trust_pickle: load .pkl files unchecked: they can run any code.
        model_class: your own, if it was trained with one.

    Raises:
        DataError: no such checkpoint, or the data is not the model's.
    """

    def __init__(
        self,
        path: str | Path,
        data_dir: str | Path,
        *,
        device: str = "cpu",
        trust_pickle: bool = False,
        model_class: type[HSTUModel] = HSTUModel,
    ):
        self.data_dir, trust = data_dir, {"trust": trust_pickle}
        self.manifest = read_manifest(data_dir, **trust)
        options = {"device": device, "trust_pickle": trust_pickle, "model_class": model_class}
        self.model = load_model(path, data_dir, self.manifest, **options)
        self.item_ids = log_ids(data_dir, "i", self.manifest.num_items, **trust)  # (X + 1,)
        user_ids = log_ids(data_dir, "u", self.manifest.num_users, **trust)
        # By their texts, as a log may have them as numbers or as texts.
        sides = {"item": self.item_ids, "user": user_ids}
        self._re_ids = {what: {str(i): k for k, i in enumerate(ids)} for what, ids in sides.items()}
        with torch.no_grad():
            every = torch.arange(1, self.manifest.num_items + 1)
            self._items = self.model.item_embeddings(every.to(next(self.model.parameters()).device))

    def recommend(
        self,
        histories: Sequence[History],
        top_k: int = 10,
        *,
        removes_seen: bool | None = None,
        request_time: int | None = None,
        request_action: str | int = -1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best items of each history and their scores, best first.

        Args:
            histories: S of them.
            top_k: k.
            removes_seen: leave out the items of a history; None: as in the training.
            request_time: Unix time of the request; None: that of a history's last event.
            request_action: action that is hoped for, by name or number; -1: unknown.

        Returns:
            (S, k) item ids of the log, and (S, k) float32 cosines; where no item is left, None and
            -inf.

        Raises:
            ValueError: an item, an action or a user is not known, or lengths differ.
        """
        if removes_seen is None:
            removes_seen = self.model.config.removes_seen
        config = self.model.config
        request = read_request(self.data_dir, request_time, request_action, config, self.manifest)
        sequences = self._sequences(histories)
        batches = recommend_histories(
            self.model, self.manifest, sequences, self._items, top_k, removes_seen, request
        )
        scores, rows = np.empty((0, top_k), np.float32), np.empty((0, top_k), np.int64)
        if found := list(batches):
            scores = np.concatenate([best.scores for best in found])
            rows = np.concatenate([best.rows for best in found])
        names = np.append(self.item_ids[1:].astype(object), None)
        return names[rows], scores

    def item_embeddings(self, item_ids: Sequence[Any]) -> np.ndarray:
        """(n, D) float32 of length 1, of n items of the log.

        Raises:
            ValueError: an item is not known.
        """
        rows = [self._re_id("item", item, f"item_ids[{k}]") - 1 for k, item in enumerate(item_ids)]
        return self._items[rows].cpu().numpy()

    def _re_id(self, what: str, original: Any, place: str) -> int:
        re_id = self._re_ids[what].get(str(original), 0)
        if not re_id:
            raise ValueError(f"{place}: {original!r} is no {what} of {self.data_dir}")
        return re_id

    def _sequences(self, histories: Sequence[History]) -> Sequences:
        users = np.zeros(len(histories), USER_DTYPE)
        parts = [np.empty(0, EVENT_DTYPE)]
        for k, history in enumerate(histories):
            parts.append(self._events(history, f"histories[{k}]"))
            if history.user is not None:
                users[k] = self._re_id("user", history.user, f"histories[{k}].user")
        offsets = np.cumsum([len(part) for part in parts])
        return Sequences(np.concatenate(parts), offsets, users)

    def _events(self, history: History, place: str) -> np.ndarray:
        count, types = len(history.items), self.manifest.action_types() | {"-1": -1}
        times = [0] * count if history.times is None else history.times
        actions = [-1] * count if history.actions is None else history.actions
        if not count or not len(times) == len(actions) == count:
            found = f"{count} items, {len(times)} times, {len(actions)} actions"
            raise ValueError(f"{place}: {found}; expected as many of each, and one at least")
        events = np.empty(count, EVENT_DTYPE)
        for n, (item, action) in enumerate(zip(history.items, actions, strict=True)):
            if str(action) not in types:
                known = ", ".join(types)
                raise ValueError(f"{place}.actions[{n}]: {action!r}, expected one of {known}")
            re_id = self._re_id("item", item, f"{place}.items[{n}]")
            events[n] = re_id, types[str(action)], int(times[n])
        return events

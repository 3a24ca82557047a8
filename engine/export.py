"""Exports a trained model: item embeddings, the test users' queries and their top items."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import MyDataset, Negatives, Request
from engine.run_log import progress_bar
from engine.setup import make_loader, vectors_on_host
from engine.trained_model import leaves_out_seen, load_model
from files import data_folder
from files.atomic_io import DataError, sha256_of
from files.checkpoint import differences
from files.data_folder import Candidates, Manifest, read_manifest
from files.embeddings import load_emb, publish
from files.features import Feature, load_features
from files.item_vectors import find_vectors, is_by_re_id, load_vectors
from hstu_components import FeatureTables, gather_lists
from model import HSTUConfig, HSTUModel

log = logging.getLogger("hstu")


class Catalogue(NamedTuple):
    """What is exported and ranked: all items, or a candidate set; n rows."""

    item_ids: Tensor  # (n,) int64, 0: not in the data
    tables: FeatureTables | None  # where the rows' features are; None: the model's own
    table_rows: Tensor  # (n,) int64
    ids: np.ndarray  # (n,) uint64, as they are exported
    id_kind: str  # "original", "re-id" or "retrieval"


@torch.no_grad()
def infer(args: argparse.Namespace, model_class: type[HSTUModel] = HSTUModel) -> None:
    """Export the items' embeddings, and the test users' queries and top-k items.

    Raises:
        DataError: checkpoint, data and flags do not fit.
    """
    path, output_dir, trust = Path(args.state_dict_path), Path(args.output_dir), args.trust_pickle
    manifest = read_manifest(args.data_dir, trust=trust)
    names = ("device", "mm_emb_device", "kernels", "trust_pickle")
    options = {name: getattr(args, name) for name in names}
    model = load_model(path, args.data_dir, manifest, model_class=model_class, **options)
    asked = args.request_time, args.request_action
    request = read_request(args.data_dir, *asked, model.config, manifest)
    if manifest.targets.get("test") == "last" and not args.whole_history and request != Request():
        raise DataError(
            f"--request_time and --request_action: {args.data_dir}'s test split has its targets' "
            "times and actions; ask for what comes next with --whole_history"
        )
    if args.candidates:
        catalogue = candidates_of(args.candidates, args.data_dir, model, args.mm_emb_device, trust)
    else:
        catalogue = all_items(args.data_dir, model, trust)
    removes_seen = leaves_out_seen(args.remove_seen, model.config)
    origin = {
        "checkpoint": path.name,
        "checkpoint_sha256": sha256_of(path),
        "item_ids": catalogue.id_kind,
        "data_files": data_folder.fingerprint(args.data_dir),
        "removes_seen": removes_seen,
    }
    folder, users_folder = output_dir / "item_embeddings", output_dir / "user_embeddings"
    shape, arrays = (len(catalogue.ids), model.config.hidden_units), {"id.u64bin": catalogue.ids}
    publish(folder, shape, embed(model, catalogue), arrays, origin, users_folder)
    if "test" not in manifest.targets:
        return
    negatives = Negatives(manifest.num_items, "batch")  # the fewest: they are not used
    options = {"whole_history": args.whole_history, "request": request, "trust_pickle": trust}
    dataset = MyDataset(args.data_dir, "test", model.config.maxlen, negatives, **options)
    if not len(dataset):
        return
    device = catalogue.item_ids.device
    items = torch.from_numpy(load_emb(folder / "embedding.fbin")).to(device)  # a map, not a copy
    loader = make_loader(dataset, args.batch_size, args.seed, device, args.num_workers)
    ranking = args.top_k, removes_seen
    queries, users, top_rows = recommend(model, loader, items, catalogue, *ranking)
    user_ids, kind = exported_ids(args.data_dir, "u", manifest.num_users, trust)
    top_ids = np.where(top_rows < 0, -1, catalogue.ids.view(np.int64)[top_rows])
    arrays = {"topk.u64bin": top_ids, "id.u64bin": user_ids[users]}
    origin |= {"user_ids": kind, "whole_history": args.whole_history}
    origin |= {"request_time": request.time, "request_action": request.action}
    publish(users_folder, queries.shape, [queries], arrays, origin)


def read_request(
    data_dir: str | Path, time: int | None, action: str, config: HSTUConfig, manifest: Manifest
) -> Request:
    """What --request_time and --request_action say.

    Raises:
        DataError: the data has no such type, or the model does not ask for one, or for the time.
    """
    types = manifest.action_types() | {"-1": -1}
    if time is not None and config.time_bias != "request":
        time_bias = f"--time_bias {config.time_bias}"
        raise DataError(f"--request_time: the model was trained with {time_bias}")
    if action not in types:
        known = ", ".join(types)
        raise DataError(f"--request_action {action}: no action of {data_dir}, expected {known}")
    if types[action] >= 0 and not config.num_target_action_types:
        raise DataError("--request_action: the model was trained without --target_action")
    return Request(time, types[action])


def all_items(data_dir: str | Path, model: HSTUModel, trust_pickle: bool = False) -> Catalogue:
    num_items, device = model.config.num_items, next(model.parameters()).device
    ids, kind = exported_ids(data_dir, "i", num_items, trust_pickle)
    item_ids = torch.arange(1, num_items + 1, device=device)
    return Catalogue(item_ids, None, item_ids, ids[1:], kind)


def candidates_of(
    folder: str | Path,
    data_dir: str | Path,
    model: HSTUModel,
    mm_emb_device: str,
    trust_pickle: bool,
) -> Catalogue:
    """The candidate folder's items; one that the model does not know is what its features say."""
    config, device = model.config, next(model.parameters()).device
    candidates = data_folder.read_candidates(folder, config.num_items)
    count = len(candidates.item_ids)
    known = {i: (spec["kind"], spec["size"]) for i, spec in config.item_features.items()}
    plain = [name for name, (kind, _) in known.items() if kind != "emb"]
    features = load_features(folder, "item", count, plain) if plain else {}
    options = config.num_items, trust_pickle
    for name in [name for name in known if name not in plain]:
        features[name] = candidate_vectors(folder, data_dir, name, candidates, *options)
    found = {i: (f.kind, f.size) for i, f in features.items()}
    for name, (kind, size) in found.items():
        if kind in ("sparse", "array"):  # candidates need not have all values of the data
            found[name] = kind, max(size, known[name][1])
    if changed := differences(known, found):
        raise DataError(f"{folder}: other features than the model's: {'; '.join(changed)}")
    tables = FeatureTables(features, vectors_on_host(features, mm_emb_device)).to(device)
    item_ids = torch.from_numpy(candidates.item_ids.astype(np.int64)).to(device)
    rows = torch.arange(1, count + 1, device=device)
    return Catalogue(item_ids, tables, rows, candidates.retrieval_ids, "retrieval")


def candidate_vectors(
    candidate_dir: str | Path,
    data_dir: str | Path,
    name: str,
    candidates: Candidates,
    num_items: int,
    trust_pickle: bool,
) -> Feature:
    """The candidates' own vectors, else the data's; those of one original id share theirs."""
    folder = candidate_dir if name in find_vectors(candidate_dir) else data_dir
    dense = [i for i, source in find_vectors(folder).items() if is_by_re_id(source)]
    ids = candidates.original_ids
    originals, first, place = np.unique(ids, return_index=True, return_inverse=True)
    row_of = dict(zip(originals.tolist(), (first + 1).tolist(), strict=True))
    is_of_data = name in dense and folder == data_dir  # a row for each of its items
    count = num_items if is_of_data else len(ids)
    options = {"trust_pickle": trust_pickle, "prefix": "candidates"}
    found = load_vectors(folder, [name], row_of, count, **options)[name]
    if not is_of_data and (name in dense or len(originals) == count):
        return found
    rows = np.concatenate([[0], candidates.item_ids if is_of_data else first[place] + 1])
    return found._replace(values=found.values[rows], present=found.present[rows])


def embed(model: HSTUModel, catalogue: Catalogue) -> Iterator[np.ndarray]:
    """The rows' embeddings, (c, D) float32 of length 1 at a time; consume them in `no_grad`."""
    rows = catalogue.item_ids, catalogue.tables, catalogue.table_rows
    return (chunk.cpu().numpy() for chunk in model.item_embedding_chunks(*rows))


def exported_ids(
    data_dir: str | Path, side: str, count: int, trust_pickle: bool = False
) -> tuple[np.ndarray, str]:
    """(count + 1,) uint64 ids by re-id, and which kind they are; `side` is "i" or "u"."""
    ids = data_folder.original_ids(data_dir, side, count, trust=trust_pickle)
    if ids is not None:
        return ids, "original"
    path = Path(data_dir) / "indexer.pkl"
    if path.exists():
        what = {"i": "items", "u": "users"}[side]
        log.info("%s: not all ids of %s are numbers below 2^63, so re-ids are exported", path, what)
    return np.arange(count + 1, dtype=np.uint64), "re-id"


def recommend(
    model: HSTUModel,
    loader: torch.utils.data.DataLoader,
    items: Tensor,
    catalogue: Catalogue,
    top_k: int,
    removes_seen: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The users' queries (S, D), user re-ids (S,), and rows of their top-k items (S, k).

    `items`: (n, D) embeddings of the catalogue.
    """
    # The catalogue's rows ordered by item, and where each item's begin: candidates may share one.
    counts = torch.bincount(catalogue.item_ids, minlength=model.config.num_items + 1)
    order, bounds = catalogue.item_ids.argsort(), F.pad(counts.cumsum(0), (1, 0))
    queries, users, rows, seen = [], [], [], None
    for batch in progress_bar(loader, desc="users"):
        batch = batch.to(items.device)
        queries.append(model.predict(batch))
        if removes_seen:
            seen_rows, offsets = gather_lists(order, bounds, batch.seen_ids)
            seen = seen_rows, offsets[batch.seen_offsets]
        rows.append(model.kernels.top_k(queries[-1], items, top_k, seen)[1])
        users.append(batch.user_ids)
    return tuple(torch.cat(parts).cpu().numpy() for parts in (queries, users, rows))

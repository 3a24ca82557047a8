"""Exports a trained model: item embeddings, users' queries and their top items."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset import MyDataset, Negatives, Request
from engine.setup import make_loader, vectors_on_host
from engine.signals import stop_signal
from engine.top_items import Catalogue, newest_histories, recommend
from engine.trained_model import leaves_out_seen, load_model
from files import data_folder
from files.atomic_io import DataError, sha256_of
from files.checkpoint import differences
from files.data_folder import Candidates, Manifest, read_manifest
from files.embeddings import load_emb, publish
from files.features import Feature, load_features
from files.item_vectors import find_vectors, is_by_re_id, load_vectors
from files.recommendations import TopItems, table_suffix, write_lines, write_table
from hstu_components import FeatureTables
from model import HSTUConfig, HSTUModel

log = logging.getLogger("hstu")


@torch.no_grad()
def infer(args: argparse.Namespace, model_class: type[HSTUModel] = HSTUModel) -> None:
    """Export the items' embeddings, and the queries and top-k items of users.

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
    sees_all = args.whole_history or args.export_users == "all"
    if manifest.targets.get("test") == "last" and not sees_all and request != Request():
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
    names = item_names(args.data_dir, catalogue, trust)
    tables = {"item_ids.txt": lambda file: write_lines(file, names)}
    publish(folder, shape, embed(model, catalogue), arrays, origin, users_folder, tables=tables)
    datasets = open_users(args, manifest, model.config.maxlen, request)
    is_guessed = request.time is None and any(dataset.target == "none" for dataset in datasets)
    if is_guessed and model.config.time_bias == "request":
        log.info("requests are taken to come at a user's last event; --request_time says when")
    if datasets:
        items = torch.from_numpy(load_emb(folder / "embedding.fbin"))  # a map, not a copy
        origin |= {"whole_history": sees_all, "export_users": args.export_users}
        origin |= {"request_time": request.time, "request_action": request.action}
        export_users(args, manifest, model, catalogue, items, names, datasets, origin)


def item_names(data_dir: str | Path, catalogue: Catalogue, trust_pickle: bool) -> np.ndarray:
    """(n,) what the log calls the catalogue's rows; of a candidate set its retrieval ids."""
    if catalogue.id_kind == "retrieval":
        return catalogue.ids.view(np.int64)
    return data_folder.log_ids(data_dir, "i", len(catalogue.ids), trust=trust_pickle)[1:]


def open_users(
    args: argparse.Namespace, manifest: Manifest, maxlen: int, request: Request
) -> list[MyDataset]:
    """The histories that --export_users asks for; says whom they leave out."""
    negatives = Negatives(manifest.num_items, "batch")  # the fewest: they are not used
    options = {"request": request, "trust_pickle": args.trust_pickle}
    if args.export_users == "all":
        datasets = newest_histories(args.data_dir, manifest.targets, maxlen, negatives, **options)
        why = "without an event in any split"
    else:
        options["whole_history"] = args.whole_history
        splits = manifest.targets.keys() & {"test"}
        datasets = [MyDataset(args.data_dir, s, maxlen, negatives, **options) for s in splits]
        why = "not in the test split (--export_users all has all users with an event)"
    num_found = len(np.unique(np.concatenate([[0], *(d.user_ids for d in datasets)]))) - 1
    if num_found < manifest.num_users:
        log.info(
            "users: %d of %d; left out are %d %s", num_found, manifest.num_users,
            manifest.num_users - num_found, why,
        )  # fmt: skip
    return [dataset for dataset in datasets if len(dataset)]


def export_users(
    args: argparse.Namespace,
    manifest: Manifest,
    model: HSTUModel,
    catalogue: Catalogue,
    items: Tensor,
    names: np.ndarray,
    datasets: Sequence[MyDataset],
    origin: Mapping[str, Any],
) -> None:
    """Write the users' queries as they come, then their top items, which are few numbers each.

    `items`: (n, D) embeddings of the catalogue. `names`: (n,) of `item_names`.
    """
    device, count, k = catalogue.item_ids.device, sum(map(len, datasets)), args.top_k
    options = args.batch_size, args.seed, device, args.num_workers
    batches = chain.from_iterable(make_loader(dataset, *options) for dataset in datasets)
    best = recommend(
        model, batches, items.to(device), catalogue.item_ids, k, origin["removes_seen"]
    )
    ids, kind = exported_ids(args.data_dir, "u", manifest.num_users, args.trust_pickle)
    user_names = data_folder.log_ids(args.data_dir, "u", len(ids) - 1, trust=args.trust_pickle)
    arrays = {"topk.u64bin": np.empty((count, k), np.int64), "id.u64bin": np.empty(count, "<u8")}
    top = TopItems(
        np.empty(count, user_names.dtype), names, np.empty((count, k), np.int32),
        np.empty((count, k), np.float32),
    )  # fmt: skip

    def queries() -> Iterator[np.ndarray]:
        start = 0
        for users, found, scores, rows in best:
            part = slice(start, start := start + len(users))
            arrays["id.u64bin"][part], top.user_ids[part] = ids[users], user_names[users]
            arrays["topk.u64bin"][part] = np.where(rows < 0, -1, catalogue.ids.view(np.int64)[rows])
            top.rows[part], top.scores[part] = rows, scores
            stop_signal.check()
            yield found

    folder, suffix = Path(args.output_dir) / "user_embeddings", table_suffix()
    tables = {
        "user_ids.txt": lambda file: write_lines(file, top.user_ids),
        f"recommendations{suffix}": lambda file: write_table(file, suffix, top),
    }
    origin = {**origin, "user_ids": kind}
    shape = count, model.config.hidden_units
    with stop_signal.deferred():  # a loader that starts or ends must not be interrupted
        publish(folder, shape, queries(), arrays, origin, tables=tables)
        other = {".csv": ".parquet", ".parquet": ".csv"}[suffix]
        (folder / f"recommendations{other}").unlink(missing_ok=True)  # of an earlier export
        stop_signal.check()


def read_request(
    data_dir: str | Path, time: int | None, action: str | int, config: HSTUConfig,
    manifest: Manifest,
) -> Request:  # fmt: skip
    """What --request_time and --request_action say.

    Raises:
        DataError: the data has no such type, or the model does not ask for one, or for the time.
    """
    types, action = manifest.action_types() | {"-1": -1}, str(action)
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
    candidates = data_folder.read_candidates(folder, data_dir, config.num_items, trust=trust_pickle)
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

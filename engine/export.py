"""Exports a trained model: item embeddings, the test users' queries and their top items."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset import Batch, BatchSampler, MyDataset, emb_pieces, emb_size
from engine.run_log import progress_bar
from engine.setup import make_loader, pick_device, read_features, vectors_on_host
from engine.signals import stop_signals
from files.atomic_io import (
    DataError,
    atomic_write,
    hold_folder,
    sha256_of,
    sweep_temporaries,
    write_hashed,
    write_json,
)
from files.checkpoint import differences, load_checkpoint, load_weights
from files.data_folder import (
    Candidates,
    Manifest,
    fingerprint,
    original_ids,
    read_candidates,
    read_manifest,
)
from files.feature_cache import Feature
from files.features import load_features
from files.item_vectors import find_vectors, is_by_re_id, load_vectors
from hstu_components import FeatureTables, gather_lists
from model import HSTUConfig, HSTUModel

log = logging.getLogger("hstu")


class Catalogue(NamedTuple):
    """What is exported and ranked: all items, or a candidate set; n rows."""

    item_ids: torch.Tensor  # (n,) int64, 0: not in the data
    tables: FeatureTables | None  # where the rows' features are; None: the model's own
    table_rows: torch.Tensor  # (n,) int64
    ids: np.ndarray  # (n,) uint64, as they are exported
    id_kind: str  # "original", "re-id" or "retrieval"
    rows_by_item: torch.Tensor  # (n,) int64, from 0: the rows of item 0, of item 1, ...
    item_offsets: torch.Tensor  # (X + 2,) int64, where each item's rows begin among them


def infer(args: argparse.Namespace, model_class: type[HSTUModel]) -> None:
    """Export the items' embeddings, and the test users' queries and top-k items.

    Raises:
        DataError: checkpoint, data and flags do not fit; or another export is at work there.
    """
    with stop_signals.waiting():
        manifest = read_manifest(args.data_dir, trust=args.trust_pickle)
        model = load_model(args, model_class, manifest)
        catalogue = candidates_of(args, model) if args.candidates else all_items(args, model)
    args.request_action = request_action(args, model.config, manifest)
    is_held_out = manifest.targets.get("test") == "last" and not args.whole_history
    if is_held_out and (args.request_time is not None or args.request_action >= 0):
        raise DataError(
            f"--request_time and --request_action: the targets of {args.data_dir}'s test split are "
            "known, with their times and actions; ask for what comes next with --whole_history"
        )
    folder = Path(args.output_dir) / "item_embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    with hold_folder(folder):  # or this one's queries could meet another one's items
        export_all(args, model, manifest, catalogue)


@torch.no_grad()
def export_all(
    args: argparse.Namespace, model: HSTUModel, manifest: Manifest, catalogue: Catalogue
) -> None:
    path, output_dir, config = Path(args.state_dict_path), Path(args.output_dir), model.config
    origin = {"checkpoint": path.name, "checkpoint_sha256": sha256_of(path)}
    origin |= {"item_ids": catalogue.id_kind, "data_files": fingerprint(args.data_dir)}
    folder, shape = output_dir / "item_embeddings", (len(catalogue.ids), config.hidden_units)
    of_users = output_dir / "user_embeddings"
    publish(folder, shape, embed(model, catalogue), {"id.u64bin": catalogue.ids}, origin, of_users)
    tell_of_re_ids(args, "items", catalogue.id_kind)
    if "test" not in manifest.targets:
        return
    names = ("request_time", "request_action", "trust_pickle")
    options = {name: getattr(args, name) for name in names}
    options["holds_out"] = not args.whole_history
    dataset = MyDataset(args.data_dir, "test", config.maxlen, "batch", **options)
    if not len(dataset):
        return
    items = map_embeddings(folder, shape).to(catalogue.item_ids.device)
    queries, users, top_rows = recommend(args, model, dataset, items, catalogue)
    user_ids, kind = exported_ids(args, "u", manifest.num_users)
    top_ids = np.where(top_rows < 0, -1, catalogue.ids.view(np.int64)[top_rows])
    arrays = {"topk.u64bin": top_ids, "id.u64bin": user_ids[users]}
    origin |= {"user_ids": kind, "whole_history": args.whole_history}
    origin |= {"request_time": args.request_time, "request_action": args.request_action}
    publish(of_users, queries.shape, [queries], arrays, origin)
    tell_of_re_ids(args, "users", kind)


def tell_of_re_ids(args: argparse.Namespace, what: str, id_kind: str) -> None:
    if id_kind == "re-id" and (Path(args.data_dir) / "indexer.pkl").exists():
        log.info(
            "%s have re-ids there, as not all of their ids are whole numbers below 2^63; "
            "%s/indexer.pkl has both", what, args.data_dir,
        )  # fmt: skip


def request_action(args: argparse.Namespace, config: HSTUConfig, manifest: Manifest) -> int:
    """The type that --request_action names.

    Raises:
        DataError: the data has no such type, or the model does not ask for one, or for the time.
    """
    types = {"-1": -1, **manifest.action_types()}
    if args.request_time is not None and config.time_bias != "request":
        raise DataError(
            f"--request_time: the model was trained with --time_bias {config.time_bias}, and does "
            "not ask for it"
        )
    if args.request_action not in types:
        raise DataError(
            f"--request_action {args.request_action}: no action of {args.data_dir}, expected "
            f"{manifest.legal_actions()}, or -1"
        )
    if types[args.request_action] >= 0 and not config.num_target_action_types:
        raise DataError("--request_action: the model was trained without --target_action")
    return types[args.request_action]


def load_model(
    args: argparse.Namespace, model_class: type[HSTUModel], manifest: Manifest
) -> HSTUModel:
    """The model of a checkpoint over the features in data_dir, ready to predict."""
    path = Path(args.state_dict_path)
    config, weights = read_model(path)
    features = read_config_features(args, config, manifest)
    options = {"on_host": vectors_on_host(args, features[0]), "kernels": args.kernels}
    model = model_class(config, *features, **options)
    model = model.to(pick_device(args.device)).eval()
    load_weights(model, weights, path)
    return model


def read_model(path: Path) -> tuple[HSTUConfig, Mapping[str, torch.Tensor]]:
    """The config and the weights in a checkpoint."""
    content = load_checkpoint(path)
    config, weights = content["config"], content.get("weights")
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise DataError(f"{path}: not a checkpoint of this package (no config and weights in it)")
    names = {setting.name for setting in fields(HSTUConfig)}
    if changed := sorted(names ^ config.keys()):
        raise DataError(
            f"{path}: settings {', '.join(changed)} are unknown or missing; export it with the "
            "version that trained it"
        )
    return HSTUConfig(**config), weights


def all_items(args: argparse.Namespace, model: HSTUModel) -> Catalogue:
    num_items, device = model.config.num_items, next(model.parameters()).device
    ids, kind = exported_ids(args, "i", num_items)
    item_ids = torch.arange(1, num_items + 1, device=device)
    return Catalogue(item_ids, None, item_ids, ids[1:], kind, *by_item(item_ids, num_items))


def candidates_of(args: argparse.Namespace, model: HSTUModel) -> Catalogue:
    """The candidate folder's items; one that is not in the catalogue is what its features say."""
    config, device = model.config, next(model.parameters()).device
    candidates = read_candidates(args.candidates, config.num_items)
    count = len(candidates.item_ids)
    vectors = [name for name, spec in config.item_features.items() if spec["kind"] == "emb"]
    plain = [name for name in config.item_features if name not in vectors]
    features = load_features(args.candidates, "item", count, plain) if plain else {}
    features |= {
        name: candidate_vectors(args, name, candidates, config.num_items) for name in vectors
    }
    known = {i: (spec["kind"], spec["size"]) for i, spec in config.item_features.items()}
    found = {i: (f.kind, f.size) for i, f in features.items()}
    for name, (kind, size) in found.items():
        if kind in ("sparse", "array"):  # they need not have all of the data's values
            found[name] = kind, max(size, known[name][1])
    if changed := differences(known, found):
        raise DataError(f"{args.candidates}: other features than the model's: {'; '.join(changed)}")
    tables = FeatureTables(features, vectors_on_host(args, features)).to(device)
    item_ids = torch.from_numpy(candidates.item_ids.astype(np.int64)).to(device)
    rows = torch.arange(1, count + 1, device=device)
    own = by_item(item_ids, config.num_items)
    return Catalogue(item_ids, tables, rows, candidates.retrieval_ids, "retrieval", *own)


def by_item(item_ids: torch.Tensor, num_items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Catalogue's `rows_by_item` and `item_offsets`."""
    counts = torch.bincount(item_ids, minlength=num_items + 1)
    return item_ids.argsort(), torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def candidate_vectors(
    args: argparse.Namespace, name: str, candidates: Candidates, num_items: int
) -> Feature:
    """The candidates' own vectors, else the data's; those of one original id share theirs."""
    folder = args.candidates if name in find_vectors(args.candidates) else args.data_dir
    dense = [i for i, source in find_vectors(folder).items() if is_by_re_id(source)]
    ids = candidates.original_ids
    originals, first, place = np.unique(ids, return_index=True, return_inverse=True)
    row_of = dict(zip(originals.tolist(), (first + 1).tolist(), strict=True))
    is_of_data = name in dense and folder == args.data_dir  # a row for each of its items
    count = num_items if is_of_data else len(ids)
    options = {"trust_pickle": args.trust_pickle, "prefix": "candidates"}
    found = load_vectors(folder, [name], row_of, count, **options)[name]
    if not is_of_data and (name in dense or len(originals) == count):
        return found
    rows = np.concatenate([[0], candidates.item_ids if is_of_data else first[place] + 1])
    return found._replace(values=found.values[rows], present=found.present[rows])


def embed(model: HSTUModel, catalogue: Catalogue) -> Iterator[np.ndarray]:
    """The rows' embeddings, (c, D) float32 of length 1 at a time: millions need not fit in memory.

    Call it without gradients.
    """
    rows = catalogue.item_ids, catalogue.tables, catalogue.table_rows
    chunks = stop_signals.between(model.item_embedding_chunks(*rows))
    return (chunk.cpu().numpy() for chunk in chunks)


def map_embeddings(folder: Path, shape: tuple[int, int]) -> torch.Tensor:
    """(n, D) of what was published, in the page cache and not a copy of it."""
    # Copy on write: torch warns of memory that it could not write to.
    return torch.from_numpy(np.memmap(folder / "embedding.fbin", "<f4", "c", 8, shape))


def read_config_features(
    args: argparse.Namespace, config: HSTUConfig, manifest: Manifest
) -> tuple[dict, dict]:
    """The features that a checkpoint's model was built with, from data_dir.

    Raises:
        DataError: the data has other items or features than the model knows.
    """
    known, found = {"items": config.num_items}, {"items": manifest.num_items}
    if config.item_ids_digest and manifest.item_ids_digest:  # an item, or an order, may differ
        known["digest of the item ids"] = config.item_ids_digest[:8]
        found["digest of the item ids"] = manifest.item_ids_digest[:8]
    num_types = max(config.num_action_types, config.num_target_action_types)
    if num_types:
        known["action types"] = num_types
        found["action types"] = max(num_types, manifest.num_action_types)
        if config.action_names and manifest.action_names:
            shared = min(num_types, manifest.num_action_types)  # there may be fewer now
            known["action names"] = config.action_names[:shared]
            found["action names"] = manifest.action_names[:shared]
    refuse_other_data(args, known, found)
    sides = config.item_features, config.user_features
    vectors = [name for name, spec in sides[0].items() if spec["kind"] == "emb"]
    plain = [[name for name in side if name not in vectors] or ["none"] for side in sides]
    flags = {"item_features": plain[0], "user_features": plain[1], "mm_emb_id": vectors}
    features = read_features(argparse.Namespace(**vars(args) | flags), manifest)
    for specs, loaded in zip(sides, features, strict=True):
        known |= {name: (spec["kind"], spec["size"]) for name, spec in specs.items()}
        found |= {name: (feature.kind, feature.size) for name, feature in loaded.items()}
    refuse_other_data(args, known, found)
    return features


def refuse_other_data(
    args: argparse.Namespace, known: Mapping[str, object], found: Mapping[str, object]
) -> None:
    if changed := differences(known, found):
        raise DataError(
            f"{args.data_dir}: not the data that {args.state_dict_path} was trained on: "
            + "; ".join(changed)
        )


def exported_ids(args: argparse.Namespace, side: str, count: int) -> tuple[np.ndarray, str]:
    """(count + 1,) uint64 ids by re-id, and which kind they are."""
    ids = original_ids(args.data_dir, side, count, trust=args.trust_pickle)
    if ids is not None:
        return ids, "original"
    return np.arange(count + 1, dtype=np.uint64), "re-id"


def recommend(
    args: argparse.Namespace,
    model: HSTUModel,
    dataset: MyDataset,
    items: torch.Tensor,
    catalogue: Catalogue,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The test users' queries (S, D), user re-ids (S,), and rows of their top-k items (S, k).

    `items`: (n, D) embeddings of the catalogue.
    """
    device = items.device
    sampler = BatchSampler(len(dataset), args.batch_size, args.seed, is_shuffled=False)
    loader = make_loader(dataset, sampler, device, args.num_workers)
    queries, users, rows = [], [], []
    batches = stop_signals.between(loader)
    for batch in progress_bar(batches, desc="users", total=len(loader)):
        batch = batch.to(device)
        queries.append(model.predict(batch))
        seen = seen_rows(batch, catalogue) if args.remove_seen else None
        top = model.kernels.top_k(queries[-1], items, args.top_k, seen)
        rows.append(top[1])
        users.append(batch.user_ids)
    return tuple(torch.cat(parts).cpu().numpy() for parts in (queries, users, rows))


def seen_rows(batch: Batch, catalogue: Catalogue) -> tuple[torch.Tensor, torch.Tensor]:
    """The histories' items as rows of a catalogue, and where each sequence's begin."""
    rows, offsets = gather_lists(catalogue.rows_by_item, catalogue.item_offsets, batch.seen_ids)
    return rows, offsets[batch.seen_offsets]


def publish(
    folder: Path,
    shape: tuple[int, int],
    embeddings: Iterable[np.ndarray],
    arrays: Mapping[str, np.ndarray],
    origin: Mapping[str, Any],
    *followers: Path,
) -> None:
    """Write an export's files, and last the manifest that names their sizes and hashes.

    Args:
        folder: made if it is not there.
        shape: (n, d) of the embeddings.
        embeddings: their rows in order, (c, d) at a time; two chunks at most are held.
        arrays: the other files, (n, ...) each, `id.u64bin` among them.
        origin: goes into the manifest.
        followers: folders of exports that go with the old files, and not with these.

    Raises:
        DataError: no index takes these vectors; the export that was there is as it was.
        OSError: the disk is full, say; so it is then. If renaming fails, there is no manifest.
    """
    check_size(folder, *shape)
    folder.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(folder)
    chunks = checked_rows(folder, embeddings, arrays["id.u64bin"])
    contents = {name: (array.shape, [array]) for name, array in arrays.items()}
    files = {}
    with ExitStack() as complete:  # at its end all files are renamed, and not before
        for name, (size, rows) in {"embedding.fbin": (shape, chunks), **contents}.items():
            path = folder / name
            file = complete.enter_context(atomic_write(path, emb_size(path, size)))
            files[name] = write_hashed(file, emb_pieces(path, size, rows))
        for old in (folder, *followers):
            (old / "manifest.json").unlink(missing_ok=True)
    n, d = shape
    write_json(folder / "manifest.json", {"n": n, "d": d, **origin, "files": files})
    log.info("wrote %s: %s vectors of width %d", folder, f"{n:,}", d)


def check_size(folder: Path, n: int, d: int) -> None:
    if n == 0 or d == 1:
        raise DataError(
            f"{folder}: {n} vectors of width {d}, but an index needs one at least, of width 2 or "
            "more; train with larger --hidden_units"
        )
    if n * d >= 2**32:
        log.warning(
            "%s: %d vectors of width %d are 2^32 numbers or more; readers that multiply the "
            "header's two uint32 in 32 bits overflow", folder, n, d,
        )  # fmt: skip


def checked_rows(
    folder: Path, chunks: Iterable[np.ndarray], ids: np.ndarray
) -> Iterator[np.ndarray]:
    """The chunks as they come, (c, d) each; behind the last a warning of the rows that are zero.

    Raises:
        DataError: a row is not finite.
    """
    row, num_zeros, examples = 0, 0, []
    for chunk in chunks:
        chunk_ids = ids[row : row + len(chunk)]
        if not np.isfinite(chunk).all():
            first = np.isfinite(chunk).all(1).argmin()
            raise DataError(
                f"{folder}: id {chunk_ids[first]}: its embedding is not finite; the model has "
                "diverged, export another checkpoint or train with a lower --lr"
            )
        zeros = np.flatnonzero(chunk[:, 0] == 0)  # few, and any(1) of all is slow
        zeros = zeros[~chunk[zeros].any(1)]
        num_zeros += len(zeros)
        examples += chunk_ids[zeros[:3]].tolist()[: 3 - len(examples)]
        yield chunk
        row += len(chunk)
    if num_zeros:
        log.warning(
            "%s: %d vectors are zero and have no direction, the first: %s",
            folder, num_zeros, ", ".join(map(str, examples)),
        )  # fmt: skip

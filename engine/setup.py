"""What training and export share: the device, the features of a data folder, loaders."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dataset import BatchSampler, MyDataset
from engine.flags import DEFAULT_MM_EMB_ID, MODEL_VECTORS_UP_TO
from engine.signals import leave_signals_to_parent
from files.atomic_io import DataError
from files.data_folder import Manifest, check_re_ids, read_indexer
from files.features import Feature, load_features
from files.item_vectors import find_vectors, is_by_re_id, load_vectors
from ops.collectives import num_ranks, rank
from simplified_hstu import HSTU, HSTUAttention

log = logging.getLogger("hstu")


# Of glibc's mallopt, with how much may be kept: arrays up to 32 MB come from the heap, and 256 MB
# at its end stay.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = (-1, 256 << 20), (-3, 32 << 20)


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees, for the next step.

    Or it goes back to the system and comes again page by page, zeroed: up to an eighth of a step on
    the CPU (docs/log.md). Where there is no glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        if mallopt is not None:
            mallopt(*option)


def pick_device(name: str) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        log.info("no CUDA device here: running on the CPU")
        return torch.device("cpu")
    if name == "cuda" and num_ranks() > 1:
        return torch.device("cuda", torch.cuda.current_device())
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DataError(f"--device {name}: there are cuda:0 to cuda:{count - 1}; name one of them")
    return device


def compile_blocks(hstu: HSTU) -> None:
    """Compile what stands around each block's attention, once for all lengths.

    The attention itself loops over groups, whose number and shapes follow the lengths.
    """
    for block in hstu.blocks:
        if isinstance(block, HSTUAttention):  # not one of your own
            block.merge = torch.compile(block.merge, dynamic=True)


def read_features(args: argparse.Namespace, manifest: Manifest) -> tuple[dict, dict]:
    """Item and user features, the multimodal vectors among the former."""
    folder = args.data_dir
    items = load_features(folder, "item", manifest.num_items, wanted(args.item_features))
    users = load_features(folder, "user", manifest.num_users, wanted(args.user_features))
    wanted_vectors, available = args.mm_emb_id, find_vectors(folder)
    if wanted_vectors is DEFAULT_MM_EMB_ID and not set(wanted_vectors) <= set(available):
        log.info("no multimodal vectors %s in this data: going on without", *wanted_vectors)
        wanted_vectors = []
    if twice := (items.keys() | users.keys()) & set(wanted_vectors):
        raise DataError(
            f"{folder}: {', '.join(sorted(twice))} is a feature and a multimodal vector, but an id "
            "is unique; choose with --item_features, --user_features and --mm_emb_id"
        )
    if wanted_vectors:
        item_ids, path = {}, Path(folder) / "indexer.pkl"
        by_re_id = {name for name, source in available.items() if is_by_re_id(source)}
        if path.exists() or not by_re_id.issuperset(wanted_vectors):
            item_ids = read_indexer(folder, trust=args.trust_pickle)["i"]
            check_re_ids(path, "i", item_ids, manifest.num_items)
        items |= load_vectors(
            folder, wanted_vectors, item_ids, manifest.num_items, trust_pickle=args.trust_pickle
        )
    return items, users


def vectors_on_host(
    args: argparse.Namespace, features: Mapping[str, Feature]
) -> dict[str, Feature]:
    """The multimodal vectors among items' features that are not to lie beside the model."""
    vectors = {name: feature for name, feature in features.items() if feature.kind == "emb"}
    size = sum(feature.values.nbytes for feature in vectors.values())
    is_beside = args.mm_emb_device == "model" or (
        args.mm_emb_device == "auto" and size <= MODEL_VECTORS_UP_TO
    )
    return {} if is_beside else vectors


def wanted(values: list[str]) -> str | list[str]:
    """The value of --item_features as load_features takes it: a word, or a list of ids."""
    return values[0] if values in (["all"], ["none"]) else values


def make_loader(
    dataset: MyDataset, sampler: BatchSampler, device: torch.device, num_workers: int
) -> DataLoader:
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has none
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    num_workers = min(num_workers, num_cores)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=dataset.collate_fn,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_signals_to_parent,
        # Forked workers share the counts and vectors of this process; others would get copies.
        multiprocessing_context="fork" if num_workers else None,
        # Its own, or opening a loader would move the global one that dropout draws from.
        generator=torch.Generator(),
    )


def make_sampler(dataset: MyDataset, args: argparse.Namespace, is_shuffled: bool) -> BatchSampler:
    place = rank(), num_ranks()
    return BatchSampler(len(dataset), args.batch_size, args.seed, is_shuffled, *place)


def make_eval_loader(
    dataset: MyDataset | None, args: argparse.Namespace, device: torch.device
) -> DataLoader | None:
    """None where the split is absent, empty, or does not tell its targets."""
    if dataset is None or dataset.target == "none" or not len(dataset):
        return None
    return make_loader(dataset, make_sampler(dataset, args, False), device, args.num_workers)

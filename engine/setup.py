"""What training and export share: the process, the device, the features of a folder, loaders."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from dataset import BatchSampler, MyDataset
from engine.flags import DEFAULT_MM_EMB_ID, MODEL_VECTORS_UP_TO
from engine.signals import leave_signals_to_parent
from files.atomic_io import DataError
from files.data_folder import Manifest, check_re_ids, read_indexer
from files.features import Feature, load_features
from files.item_vectors import find_vectors, is_by_re_id, load_vectors
from ops.collectives import is_main_process, join, rank, world_size

try:
    import resource
except ImportError:  # Windows
    resource = None

log = logging.getLogger("hstu")

# Forked loader processes share the counts and vectors of this one, others get copies.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
SHARED_MEMORY = "/dev/shm"  # through which loader processes send batches, on Linux
FILES_PER_PROCESS = 20  # that this process opens for a loader process; 19 were counted


def set_up_process(args: argparse.Namespace) -> None:
    """Set up memory and the connection to the other processes; check what flags say of them.

    Raises:
        DataError: these flags do not fit together.
    """
    keep_freed_memory()
    join(args.device.startswith("cuda") and torch.cuda.is_available())
    if not is_main_process():
        log.setLevel(logging.ERROR)
    if world_size() > 1 and (args.inference_only or args.evaluate):
        name = "--inference_only" if args.inference_only else "--evaluate"
        raise DataError(f"{name} runs in one process: start python, not torchrun")
    if world_size() > 1 and ":" in args.device:
        raise DataError(f"--device {args.device}: each process takes its own; write --device cuda")
    if os.path.realpath(args.output_dir) == os.path.realpath(args.data_dir):
        raise DataError(f"{args.output_dir}: --output_dir is the data folder; name another one")
    if args.init_from and Path(args.init_from).resolve().parent == Path(args.output_dir).resolve():
        raise DataError(
            f"{args.init_from}: --init_from lies in --output_dir, but a training replaces the "
            "models there; name another --output_dir"
        )
    if args.trust_pickle:
        log.warning("--trust_pickle: .pkl files are loaded unchecked and can run any code")


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a training step frees for the next one.

    Getting it back from the system takes up to an eighth of a step on the CPU (docs/log.md).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD: so much free memory stays at the heap's end
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: arrays up to this size come from the heap


def pick_device(name: str) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        log.info("no CUDA device here: running on the CPU")
        return torch.device("cpu")
    if name == "cuda" and world_size() > 1:
        return torch.device("cuda", torch.cuda.current_device())
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DataError(f"--device {name}: there are cuda:0 to cuda:{count - 1}; name one of them")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def read_features(
    data_dir: str | Path,
    manifest: Manifest,
    item_features: Sequence[str],
    user_features: Sequence[str],
    vector_ids: Sequence[str],
    trust_pickle: bool,
) -> tuple[dict[str, Feature], dict[str, Feature]]:
    """Features of a data folder's items, multimodal vectors among them, and of its users.

    `item_features`, `user_features`: ids, or the one word "all" or "none". `vector_ids`: of
    multimodal vectors; the flag's default need not be there.

    Raises:
        DataError: a file or a value is bad, or a feature does not exist.
    """
    items = load_features(data_dir, "item", manifest.num_items, _wanted(item_features))
    users = load_features(data_dir, "user", manifest.num_users, _wanted(user_features))
    available = find_vectors(data_dir)
    if vector_ids is DEFAULT_MM_EMB_ID and not set(vector_ids) <= set(available):
        log.info("no multimodal vectors %s in this data: going on without", *vector_ids)
        vector_ids = []
    if twice := (items.keys() | users.keys()) & set(vector_ids):
        raise DataError(
            f"{data_dir}: {', '.join(sorted(twice))} is a feature and a multimodal vector, but an "
            "id is unique; choose with --item_features, --user_features and --mm_emb_id"
        )
    if vector_ids:
        item_ids, path = {}, Path(data_dir) / "indexer.pkl"
        by_re_id = {name for name, source in available.items() if is_by_re_id(source)}
        if path.exists() or not by_re_id.issuperset(vector_ids):
            item_ids = read_indexer(data_dir, trust=trust_pickle)["i"]
            check_re_ids(path, "i", item_ids, manifest.num_items)
        options = {"trust_pickle": trust_pickle}
        items |= load_vectors(data_dir, vector_ids, item_ids, manifest.num_items, **options)
    return items, users


def _wanted(values: Sequence[str]) -> str | Sequence[str]:
    return values[0] if list(values) in (["all"], ["none"]) else values


def vectors_on_host(features: Mapping[str, Feature], place: str) -> dict[str, Feature]:
    """The multimodal vectors that stay on disk and come with the batches (--mm_emb_device)."""
    vectors = {name: feature for name, feature in features.items() if feature.kind == "emb"}
    size = sum(feature.values.nbytes for feature in vectors.values())
    is_with_model = place == "model" or (place == "auto" and size <= MODEL_VECTORS_UP_TO)
    return {} if is_with_model else vectors


def raise_file_limit(num_workers: int) -> None:
    """Let this process open as many files as it may.

    Raises:
        DataError: too few for so many loader processes, which else would hang.
    """
    if resource is None:
        return
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_PER_PROCESS * (1 + 2 * num_workers)  # of training and of validation
    if limit >= needed:
        return
    if most != resource.RLIM_INFINITY and most < needed:
        raise DataError(
            f"{most} open files are allowed, but {num_workers} loader processes need {needed}; "
            "raise ulimit -n, or lower --num_workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


def collate_with_room(collate_fn: Callable[[Any], Any], fetched: Any) -> Any:
    """A batch; in a loader process only if it has room to send it, as else the run would hang.

    Raises:
        DataError: there is no room.
    """
    batch, worker = collate_fn(fetched), get_worker_info()
    if worker is not None and os.path.isdir(SHARED_MEMORY):
        fields = [*batch, *chain.from_iterable((batch.item_vectors | batch.orders).values())]
        needed = sum(field.nbytes for field in fields if isinstance(field, torch.Tensor))
        disk = os.statvfs(SHARED_MEMORY)
        if disk.f_bavail * disk.f_frsize < needed * worker.num_workers:
            raise DataError(
                f"{SHARED_MEMORY}: no room for a batch of {needed / 1e6:.1f} MB in its "
                f"{disk.f_blocks * disk.f_frsize / 1e6:.0f} MB; enlarge it (docker run --shm-size "
                "1g), or lower --batch_size or --num_workers"
            )
    return batch


def make_loader(
    dataset: MyDataset,
    batch_size: int,
    seed: int,
    device: torch.device,
    num_workers: int,
    is_shuffled: bool = False,
) -> DataLoader:
    """Batches of this process's share, as `loader.batch_sampler` draws them."""
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has none
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    num_workers, share = min(num_workers, num_cores), (rank(), world_size())
    if num_workers:
        raise_file_limit(num_workers)
        tempfile.gettempdir()  # raises OSError if none can be written to: batches come through it
    return DataLoader(
        dataset,
        batch_sampler=BatchSampler(len(dataset), batch_size, seed, is_shuffled, *share),
        collate_fn=partial(collate_with_room, dataset.collate_fn),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_signals_to_parent,
        multiprocessing_context=START_METHOD if num_workers else None,
        # A loader draws a seed; dropout's draws from the global generator must not depend on that.
        generator=torch.Generator(),
    )

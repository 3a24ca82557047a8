"""The parts of a training, made of its flags: datasets, model, training step."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset import MyDataset, Negatives
from engine.flags import (
    ALL_NEGATIVES_UP_TO,
    BATCH_SIZE,
    FREE_FLAGS,
    MIN_UPDATES,
    MOST_REPEATS,
    get_args,
)
from engine.kernels import choose_kernels
from engine.setup import make_loader, pick_device, read_features, vectors_on_host
from engine.state import STATE_FORMAT, Run
from engine.trained_model import read_model
from engine.training_step import Optimization, TrainingStep
from engine.warm_start import standardised_as
from files.atomic_io import DataError
from files.data_folder import Manifest, fingerprint, read_manifest
from files.features import Feature
from files.sequences import Split
from hstu_components import DENSE_ROWS, encoder_arguments
from model import HSTUConfig, HSTUModel
from ops.collectives import main_process_first, world_size
from ops.sharded_table import ShardedEmbedding
from simplified_hstu import HSTU, HSTUAttention

log = logging.getLogger("hstu")

# Targets of a step, below which --min_updates cuts no batch: in short histories, of few targets
# each, smaller batches did worse (docs/log.md).
LEAST_TARGETS = 4096


def prepare_run(args: argparse.Namespace, model_class: type[HSTUModel] = HSTUModel) -> Run:
    """A fresh model over the data that the flags name, and what trains it.

    Raises:
        DataError: the data is bad, or does not fit the flags.
    """
    manifest = read_manifest(args.data_dir, trust=args.trust_pickle)
    wanted = args.item_features, args.user_features, args.mm_emb_id
    with main_process_first():  # it caches parsed features beside their files
        features = read_features(args.data_dir, manifest, *wanted, args.trust_pickle)
    datasets, item_counts = open_datasets(args, manifest, features[0])
    train_set, device = datasets["train"], pick_device(args.device)
    earlier = read_model(args.init_from).config if args.init_from else None
    config = make_config(args, manifest, features, datasets, earlier)
    kernels = choose_kernels(args.kernels, device, config, args.precision)
    torch.manual_seed(args.seed)
    options = {"kernels": kernels, "shards_items": shards_items(args, train_set)}
    model = model_class(config, *features, on_host=train_set.host_vectors, **options).to(device)
    model.hstu.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        compile_blocks(model.hstu, kernels)
    batch_size = cut_batch_size(args, train_set)
    num_batches = -(-len(train_set) // batch_size)
    total_steps = args.num_epochs * -(-num_batches // args.accumulate_steps)
    warmup = min(100, total_steps // 10) if args.warmup_steps is None else args.warmup_steps
    names = ("lr", "weight_decay", "muon", "clip_grad", "precision", "seed")
    optimization = Optimization(
        total_steps=total_steps,
        warmup_steps=warmup,
        **{name: getattr(args, name) for name in names},
    )
    training_step = TrainingStep(model, optimization, train_set.negatives.kind == "all")
    binding = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS} | {
        "state format": STATE_FORMAT,
        "sequences in a batch": batch_size,
        "config": asdict(config),
        "data": manifest._asdict() | {"sequences": len(train_set)},
        "data files": fingerprint(args.data_dir),
    }
    counts = torch.from_numpy(item_counts)
    parts = model, training_step, datasets, counts, batch_size
    return Run(*parts, Path(args.output_dir), binding, kernels)


def cut_batch_size(args: argparse.Namespace, train_set: MyDataset) -> int:
    """Sequences in a training batch: --batch_size, or fewer for --min_updates steps an epoch."""
    least = args.min_updates
    if least is None:
        is_default = (args.batch_size, args.accumulate_steps) == (BATCH_SIZE, 1)
        least = MIN_UPDATES if is_default else 0
    if not least:
        return args.batch_size
    targets = train_set.negatives.target_counts.sum() / len(train_set)  # of a sequence, in the mean
    for_steps = len(train_set) // (least * args.accumulate_steps)
    for_targets = math.ceil(LEAST_TARGETS / (targets * args.accumulate_steps))
    return min(args.batch_size, max(1, for_steps, for_targets))


def open_datasets(
    args: argparse.Namespace, manifest: Manifest, item_features: Mapping[str, Feature]
) -> tuple[dict[str, MyDataset], np.ndarray]:
    """The splits there are, with the negatives asked for; and each item's events in training."""
    negatives, item_counts = count_negatives(args, manifest, bool(item_features))
    host_vectors = vectors_on_host(item_features, args.mm_emb_device)
    options = {"has_windows": args.windows, "trust_pickle": args.trust_pickle}
    options |= {"maxlen": args.maxlen, "negatives": negatives, "host_vectors": host_vectors}
    options["target_actions"] = target_types(args, manifest)
    return {s: MyDataset(args.data_dir, s, **options) for s in manifest.targets}, item_counts


def count_negatives(
    args: argparse.Namespace, manifest: Manifest, has_item_features: bool
) -> tuple[Negatives, np.ndarray]:
    """The negatives that the flags say, and (X + 1,) each item's events in training."""
    kind = args.negatives
    if kind == "auto":
        kind = "all" if manifest.num_items <= ALL_NEGATIVES_UP_TO else "mixed"
    train = Split(Path(args.data_dir), "train", *manifest[:3])
    item_counts = train.count_items()
    maxlen = None if args.windows else args.maxlen
    target_counts = train.count_targets(item_counts, maxlen, target_types(args, manifest))
    negatives = Negatives(
        manifest.num_items, kind, args.num_negatives, target_counts, args.logq,
        only_trained=has_item_features,
    )  # fmt: skip
    return negatives, item_counts


def target_types(args: argparse.Namespace, manifest: Manifest) -> list[int] | None:
    """The action types that --target_actions names; None: any.

    Raises:
        DataError: the data has no such type.
    """
    if args.target_actions is None:
        return None
    known = manifest.action_types()
    if unknown := [name for name in args.target_actions if name not in known]:
        raise DataError(
            f"--target_actions {' '.join(unknown)}: no action of {args.data_dir}, expected "
            f"{', '.join(known) or 'data with actions'}"
        )
    return [known[name] for name in args.target_actions]


def eval_loader(args: argparse.Namespace, run: Run, split: str) -> DataLoader | None:
    """None where the split is absent, empty, or without known targets."""
    dataset = run.datasets.get(split)
    if dataset is None or dataset.target == "none" or not len(dataset):
        return None
    return make_loader(dataset, args.batch_size, args.seed, run.device, args.num_workers)


def make_config(
    args: argparse.Namespace, manifest: Manifest, features: tuple,
    datasets: Mapping[str, MyDataset], earlier: HSTUConfig | None,
) -> HSTUConfig:  # fmt: skip
    """Of the flags and the data; `earlier`: of the model that a training starts from."""
    options = args.mm_missing, args.mm_projection
    items, users = (
        {name: encoder_arguments(feature, *options) for name, feature in side.items()}
        for side in features
    )
    same = (
        "maxlen", "hidden_units", "num_blocks", "num_heads", "attention_dim", "linear_dim",
        "dropout_rate", "id_dropout", "mix_previous", "position_bias", "infonce_temp", "time_head",
    )  # fmt: skip
    removal, residual = args.remove_seen, args.history_residual
    if earlier is not None and removal == "auto":
        removal = "on" if earlier.removes_seen else "off"
    if earlier is not None and residual == "auto":
        residual = "on" if earlier.history_residual else "off"
    config = HSTUConfig(
        num_items=manifest.num_items,
        num_action_types=manifest.num_action_types if args.actions else 0,
        num_target_action_types=manifest.num_action_types if args.target_action else 0,
        item_features=items,
        user_features=users,
        time_bias=args.time_bias if datasets["train"].sequences.has_times else "off",
        item_ids_digest=manifest.item_ids_digest,
        action_names=manifest.action_names,
        feature_digests=manifest.feature_digests,
        **repeats(removal, residual, datasets),
        **{name: getattr(args, name) for name in same},
    )
    if config.time_head and config.time_bias == "off" and not config.position_bias:
        raise DataError("--time_head --no-position_bias: the data has no times; leave one out")
    return config if earlier is None else standardised_as(config, earlier)


def repeats(
    remove_seen: str, history_residual: str, datasets: Mapping[str, MyDataset]
) -> dict[str, bool]:
    """What --remove_seen and --history_residual, of which "auto" follows the data, come to."""
    are_many = False
    if "auto" in (remove_seen, history_residual):
        has_valid = "valid" in datasets and datasets["valid"].target != "none"
        share = datasets["valid" if has_valid else "train"].sequences.repeat_share()
        are_many = share > MOST_REPEATS
    if are_many:
        chosen = {"--remove_seen is off": remove_seen, "--history_residual is on": history_residual}
        what = " and ".join(text for text, choice in chosen.items() if choice == "auto")
        targets = "validation targets" if has_valid else "training sequences' last items"
        found = f"{100 * share:.1f} % of the {targets} are items that their users had before"
        log.info("%s: %s", what, found)
    return {
        "removes_seen": not are_many if remove_seen == "auto" else remove_seen == "on",
        "history_residual": are_many if history_residual == "auto" else history_residual == "on",
    }


def shards_items(args: argparse.Namespace, train_set: MyDataset) -> bool:
    """Whether each process is to hold a part of the item table.

    Raises:
        DataError: a table is sharded only if it is trained by rows, with the same steps everywhere.
    """
    if not args.shard_items or world_size() == 1:
        return False
    kind = train_set.negatives.kind
    if kind == "all" or train_set.num_items < DENSE_ROWS or args.precision == "fp16":
        raise DataError(
            f"--shard_items with {train_set.num_items:,} items, {kind} negatives, {args.precision}:"
            f" it needs {DENSE_ROWS:,} items, sampled negatives (--negatives mixed), fp32 or bf16"
        )
    return True


def compile_blocks(hstu: HSTU, kernels: str) -> None:
    """Compile each block, once for all lengths; without Triton's attention, what follows it alone.

    The attention in torch is a loop over groups, whose number and shapes follow the lengths.
    """
    for block in hstu.blocks:
        if isinstance(block, HSTUAttention):  # not one of your own
            if kernels == "triton":
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)
            else:
                block.merge = torch.compile(block.merge, dynamic=True)


def announce(args: argparse.Namespace, run: Run) -> None:
    """One line that says what will happen, and a warning for each flag that does nothing."""
    train_set, total_steps = run.datasets["train"], run.training_step.options.total_steps
    place = run.device if world_size() == 1 else f"{world_size()} x {run.device.type}"
    what = "windows of sequences" if train_set.is_cut else "sequences"
    log.info(
        f"train on {place} in {args.precision}: {len(train_set):,} {what}, "
        f"{train_set.num_items:,} items, {run.item_counts.sum():,} events of {args.data_dir}; "
        f"{num_weights(run.model):,} weights, {train_set.negatives.kind} negatives; "
        f"{args.num_epochs} epochs, {total_steps:,} steps"
    )
    if run.batch_size < args.batch_size:
        found = f"batches of {run.batch_size} sequences instead of {args.batch_size}"
        log.info("%s, for more steps an epoch; --min_updates 0 keeps them whole", found)
    if args.precision != "fp32" and run.device.type == "cpu":
        log.warning("--precision %s: fp32 is faster on a CPU (docs/speed.md)", args.precision)
    if args.warmup_steps and args.warmup_steps > total_steps / 5:
        found = f"--warmup_steps {args.warmup_steps}, but there are {total_steps} steps"
        remark = (
            f"the learning rate rises for more than a fifth; try --warmup_steps {total_steps // 10}"
        )
        log.warning("%s: %s", found, remark)
    targets = run.binding["data"]["targets"]
    are_unlike = (targets.get("valid"), targets.get("test")) == ("last", "none")
    if run.model.config.time_bias == "request" and are_unlike:
        log.warning(
            "--time_bias request: the validation knows the times of its targets, which the test "
            "split lacks; --time_bias event is measured as it will rank"
        )
    if not train_set.sequences.has_times:
        log.info("the data holds plain item ids: time and actions are off")
    defaults = get_args([])
    for name, is_idle, reason in idle_flags(run):
        value = getattr(args, name)
        if is_idle and value != getattr(defaults, name):
            log.warning("--%s%s changes nothing %s", "no-" * (value is False), name, reason)


def num_weights(model: HSTUModel) -> int:
    """Of the whole model, with other processes' rows of its sharded tables."""
    shards = [module for module in model.modules() if isinstance(module, ShardedEmbedding)]
    elsewhere = [(shard.num_rows - len(shard.weight)) * shard.embedding_dim for shard in shards]
    return sum(p.numel() for p in model.parameters()) + sum(elsewhere)


def idle_flags(run: Run) -> list[tuple[str, bool, str]]:
    """Flags that may do nothing, whether so in this run, and the reason."""
    train_set, specs = run.datasets["train"], run.model.config.item_features.values()
    kind, has_vectors = train_set.negatives.kind, any(spec["kind"] == "emb" for spec in specs)
    has_valid = getattr(run.datasets.get("valid"), "target", "none") != "none"
    of_vectors = ("mm_missing", "mm_projection", "mm_emb_device")
    return [
        ("num_negatives", kind in ("all", "batch"), f"with {kind} negatives"),
        ("logq", kind in ("all", "uniform"), f"with {kind} negatives"),
        ("shard_items", world_size() == 1, "in a single process"),
        ("target_action", not train_set.num_action_types, "without actions in the data"),
        ("id_dropout", not specs, "without item features"),
        *((n, not has_valid, "without a validation") for n in ("patience", "early_stop_on")),
        *((name, not has_vectors, "without multimodal vectors") for name in of_vectors),
    ]

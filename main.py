"""Command line, run directory, and the train, validate and infer loops."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from atomic_io import DataError, file_entry, read_json, sweep_temporaries, write_json
from checkpoint import (
    differences,
    load_checkpoint,
    load_newest_state,
    load_weights,
    random_states,
    save_checkpoint,
    save_state,
    set_random_states,
)
from data_folder import (
    Manifest,
    check_re_ids,
    fingerprint,
    original_ids,
    read_candidates,
    read_indexer,
    read_manifest,
)
from dataset import Batch, BatchSampler, MyDataset, count_items, save_emb
from features import Feature, find_vectors, load_features, load_vectors
from flags import (
    ALL_NEGATIVES_UP_TO,
    DEFAULT_MM_EMB_ID,
    FREE_FLAGS,
    MODEL_VECTORS_UP_TO,
    get_args,
)
from hstu_components import FeatureTables, encoder_arguments
from metrics import ranking_metrics
from model import HSTUConfig, HSTUModel
from run_log import RunLog, summary

log = logging.getLogger("hstu")

ADAM_BETAS = (0.9, 0.98)  # the reference's
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Progress:
    """Where a run stands; a part of every saved state."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # loader batches used of the epoch under way
    step: int = 0  # optimiser steps
    loss_sum: float = 0.0  # over the steps of the epoch under way
    loss_steps: int = 0
    best_epoch: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    is_finished: bool = False


@dataclass
class Run:
    """The collaborators of the training loop."""

    args: argparse.Namespace
    device: torch.device
    model: HSTUModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    total_steps: int
    binding: dict[str, Any]  # flags and data that a resumed run must share
    progress: Progress = field(default_factory=Progress)


def main(argv: list[str] | None = None) -> int:
    """Train or infer as the command line says; the exit code."""
    args = get_args(argv)
    handler = logging.StreamHandler(sys.stdout)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        check_folders(args)
        with logging_redirect_tqdm(loggers=[log]):
            infer(args) if args.inference_only else train(args)
    except (DataError, OSError, MemoryError, RuntimeError) as error:
        line = one_line(error)
        if args.debug or not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1
    finally:
        log.removeHandler(handler)
    return 0


def check_folders(args: argparse.Namespace) -> None:
    if Path(args.output_dir).resolve() == Path(args.data_dir).resolve():
        raise DataError(f"{args.output_dir}: --output_dir is the data folder; name another one")
    for flag in ("output_dir", "log_dir"):
        path = Path(vars(args)[flag])
        if path.exists() and not path.is_dir():
            raise DataError(f"{path}: --{flag} is not a folder; name another one")


def one_line(error: Exception) -> str:
    """What a user can act on, without its traceback; empty for a fault of the program."""
    text = str(error)
    if text.startswith("Caught "):  # in a loader process, whose traceback comes before the message
        text = text.rstrip().rpartition("Error: ")[2]
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, DataError | OSError):
        return text
    if re.search("out of memory|allocate memory|not enough memory|Unable to allocate", text):
        first = text.splitlines()[0]
        return f"not enough memory, lower --batch_size or the model's widths ({first:.150})"
    return ""


# ----------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> None:
    """Train, validate after each epoch, test the best epoch once; everything ends in output_dir."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(output_dir)
    manifest = read_manifest(args.data_dir)
    features = read_features(args, manifest)
    datasets = open_datasets(args, manifest, vectors_on_host(args, features[0]))
    run = prepare_run(args, manifest, features, datasets["train"])
    resume(run)
    if not run.progress.is_finished:
        announce(run, datasets)
        first_step = run.progress.step + 1
        lengths = run.total_steps, args.num_epochs, args.log_every
        with RunLog(args.log_dir, first_step, *lengths) as run_log:
            if first_step == 1:
                run_log.start(vars(args))
            train_epochs(run, datasets, run_log)
    report(run, datasets)


def open_datasets(
    args: argparse.Namespace, manifest: Manifest, host_vectors: Mapping[str, Feature]
) -> dict[str, MyDataset]:
    """The splits there are, each with the negatives that the flags ask for."""
    negatives = args.negatives
    if negatives == "auto":
        negatives = "all" if manifest.num_items <= ALL_NEGATIVES_UP_TO else "mixed"
    options = {
        "maxlen": args.maxlen,
        "negatives": negatives,
        "num_negatives": args.num_negatives,
        "has_logq": args.logq,
        "request_time": args.request_time,
        "host_vectors": host_vectors,
    }
    counts = count_items(args.data_dir, "train", manifest.num_items)
    return {
        split: MyDataset(args.data_dir, split, item_counts=counts, **options)
        for split in manifest.targets
    }


def prepare_run(
    args: argparse.Namespace, manifest: Manifest, features: tuple[dict, dict], train_set: MyDataset
) -> Run:
    """A fresh model and what trains it."""
    device = pick_device(args.device)
    config = make_config(args, manifest, features, train_set.has_timestamps)
    torch.manual_seed(args.seed)
    model = HSTUModel(config, *features, on_host=train_set.host_vectors).to(device)
    model.hstu.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.hstu.compile_blocks()
    num_batches = -(-len(train_set) // args.batch_size)
    return Run(
        args=args,
        device=device,
        model=model,
        optimizer=make_optimizer(model, args),
        scaler=torch.amp.GradScaler(device.type, enabled=args.precision == "fp16"),
        total_steps=args.num_epochs * -(-num_batches // args.accumulate_steps),
        binding={k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
        | {
            "config": asdict(config),
            "data": manifest._asdict() | {"sequences": len(train_set)},
            "data files": fingerprint(args.data_dir),
        },
    )


def pick_device(name: str) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        log.info("no CUDA device here: running on the CPU")
        return torch.device("cpu")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DataError(f"--device {name}: there are cuda:0 to cuda:{count - 1}; name one of them")
    return device


def read_features(args: argparse.Namespace, manifest: Manifest) -> tuple[dict, dict]:
    """Item and user features, the multimodal vectors among the former."""
    folder = args.data_dir
    items = load_features(folder, "item", manifest.num_items, wanted(args.item_features))
    users = load_features(folder, "user", manifest.num_users, wanted(args.user_features))
    wanted_vectors, available = args.mm_emb_id, find_vectors(folder)
    if wanted_vectors is DEFAULT_MM_EMB_ID and not set(wanted_vectors) <= set(available):
        log.info("no multimodal vectors %s in this data: going on without", *wanted_vectors)
        wanted_vectors = []
    if wanted_vectors:
        item_ids = read_indexer(folder, trust=args.trust_pickle)["i"]
        check_re_ids(Path(folder) / "indexer.pkl", "i", item_ids, manifest.num_items)
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


def make_config(
    args: argparse.Namespace, manifest: Manifest, features: tuple, has_timestamps: bool
) -> HSTUConfig:
    specs = [
        {
            name: encoder_arguments(feature, args.mm_missing, args.mm_projection)
            for name, feature in side.items()
        }
        for side in features
    ]
    return HSTUConfig(
        num_items=manifest.num_items,
        num_action_types=manifest.num_action_types if args.actions else 0,
        item_features=specs[0],
        user_features=specs[1],
        maxlen=args.maxlen,
        hidden_units=args.hidden_units,
        num_blocks=args.num_blocks,
        num_heads=args.num_heads,
        attention_dim=args.attention_dim,
        linear_dim=args.linear_dim,
        dropout_rate=args.dropout_rate,
        time_bias=args.time_bias if has_timestamps else "off",
        position_bias=args.position_bias,
        infonce_temp=args.infonce_temp,
    )


def make_optimizer(model: HSTUModel, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; weight decay for matrices only: on a table it would shrink items that never occur."""
    tables = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
    }
    groups: dict[bool, list] = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.dim() == 2 and id(parameter) not in tables].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": args.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=ADAM_BETAS,
    )


def resume(run: Run) -> None:
    """Put the newest state of output_dir, or the one that --resume names, into the run.

    Raises:
        DataError: the state belongs to other flags or other data, or output_dir holds a run that
            --resume none would overwrite.
    """
    args, output_dir = run.args, Path(run.args.output_dir)
    if args.resume == "none":
        if list(output_dir.glob("*.pt")) and not args.overwrite:
            raise DataError(
                f"{output_dir}: holds checkpoints; choose an empty --output_dir, or add --overwrite"
            )
        for pattern in ("model_*.pt", "resume_*.pt", "checkpoints.json", "metrics.json"):
            for old in output_dir.glob(pattern):
                old.unlink()
        return
    is_auto = args.resume == "auto"
    state = load_newest_state(output_dir) if is_auto else load_checkpoint(args.resume)
    if state is None:
        return
    if "progress" not in state:
        raise DataError(f"{args.resume}: holds weights only; resume from a resume_*.pt file")
    changed = differences(state["binding"], run.binding)
    if changed:
        raise DataError(
            f"{output_dir if is_auto else args.resume}: was trained with other settings: "
            + "; ".join(changed)
            + ". Use the same ones, or another --output_dir"
        )
    load_weights(run.model, state["weights"], args.resume)
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    set_random_states(state["random"])
    run.progress = Progress(**state["progress"])
    if not run.progress.is_finished:
        log.info("resuming at epoch %d, step %d", run.progress.epoch + 1, run.progress.step)


def train_epochs(run: Run, datasets: dict[str, MyDataset], run_log: RunLog) -> None:
    """The epochs that are left, each followed by validation and checkpoints."""
    args, progress = run.args, run.progress
    sampler = BatchSampler(len(datasets["train"]), args.batch_size, args.seed, is_shuffled=True)
    train_loader = make_loader(datasets["train"], sampler, run.device, args.num_workers)
    valid_loader = make_eval_loader(datasets.get("valid"), run)
    while not progress.is_finished:
        sampler.epoch, sampler.first_batch = progress.epoch, progress.batch
        started = time.perf_counter()
        train_one_epoch(run, train_loader, run_log)
        seconds = time.perf_counter() - started
        metrics = {} if valid_loader is None else evaluate(run, valid_loader)
        count_epoch(progress, metrics, args)
        train_loss = progress.loss_sum / max(1, progress.loss_steps)
        progress.loss_sum, progress.loss_steps = 0.0, 0
        is_best = progress.best_epoch == progress.epoch
        run_log.epoch(progress.epoch, progress.step, train_loss, metrics, is_best, seconds)
        save_epoch(run)


def count_epoch(progress: Progress, metrics: Mapping[str, float], args: argparse.Namespace) -> None:
    """The epoch is over: whether it is the best, and whether it is the last."""
    progress.epoch, progress.batch = progress.epoch + 1, 0
    if is_better(metrics, progress.best_metrics, args.early_stop_on):
        progress.best_epoch, progress.best_metrics = progress.epoch, dict(metrics)
    is_out_of_patience = 0 < args.patience <= progress.epoch - progress.best_epoch
    progress.is_finished = progress.epoch >= args.num_epochs or is_out_of_patience


def save_epoch(run: Run) -> None:
    """Write model_epoch_X.pt, model_best.pt where it is the best, and the state to resume from."""
    progress, output_dir = run.progress, Path(run.args.output_dir)
    content = {"config": asdict(run.model.config), "weights": run.model.state_dict()}
    save_checkpoint(output_dir / f"model_epoch_{progress.epoch}.pt", content, progress.step)
    if progress.best_epoch == progress.epoch:
        save_checkpoint(output_dir / "model_best.pt", content, progress.step)
    save_run(run)


def is_better(metrics: Mapping[str, float], best: Mapping[str, float], criterion: str) -> bool:
    """Whether these validation metrics beat the best; without validation the newest is best."""
    if not metrics or not best:
        return True
    if criterion == "loss":
        return metrics["loss"] < best["loss"]
    return metrics["NDCG@10"] > best["NDCG@10"]


def save_run(run: Run) -> None:
    content = {
        "config": asdict(run.model.config),
        "weights": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "random": random_states(),
        "progress": asdict(run.progress),
        "binding": run.binding,
    }
    save_state(run.args.output_dir, content, run.progress.step)


def train_one_epoch(run: Run, loader: DataLoader, run_log: RunLog) -> None:
    """The steps that are left of the epoch under way.

    Raises:
        DataError: the data changed; or the loss or the gradient is not finite, and the weights are
            those of the step before.
    """
    args, progress = run.args, run.progress
    loader.dataset.check_unchanged()
    run.model.train()
    groups = groups_of(loader, args.accumulate_steps)
    num_batches = progress.batch + len(loader)
    for batches in run_log.watch(groups, progress.epoch + 1, progress.batch, num_batches):
        values = train_step(run, batches)
        progress.batch += len(batches)
        progress.step += 1
        progress.loss_sum += values["Loss/train"]
        progress.loss_steps += 1
        run_log.step(progress.epoch + 1, progress.step, batches, values)
        if args.save_every_steps and progress.step % args.save_every_steps == 0:
            save_run(run)


def groups_of(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def train_step(run: Run, batches: list[Batch]) -> dict[str, float]:
    """One update from one or several batches, as if they were one; TensorBoard tags and values."""
    args, step = run.args, run.progress.step
    counts = [int((batch.target_index >= 0).sum()) for batch in batches]
    loss = torch.zeros((), device=run.device)
    for batch, count in zip(batches, counts, strict=True):
        with autocast(run):
            part = run.model(batch.to(run.device)) * (count / max(1, sum(counts)))
        run.scaler.scale(part).backward()
        loss += part.detach()
    run.scaler.unscale_(run.optimizer)
    limit = args.clip_grad or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit)
    is_finite = torch.isfinite(loss + (0 if run.scaler.is_enabled() else grad_norm))
    if not is_finite:
        raise DataError(
            f"epoch {run.progress.epoch + 1} step {step + 1}: loss {loss.item()}, gradient norm "
            f"{grad_norm.item()}; nothing was updated. Lower --lr or raise --infonce_temp, and "
            "check the features for huge values"
        )
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, run.total_steps, args)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return {
        "Loss/train": loss.item(),
        "Train/grad_norm": grad_norm.item(),
        "Train/lr": run.optimizer.param_groups[0]["lr"],
    }


def learning_rate(step: int, total_steps: int, args: argparse.Namespace) -> float:
    """Linear warm-up over --warmup_steps, then a cosine to zero at the last step."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, total_steps - args.warmup_steps)
    return args.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def autocast(run: Run) -> torch.autocast:
    dtype = AUTOCAST_DTYPES[run.args.precision]
    return torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None)


@torch.no_grad()
def evaluate(run: Run, loader: DataLoader) -> dict[str, float]:
    """Mean loss, and the metrics of ranking the whole catalogue for every sequence's target."""
    loader.dataset.check_unchanged()
    model = run.model.eval()
    num_items = model.config.num_items
    items = model.item_embeddings(torch.arange(1, num_items + 1, device=run.device))
    row_of_item = torch.arange(-1, num_items, device=run.device)
    ranks, loss_sum = [], 0.0
    for batch in loader:
        batch = batch.to(run.device)
        with autocast(run):
            queries, loss = model.predict_with_loss(batch)
        seen = seen_rows(batch, row_of_item) if run.args.remove_seen else None
        ranks.append(model.similarity.target_ranks(queries, items, batch.target_ids() - 1, seen))
        loss_sum += loss.item() * len(queries)
    model.train()
    all_ranks = torch.cat(ranks).cpu()
    return ranking_metrics(all_ranks) | {"loss": loss_sum / len(all_ranks)}


def seen_rows(batch: Batch, row_of_item: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The histories' items as rows of a catalogue, and where each sequence's begin."""
    rows = row_of_item[batch.seen_ids]
    is_there = rows >= 0
    offsets = torch.nn.functional.pad(is_there.cumsum(0), (1, 0))[batch.seen_offsets]
    return rows[is_there], offsets


def make_loader(
    dataset: MyDataset, sampler: BatchSampler, device: torch.device, num_workers: int
) -> DataLoader:
    num_workers = min(num_workers, len(os.sched_getaffinity(0)))
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=dataset.collate_fn,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        # Its own, or opening a loader would move the global one that dropout draws from.
        generator=torch.Generator(),
    )


def make_eval_loader(dataset: MyDataset | None, run: Run) -> DataLoader | None:
    """None where the split is absent, empty, or does not tell its targets."""
    if dataset is None or dataset.target == "none" or not len(dataset):
        return None
    sampler = BatchSampler(len(dataset), run.args.batch_size, run.args.seed, is_shuffled=False)
    return make_loader(dataset, sampler, run.device, run.args.num_workers)


def announce(run: Run, datasets: Mapping[str, MyDataset]) -> None:
    """One line that says what will happen."""
    train_set = datasets["train"]
    log.info(
        "train on %s in %s: %s users, %s items, %s negatives, %.2fM weights, %d epochs, %d steps",
        run.device, run.args.precision, f"{len(train_set):,}", f"{train_set.num_items:,}",
        train_set.negatives, sum(p.numel() for p in run.model.parameters()) / 1e6,
        run.args.num_epochs, run.total_steps,
    )  # fmt: skip
    if not train_set.has_timestamps:
        log.info("the data holds plain item ids: time and actions are off")


def report(run: Run, datasets: Mapping[str, MyDataset]) -> None:
    """Test the best epoch once, write metrics.json, and say what there is and what comes next."""
    output_dir, progress = Path(run.args.output_dir), run.progress
    path = output_dir / "metrics.json"
    best = output_dir / "model_best.pt"
    if not path.exists():
        result = {"best_epoch": progress.best_epoch, "valid": progress.best_metrics}
        loader = make_eval_loader(datasets.get("test"), run)
        if loader is not None:
            load_weights(run.model, load_checkpoint(best)["weights"], best)
            result["test"] = evaluate(run, loader)
        write_json(path, result)
    result = read_json(path)
    log.info("finished: %d epochs, best epoch %d", progress.epoch, result["best_epoch"])
    for split in ("valid", "test"):
        if result.get(split):
            log.info("  %-6s %s", split, summary(result[split]))
    log.info("  wrote  %s, model_epoch_*.pt, %s", best, path)
    flags = f"--state_dict_path {best} --data_dir {run.args.data_dir} --output_dir {output_dir}"
    log.info("  next   python main.py --inference_only %s", flags)
    log.info("  curves tensorboard --logdir %s", run.args.log_dir)


# ---------------------------------------------------------------------------------------- inference


class Catalogue(NamedTuple):
    """What is exported and ranked: all items, or a candidate set; n rows."""

    embeddings: torch.Tensor  # (n, D) of length 1
    ids: np.ndarray  # (n,) uint64, as they are exported
    id_kind: str  # "original", "re-id" or "retrieval"
    row_of_item: torch.Tensor  # (X + 1,) int64, -1: not among the rows


@torch.no_grad()
def infer(args: argparse.Namespace) -> None:
    """Export the items' embeddings, and the test users' queries and top-k items."""
    path, output_dir = Path(args.state_dict_path), Path(args.output_dir)
    config, weights = read_model(path)
    manifest = read_manifest(args.data_dir)
    features = read_config_features(args, config, manifest)
    model = HSTUModel(config, *features, on_host=vectors_on_host(args, features[0]))
    model = model.to(pick_device(args.device)).eval()
    load_weights(model, weights, path)
    catalogue = candidates_of(args, model) if args.candidates else all_items(args, model)
    origin = {"checkpoint": path.name, "item_ids": catalogue.id_kind}
    arrays = {"embedding.fbin": catalogue.embeddings.cpu().numpy(), "id.u64bin": catalogue.ids}
    publish(output_dir / "item_embeddings", arrays, origin)
    if "test" not in manifest.targets:
        return
    options = {"negatives": "batch", "request_time": args.request_time}
    dataset = MyDataset(args.data_dir, "test", config.maxlen, **options)
    if not len(dataset):
        return
    queries, users, top_rows = recommend(args, model, dataset, catalogue)
    user_ids, kind = exported_ids(args, "u", manifest.num_users)
    top_ids = np.where(top_rows < 0, -1, catalogue.ids.astype(np.int64)[top_rows])
    arrays = {"embedding.fbin": queries, "topk.u64bin": top_ids, "id.u64bin": user_ids[users]}
    publish(output_dir / "user_embeddings", arrays, origin | {"user_ids": kind})


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
    embeddings = model.item_embeddings(torch.arange(1, num_items + 1, device=device))
    return Catalogue(embeddings, ids[1:], kind, torch.arange(-1, num_items, device=device))


def candidates_of(args: argparse.Namespace, model: HSTUModel) -> Catalogue:
    """The candidate folder's items; one that is not in the catalogue is what its features say."""
    config, device = model.config, next(model.parameters()).device
    candidates = read_candidates(args.candidates, config.num_items)
    count = len(candidates.item_ids)
    vectors = [name for name, spec in config.item_features.items() if spec["kind"] == "emb"]
    plain = [name for name in config.item_features if name not in vectors]
    features = load_features(args.candidates, "item", count, plain) if plain else {}
    rows = {original: row for row, original in enumerate(candidates.original_ids.tolist(), 1)}
    for name in vectors:  # the candidates' own, else the data's by original id
        folder = args.candidates if name in find_vectors(args.candidates) else args.data_dir
        features |= load_vectors(folder, [name], rows, count, trust_pickle=args.trust_pickle)
    tables = FeatureTables(features, vectors_on_host(args, features)).to(device)
    item_ids = torch.from_numpy(candidates.item_ids.astype(np.int64)).to(device)
    rows = torch.arange(1, count + 1, device=device)
    row_of_item = torch.full((config.num_items + 1,), -1, device=device)
    row_of_item[item_ids] = rows - 1
    row_of_item[0] = -1
    embeddings = model.item_embeddings(item_ids, tables, rows)
    return Catalogue(embeddings, candidates.retrieval_ids, "retrieval", row_of_item)


def read_config_features(
    args: argparse.Namespace, config: HSTUConfig, manifest: Manifest
) -> tuple[dict, dict]:
    """The features that a checkpoint's model was built with, from data_dir.

    Raises:
        DataError: the data has other items or features than the model knows.
    """
    sides = config.item_features, config.user_features
    vectors = [name for name, spec in sides[0].items() if spec["kind"] == "emb"]
    plain = [[name for name in side if name not in vectors] or ["none"] for side in sides]
    flags = {"item_features": plain[0], "user_features": plain[1], "mm_emb_id": vectors}
    features = read_features(argparse.Namespace(**vars(args) | flags), manifest)
    known = {"items": config.num_items}
    found = {"items": manifest.num_items}
    for specs, loaded in zip(sides, features, strict=True):
        known |= {name: (spec["kind"], spec["size"]) for name, spec in specs.items()}
        found |= {name: (feature.kind, feature.size) for name, feature in loaded.items()}
    if changed := differences(known, found):
        raise DataError(
            f"{args.data_dir}: not the data that {args.state_dict_path} was trained on: "
            + "; ".join(changed)
        )
    return features


def exported_ids(args: argparse.Namespace, side: str, count: int) -> tuple[np.ndarray, str]:
    """(count + 1,) uint64 ids by re-id, and which kind they are."""
    ids = original_ids(args.data_dir, side, count, trust=args.trust_pickle)
    if ids is not None:
        return ids, "original"
    return np.arange(count + 1, dtype=np.uint64), "re-id"


def recommend(
    args: argparse.Namespace, model: HSTUModel, dataset: MyDataset, catalogue: Catalogue
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The test users' queries (S, D), user re-ids (S,), and rows of their top-k items (S, k)."""
    device = catalogue.embeddings.device
    sampler = BatchSampler(len(dataset), args.batch_size, args.seed, is_shuffled=False)
    loader = make_loader(dataset, sampler, device, args.num_workers)
    queries, users, rows = [], [], []
    for batch in tqdm(loader, desc="users", unit="batch", leave=False, disable=None):
        batch = batch.to(device)
        queries.append(model.predict(batch))
        seen = seen_rows(batch, catalogue.row_of_item) if args.remove_seen else None
        top = model.similarity.top_k(queries[-1], catalogue.embeddings, args.top_k, seen)
        rows.append(top[1])
        users.append(batch.user_ids)
    return tuple(torch.cat(parts).cpu().numpy() for parts in (queries, users, rows))


def publish(folder: Path, arrays: Mapping[str, np.ndarray], origin: Mapping[str, str]) -> None:
    """Write an export's files, and last the manifest that names their sizes and hashes.

    Raises:
        DataError: no index takes these vectors; the export that was there is as it was.
    """
    n, d = arrays["embedding.fbin"].shape
    check_size(folder, n, d)
    check_rows(folder, arrays["embedding.fbin"], arrays["id.u64bin"])
    folder.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    for name, array in arrays.items():
        save_emb(array, folder / name)
    files = {name: file_entry(folder / name) for name in arrays}
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


def check_rows(folder: Path, embeddings: np.ndarray, ids: np.ndarray) -> None:
    is_finite = np.isfinite(embeddings).all(1)
    if not is_finite.all():
        raise DataError(
            f"{folder}: id {ids[is_finite.argmin()]}: its embedding is not finite; the model has "
            "diverged, export another checkpoint or train with a lower --lr"
        )
    zero_ids = ids[~embeddings.any(1)]
    if len(zero_ids):
        log.warning(
            "%s: %d vectors are zero and have no direction, the first: %s",
            folder, len(zero_ids), ", ".join(map(str, zero_ids[:3])),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

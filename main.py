"""The run: command line in, training and validation, or export; one line for what went wrong."""

from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import Batch, MyDataset, count_items, count_targets
from engine.evaluation import evaluate
from engine.export import exported_ids, infer
from engine.flags import ALL_NEGATIVES_UP_TO, FREE_FLAGS, get_args
from engine.run_log import RunLog, summary
from engine.setup import (
    compile_blocks,
    keep_freed_memory,
    make_eval_loader,
    make_loader,
    make_sampler,
    pick_device,
    read_features,
    vectors_on_host,
)
from engine.signals import Stopped, stop_signals
from engine.state import (
    STATE_FORMAT,
    Progress,
    Run,
    check_same_step,
    load_best,
    restore_best,
    resume,
    save_epoch,
    save_run,
)
from engine.training_step import IF_NOT_FINITE, Updater
from files.atomic_io import DataError, cause, hold_folder, read_json, sweep_temporaries, write_json
from files.checkpoint import keep_newest_states, seed_random, settle_register
from files.data_folder import Manifest, fingerprint, read_item_names, read_manifest
from files.features import Feature
from hstu_components import DENSE_ROWS, encoder_arguments
from model import HSTUConfig, HSTUModel
from ops.collectives import (
    LostRankError,
    first_goes_ahead,
    is_first_to_fail,
    join,
    leave,
    num_ranks,
    rank,
)
from ops.sharded_table import ShardedEmbedding

log = logging.getLogger("hstu")

# Of the projector, whose page gets slow with more.
MOST_PROJECTED = 5_000


def main(argv: list[str] | None = None) -> int:
    """Train or infer as the command line says; the exit code.

    Of several ranks the first one to fail says why, and rank 0 alone says anything else.
    """
    try:
        # Signals inside the try: they end loaders that hang, before their owners wait for them.
        with stop_signals, log_to_stdout():
            args = get_args(argv)
            run_command(args)
    except Stopped as stop:
        if rank() == 0:
            say(str(stop))
        leave()
        return stop.exit_code
    except (DataError, OSError, EOFError, MemoryError, RuntimeError) as error:
        line = one_line(error)
        if args.debug or not line:
            raise
        if is_first_to_fail():
            print(f"error: {line}", file=sys.stderr)
        return 1
    return 0


def run_command(args: argparse.Namespace) -> None:
    keep_freed_memory()
    join(args.device.startswith("cuda") and torch.cuda.is_available())
    if rank() > 0:
        log.setLevel(logging.ERROR)
    check_ranks(args)
    check_folders(args)
    if args.trust_pickle:
        log.warning("--trust_pickle: .pkl files are loaded unchecked and can run any code")
    infer(args, HSTUModel) if args.inference_only else train(args)
    leave()


@contextmanager
def log_to_stdout() -> Iterator[None]:
    handler = Lines()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


class Lines(logging.Handler):
    """Log lines as `say` writes them."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def say(line: str) -> None:
    """To stdout, above a progress bar; a run needs no reader, and none ends for want of one.

    A pipe is closed by `| head`, or by `| tee`, which the same Ctrl-C ends; then the rest of the
    lines go nowhere. A full disk loses the line, and an encoding without its characters those.
    """
    if sys.stdout is None:  # closed before the start
        return
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except UnicodeEncodeError:
        say(line.encode("ascii", "backslashreplace").decode())
    except OSError as error:
        if error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_ranks(args: argparse.Namespace) -> None:
    if num_ranks() > 1 and args.inference_only:
        raise DataError("--inference_only exports in one process: start python, not torchrun")
    if num_ranks() > 1 and ":" in args.device:
        raise DataError(f"--device {args.device}: ranks take a device each; write --device cuda")


def check_folders(args: argparse.Namespace) -> None:
    if os.path.realpath(args.output_dir) == os.path.realpath(args.data_dir):
        raise DataError(f"{args.output_dir}: --output_dir is the data folder; name another one")
    for flag in ("output_dir", "log_dir"):
        path = Path(vars(args)[flag])
        if any(os.path.lexists(place) and not place.is_dir() for place in (path, *path.parents)):
            raise DataError(
                f"{path}: --{flag} is not a folder, or below a file or a broken link; name another"
            )


def one_line(error: Exception) -> str:
    """What a user can act on, without its traceback; empty for a fault of the program."""
    text = str(error)
    if text.startswith("Caught "):  # in a loader process, whose traceback comes before the message
        text = text.rstrip().rpartition("Error: ")[2]
    # What torch raises for a dead loader: the last one anywhere, from a signal handler.
    is_of_pipe = isinstance(error, ConnectionResetError | EOFError)
    if is_of_pipe or text.startswith("DataLoader worker (pid"):
        return (
            "a loader process was killed, most often for want of memory: lower --num_workers "
            f"({text.strip() or type(error).__name__})"
        )
    if isinstance(error, OSError) and error.filename:
        return cause(error)
    if isinstance(error, DataError | OSError | LostRankError):
        return text
    wants_memory = "out of memory|allocate memory|not enough memory|Unable to allocate"
    if isinstance(error, MemoryError) or re.search(wants_memory, text):
        first = (text or "MemoryError").splitlines()[0]
        return f"not enough memory, lower --batch_size or the model's widths ({first:.150})"
    return ""


# ----------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> None:
    """Train, validate after each epoch, test the best epoch once; everything ends in output_dir."""
    with stop_signals.waiting():
        manifest = read_manifest(args.data_dir, trust=args.trust_pickle)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with hold_folder(output_dir) if rank() == 0 else nullcontext():
        if rank() == 0:
            sweep_temporaries(output_dir)
        with stop_signals.waiting():
            with first_goes_ahead():  # and writes what it made of feature files beside them
                features = read_features(args, manifest)
            datasets = open_datasets(args, manifest, vectors_on_host(args, features[0]))
            run = prepare_run(args, manifest, features, datasets["train"])
            resume(run)
            if rank() == 0:
                settle_register(output_dir)
                restore_best(run)
                if run.progress.step:  # a kill may have come between a state and this
                    keep_newest_states(output_dir, run.progress.step)
            check_same_step(run)
        if not run.progress.is_finished:
            announce(run, datasets)
            if rank() == 0:  # those of a run that was here before
                (output_dir / "metrics.json").unlink(missing_ok=True)
        if not run.progress.is_finished or args.projector:
            first_step = run.progress.step + 1
            lengths = run.updater.total_steps, args.num_epochs, args.log_every
            with RunLog(args.log_dir, first_step, *lengths) as run_log:
                if first_step == 1:
                    run_log.start(vars(args), vars(args).keys() - FREE_FLAGS)
                train_epochs(run, datasets, run_log)
                if args.projector:
                    project_items(run, datasets["train"], run_log)
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
        "has_windows": args.windows,
        "negatives": negatives,
        "num_negatives": args.num_negatives,
        "has_logq": args.logq,
        "host_vectors": host_vectors,
        "trust_pickle": args.trust_pickle,
    }
    counts = count_items(args.data_dir, "train", manifest.num_items)
    maxlen = None if args.windows else args.maxlen
    options |= {
        "item_counts": counts,
        "target_counts": count_targets(args.data_dir, manifest.num_users, counts, maxlen),
    }
    return {split: MyDataset(args.data_dir, split, **options) for split in manifest.targets}


def prepare_run(
    args: argparse.Namespace, manifest: Manifest, features: tuple[dict, dict], train_set: MyDataset
) -> Run:
    """A fresh model and what trains it."""
    device = pick_device(args.device)
    config = make_config(args, manifest, features, train_set.has_timestamps)
    seed_random(args.seed)
    options = {"on_host": train_set.host_vectors, "shards_items": shards_items(args, train_set)}
    options["kernels"] = args.kernels
    model = HSTUModel(config, *features, **options).to(device)
    model.hstu.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        compile_blocks(model.hstu)
    num_batches = -(-len(train_set) // args.batch_size)
    total_steps = args.num_epochs * -(-num_batches // args.accumulate_steps)
    return Run(
        args=args,
        device=device,
        model=model,
        updater=Updater(model, args, total_steps, train_set.negatives == "all"),
        binding={k: v for k, v in vars(args).items() if k not in FREE_FLAGS}
        | {
            "state format": STATE_FORMAT,
            "config": asdict(config),
            "data": manifest._asdict() | {"sequences": len(train_set)},
            "data files": fingerprint(args.data_dir),
        },
    )


def shards_items(args: argparse.Namespace, train_set: MyDataset) -> bool:
    """Whether each rank is to hold a part of the item table.

    Raises:
        DataError: the table would not be trained by rows, or not in the same steps on all ranks.
    """
    if not args.shard_items or num_ranks() == 1:
        return False
    is_by_rows = train_set.negatives != "all" and train_set.num_items >= DENSE_ROWS
    if not is_by_rows or args.precision == "fp16":
        raise DataError(
            f"--shard_items with {train_set.num_items:,} items, {train_set.negatives} negatives, "
            f"{args.precision}: it needs {DENSE_ROWS:,} items, sampled negatives (--negatives "
            "mixed), and fp32 or bf16"
        )
    return True


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
        num_target_action_types=manifest.num_action_types if args.target_action else 0,
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
        item_ids_digest=manifest.item_ids_digest,
        action_names=manifest.action_names,
    )


def train_epochs(run: Run, datasets: dict[str, MyDataset], run_log: RunLog) -> None:
    """The epochs that are left, each followed by validation and checkpoints.

    Raises:
        Stopped: by a signal; a state of the last step is saved.
    """
    args, progress = run.args, run.progress
    sampler = make_sampler(datasets["train"], args, is_shuffled=True)
    train_loader = make_loader(datasets["train"], sampler, run.device, args.num_workers)
    valid_loader = make_eval_loader(datasets.get("valid"), args, run.device)
    while not progress.is_finished:
        sampler.epoch, sampler.first_batch = progress.epoch, progress.batch
        started = time.perf_counter()
        try:
            train_one_epoch(run, train_loader, run_log)
            seconds = time.perf_counter() - started
            ranking = None
            if valid_loader is not None:
                ranking = evaluate(run.updater, valid_loader, args.remove_seen)
        except Stopped as stop:
            run_log.flush()
            save_run(run)  # after the epoch's last batch too: it goes on with the validation
            raise Stopped(stop.number, where_to_go_on(run)) from None
        metrics = ranking.metrics() if ranking else {}
        if ranking and not math.isfinite(ranking.loss):
            raise DataError(
                f"epoch {progress.epoch + 1}: validation loss {ranking.loss}; its model was not "
                f"saved. {IF_NOT_FINITE}"
            )
        count_epoch(progress, metrics, args)
        train_loss = progress.loss_sum / max(1, progress.loss_steps)
        progress.loss_sum, progress.loss_steps = 0.0, 0
        is_best = progress.best_epoch == progress.epoch
        if ranking:
            run_log.similarities(progress.step, ranking.of_targets, ranking.of_others)
        run_log.epoch(progress.epoch, progress.step, train_loss, metrics, is_best, seconds)
        save_epoch(run)


def where_to_go_on(run: Run) -> str:
    resume = "" if run.args.resume == "auto" else " with --resume auto"
    resume += ", without --overwrite," if run.args.overwrite else ""
    return (
        f" at epoch {run.progress.epoch + 1}, step {run.progress.step}; the same command{resume} "
        "goes on from there"
    )


def count_epoch(progress: Progress, metrics: Mapping[str, float], args: argparse.Namespace) -> None:
    """The epoch is over: whether it is the best, and whether it is the last."""
    progress.epoch, progress.batch = progress.epoch + 1, 0
    if is_better(metrics, progress.best_metrics, args.early_stop_on):
        # In the order in which a saved state gives them back.
        progress.best_epoch, progress.best_metrics = progress.epoch, dict(sorted(metrics.items()))
    is_out_of_patience = 0 < args.patience <= progress.epoch - progress.best_epoch
    progress.is_finished = progress.epoch >= args.num_epochs or is_out_of_patience


def is_better(metrics: Mapping[str, float], best: Mapping[str, float], criterion: str) -> bool:
    """Whether these validation metrics beat the best; without validation the newest is best."""
    if not metrics or not best:
        return True
    if criterion == "loss":
        return metrics["loss"] < best["loss"]
    return metrics["NDCG@10"] > best["NDCG@10"]


def train_one_epoch(run: Run, loader: DataLoader, run_log: RunLog) -> None:
    """The steps that are left of the epoch under way.

    Raises:
        DataError: the data changed; or the loss or the gradient is not finite.
        Stopped: by a signal, before or after a step.
    """
    args, progress = run.args, run.progress
    loader.dataset.check_unchanged()
    run.model.train()
    groups = groups_of(loader, args.accumulate_steps)
    num_batches = progress.batch + len(loader)
    loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=run.device)
    with suppress(Stopped):  # until the steps before it are accounted for
        for batches in run_log.watch(groups, progress.epoch + 1, progress.batch, num_batches):
            values = run.updater.step(batches, progress.epoch + 1, progress.step + 1)
            progress.batch += len(batches)
            progress.step += 1
            progress.loss_steps += 1
            loss_sum += values["Loss/train"]
            run_log.step(progress.epoch + 1, progress.step, batches, values)
            is_due = args.save_every_steps and progress.step % args.save_every_steps == 0
            if is_due and progress.batch < num_batches:  # else save_epoch does, behind its curves
                progress.loss_sum = loss_sum.item()
                run_log.flush()  # a resumed run logs what comes after the state
                save_run(run)
    progress.loss_sum = loss_sum.item()
    run.updater.check_finite(progress.epoch + 1, progress.step)
    run.updater.agree()


def groups_of(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in stop_signals.between(loader):
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def announce(run: Run, datasets: Mapping[str, MyDataset]) -> None:
    """One line that says what will happen."""
    train_set, args = datasets["train"], run.args
    place = run.device if num_ranks() == 1 else f"{num_ranks()} x {run.device.type}"
    first_entry = (run.progress.step // args.log_every + 1) * args.log_every
    what = "windows of sequences" if train_set.is_cut else "sequences"
    remark = f"; from step {first_entry} on the time that is left is shown"
    log.info(
        f"train on {place} in {args.precision}: {len(train_set):,} {what}, "
        f"{train_set.num_items:,} items, {train_set.item_counts.sum():,} events of "
        f"{args.data_dir}; {num_weights(run.model):,} weights, {train_set.negatives} negatives; "
        f"{args.num_epochs} epochs, {run.updater.total_steps:,} steps"
        + (remark if first_entry <= run.updater.total_steps else "")
    )
    if args.warmup_steps >= run.updater.total_steps:
        log.warning(
            "the learning rate rises for %d steps (--warmup_steps), but there are %d: it never "
            "reaches --lr; try --warmup_steps %d",
            args.warmup_steps, run.updater.total_steps, run.updater.total_steps // 10,
        )  # fmt: skip
    if not train_set.has_timestamps:
        log.info("the data holds plain item ids: time and actions are off")
    for flag, reason in idle_flags(run, train_set):
        log.warning("--%s changes nothing %s", flag, reason)


def num_weights(model: HSTUModel) -> int:
    """Of the whole model, whatever part of its tables this rank holds."""
    shards = [module for module in model.modules() if isinstance(module, ShardedEmbedding)]
    elsewhere = [(shard.num_rows - len(shard.weight)) * shard.embedding_dim for shard in shards]
    return sum(p.numel() for p in model.parameters()) + sum(elsewhere)


def idle_flags(run: Run, train_set: MyDataset) -> list[tuple[str, str]]:
    """Flags that were given and do nothing in this run, each with the reason."""
    negatives, defaults = train_set.negatives, get_args([])
    has_vectors = any(spec["kind"] == "emb" for spec in run.model.config.item_features.values())
    no_draws, no_logq = negatives in ("all", "batch"), negatives in ("all", "uniform")
    idle = [("num_negatives", no_draws, f"with {negatives} negatives")]
    idle += [("logq", no_logq, f"with {negatives} negatives")]
    idle += [("shard_items", num_ranks() == 1, "in a single process")]
    idle += [("target_action", not train_set.num_action_types, "without actions in the data")]
    for name in ("mm_missing", "mm_projection", "mm_emb_device"):
        idle += [(name, not has_vectors, "without multimodal vectors")]
    return [
        (f"no-{name}" if getattr(run.args, name) is False else name, reason)
        for name, is_idle, reason in idle
        if is_idle and getattr(run.args, name) != getattr(defaults, name)
    ]


@torch.no_grad()
def project_items(run: Run, train_set: MyDataset, run_log: RunLog) -> None:
    """The best epoch's embeddings of the items that are trained on most, with their names."""
    load_best(run)
    counts = torch.from_numpy(train_set.item_counts)
    item_ids = counts[1:].argsort(descending=True, stable=True)[:MOST_PROJECTED] + 1
    names = read_item_names(run.args.data_dir, train_set.num_items)
    labels = {
        "name": [names[item_id] or item_id for item_id in item_ids.tolist()],
        "id": exported_ids(run.args, "i", train_set.num_items)[0][item_ids.numpy()].tolist(),
        "events": counts[item_ids].tolist(),
    }
    embeddings = run.model.item_embeddings(item_ids.to(run.device))
    run_log.items(run.progress.step, embeddings, labels)


def report(run: Run, datasets: Mapping[str, MyDataset]) -> None:
    """Test the best epoch once, write metrics.json, and say what there is and what comes next."""
    output_dir, progress = Path(run.args.output_dir), run.progress
    path = output_dir / "metrics.json"
    best = output_dir / "model_best.pt"
    if not path.exists():
        result = {"best_epoch": progress.best_epoch, "valid": progress.best_metrics}
        loader = make_eval_loader(datasets.get("test"), run.args, run.device)
        if loader is not None:
            load_best(run)
            ranking = evaluate(run.updater, loader, run.args.remove_seen)
            counts = torch.from_numpy(datasets["train"].item_counts)
            result["test"] = ranking.metrics()
            if cold := ranking.cold_metrics(counts):
                result["test_cold"] = cold
            if run.args.remove_seen and (repeats := ranking.repeat_metrics()):
                result["test_repeat"] = repeats
        if rank() == 0:
            write_json(path, result)
    if rank() > 0:
        return
    result = read_json(path)
    is_early = progress.epoch < run.args.num_epochs
    reason = f", stopped by --patience {run.args.patience}" if is_early else ""
    log.info("finished: %d epochs, best epoch %d%s", progress.epoch, result["best_epoch"], reason)
    for split in ("valid", "test"):
        if result.get(split):
            log.info("  %-6s %s", split, summary(result[split]))
    if cold := result.get("test_cold"):
        log.info("  cold   %s: %d targets without a training event", summary(cold), cold["targets"])
    if repeats := result.get("test_repeat"):
        log.info(
            "  repeat %s: %d targets that their users had before; an export leaves out what a user "
            "has seen, and finds these only with --no-remove_seen",
            summary(repeats), repeats["targets"],
        )  # fmt: skip
    log.info("  wrote  %s, model_epoch_*.pt, %s", best, path)
    best, data, output, logs = (
        shlex.quote(str(path)) for path in (best, run.args.data_dir, output_dir, run.args.log_dir)
    )
    folders = f"--data_dir {data} --output_dir {output}"
    log.info("  next   python main.py --inference_only --state_dict_path %s %s", best, folders)
    log.info("  curves tensorboard --logdir %s", logs)
    log.info("  plots  python scripts/plot_run.py %s --log_dir %s", folders, logs)


if __name__ == "__main__":
    sys.exit(main())

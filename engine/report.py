"""What a model is worth on a split: the best epoch at the end of a training, or any checkpoint."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset import MyDataset
from engine.baselines import baseline_metrics, log_baselines
from engine.evaluation import Ranking, evaluate
from engine.run_log import RunLog, summary
from engine.setup import make_loader
from engine.signals import stop_signal
from engine.state import Run, load_best
from engine.trained_model import leaves_out_seen, load_model
from engine.training_setup import count_negatives
from files.atomic_io import DataError, read_json, sha256_of, write_json
from files.data_folder import log_ids, read_item_names, read_manifest
from files.sequences import Split
from model import HSTUModel
from ops.collectives import is_main_process

log = logging.getLogger("hstu")

# Of the projector, whose page gets slow with more.
MOST_PROJECTED = 5_000


def test_best(run: Run, loader: DataLoader | None, precision: str) -> None:
    """Write metrics.json, unless it is there: the best epoch's metrics on valid and on test.

    Of the test's targets also apart: `test_cold`, without a training event; `test_new` and
    `test_repeat`, which their users had not or had before; `test_by_action`, of each action type
    where there are several; and `test_baselines`, rankings that need no model.
    """
    path, progress = run.output_dir / "metrics.json", run.progress
    if path.exists():
        return
    result = {"best_epoch": progress.best_epoch, "valid": progress.best_metrics}
    if loader is not None:
        load_best(run)
        ranking = evaluate(run.model, loader, precision=precision)
        result |= split_metrics("test", ranking, run.item_counts, run.model.config.action_names)
    if is_main_process():
        if loader is not None:
            splits = run.datasets["train"].sequences, run.datasets["test"].sequences
            result["test_baselines"] = baseline_metrics(*splits, run.model.config.removes_seen)
        write_json(path, {name: value for name, value in result.items() if value != {}})


def split_metrics(
    split: str, ranking: Ranking, item_counts: Tensor, action_names: Sequence[str] | None
) -> dict[str, dict]:
    """Metrics of the targets of a split, and of the kinds of targets that there are, apart."""
    kinds = {
        f"{split}_cold": item_counts[ranking.target_ids] == 0,
        f"{split}_new": ~ranking.is_repeat,
        f"{split}_repeat": ranking.is_repeat,
    }
    found = {split: ranking.metrics()} | {n: ranking.metrics_of(w) for n, w in kinds.items()}
    actions = ranking.target_actions
    types = [t for t in actions.unique().tolist() if t >= 0]
    if len(types) > 1:
        names = [action_names[t] if action_names else str(t) for t in types]
        by_type = [ranking.metrics_of(actions == t) for t in types]
        found[f"{split}_by_action"] = dict(zip(names, by_type, strict=True))
    return {name: metrics for name, metrics in found.items() if metrics}


def evaluate_checkpoint(args: argparse.Namespace, model_class: type[HSTUModel] = HSTUModel) -> None:
    """Rank the split that --evaluate names; log and write what the end of a training does.

    The loss is that with the negatives that the flags say.

    Raises:
        DataError: checkpoint, data and flags do not fit, or no target of the split is known.
    """
    path, split, trust = Path(args.state_dict_path), args.evaluate, args.trust_pickle
    manifest = read_manifest(args.data_dir, trust=trust)
    names = ("device", "mm_emb_device", "kernels", "trust_pickle")
    options = {name: getattr(args, name) for name in names}
    model = load_model(path, args.data_dir, manifest, model_class=model_class, **options)
    negatives, item_counts = count_negatives(args, manifest, bool(model.config.item_features))
    is_known = manifest.targets.get(split) == "last"
    dataset = []
    if is_known:
        maxlen = model.config.maxlen
        dataset = MyDataset(args.data_dir, split, maxlen, negatives, trust_pickle=trust)
    if not len(dataset):
        raise DataError(f"{args.data_dir}: no {split} split with known targets there; name another")
    device = next(model.parameters()).device
    loader = make_loader(dataset, args.batch_size, args.seed, device, args.num_workers)
    removes_seen = leaves_out_seen(args.remove_seen, model.config)
    with stop_signal.deferred():  # a loader that starts or ends must not be interrupted
        ranking = evaluate(model, loader, removes_seen, args.precision)
        stop_signal.check()
    result = {
        "checkpoint": path.name,
        "checkpoint_sha256": sha256_of(path),
        "removes_seen": removes_seen,
        **split_metrics(split, ranking, torch.from_numpy(item_counts), manifest.action_names),
    }
    train = Split(Path(args.data_dir), "train", *manifest[:3])
    result[f"{split}_baselines"] = baseline_metrics(train, dataset.sequences, removes_seen)
    log.info("%s on %d targets of %s", path, len(ranking.ranks), args.data_dir)
    log_split(result, split, removes_seen)
    output = Path(args.output_dir) / f"metrics_{path.stem}_{split}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    log.info("  wrote  %s", output)


def log_split(result: Mapping[str, Any], split: str, removes_seen: bool) -> None:
    """A line for each part of what `split_metrics` and `baseline_metrics` gave."""
    log.info("  %-6s %s", split, summary(result[split]))
    if cold := result.get(f"{split}_cold"):
        log.info("  cold   %s: %d targets without a training event", summary(cold), cold["targets"])
    if (new := result.get(f"{split}_new")) and (repeats := result.get(f"{split}_repeat")):
        remark = "; left out of the ranking, a miss each (--remove_seen off)" * removes_seen
        log.info("  new    %s: %d targets that their users had not", summary(new), new["targets"])
        log.info(
            "  repeat %s: %d targets that their users had before%s",
            summary(repeats), repeats["targets"], remark,
        )  # fmt: skip
    for name, metrics in result.get(f"{split}_by_action", {}).items():
        log.info("  action %s: %d targets of %s", summary(metrics), metrics["targets"], name)
    log_baselines(result.get(f"{split}_baselines", {}))


def report(run: Run, data_dir: str, log_dir: str, reason: str) -> None:
    """Log what metrics.json holds, which files there are, and commands to go on with.

    `reason`: why the run has ended, after the best epoch in its line.
    """
    output_dir, progress, removes_seen = run.output_dir, run.progress, run.model.config.removes_seen
    best, path = output_dir / "model_best.pt", output_dir / "metrics.json"
    result = read_json(path)
    log.info("finished: %d epochs, best epoch %d%s", progress.epoch, result["best_epoch"], reason)
    if result.get("valid"):
        log.info("  valid  %s", summary(result["valid"]))
    if result.get("test"):
        log_split(result, "test", removes_seen)
    log.info("  wrote  %s, model_epoch_*.pt, %s", best, path)
    candidates, export = Path(data_dir) / "candidates", "--inference_only"
    if (candidates / "item_ids.bin").exists():
        export += f" --candidates {shlex.quote(str(candidates))}"
    data_dir, output, logs, best = map(shlex.quote, (data_dir, str(output_dir), log_dir, str(best)))
    folders = f"--data_dir {data_dir} --output_dir {output}"
    log.info("  next   python main.py %s --state_dict_path %s %s", export, best, folders)
    log.info("  curves tensorboard --logdir %s", logs)
    log.info("  plots  python scripts/plot_run.py %s --log_dir %s", folders, logs)


@torch.no_grad()
def project_items(run: Run, data_dir: str, trust_pickle: bool, run_log: RunLog) -> None:
    """Log the best epoch's embeddings of the items with the most training events, and names."""
    load_best(run)
    counts, num_items = run.item_counts, len(run.item_counts) - 1
    item_ids = counts[1:].argsort(descending=True, stable=True)[:MOST_PROJECTED] + 1
    names = read_item_names(data_dir, num_items)
    ids = log_ids(data_dir, "i", num_items, trust=trust_pickle)
    labels = {
        "name": [names[item_id] or item_id for item_id in item_ids.tolist()],
        "id": ids[item_ids.numpy()].tolist(),
        "events": counts[item_ids].tolist(),
    }
    embeddings = run.model.item_embeddings(item_ids.to(run.device))
    run_log.items(run.progress.step, embeddings, labels)

"""The end of a training: the best epoch tested once, and what there is now."""

from __future__ import annotations

import logging
import shlex

import torch
from torch.utils.data import DataLoader

from engine.baselines import baseline_metrics, log_baselines
from engine.evaluation import evaluate
from engine.export import exported_ids
from engine.run_log import RunLog, summary
from engine.state import Run, load_best
from files.atomic_io import read_json, write_json
from files.data_folder import read_item_names
from ops.collectives import is_main_process

log = logging.getLogger("hstu")

# Of the projector, whose page gets slow with more.
MOST_PROJECTED = 5_000


def test_best(run: Run, loader: DataLoader | None, precision: str) -> None:
    """Write metrics.json, unless it is there: the best epoch's metrics on valid and on test.

    Of the test's targets also apart: `test_cold`, without a training event; `test_new` and
    `test_repeat`, which their users had not or had before; and `test_baselines`, rankings that need
    no model.
    """
    path, progress = run.output_dir / "metrics.json", run.progress
    if path.exists():
        return
    result = {"best_epoch": progress.best_epoch, "valid": progress.best_metrics}
    if loader is not None:
        load_best(run)
        ranking = evaluate(run.model, loader, precision=precision)
        result |= {
            "test": ranking.metrics(),
            "test_cold": ranking.metrics_of(run.item_counts[ranking.target_ids] == 0),
            "test_new": ranking.metrics_of(~ranking.is_repeat),
            "test_repeat": ranking.metrics_of(ranking.is_repeat),
        }
    if is_main_process():
        if loader is not None:
            splits = run.datasets["train"].sequences, run.datasets["test"].sequences
            result["test_baselines"] = baseline_metrics(*splits, run.model.config.removes_seen)
        write_json(path, {name: value for name, value in result.items() if value != {}})


def report(run: Run, data_dir: str, log_dir: str, reason: str) -> None:
    """Log what metrics.json holds, which files there are, and commands to go on with.

    `reason`: why the run has ended, after the best epoch in its line.
    """
    output_dir, progress, removes_seen = run.output_dir, run.progress, run.model.config.removes_seen
    best, path = output_dir / "model_best.pt", output_dir / "metrics.json"
    result = read_json(path)
    log.info("finished: %d epochs, best epoch %d%s", progress.epoch, result["best_epoch"], reason)
    for split in ("valid", "test"):
        if result.get(split):
            log.info("  %-6s %s", split, summary(result[split]))
    if cold := result.get("test_cold"):
        log.info("  cold   %s: %d targets without a training event", summary(cold), cold["targets"])
    if (new := result.get("test_new")) and (repeats := result.get("test_repeat")):
        remark = "; left out of the ranking, a miss each (--remove_seen off)" * removes_seen
        log.info("  new    %s: %d targets that their users had not", summary(new), new["targets"])
        log.info(
            "  repeat %s: %d targets that their users had before%s",
            summary(repeats), repeats["targets"], remark,
        )  # fmt: skip
    log_baselines(result.get("test_baselines", {}))
    log.info("  wrote  %s, model_epoch_*.pt, %s", best, path)
    data_dir, output, logs, best = map(shlex.quote, (data_dir, str(output_dir), log_dir, str(best)))
    folders = f"--data_dir {data_dir} --output_dir {output}"
    log.info("  next   python main.py --inference_only --state_dict_path %s %s", best, folders)
    log.info("  curves tensorboard --logdir %s", logs)
    log.info("  plots  python scripts/plot_run.py %s --log_dir %s", folders, logs)


@torch.no_grad()
def project_items(run: Run, data_dir: str, trust_pickle: bool, run_log: RunLog) -> None:
    """Log the best epoch's embeddings of the items with the most training events, and names."""
    load_best(run)
    counts, num_items = run.item_counts, len(run.item_counts) - 1
    item_ids = counts[1:].argsort(descending=True, stable=True)[:MOST_PROJECTED] + 1
    names = read_item_names(data_dir, num_items)
    ids, _ = exported_ids(data_dir, "i", num_items, trust_pickle)
    labels = {
        "name": [names[item_id] or item_id for item_id in item_ids.tolist()],
        "id": ids[item_ids.numpy()].tolist(),
        "events": counts[item_ids].tolist(),
    }
    embeddings = run.model.item_embeddings(item_ids.to(run.device))
    run_log.items(run.progress.step, embeddings, labels)

"""Train on MovieLens-1M month by month: from last month's weights, or afresh.

    python benchmarks/warm_start.py --source ../shared/data/ml-1m --seed 1

A model of `--epochs` epochs knows all events before the first month. Each month after it, the log
with that month is converted like the one before, and three models are trained on it: for one epoch
from last month's weights, and afresh for one epoch and for `--epochs`. Each ranks all items for the
last event of the next month's users. Minutes are those of the training command with validations.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from record import ROOT, environment, write
from settings import SMALL

FLAGS = (
    f"{SMALL} --infonce_temp=0.05 --no-windows --batch_size=16 --lr=0.003 --patience=0 "
    "--num_workers=1"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="interactions and movies.csv.gz")
    parser.add_argument("--work_dir", type=Path, default="outputs/warm_start", help="must be new")
    parser.add_argument("--first", type=np.datetime64, default="2000-09", help="month, YYYY-MM")
    parser.add_argument("--months", type=int, default=4, help="how many follow the first training")
    parser.add_argument("--epochs", type=int, default=20, help="of long trainings")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.source, args.work_dir = args.source.resolve(), args.work_dir.resolve()
    first, rows = np.datetime64(args.first, "M"), []
    args.work_dir.mkdir(parents=True)
    warm = train(args, "start", convert(args, first, None), args.epochs)
    print(f"{'next month':12}{'training':18}{'NDCG@10':>9}{'HR@10':>9}{'minutes':>9}")
    for month in first + 1 + np.arange(args.months):
        data_dir = convert(args, month, args.work_dir / f"data_{month - 1}")
        earlier = f"--init_from={args.work_dir}/{warm['model']}"
        warm = train(args, f"warm_{month}", data_dir, 1, earlier)
        runs = {
            "warm, 1 epoch": warm,
            "fresh, 1 epoch": train(args, f"one_{month}", data_dir, 1),
            f"fresh, {args.epochs} epochs": train(args, f"long_{month}", data_dir, args.epochs),
        }
        for name, run in runs.items():
            rows.append({"next month": str(month), "training": name, **run})
            numbers = f"{run['NDCG@10']:9.4f}{run['HR@10']:9.4f}{run['minutes']:9.2f}"
            print(f"{month!s:12}{name:18}{numbers}", flush=True)
    write(f"warm_start_seed{args.seed}", {"rows": rows, "flags": FLAGS, **environment("cpu")})


def convert(args: argparse.Namespace, month: np.datetime64, like: Path | None) -> Path:
    """The folder in which `month` is to be predicted from all before it; its name has the month."""
    begins = [int((month + k).astype("datetime64[s]").astype(int)) for k in range(3)]
    log, data_dir = args.work_dir / f"log_{month}.csv", args.work_dir / f"data_{month}"
    with gzip.open(args.source / "interactions.csv.gz", "rt") as file, open(log, "w") as target:
        rows, writer = csv.reader(file), csv.writer(target)
        writer.writerow(next(rows))
        writer.writerows(row for row in rows if int(row[3]) < begins[2])
    call(
        *("scripts/prepare_table.py", log, data_dir, "--split", "time", "--action", "rating"),
        *("--cuts", *begins[:2], "--item_features", args.source / "movies.csv.gz"),
        *("--item_names", "title", "--drop", "title", *(("--like", like) if like else ())),
    )
    return data_dir


def train(
    args: argparse.Namespace, name: str, data_dir: Path, num_epochs: int, *flags: str
) -> dict[str, object]:
    """The model of the last epoch, its metrics on the next month, and minutes of the training."""
    output_dir = args.work_dir / name
    folders = [f"--data_dir={data_dir}", f"--output_dir={output_dir}", "--device=cpu"]
    options = [f"--log_dir={output_dir}/logs", f"--num_epochs={num_epochs}", f"--seed={args.seed}"]
    started = time.perf_counter()
    call("main.py", *folders, *options, *FLAGS.split(), *flags)
    minutes = (time.perf_counter() - started) / 60
    model = output_dir / f"model_epoch_{num_epochs}.pt"
    call("main.py", "--evaluate=valid", f"--state_dict_path={model}", *folders, "--num_workers=0")
    found = json.loads((output_dir / f"metrics_{model.stem}_valid.json").read_text())
    metrics = {key: round(found["valid"][key], 5) for key in ("NDCG@10", "HR@10")}
    return {"model": f"{name}/{model.name}", **metrics, "minutes": round(minutes, 3)}


def call(*command: object) -> None:
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


if __name__ == "__main__":
    main()

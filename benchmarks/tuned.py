"""What two hours of scripts/tune.py find on a log: all trials, and the best one's metrics.

    python benchmarks/tuned.py ml-1m --source ../shared/data/ml-1m

A tune that was stopped goes on where it was; fewer --hours than it has had print what it found.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from record import environment, write
from reproduce import call, prepare
from settings import DATA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=sorted(DATA))
    parser.add_argument("--source", help="folder of the raw files, if there are any")
    parser.add_argument("--work_dir", type=Path, default="outputs/reproduce")
    parser.add_argument("--hours", default="2")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    output_dir = args.work_dir / f"tune_{args.data}"
    data_dir = prepare(args.data, args.source, args.work_dir)
    folders = [f"--data_dir={data_dir}", f"--output_dir={output_dir}"]
    call(["scripts/tune.py", *folders, f"--hours={args.hours}", "--", "--device", args.device])
    write(f"tune_{args.data}", result_of(output_dir) | environment(args.device))


def result_of(output_dir: Path) -> dict[str, object]:
    """All trials, and the metrics of the best one's `metrics.json`."""
    with open(output_dir / "trials.csv", newline="") as file:
        trials = list(csv.DictReader(file))
    whole = [trial for trial in trials if trial["end"].startswith("best epoch")]
    best = max(whole, key=lambda trial: float(trial["NDCG@10"]))
    metrics = json.loads((output_dir / f"trial_{int(best['trial']):03}/metrics.json").read_text())
    return {
        "minutes": round(sum(float(trial["seconds"]) for trial in trials) / 60),
        "best_trial": int(best["trial"]),
        "valid": metrics["valid"],
        "test": metrics["test"],
        "trials": trials,
    }


if __name__ == "__main__":
    main()

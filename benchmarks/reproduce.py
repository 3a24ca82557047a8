"""Run a named setting from raw files to a table row; results go to benchmarks/results/.

    python benchmarks/reproduce.py ml-1m-small --source ../shared/data/ml-1m --seed 1

A run that was stopped goes on where it was. The last line printed is one JSON object, which is
also what is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from record import RESULTS, ROOT, environment, write
from settings import DATA, SETTINGS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from files.atomic_io import DataError
from files.data_folder import read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*SETTINGS, "table"])
    parser.add_argument("--source", help="folder of the raw files, if there are any")
    parser.add_argument("--work_dir", default="outputs/reproduce", help="data, checkpoints, logs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.name == "table":
        print(table())
        return
    import resource  # which Windows lacks, where other scripts import this one

    result = train(args.name, args.source, Path(args.work_dir), args.seed, args.device)
    peak_rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    result |= {"peak_rss_gb": round(peak_rss / 1e6, 2), **environment(args.device)}
    write(f"{args.name}_seed{args.seed}", result)


def train(
    name: str, source: str | None, work_dir: Path, seed: int, device: str
) -> dict[str, object]:
    """The training's command, curve and metrics."""
    data, flags = SETTINGS[name]
    data_dir, run_dir = prepare(data, source, work_dir), work_dir / f"{name}_seed{seed}"
    folders = [f"--data_dir={data_dir}", f"--output_dir={run_dir}", f"--log_dir={run_dir}/logs"]
    where = [f"--seed={seed}", f"--device={device}", "--num_workers=1"]
    command = ["main.py", *flags.split(), *where]
    call([*command, *folders])
    return {
        "name": name,
        "training": f"python {' '.join(command)}",
        "seed": seed,
        **json.loads((run_dir / "metrics.json").read_text()),
        "curve": read_curve(run_dir / "logs"),
    }


def prepare(data: str, source: str | None, work_dir: Path) -> Path:
    """The data folder, written if it is not there."""
    data_dir = work_dir / f"data_{data}"
    try:
        read_manifest(data_dir)
    except DataError:  # not there, or not finished
        script, *arguments = DATA[data].split()
        places = {"source": source, "data": data_dir}
        call([f"scripts/{script}", *(argument.format(**places) for argument in arguments)])
    return data_dir


def table() -> str:
    """Markdown rows of all settings that have result files: mean and deviation over seeds."""
    lines = [
        "| setting | seeds | valid | test | HR@200 | epochs | minutes | recorded |",
        "|---|" + "---|" * 7,
    ]
    for name in SETTINGS:
        results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}_seed*"))]
        if results:
            lines.append("| " + " | ".join([name, *row(results)]) + " |")
    return "\n".join(lines)


def row(results: list[dict]) -> list[str]:
    """The cells of one setting's runs; "recorded" has the last one's date, and the CPUs."""

    def scores(split: str, *names: str) -> str:
        return " / ".join(spread([result[split][name] for result in results]) for name in names)

    of_ranking = scores("valid", "HR@10", "NDCG@10"), scores("test", "HR@10", "NDCG@10")
    epochs = "/".join(str(result["best_epoch"]) for result in results)
    minutes = "/".join(f"{result['curve'][-1]['seconds'] / 60:.0f}" for result in results)
    kinds = "Xeon", "EPYC"
    cpus = {next((k for k in kinds if k in r["cpu"]), r["cpu"]) for r in results}
    recorded = f"{max(result['date'] for result in results)[5:]} {', '.join(sorted(cpus))}"
    hits = scores("test", "HR@200")
    return [str(len(results)), *of_ranking, hits, epochs, minutes, recorded]


def spread(values: list[float]) -> str:
    """As .3323 +- .0047, or the one value."""
    digits = [f"{statistics.mean(values):.4f}"]
    if len(values) > 1:
        digits.append(f"{statistics.stdev(values):.4f}")
    return " ± ".join(number.removeprefix("0") for number in digits)


def call(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def read_curve(log_dir: Path) -> list[dict[str, float]]:
    """Per epoch: seconds since the first log entry, validation included, and what was measured."""
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0}).Reload()
    start = events.Scalars("Loss/train")[0].wall_time
    tags = {"loss": "Loss/valid", "HR@10": "Metrics/HR@10", "NDCG@10": "Metrics/NDCG@10"}
    columns = {name: events.Scalars(tag) for name, tag in tags.items()}
    return [
        {"seconds": round(row[0].wall_time - start, 1), "step": row[0].step}
        | {name: round(event.value, 5) for name, event in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]


if __name__ == "__main__":
    main()

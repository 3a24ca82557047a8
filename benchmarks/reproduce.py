"""Run a named setting from raw files to a table row; results go to benchmarks/results/.

    python benchmarks/reproduce.py ml-1m-small --source ../shared/data/ml-1m --seed 1

A run that was stopped goes on where it was. The last line printed is one JSON object, which is
also what is written.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shlex
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Data set -> script that writes it, and the script's arguments.
DATA = {
    "synthetic": "prepare_synthetic.py {data}",
    "ml-1m": "prepare_movielens.py {source} {data}",
    "beauty": "prepare_table.py {source}/interactions.csv.gz {data} --order seq_pos "
    "--item_features {source}/items.csv.gz --item_names text --array text --drop n",
    "kuairand": "prepare_table.py {source}/interactions.csv.gz {data} --time time_ms "
    "--action is_follow is_like long_view is_click --item_features {source}/items.csv.gz "
    "--user_features {source}/users.csv.gz --sparse author_id --continual video_duration "
    "--drop counts play_* *_cnt *_num comment_stay_duration",
}
IDS_AND_TIMES = "--item_features none --user_features none --no-actions --mm_emb_id"
IDS = f"{IDS_AND_TIMES} --time_bias=off"
SMALL = (
    "--maxlen=200 --num_blocks=2 --num_heads=1 --hidden_units=50 --attention_dim=50 --linear_dim=50"
)
LARGE = (
    "--maxlen=200 --num_blocks=8 --num_heads=2 --hidden_units=50 --attention_dim=25 --linear_dim=25"
)
ML_1M = "--infonce_temp=0.05"
# As the published small rows: of each user the newest events alone.
ML_1M_SMALL = f"{SMALL} {ML_1M} --no-windows --batch_size=16 --lr=0.003 --num_epochs=24"
BEAUTY = (
    "--maxlen=20 --hidden_units=128 --attention_dim=128 --linear_dim=128 --batch_size=1024 "
    "--lr=0.008 --dropout_rate=0.5 --infonce_temp=0.08 --num_epochs=14 --no-muon"
)
KUAIRAND = (
    "--maxlen=50 --batch_size=512 --lr=0.006 --dropout_rate=0.4 --infonce_temp=0.06 "
    "--num_epochs=10 --no-muon"
)
# Name -> (data set, flags of main.py).
SETTINGS = {
    "quickstart": ("synthetic", "--num_epochs=30 --lr=0.003"),  # scripts/quickstart.sh
    "ml-1m-small": ("ml-1m", f"{IDS_AND_TIMES} {ML_1M_SMALL}"),
    "ml-1m-small-event": ("ml-1m", f"{IDS_AND_TIMES} {ML_1M_SMALL} --time_bias=event"),
    "ml-1m-small-positions": ("ml-1m", f"{IDS} {ML_1M_SMALL}"),
    "ml-1m-small-none": ("ml-1m", f"{IDS} {ML_1M_SMALL} --no-position_bias"),
    "ml-1m-large": (
        "ml-1m",
        f"{IDS_AND_TIMES} {LARGE} {ML_1M} --batch_size=32 --lr=0.002 --num_epochs=20",
    ),
    "beauty-ids": ("beauty", f"{IDS} {BEAUTY}"),
    "beauty-event": ("beauty", f"{IDS_AND_TIMES} --time_bias=event {BEAUTY}"),
    "beauty-request": ("beauty", f"{IDS_AND_TIMES} {BEAUTY}"),
    "beauty-features": ("beauty", f"--mm_emb_id --time_bias=off {BEAUTY}"),
    "kuairand-ids": ("kuairand", f"{IDS} {KUAIRAND}"),
    "kuairand-actions": (
        "kuairand",
        f"--item_features none --user_features none --mm_emb_id --time_bias=off {KUAIRAND}",
    ),
    "kuairand-items": ("kuairand", f"--user_features none --time_bias=off {KUAIRAND}"),
    "kuairand-users": ("kuairand", f"--time_bias=off {KUAIRAND}"),
    "kuairand-time": ("kuairand", KUAIRAND),
    "kuairand-target-action": ("kuairand", f"{KUAIRAND} --target_action"),
}
# The defaults, and the same inputs and shape with other flags of optimisation.
SETTINGS |= {
    "ml-1m-default": ("ml-1m", "--num_epochs=12"),
    "ml-1m-default-tuned": (
        "ml-1m",
        f"{ML_1M} --num_epochs=12 --batch_size=16 --lr=0.003",
    ),
    "beauty-default": ("beauty", "--num_epochs=12"),
    "beauty-default-tuned": (
        "beauty",
        "--batch_size=1024 --lr=0.008 --dropout_rate=0.5 "
        "--infonce_temp=0.08 --num_epochs=14 --no-muon",
    ),
    "kuairand-default": ("kuairand", "--num_epochs=8"),
    "kuairand-default-tuned": ("kuairand", KUAIRAND.replace("--maxlen=50 ", "")),
}
# ML-1M, small shape, a third of the epochs: one thing changed each time. Seed 42.
ABLATIONS = {
    "base": "",
    "time-event": "--time_bias=event",
    "time-off": "--time_bias=off",
    "position-off": "--no-position_bias",
    "biases-off": "--time_bias=off --no-position_bias",
    "uniform-1024": "--negatives=uniform",
    "uniform-256": "--negatives=uniform --num_negatives=256",
    "batch": "--negatives=batch",
    "batch-no-logq": "--negatives=batch --no-logq",
    "mixed": "--negatives=mixed",
    "mixed-no-logq": "--negatives=mixed --no-logq",
    "temperature-.03": "--infonce_temp=0.03",
    "temperature-.1": "--infonce_temp=0.1",
    "windows": "--windows",
    "actions": "--actions",
    "target-action": "--target_action",
    "adamw": "--no-muon",
}
SETTINGS |= {
    f"ablation-{name}": ("ml-1m", f"{IDS_AND_TIMES} {ML_1M_SMALL} --num_epochs=8 {flags}")
    for name, flags in ABLATIONS.items()
}


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
    data, flags = SETTINGS[args.name]
    data_dir = prepare(data, args.source, Path(args.work_dir))
    run_dir = Path(args.work_dir) / f"{args.name}_seed{args.seed}"
    folders = [f"--data_dir={data_dir}", f"--output_dir={run_dir}", f"--log_dir={run_dir}/logs"]
    where = [f"--seed={args.seed}", f"--device={args.device}", "--num_workers=1"]
    command = ["main.py", *flags.split(), *where]
    call([*command, *folders])
    result = {
        "name": args.name,
        "training": f"python {' '.join(command)}",
        "seed": args.seed,
        **json.loads((run_dir / "metrics.json").read_text()),
        "curve": read_curve(run_dir / "logs"),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
        **environment(args.device),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.name}_seed{args.seed}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def prepare(data: str, source: str | None, work_dir: Path) -> Path:
    """The data folder, written if it is not there."""
    data_dir = work_dir / f"data_{data}"
    if not (data_dir / "manifest.json").exists():
        script, *arguments = DATA[data].split()
        places = {"source": source, "data": data_dir}
        call([f"scripts/{script}", *(argument.format(**places) for argument in arguments)])
    return data_dir


def table() -> str:
    """A Markdown row per setting from its result files: mean and standard deviation over seeds."""
    lines = [
        "| setting | seeds | HR@10 | NDCG@10 | HR@200 | epochs | minutes |",
        "|---|" + "---|" * 6,
    ]
    for name in SETTINGS:
        results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}_seed*"))]
        if not results:
            continue
        scores = [
            spread([result["test"][metric] for result in results])
            for metric in ("HR@10", "NDCG@10", "HR@200")
        ]
        epochs = "/".join(str(result["best_epoch"]) for result in results)
        minutes = "/".join(f"{result['curve'][-1]['seconds'] / 60:.0f}" for result in results)
        lines.append("| " + " | ".join([name, str(len(results)), *scores, epochs, minutes]) + " |")
    return "\n".join(lines)


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


def write_by_cpu(name: str, result: dict[str, object]) -> None:
    """Into NAME.json, beside what other CPUs gave: each has its own ratios."""
    path = RESULTS / f"{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(results | {result["cpu"]: result}, indent=1) + "\n")


def environment(device: str) -> dict[str, object]:
    """What a figure depends on besides the code: command, commit, machine, versions, date."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    cpus = [li for li in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in li]
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "device": device,
        "cpu": f"{len(cpus)} x {cpus[0].split(':')[1].strip()}",
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()

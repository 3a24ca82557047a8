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
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

SYNTHETIC = "prepare_synthetic.py {data}"
MOVIELENS = "prepare_movielens.py {source} {data}"
BEAUTY = (
    "prepare_table.py {source}/interactions.csv.gz {data} --order seq_pos "
    "--item_features {source}/items.csv.gz --item_names text --drop n"
)
KUAIRAND = (
    "prepare_table.py {source}/interactions.csv.gz {data} --time time_ms "
    "--action is_follow is_like long_view is_click --item_features {source}/items.csv.gz "
    "--user_features {source}/users.csv.gz --sparse author_id --continual video_duration "
    "--drop counts play_* *_cnt *_num comment_stay_duration"
)
IDS_AND_TIMES = "--item_features none --user_features none --no-actions --mm_emb_id"
SMALL = (
    "--maxlen=200 --num_blocks=2 --num_heads=1 --hidden_units=50 --attention_dim=50 --linear_dim=50"
)
SPARSE_LOG = "--lr=0.003 --maxlen=50 --num_epochs=8 --early_stop_on=ndcg"
# Name -> (script that writes the data and its arguments, flags of main.py).
SETTINGS = {
    "ml-1m-small": (
        MOVIELENS,
        f"{IDS_AND_TIMES} {SMALL} --lr=0.003 --infonce_temp=0.05 --num_epochs=40 "
        "--early_stop_on=ndcg",
    ),
    "quickstart": (SYNTHETIC, "--num_epochs=30 --lr=0.003"),  # scripts/quickstart.sh
    "beauty": (BEAUTY, SPARSE_LOG),
    "beauty-ids": (BEAUTY, f"{IDS_AND_TIMES} {SPARSE_LOG}"),
    "kuairand": (KUAIRAND, SPARSE_LOG),
    "kuairand-ids": (KUAIRAND, f"{IDS_AND_TIMES} {SPARSE_LOG}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("--source", help="folder of the raw files, if there are any")
    parser.add_argument("--work_dir", default="outputs/reproduce", help="data, checkpoints, logs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    prepare, flags = SETTINGS[args.name]
    run_dir = Path(args.work_dir) / f"{args.name}_seed{args.seed}"
    data_dir = Path(args.work_dir) / f"data_{args.name.split('-ids')[0]}"
    if not (data_dir / "manifest.json").exists():
        script, *arguments = prepare.split()
        places = {"source": args.source, "data": data_dir}
        call([f"scripts/{script}", *(argument.format(**places) for argument in arguments)])
    folders = [f"--data_dir={data_dir}", f"--output_dir={run_dir}", f"--log_dir={run_dir}/logs"]
    command = [
        "main.py",
        *flags.split(),
        f"--seed={args.seed}",
        f"--device={args.device}",
        "--num_workers=1",
    ]
    call([*command, *folders])
    result = {
        "name": args.name,
        "command": f"python {' '.join(command)}",
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


def environment(device: str) -> dict[str, object]:
    """What a figure depends on besides the code: commit, machine, versions, date."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    cpus = [li for li in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in li]
    return {
        "commit": commit.stdout.strip(),
        "device": device,
        "cpu": f"{len(cpus)} x {cpus[0].split(':')[1].strip()}",
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()

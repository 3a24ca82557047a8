"""Recommendations for a million users among 100,000 items: minutes and memory on this machine.

    python benchmarks/export_users.py

Runs `main.py --inference_only --export_users all` on histories of 40 events in the mean, with a
model of the default shape and random weights. Memory is that of the command and its loader
processes together, without the pages of files, which the system takes back when it needs them, and
without the few batches that are on their way between them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from export_speed import anonymous_kb
from record import ROOT, environment, write_by_cpu
from synthetic_catalogue import open_run, write_sequences

from files.checkpoint import save_checkpoint

MEAN_EVENTS, MOST_EVENTS = 40, 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000, help="10,000 at least")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = np.random.default_rng(1).geometric(1 / MEAN_EVENTS, args.users) + 1
        lengths = lengths.clip(max=MOST_EVENTS)
        data_dir = write_sequences(folder / "data", args.items, lengths)
        model = open_run(data_dir).model
        content = {"config": asdict(model.config), "weights": model.state_dict()}
        save_checkpoint(folder / "model.pt", content)
        del model, content
        seconds, peak_kb = export(folder, data_dir)
        size = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    result = {"users": args.users, "items": args.items, "events": int(lengths.sum())}
    result |= {"minutes": round(seconds / 60, 2), "peak_gb": round(peak_kb / 1e6, 2)}
    write_by_cpu("export_users", result | {"written_gb": round(size / 1e9, 2)} | environment("cpu"))


def export(folder: Path, data_dir: Path) -> tuple[float, int]:
    """Seconds, and the most kB of memory at once."""
    command = [sys.executable, "main.py", "--inference_only", "--export_users=all", "--device=cpu"]
    places = [f"--data_dir={data_dir}", f"--output_dir={folder}/out"]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [*command, *places, f"--state_dict_path={folder}/model.pt"], cwd=ROOT
    )
    while process.poll() is None:
        peak = max(peak, memory_kb(process.pid))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"main.py ended with {process.returncode}")
    return time.perf_counter() - started, peak


def memory_kb(pid: int) -> int:
    """Of a process and its children."""
    total = 0
    try:
        total += anonymous_kb(pid)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, StopIteration):  # it has ended
        return total
    return total + sum(memory_kb(int(child)) for child in children)


if __name__ == "__main__":
    main()

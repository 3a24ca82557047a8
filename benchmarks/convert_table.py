"""Speed, memory and temporary files of scripts/prepare_table.py on generated logs of two sizes.

    python benchmarks/convert_table.py

Users have 100 events on average, and popular items are frequent. Seconds are those of the processor
and of the clock; with the slope between the two sizes a larger log is extrapolated. `--former DIR`
names a checkout of an earlier commit, whose converter reads the same CSV file. The last line
printed is one JSON object, which is also what is written.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import duckdb
from record import ROOT, environment, write

EXTRAPOLATED = 100_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    sizes = [2_000_000, 8_000_000]
    parser.add_argument("--events", type=int, nargs=2, default=sizes, help="of the two logs")
    parser.add_argument("--former", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--work_dir", help="for some GB of files, removed at the end; None: /tmp")
    args = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        for count in args.events:
            for suffix in ("csv.gz", "parquet"):
                log = generate(Path(folder) / f"log.{suffix}", count)
                rows.append({"events": count, "form": suffix, **convert(ROOT, log)})
                print(rows[-1], flush=True)
                if args.former and suffix == "csv.gz":
                    rows.append({"events": count, "form": "former", **convert(args.former, log)})
                    print(rows[-1], flush=True)
                log.unlink()
    slopes = {form: slope(rows, form) for form in dict.fromkeys(row["form"] for row in rows)}
    result = {
        "rows": rows,
        "cpu_seconds_per_million": slopes,
        f"cpu_minutes_for_{EXTRAPOLATED:_}": {
            form: round(value * EXTRAPOLATED / 60e6, 1) for form, value in slopes.items()
        },
        "load_before": round(load, 2),
        "duckdb": version("duckdb"),
        **environment("cpu"),
    }
    write("convert_table", result)


def generate(path: Path, num_events: int) -> Path:
    """A log in no order: user, item and Unix seconds of one year."""
    users, items = max(num_events // 100, 1), max(num_events // 200, 1)
    query = (
        f"SELECT (hash(i) % {users})::BIGINT AS user, floor({items} * "
        "pow((hash(i + 7) % 1000003) / 1000003.0, 2))::BIGINT AS item, "
        f"1700000000 + (hash(i + 13) % 31536000)::BIGINT AS timestamp FROM range({num_events}) t(i)"
    )
    form = "FORMAT parquet" if path.suffix == ".parquet" else "FORMAT csv, COMPRESSION gzip, HEADER"
    duckdb.execute(f"COPY ({query}) TO '{path}' ({form})")
    return path


def convert(checkout: Path, log: Path) -> dict[str, float]:
    """Seconds, and the peaks of memory and of temporary files, of one conversion."""
    data_dir, peak, done = log.parent / "data", [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(data_dir / ".tables", peak, done))
    watcher.start()
    script = checkout / "scripts" / "prepare_table.py"
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, script, log, data_dir, "--overwrite"], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if status:
        raise SystemExit(f"{script}: exit status {status}")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * resource_unit() / 1e9, 2),
        "temporary_gb": round(peak[0] / 1e9, 2),
    }


def resource_unit() -> int:
    """Bytes in which ru_maxrss is given: one on macOS, 1,024 elsewhere."""
    return 1 if sys.platform == "darwin" else 1024


def watch(folder: Path, peak: list[int], done: threading.Event) -> None:
    """The largest sum of the sizes of the folder's files, into `peak`."""
    while not done.wait(0.5):
        try:
            sizes = [path.stat().st_blocks * 512 for path in folder.rglob("*")]
        except OSError:  # removed meanwhile
            continue
        peak[0] = max(peak[0], sum(sizes))


def slope(rows: list[dict], form: str) -> float:
    """Processor seconds for a million more events."""
    small, large = (row for row in rows if row["form"] == form)
    difference = large["cpu_seconds"] - small["cpu_seconds"]
    return round(1e6 * difference / (large["events"] - small["events"]), 2)


if __name__ == "__main__":
    main()

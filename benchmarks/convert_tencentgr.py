"""Speed and memory of scripts/prepare_tencentgr.py on a generated set of TencentGR's shape.

    python benchmarks/convert_tencentgr.py

Lines have 88 events on average with 13 item features each, as the real ones. The files were just
written, so they come from the page cache. Memory is the proportional set size (PSS), summed over
the converter's processes and sampled: what is shared counts once. "anonymous" leaves out the pages
of mapped files, which the system takes back when it needs them. The last line printed is one JSON
object, which is also what is written.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from record import ROOT, environment, write

CARDINALITIES = {  # of the set with a million users
    "100": 6, "101": 51, "102": 90_709, "103": 86, "104": 2, "105": 7, "106": 14, "107": 19,
    "108": 4, "109": 3, "110": 2, "112": 30, "114": 20, "115": 691, "116": 18, "117": 497,
    "118": 1_426, "119": 4_191, "120": 3_392, "121": 2_135_891, "122": 90_919,
}  # fmt: skip
ITEM_IDS = [i for i in CARDINALITIES if i in ("100", "101", "102") or i > "111"]
FULL_USERS, FULL_ITEMS, FULL_BYTES = 1_000_000, 4_800_000, 16e9  # the real set
FIRST_ITEM, FIRST_USER = 20_000_000_000, 1_000_000
CONVERT = """
import sys
if sys.argv.pop(1) == "json":
    sys.modules["orjson"] = None
sys.path[0] = "scripts"
import prepare_tencentgr
sys.exit(prepare_tencentgr.main())
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--num_users", type=int, default=100_000)
    parser.add_argument("--num_items", type=int, default=500_000)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--work_dir", help="for 4 GB of files, removed at the end; None: /tmp")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        source, full = Path(folder) / "source", Path(folder) / "full"
        generate(source, args.num_users, args.num_items)
        rows = [
            measure(source, Path(folder) / parser_name, parser_name, args.num_workers)
            for parser_name in ("json", "orjson")
            if find_spec(parser_name)
        ]
        generate(full, 1, 1000, FULL_USERS, FULL_ITEMS)
        index_row = measure(full, Path(folder) / "out", "json", args.num_workers)
    for row in rows:  # linear: users, items and bytes grow alike
        row["minutes_1m"] = round(row["seconds"] * FULL_BYTES / row["json_mb"] / 1e6 / 60, 1)
    result = {
        "users": args.num_users,
        "items": args.num_items,
        "num_workers": args.num_workers,
        "load_average_at_start": load,
        "runs": rows,
        "indexer_of_1m_alone": index_row,
        **environment("cpu"),
    }
    columns = list(rows[0])
    print("  ".join(f"{name:>20}" for name in columns))
    for row in [*rows, index_row]:
        print("  ".join(f"{row.get(name, ''):>20}" for name in columns))
    write("convert_tencentgr", result)


# ---------------------------------------------------------------------------------- the generator


def generate(
    folder: Path,
    num_users: int,
    num_items: int,
    indexed_users: int | None = None,
    indexed_items: int | None = None,
) -> None:
    """A source folder: a line per user, features of each item, and an indexer that may know more.

    A tenth of the users is asked for in predict_seq.jsonl, an eighth of the items is a candidate.
    """
    folder.mkdir()
    indexed_users, indexed_items = indexed_users or num_users, indexed_items or num_items
    sizes = {i: max(1, min(n, n * indexed_items // FULL_ITEMS if n > 5000 else n))
             for i, n in CARDINALITIES.items()}  # fmt: skip
    write_indexer(folder / "indexer.pkl", indexed_users, indexed_items, sizes)
    rng = np.random.default_rng(7)
    features = item_features(rng, num_items, sizes)
    with open(folder / "item_feat_dict.json", "w") as file:
        file.write("{" + ", ".join(f'"{i}": {f}' for i, f in enumerate(features, 1)) + "}")
    with open(folder / "seq.jsonl", "w") as file:
        file.writelines(lines(rng, range(1, num_users + 1), features, sizes))
    with open(folder / "predict_seq.jsonl", "w") as file:
        names = [f"user_{FIRST_USER + user:08d}" for user in range(1, num_users + 1, 10)]
        file.writelines(lines(rng, names, features, sizes))
    with open(folder / "predict_set.jsonl", "w") as file:
        for row, item in enumerate(range(0, num_items, 8)):
            text = f'"retrieval_id": {row}, "features": {features[item]}'
            file.write(f'{{"creative_id": {FIRST_ITEM + 7 * (item + 1)}, {text}}}\n')


def write_indexer(path: Path, num_users: int, num_items: int, sizes: dict[str, int]) -> None:
    codes = {i: {int(i) * 10**7 + v: v for v in range(1, n + 1)} for i, n in sizes.items()}
    indexer = {
        "u": {f"user_{FIRST_USER + user:08d}": user for user in range(1, num_users + 1)},
        "i": {FIRST_ITEM + 7 * item: item for item in range(1, num_items + 1)},
        "f": codes | {"111": {111 * 10**7 + item: item for item in range(1, num_items + 1)}},
    }
    with open(path, "wb") as file:
        pickle.dump(indexer, file, protocol=4)


def item_features(rng: np.random.Generator, num_items: int, sizes: dict[str, int]) -> list[str]:
    """JSON of each item's features; two thirds lack feature 115."""
    columns = [rng.integers(1, sizes[i] + 1, num_items).tolist() for i in ITEM_IDS]
    has_115 = (rng.random(num_items) < 1 / 3).tolist()
    texts = []
    for item, values in enumerate(zip(*columns, strict=True), 1):
        pairs = [
            f'"{i}": {v}'
            for i, v in zip(ITEM_IDS, values, strict=True)
            if i != "115" or has_115[item - 1]
        ]
        texts.append("{" + ", ".join(pairs) + f', "111": {item}}}')
    return texts


def lines(
    rng: np.random.Generator, users: list | range, features: list[str], sizes: dict[str, int]
) -> Iterator[str]:
    """A line of 76 to 100 events per user, 1.3 % without an action, then the profile."""
    for user in users:
        name, length = json.dumps(user), int(rng.integers(76, 101))
        # Few items are frequent, as in reality.
        items = (len(features) * rng.random(length) ** 3).astype(int).tolist()
        actions = np.where(rng.random(length) < 0.1, "1", "0")
        actions[rng.random(length) < 0.013] = "n"
        times = 1_745_000_000 + rng.integers(0, 60_000, length).cumsum()
        records = [
            f"[{name}, {item + 1}, null, {features[item]}, {'null' if action == 'n' else action}, "
            f"{time}]"
            for item, action, time in zip(items, actions.tolist(), times.tolist(), strict=True)
        ]
        values = [f'"{i}": {1 + int(rng.integers(sizes[i]))}' for i in ("103", "104", "105", "109")]
        arrays = [f'"{i}": [{1 + int(rng.integers(sizes[i]))}]' for i in ("106", "107")]
        profile = "{" + ", ".join(values + arrays) + "}"
        records.append(f"[{name}, null, {profile}, null, null, {times[-1] + 5000}]")
        yield "[" + ", ".join(records) + "]\n"


# -------------------------------------------------------------------------------- the measurement


def measure(source: Path, data_dir: Path, parser_name: str, num_workers: int) -> dict[str, float]:
    """Seconds, memory and size of one conversion."""
    command = [sys.executable, "-c", CONVERT, parser_name, str(source), str(data_dir)]
    cpu, start = children_cpu(), time.perf_counter()
    process = subprocess.Popen(
        [*command, f"--num_workers={num_workers}"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    peaks = {"Pss": 0, "Pss_Anon": 0}
    while process.poll() is None:
        sample = tree_memory(process.pid)
        peaks = {name: max(peak, sample[name]) for name, peak in peaks.items()}
        time.sleep(0.1)
    seconds, cpu = time.perf_counter() - start, children_cpu() - cpu
    if process.returncode:
        raise RuntimeError(f"the converter ended with {process.returncode}")
    json_mb = sum(path.stat().st_size for path in source.glob("*seq.jsonl")) / 1e6
    linked = {data_dir / "indexer.pkl", data_dir / "item_feat_dict.json"}
    written = [path for path in data_dir.rglob("*") if path.is_file() and path not in linked]
    return {
        "parser": parser_name,
        "json_mb": round(json_mb),
        "seconds": round(seconds, 1),
        "mb_per_s": round(json_mb / seconds, 1),
        "mb_per_s_per_core": round(json_mb / seconds / num_workers, 1),
        "mb_per_cpu_s": round(json_mb / cpu, 1),
        "peak_gb": round(peaks["Pss"] / 1e6, 2),
        "peak_anonymous_gb": round(peaks["Pss_Anon"] / 1e6, 2),
        "written_mb": round(sum(path.stat().st_size for path in written) / 1e6),
    }


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tree_memory(pid: int) -> dict[str, int]:
    """Memory of a process and of those it started, in kB."""
    total, pids = {"Pss": 0, "Pss_Anon": 0}, [pid]
    while pids:
        folder = Path(f"/proc/{pids.pop()}")
        try:
            for line in (folder / "smaps_rollup").read_text().splitlines()[1:]:
                name, value = line.split()[:2]
                if (name := name.rstrip(":")) in total:
                    total[name] += int(value)
            for children in folder.glob("task/*/children"):
                pids += children.read_text().split()
        except OSError:  # it has ended
            continue
    return total


if __name__ == "__main__":
    main()

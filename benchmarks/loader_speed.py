"""The loader: events per second beside JSON, an epoch with it, opening 100 M events, its memory.

    python benchmarks/loader_speed.py --data_dir data/ml-1m

Takes MovieLens-1M as scripts/prepare_movielens.py writes it, and writes 1 M sequences of 100 events
over 1 M items beside it, for as long as it runs (1.6 GB of disk; the three splits are one file).
The last line printed is one JSON object, which is written beside those of other CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from record import environment, write_by_cpu
from settings import IDS_AND_TIMES, SMALL
from torch.utils.data import DataLoader, Dataset

from dataset import MyDataset, Negatives
from engine.flags import get_args
from engine.setup import make_loader
from engine.training_setup import open_datasets, prepare_run
from files.data_folder import SPLITS, Manifest, fingerprint, read_manifest
from files.data_writer import begin_folder, finish_folder
from files.sequences import EVENT_DTYPE, Split, open_split

CPU, MAXLEN, BATCH = torch.device("cpu"), 200, 128
LENGTH = 100  # events of a sequence of the large set
WORKERS = (0, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="MovieLens-1M, converted")
    parser.add_argument("--rounds", type=int, default=5, help="of everything that is repeated")
    parser.add_argument("--steps", type=int, default=0, help="of an epoch; 0: all")
    parser.add_argument("--sequences", type=int, default=1_000_000, help="of the large set")
    args = parser.parse_args()
    data_dir = Path(args.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        large = write_large(Path(folder) / "large", args.sequences)
        result = {
            "threads": torch.get_num_threads(),
            "large_events": args.sequences * LENGTH,
            **opening_seconds(large, args.rounds),  # first: a run opens data with a fresh heap
            **event_rates(data_dir, Path(folder) / "users.jsonl", args.rounds),
            **epoch_seconds(data_dir, args.rounds, args.steps),
            "worker_uss_mb_ml_1m": worker_megabytes(data_dir),
            "worker_uss_mb_large": worker_megabytes(large),
            **environment("cpu"),
        }
    for name, value in result.items():
        print(f"{name:32} {value}")
    write_by_cpu("loader_speed", result)


def timed(work: Callable, *args: object) -> tuple[float, object]:
    started = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - started, result


# ------------------------------------------------------------------------------- events per second


def event_rates(data_dir: Path, lines: Path, rounds: int) -> dict[str, float]:
    """Events per CPU second of one process and one thread, whole epochs, by turns."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dataset = MyDataset(data_dir, "train", MAXLEN)
    plain = JsonDataset(write_lines(data_dir, lines))
    loaders = {
        "ours": make_loader(dataset, BATCH, 1, CPU, 0, is_shuffled=True),
        "json": DataLoader(plain, BATCH, shuffle=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            started = time.process_time()  # the core's, whatever else the machine does
            num_events = count_events(loader)
            rates[name].append(num_events / (time.process_time() - started))
    torch.set_num_threads(num_threads)
    return {
        "events_per_s": round(median(rates["ours"])),
        "json_events_per_s": round(median(rates["json"])),
        "ours_to_json": round(median(map(float.__truediv__, rates["ours"], rates["json"])), 1),
    }


def count_events(loader: Iterable) -> int:
    return sum(len(b.item_index) if hasattr(b, "item_index") else int(b[-1].sum()) for b in loader)


def write_lines(data_dir: Path, path: Path) -> Path:
    """A user's line as the Tencent competition has it, without features.

    [[user, item, user_features, item_features, action, time], ...]
    """
    events, offsets, _ = open_split(data_dir, "train")
    with open(path, "w") as file:
        for user, sequence in enumerate(np.split(events, offsets[1:-1])):
            records = [[user, i, None, None, a, t] for i, a, t in sequence.tolist()]
            file.write(json.dumps(records) + "\n")
    return path


class JsonDataset(Dataset):
    """The usual baseline: seek a user's line, parse it, go back through its events one by one.

    Each user gives six (MAXLEN,) int64 arrays and their mask; the default collate stacks them.
    """

    def __init__(self, path: Path):
        self.file = open(path, "rb")  # noqa: SIM115, open as long as the data set
        self.starts = np.cumsum([0, *map(len, self.file)])[:-1].tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        self.file.seek(self.starts[index])
        records = json.loads(self.file.readline())
        padded = np.zeros((7, MAXLEN), np.int64)
        following, place = records[-1], MAXLEN - 1
        for record in reversed(records[:-1]):
            padded[:3, place] = record[1], record[4], record[5]
            padded[3:6, place] = following[1], following[4], following[5]
            padded[6, place] = 1
            following, place = record, place - 1
            if place < 0:
                break
        return tuple(padded)


# -------------------------------------------------------------------------------- seconds per epoch


def epoch_seconds(data_dir: Path, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of an epoch over each loader, and over the same batches made beforehand."""
    shape = f"{IDS_AND_TIMES} {SMALL} --batch_size {BATCH} --device cpu"
    run = prepare_run(get_args(f"--data_dir {data_dir} {shape}".split()))
    run.model.train()
    step = run.training_step
    dataset = run.datasets["train"]
    loaders = {
        f"{count}_workers": make_loader(dataset, BATCH, 1, CPU, count, is_shuffled=True)
        for count in WORKERS
    }
    for loader in loaders.values():
        loader.batch_sampler.num_sequences = min(steps * BATCH or len(dataset), len(dataset))
    sources: dict[str, Iterable] = {"preloaded": list(loaders["0_workers"]), **loaders}
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(rounds + 1):
        for name, batches in sources.items():
            seconds[name].append(timed(lambda b: [step([one], 1, 1) for one in b], batches)[0])
    # The first round is to warm up: it starts the workers too.
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    result = {f"epoch_s_{name}": round(value, 3) for name, value in medians.items()}
    for name in list(sources)[1:]:
        ratios = map(float.__truediv__, seconds[name][1:], seconds["preloaded"][1:])
        result[f"{name}_to_preloaded"] = round(median(ratios), 3)
    return result


# ------------------------------------------------------------------------------ opening, and memory


def write_large(folder: Path, num_sequences: int) -> Path:
    """Random items and rising times; every split has all events."""
    begin_folder(folder)
    generator = np.random.default_rng(1)
    offsets = np.arange(num_sequences + 1) * LENGTH
    users = np.arange(1, num_sequences + 1, dtype="<i4")
    with open(folder / "train_data.bin", "wb") as file:
        for start in range(0, num_sequences, 10_000):
            events = np.zeros((min(10_000, num_sequences - start), LENGTH), EVENT_DTYPE)
            events["item_id"] = generator.integers(1, num_sequences + 1, events.shape)
            events["timestamp"] = generator.integers(1, 10_000, events.shape).cumsum(1)
            file.write(events.data)
    offsets.astype("<i8").tofile(folder / "train_offsets.bin")
    users.tofile(folder / "train_users.bin")
    names = [f"train_{what}.bin" for what in ("data", "offsets", "users")]
    for split in SPLITS[1:]:
        for name in names[:3]:
            os.link(folder / name, folder / name.replace("train", split))
            names.append(name.replace("train", split))
    targets = {"train": "next", "valid": "last", "test": "last"}
    finish_folder(folder, Manifest(num_sequences, num_sequences, 1, targets), names)
    return folder


def opening_seconds(data_dir: Path, rounds: int) -> dict[str, float]:
    """Medians of what a start does, from the manifest to the first batch; files are cached."""
    columns = [opening_parts(data_dir) for _ in range(rounds)]
    parts = {name: round(median(column[name] for column in columns), 3) for name in columns[0]}
    return {"open_s": round(median(sum(column.values()) for column in columns), 3), **parts}


def opening_parts(data_dir: Path) -> dict[str, float]:
    parts = {}
    parts["open_s_manifest"], manifest = timed(read_manifest, data_dir)
    parts["open_s_fingerprint"], _ = timed(fingerprint, data_dir)
    parts["open_s_split"], train = timed(Split, data_dir, "train", *manifest[:3])
    parts["open_s_count_items"], counts = timed(train.count_items)
    parts["open_s_count_targets"], counts = timed(train.count_targets, counts, None)
    negatives = Negatives(manifest.num_items, "mixed", 1024, counts, has_logq=True)
    for split in SPLITS:
        parts[f"open_s_{split}"], dataset = timed(MyDataset, data_dir, split, MAXLEN, negatives)
    parts["open_s_first_batch"], _ = timed(
        lambda: next(iter(make_loader(dataset, BATCH, 1, CPU, 0, is_shuffled=True)))
    )
    return parts


def worker_megabytes(data_dir: Path, num_batches: int = 500) -> float:
    """The most that a worker has to itself (USS), looked at after each batch."""
    args = get_args(f"--data_dir {data_dir} {IDS_AND_TIMES}".split())
    datasets, _ = open_datasets(args, read_manifest(data_dir), {})
    batches = iter(make_loader(datasets["train"], BATCH, 1, CPU, max(WORKERS), is_shuffled=True))
    most = 0
    for _, _ in zip(range(num_batches), batches, strict=False):
        most = max(most, *(private_kb(worker.pid) for worker in batches._workers))
    return round(most / 1024, 1)


def private_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    main()

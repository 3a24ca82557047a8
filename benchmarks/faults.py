"""Faults against the promises: kills, full disks, dead loaders; how many runs came out otherwise.

    python benchmarks/faults.py --cost --data_dir data/ml-1m
    python benchmarks/faults.py --rows 1 2 --trials 20

A trial does something to a tiny training or export, gives the same command again until it is
through, and compares what there is with what a run that nothing hit wrote: every tensor of every
checkpoint, every byte of other files, and every logged (tag, step, value) but the timings. No
failure in N trials bounds the rate of failures below 3 / N (95 %).

A trial's processes are forks of this one, which has imported torch and run no operator of it:
torch's threads do not survive a fork. Faults are put around system calls in the fork; the package
has no hooks for them. tests/test_faults.py runs the same rows with fewer trials. The last line
printed is one JSON object, which is also what is written, but with --trials; rows that were
not run stay as they were.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import prepare_synthetic
import torch
import torch._dynamo  # which the first optimiser imports: 2 s that a fork need not take
from record import RESULTS, ROOT, environment
from settings import IDS_AND_TIMES, SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import get_worker_info

from dataset import MyDataset
from engine.flags import get_args
from engine.setup import make_loader
from engine.state import save_run
from engine.training_setup import prepare_run
from engine.training_step import TrainingStep
from files import atomic_io
from files.atomic_io import DataError, file_entry, read_json
from files.checkpoint import load_checkpoint, load_newest_state, save_checkpoint, save_state
from main import main

STEPS = 6  # of each of two epochs
FLAGS = [
    "--device=cpu", "--num_workers=0", "--num_epochs=2", "--batch_size=4", "--maxlen=6",
    "--hidden_units=8", "--attention_dim=5", "--linear_dim=6", "--warmup_steps=2",
    "--negatives=mixed", "--num_negatives=4", "--log_every=1", "--save_every_steps=1",
    "--no-windows",
]  # fmt: skip
TIMINGS = {"Train/users_per_s", "Train/tokens_per_s", "Train/data_wait_ms", "Train/gpu_mem_gb"}
GRACE = 10  # seconds within which something has to come
END = 4_000  # of what a process printed, characters that a failure shows
HANG = 90  # seconds after which a process hangs
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what it purges

Fault = Callable[[], None]  # what a process does to itself before it runs the command


# ---------------------------------------------------------------------------------------- processes


def start(work: Callable[[], int], text: Path) -> int:
    """The id of a forked process that does `work` and exits with its result; it prints to `text`.

    It leads a process group, which its loaders belong to.
    """
    sys.stdout.flush()
    text.touch()
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it before it has a handler
    if pid := os.fork():
        signal.signal(signal.SIGINT, ours)
        return pid
    code = 1  # of an exception
    try:
        os.setpgid(0, 0)
        with open(text, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        faulthandler.register(signal.SIGUSR2)  # for `end_hanging`
        torch.set_num_threads(1)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code; minus the signal where one ended the process, as one that hangs is here."""
    timer = threading.Timer(HANG, end_hanging, [pid])
    timer.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        timer.cancel()


def end_hanging(group: int) -> None:
    """Kill a process and its loaders; they print first what each of their threads was doing."""
    os.killpg(group, signal.SIGUSR2)
    time.sleep(1)
    os.killpg(group, signal.SIGKILL)


def wait_until(is_so: Callable[[], object]) -> bool:
    """Whether it became so within GRACE seconds."""
    for _ in range(50 * GRACE):
        if is_so():
            return True
        time.sleep(0.02)
    return False


def is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def tap(act: Callable[[int, str], object]) -> None:
    """From here on do `act` before the n-th call, from 1, that takes a step or changes a file.

    Of a write half is done by then.
    """
    numbers = itertools.count(1)

    def tapped(owner: Any, name: str, attribute: str) -> None:
        plain = getattr(owner, attribute)

        def call(*args: Any, **options: Any) -> Any:
            act(next(numbers), name)
            return plain(*args, **options)

        setattr(owner, attribute, call)

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            data = memoryview(data).cast("B")
            half = super().write(data[: len(data) // 2])
            act(next(numbers), "write")
            return half + super().write(data[half:])

    def open_tapped(path: Any, mode: str = "r", **options: Any) -> Any:
        if mode != "wb":
            return open(path, mode, **options)
        act(next(numbers), "open")
        return io.BufferedWriter(File(path, "w"))

    for name in ("open", "fsync", "replace", "unlink", "mkdir"):
        tapped(os, name, name)
    tapped(TrainingStep, "step", "__call__")
    atomic_io.open = open_tapped


def kill_at(number: int) -> Fault:
    return lambda: tap(lambda n, _: n == number and os.kill(os.getpid(), signal.SIGKILL))


class Lab:
    """A tiny data folder, and what a training and an export make of it that nothing hits."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random, self.num_starts = folder, random.Random(seed), 0
        self.data, text = folder / "data", folder / "text"

        def write() -> int:
            prepare_synthetic.write(self.data, 4 * STEPS, 40, 7)
            return 0

        assert wait(start(write, text)) == 0, text.read_text()
        self.whole = Trial(self, folder / "whole")
        began = time.perf_counter()
        self.train_calls = self.whole.calls()
        self.seconds = time.perf_counter() - began  # of a training
        self.export_calls = self.whole.calls(*self.whole.export_flags)
        self.contents, self.points = self.whole.contents(), self.whole.points()

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """A trial in a folder that lives as long."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield Trial(self, Path(folder))

    def any_call(self, *names: str) -> int:
        """The number of a call, of those names, from a training's first step on."""
        calls = list(enumerate(self.train_calls, 1))[self.train_calls.index("step") :]
        return self.random.choice([n for n, name in calls if name in names or not names])


class Trial:
    """Folders of its own, and the command that is given again and again."""

    def __init__(self, lab: Lab, folder: Path):
        self.lab, self.text = lab, folder / "text"
        self.data = shutil.copytree(lab.data, folder / "data")  # where caches will be built
        self.output, self.logs = folder / "outputs", folder / "logs"
        self.export_flags = "--inference_only", f"--state_dict_path={self.output}/model_best.pt"

    def flags(self, *more: str) -> list[str]:
        folders = {"data_dir": self.data, "output_dir": self.output, "log_dir": self.logs}
        return [*FLAGS, *(f"--{name}={path}" for name, path in folders.items()), *more]

    def start(self, *flags: str, fault: Fault | None = None) -> int:
        """The id of a process under the command."""
        self.lab.num_starts += 1
        seconds, clock = 10 * self.lab.num_starts, time.time

        def work() -> int:
            time.time = lambda: clock() + seconds  # TensorBoard orders files by their second
            if fault is not None:
                fault()
            return main(self.flags(*flags))

        return start(work, self.text)

    def run(
        self, *flags: str, fault: Fault | None = None, after: float = 0, number: int = 0
    ) -> tuple[int, str]:
        """Exit code, and what was printed; signal `number` comes `after` seconds."""
        pid = self.start(*flags, fault=fault)
        if number:
            time.sleep(after)
            os.kill(pid, number)
        return wait(pid), self.text.read_text()

    def calls(self, *flags: str) -> list[str]:
        """Names of the tapped calls of a run that nothing hits."""
        path = self.output.with_name("calls")

        def note() -> None:
            file = open(path, "w", buffering=1)  # noqa: SIM115, as long as the process lives
            tap(lambda _, name: print(name, file=file))

        code, text = self.run(*flags, fault=note)
        assert code == 0, text
        return path.read_text().split()

    def finish(self, *flags: str) -> str:
        """Run to the end; what is not as in the whole run, empty: nothing."""
        code, text = self.run(*flags)
        return f"exit code {code}: {text[-END:]}" if code else self.difference()

    def finish_signalled(self, flags: list[str], text: str) -> str:
        """Run to the end; what is wrong, of steps too, after a first run that printed `text`."""
        code, rest = self.run(*flags)
        steps = [int(step) for step in re.findall(r"^epoch \d step (\d+)/", text + rest, re.M)]
        if code or steps != list(range(1, 2 * STEPS + 1)):
            return f"exit code {code}, steps {steps}: {text[-END:]}{rest[-END:]}"
        return self.difference("model_|metrics")

    def contents(self, pattern: str = "") -> dict[str, Any]:
        """Path in the output folder -> `content`, of all files that match but the lock."""
        found = self.output.rglob("*")
        paths = [path for path in found if path.is_file() and path.name != ".hstu.lock"]
        names = {str(path.relative_to(self.output)): path for path in paths}
        return {name: content(path) for name, path in names.items() if re.match(pattern, name)}

    def temporaries(self) -> list[str]:
        return [path.name for path in self.output.rglob("*.tmp")]

    def points(self) -> set[tuple[str, int, float]]:
        """(tag, step, value) of what is logged, each once: a kill may have it logged again."""
        log = EventAccumulator(str(self.logs), size_guidance={"scalars": 0}).Reload()
        tags = set(log.Tags()["scalars"]) - TIMINGS
        return {(tag, event.step, event.value) for tag in tags for event in log.Scalars(tag)}

    def difference(self, pattern: str = "") -> str:
        """What of the files that match, and of the log, is not as in the whole run.

        A kill may leave an older state, which no later one has removed.
        """
        found, expected = self.contents(pattern), self.lab.contents
        has_export = (self.output / "item_embeddings").exists()
        names = {
            name
            for name in expected
            if re.match(pattern, name) and (has_export or "embeddings" not in name)
        }
        more = sorted(found.keys() - names)
        wrong = [f"{n} is there" for n in more if not re.match(r"resume_\d+\.pt", n)]
        wrong += [f"{n} is not there" for n in sorted(names - found.keys())]
        both = sorted(names & found.keys())
        wrong += [f"{n} differs" for n in both if not is_equal(found[n], expected[n])]
        wrong += [f"{point} logged by one only" for point in self.points() ^ self.lab.points]
        return ", ".join(wrong[:10])

    def refusal(self, code: int, text: str, *words: str) -> str:
        """What is wrong with an end in one line that has these words."""
        lines = re.findall(r"^\W*(error: .*)", text, re.MULTILINE)  # torch ends lines with "\0"
        is_good = code == 1 and len(lines) == 1 and all(word in lines[0] for word in words)
        if is_good and "Traceback" not in text and not self.temporaries():
            return ""
        return f"exit code {code}, temporaries {self.temporaries()}: {text[-END:]}"


def content(path: Path) -> Any:
    """What two runs have to share of a file; what is wrong with it, if it is damaged."""
    try:
        if path.suffix == ".pt":
            return load_checkpoint(path)
        if path.name == "manifest.json":  # the same weights may be in other bytes
            return read_json(path) | {"checkpoint_sha256": ""}
    except DataError as error:
        return str(error)
    return path.read_bytes()


def is_equal(one: Any, other: Any) -> bool:
    """Whether all of two checkpoints is equal, their tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(is_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return one == other


# --------------------------------------------------------------------------------------------- rows


def kill_anywhere(lab: Lab, numbers: range) -> Iterator[str]:
    for _ in numbers:
        with lab.trial() as trial:
            trial.run(number=signal.SIGKILL, after=lab.random.uniform(0, 1.2 * lab.seconds))
            problem = trial.finish()
            flags, seconds = trial.export_flags, lab.random.uniform(0, lab.seconds / 2)
            trial.run(*flags, number=signal.SIGKILL, after=seconds)
            yield problem or trial.finish(*flags)


def kill_at_every_call(lab: Lab, numbers: range) -> Iterator[str]:
    for k in numbers:
        with lab.trial() as trial:
            number = spread(k, len(lab.train_calls))
            code, text = trial.run(fault=kill_at(number))
            strays = trial.temporaries()
            problem = trial.finish()
            if code != -signal.SIGKILL or len(strays) > 1:
                problem = f"exit code {code}, {strays}: {text[-END:]}"
            yield problem and f"before {lab.train_calls[number - 1]}, call {number}: {problem}"


def spread(k: int, count: int) -> int:
    """One of 1..count: far from the one of k - 1, and each once as k goes from 0 to count - 1."""
    return 1 + 101 * k % count


def kill_repeatedly(lab: Lab, numbers: range) -> Iterator[str]:
    for _ in numbers:
        with lab.trial() as trial:
            for _ in range(lab.random.randint(2, 5)):
                trial.run(number=signal.SIGKILL, after=lab.random.uniform(0, lab.seconds))
            yield trial.finish()


def kill_a_resume(lab: Lab, numbers: range) -> Iterator[str]:
    for _ in numbers:
        with lab.trial() as trial:
            trial.run(fault=kill_at(lab.any_call()))
            trial.run(number=signal.SIGKILL, after=lab.random.uniform(0, lab.seconds / 3))
            yield trial.finish()


def resume_otherwise(lab: Lab, numbers: range) -> Iterator[str]:
    """With other numbers of loaders and threads: to the same tensors.

    With other threads only for batches as small as these, which BLAS and the loss leave whole.
    """
    pairs = list(itertools.product((0, 1, 2), repeat=2))
    for k in numbers:
        with lab.trial() as trial:
            one, other = pairs[k % len(pairs)]
            trial.run(f"--num_workers={one}", fault=kill_at(lab.any_call("step")))
            threads = 1 + k // len(pairs)
            code, text = trial.run(
                f"--num_workers={other}", fault=lambda n=threads: torch.set_num_threads(n)
            )
            problem = trial.difference() if code == 0 else text[-END:]
            yield problem and f"{one}, then {other} loaders, {threads} threads: {problem}"


def flip_a_bit(data: bytearray, randomly: random.Random) -> bytes:
    data[randomly.randrange(len(data))] ^= 1 << randomly.randrange(8)
    return data


def spoil(data: bytearray, randomly: random.Random) -> bytes:
    cut = randomly.randrange(1, len(data) - 4096)
    kinds = {
        "truncated": lambda: data[:cut],
        "longer": lambda: data + bytes(cut),
        "zero tail": lambda: data[:cut] + bytes(len(data) - cut),
        "zero page": lambda: data[:cut] + bytes(4096) + data[cut + 4096 :],
        "empty": lambda: b"",
    }
    return kinds[randomly.choice(list(kinds))]()


def damage(
    lab: Lab, numbers: range, how: Callable[[bytearray, random.Random], bytes]
) -> Iterator[str]:
    """Each trial's outcome is a line that a child prints: here operators run."""
    path = lab.folder / "damaged" / "resume_1.pt"
    path.parent.mkdir(exist_ok=True)

    def work() -> int:
        written = {"config": {}, "table": torch.arange(1.0, 250_001)}
        save_checkpoint(path, written)
        good = path.read_bytes()
        for _ in numbers:
            path.write_bytes(how(bytearray(good), lab.random))
            try:
                print("" if is_equal(load_checkpoint(path), written) else "loaded")
            except DataError as error:
                print("" if path.name in str(error) else f"not named: {error}")
        return 0

    code, lines = wait(start(work, lab.folder / "text")), (lab.folder / "text").read_text()
    yield from lines.splitlines() if code == 0 else [lines]


def fill_the_disk(lab: Lab, numbers: range) -> Iterator[str]:
    """From a write, a sync or a rename on, all of them fail."""
    for _ in numbers:
        with lab.trial() as trial:
            first = lab.any_call("write", "fsync", "replace")

            def act(n: int, name: str, first: int = first) -> None:
                if n >= first and name in ("write", "fsync", "replace"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            code, text = trial.run(fault=lambda act=act: tap(act))
            problem = trial.refusal(code, text, "No space left", "free")
            yield problem or trial.finish()


def fill_a_real_disk(lab: Lab, numbers: range) -> Iterator[str]:
    """A file system in memory of each size; only root may mount one."""
    most = sum(path.stat().st_size for path in lab.whole.output.rglob("*.*"))
    for _ in numbers:
        with lab.trial() as trial:
            trial.output.mkdir()
            size = lab.random.randrange(8192, most)
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(trial.output)]
            if subprocess.run(mount, capture_output=True).returncode:
                return
            try:
                code, text = trial.run()
                problem = code and trial.refusal(code, text, "No space left", "free")
                subprocess.run([*mount[:4], "remount,size=100m", *mount[5:]], check=True)
                yield problem or trial.finish()
            finally:
                subprocess.run(["umount", str(trial.output)], check=True)


def fail_a_call(lab: Lab, numbers: range) -> Iterator[str]:
    kinds = [("fsync", errno.EIO), ("replace", errno.EXDEV), ("replace", errno.EPERM)]
    for k in numbers:
        with lab.trial() as trial:
            name, error = kinds[k % 3]
            number = lab.any_call(name)

            def act(n: int, _: str, number: int = number, error: int = error) -> None:
                if n == number:
                    raise OSError(error, os.strerror(error))

            code, text = trial.run(fault=lambda act=act: tap(act))
            yield trial.refusal(code, text, os.strerror(error), str(trial.output)) or trial.finish()


def signal_anywhere(lab: Lab, numbers: range) -> Iterator[str]:
    """States are saved at the end of an epoch only, and by the signal."""
    codes = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)]
    for k in numbers:
        with lab.trial() as trial:
            number, expected = codes[k % 3]
            flags = ["--save_every_steps=0", f"--num_workers={k // 3 % 2}"]
            after = lab.random.uniform(0, lab.seconds)
            code, text = trial.run(*flags, number=number, after=after)
            problem = trial.finish_signalled(flags, text)
            # Before there was a handler, or when all was done and there was none any more.
            is_outside = code == -number and (not text or "  plots  " in text)
            if (code not in (expected, 0) and not is_outside) or "Traceback" in text:
                problem = f"exit code {code}: {text[-END:]}"
            yield problem and f"signal {number} after {after:.3f} s: {problem}"


def in_loaders(act: Callable[[], None], number: int) -> None:
    """From here on loader processes do `act` before that batch of the first epoch, from 1."""
    fetch = MyDataset.__getitems__

    def acting(dataset: MyDataset, draw: Any) -> Any:
        epoch, batch = draw.seed[1:]
        if get_worker_info() is not None and epoch == 0 and batch == number:
            act()
        return fetch(dataset, draw)

    MyDataset.__getitems__ = acting


def raise_an_error() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "train_data.bin")


LOADER_FAULTS: dict[str, Fault] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda: os._exit(3),
    "an error": raise_an_error,
}


def kill_a_loader(lab: Lab, numbers: range) -> Iterator[str]:
    """The run ends, whatever it says, and so do the other loaders."""
    for k in numbers:
        with lab.trial() as trial:
            name, act = list(LOADER_FAULTS.items())[k % len(LOADER_FAULTS)]
            batch = lab.random.randint(1, STEPS)
            pid = trial.start(
                "--num_workers=2", fault=lambda act=act, batch=batch: in_loaders(act, batch)
            )
            code, has_ended = wait(pid), wait_until(lambda pid=pid: is_gone(pid))
            text = trial.text.read_text()
            problem = trial.finish()
            if code != 1 or not has_ended:
                problem = f"exit code {code}, ended {has_ended}: {text[-END:]}"
            yield problem and f"{name} at batch {batch}: {problem}"


def share_a_folder(lab: Lab, numbers: range) -> Iterator[str]:
    """The first is killed in the end."""
    for _ in numbers:
        with lab.trial() as trial:
            number, mark = lab.any_call("step"), trial.output.with_name("held")

            def hold(n: int, _: str, number: int = number, mark: Path = mark) -> None:
                if n == number:
                    mark.touch()
                    time.sleep(60)

            first = trial.start(fault=lambda hold=hold: tap(hold))
            is_held = wait_until(mark.exists)
            code, text = trial.run()
            problem = trial.refusal(code, text, str(trial.output), "is at work in it")
            os.kill(first, signal.SIGKILL)
            wait(first)
            yield problem or trial.finish() or ("" if is_held else "never held")


def run_elsewhere(lab: Lab, numbers: range) -> Iterator[str]:
    """Not forked: from another folder, with other hashes of texts."""
    for k in numbers:
        with lab.trial() as trial:
            for flags in ((), trial.export_flags):
                done = subprocess.run(
                    [sys.executable, ROOT / "main.py", *trial.flags(*flags)],
                    cwd=trial.output.parent, capture_output=True, text=True,
                    env=os.environ | {"PYTHONHASHSEED": str(k), "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                if done.returncode:
                    break
            yield trial.difference() if done.returncode == 0 else done.stderr[-END:]


def kill_an_export(lab: Lab, numbers: range) -> Iterator[str]:
    """An older one lies there: what has a manifest afterwards is one of the two, whole."""
    for k in numbers:
        with lab.trial() as trial:
            shutil.copytree(lab.whole.output, trial.output)
            shutil.copytree(lab.whole.logs, trial.logs)
            older = "--inference_only", f"--state_dict_path={trial.output}/model_epoch_1.pt"
            trial.run(*older)
            number = spread(k, len(lab.export_calls))
            code, text = trial.run(*trial.export_flags, fault=kill_at(number))
            problem = "" if code == -signal.SIGKILL else f"exit code {code}: {text[-END:]}"
            for path in trial.output.glob("*_embeddings/manifest.json"):
                entries = read_json(path)["files"].items()
                if any(file_entry(path.with_name(name)) != entry for name, entry in entries):
                    problem = f"{path.parent.name} is mixed"
            problem = problem or trial.finish(*trial.export_flags)
            yield problem and f"before {lab.export_calls[number - 1]}, call {number}: {problem}"


class Row(NamedTuple):
    """Of the table of faults."""

    fault: str
    trials: Callable[[Lab, range], Iterator[str]]  # what is wrong after each; empty: nothing
    num_trials: int  # in the long run; tests/test_faults.py has a few of each


ROWS = {
    "1": Row("SIGKILL at a random time", kill_anywhere, 300),
    "2": Row("SIGKILL at every step and in every save", kill_at_every_call, 600),
    "3": Row("SIGKILL 2 to 5 times in a run", kill_repeatedly, 200),
    "4": Row("SIGKILL in a resume", kill_a_resume, 200),
    "5": Row("resumed with other loaders and threads", resume_otherwise, 18),
    "7": Row("a bit of a checkpoint flipped", partial(damage, how=flip_a_bit), 10_000),
    "8": Row("a checkpoint cut, zeroed, emptied", partial(damage, how=spoil), 2_000),
    "10": Row("the disk fills", fill_the_disk, 200),
    "10, tmpfs": Row("a small disk", fill_a_real_disk, 40),
    "12": Row("a sync or a rename fails", fail_a_call, 60),
    "13": Row("SIGTERM, SIGINT, SIGUSR1 at a random time", signal_anywhere, 600),
    "15": Row("a loader killed, crashed, gone, failing", kill_a_loader, 40),
    "17": Row("two trainings in one folder", share_a_folder, 20),
    "19": Row("another process, folder and hash seed", run_elsewhere, 6),
    "21": Row("SIGKILL in every part of an export", kill_an_export, 104),
}
# Of the table, what other tests have.
TESTS = {
    "6": "test_main.py::test_a_finished_run_is_not_trained_again",
    "9": "test_checkpoint.py::test_when_every_state_is_damaged_the_error_names_all",
    "11": "test_run_log.py -k is_one_warning_and_training_goes_on",
    "16": "test_main.py::test_a_loss_that_is_not_finite_ends_the_run_before_a_weight_changes",
    "18": "test_checkpoint.py::test_the_newest_state_is_the_one_with_the_highest_step",
    "20": "test_dataset.py::test_four_workers_read_thirty_thousand_sequences_without_one_wrong",
}
JOBS = 2  # trials at a time


def outcomes(row: str, numbers: range) -> list[str]:
    """What is wrong after each of those trials, empty: nothing. Run it where no operator ran."""
    memory = Path("/dev/shm")  # a kill loses nothing there either, and a sync costs nothing
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        return list(ROWS[row].trials(Lab(Path(folder), seed=numbers.start), numbers))


def new_pool() -> ProcessPoolExecutor:
    """Of processes in which no operator starts a thread: `is_equal` has some."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(JOBS, spawn, torch.set_num_threads, (1,))


def run_row(pool: ProcessPoolExecutor, row: str, trials: int) -> list[str]:
    """`outcomes` of as many trials, some at a time."""
    parts = [range(job, trials, JOBS) for job in range(JOBS)]
    return list(itertools.chain(*pool.map(outcomes, [row] * JOBS, parts)))


def run_test(name: str) -> list[str]:
    """As `run_row`; each of a test's parameters is a trial."""
    command = [sys.executable, "-m", "pytest", *f"tests/{name}".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    num = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed)", done.stdout)}
    if done.returncode not in (0, 1):
        return [done.stdout[-END:] + done.stderr[-END:]]
    return [""] * num.get("passed", 0) + [done.stdout[-END:]] * num.get("failed", 0)


# --------------------------------------------------------------------------------------------- cost


def saving_cost(data_dir: Path, num_steps: int = 60, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of a step on MovieLens-1M, with a state every 20 steps and without, by turns."""
    every, seconds = (0, 20), {0: [], 20: []}
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--data_dir {data_dir} --output_dir {folder} {IDS_AND_TIMES} {SMALL} --device cpu"
        args = get_args(flags.split())
        run = prepare_run(args)
        run.model.train()
        loader = make_loader(
            run.datasets["train"], args.batch_size, args.seed, run.device, 0, is_shuffled=True
        )
        batches = list(itertools.islice(loader, num_steps))
        run.training_step(batches[:1], 1, 1)  # to warm up
        for save_every in every * rounds:
            began = time.perf_counter()
            for step, batch in enumerate(batches, 1):
                run.training_step([batch], 1, step)
                if save_every and step % save_every == 0:
                    save_run(run)
            seconds[save_every].append(time.perf_counter() - began)
    plain, saving = (1000 * median(seconds[n]) / num_steps for n in every)
    return {"step_ms": round(plain, 1), "step_ms_saving_every_20": round(saving, 1)}


def state_seconds(num_bytes: int = 10**9) -> dict[str, float]:
    """Seconds to save and to load a state of that size."""
    with tempfile.TemporaryDirectory() as folder:
        content = {"config": {}, "table": torch.rand(num_bytes // 4)}
        began = time.perf_counter()
        save_state(folder, content, 1)
        saved = time.perf_counter()
        load_newest_state(folder)
        loaded = time.perf_counter()
    return {
        "state_gb": num_bytes / 1e9,
        "save_s": round(saved - began, 2),
        "load_s": round(loaded - saved, 2),
    }


def run_benchmark() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=[*ROWS, *TESTS], help="none: --cost alone")
    parser.add_argument("--trials", type=int, help="of each row, instead of the table's")
    parser.add_argument("--cost", action="store_true", help="of saving; needs --data_dir")
    parser.add_argument("--data_dir", help="MovieLens-1M, converted")
    args = parser.parse_args()
    table = {}
    with new_pool() as pool:
        for row in args.rows:
            began = time.perf_counter()
            if row in TESTS:
                name, found = TESTS[row], run_test(TESTS[row])
            else:
                name = ROWS[row].fault
                found = run_row(pool, row, args.trials or ROWS[row].num_trials)
            failures = list(filter(None, found))
            table[row] = {
                "fault": name,
                "trials": len(found),
                "failures": len(failures),
                "rate_below": round(3 / len(found), 4) if found and not failures else None,
                "seconds": round(time.perf_counter() - began, 1),
            }
            print(f"{row:10}", *table[row].values(), *failures[:5], sep="  ", flush=True)
    result = environment("cpu")
    ran = {name: result[name] for name in ("command", "commit")}
    result["rows"] = {row: found | ran for row, found in table.items()}
    if args.cost:
        result["cost"] = saving_cost(Path(args.data_dir)) | state_seconds() | ran
    if not args.trials:  # rows that were not run stay as they were
        path = RESULTS / "faults.json"
        old = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        kept = {row: found for row, found in old["rows"].items() if row in ROWS or row in TESTS}
        result["rows"] = kept | result["rows"]
        path.write_text(json.dumps(old | result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    run_benchmark()

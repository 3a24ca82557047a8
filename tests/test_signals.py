"""Signals: a run that is stopped saves where it stands, and goes on to the very same bytes."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import prepare_synthetic
import pytest
import torch
from conftest import are_equal_checkpoints

from dataset import MyDataset
from engine.signals import SIGNALS, stop_signal
from files.atomic_io import read_json
from files.checkpoint import load_checkpoint
from main import main
from model import HSTUModel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS = 7  # of an epoch
FLAGS = [
    "--device=cpu", "--num_workers=0", "--num_epochs=3", "--batch_size=8", "--hidden_units=8",
    "--attention_dim=5", "--linear_dim=6", "--log_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    prepare_synthetic.write(folder, 8 * NUM_STEPS, 400, 7)
    return folder


def flags_of(data: Path, output: Path) -> list[str]:
    return [f"--data_dir={data}", f"--output_dir={output}", f"--log_dir={output}/logs", *FLAGS]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """Output folder of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    assert main(flags_of(data, output)) == 0
    return output


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """After each test they are what they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert before == {number: signal.getsignal(number) for number in SIGNALS}


def assert_goes_on(data: Path, output: Path, whole: Path, capsys) -> None:
    """The same command ends where the whole run did; it repeats no step."""
    steps = [int(path.stem.split("_")[1]) for path in output.glob("resume_*.pt")]
    step = max(steps, default=0)
    torch.manual_seed(999)
    capsys.readouterr()
    assert main(flags_of(data, output)) == 0
    steps = re.findall(r"^epoch \d step (\d+)/", capsys.readouterr().out, re.MULTILINE)
    assert list(map(int, steps)) == list(range(step + 1, 3 * NUM_STEPS + 1))
    for name in ("model_epoch_1.pt", "model_epoch_2.pt", "model_epoch_3.pt", "model_best.pt"):
        assert are_equal_checkpoints(output / name, whole / name), name
    assert read_json(output / "metrics.json") == read_json(whole / "metrics.json")
    last = f"resume_{3 * NUM_STEPS}.pt"
    assert load_checkpoint(output / last)["progress"] == load_checkpoint(whole / last)["progress"]


def stopped(name: str, epoch: int, step: int) -> str:
    return f"stopped by {name} at epoch {epoch}, step {step}; the same command goes on from there"


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_a_state_within_a_step(data, tmp_path):
    """As a terminal sends Ctrl-C. How such a run goes on is tested below and in test_faults.py."""
    output, flags = tmp_path / "o", ["--batch_size=1", "--num_workers=2"]
    num_steps = 8 * NUM_STEPS  # of an epoch
    process = subprocess.Popen(
        [sys.executable, "main.py", *flags_of(data, output), *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    step = 0
    while step < 5:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        step = int((re.match(r"epoch 1 step (\d+)/", line) or [0, 0])[1])
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    last = max([step, *map(int, re.findall(r"^epoch \d step (\d+)/", out, re.MULTILINE))])
    assert out.splitlines()[-1] == stopped("SIGINT", -(-last // num_steps), last)
    assert (output / f"resume_{last}.pt").exists()


def signal_in(monkeypatch, owner: type, name: str, call: int, number: int) -> None:
    """The process gets the signal in the middle of a call of owner.name, the call-th, from 1."""
    plain, calls = getattr(owner, name), []

    def signalling(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return plain(*args, **options)

    monkeypatch.setattr(owner, name, signalling)


@pytest.mark.parametrize(
    ("method", "call", "epoch", "step"),
    [
        ("forward", 1, 1, 1),
        ("forward", NUM_STEPS, 1, NUM_STEPS),  # the last before a validation
        ("predict_with_loss", 1, 1, NUM_STEPS),
        ("predict_with_loss", 2 * NUM_STEPS - 1, 2, 2 * NUM_STEPS),
        ("item_tower", NUM_STEPS + 1, 1, NUM_STEPS),  # the catalogue, before a validation
    ],
)
def test_a_stop_in_a_step_or_a_validation_repeats_no_step(
    method, call, epoch, step, data, whole, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "o"
    with monkeypatch.context() as patch:
        signal_in(patch, HSTUModel, method, call, signal.SIGTERM)
        assert main(flags_of(data, output)) == 143
    assert capsys.readouterr().out.splitlines()[-1] == stopped("SIGTERM", epoch, step)
    assert_goes_on(data, output, whole, capsys)


def test_a_stop_before_the_first_step_is_no_loss(data, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_in(patch, HSTUModel, "to", 1, signal.SIGUSR1)
        assert main(flags_of(data, tmp_path)) == 143
    assert_goes_on(data, tmp_path, whole, capsys)


def test_a_stopped_run_that_overwrites_names_the_command_that_goes_on(
    data, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        signal_in(patch, HSTUModel, "forward", 3, signal.SIGTERM)
        assert main([*flags_of(data, tmp_path), "--resume=none", "--overwrite"]) == 143
    text = "".join(capsys.readouterr())
    assert "the same command with --resume auto, without --overwrite, goes on from there" in text
    assert main([*flags_of(data, tmp_path), "--resume=auto"]) == 0


@pytest.mark.parametrize("module", ["engine.training_setup", "engine.export"])
def test_a_stop_does_not_wait_for_the_data_to_open(module, data, whole, tmp_path, monkeypatch):
    def opening(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    flags = flags_of(data, tmp_path)
    if module == "engine.export":
        flags += ["--inference_only", f"--state_dict_path={whole}/model_best.pt"]
    monkeypatch.setattr(f"{module}.read_manifest", opening)
    started = time.perf_counter()
    assert main(flags) == 143
    assert time.perf_counter() - started < 30


def test_a_stop_in_the_final_test_leaves_the_rest_to_the_same_command(
    data, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        signal_in(patch, HSTUModel, "predict_with_loss", 3 * NUM_STEPS + 2, signal.SIGINT)
        assert main(flags_of(data, tmp_path)) == 130
    assert not (tmp_path / "metrics.json").exists()
    assert_goes_on(data, tmp_path, whole, capsys)


def test_loaders_leave_all_signals_to_their_parent(data, tmp_path, monkeypatch):
    fetch = MyDataset.__getitems__

    def asserting(dataset, draw):
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
        return fetch(dataset, draw)

    monkeypatch.setattr(MyDataset, "__getitems__", asserting)
    assert main([*flags_of(data, tmp_path), "--num_workers=1", "--num_epochs=1"]) == 0


@pytest.mark.parametrize("method", ["item_tower", "predict"])
def test_a_stopped_export_leaves_the_old_files(method, data, whole, tmp_path, monkeypatch, capsys):
    flags = ["--inference_only", *flags_of(data, tmp_path)]
    old, new = (f"--state_dict_path={whole}/model_epoch_{epoch}.pt" for epoch in (1, 3))
    assert main([*flags, old]) == 0
    folder = tmp_path / ("item_embeddings" if method == "item_tower" else "user_embeddings")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    signal_in(monkeypatch, HSTUModel, method, 1, signal.SIGINT)
    monkeypatch.setattr("model.CHUNK_ITEMS", 7)
    assert main([*flags, new]) == 130
    if method == "predict":  # whose items are gone
        del before["manifest.json"]
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert capsys.readouterr().out.splitlines()[-1] == "stopped by SIGINT"


def test_a_second_sigint_is_pythons_own():
    with pytest.raises(KeyboardInterrupt), stop_signal, stop_signal.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        saved = True
        os.kill(os.getpid(), signal.SIGINT)
    assert saved


# -------------------------------------------------------------------------- one training per folder


@pytest.fixture
def lock() -> Iterator[Callable[[Path], subprocess.Popen]]:
    """Starts a process that locks a folder, and has a loader process that outlives it."""
    code = (
        "import os, sys, time\n"
        "from files import atomic_io\n"
        "with atomic_io.lock_folder(sys.argv[1]):\n"
        "    is_parent = os.fork()\n"
        "    if is_parent:\n"
        "        print('locked', flush=True)\n"
        "    time.sleep(600 if is_parent else 2)\n"
    )
    processes = []

    def start(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_second_training_is_refused_until_the_first_dies(
    data, tmp_path, lock, capsys, monkeypatch
):
    monkeypatch.setattr("files.atomic_io.LOCK_SECONDS", 0.1)
    (tmp_path / ".model_best.pt.4711.tmp").touch()
    first = lock(tmp_path)
    assert main([*flags_of(data, tmp_path), "--num_epochs=1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}: another process is at work in it")
    assert error.count("\n") == 1
    assert (tmp_path / ".model_best.pt.4711.tmp").exists()  # the first one may be writing it
    first.kill()
    first.wait()
    monkeypatch.undo()  # a loader may live a little longer
    assert (tmp_path / ".hstu.lock").exists()
    assert main([*flags_of(data, tmp_path), "--num_epochs=1"]) == 0


def test_an_export_asks_for_no_lock(data, whole, tmp_path, lock):
    lock(tmp_path)
    checkpoint = f"--state_dict_path={whole}/model_best.pt"
    assert main(["--inference_only", *flags_of(data, tmp_path), checkpoint]) == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_without_locks_a_training_goes_on(data, tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    assert main([*flags_of(data, tmp_path), "--num_epochs=1"]) == 0

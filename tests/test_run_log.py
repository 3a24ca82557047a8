"""What a run leaves in TensorBoard's folder and on the terminal, and that neither can stop it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NUM_ITEMS, NUM_USERS, write_tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

import main as main_module
from dataset import load_emb
from engine import run_log
from engine.run_log import RunLog, duration
from engine.state import Progress
from engine.training_step import TrainingStep
from files.checkpoint import load_checkpoint
from files.sequences import EVENT_DTYPE
from main import main

# pytest catches what a thread dies of, which else is a traceback on the terminal.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--device=cpu", "--num_workers=0", "--num_epochs=2", "--batch_size=4", "--maxlen=6",
    "--hidden_units=8", "--attention_dim=5", "--linear_dim=6", "--warmup_steps=2", "--log_every=1",
]  # fmt: skip
TIMINGS = {"Train/users_per_s", "Train/tokens_per_s", "Train/data_wait_ms"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "data")


def flags_of(data: Path, output: Path, log_dir: Path) -> list[str]:
    return [f"--data_dir={data}", f"--output_dir={output}", f"--log_dir={log_dir}", *FLAGS]


def read_log(log_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(log_dir), {"scalars": 0, "histograms": 0}).Reload()


def entries(log_dir: Path) -> dict[str, list[tuple]]:
    """Tag -> its steps and values, in the order in which they are drawn; without the timings."""
    events = read_log(log_dir)
    tags = events.Tags()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["histograms"]:
        found[tag] = [(e.step, e.histogram_value) for e in events.Histograms(tag)]
    return {tag: values for tag, values in found.items() if tag not in TIMINGS}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """Output folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    assert main(flags_of(data, output, output / "logs")) == 0
    return output


# ------------------------------------------------------------------------------- what is in the log


def test_the_flags_are_a_table_and_hyperparameters_of_the_same_run(whole):
    assert [path.is_file() for path in (whole / "logs").iterdir()] == [True]
    events = read_log(whole / "logs")
    (table,) = events.Tensors("flags/text_summary")
    assert "| lr | 0.001 |" in table.tensor_proto.string_val[0].decode()

    def content(name: str) -> HParamsPluginData:
        metadata = events.SummaryMetadata(f"_hparams_/{name}")
        return HParamsPluginData.FromString(metadata.plugin_data.content)

    values = content("session_start_info").session_start_info.hparams
    assert values["lr"].number_value == 0.001
    assert values["mm_emb_id"].string_value == "['81']"
    assert values["logq"].string_value == "True"
    assert "log_dir" not in values  # where it runs, not what it computes
    metrics = {info.name.tag for info in content("experiment").experiment.metric_infos}
    assert metrics and metrics <= entries(whole / "logs").keys()
    assert content("session_end_info").session_end_info.status == 1  # success


def test_each_epoch_has_histograms_of_similarities_in_the_range_of_a_cosine(whole):
    for tag in ("InfoNCE/pos_sim", "InfoNCE/neg_sim"):
        found = entries(whole / "logs")[tag]
        assert [step for step, _ in found] == [3, 6]
        for _, histogram in found:
            assert histogram.num == NUM_USERS
            assert -1 <= histogram.min <= histogram.max <= 1


def test_the_projector_has_the_most_frequent_items_of_the_best_epoch(
    data, whole, tmp_path, monkeypatch
):
    assert not (whole / "logs" / "projector_config.pbtxt").exists()
    monkeypatch.setattr("engine.report.MOST_PROJECTED", 7)
    assert main([*flags_of(data, tmp_path, tmp_path / "logs"), "--projector", "--lr=0.003"]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["best_epoch"] == 1  # of two
    assert "tensors.tsv" in (tmp_path / "logs" / "projector_config.pbtxt").read_text()
    folder = tmp_path / "logs" / "00006" / "items"
    header, *rows = (line.split("\t") for line in (folder / "metadata.tsv").read_text().split("\n"))
    assert header == ["name", "id", "events"]
    counts = np.bincount(np.fromfile(data / "train_data.bin", EVENT_DTYPE)["item_id"])
    most = np.argsort(-counts, kind="stable")[:7]
    assert rows[:-1] == [[f"item {k}", str(997 + 3 * k), str(counts[k])] for k in most]
    flags = ["--inference_only", f"--state_dict_path={tmp_path}/model_best.pt"]
    assert main([*flags_of(data, tmp_path, tmp_path / "logs"), *flags]) == 0
    exported = load_emb(tmp_path / "item_embeddings" / "embedding.fbin")
    np.testing.assert_allclose(np.loadtxt(folder / "tensors.tsv"), exported[most - 1], rtol=1e-5)


def test_the_projector_has_the_ids_of_the_log_where_they_are_texts(data, tmp_path, monkeypatch):
    monkeypatch.setattr("files.data_folder.number_of", lambda _: None)
    assert main([*flags_of(data, tmp_path, tmp_path / "logs"), "--projector"]) == 0
    table = (tmp_path / "logs" / "00006" / "items" / "metadata.tsv").read_text()
    ids = [int(line.split("\t")[1]) for line in table.strip().split("\n")[1:]]
    assert sorted(ids) == [1000 + 3 * k for k in range(NUM_ITEMS)]


def test_the_projector_can_be_asked_for_when_all_is_done(data, whole, tmp_path, capfd):
    output = shutil.copytree(whole, tmp_path / "o")
    capfd.readouterr()
    assert main([*flags_of(data, output, output / "logs"), "--projector"]) == 0
    out, err = capfd.readouterr()
    assert (err, "epoch 1/2" in out, "finished: 2 epochs" in out) == ("", False, True)
    assert (output / "logs" / "00006" / "items" / "tensors.tsv").exists()
    assert entries(output / "logs") == entries(whole / "logs")


def test_names_of_several_lines_and_cells_stay_in_their_row(tmp_path):
    with RunLog(str(tmp_path), 1, 1, 1, 1) as log:
        log.items(1, torch.eye(2), {"name": ["a\tb\nc", ""], "events": [1, 2]})
    lines = (tmp_path / "00001" / "items" / "metadata.tsv").read_text().splitlines()
    assert lines == ["name\tevents", "a b c\t1", "\t2"]


# ------------------------------------------------------------------------- killed, and gone on with


@pytest.mark.parametrize(("save_every", "last_step"), [(2, 5), (1, 4)])
@pytest.mark.slow
def test_the_log_of_a_killed_run_goes_on_as_if_it_had_not_been(
    data, whole, tmp_path, save_every, last_step, capfd
):
    """What is after the last state is dropped, and nothing before it is missing."""
    flags = [*flags_of(data, tmp_path, tmp_path / "logs"), f"--save_every_steps={save_every}"]
    child = os.fork()
    if not child:
        kill_at(last_step, flags)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    state = max(int(path.stem.split("_")[1]) for path in tmp_path.glob("resume_*.pt"))
    assert state == 4
    if state < last_step:
        assert max(step for step, _ in entries(tmp_path / "logs")["Loss/train"]) > state
    time.sleep(1 - time.time() % 1)  # files of one second have no order
    assert main(flags) == 0
    assert "curves from before" not in capfd.readouterr().out
    assert entries(tmp_path / "logs") == entries(whole / "logs")


def test_a_log_folder_of_another_run_is_a_warning(data, tmp_path, capfd):
    first, second = (flags_of(data, tmp_path / name, tmp_path / "logs") for name in "ab")
    assert main(first) == 0
    assert "curves from before" not in capfd.readouterr().out
    assert main(second) == 0
    assert f"{tmp_path}/logs: holds curves from before" in capfd.readouterr().out


def kill_at(last_step: int, flags: list[str]) -> None:
    """Run in a child process, whose log is slow, and end it after a step, its state saved."""
    write, step, save_run = RecordWriter.write, TrainingStep.__call__, main_module.save_run

    def slow_write(writer, data):
        time.sleep(0.01)
        write(writer, data)

    def last(training_step, batches, epoch, number):
        if number > last_step:
            time.sleep(0.5)  # the log has been written, but for what is in no state
            os.kill(os.getpid(), signal.SIGKILL)
        return step(training_step, batches, epoch, number)

    def save(run):
        save_run(run)
        if run.progress.step == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    RecordWriter.write, TrainingStep.__call__, main_module.save_run = slow_write, last, save
    main(flags)
    os._exit(0)


# ------------------------------------------------------------------ a log folder that does not work


def assert_trains(data: Path, whole: Path, output: Path, log_dir: Path, capfd) -> str:
    """To the same weights as ever, with one warning; the warning."""
    capfd.readouterr()
    assert main([*flags_of(data, output, log_dir), "--projector"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "finished: 2 epochs" in out
    (warning,) = (line for line in out.splitlines() if "no more is logged there" in line)
    assert str(log_dir) in warning
    one, other = (load_checkpoint(path / "model_best.pt")["weights"] for path in (whole, output))
    assert all(torch.equal(one[name], other[name]) for name in one)
    return warning


@pytest.fixture
def volume(tmp_path) -> Iterator[Path]:
    """A file system of 300 KB."""
    folder = tmp_path / "volume"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_log_disk_is_one_warning_and_training_goes_on(data, whole, volume, tmp_path, capfd):
    (volume / "other").write_bytes(bytes(300 * 1024 - 3 * 4096))
    warning = assert_trains(data, whole, tmp_path / "o", volume, capfd)
    assert "No space left on device" in warning
    assert read_log(volume).Scalars("Loss/train")  # what there was room for can be read


def test_a_read_only_log_disk_is_one_warning_and_training_goes_on(
    data, whole, volume, tmp_path, capfd
):
    subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True)
    warning = assert_trains(data, whole, tmp_path / "o", volume / "logs", capfd)
    assert "Read-only file system" in warning


def test_a_log_folder_that_is_deleted_is_one_warning_and_training_goes_on(
    data, whole, tmp_path, capfd, monkeypatch
):
    step = TrainingStep.__call__

    def deleting(training_step, batches, epoch, number):
        if number == 4:
            shutil.rmtree(tmp_path / "logs")
        return step(training_step, batches, epoch, number)

    monkeypatch.setattr(TrainingStep, "__call__", deleting)
    warning = assert_trains(data, whole, tmp_path / "o", tmp_path / "logs", capfd)
    assert "No such file or directory" in warning


@pytest.mark.parametrize("num_records", [0, 1, 2, 6, 7, 20, 40])
def test_any_write_to_the_log_that_fails_is_one_warning_and_training_goes_on(
    num_records, data, whole, tmp_path, capfd, monkeypatch
):
    write, written = RecordWriter.write, []

    def failing(writer, record):
        if len(written) == num_records:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(record)
        write(writer, record)

    monkeypatch.setattr(RecordWriter, "write", failing)
    assert_trains(data, whole, tmp_path / "o", tmp_path / "logs", capfd)


def test_a_fault_that_is_not_the_folders_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log.SummaryWriter, "add_scalar", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), RunLog(str(tmp_path), 1, 1, 1, 1) as log:
        log.epoch(Progress(epoch=1, step=1), 0.5, {}, 1.0)


# ------------------------------------------------------------------------------------- the terminal


def test_the_time_left_is_that_of_all_epochs_at_the_pace_so_far(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: clock[0])
    log = RunLog(str(tmp_path), first_step=31, total_steps=100, num_epochs=10, log_every=1)
    clock[0] += 40
    assert log._time_left(50) == "100 s left"  # 20 steps in 40 s, and 50 to go


def in_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """What `python -W default main.py` writes to a terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-W", "default", "main.py", *arguments],
        cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, env=os.environ | environment,
    )  # fmt: skip
    os.close(follower)
    parts = []
    with suppress(OSError):  # EIO: the other side is closed
        while part := os.read(leader, 1 << 16):
            parts.append(part)
    os.close(leader)
    assert process.wait() == 0
    return b"".join(parts).decode()


@pytest.mark.slow
def test_a_bar_fits_a_narrow_terminal_and_leaves_only_our_lines(data, whole, tmp_path):
    flags = [*flags_of(data, tmp_path, tmp_path / "logs"), "--num_epochs=30"]
    text = in_terminal(40, *flags, NO_COLOR="1")
    bars = [line for line in re.split(r"[\r\n]", text) if line.startswith("epoch") and "|" in line]
    assert bars and max(map(len, bars)) <= 40
    assert "\x1b[3" not in text  # no colours
    lines = [line.rpartition("\r")[2] for line in text.split("\r\n")[:-1]]
    ends = "valid|test|cold|new|repeat|action|pop|recent|follow|wrote|next|curves|plots"
    ours = f"creative_emb/81: |--remove_seen is off|train on |epoch |finished: |  ({ends}) "
    assert [line for line in lines if not re.match(ours, line)] == []


@pytest.mark.slow
def test_tqdm_disable_leaves_plain_lines_in_a_terminal(data, tmp_path):
    flags = flags_of(data, tmp_path, tmp_path / "logs")
    text = in_terminal(80, *flags, TQDM_DISABLE="1")
    assert "\r" not in text.replace("\r\n", "\n")
    assert len(re.findall(r"^epoch \d step \d/6: loss .* left,", text, re.MULTILINE)) == 6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119.4, "119 s"), (130, "2 min"), (5_900, "98 min"), (12_240, "3.4 h")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text

"""A tune searches what the data asks for, cuts bad trainings short, goes on, and ends in time."""

from __future__ import annotations

import csv
import io
import json
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import prepare_synthetic
import pytest
from conftest import write_tiny

pytest.importorskip("optuna", reason="optuna is not installed")

import optuna
import tune
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tune_space import STARTS, params_of, search_space, settings_of
from tuned import result_of

from engine.flags import get_args
from engine.signals import Stopped
from files.atomic_io import DataError, lock_folder, read_json, write_json
from files.data_writer import leave_one_out, write_dataset
from files.sequences import EVENT_DTYPE
from main import main

pytestmark = pytest.mark.slow

DEFAULTS = vars(get_args([]))


@pytest.fixture(scope="module")
def long_lengths() -> np.ndarray:
    """As MovieLens-1M: 6,040 users, 163 events each, half of them with less than 94."""
    return np.random.default_rng(0).lognormal(np.log(94), 1.05, 6040).astype(int) + 1


@pytest.fixture(scope="module")
def short_lengths() -> np.ndarray:
    """As Amazon Beauty: 22,363 users, 7 events each."""
    return np.random.default_rng(0).lognormal(np.log(5), 0.75, 22_363).astype(int) + 1


def bounds(distribution) -> tuple[float, float]:
    return distribution.low, distribution.high


def test_long_histories_get_small_batches_and_longer_histories(long_lengths):
    space = search_space(long_lengths, 3706, DEFAULTS, [])
    assert bounds(space["batch_size"]) == (8, 256)
    assert space["maxlen"].choices == (101, 200)
    assert "num_negatives" not in space  # all items


def test_short_histories_get_large_batches_and_shorter_histories(short_lengths):
    space = search_space(short_lengths, 12_101, DEFAULTS, [])
    assert bounds(space["batch_size"]) == (64, 2048)
    assert space["maxlen"].choices == (20, 101)


def test_in_few_sequences_some_batches_leave_an_epoch_ten_steps():
    space = search_space(np.full(80, 6), 23, DEFAULTS, [])
    assert bounds(space["batch_size"]) == (1, 128)  # the default among them
    assert space["maxlen"].choices == (20, 101)


def test_a_large_catalogue_gets_numbers_of_negatives(short_lengths):
    assert "num_negatives" in search_space(short_lengths, 20_001, DEFAULTS, [])
    assert "num_negatives" not in search_space(short_lengths, 20_000, DEFAULTS, [])


def test_the_starts_are_tried_as_they_are_written(long_lengths):
    space = search_space(long_lengths, 3706, DEFAULTS, [])
    space["batch_size"] = optuna.distributions.IntDistribution(8, 1024, log=True)
    for start in STARTS.values():
        settings = settings_of(params_of(start, DEFAULTS, space), DEFAULTS)
        assert settings == {name: (DEFAULTS | start)[name] for name in space}


def test_a_start_beyond_the_data_is_moved_to_it_with_its_rate(long_lengths):
    space = search_space(long_lengths, 3706, DEFAULTS, [])
    settings = settings_of(params_of(STARTS["short histories"], DEFAULTS, space), DEFAULTS)
    assert (settings["batch_size"], settings["lr"]) == (256, 0.005)  # of 512 and .006


def test_the_rate_follows_the_batch_that_is_given():
    given = DEFAULTS | {"batch_size": 16}
    assert settings_of({"lr": 0.005}, given) == {"lr": 0.003}
    assert settings_of({"lr": 0.005}, DEFAULTS) == {"lr": 0.005}


# ------------------------------------------------------------------------- trainings that are faked


class Trainings:
    """In place of trainings: 8 epochs of a minute, whose NDCG@10 rises to that of the trial."""

    def __init__(self, monkeypatch, *scores: float | str):
        self.scores, self.commands, self.epochs = scores, [], []
        self.minutes = 0.0
        monkeypatch.setattr(tune, "epochs_of", self)
        monkeypatch.setattr(tune.time, "monotonic", lambda: 60 * self.minutes)

    def __call__(self, words: Sequence[str], folder: Path) -> Iterator[tuple[int, float]]:
        folder.mkdir(parents=True, exist_ok=True)
        self.commands.append(list(words))
        self.epochs.append(0)
        index = int(folder.name.removeprefix("trial_"))
        score = self.scores[index % len(self.scores)]
        for epoch in range(1, 9):
            self.minutes += 1
            self.epochs[-1] = epoch
            if isinstance(score, str):
                raise DataError(score)
            yield epoch, round(score * epoch / 8, 4)
        best = {"best_epoch": 8, "valid": {"NDCG@10": score}}
        (folder / "metrics.json").write_text(json.dumps(best))
        for name in ("model_best.pt", "model_epoch_8.pt", "resume_8.pt"):
            (folder / name).touch()


def run(data: Path, output: Path, hours: float, *passed: str) -> int:
    own = [f"--data_dir={data}", f"--output_dir={output}", f"--hours={hours}"]
    return tune.main([*own, "--", "--num_epochs=8", *passed])


def table_of(output: Path) -> list[dict[str, str]]:
    with open(output / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_bad_training_is_cut_short_after_half_of_its_epochs_and_its_checkpoints_removed(
    data, tmp_path, monkeypatch, capsys
):
    trainings = Trainings(monkeypatch, 0.2, 0.4, 0.1, 0.09, 0.3, 0.1)
    assert run(data, tmp_path, 45 / 60) == 0
    # The three starts are trained whole, and so is what is not in the worst quarter of the whole.
    assert trainings.epochs == [8, 8, 8, 4, 8, 4]
    ends = [row["end"] for row in table_of(tmp_path)]
    whole, pruned = "best epoch 8", "pruned after epoch 4"
    assert ends == [whole, whole, whole, pruned, whole, pruned]
    kept = sorted(path.parent.name + "/" + path.name for path in tmp_path.rglob("*.pt"))
    assert kept == [f"trial_00{number}/model_best.pt" for number in (0, 1, 2, 4)]
    out = capsys.readouterr().out
    assert "6 trials, 4 of them to the end" in out
    assert "trial 1 has NDCG@10 0.4000 in the validation, 100.0 % above the defaults" in out


def test_no_training_starts_that_could_not_end(data, tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch, 0.2)
    assert run(data, tmp_path, 23.5 / 60) == 0
    assert trainings.epochs == [8, 8]


def test_the_defaults_are_trained_however_short_the_time(data, tmp_path, monkeypatch, capsys):
    trainings = Trainings(monkeypatch, 0.2)
    assert run(data, tmp_path, 1 / 60) == 0
    assert trainings.epochs == [8]
    assert " 0.0 % above the defaults" in capsys.readouterr().out


def test_a_slow_training_is_left_for_more_hours_which_go_on_with_it(data, tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch, 0.2, 0.4, 0.3)
    step, slow = Trainings.__call__, 3

    def dawdle(words, folder):
        for epoch in step(trainings, words, folder):
            trainings.minutes += slow if folder.name == "trial_001" else 0
            yield epoch

    monkeypatch.setattr(tune, "epochs_of", dawdle)
    assert run(data, tmp_path, 20 / 60) == 0
    assert len(table_of(tmp_path)) == 1 and len(trainings.commands) == 2
    slow = 0
    assert run(data, tmp_path, 21 / 60) == 0
    assert trainings.commands[1] == trainings.commands[2]
    assert len(table_of(tmp_path)) == 2


def test_a_failing_training_is_a_bad_trial_and_the_tune_goes_on(data, tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch, 0.2, "out of memory", 0.3)
    assert run(data, tmp_path, 18 / 60) == 0
    assert trainings.epochs == [8, 1, 8]
    assert [row["NDCG@10"] for row in table_of(tmp_path)] == ["0.2", "", "0.3"]
    assert table_of(tmp_path)[1]["end"] == "failed: out of memory"


def test_a_trial_whose_training_outlived_a_killed_tune_is_left_to_it(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("files.atomic_io.LOCK_SECONDS", 0)
    trainings = Trainings(monkeypatch, 0.2, 0.3)
    (tmp_path / "trial_001").mkdir()
    with lock_folder(tmp_path / "trial_001"):
        assert run(data, tmp_path, 18 / 60) == 1
    assert "trial_001: another process is at work in it" in capsys.readouterr().err
    assert run(data, tmp_path, 18 / 60) == 0
    assert trainings.epochs == [8, 8]


def test_defaults_that_fail_end_the_tune_with_the_reason(data, tmp_path, monkeypatch, capsys):
    Trainings(monkeypatch, "out of memory")
    assert run(data, tmp_path, 1) == 1
    assert capsys.readouterr().err == "error: out of memory\n"


def test_two_tunes_propose_the_same_and_never_the_same_twice(data, tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch, 0.2, 0.1, 0.4, 0.3, 0.5)
    for name in ("a", "b"):
        assert run(data, tmp_path / name, 1) == 0
    assert table_of(tmp_path / "a") == table_of(tmp_path / "b")
    commands = [tuple(words[8:]) for words in trainings.commands]
    assert len(set(commands)) == len(commands) / 2 > 6


def test_hours_decide_the_number_of_epochs(data, tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch, 0.2)

    def pace(words, folder):
        if folder.name != "pace":
            return trainings(words, folder)
        assert "--num_epochs 1 --resume=none" in " ".join(words)
        trainings.minutes += 2
        return iter([(1, 0.1)])

    monkeypatch.setattr(tune, "epochs_of", pace)
    own = [f"--data_dir={data}", "--hours=2", f"--output_dir={tmp_path}"]
    assert tune.main(own) == 0
    assert {row["num_epochs"] for row in table_of(tmp_path)} == {"6"}  # 120 minutes / 10 / 2
    assert len(trainings.commands) == (120 - 2) // 8


def test_a_flag_after_the_dashes_is_passed_on_and_not_searched(data, tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch, 0.2)
    assert run(data, tmp_path, 25 / 60, "--batch_size=4", "--no-muon", "--num_blocks=1") == 0
    for words in trainings.commands:
        args = get_args(words[2:])
        assert (args.batch_size, args.muon, args.num_blocks) == (4, False, 1)
        assert sum("batch_size" in word or "muon" in word for word in words) == 2


@pytest.mark.parametrize("flag", ["--output_dir=o", "--batch=4", "--no-such_flag", "--evaluate"])
def test_a_flag_that_is_not_of_trainings_is_refused(flag, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(data, tmp_path, 1, flag)
    assert "after --: no flag of a training, or not spelt out" in capsys.readouterr().err


def test_nothing_to_search_is_refused(data, tmp_path, capsys):
    flags = ["--batch_size=4", "--lr=.1", "--dropout_rate=0", "--infonce_temp=1", "--muon"]
    assert run(data, tmp_path, 1, *flags, "--mix_previous=0", "--maxlen=5") == 1
    assert_one_line(capsys.readouterr().err, "all flags that could be searched were given")


def test_the_picture_has_a_point_per_trial_and_pruned_ones_are_hollow(data, tmp_path, monkeypatch):
    figures, draw = [], tune.draw_trials
    monkeypatch.setattr(tune, "draw_trials", lambda *of: figures.append(draw(*of)) or figures[0])
    Trainings(monkeypatch, 0.2, 0.4, 0.3, 0.1)
    assert run(data, tmp_path, 33 / 60) == 0
    settings = ["batch_size", "lr", "dropout_rate", "infonce_temp", "muon", "mix_previous"]
    settings += ["maxlen"]
    titles = [ax.get_title("left") for ax in figures[0].axes if ax.get_visible()]
    assert titles == [f"--{name}" for name in settings]
    (points,) = figures[0].axes[0].collections
    rows = table_of(tmp_path)
    shown = [[float(row["batch_size"]), float(row["NDCG@10"])] for row in rows]
    assert points.get_offsets().tolist() == shown
    is_hollow = [face[3] == 0 for face in points.get_facecolors()]
    assert is_hollow == [row["end"].startswith("pruned") for row in rows] == [False] * 3 + [True]


def test_the_folder_of_another_tune_is_refused(data, tmp_path, monkeypatch, capsys):
    Trainings(monkeypatch, 0.2)
    assert run(data, tmp_path / "o", 0.1) == 0
    capsys.readouterr()
    assert run(data, tmp_path / "o", 0.1, "--num_blocks=1") == 1
    assert_one_line(capsys.readouterr().err, "with other flags after --; name another --output_dir")
    assert run(write_tiny(tmp_path / "other", seed=1), tmp_path / "o", 0.1) == 1
    assert_one_line(capsys.readouterr().err, "holds a tune of other data")


def test_data_without_validation_is_refused(tiny, tmp_path, capsys):
    manifest = read_json(tiny / "manifest.json")
    manifest["targets"]["valid"] = "none"
    write_json(tiny / "manifest.json", manifest)
    assert run(tiny, tmp_path / "o", 1) == 1
    assert_one_line(capsys.readouterr().err, "no valid split with known targets")


def test_data_whose_validation_is_empty_is_refused(tmp_path, capsys):
    events = np.zeros(8, EVENT_DTYPE)
    events["item_id"] = [1, 2, 3, 4] * 2
    ids = {"item_ids": [1, 2, 3, 4], "user_ids": [1, 2, 3, 4]}
    write_dataset(
        tmp_path / "two", leave_one_out(events, np.arange(0, 9, 2)), num_action_types=0, **ids
    )
    assert run(tmp_path / "two", tmp_path / "o", 1) == 1
    assert_one_line(capsys.readouterr().err, "no valid split with known targets")


def test_a_missing_optuna_is_one_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(tune, "draw_trials")
    assert run(data, tmp_path / "o", 1) == 1
    assert_one_line(capsys.readouterr().err, "pip install -r requirements-tune.txt")


def assert_one_line(text: str, message: str) -> None:
    assert text.startswith("error: ") and text.count("\n") == 1
    assert message in text


# ----------------------------------------------------------------------- trainings that take place

PASSED = ["--num_epochs=2", "--device=cpu", "--num_workers=0", "--hidden_units=16"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> tuple[Path, Path, str]:
    """A log, the output folder of a tune of three trials on it, and what that printed."""
    folder = tmp_path_factory.mktemp("tuned")
    prepare_synthetic.write(folder / "data", 300, 200, 7)
    with redirect_stdout(io.StringIO()) as printed:
        assert run_three(folder / "data", folder / "o") == 0
    return folder / "data", folder / "o", printed.getvalue()


def run_three(data: Path, output: Path) -> int:
    """A tune that ends with its three starts."""

    def is_due(of: tune.Tune) -> bool:
        return sum("end" in trial.user_attrs for trial in of.study.trials) < 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "has_time", is_due)
        return tune.main([f"--data_dir={data}", f"--output_dir={output}", "--", *PASSED])


@pytest.mark.slow
def test_three_trials_end_with_a_command_that_makes_the_best_again(tuned):
    _, output, printed = tuned
    rows = table_of(output)
    assert len(rows) == 3
    script, *words = shlex.split(printed.splitlines()[-1])[1:]
    assert script == "main.py" and main(words) == 0
    best = max(float(row["NDCG@10"]) for row in rows if row["end"].startswith("best"))
    assert read_json(output / "best" / "metrics.json")["valid"]["NDCG@10"] == best
    assert (output / "trials.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_recorded_tune_has_all_trials_and_the_best_ones_metrics(tuned):
    found = result_of(tuned[1])
    assert found["trials"] == table_of(tuned[1])
    best = found["trials"][found["best_trial"]]
    assert found["valid"]["NDCG@10"] == float(best["NDCG@10"])


@pytest.mark.slow
def test_a_trial_is_a_row_of_the_page_of_hyperparameters(tuned):
    events = EventAccumulator(str(tuned[1] / "trial_001")).Reload()
    page = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"batch_size" in page and len(events.Scalars("Metrics/NDCG@10")) == 2


@pytest.mark.slow
def test_a_stopped_tune_ends_with_what_one_does_that_never_stopped(tuned, tmp_path, capsys):
    data, whole, _ = tuned
    report = optuna.Trial.report

    def stop(trial, value, step):
        report(trial, value, step)
        if (trial.number, step) == (1, 1):
            raise Stopped(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "report", stop)
        assert run_three(data, tmp_path) == 143
    out = capsys.readouterr().out
    assert "stopped by SIGTERM; the same command goes on from there" in out
    assert "python main.py" in out  # that of the best so far
    assert len(table_of(tmp_path)) == 1
    assert run_three(data, tmp_path) == 0
    tables = table_of(whole), table_of(tmp_path)
    for row in [*tables[0], *tables[1]]:
        del row["seconds"]
    assert tables[0] == tables[1]
    assert "resuming at epoch" in (tmp_path / "trial_001" / "train.log").read_text()

"""The pictures of a training say what was measured; without a training there is one clear line."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_tiny
from torch.utils.tensorboard import SummaryWriter

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

import plot_run

from engine.evaluation import Ranking, evaluate
from engine.training_setup import eval_loader
from files.atomic_io import DataError
from files.checkpoint import load_checkpoint
from files.sequences import EVENT_DTYPE
from main import main

pytestmark = pytest.mark.slow

FLAGS = [
    "--device=cpu", "--num_workers=0", "--num_epochs=3", "--batch_size=4", "--maxlen=6",
    "--hidden_units=8", "--attention_dim=5", "--linear_dim=6", "--no-remove_seen", "--lr=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data, a training's output `o` and its logs."""
    folder = tmp_path_factory.mktemp("plots")
    write_tiny(folder / "data")
    assert main([*folders_of(folder), *FLAGS]) == 0
    return folder


def folders_of(folder: Path, **other: Path) -> list[str]:
    paths = {"data_dir": folder / "data", "output_dir": folder / "o", "log_dir": folder / "logs"}
    return [f"--{flag}={path}" for flag, path in (paths | other).items()]


def test_one_command_draws_every_picture(trained, tmp_path, capsys):
    before = sorted(trained.rglob("*"))
    assert plot_run.main([*folders_of(trained), f"--picture_dir={tmp_path}/new"]) == 0
    names = ["learning_curves", "hit_rate", "time_bias", "position_bias"]
    lines = [f"wrote {tmp_path}/new/{name}.png" for name in names]
    assert capsys.readouterr().out.splitlines() == lines
    for name in names:
        picture = (tmp_path / "new" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 80_000
    assert sorted(trained.rglob("*")) == before


def test_what_is_drawn_was_evaluated_as_in_the_training(trained):
    """With the flags of the training, --no-remove_seen among them, and the best epoch."""
    run, flags = plot_run.load_run(trained / "o", str(trained / "data"), False)
    loader = eval_loader(flags, run, "test")
    found = evaluate(run.model, loader).metrics()
    assert found == json.loads((trained / "o" / "metrics.json").read_text())["test"]


def test_a_training_that_started_from_another_is_drawn_without_that(trained, tmp_path):
    """Its config keeps what --remove_seen and --history_residual were to the first model."""
    first = folders_of(trained, output_dir=tmp_path / "a", log_dir=tmp_path / "al")
    unlike_auto = ["--history_residual=off", "--remove_seen=on"]
    assert main([*first, *FLAGS, *unlike_auto, "--num_epochs=1"]) == 0
    second = folders_of(trained, output_dir=tmp_path / "b", log_dir=tmp_path / "bl")
    flags = [flag for flag in FLAGS if "seen" not in flag]
    assert main([*second, *flags, f"--init_from={tmp_path}/a/model_best.pt"]) == 0
    (tmp_path / "a" / "model_best.pt").unlink()
    run, flags = plot_run.load_run(tmp_path / "b", str(trained / "data"), False)
    assert run.model.config.removes_seen and not run.model.config.history_residual
    found = evaluate(run.model, eval_loader(flags, run, "test")).metrics()
    assert found == json.loads((tmp_path / "b" / "metrics.json").read_text())["test"]


def test_the_curves_have_a_value_per_epoch(trained):
    run, _ = plot_run.load_run(trained / "o", str(trained / "data"), False)
    curves = plot_run.read_curves(str(trained / "logs"), run)
    valid = json.loads((trained / "o" / "metrics.json").read_text())
    assert {len(values) for values in curves.values()} == {3}
    best = curves["Metrics/HR@10"][valid["best_epoch"] - 1]
    assert best == pytest.approx(valid["valid"]["HR@10"])
    top, bottom = plot_run.draw_learning(curves, 3).axes
    assert [list(line.get_ydata()) for line in bottom.lines] == [
        curves["Metrics/HR@10"],
        curves["Metrics/NDCG@10"],
    ]
    assert list(top.lines[1].get_ydata()) == curves["Loss/valid"]


@pytest.mark.parametrize(("epochs", "shows_first"), [(5, True), (6, False)])
def test_the_first_loss_is_left_out_where_others_are_enough(epochs, shows_first):
    losses = [9.0, *(3.0 - 0.1 * k for k in range(1, epochs))]
    curves = {"Loss/train_epoch": losses, "Loss/valid": losses}
    top, _ = plot_run.draw_learning(curves, epochs).axes
    assert (top.get_ylim()[1] > 9) == shows_first
    assert top.get_ylim()[0] < losses[-1]


def test_curves_logged_from_a_later_epoch_on_stand_at_it():
    top, _ = plot_run.draw_learning({"Loss/train_epoch": [3.0, 2.0]}, 5).axes
    assert list(top.lines[0].get_xdata()) == [4, 5]


def test_curves_from_after_the_best_epoch_on_are_taken(tmp_path):
    """Of a run that went on with another --log_dir."""
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("Metrics/NDCG@10", 0.25, 40)
    progress = SimpleNamespace(epoch=9, best_epoch=7, best_metrics={"NDCG@10": 0.5})
    run = SimpleNamespace(progress=progress, output_dir="o")
    assert plot_run.read_curves(str(tmp_path), run) == {"Metrics/NDCG@10": [0.25]}
    progress.best_epoch = 9
    with pytest.raises(DataError, match="the curves of another run"):
        plot_run.read_curves(str(tmp_path), run)


def test_the_curves_of_another_run_are_refused(trained, tmp_path, capsys):
    flags = [*folders_of(trained), f"--picture_dir={tmp_path}/new"]
    other = [f"--log_dir={tmp_path}/logs"]
    assert main([*folders_of(trained, output_dir=tmp_path / "p"), *FLAGS, "--lr=0.01", *other]) == 0
    capsys.readouterr()
    assert plot_run.main([*flags, *other]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/logs: the curves of another run than that in {trained}/o" in error


def test_groups_are_ranges_of_about_one_size():
    rng = np.random.default_rng(0)
    values = rng.permutation(np.arange(1, 101))
    groups = plot_run.equal_groups(values)
    assert list(groups) == ["1-20", "21-40", "41-60", "61-80", "81-100"]
    for label, members in groups.items():
        low, high = map(int, label.split("-"))
        assert sorted(values[members]) == list(range(low, high + 1))


@pytest.mark.parametrize(
    ("values", "labels"),
    [([7, 7, 7], ["7"]), ([0] * 8 + [1, 2000], ["0", "1-2,000"]), ([3], ["3"])],
)
def test_groups_of_few_values_are_fewer(values, labels):
    groups = plot_run.equal_groups(np.array(values))
    assert list(groups) == labels
    assert sorted(np.concatenate(list(groups.values()))) == list(range(len(values)))


def test_a_bar_is_the_share_of_hits_of_its_group():
    ranks = torch.tensor([1, 11, 3, 40, 10, 12])
    lengths, ids = torch.tensor([5, 5, 5, 9, 9, 9]), torch.tensor([1, 1, 2, 2, 2, 2])
    ranking = Ranking(ranks, ids, lengths, ids > 0, ids, torch.zeros(6), torch.zeros(6), 0.0)
    figure = plot_run.draw_hit_rate(ranking, counts=torch.tensor([0, 70, 0]))
    heights = [[bar.get_height() for bar in ax.patches] for ax in figure.axes]
    assert list(map(texts, figure.axes)) == [["5", "9"], ["0", "70"]]
    assert heights == [pytest.approx([2 / 3, 1 / 3]), pytest.approx([1 / 2, 1 / 2])]


def texts(ax) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


def test_biases_are_those_of_each_layer_where_there_was_data(trained):
    weights = load_checkpoint(trained / "o" / "model_best.pt")["weights"]
    biases = [weights[f"hstu.blocks.{i}.relative_bias.time_weight"] for i in (0, 1)]
    assert all(map(torch.equal, biases, plot_run.weights_named(weights, "time_weight")))
    (ax,) = plot_run.draw_time_bias(biases, span=3 * 86_400).axes
    seconds, values = ax.lines[0].get_data()
    assert seconds[0] == 1 and 2.4 * 86_400 < seconds[-1] <= 3 * 86_400
    for second, value in zip(seconds, values, strict=True):
        assert value == biases[0][int(np.log(second) / 0.301)]
    assert texts(ax) == ["≤ 1 s", "1 min", "1 h", "1 day"]
    places = [torch.arange(6.0)]
    (ax,) = plot_run.draw_position_bias(places).axes
    assert list(ax.lines[0].get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(ax.lines[0].get_ydata()) == [0, 1, 2, 3, 4, 5]


def test_each_of_many_layers_has_a_line_of_its_own():
    for figure in (
        plot_run.draw_time_bias([torch.rand(129) for _ in range(16)], span=3600),
        plot_run.draw_position_bias([torch.rand(9) for _ in range(16)]),
    ):
        lines = [line for line in figure.axes[0].lines if line.get_label().startswith("layer")]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 16 == len(lines)


def test_the_longest_span_is_that_of_one_users_events(trained):
    offsets = np.fromfile(trained / "data" / "train_offsets.bin", np.int64)
    times = np.fromfile(trained / "data" / "train_data.bin", EVENT_DTYPE)["timestamp"]
    spans = [np.ptp(times[a:b]) for a, b in itertools.pairwise(offsets)]
    assert plot_run.longest_span(str(trained / "data")) == max(spans)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("output_dir", "no resume_*.pt there, by which a training"),
        ("log_dir", "no curves there"),
        ("data_dir", "not the data"),
    ],
)
def test_a_wrong_folder_is_one_line(flag, message, trained, tmp_path, capsys):
    write_tiny(tmp_path / "other", seed=1)
    assert plot_run.main(folders_of(trained, **{flag: tmp_path / "other"})) == 1
    assert_one_line(capsys.readouterr().err, message)


def test_a_log_folder_that_is_not_there_is_one_line(trained, tmp_path, capsys):
    assert plot_run.main(folders_of(trained, log_dir=tmp_path / "nowhere")) == 1
    assert_one_line(capsys.readouterr().err, "no curves there")


def test_a_missing_matplotlib_is_one_line(trained, monkeypatch, capsys):
    monkeypatch.delattr(plot_run, "matplotlib")
    assert plot_run.main(folders_of(trained)) == 1
    assert_one_line(capsys.readouterr().err, "pip install -r requirements-plot.txt")


def assert_one_line(text: str, message: str) -> None:
    assert text.startswith("error: ") and text.count("\n") == 1
    assert message in text


def test_data_without_vectors_are_drawn_as_they_were_trained(tmp_path, capsys):
    write_tiny(tmp_path / "data", has_vectors=False)
    assert main([*folders_of(tmp_path), *FLAGS]) == 0
    assert plot_run.main([*folders_of(tmp_path), f"--picture_dir={tmp_path}/new"]) == 0


def test_pickles_that_a_training_trusted_are_trusted_here_too_on_request(tmp_path, capsys):
    indexer = write_tiny(tmp_path / "data", has_vectors=False) / "indexer.pkl"
    indexer.write_bytes(pickle.dumps(Counter(pickle.loads(indexer.read_bytes()))))
    (tmp_path / "data" / "manifest.json").unlink()
    assert main([*folders_of(tmp_path), *FLAGS, "--trust_pickle"]) == 0
    capsys.readouterr()
    flags = [*folders_of(tmp_path), f"--picture_dir={tmp_path}/new"]
    assert plot_run.main(flags) == 1
    assert_one_line(capsys.readouterr().err, "refuses to load")
    assert plot_run.main([*flags, "--trust_pickle"]) == 0

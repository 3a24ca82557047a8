"""A training that starts with the weights of another one, by ids, values and names."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import prepare_table
import pytest
import torch
from conftest import are_equal, are_equal_checkpoints, write_tiny
from weeks import DEARER, NEW_ITEM, RECOLOURED, convert, log_of, write_rows

import main as main_module
from engine import warm_start
from engine.flags import get_args
from engine.state import Run
from engine.trained_model import load_model
from engine.training_setup import prepare_run
from files.atomic_io import read_json, write_json
from files.checkpoint import load_checkpoint
from files.data_folder import read_indexer, read_manifest
from files.vocabulary import load_vocabulary, read_vocabulary
from main import main

pytestmark = pytest.mark.slow

SMALL = ("--device=cpu", "--num_workers=0", "--hidden_units=8", "--num_epochs=1", "--batch_size=4")
SMALL += ("--attention_dim=5", "--linear_dim=6", "--maxlen=7")


def flags_of(folder: Path, data_dir: Path, name: str, *flags: str) -> list[str]:
    folders = [f"--data_dir={data_dir}", f"--output_dir={folder / name}"]
    return [*folders, f"--log_dir={folder / name}/logs", *SMALL, *flags]


def train(folder: Path, data_dir: Path, name: str, *flags: str) -> Path:
    assert main(flags_of(folder, data_dir, name, *flags)) == 0
    return folder / name / "model_best.pt"


class Weeks:
    """Two weeks, the second also converted afresh; and the model of the first."""

    def __init__(self, folder: Path):
        self.folder, self.first = folder, convert(folder, 1)
        self.second = convert(folder, 2, "--like", self.first)
        self.fresh = convert(folder, 2, name="fresh")
        self.model = train(folder, self.first, "run", "--target_action")


@pytest.fixture(scope="module")
def weeks(tmp_path_factory) -> Weeks:
    return Weeks(tmp_path_factory.mktemp("weeks"))


def started(data_dir: Path, model: Path, folder: Path) -> tuple[Run, dict[str, torch.Tensor]]:
    """A run before its first step, and how it was drawn."""
    flags = ["--target_action", f"--init_from={model}"]
    run = prepare_run(get_args(flags_of(folder, data_dir, "r", *flags)))
    drawn = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    vocabulary = read_vocabulary(data_dir, read_manifest(data_dir))
    warm_start.start_from(run, model, vocabulary)
    return run, drawn


@pytest.mark.parametrize("which", ["second", "fresh"])
def test_rows_are_carried_over_by_what_they_stand_for(weeks, tmp_path, which):
    data_dir = getattr(weeks, which)
    run, drawn = started(data_dir, weeks.model, tmp_path)
    before, after = load_checkpoint(weeks.model)["weights"], run.model.state_dict()
    now, then = read_indexer(data_dir), read_indexer(weeks.first)
    tables = {"embedding_module.item_emb.weight": (now["i"], then["i"])}
    for name in ("colour", "tags", "city"):
        tables[f"sparse_emb.feature_{name}.weight"] = now["f"][name], then["f"][name]
    types = [{n: k + 1 for k, n in enumerate(read_manifest(d).action_names)}
             for d in (data_dir, weeks.first)]  # fmt: skip
    for name in ("action_emb", "target_action_emb"):
        tables[f"input_preprocessor.{name}.weight"] = types
    num_new = 0
    for name, (rows, old_rows) in tables.items():
        for value, row in rows.items():
            is_known = value in old_rows
            expected = before[name][old_rows[value]] if is_known else drawn[name][row]
            assert torch.equal(after[name][row], expected), (name, value)
            num_new += not is_known
    assert num_new == 5  # an item, a colour, a tag, and an action type in two tables
    others = [name for name in after if name not in tables]
    is_as_before = {name for name in others if torch.equal(after[name], before[name])}
    # The prices of a fresh conversion are logarithms: another feature, which starts as it is drawn.
    transformed = {"emb_transform.feature_price.weight"} if which == "fresh" else set()
    assert len(others) > 10 and set(others) - is_as_before == transformed
    assert all(torch.equal(after[name], drawn[name]) for name in transformed)


def test_an_item_that_did_not_change_starts_with_the_embedding_that_it_had(weeks, tmp_path):
    run, _ = started(weeks.second, weeks.model, tmp_path)
    old = load_model(weeks.model, weeks.first, read_manifest(weeks.first))
    items = torch.arange(1, 15)
    with torch.no_grad():
        is_close = (run.model.eval().item_embeddings(items) - old.item_embeddings(items)).abs()
    changed = (is_close.amax(1) > 1e-6).nonzero()[:, 0] + 1
    assert changed.tolist() == [RECOLOURED, DEARER]


def test_on_the_data_of_the_model_every_weight_is_as_it_was(tmp_path):
    """That of the items without a vector, too; and --history_residual auto is what it was."""
    data_dir = write_tiny(tmp_path / "data")
    flags = ["--target_action", "--history_residual=on", "--lr=0.1"]
    model = train(tmp_path, data_dir, "first", *flags)
    flags = ["--target_action", "--history_residual=auto", f"--init_from={model}"]
    run = prepare_run(get_args(flags_of(tmp_path, data_dir, "r", *flags)))
    warm_start.start_from(run, model, read_vocabulary(data_dir, read_manifest(data_dir)))
    before, after = load_checkpoint(model)["weights"], run.model.state_dict()
    assert before.keys() == after.keys() and "emb_transform.feature_81.stand_in" in before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run.model.config.history_residual


@pytest.mark.parametrize("choice", ["on", "off"])
def test_seen_items_stay_left_out_as_the_first_model_had_it(tmp_path, choice):
    data_dir = write_tiny(tmp_path / "data")
    model = train(tmp_path, data_dir, "first", f"--remove_seen={choice}")
    run = prepare_run(get_args(flags_of(tmp_path, data_dir, "r", f"--init_from={model}")))
    assert run.model.config.removes_seen == (choice == "on")


def test_a_run_that_goes_on_in_another_folder_has_its_vocabulary(tmp_path):
    data_dir, other = write_tiny(tmp_path / "data"), tmp_path / "other"
    model = train(tmp_path, data_dir, "first", "--num_epochs=2")
    other.mkdir()
    for path in (model, max(model.parent.glob("resume_*.pt"), key=lambda p: p.stat().st_mtime)):
        (other / path.name).write_bytes(path.read_bytes())
    train(tmp_path, data_dir, "other", "--num_epochs=2")
    assert load_vocabulary(other / "vocabulary.pkl") == load_vocabulary(
        model.parent / "vocabulary.pkl"
    )


def test_a_line_says_what_is_known_new_and_gone(weeks, capsys):
    train(weeks.folder, weeks.fresh, "line", "--target_action", f"--init_from={weeks.model}")
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith(f"start from {weeks.model}: "))
    assert line.split(": ", 1)[1].split("; ") == [
        "items 13 known, 1 new, 1 gone",
        "action types 2 known, 1 new, 0 gone",
        "values of colour 3 known, 1 new, 0 gone",
        "values of tags 3 known, 1 new, 0 gone",
        "values of city 2 known, 0 new, 0 gone",
        "feature price new",  # its logarithm: another feature
    ]


def test_the_weights_of_the_model_change_what_is_trained(weeks):
    flags = ("--target_action", "--lr=1e-9")
    start = train(weeks.folder, weeks.second, "warm", *flags, f"--init_from={weeks.model}")
    fresh = train(weeks.folder, weeks.second, "cold", *flags)
    known, warm, cold = (load_checkpoint(path)["weights"] for path in (weeks.model, start, fresh))
    name = "hstu.blocks.0.qkv_proj.weight"
    assert torch.allclose(known[name], warm[name], atol=1e-6)
    assert not torch.allclose(known[name], cold[name], atol=1e-3)


def test_a_run_that_was_stopped_goes_on_and_ends_like_a_whole_one(weeks, monkeypatch):
    flags = ("--target_action", f"--init_from={weeks.model}", "--save_every_steps=1")
    whole = train(weeks.folder, weeks.second, "whole", *flags)
    real, steps = main_module.save_run, []

    def kill(run):
        real(run)
        steps.append(run.progress.step)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(main_module, "save_run", kill)
        with pytest.raises(KeyboardInterrupt):
            train(weeks.folder, weeks.second, "halves", *flags)
    monkeypatch.setattr(warm_start, "start_from", None)  # which is not called again
    halves = train(weeks.folder, weeks.second, "halves", *flags)
    assert are_equal_checkpoints(whole, halves)


def test_a_run_goes_on_with_the_model_that_it_started_from_alone(weeks, capsys):
    train(weeks.folder, weeks.second, "bound", "--target_action", f"--init_from={weeks.model}")
    assert main(flags_of(weeks.folder, weeks.second, "bound", "--target_action")) == 1
    assert "--init_from: " in capsys.readouterr().err


def test_the_vocabulary_has_no_users_and_is_that_of_the_data(weeks):
    path = weeks.model.parent / "vocabulary.pkl"
    assert load_vocabulary(path) == read_vocabulary(weeks.first, read_manifest(weeks.first))
    assert pickle.loads(path.read_bytes()).keys() == {"i", "f", "actions"}


def test_without_an_indexer_items_are_carried_over_by_number(tmp_path):
    data = write_tiny(tmp_path / "data", has_vectors=False)
    for name in ("indexer.pkl", "manifest.json"):
        (data / name).unlink()
    model = train(tmp_path, data, "run")
    run = prepare_run(get_args(flags_of(tmp_path, data, "r", f"--init_from={model}")))
    warm_start.start_from(run, model, read_vocabulary(data, read_manifest(data)))
    assert are_equal(dict(run.model.state_dict()), dict(load_checkpoint(model)["weights"]))


def test_features_of_one_model_alone_are_new_or_gone(weeks, tmp_path, capsys):
    flags = ("--item_features", "price", "--user_features", "none", "--no-actions")
    model = train(weeks.folder, weeks.first, "few", *flags)
    assert load_vocabulary(model.parent / "vocabulary.pkl").feature_values == {}
    capsys.readouterr()
    more = ("--item_features", "colour", "--user_features", "city")
    train(tmp_path, weeks.second, "other", *more, f"--init_from={model}")
    new = "feature colour new; feature city new; feature price gone; input of the actions new"
    assert f"items 14 known, 1 new, 0 gone; {new}\n" in capsys.readouterr().out


@pytest.mark.parametrize("is_same", [True, False])
def test_values_that_are_not_recorded_are_carried_over_by_number_unless_they_differ(
    tmp_path, is_same
):
    def without_values(folder: Path) -> Path:
        indexer = read_indexer(folder) | {"f": {}}
        (folder / "indexer.pkl").write_bytes(pickle.dumps(indexer))
        manifest = read_json(folder / "manifest.json")
        del manifest["files"]["indexer.pkl"]  # whose size is another one
        write_json(folder / "manifest.json", manifest)
        return folder

    first = without_values(convert(tmp_path, 1))
    second = first if is_same else without_values(convert(tmp_path, 2))
    model = train(tmp_path, first, "run", "--target_action")
    run, drawn = started(second, model, tmp_path)
    name = "sparse_emb.feature_colour.weight"
    before, after = load_checkpoint(model)["weights"][name], run.model.state_dict()[name]
    assert torch.equal(after, before if is_same else drawn[name])


def remove_vocabulary(folder: Path) -> None:
    (folder / "vocabulary.pkl").unlink()


def other_vocabulary(folder: Path) -> None:
    content = pickle.loads((folder / "vocabulary.pkl").read_bytes())
    content["i"][0] = 77
    (folder / "vocabulary.pkl").write_bytes(pickle.dumps(content))


def damaged_vocabulary(folder: Path) -> None:
    (folder / "vocabulary.pkl").write_bytes(pickle.dumps([1, 2]))


@pytest.mark.parametrize(
    "spoil, flags, message",
    [
        (None, ["--hidden_units=16"], "of the same shape, but hidden_units: 8 then, 16 now; use"),
        (None, ["--num_blocks=1"], "num_blocks: 2 then, 1 now"),
        (None, ["--time_bias=event"], "time_bias: 'request' then, 'event' now"),
        (None, ["--maxlen=9"], "maxlen: 7 then, 9 now"),
        (None, ["--mix_previous=2"], "mix_previous: 0 then, 2 now"),
        (None, ["--history_residual=on"], "history_residual: False then, True now"),
        (None, ["--num_heads=2", "--time_head"], "time_head: False then, True now"),
        (remove_vocabulary, [], "vocabulary.pkl: missing, but --init_from needs"),
        (other_vocabulary, [], "vocabulary.pkl: has not the items of model_best.pt"),
        (damaged_vocabulary, [], "vocabulary.pkl: no vocabulary of a training"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_one_line(
    weeks, tmp_path, capsys, spoil: Callable | None, flags, message
):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("model_best.pt", "vocabulary.pkl"):
        (source / name).write_bytes((weeks.model.parent / name).read_bytes())
    if spoil:
        spoil(source)
    flags = ["--target_action", f"--init_from={source}/model_best.pt", *flags]
    assert main(flags_of(tmp_path, weeks.second, "run", *flags)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_model_in_the_output_folder_is_refused_before_it_is_removed(weeks, capsys):
    model = train(weeks.folder, weeks.first, "own")
    flags = [f"--init_from={model}", "--resume=none", "--overwrite"]
    assert main(flags_of(weeks.folder, weeks.second, "own", *flags)) == 1
    assert "--init_from lies in --output_dir" in capsys.readouterr().err
    assert model.exists()


@pytest.mark.parametrize("use", ["--inference_only", "--evaluate"])
def test_a_model_to_start_from_is_for_a_training(use, capsys):
    with pytest.raises(SystemExit):
        get_args([use, "--state_dict_path=a.pt", "--init_from=b.pt"])
    assert "--init_from is for a training" in capsys.readouterr().err


def test_ids_that_became_texts_are_the_same_items(weeks, tmp_path):
    rows = [*log_of(2), {"user": 31, "item": "x", "kind": "view", "timestamp": 1_800_000_000}]
    log = write_rows(tmp_path / "log.csv", rows)
    texts = tmp_path / "texts"
    assert prepare_table.main([str(log), str(texts), "--action", "kind"]) == 0
    run, drawn = started(texts, weeks.model, tmp_path)
    rows, old = read_indexer(texts)["i"], read_indexer(weeks.first)["i"]
    name = "embedding_module.item_emb.weight"
    before, after = load_checkpoint(weeks.model)["weights"][name], run.model.state_dict()[name]
    assert torch.equal(after[rows["5"]], before[old[5]])
    assert torch.equal(after[rows[str(NEW_ITEM)]], drawn[name][rows[str(NEW_ITEM)]])

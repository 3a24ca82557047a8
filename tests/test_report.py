"""--evaluate says of any checkpoint what the end of its training would say."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny
from test_main import SMALL

from files.atomic_io import read_json, write_json
from files.sequences import EVENT_DTYPE
from main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of data/ and of outputs/."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny(folder / "data")
    folders = [f"--data_dir={folder}/data", f"--output_dir={folder}/outputs"]
    assert main([*folders, f"--log_dir={folder}/logs", *SMALL]) == 0
    return folder


def evaluate(trained: Path, output: Path, *flags: str, checkpoint: str = "model_best.pt") -> dict:
    """What --evaluate writes."""
    folders = [f"--data_dir={trained}/data", f"--output_dir={output}"]
    path = f"--state_dict_path={trained}/outputs/{checkpoint}"
    assert main([*folders, *SMALL, "--maxlen=3", path, *(flags or ["--evaluate"])]) == 0
    (written,) = output.glob("metrics_*.json")
    return read_json(written)


def result_lines(text: str) -> list[str]:
    """From the line of the test split to that of the files."""
    lines = text.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("  test "))
    return lines[first : next(k for k, line in enumerate(lines) if line.startswith("  wrote "))]


def test_the_best_model_gets_the_numbers_and_lines_of_its_training(tmp_path, trained, capsys):
    folders = [f"--data_dir={trained}/data", f"--output_dir={trained}/outputs"]
    assert main([*folders, f"--log_dir={trained}/logs", *SMALL]) == 0  # which has finished
    printed = result_lines(capsys.readouterr().out)
    found = evaluate(trained, tmp_path)
    assert result_lines(capsys.readouterr().out) == printed
    expected = read_json(trained / "outputs" / "metrics.json")
    parts = [name for name in expected if name.startswith("test")]
    assert {"test", "test_repeat", "test_new", "test_baselines"} <= set(parts)
    assert {name: found[name] for name in parts} == {name: expected[name] for name in parts}
    assert found["checkpoint"] == "model_best.pt"


def test_the_validation_of_the_best_epoch_is_found_again(tmp_path, trained):
    found = evaluate(trained, tmp_path, "--evaluate", "valid")
    assert (tmp_path / "metrics_model_best_valid.json").exists()
    assert found["valid"] == read_json(trained / "outputs" / "metrics.json")["valid"]
    assert "valid_baselines" in found and "test" not in found


def test_every_epoch_and_the_state_of_a_stopped_training_can_be_tested(tmp_path, trained):
    (newest, *_) = sorted(path.name for path in (trained / "outputs").glob("resume_*.pt"))[::-1]
    names = ["model_epoch_1.pt", "model_epoch_2.pt", newest]
    of = [evaluate(trained, tmp_path / name, checkpoint=name)["test"] for name in names]
    assert of[0] != of[1]
    assert of[1] == of[2]


def test_new_targets_of_the_same_items_are_ranked(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "new")
    path = tmp_path / "new" / "data" / "test_data.bin"
    events, offsets = (
        np.fromfile(path, EVENT_DTYPE),
        np.fromfile(path.parent / "test_offsets.bin", "<i8"),
    )
    events["item_id"][offsets[1:] - 1] = 1 + events["item_id"][offsets[1:] - 1] % 23
    events.tofile(path)
    ours, theirs = evaluate(tmp_path / "new", tmp_path / "n"), evaluate(trained, tmp_path / "o")
    assert ours["test"] != theirs["test"]
    assert ours["checkpoint_sha256"] == theirs["checkpoint_sha256"]


def test_a_training_split_of_single_events_is_enough_to_evaluate(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "new")
    data = tmp_path / "new" / "data"
    offsets = np.fromfile(data / "train_offsets.bin", "<i8")
    np.fromfile(data / "train_data.bin", EVENT_DTYPE)[offsets[:-1]].tofile(data / "train_data.bin")
    np.arange(len(offsets)).astype("<i8").tofile(data / "train_offsets.bin")
    manifest = read_json(data / "manifest.json")
    manifest["files"]["train_data.bin"]["size"] = 16 * (len(offsets) - 1)
    write_json(data / "manifest.json", manifest)
    ours, theirs = evaluate(tmp_path / "new", tmp_path / "n"), evaluate(trained, tmp_path / "o")
    assert ours["test"]["MRR"] == theirs["test"]["MRR"]  # the loss has other negatives


def test_seen_items_are_left_out_as_in_the_training_or_as_the_flag_says(tmp_path, trained):
    as_trained = evaluate(trained, tmp_path / "a")
    on = evaluate(trained, tmp_path / "on", "--evaluate", "--remove_seen")
    off = evaluate(trained, tmp_path / "off", "--evaluate", "--no-remove_seen")
    assert on["removes_seen"] and not off["removes_seen"]
    assert on["test"] != off["test"] == as_trained["test"]
    assert on["test_baselines"] != off["test_baselines"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluate"], "--evaluate needs --state_dict_path"),
        (["--evaluate", "train"], "invalid choice"),
        (["--evaluate", "--inference_only", "--state_dict_path=m.pt"], "choose one of the two"),
        (["--evaluate", "--state_dict_path=m.pt", "--whole_history"], "are for --inference_only"),
        (["--state_dict_path=m.pt"], "is for --inference_only and --evaluate"),
    ],
)
def test_flags_of_another_use_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(flags)
    assert message in capsys.readouterr().err


def test_a_split_without_known_targets_is_refused_in_a_line(tmp_path, trained, capsys):
    shutil.copytree(trained, tmp_path / "new")
    manifest = read_json(tmp_path / "new" / "data" / "manifest.json")
    manifest["targets"] |= {"test": "none"}
    write_json(tmp_path / "new" / "data" / "manifest.json", manifest)
    checkpoint = f"--state_dict_path={trained}/outputs/model_best.pt"
    flags = [f"--data_dir={tmp_path}/new/data", f"--output_dir={tmp_path}/o", "--device=cpu"]
    assert main([*flags, "--evaluate", checkpoint]) == 1
    assert "no test split with known targets" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()

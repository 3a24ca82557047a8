"""Checkpoints: written whole, damage that is named and survived, rotation."""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import are_equal
from torch import nn

from files.atomic_io import DataError
from files.checkpoint import (
    differences,
    load_checkpoint,
    load_newest_state,
    load_weights,
    random_states,
    save_checkpoint,
    save_state,
    set_random_states,
)


@pytest.fixture
def content() -> dict:
    """What a run saves."""
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return {
        "config": {"maxlen": 7, "features": {"100": {"kind": "sparse", "size": 4}}, "rate": 0.2},
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "names": ["kind", "sparse", "a longer name with spaces", "sparse"],
        "random": random_states(),
    }


def warnings_in(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def damage(path: Path) -> None:
    """Flip a bit of the first part's content, which follows its name."""
    data = bytearray(path.read_bytes())
    data[data.index(b"data.pkl") + 200] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------- writing, reading


def test_a_checkpoint_is_read_as_it_was_written(tmp_path, content, caplog):
    save_checkpoint(tmp_path / "model_epoch_1.pt", content)
    assert are_equal(load_checkpoint(tmp_path / "model_epoch_1.pt"), content)
    assert warnings_in(caplog) == []


def test_plain_torch_load_with_weights_only_reads_a_checkpoint(tmp_path, content):
    save_checkpoint(tmp_path / "resume_1.pt", content)
    assert are_equal(torch.load(tmp_path / "resume_1.pt", weights_only=True), content)


def test_a_full_disk_is_an_error_and_leaves_the_old_checkpoint(tmp_path, content):
    path = tmp_path / "a.pt"
    save_checkpoint(path, content)
    good, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_checkpoint(path, content | {"table": torch.ones(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["a.pt"]


# ----------------------------------------------------------------------------------------- damage


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, content):
    """Every part has a checksum; what lies between them is padding."""
    path, num_refused = tmp_path / "model_epoch_3.pt", 0
    save_checkpoint(path, content)
    good = path.read_bytes()
    generator = random.Random(0)
    for _ in range(500):
        data = bytearray(good)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        try:
            assert are_equal(load_checkpoint(path), content)
        except DataError as error:
            num_refused += 1
            assert "model_epoch_3.pt: " in str(error)
    assert num_refused > 400


@pytest.mark.parametrize("kind", ["truncated", "longer", "zero tail", "zero page", "empty"])
def test_other_damage_is_refused_or_changes_nothing(tmp_path, content, kind):
    path = tmp_path / "model_best.pt"
    save_checkpoint(path, content)
    good = path.read_bytes()
    generator = random.Random(kind)
    for _ in range(40):
        cut = generator.randrange(1, len(good) - 64)
        path.write_bytes(
            {
                "truncated": good[:cut],
                "longer": good + b"\0" * cut,
                "zero tail": good[:cut] + bytes(len(good) - cut),
                "zero page": good[:cut] + bytes(64) + good[cut + 64 :],
                "empty": b"",
            }[kind]
        )
        try:
            assert are_equal(load_checkpoint(path), content)
            assert kind in ("longer", "zero page")
        except DataError as error:
            assert "model_best.pt: " in str(error)


def test_an_absent_file_and_a_folder_are_refused_by_name(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name in ("absent.pt", "folder.pt"):
        with pytest.raises(DataError, match=f"{re.escape(name)}: no such checkpoint file$"):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("value", [[1, 2], {"weights": {}}, torch.ones(3), "text", 7])
def test_a_file_without_a_model_config_is_refused_by_name(tmp_path, value):
    torch.save(value, tmp_path / "other.pt")
    with pytest.raises(DataError, match=r"other\.pt: no model config in it"):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("kind", ["text", "old pickle", "npz"])
def test_a_file_of_another_kind_is_refused_without_advice_to_trust_it(tmp_path, kind, content):
    path = tmp_path / "other.pt"
    if kind == "text":
        path.write_text("not a checkpoint\n")
    elif kind == "old pickle":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        with open(path, "wb") as file:
            np.savez(file, weights=np.ones(3))
    with pytest.raises(DataError, match=r"other\.pt: .*expected a model_\*\.pt") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_out_of_memory_is_not_taken_for_damage(tmp_path, content, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    save_checkpoint(tmp_path / "resume_1.pt", content)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_checkpoint(tmp_path / "resume_1.pt")


def test_a_disk_that_fails_is_not_taken_for_damage(tmp_path, content, monkeypatch):
    """Else the state before would be taken, and the sound one removed."""

    def testzip(_):
        raise OSError(errno.ESTALE, "Stale file handle")

    save_state(tmp_path, content, 1)
    monkeypatch.setattr("zipfile.ZipFile.testzip", testzip)
    with pytest.raises(OSError, match=r"Stale file handle: .*resume_1\.pt"):
        load_newest_state(tmp_path)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "proof"),)

    torch.save({"config": {}, "weights": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match=r"evil\.pt"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "proof").exists()


# ------------------------------------------------------------------------------------ saved states


def state(step: int) -> dict:
    return {"config": {}, "step": step, "weights": torch.ones(99)}


def test_the_newest_state_is_the_one_with_the_highest_step(tmp_path):
    for step in (9, 10):
        save_state(tmp_path, state(step), step)
    os.utime(tmp_path / "resume_10.pt", (1, 1))  # and the clock was set back
    assert load_newest_state(tmp_path)["step"] == 10


def test_without_any_state_there_is_none_to_resume_from(tmp_path):
    assert load_newest_state(tmp_path) is None
    save_checkpoint(tmp_path / "model_epoch_1.pt", state(3))
    assert load_newest_state(tmp_path) is None


def test_a_file_of_the_users_own_is_never_removed(tmp_path):
    (tmp_path / "resume_keep.pt").write_bytes(b"mine")
    for step in (1, 2, 3):
        save_state(tmp_path, state(step), step)
    assert (tmp_path / "resume_keep.pt").read_bytes() == b"mine"


@pytest.mark.parametrize("fault", ["flip", "truncate", "directory"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path, caplog, fault):
    for step in (99, 100):
        save_state(tmp_path, state(step), step)
    newest = tmp_path / "resume_100.pt"
    if fault == "flip":
        damage(newest)
    elif fault == "truncate":
        newest.write_bytes(newest.read_bytes()[:100])
    else:
        newest.unlink()
        newest.mkdir()
    assert load_newest_state(tmp_path)["step"] == 99
    (message,) = warnings_in(caplog)
    assert "resume_100.pt" in message


@pytest.mark.parametrize("num_states", [1, 2])
def test_when_every_state_is_damaged_the_error_names_all(tmp_path, num_states):
    for step in range(1, 1 + num_states):
        save_state(tmp_path, state(step), step)
        damage(tmp_path / f"resume_{step}.pt")
    with pytest.raises(DataError, match="every saved state is damaged") as caught:
        load_newest_state(tmp_path)
    for step in range(1, 1 + num_states):
        assert f"resume_{step}.pt" in str(caught.value)


def test_only_the_last_two_states_are_kept_and_every_epoch(tmp_path):
    for step in range(7, 13):
        save_checkpoint(tmp_path / f"model_epoch_{step}.pt", state(step))
        save_state(tmp_path, state(step), step)
    epochs = [f"model_epoch_{step}.pt" for step in range(7, 13)]
    assert sorted(os.listdir(tmp_path)) == sorted([*epochs, "resume_11.pt", "resume_12.pt"])


def test_states_of_a_run_that_was_branched_off_from_are_removed(tmp_path):
    for step in (50, 100):
        save_state(tmp_path, state(step), step)
    save_state(tmp_path, state(60), 60)
    assert sorted(os.listdir(tmp_path)) == ["resume_50.pt", "resume_60.pt"]


def test_a_state_saved_twice_at_one_step_is_the_second(tmp_path):
    save_state(tmp_path, state(5) | {"try": 1}, 5)
    save_state(tmp_path, state(5) | {"try": 2}, 5)
    assert load_newest_state(tmp_path)["try"] == 2


# ---------------------------------------------------------------------------------------- weights


def test_weights_are_put_into_a_model_that_fits(content):
    model = nn.Linear(5, 3)
    load_weights(model, content["weights"], "a.pt")
    assert are_equal(dict(model.state_dict()), dict(content["weights"]))


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: value + 1 for name, value in before.items()}
    weights["0.weight"] = torch.zeros(3, 6)
    weights["module.extra"] = torch.zeros(())
    del weights["1.bias"]
    with pytest.raises(DataError, match=r"best\.pt: does not fit the model") as caught:
        load_weights(model, weights, "best.pt")
    message = str(caught.value)
    assert "0.weight: checkpoint (3, 6), model (3, 5)" in message
    assert "1.bias: checkpoint absent, model (2,)" in message
    assert "module.extra: checkpoint (), model absent" in message
    assert "0.bias" not in message and "1.weight" not in message
    assert are_equal(dict(model.state_dict()), before)


def test_differences_show_both_values_of_every_changed_setting():
    saved = {"lr": 0.1, "maxlen": 7, "gone": "x"}
    current = {"lr": 0.2, "maxlen": 7, "new": [1]}
    assert differences(saved, current) == [
        "gone: 'x' then, None now",
        "lr: 0.1 then, 0.2 now",
        "new: None then, [1] now",
    ]
    assert differences(saved, dict(reversed(saved.items()))) == []


# ----------------------------------------------------------------------------------- random states


def draw() -> list[float]:
    return [*torch.rand(3).tolist(), *torch.randn(2).tolist()]


def test_random_states_go_through_a_checkpoint(tmp_path):
    draw()
    save_state(tmp_path, state(1) | {"random": random_states()}, 1)
    expected = [draw(), draw()]
    torch.manual_seed(5)
    assert draw() != expected[0]
    set_random_states(load_newest_state(tmp_path)["random"])
    assert [draw(), draw()] == expected


def test_differences_in_nested_settings_are_named_alone():
    saved = {"config": {"hidden_units": 64, "features": {"100": {"kind": "sparse", "size": 4}}}}
    current = {"config": {"hidden_units": 32, "features": {"100": {"kind": "sparse", "size": 5}}}}
    assert differences(saved, current) == [
        "config.features.100.size: 4 then, 5 now",
        "config.hidden_units: 64 then, 32 now",
    ]

"""Checkpoints: equal bytes for equal content, damage that is named and survived, rotation."""

from __future__ import annotations

import inspect
import json
import logging
import os
import random
import re
import resource
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from files.atomic_io import DataError, file_entry
from files.checkpoint import (
    differences,
    load_checkpoint,
    load_newest_state,
    load_weights,
    random_states,
    read_register,
    save_checkpoint,
    save_state,
    set_random_states,
    settle_register,
)

ROOT = Path(__file__).parent.parent


def make_content() -> dict:
    """What a run saves; another process runs this function's source."""
    generator = torch.Generator().manual_seed(3)
    model = torch.nn.Linear(5, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return {
        "config": {"maxlen": 7, "features": {"100": {"kind": "sparse", "size": 4}}, "rate": 0.2},
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "names": ["kind", "sparse", "a longer name with spaces", "sparse"],
        "random": {"torch": torch.arange(11, dtype=torch.uint8), "python": (3, (1, 2), None)},
    }


@pytest.fixture
def content():
    return make_content()


def warnings_in(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def equal(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and left == right


def damage(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------- writing, reading


def test_a_checkpoint_is_read_as_it_was_written(tmp_path, content, caplog):
    save_checkpoint(tmp_path / "model_epoch_1.pt", content, 5)
    assert equal(load_checkpoint(tmp_path / "model_epoch_1.pt"), content)
    assert warnings_in(caplog) == []


def test_plain_torch_load_with_weights_only_reads_a_checkpoint(tmp_path, content):
    content |= {"random": random_states()}
    save_checkpoint(tmp_path / "resume_1.pt", content, 1)
    assert equal(torch.load(tmp_path / "resume_1.pt", weights_only=True), content)


def test_the_register_holds_size_hash_and_step(tmp_path, content):
    save_checkpoint(tmp_path / "model_epoch_2.pt", content, 30)
    save_checkpoint(tmp_path / "model_epoch_1.pt", content, 20)
    register = read_register(tmp_path)
    assert list(register) == ["model_epoch_1.pt", "model_epoch_2.pt"]
    for name, entry in register.items():
        assert file_entry(tmp_path / name).items() <= entry.items()
    assert [entry["step"] for entry in register.values()] == [20, 30]


def test_saving_does_not_touch_what_is_saved(tmp_path, content):
    weight = content["weights"]["weight"]
    before = weight.clone()
    save_checkpoint(tmp_path / "a.pt", content, 1)
    assert content["weights"]["weight"] is weight
    assert torch.equal(weight, before)


def test_only_the_seen_part_of_a_view_is_saved(tmp_path):
    large = torch.arange(1_000_000.0)
    save_checkpoint(tmp_path / "a.pt", {"config": {}, "view": large[7:10]}, 1)
    assert (tmp_path / "a.pt").stat().st_size < 5_000
    assert load_checkpoint(tmp_path / "a.pt")["view"].tolist() == [7, 8, 9]


def test_a_full_disk_is_said_and_leaves_the_file_before_it(tmp_path, content):
    path = tmp_path / "a.pt"
    save_checkpoint(path, content, 1)
    good, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_checkpoint(path, content | {"table": torch.ones(50_000)}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == good
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "checkpoints.json"]


# ------------------------------------------------------------------------------------ equal bytes


def test_equal_content_gives_equal_bytes_in_another_process(tmp_path, content):
    save_checkpoint(tmp_path / "here.pt", content, 5)
    code = (
        "import sys, torch; from files.checkpoint import save_checkpoint\n"
        + inspect.getsource(make_content)
        + "save_checkpoint(sys.argv[1], make_content(), 5)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    there = tmp_path / "elsewhere" / "another_name.pt"
    there.parent.mkdir()
    subprocess.run(
        [sys.executable, "-c", code, str(there)], check=True, env=environment, cwd=tmp_path
    )
    assert there.read_bytes() == (tmp_path / "here.pt").read_bytes()


def test_shared_or_separate_objects_give_equal_bytes(tmp_path):
    word, pair, tensor = "a word of its own", (1.5, "x"), torch.arange(4.0)
    shared = {
        "config": {"a": word, "b": word, "c": [pair, pair]},
        "weights": {"u": tensor, "v": tensor, "w": torch.ones(3, 2).T},
    }
    separate = {
        "weights": {"w": torch.ones(2, 3), "v": torch.arange(6.0)[:4], "u": nn.Parameter(tensor)},
        "config": {
            "c": [(3 / 2, "".join(["x"])), (1.5, "x")],
            "b": "".join(["a word ", "of its own"]),
            "a": " ".join(["a", "word", "of", "its", "own"]),
        },
    }
    save_checkpoint(tmp_path / "shared.pt", shared, 1)
    save_checkpoint(tmp_path / "separate.pt", separate, 1)
    assert (tmp_path / "shared.pt").read_bytes() == (tmp_path / "separate.pt").read_bytes()


def test_a_checkpoint_that_was_loaded_is_saved_to_equal_bytes(tmp_path, content):
    save_checkpoint(tmp_path / "first.pt", content | {"random": random_states()}, 1)
    save_checkpoint(tmp_path / "second.pt", load_checkpoint(tmp_path / "first.pt"), 1)
    assert (tmp_path / "first.pt").read_bytes() == (tmp_path / "second.pt").read_bytes()


def test_other_content_gives_other_bytes(tmp_path, content):
    save_checkpoint(tmp_path / "a.pt", content, 1)
    content["weights"]["bias"][2] += 1e-6
    save_checkpoint(tmp_path / "b.pt", content, 1)
    assert (tmp_path / "a.pt").read_bytes() != (tmp_path / "b.pt").read_bytes()


# ----------------------------------------------------------------------------------------- damage


def test_a_flipped_bit_is_detected_and_the_file_named(tmp_path, content):
    path = tmp_path / "model_epoch_3.pt"
    save_checkpoint(path, content, 5)
    good = path.read_bytes()
    generator = random.Random(0)
    for _ in range(500):
        data = bytearray(good)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"model_epoch_3\.pt: SHA-256 .* says .* damaged"):
            load_checkpoint(path)
    path.write_bytes(good)
    assert equal(load_checkpoint(path), content)


@pytest.mark.parametrize("kind", ["truncated", "longer", "zero tail", "zero page", "empty"])
def test_other_damage_is_detected_and_the_file_named(tmp_path, content, kind):
    path = tmp_path / "model_best.pt"
    save_checkpoint(path, content, 5)
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
        if path.read_bytes() == good:
            continue  # zeros before
        with pytest.raises(DataError, match=r"model_best\.pt: SHA-256"):
            load_checkpoint(path)


def test_an_absent_file_and_a_folder_are_refused_by_name(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name, remark in (("absent.pt", "$"), ("folder.pt", ", but a folder; name a model_")):
        with pytest.raises(DataError, match=f"{re.escape(name)}: no such checkpoint file{remark}"):
            load_checkpoint(tmp_path / name)


def test_a_damaged_register_is_refused_by_name(tmp_path, content):
    save_state(tmp_path, content, 5)
    (tmp_path / "checkpoints.json").write_text('{"resume_5.pt": {"size"')
    with pytest.raises(DataError, match=r"checkpoints\.json: .*truncated"):
        load_newest_state(tmp_path)


@pytest.mark.parametrize("register", ["[]", "3", '{"a": 1}', '{"resume_1.pt": {}}', '{"a": null}'])
def test_what_is_no_register_is_refused_by_name(tmp_path, register):
    (tmp_path / "checkpoints.json").write_text(register)
    with pytest.raises(DataError, match=r"checkpoints\.json: .*not a register"):
        load_newest_state(tmp_path)


def test_an_unregistered_file_loads_with_one_warning(tmp_path, content, caplog):
    save_checkpoint(tmp_path / "model_best.pt", content, 5)
    (tmp_path / "elsewhere").mkdir()
    copied = tmp_path / "elsewhere" / "copied.pt"
    copied.write_bytes((tmp_path / "model_best.pt").read_bytes())
    assert equal(load_checkpoint(copied), content)
    (message,) = warnings_in(caplog)
    assert "copied.pt" in message and "not verified" in message


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_damaged_unregistered_file_loads_or_is_refused_by_name(tmp_path, content, is_zip):
    path = tmp_path / "copied.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    good = path.read_bytes()
    generator = random.Random(1)
    refused = 0
    for trial in range(300):
        data = bytearray(good)
        # The pickle is at the start, and the most fragile.
        data[generator.randrange(len(data) if trial % 2 else 800)] = generator.randrange(256)
        path.write_bytes(data[: generator.randrange(len(data))] if trial % 5 == 0 else data)
        try:
            load_checkpoint(path)
        except DataError as error:
            assert "copied.pt" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("value", [[1, 2], {"weights": {}}, torch.ones(3), "text", 7])
def test_a_file_without_a_model_config_is_refused_by_name(tmp_path, value):
    torch.save(value, tmp_path / "other.pt")
    with pytest.raises(DataError, match=r"other\.pt: not a checkpoint of this package"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_file_of_another_kind_is_refused_without_advice_to_trust_it(tmp_path):
    (tmp_path / "other.pt").write_text("not a checkpoint\n")
    with pytest.raises(DataError) as caught:
        load_checkpoint(tmp_path / "other.pt")
    assert re.fullmatch(r".*other\.pt: not a readable checkpoint \(.*", str(caught.value))
    assert "weights_only" not in str(caught.value)


def test_want_of_memory_is_no_damage(tmp_path, content, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    save_checkpoint(tmp_path / "resume_1.pt", content, 1)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_checkpoint(tmp_path / "resume_1.pt")


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
    return {"config": {}, "step": step}


def test_the_newest_state_is_the_one_with_the_highest_step(tmp_path):
    for step in (9, 10):
        save_state(tmp_path, state(step), step)
    os.utime(tmp_path / "resume_10.pt", (1, 1))  # and the clock was set back
    assert sorted(read_register(tmp_path))[-1] == "resume_9.pt"
    assert load_newest_state(tmp_path)["step"] == 10


def test_without_any_state_there_is_none_to_resume_from(tmp_path):
    assert load_newest_state(tmp_path) is None
    save_checkpoint(tmp_path / "model_epoch_1.pt", state(3), 3)
    assert load_newest_state(tmp_path) is None


def test_an_unregistered_state_is_not_resumed_from(tmp_path):
    save_state(tmp_path, state(4), 4)
    (tmp_path / "resume_8.pt").write_bytes((tmp_path / "resume_4.pt").read_bytes())
    assert load_newest_state(tmp_path)["step"] == 4


class KilledError(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("number", range(11))
def test_a_state_that_is_written_anew_is_there_at_any_instant(tmp_path, monkeypatch, number):
    """Killed twice before the same sync or rename, the first being 0."""
    old, new = state(5) | {"epoch": 0}, state(5) | {"epoch": 1}
    save_state(tmp_path, state(4), 4)
    save_state(tmp_path, old, 5)
    calls = []

    def killing(plain, *args):
        calls.append(plain)
        if len(calls) > number:
            raise KilledError
        return plain(*args)

    for _ in range(2):
        calls.clear()
        with monkeypatch.context() as patch, suppress(KilledError):
            for name in ("fsync", "replace"):
                patch.setattr(os, name, partial(killing, getattr(os, name)))
            settle_register(tmp_path)
            save_state(tmp_path, new, 5)
        assert load_newest_state(tmp_path) in ((new,) if number > 8 else (old, new))
    settle_register(tmp_path)
    assert load_newest_state(tmp_path)["step"] == 5
    expected = file_entry(tmp_path / "resume_5.pt")
    assert expected.items() <= read_register(tmp_path)["resume_5.pt"].items()
    assert set(read_register(tmp_path)["resume_5.pt"]) == {"size", "sha256", "step", "config"}


def test_a_file_of_the_users_own_is_never_removed(tmp_path):
    (tmp_path / "resume_keep.pt").write_bytes(b"mine")
    for step in (1, 2, 3):
        save_state(tmp_path, state(step), step)
    assert (tmp_path / "resume_keep.pt").read_bytes() == b"mine"


@pytest.mark.parametrize("fault", ["flip", "truncate", "remove", "directory"])
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
        if fault == "directory":
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
        save_checkpoint(tmp_path / f"model_epoch_{step}.pt", state(step), step)
        save_state(tmp_path, state(step), step)
    epochs = [f"model_epoch_{step}.pt" for step in range(7, 13)]
    kept = sorted([*epochs, "resume_11.pt", "resume_12.pt"])
    assert sorted(os.listdir(tmp_path)) == ["checkpoints.json", *kept]
    assert sorted(read_register(tmp_path)) == kept


def test_a_state_saved_twice_at_one_step_is_the_second(tmp_path):
    save_state(tmp_path, state(5) | {"try": 1}, 5)
    save_state(tmp_path, state(5) | {"try": 2}, 5)
    assert load_newest_state(tmp_path)["try"] == 2


# ---------------------------------------------------------------------------------------- weights


def test_weights_are_put_into_a_model_that_fits(content):
    model = nn.Linear(5, 3)
    load_weights(model, content["weights"], "a.pt")
    assert equal(dict(model.state_dict()), dict(content["weights"]))


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
    assert equal(dict(model.state_dict()), before)


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
    return [
        random.random(),
        random.gauss(0, 1),  # the next one is kept inside the generator
        float(np.random.rand()),
        float(np.random.randn()),
        *torch.rand(3).tolist(),
        *torch.randn(2).tolist(),
    ]


def test_random_states_go_through_a_checkpoint(tmp_path):
    draw()
    save_state(tmp_path, state(1) | {"random": random_states()}, 1)
    expected = [draw(), draw()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert draw() != expected[0]
    set_random_states(load_newest_state(tmp_path)["random"])
    assert [draw(), draw()] == expected


def test_the_register_is_plain_json(tmp_path, content):
    save_state(tmp_path, content, 5)
    register = json.loads((tmp_path / "checkpoints.json").read_text())
    assert set(register["resume_5.pt"]) == {"size", "sha256", "step", "config"}


def test_differences_in_nested_settings_are_named_alone():
    saved = {"config": {"hidden_units": 64, "features": {"100": {"kind": "sparse", "size": 4}}}}
    current = {"config": {"hidden_units": 32, "features": {"100": {"kind": "sparse", "size": 5}}}}
    assert differences(saved, current) == [
        "config.features.100.size: 4 then, 5 now",
        "config.hidden_units: 64 then, 32 now",
    ]

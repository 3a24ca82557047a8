"""The command line end to end, in this process: each flag has an effect, runs resume exactly."""

from __future__ import annotations

import errno
import functools
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NUM_ITEMS, are_equal, are_equal_checkpoints, open_dataset, write_tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as main_module
from dataset import load_emb
from engine import setup, training_setup
from engine.flags import get_args
from engine.training_setup import prepare_run
from engine.training_step import TrainingStep
from files.atomic_io import DataError
from files.checkpoint import load_checkpoint, save_checkpoint
from files.data_folder import read_manifest
from files.data_writer import Column, leave_one_out, write_dataset
from files.sequences import EVENT_DTYPE, USER_DTYPE, Sequences
from main import main
from model import HSTUModel

SMALL = [
    "--device=cpu", "--num_workers=0", "--num_epochs=2", "--batch_size=4", "--maxlen=6",
    "--hidden_units=8", "--attention_dim=5", "--linear_dim=6", "--warmup_steps=2",
]  # fmt: skip


def run(tmp_path: Path, data: Path, *flags: str, name: str = "run") -> Path:
    """Train into tmp_path/name; later flags win."""
    output_dir = tmp_path / name
    folders = [f"--data_dir={data}", f"--output_dir={output_dir}", f"--log_dir={output_dir}/logs"]
    assert main([*folders, *SMALL, *flags]) == 0
    return output_dir


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Callable[..., Path]:
    """Output folder of a run with these flags: each is trained once, and tests only read it."""

    @functools.cache
    def train(*flags: str) -> Path:
        return run(tmp_path_factory.mktemp("trained"), data, *flags)

    return train


def weights(output_dir: Path, name: str = "model_epoch_2.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(output_dir / name)["weights"]


def metrics(output_dir: Path) -> dict:
    return json.loads((output_dir / "metrics.json").read_text())


GOLDEN = [7.6477, 5.7392, 10.6916, 7.2084, 6.2834, 5.6777, 7.7105, 4.2045, 5.8820, 7.0275]

# Flag -> (flags of one run, flags of the other): the trained weights must differ.
TRAINING_FLAGS = {
    "maxlen": ([], ["--maxlen=3"]),
    "windows": (["--maxlen=3"], ["--maxlen=3", "--no-windows"]),
    "item_features": (["--item_features", "100"], ["--item_features", "none"]),
    "user_features": ([], ["--user_features", "103", "age"]),
    "actions": ([], ["--no-actions"]),
    "target_action": ([], ["--target_action"]),
    "target_actions": ([], ["--target_actions", "0", "2"]),
    "mm_emb_id": ([], ["--mm_emb_id"]),
    "mm_missing": ([], ["--mm_missing=zero"]),
    "mm_projection": ([], ["--mm_projection=frozen"]),
    "hidden_units": ([], ["--hidden_units=9"]),
    "num_blocks": ([], ["--num_blocks=1"]),
    "num_heads": ([], ["--num_heads=2"]),
    "attention_dim": ([], ["--attention_dim=4"]),
    "linear_dim": ([], ["--linear_dim=4"]),
    "dropout_rate": ([], ["--dropout_rate=0"]),
    "mix_previous": ([], ["--mix_previous=2"]),
    "id_dropout": ([], ["--id_dropout=0.5"]),
    "time_bias": ([], ["--time_bias=event"]),
    "position_bias": ([], ["--no-position_bias"]),
    "time_head": (["--num_heads=2"], ["--num_heads=2", "--time_head"]),
    "history_residual": (["--history_residual=on"], ["--history_residual=off"]),
    "infonce_temp": ([], ["--infonce_temp=0.5"]),
    "negatives": (["--negatives=batch"], ["--negatives=mixed"]),
    "num_negatives": (
        ["--negatives=uniform", "--num_negatives=3"],
        ["--negatives=uniform", "--num_negatives=5"],
    ),
    "logq": (["--negatives=batch"], ["--negatives=batch", "--no-logq"]),
    "batch_size": ([], ["--batch_size=3"]),
    "num_epochs": ([], ["--num_epochs=3"]),
    "lr": ([], ["--lr=0.01"]),
    "weight_decay": ([], ["--weight_decay=0.5"]),
    "muon": ([], ["--no-muon"]),
    "warmup_steps": ([], ["--warmup_steps=0"]),
    "clip_grad": (["--clip_grad=0"], ["--clip_grad=0.001"]),
    "accumulate_steps": ([], ["--accumulate_steps=2"]),
    "precision": ([], ["--precision=bf16"]),
    "seed": ([], ["--seed=1"]),
}


@pytest.mark.parametrize("flag", TRAINING_FLAGS)
def test_flag_changes_what_is_trained(flag, trained):
    one, other = (weights(trained(*flags)) for flags in TRAINING_FLAGS[flag])
    assert not are_equal(one, other)


def test_target_actions_that_the_data_lacks_are_refused_with_those_it_has(tmp_path, data, capsys):
    flags = [f"--data_dir={data}", f"--output_dir={tmp_path}/o", *SMALL]
    assert main([*flags, "--target_actions", "1", "buy", "9"]) == 1
    found = f"error: --target_actions buy 9: no action of {data}, expected 0, 1, 2\n"
    assert capsys.readouterr().err == found


def test_every_flag_is_tested_for_its_effect():
    others = {
        "data_dir", "output_dir", "log_dir", "num_workers", "device", "trust_pickle", "patience",
        "early_stop_on", "gradient_checkpointing", "compile", "resume", "overwrite",
        "save_every_steps", "log_every", "remove_seen", "inference_only", "state_dict_path",
        "top_k", "whole_history", "request_time", "request_action", "debug", "mm_emb_device",
        "candidates", "projector", "shard_items", "kernels", "evaluate", "export_users",
        "init_from", "min_updates",
    }  # fmt: skip
    assert set(vars(get_args([]))) == others | set(TRAINING_FLAGS)


def test_min_updates_cuts_the_batches_of_a_small_log(tmp_path, data, capsys, monkeypatch):
    expected = weights(run(tmp_path, data, "--batch_size=3", name="cut"))
    flags = "--batch_size=8", "--min_updates=3"  # of 11 sequences
    uncut = weights(run(tmp_path, data, *flags, name="few_targets"))
    assert "batches of" not in capsys.readouterr().out
    monkeypatch.setattr(training_setup, "LEAST_TARGETS", 1)
    found = weights(run(tmp_path, data, *flags, name="min_updates"))
    assert "batches of 3 sequences instead of 8" in capsys.readouterr().out
    assert are_equal(found, expected)
    assert not are_equal(uncut, expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 50),  # the targets of 50 sequences are enough for a step
        (["--accumulate_steps=2"], 128),
        (["--accumulate_steps=2", "--min_updates=300"], 25),
        (["--min_updates=200"], 60),  # 12,000 sequences make 200 steps of 60
        (["--min_updates=0"], 128),
        (["--batch_size=100"], 100),
        (["--batch_size=100", "--min_updates=300"], 50),
        (["--batch_size=7", "--min_updates=300"], 7),
    ],
)
def test_a_batch_keeps_enough_targets_and_the_size_that_was_asked_for(flags, expected, monkeypatch):
    class Windows(list):
        negatives = SimpleNamespace(target_counts=np.array([0, 500_000, 460_000]))

    monkeypatch.setattr(training_setup, "LEAST_TARGETS", 4000)
    args = get_args(flags)
    assert training_setup.cut_batch_size(args, Windows(range(12_000))) == expected


def test_plain_kernels_train_validate_and_export_the_same(tmp_path, data, trained, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a tuned form")

    tuned = trained("--dropout_rate=0")
    exports = [infer(tmp_path, data, tuned / "model_best.pt")]
    for form in ("ops.attention._GatedAttention", "ops.infonce._InfoNCE"):
        monkeypatch.setattr(form, refuse)
    plain = run(tmp_path, data, "--dropout_rate=0", "--kernels=plain", name="plain")
    exports.append(infer(tmp_path, data, plain / "model_best.pt", name="two"))  # as it was trained
    for split in ("valid", "test"):
        assert metrics(plain)[split] == pytest.approx(metrics(tuned)[split], rel=1e-3)
    for kind in ("item_embeddings", "user_embeddings"):
        pair = [load_emb(folder / kind / "embedding.fbin") for folder in exports]
        np.testing.assert_allclose(*pair, atol=1e-3)


def test_two_runs_with_one_seed_are_equal_byte_for_byte(tmp_path, data, trained):
    one, other = trained(), run(tmp_path, data)
    for name in ("model_epoch_1.pt", "model_epoch_2.pt", "model_best.pt"):
        assert are_equal_checkpoints(one / name, other / name)
    assert metrics(one) == metrics(other)


def test_the_number_of_workers_does_not_change_what_is_trained(tmp_path, data, monkeypatch):
    opened = []
    loader = setup.DataLoader

    def spy(*args, **kwargs):
        opened.append(kwargs["num_workers"])
        return loader(*args, **kwargs)

    monkeypatch.setattr(setup, "DataLoader", spy)
    flags = ["--negatives=mixed", "--num_negatives=4"]
    one = run(tmp_path, data, *flags)
    assert set(opened) == {0}
    opened.clear()
    other = run(tmp_path, data, *flags, "--num_workers=2", name="o")
    assert set(opened) == {2}
    assert are_equal(weights(one), weights(other))


@pytest.mark.slow
def test_loaders_that_are_spawned_train_the_same(tmp_path, data, trained, monkeypatch):
    monkeypatch.setattr(setup, "START_METHOD", "spawn")  # of macOS and Windows
    other = run(tmp_path, data, "--num_workers=1")
    assert are_equal(weights(trained()), weights(other))


def test_too_few_open_files_are_raised_or_refused_before_anything_hangs(
    tmp_path, data, capsys, monkeypatch
):
    limits = []
    monkeypatch.setattr(setup.resource, "getrlimit", lambda _: (30, 70))
    monkeypatch.setattr(setup.resource, "setrlimit", lambda _, pair: limits.append(pair))
    run(tmp_path, data, "--num_workers=1")
    assert set(limits) == {(60, 70)}
    capsys.readouterr()
    folders = [f"--data_dir={data}", f"--output_dir={tmp_path}/o", f"--log_dir={tmp_path}/l"]
    assert main([*folders, *SMALL, "--num_workers=2"]) == 1
    told = "error: 70 open files are allowed, but 2 loader processes need 100; raise ulimit -n"
    assert capsys.readouterr().err.startswith(told)


def test_a_full_shared_memory_ends_the_run_with_one_line(tmp_path, data, capsys, monkeypatch):
    full = os.statvfs("/dev/shm")
    full = SimpleNamespace(f_bavail=1, f_frsize=512, f_blocks=full.f_blocks)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    folders = [f"--data_dir={data}", f"--output_dir={tmp_path}/o", f"--log_dir={tmp_path}/l"]
    assert main([*folders, *SMALL, "--num_workers=1"]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: /dev/shm: no room for a batch of 0.0 MB")
        and "\n" not in error[:-1]
    )


def test_without_a_temporary_folder_loaders_are_refused_before_they_hang(data, monkeypatch):
    def refuse():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(setup.tempfile, "gettempdir", refuse)
    with pytest.raises(OSError, match="No usable temporary directory found"):
        setup.make_loader(open_dataset(data, "train", 6), 4, 1, torch.device("cpu"), 1)


@pytest.mark.slow
def test_accumulated_batches_equal_one_large_batch(tmp_path, data):
    flags = ["--dropout_rate=0", "--num_epochs=1"]
    one = run(tmp_path, data, *flags, "--batch_size=6")
    other = run(tmp_path, data, *flags, "--batch_size=2", "--accumulate_steps=3", name="o")
    pairs = weights(one, "model_epoch_1.pt"), weights(other, "model_epoch_1.pt")
    for name, weight in pairs[0].items():
        torch.testing.assert_close(weight, pairs[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_checkpointing_is_used_and_changes_no_weight(tmp_path, data, monkeypatch):
    import simplified_hstu

    calls = []
    checkpoint = simplified_hstu.checkpoint

    def spy(*args, **kwargs):
        calls.append(args[0])
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(simplified_hstu, "checkpoint", spy)
    plain = run(tmp_path, data)
    assert not calls
    saved = run(tmp_path, data, "--gradient_checkpointing", name="o")
    assert calls
    assert are_equal(weights(plain), weights(saved))


def test_blocks_are_compiled_only_on_request(tmp_path, data, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(options) or f)
    one = run(tmp_path, data)
    assert not compiled
    other = run(tmp_path, data, "--compile", name="o")
    assert compiled == [{"dynamic": True}] * 2  # one part of each of two blocks
    assert are_equal(weights(one), weights(other))


@pytest.mark.parametrize("side", ["item", "user"])
def test_an_id_of_both_a_feature_and_a_vector_is_refused(tmp_path, capsys, side):
    feature = {"81": Column("sparse", [1, 2])}
    ones = Sequences(np.ones(2, EVENT_DTYPE), np.array([0, 2]), np.ones(1, USER_DTYPE))
    ids = {"item_ids": [4, 5], "user_ids": [1, 2], "num_action_types": 2}
    folder = tmp_path / "data"
    write_dataset(folder, {"train": ones}, **ids, **{f"{side}_features": feature})
    (folder / "creative_emb").mkdir()
    np.save(folder / "creative_emb" / "81.npy", np.ones((3, 2)))
    assert main([f"--data_dir={folder}", f"--output_dir={tmp_path}/o", *SMALL]) == 1
    assert "81 is a feature and a multimodal vector, but" in capsys.readouterr().err


def test_absent_vectors_81_are_one_line_and_others_an_error(tmp_path, data, capsys):
    write_dataset(
        tmp_path / "plain",
        {"train": read_split(data, "train")},
        item_ids=range(1, NUM_ITEMS + 1),
        user_ids=range(1, 12),
        num_action_types=3,
    )
    run(tmp_path, tmp_path / "plain")
    assert capsys.readouterr().out.count("no multimodal vectors 81") == 1
    assert main([f"--data_dir={data}", f"--output_dir={tmp_path}/o", *SMALL, "--mm_emb_id=82"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "82" in error and "81" in error


def read_split(data: Path, split: str) -> Sequences:
    events = np.fromfile(data / f"{split}_data.bin", EVENT_DTYPE)
    offsets = np.fromfile(data / f"{split}_offsets.bin", np.int64)
    return Sequences(events, offsets, np.fromfile(data / f"{split}_users.bin", np.int32))


def test_a_pickle_is_trusted_only_on_request(tmp_path, capsys):
    data = write_tiny(tmp_path / "data")
    vectors = {1000 + 3 * k: Trusting() if k == 0 else np.ones(4) for k in range(NUM_ITEMS)}
    (data / "creative_emb" / "82.pkl").write_bytes(pickle.dumps(vectors))
    flags = [f"--data_dir={data}", f"--output_dir={tmp_path}/o", f"--log_dir={tmp_path}/l", *SMALL]
    assert main([*flags, "--mm_emb_id=82"]) == 1
    assert "82.pkl" in capsys.readouterr().err
    assert main([*flags, "--mm_emb_id=82", "--trust_pickle"]) == 0
    assert "can run any code" in capsys.readouterr().out


class Trusting:
    """Pickles as a call of numpy.ones, which the safe reader refuses."""

    def __reduce__(self):
        return np.ones, (4,)


def test_metrics_are_those_of_the_best_epoch_and_patience_ends_a_run(tmp_path, data, capsys):
    for criterion in ("loss", "ndcg"):
        flags = ["--num_epochs=12", "--patience=2", f"--early_stop_on={criterion}", "--lr=0.3"]
        output_dir = run(tmp_path, data, *flags, name=criterion)
        curve = scalars(output_dir, "Loss/valid" if criterion == "loss" else "Metrics/NDCG@10")
        values = [value if criterion == "loss" else -value for _, value in curve]
        best = metrics(output_dir)["best_epoch"]
        assert best == values.index(min(values)) + 1
        assert len(values) == min(12, best + 2)
        assert f"best epoch {best}, stopped by --patience 2" in capsys.readouterr().out
        newest = output_dir / f"model_epoch_{best}.pt"
        assert are_equal_checkpoints(output_dir / "model_best.pt", newest)
    assert not (tmp_path / "loss" / "model_epoch_12.pt").exists()


def test_the_rate_rises_for_a_tenth_of_a_short_run(tmp_path, data):
    steps = ["--warmup_steps=2", "--batch_size=1"]  # of 22
    one = run(tmp_path, data, *steps)
    folders = [f"--data_dir={data}", f"--output_dir={tmp_path}/o", f"--log_dir={tmp_path}/l"]
    assert main([*folders, *(flag for flag in [*SMALL, *steps] if "warmup" not in flag)]) == 0
    assert are_equal(weights(one), weights(tmp_path / "o"))


def test_a_warm_up_of_more_than_a_fifth_of_the_run_is_a_warning(tmp_path, data, capsys):
    run(tmp_path, data, "--batch_size=1", "--warmup_steps=4")
    assert "--warmup_steps" not in capsys.readouterr().out
    run(tmp_path, data, "--batch_size=1", "--warmup_steps=5", name="warm")
    told = "there are 22 steps: the learning rate rises for more than a fifth; try --warmup_steps 2"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num_negatives=5", "--no-logq"], "no-logq num_negatives"),  # all negatives
        (["--negatives=uniform", "--num_negatives=5", "--no-logq"], "no-logq"),
        (["--negatives=batch", "--num_negatives=5", "--no-logq"], "num_negatives"),
        (["--negatives=mixed", "--num_negatives=5", "--no-logq", "--mm_missing=zero"], ""),
        (
            ["--mm_emb_id", "--mm_missing=zero", "--mm_emb_device=loader"],
            "mm_emb_device mm_missing",
        ),
        (["--shard_items"], "shard_items"),
        (["--item_features=none", "--mm_emb_id", "--id_dropout=0.5"], "id_dropout"),
    ],
)
def test_a_flag_that_changes_nothing_is_named(tmp_path, data, capsys, flags, expected):
    run(tmp_path, data, *flags)
    found = re.findall(r"^--([\w-]+) changes nothing ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(found) == expected.split()


def test_bf16_on_a_cpu_is_said_to_be_slower(tmp_path, data, capsys):
    run(tmp_path, data, name="fp32")
    assert "fp32 is faster" not in capsys.readouterr().out
    run(tmp_path, data, "--precision=bf16", name="bf16")
    assert "--precision bf16: fp32 is faster on a CPU" in capsys.readouterr().out


def test_target_action_is_named_as_idle_where_no_action_is_known(tmp_path, data, capsys):
    ids = {"item_ids": range(1, NUM_ITEMS + 1), "user_ids": range(1, 12), "num_action_types": 0}
    split = read_split(data, "train")
    split.events["action_type"] = -1
    write_dataset(tmp_path / "plain", {"train": split}, **ids)
    run(tmp_path, tmp_path / "plain", "--target_action", "--patience=2", "--early_stop_on=loss")
    out = capsys.readouterr().out
    assert "--target_action changes nothing without actions" in out
    assert "--patience changes nothing without a validation" in out
    assert "--early_stop_on changes nothing without a validation" in out


def test_targets_that_were_seen_are_told_apart_and_missed_where_seen_items_are_left_out(
    tmp_path, data, capsys
):
    removed = metrics(run(tmp_path, data, "--remove_seen"))
    assert "left out of the ranking, a miss each (--remove_seen off)" in capsys.readouterr().out
    kept = metrics(run(tmp_path, data, "--no-remove_seen", name="kept"))
    assert "a miss each" not in capsys.readouterr().out
    for found in (removed, kept):
        parts = [found["test_new"], found["test_repeat"]]
        counts = [part["targets"] for part in parts]
        assert min(counts) > 0
        mean = sum(n * part["MRR"] for n, part in zip(counts, parts, strict=True)) / sum(counts)
        assert mean == pytest.approx(found["test"]["MRR"])
    assert removed["test_repeat"]["MRR"] == 0 < kept["test_repeat"]["MRR"]
    assert removed["test_new"]["MRR"] > kept["test_new"]["MRR"]


@pytest.mark.parametrize(("share", "is_off"), [(0.05, False), (0.06, True)])
def test_seen_items_stay_and_are_added_to_the_query_where_many_validation_targets_are_repeats(
    tmp_path, capsys, share, is_off
):
    items = np.arange(1, 401).reshape(100, 4)
    items[: round(100 * share), 2] = items[: round(100 * share), 1]  # the last of valid
    events = np.zeros(400, EVENT_DTYPE)
    events["item_id"], events["timestamp"] = items.flatten(), np.arange(1, 401)
    splits = leave_one_out(events, np.arange(0, 401, 4))
    ids = {"item_ids": range(400), "user_ids": range(100), "num_action_types": 1}
    write_dataset(tmp_path / "data", splits, **ids)
    auto = run(tmp_path, tmp_path / "data")
    line = "--remove_seen is off and --history_residual is on: 6.0 % of the validation"
    assert (line in capsys.readouterr().out) == is_off
    flags = ("--remove_seen=off", "--history_residual=on")
    flags = flags if is_off else ("--remove_seen=on", "--history_residual=off")
    chosen = run(tmp_path, tmp_path / "data", *flags, name="c")
    assert are_equal(metrics(auto), metrics(chosen))
    best = [f"--state_dict_path={auto}/model_best.pt", f"--output_dir={auto}"]
    assert main(["--inference_only", "--device=cpu", f"--data_dir={tmp_path}/data", *best]) == 0
    seen = {(k, i) for k, row in enumerate(items[:, :3]) for i in row}
    top = load_emb(auto / "user_embeddings" / "topk.u64bin")
    found = {(k, i + 1) for k, row in enumerate(top) for i in row}  # item_ids are re-ids - 1
    assert bool(seen & found) == is_off


def test_without_a_validation_the_training_says_whether_users_come_back(tmp_path, capsys):
    """As of a model that goes live: it is to be what was validated before."""
    events = np.zeros(12, EVENT_DTYPE)
    events["item_id"], events["timestamp"] = [1, 2, 1, 3, 4, 3, 5, 6, 5, 1, 2, 1], np.arange(1, 13)
    splits = {"train": Sequences(events, np.arange(0, 13, 3), np.arange(1, 5, dtype=np.int32))}
    ids = {"item_ids": range(6), "user_ids": range(4), "num_action_types": 1}
    write_dataset(tmp_path / "data", splits, **ids)
    model = run(tmp_path, tmp_path / "data") / "model_best.pt"
    assert "100.0 % of the training sequences' last items are items" in capsys.readouterr().out
    config = load_checkpoint(model)["config"]
    assert config["history_residual"] and not config["removes_seen"]


@pytest.mark.parametrize("choice", ["on", "off"])
def test_the_metrics_of_the_test_are_those_of_the_exported_lists(tmp_path, data, choice):
    trained = run(tmp_path, data, "--remove_seen", choice)
    folder = infer(tmp_path, data, trained / "model_best.pt", f"--top_k={NUM_ITEMS}")
    top = load_emb(folder / "user_embeddings" / "topk.u64bin")
    users = load_emb(folder / "user_embeddings" / "id.u64bin")[:, 0]
    history = read_split(data, "test")
    targets = 1000 + 3 * (history.events["item_id"][history.offsets[users] - 1] - 1)
    is_target = top == targets[:, None]
    places = np.where(is_target.any(1), is_target.argmax(1) + 1.0, np.inf)
    found = metrics(trained)["test"]
    assert found["MRR"] == pytest.approx(np.mean(1 / places))
    assert found["HR@10"] == pytest.approx(np.mean(places <= 10))
    gains = np.where(places <= 10, 1 / np.log2(1 + places), 0)
    assert found["NDCG@10"] == pytest.approx(gains.mean())
    assert np.isinf(places).any() == (choice == "on")


def scalars(output_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(output_dir / "logs"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_log_every_sets_the_steps_of_the_curves(tmp_path, data):
    output_dir = run(tmp_path, data, "--log_every=2")
    assert [step for step, _ in scalars(output_dir, "Loss/train")] == [2, 4, 6]
    assert [step for step, _ in scalars(output_dir, "Loss/valid")] == [3, 6]


def test_a_validation_that_is_not_finite_ends_the_run_without_a_model(tmp_path, data, capsys):
    folders = [f"--data_dir={data}", f"--output_dir={tmp_path}/o", f"--log_dir={tmp_path}/logs"]
    assert main([*folders, *SMALL, "--lr=1e20", "--warmup_steps=0", "--batch_size=64"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "validation loss nan" in error and "Lower --lr" in error
    assert not list(tmp_path.rglob("*.pt"))


# ------------------------------------------------------------------------------------------- resume


class KilledError(Exception):
    """Stands for a kill."""


def stop_after(monkeypatch, steps: int) -> None:
    step = TrainingStep.__call__
    taken = []

    def stopping(*args):
        if len(taken) == steps:
            raise KilledError
        taken.append(1)
        return step(*args)

    monkeypatch.setattr(TrainingStep, "__call__", stopping)


# Three steps an epoch: the run goes on from the end of the first, and from inside the second.
@pytest.mark.parametrize("save_every", [0, 2])
def test_an_interrupted_run_ends_like_a_whole_one(tmp_path, data, trained, monkeypatch, save_every):
    """The kills of benchmarks/faults.py say the same of every instant, and of the log."""
    flags = ["--negatives=mixed", "--num_negatives=4"]
    whole, flags = trained(*flags), [*flags, f"--save_every_steps={save_every}"]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KilledError):
            run(tmp_path, data, *flags)
    torch.manual_seed(999)
    resumed = run(tmp_path, data, *flags)
    for name in ("model_epoch_1.pt", "model_epoch_2.pt", "model_best.pt"):
        assert are_equal_checkpoints(whole / name, resumed / name)
    assert metrics(whole) == metrics(resumed)


def test_a_run_that_stops_inside_an_epoch_of_merged_batches_ends_alike(
    tmp_path, data, trained, monkeypatch
):
    """A state counts batches, here six of two sequences, and not the three steps of two of them."""
    flags = ["--negatives=mixed", "--num_negatives=4", "--batch_size=2", "--accumulate_steps=2"]
    flags += ["--no-windows", "--min_updates=0", "--save_every_steps=2"]
    whole = trained(*flags)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KilledError):
            run(tmp_path, data, *flags)
    resumed = run(tmp_path, data, *flags)
    for name in ("model_epoch_1.pt", "model_epoch_2.pt"):
        assert are_equal_checkpoints(whole / name, resumed / name)


def test_an_epochs_points_are_logged_once_whatever_is_saved_at_its_end(tmp_path, data, monkeypatch):
    flags = ["--save_every_steps=3", "--log_every=1"]  # as many steps as an epoch has
    whole = run(tmp_path, data, *flags)
    with monkeypatch.context() as patch:
        patch.setattr(main_module, "save_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, data, *flags, name="o")
    time.sleep(1 - time.time() % 1)  # TensorBoard orders files by the second
    resumed = run(tmp_path, data, *flags, name="o")
    for tag in ("Loss/train", "Loss/train_epoch", "Metrics/MRR"):
        assert scalars(whole, tag) == scalars(resumed, tag), tag
    assert [step for step, _ in scalars(resumed, "Metrics/MRR")] == [3, 6]


def test_the_best_model_is_that_of_an_epoch_of_this_run(tmp_path, data, monkeypatch):
    output_dir = run(tmp_path, data, "--num_epochs=3")
    (output_dir / "metrics.json").unlink()
    best = metrics(run(tmp_path, data, "--num_epochs=3"))["best_epoch"]
    expected = (output_dir / f"model_epoch_{best}.pt").read_bytes()
    assert (output_dir / "model_best.pt").read_bytes() == expected
    other = output_dir / f"model_epoch_{2 if best == 1 else 1}.pt"
    # As a kill before an epoch's state leaves it, if the epoch ends otherwise afterwards.
    save_checkpoint(output_dir / "model_best.pt", load_checkpoint(other))
    run(tmp_path, data, "--num_epochs=3")
    assert (output_dir / "model_best.pt").read_bytes() == expected
    (output_dir / "model_best.pt").unlink()
    run(tmp_path, data, "--num_epochs=3")
    assert (output_dir / "model_best.pt").read_bytes() == expected


def test_other_peoples_files_survive_in_an_output_folder(tmp_path, data):
    output_dir = run(tmp_path, data)
    others = ["model_before_change.pt", "resume_keep.pt", ".mine.tmp", ".lock"]
    for name in others:
        (output_dir / name).write_text("mine")
    run(tmp_path, data, "--resume=none", "--overwrite", "--lr=0.5")
    assert [(output_dir / name).read_text() for name in others] == ["mine"] * len(others)


@pytest.mark.parametrize("target", ["link", "/nowhere/at/all"])
def test_a_link_to_nowhere_is_no_output_folder(tmp_path, data, capsys, target):
    (tmp_path / "link").symlink_to(tmp_path / target)
    folders = [f"--data_dir={data}", f"--output_dir={tmp_path}/link", f"--log_dir={tmp_path}/l"]
    assert main([*folders, *SMALL]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/link: File exists\n"


def test_states_are_saved_every_so_many_steps_and_the_last_two_kept(tmp_path, data):
    output_dir = run(tmp_path, data, "--save_every_steps=1")
    assert sorted(path.name for path in output_dir.glob("resume_*")) == [
        "resume_5.pt",
        "resume_6.pt",
    ]


def test_a_finished_run_is_not_trained_again(tmp_path, data, monkeypatch, capsys):
    output_dir = run(tmp_path, data)
    before = {path.name: path.stat().st_mtime_ns for path in output_dir.glob("*.pt")}
    stop_after(monkeypatch, 0)
    run(tmp_path, data)
    assert before == {path.name: path.stat().st_mtime_ns for path in output_dir.glob("*.pt")}
    assert capsys.readouterr().out.count("finished: 2 epochs") == 2


def test_other_settings_are_refused_with_both_values(tmp_path, data, capsys):
    output_dir = run(tmp_path, data)
    folders = [f"--data_dir={data}", f"--output_dir={output_dir}", f"--log_dir={output_dir}/logs"]
    assert main([*folders, *SMALL, "--lr=0.5", "--hidden_units=9"]) == 1
    error = capsys.readouterr().err
    assert "lr: 0.001 then, 0.5 now" in error
    assert "hidden_units: 8 then, 9 now" in error
    assert error.count("\n") == 1


def test_resume_none_never_overwrites_unasked(tmp_path, data, capsys):
    output_dir = run(tmp_path, data, "--resume=none")
    folders = [f"--data_dir={data}", f"--output_dir={output_dir}", f"--log_dir={output_dir}/logs"]
    assert main([*folders, *SMALL, "--resume=none"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    shutil.copy(output_dir / "model_epoch_2.pt", output_dir / "model_epoch_9.pt")
    run(tmp_path, data, "--resume=none", "--overwrite", "--lr=0.5")
    assert metrics(output_dir)
    assert not (output_dir / "model_epoch_9.pt").exists()


def test_resume_from_a_named_state(tmp_path, data):
    whole = run(tmp_path, data, "--save_every_steps=5")
    shutil.copytree(whole, tmp_path / "o")
    resumed = run(tmp_path, data, f"--resume={tmp_path}/o/resume_5.pt", name="o")
    assert are_equal_checkpoints(whole / "model_epoch_2.pt", resumed / "model_epoch_2.pt")


def test_a_state_of_another_folder_is_refused_and_goes_on_once_it_is_copied(tmp_path, data, capsys):
    flags = ["--lr=3", "--warmup_steps=0", "--history_residual=off"]
    whole = run(tmp_path, data, *flags, "--save_every_steps=5")
    assert metrics(whole)["best_epoch"] == 1  # and remains so
    other = tmp_path / "o"
    folders = [f"--data_dir={data}", f"--output_dir={other}", f"--log_dir={other}/logs"]
    assert main([*folders, *SMALL, f"--resume={whole}/resume_5.pt"]) == 1
    assert "copy it there, with model_best.pt" in capsys.readouterr().err
    for name in ("resume_5.pt", "model_best.pt"):
        shutil.copy(whole / name, other / name)
    resumed = run(tmp_path, data, *flags, name="o")
    assert are_equal_checkpoints(whole / "model_best.pt", resumed / "model_best.pt")
    assert metrics(whole) == metrics(resumed)


def test_metrics_of_an_earlier_run_are_never_taken_for_those_of_this_one(tmp_path, data):
    output_dir = run(tmp_path, data)
    for old in output_dir.glob("*.pt"):
        old.unlink()
    first = metrics(output_dir)
    run(tmp_path, data, "--lr=0.5")
    assert metrics(output_dir) != first


# ---------------------------------------------------------------------------------------- inference


def infer(tmp_path: Path, data: Path, checkpoint: Path, *flags: str, name: str = "export") -> Path:
    export = tmp_path / name
    folders = [f"--data_dir={data}", f"--output_dir={export}", f"--state_dict_path={checkpoint}"]
    assert main(["--inference_only", "--device=cpu", "--num_workers=0", *folders, *flags]) == 0
    return export


def test_inference_exports_what_an_index_and_a_recommender_need(tmp_path, data, trained, capsys):
    checkpoint = trained() / "model_epoch_2.pt"
    capsys.readouterr()
    export = infer(tmp_path, data, checkpoint, "--top_k=4", "--remove_seen")
    told = capsys.readouterr().out
    assert "not all ids of users are numbers" in told and "not all ids of items" not in told
    items = load_emb(export / "item_embeddings" / "embedding.fbin")
    ids = load_emb(export / "item_embeddings" / "id.u64bin")[:, 0]
    assert items.shape == (NUM_ITEMS, 8)
    np.testing.assert_allclose(np.linalg.norm(items, axis=1), 1, rtol=1e-5)
    assert ids.tolist() == [1000 + 3 * k for k in range(NUM_ITEMS)]
    queries = load_emb(export / "user_embeddings" / "embedding.fbin")
    users = load_emb(export / "user_embeddings" / "id.u64bin")[:, 0]
    top = load_emb(export / "user_embeddings" / "topk.u64bin")
    assert top.shape == (11, 4)
    assert sorted(users.tolist()) == list(range(1, 12))  # "user-3" is no integer: re-ids
    history = read_split(data, "test")
    for query, user, row in zip(queries, users, top, strict=True):
        events = history.events[history.offsets[user - 1] : history.offsets[user] - 1]
        scores = items @ query
        scores[events["item_id"] - 1] = -np.inf
        assert row.tolist() == ids[np.argsort(-scores)[:4]].tolist()
    manifest = json.loads((export / "user_embeddings" / "manifest.json").read_text())
    assert (manifest["item_ids"], manifest["user_ids"]) == ("original", "re-id")


def test_where_vectors_lie_changes_no_weight_and_no_export(tmp_path, data, trained, monkeypatch):
    on_model, on_disk = (
        trained(f"--mm_emb_device={where}", "--negatives=batch") for where in ("model", "loader")
    )
    assert are_equal(weights(on_model), weights(on_disk))
    exports = [
        infer(
            tmp_path, data, on_model / "model_best.pt", f"--mm_emb_device={where}", name=f"e{where}"
        )
        for where in ("model", "loader")
    ]
    name = "item_embeddings/embedding.fbin"
    assert (exports[0] / name).read_bytes() == (exports[1] / name).read_bytes()
    items, _ = setup.read_features(data, read_manifest(data), ["all"], ["none"], ["81"], False)
    assert setup.vectors_on_host(items, "auto") == {}
    monkeypatch.setattr(setup, "MODEL_VECTORS_UP_TO", 100)
    assert list(setup.vectors_on_host(items, "auto")) == ["81"]


def test_candidates_restrict_and_order_the_export(tmp_path, data, trained):
    """Rows are the candidates, ids retrieval ids; a cold one is what its features say."""
    folder = tmp_path / "candidates"
    folder.mkdir()
    known, retrieval = [7, 3, 20, 11], [9, 4, 2, 8, 5]
    np.array(retrieval, "<u8").tofile(folder / "retrieval_ids.bin")
    np.array([*known, 0], "<i4").tofile(folder / "item_ids.bin")
    np.arange(5, dtype="<u8").tofile(folder / "original_ids.bin")
    vectors = np.load(data / "creative_emb" / "emb_81_6.npy")
    (folder / "creative_emb").mkdir()
    rows = vectors[[0, *known, 7]]  # the cold one has item 7's features
    np.save(folder / "creative_emb" / "emb_81_6.npy", rows)
    records = json.loads((data / "item_feat_dict.json").read_text())
    rows = {row: records[str(k)] for row, k in enumerate([*known, 7], 1)}
    (folder / "item_feat_dict.json").write_text(json.dumps(rows))
    for name in ("feature_types", "feat_statistics", "feature_default_value"):
        (folder / f"{name}.json").write_text((data / f"{name}.json").read_text())
    checkpoint = trained() / "model_best.pt"
    whole = infer(tmp_path, data, checkpoint, "--top_k=23")
    export = infer(tmp_path, data, checkpoint, f"--candidates={folder}", "--top_k=5", name="c")
    items = load_emb(whole / "item_embeddings" / "embedding.fbin")
    found = load_emb(export / "item_embeddings" / "embedding.fbin")
    np.testing.assert_allclose(found[:4], items[np.array(known) - 1], rtol=1e-6, atol=1e-7)
    assert not np.allclose(found[4], items[6])
    assert load_emb(export / "item_embeddings" / "id.u64bin")[:, 0].tolist() == retrieval
    top = load_emb(export / "user_embeddings" / "topk.u64bin")
    everything = load_emb(whole / "user_embeddings" / "topk.u64bin")
    retrieval_of = {1000 + 3 * (k - 1): r for k, r in zip(known, retrieval, strict=False)}
    for row, all_row in zip(top.tolist(), everything.tolist(), strict=True):
        kept = [retrieval_of[item] for item in all_row if item in retrieval_of]
        assert [r for r in row if r not in (5, -1)] == kept  # 5: the cold one, wherever it stands


def test_the_exported_config_wins_over_todays_flags(tmp_path, data, trained):
    checkpoint = trained() / "model_best.pt"
    plain = infer(tmp_path, data, checkpoint)
    other = infer(tmp_path, data, checkpoint, "--hidden_units=9", "--maxlen=2", name="o")
    for name in ("item_embeddings/embedding.fbin", "user_embeddings/embedding.fbin"):
        assert (plain / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    ("training", "request_flag"),
    [
        ("--time_bias=request", "--request_time=2000000000"),
        ("--target_action", "--request_action=2"),
    ],
)
def test_what_is_known_of_a_request_moves_queries(tmp_path, data, training, request_flag):
    test_split = read_split(data, "test")
    write_dataset(
        tmp_path / "data",
        {"train": read_split(data, "train"), "test": test_split},
        item_ids=range(1, NUM_ITEMS + 1),
        user_ids=range(1, 12),
        num_action_types=3,
        targets={"test": "none"},
    )
    trained = run(tmp_path, tmp_path / "data", "--lr=0.1", training)
    exports = [
        infer(tmp_path, tmp_path / "data", trained / "model_best.pt", *flags, name=f"export{k}")
        for k, flags in enumerate([[], [request_flag]])
    ]
    name = "user_embeddings/embedding.fbin"
    assert (exports[0] / name).read_bytes() != (exports[1] / name).read_bytes()
    assert "test" not in metrics(trained)


def test_the_whole_history_is_exported_as_if_no_target_were_known(tmp_path, data, trained):
    checkpoint = trained() / "model_best.pt"
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["targets"]["test"] = "none"
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    later = "--request_time=2000000000"
    held_out = infer(tmp_path, data, checkpoint, name="held_out")
    for k, flags in enumerate([[], [later]]):
        whole = infer(tmp_path, data, checkpoint, "--whole_history", *flags, name=f"whole{k}")
        none = infer(tmp_path, tmp_path / "data", checkpoint, *flags, name=f"none{k}")
        for name in ("embedding.fbin", "topk.u64bin", "id.u64bin"):
            name = f"user_embeddings/{name}"
            assert (whole / name).read_bytes() == (none / name).read_bytes()
        name = "user_embeddings/embedding.fbin"
        assert (whole / name).read_bytes() != (held_out / name).read_bytes()


def test_a_request_may_come_now(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.7)
    flags = ["--inference_only", "--state_dict_path=model_best.pt", "--request_time=now"]
    assert get_args(flags).request_time == 1_800_000_000


def test_everyone_is_exported_as_of_the_request(tmp_path, data, trained):
    """Though the test split's targets have times of their own."""
    checkpoint = trained() / "model_best.pt"
    exports = [
        infer(tmp_path, data, checkpoint, "--export_users=all", *flags, name=f"all{k}")
        for k, flags in enumerate([[], ["--request_time=2000000000"]])
    ]
    name = "user_embeddings/embedding.fbin"
    assert (exports[0] / name).read_bytes() != (exports[1] / name).read_bytes()


@pytest.mark.parametrize("flag", ["--request_time=2000000000", "--request_action=1"])
def test_what_is_known_of_a_request_is_refused_where_its_target_is_known(
    tmp_path, data, trained, capsys, flag
):
    flags = [f"--data_dir={data}", f"--output_dir={tmp_path}/e", "--device=cpu", flag]
    checkpoint = f"--state_dict_path={trained('--target_action')}/model_best.pt"
    assert main(["--inference_only", checkpoint, *flags]) == 1
    assert "with --whole_history" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_request_time_needs_a_model_that_asks_for_it(tmp_path, data, trained, capsys):
    folders = [f"--data_dir={data}", f"--output_dir={tmp_path}/e", "--device=cpu"]
    checkpoint = f"--state_dict_path={trained('--time_bias=event')}/model_best.pt"
    flags = [checkpoint, "--whole_history", "--request_time=2000000000"]
    assert main(["--inference_only", *folders, *flags]) == 1
    assert "--request_time: the model was trained with --time_bias event" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("flag", ["--whole_history", "--request_time=5", "--request_action=1"])
def test_what_only_an_export_asks_for_is_refused_in_a_training(flag, capsys):
    with pytest.raises(SystemExit):
        main([flag])
    assert "are for --inference_only" in capsys.readouterr().err


def test_a_request_action_needs_a_model_that_knows_it(tmp_path, data, trained, capsys):
    folders = [f"--data_dir={data}", f"--output_dir={tmp_path}/e", "--device=cpu"]
    checkpoint = f"--state_dict_path={trained()}/model_best.pt"
    assert main(["--inference_only", *folders, checkpoint, "--request_action=1"]) == 1
    assert "was trained without --target_action" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_checkpoint_is_for_data_whose_re_ids_mean_the_same_items_and_actions(
    tmp_path, data, capsys
):
    trained = run(
        tmp_path, data, "--item_features", "none", "--user_features", "none", "--mm_emb_id"
    )

    def export(name: str, item_ids: Sequence[int], num_types: int = 3, **options) -> int:
        write_dataset(
            tmp_path / name,
            {"train": read_split(data, "train")},
            item_ids=item_ids,
            num_action_types=num_types,
            **{"user_ids": range(1, 12)} | options,
        )
        flags = [f"--state_dict_path={trained}/model_best.pt", f"--output_dir={tmp_path}/e_{name}"]
        return main(["--inference_only", "--device=cpu", f"--data_dir={tmp_path}/{name}", *flags])

    same = [1000 + 3 * k for k in range(NUM_ITEMS)]
    assert export("more_users", same, user_ids=range(1, 16)) == 0
    assert export("other_item", [*same[:-1], 7]) == 1
    assert "digest of the item ids" in capsys.readouterr().err
    assert export("other_order", same[::-1]) == 1
    assert "digest of the item ids" in capsys.readouterr().err
    assert export("more_types", same, num_types=8) == 1
    assert "action types: 3 then, 8 now" in capsys.readouterr().err
    assert export("fewer_types", same, num_types=2) == 0
    assert export("named", same, action_names=["view", "cart", "buy"]) == 0
    trained = run(tmp_path, tmp_path / "named", "--mm_emb_id", name="of_named")
    assert export("renamed", same, action_names=["view", "buy", "cart"]) == 1
    assert "action names: ['view', 'cart', 'buy'] then, ['view', 'b" in capsys.readouterr().err
    assert export("fewer", same, 2, action_names=["view", "cart"]) == 0
    assert export("first gone", same, 2, action_names=["cart", "buy"]) == 1
    assert "action names: ['view', 'cart'] then" in capsys.readouterr().err
    assert export("one more", same, 4, action_names=["view", "cart", "buy", "like"]) == 0
    assert "without a vector: 1 action types" in capsys.readouterr().out
    assert export("one between", same, 4, action_names=["view", "like", "cart", "buy"]) == 1
    assert "action names: ['view', 'cart', 'buy'] then" in capsys.readouterr().err
    assert export("more_items", [*same, 7]) == 0
    assert "without a vector: 1 items" in capsys.readouterr().out
    assert export("more_others", [7, *same]) == 1
    assert "items: 23 then, 24 now" in capsys.readouterr().err


def test_a_checkpoint_is_refused_data_whose_feature_values_mean_something_else(
    tmp_path, data, capsys
):
    def write(name: str, colours: Sequence[str] | None) -> Path:
        codes = [1 + k % 3 for k in range(NUM_ITEMS)]
        write_dataset(
            tmp_path / name,
            {"train": read_split(data, "train")},
            item_ids=range(NUM_ITEMS),
            user_ids=range(1, 12),
            num_action_types=3,
            item_features={"colour": Column("sparse", codes, colours)},
        )
        return tmp_path / name

    def export(name: str, colours: Sequence[str] | None) -> int:
        folders = [f"--data_dir={write(name, colours)}", f"--output_dir={tmp_path}/e_{name}"]
        return main([*("--inference_only", "--device=cpu"), *folders, f"--state_dict_path={best}"])

    best = run(tmp_path, write("week1", ["blue", "green", "red"])) / "model_best.pt"
    assert export("week2", ["blue", "green", "red"]) == 0
    assert "not recorded" not in capsys.readouterr().out
    assert export("more", ["blue", "green", "red", "zinc"]) == 0
    assert "without a vector: 1 values of colour" in capsys.readouterr().out
    assert export("week3", ["green", "red", "zinc"]) == 1
    assert "week3: the values of feature colour are numbered" in capsys.readouterr().err
    assert export("unknown", None) == 0
    assert "numbers of feature colour stand for is not recorded" in capsys.readouterr().out


def test_a_checkpoint_without_newer_settings_loads(tmp_path, data):
    path = run(tmp_path, data) / "model_best.pt"
    content = load_checkpoint(path)
    del content["config"]["feature_digests"]
    save_checkpoint(path, content)
    flags = [f"--data_dir={data}", f"--output_dir={tmp_path}/e", f"--state_dict_path={path}"]
    assert main(["--inference_only", "--device=cpu", *flags]) == 0


# ------------------------------------------------------------------------------------------- errors


def test_plain_item_ids_train_without_times_and_actions(tmp_path, data, capsys):
    folder = tmp_path / "plain"
    folder.mkdir()
    split = read_split(data, "train")
    split.events["item_id"].astype("<i8").tofile(folder / "train_data.bin")
    split.offsets.tofile(folder / "train_offsets.bin")
    output_dir = run(tmp_path, folder)
    config = load_checkpoint(output_dir / "model_best.pt")["config"]
    assert (config["time_bias"], config["num_action_types"]) == ("off", 0)
    assert capsys.readouterr().out.count("time and actions are off") == 1


def test_a_loss_that_is_not_finite_ends_the_run_before_a_weight_changes(
    tmp_path, data, monkeypatch, capsys
):
    before = []
    forward = HSTUModel.forward

    def poisoned(model, batch):
        before.append({k: v.clone() for k, v in model.state_dict().items()})
        poisoned.model = model
        return forward(model, batch) * (float("nan") if len(before) == 3 else 1.0)

    monkeypatch.setattr(HSTUModel, "forward", poisoned)
    output_dir = tmp_path / "o"
    assert (
        main(
            [f"--data_dir={data}", f"--output_dir={output_dir}", f"--log_dir={output_dir}", *SMALL]
        )
        == 1
    )
    assert "epoch 1 step 3: loss nan" in capsys.readouterr().err
    assert are_equal(before[-1], poisoned.model.state_dict())


def test_gradients_in_fp16_that_never_get_finite_end_the_run(tmp_path, data, monkeypatch, capsys):
    forward = HSTUModel.forward

    def poisoned(model, batch):
        loss = forward(model, batch)
        loss.register_hook(lambda grad: grad * torch.nan)
        return loss

    monkeypatch.setattr(HSTUModel, "forward", poisoned)
    folders = [f"--data_dir={data}", f"--output_dir={tmp_path}/o", f"--log_dir={tmp_path}/l"]
    flags = [*SMALL, "--precision=fp16", "--num_epochs=20", "--batch_size=3"]
    assert main([*folders, *flags]) == 1
    assert "gradient norm nan" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 9 GiB")])
def test_out_of_memory_says_what_to_lower(error):
    assert "lower --batch_size" in main_module.one_line(error)


def test_out_of_memory_in_a_loader_process_says_what_to_lower():
    """Numpy's own error cannot be made again outside of it; torch hands on its text."""
    text = "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 9.00 GiB for an array"
    found = f"Caught _ArrayMemoryError in DataLoader worker process 0.\nTraceback ...\n{text}\n"
    line = main_module.one_line(RuntimeError(found))
    assert "lower --batch_size" in line and "Unable to allocate 9.00 GiB" in line
    assert "\n" not in line


def test_a_killed_loader_is_one_line():
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    line = main_module.one_line(error)
    assert "lower --num_workers" in line and "pid(s) 7" in line


@pytest.mark.parametrize(
    "flags",
    [["--num_heads=1"], ["--num_heads=2", "--time_bias=off", "--no-position_bias"]],
)
def test_a_time_head_without_a_bias_or_another_head_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        get_args(["--time_head", *flags])
    assert "--time_head needs --num_heads 2 or more, and a bias" in capsys.readouterr().err


def test_a_time_head_without_times_or_positions_is_refused(tmp_path, capsys):
    """It would have nothing to attend by, and learn nothing."""
    (tmp_path / "data").mkdir()
    np.array([3, 1, 2, 9, 4], "<i4").tofile(tmp_path / "data" / "train_data.bin")
    np.array([0, 2, 5], "<i8").tofile(tmp_path / "data" / "train_offsets.bin")
    folders = [f"--data_dir={tmp_path}/data", f"--output_dir={tmp_path}/o"]
    assert main([*folders, *SMALL, "--num_heads=2", "--time_head", "--no-position_bias"]) == 1
    assert "--time_head --no-position_bias: the data has no times" in capsys.readouterr().err


def test_checkpoints_without_a_state_are_not_overwritten(tmp_path, data, capsys):
    whole = run(tmp_path, data)
    for state in whole.glob("resume_*.pt"):
        state.unlink()
    before = {path.name: path.read_bytes() for path in whole.glob("*.pt")}
    folders = [f"--data_dir={data}", f"--output_dir={whole}", f"--log_dir={tmp_path}/l"]
    assert main([*folders, *SMALL]) == 1
    assert "but no resume_*.pt to go on from" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in whole.glob("*.pt")} == before


def stop(*_):
    raise KeyboardInterrupt


def test_the_scalars_of_rab_move_ten_times_as_fast(tiny):
    run = prepare_run(get_args([f"--data_dir={tiny}", "--device=cpu", "--warmup_steps=0"]))
    weights = dict(run.model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    train_set = run.datasets["train"]
    run.training_step([train_set.collate_fn(train_set.__getitems__(range(3)))], epoch=1, step=1)
    # AdamW's first step is the rate, for whatever has a gradient.
    rab, other = "hstu.blocks.0.relative_bias.position_weight", "hstu.blocks.0.output_proj.bias"
    moved = {name: (weights[name] - start[name]).abs().max().item() for name in (rab, other)}
    assert moved == pytest.approx({rab: 0.01, other: 0.001}, rel=0.02)


def test_weights_that_are_not_finite_are_named(tiny):
    args = get_args([f"--data_dir={tiny}", "--device=cpu", "--hidden_units=8"])
    train_set = open_dataset(tiny, "train", 6)
    batch = train_set.collate_fn(train_set.__getitems__(range(3)))
    run = prepare_run(args)
    run.model.hstu.blocks[1].qkv_proj.weight.data[0, 0] = torch.nan
    message = r"epoch 2 step 9: loss nan.* weights not finite: hstu\.blocks\.1\.qkv_proj\.weight;"
    with pytest.raises(DataError, match=message):
        run.training_step([batch], epoch=2, step=9)


def test_names_of_the_public_description_are_there(data):
    from dataset import MyDataset, save_emb  # noqa: F401
    from dot_product_similarity import DotProductSimilarity
    from hstu_components import (
        L2NormEmbeddingPostprocessor,
        LearnablePositionalEmbeddingInputFeaturesPreprocessor,
        LocalEmbeddingModule,
    )
    from simplified_hstu import HSTU, HSTUAttention

    args = get_args([f"--data_dir={data}", *SMALL])
    model = prepare_run(args).model
    assert isinstance(model.embedding_module, LocalEmbeddingModule)
    assert isinstance(
        model.input_preprocessor, LearnablePositionalEmbeddingInputFeaturesPreprocessor
    )
    assert isinstance(model.hstu, HSTU)
    assert isinstance(model.output_postprocessor, L2NormEmbeddingPostprocessor)
    assert isinstance(model.similarity, DotProductSimilarity)
    assert model.sparse_emb and model.emb_transform
    block = model.hstu.blocks[0]
    assert isinstance(block, HSTUAttention)
    assert all(
        hasattr(block, name) for name in ("qkv_proj", "output_proj", "layer_norm", "dropout")
    )
    assert callable(model.compute_infonce_loss) and callable(save_emb)


def test_the_page_of_charts_names_only_curves_that_are_there(tmp_path, data):
    from engine.run_log import LAYOUT

    output_dir = run(tmp_path, data, "--log_every=1")
    events = EventAccumulator(str(output_dir / "logs")).Reload()
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    charts = [tags for page in LAYOUT.values() for _, tags in page.values()]
    assert {tag for tags in charts for tag in tags} <= set(events.Tags()["scalars"])


def test_the_first_ten_losses_are_the_golden_ones(tmp_path, data):
    """They change only with the model, the loss, the data or the order of random draws.

    Without Muon, which tests/test_optimizer.py compares with torch's, and without the residual
    that this data's repeats turn on.
    """
    flags = "--log_every=1", "--num_epochs=4", "--no-muon", "--history_residual=off"
    output_dir = run(tmp_path, data, *flags)
    losses = [loss for _, loss in scalars(output_dir, "Loss/train")][:10]
    # 1e-3: another CPU sums in another order.
    assert losses == pytest.approx(GOLDEN, rel=1e-3)

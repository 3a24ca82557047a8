"""The negatives of a training, from its flags and its data."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dataset import Negatives
from engine import training_setup
from engine.flags import get_args
from engine.training_setup import announce, count_negatives, prepare_run
from files.atomic_io import read_json, write_json
from files.data_folder import read_manifest
from files.sequences import open_split


def negatives_of(data_dir: Path, *flags: str) -> Negatives:
    args = get_args([f"--data_dir={data_dir}", *flags])
    return count_negatives(args, read_manifest(data_dir), has_item_features=True)[0]


@pytest.mark.parametrize(("limit", "kind"), [(22, "mixed"), (23, "all")])
def test_auto_is_mixed_where_items_are_many(tiny, monkeypatch, limit, kind):
    monkeypatch.setattr(training_setup, "ALL_NEGATIVES_UP_TO", limit)
    assert negatives_of(tiny).kind == kind


@pytest.mark.parametrize("flags", [["--windows"], ["--no-windows"]])
@pytest.mark.parametrize("types", [[], ["1"], ["0", "2"]])
def test_targets_are_counted_as_they_are_trained(tiny, flags, types):
    """Of the types asked for, and without windows of the newest events alone."""
    events, offsets, _ = open_split(tiny, "train")
    expected = np.zeros(24, int)
    for start, end in pairwise(offsets):
        first = start + 1 if flags == ["--windows"] else max(start + 1, end - 2)
        for event in events[first:end]:
            expected[event["item_id"]] += not types or str(event["action_type"]) in types
    asked = ["--target_actions", *types] if types else []
    counts = negatives_of(tiny, "--maxlen=2", *flags, *asked).target_counts
    assert counts.tolist() == expected.tolist()


def test_muon_trains_the_matrices_of_the_blocks_and_nothing_else(tiny):
    run = prepare_run(get_args([f"--data_dir={tiny}", "--device=cpu", "--weight_decay=0.1"]))
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    groups = run.training_step.optimizer.param_groups
    by_muon = {names[p] for group in groups if group["muon"] for p in group["params"]}
    layers = [
        f"hstu.blocks.{k}.{name}.weight" for k in (0, 1) for name in ("qkv_proj", "output_proj")
    ]
    assert by_muon == set(layers)
    decayed = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert by_muon <= decayed
    assert decayed - by_muon == {
        f"emb_transform.feature_{i}.weight" for i in ("81", "price", "age")
    }


def test_the_learning_rate_ends_with_the_last_update_of_the_last_epoch(tiny):
    """Eleven sequences are three batches of four, and two updates of two batches."""
    flags = ["--batch_size=4", "--accumulate_steps=2", "--num_epochs=3", "--no-windows"]
    run = prepare_run(get_args([f"--data_dir={tiny}", "--device=cpu", *flags]))
    assert run.training_step.options.total_steps == 6


@pytest.mark.parametrize(("num_epochs", "warmup"), [(20, 22), (200, 100)])
def test_the_rate_rises_for_a_tenth_of_the_steps_and_100_at_most(tiny, num_epochs, warmup):
    flags = ["--batch_size=1", f"--num_epochs={num_epochs}", "--no-windows"]
    run = prepare_run(get_args([f"--data_dir={tiny}", "--device=cpu", *flags]))
    assert run.training_step.options.warmup_steps == warmup


def test_the_state_of_a_training_has_the_scale_of_fp16(tiny):
    args = get_args([f"--data_dir={tiny}", "--device=cpu", "--precision=fp16"])
    one, other = prepare_run(args), prepare_run(args)
    train = one.datasets["train"]
    one.training_step([train.collate_fn(train[0])], 1, 1)
    one.training_step.scaler.update(new_scale=8.0)
    other.training_step.load_state_dict(one.training_step.state_dict())
    assert other.training_step.scaler.get_scale() == 8.0


@pytest.mark.parametrize("without", [[], ["valid"]])
def test_times_that_the_test_lacks_are_warned_of_where_the_validation_has_them(
    tiny, caplog, without
):
    manifest = read_json(tiny / "manifest.json")
    manifest["targets"]["test"] = "none"
    for split in without:
        del manifest["targets"][split]
    write_json(tiny / "manifest.json", manifest)
    args = get_args([f"--data_dir={tiny}", "--device=cpu"])
    announce(args, prepare_run(args))
    assert ("--time_bias event is measured as it will rank" in caplog.text) == (not without)

"""Baselines rank as the definition ranks their counts as scores, quickly, and end a training."""

from __future__ import annotations

import baselines
import numpy as np
import pytest
import torch
from conftest import NUM_ITEMS, open_dataset, write_tiny

from dot_product_similarity import DotProductSimilarity
from engine import baselines as engine_baselines
from engine.baselines import baseline_metrics
from engine.metrics import ranking_metrics
from files.atomic_io import read_json, write_json
from files.sequences import Sequences, SplitInMemory
from main import main

LARGE = 1000  # more than any item occurs: transitions come before popularity


def scores_by_hand(data, history: list[int], last_part: float | None = None) -> dict[str, list]:
    """Of each item 1..X, by loops over the training's events."""
    train = open_dataset(data, "train").sequences
    start = np.quantile(train.events["timestamp"], 0.9)
    pop, recent, follow = ([0] * (NUM_ITEMS + 1) for _ in range(3))
    for k in range(len(train.offsets) - 1):
        events = train.events[train.offsets[k] : train.offsets[k + 1]]
        for place, event in enumerate(events):
            pop[event["item_id"]] += 1
            recent[event["item_id"]] += int(event["timestamp"] >= start)
            if place and events["item_id"][place - 1] == history[-1]:
                follow[event["item_id"]] += LARGE
    follow = [a + b for a, b in zip(follow, pop, strict=True)]
    return {"pop": pop[1:], "recent": recent[1:], "follow": follow[1:]}


def metrics_by_hand(data, split: str, removes_seen: bool) -> dict[str, dict[str, float]]:
    """The definition's ranks of what `scores_by_hand` gives."""
    sequences, ranks = open_dataset(data, split).sequences, {}
    for start, end in zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True):
        *history, target = sequences.events["item_id"][start:end].tolist()
        seen = torch.tensor(history if removes_seen else [], dtype=torch.int64) - 1
        for name, scores in scores_by_hand(data, history).items():
            ranked = torch.tensor([scores], dtype=torch.float64), torch.eye(NUM_ITEMS).double()
            left_out = seen, torch.tensor([0, len(seen)])
            of = DotProductSimilarity().target_ranks(*ranked, torch.tensor([target - 1]), left_out)
            ranks.setdefault(name, []).append(of)
    return {n: ranking_metrics(torch.cat(r)) | {"targets": len(r)} for n, r in ranks.items()}


def found(data, split: str, removes_seen: bool) -> dict[str, dict[str, float]]:
    return baseline_metrics(
        *(open_dataset(data, s).sequences for s in ("train", split)), removes_seen
    )


@pytest.mark.parametrize("removes_seen", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranks_are_those_of_the_definition_with_counts_as_scores(tmp_path, seed, removes_seen):
    data = write_tiny(tmp_path, seed)
    expected = metrics_by_hand(data, "test", removes_seen)
    assert found(data, "test", removes_seen) == expected
    assert expected["pop"] != expected["follow"] != expected["recent"]


def test_seen_items_are_left_out_or_not(tmp_path):
    data = write_tiny(tmp_path)
    assert found(data, "test", True) != found(data, "test", False)


@pytest.mark.parametrize(("name", "value"), [("CHUNK_PAIRS", 7), ("BLOCK", 16)])
def test_how_much_is_counted_or_compared_at_once_changes_no_rank(tiny, monkeypatch, name, value):
    whole = found(tiny, "test", True)
    monkeypatch.setattr(engine_baselines, name, value)
    assert found(tiny, "test", True) == whole


def test_beyond_the_bounds_every_kth_is_taken_and_the_log_says_so(tiny, monkeypatch, caplog):
    whole = found(tiny, "test", True)
    monkeypatch.setattr(engine_baselines, "MOST_PAIRS", 30)
    monkeypatch.setattr(engine_baselines, "MOST_EVENTS", 20)
    with caplog.at_level("INFO", "hstu"):
        sampled = found(tiny, "test", True)
    assert 0 < sampled["pop"]["targets"] < whole["pop"]["targets"]
    assert "transitions are counted in every" in caplog.text
    assert f"-th of {whole['pop']['targets']} targets is ranked" in caplog.text


def test_of_one_time_all_events_are_recent_however_many_are_counted_at_once(tiny, monkeypatch):
    train = open_dataset(tiny, "train").sequences
    events = np.array(train.events)
    events["timestamp"] = 1000
    sequences = Sequences(events, np.array(train.offsets), np.array(train.users))
    same = SplitInMemory(sequences, train.num_items, train.num_action_types)
    monkeypatch.setattr(engine_baselines, "BLOCK", 1)
    assert engine_baselines.count_recent(same).tolist() == train.count_items().tolist()


def test_without_times_nothing_is_recent(tiny):
    events = np.fromfile(
        tiny / "train_data.bin", open_dataset(tiny, "train").sequences.events.dtype
    )
    events["timestamp"] = 0
    events.tofile(tiny / "train_data.bin")
    assert found(tiny, "test", True).keys() == {"pop", "follow"}


def test_the_end_of_a_training_and_the_script_say_the_same(tiny, tmp_path, capsys):
    folders = [f"--data_dir={tiny}", f"--output_dir={tmp_path}/o", f"--log_dir={tmp_path}/l"]
    flags = ["--num_epochs=1", "--device=cpu", "--num_workers=0", "--no-remove_seen"]
    assert main([*folders, *flags]) == 0
    written = read_json(tmp_path / "o" / "metrics.json")["test_baselines"]
    assert written == found(tiny, "test", False)
    names = ("pop", "recent", "follow")
    assert written.keys() == set(names)
    printed = [line for line in capsys.readouterr().out.splitlines() if line[2:8].strip() in names]
    assert len(printed) == 3
    assert baselines.main([f"--data_dir={tiny}", "--remove_seen=off"]) == 0
    assert capsys.readouterr().out.splitlines() == printed


def test_a_split_without_targets_has_no_baselines(tiny, capsys):
    assert baselines.main([f"--data_dir={tiny}/none"]) == 1
    assert "no train_data.bin" in capsys.readouterr().err
    manifest = read_json(tiny / "manifest.json")
    manifest["targets"]["test"] = "none"
    write_json(tiny / "manifest.json", manifest)
    assert baselines.main([f"--data_dir={tiny}"]) == 1
    assert "no test split with known targets" in capsys.readouterr().err

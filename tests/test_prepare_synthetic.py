"""The synthetic data: readable, repeatable, and with the structure and the optimum it claims."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import prepare_synthetic as synthetic
import pytest

from dataset import MyDataset
from files.atomic_io import read_json
from files.data_folder import SPLITS, original_ids, read_indexer
from files.features import load_features
from files.item_vectors import load_vectors
from files.sequences import open_split

pytestmark = pytest.mark.slow

NUM_USERS, NUM_ITEMS, SEED = 601, 260, 3


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict]:
    """A folder of 601 users and 260 items, and what `write` reports of it."""
    data_dir = tmp_path_factory.mktemp("synthetic")
    return data_dir, synthetic.write(data_dir, NUM_USERS, NUM_ITEMS, SEED)


@pytest.fixture(scope="module")
def drawn() -> tuple[synthetic.Process, np.ndarray, np.ndarray, synthetic.State]:
    """The same: process, events, offsets, and the state before each user's last event."""
    generator = np.random.default_rng(SEED)
    process = synthetic.make_process(NUM_ITEMS, generator)
    return process, *synthetic.simulate(process, NUM_USERS, generator)


# ------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_is_readable(written, split):
    dataset = MyDataset(written[0], split)
    batch = dataset.collate_fn(dataset.__getitems__(range(5)))
    assert len(dataset) == NUM_USERS
    assert dataset.num_action_types == 3
    assert batch.action_types.unique().tolist() == [0, 1, 2]
    assert (batch.target_timestamps > batch.timestamps).all()


def test_every_kind_of_feature_is_there(written):
    data_dir, kinds = written[0], ["sparse", "array", "continual"]
    item_rows = read_indexer(data_dir)["i"]
    vectors = load_vectors(data_dir, ["81"], item_rows, NUM_ITEMS)["81"]
    for side, count in (("item", NUM_ITEMS), ("user", NUM_USERS)):
        features = load_features(data_dir, side, count)
        assert [feature.kind for feature in features.values()] == kinds
    assert 0.7 < vectors.present[1:].mean() < 0.9


def test_original_ids_are_not_the_re_ids(written):
    for side, count in (("i", NUM_ITEMS), ("u", NUM_USERS)):
        originals = original_ids(written[0], side, count)[1:]
        assert not set(originals.tolist()) & set(range(count + 1))


def test_the_seed_decides_every_byte(written, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    assert synthetic.write(again, NUM_USERS, NUM_ITEMS, SEED) == written[1]
    synthetic.write(other, NUM_USERS, NUM_ITEMS, SEED + 1)
    manifests = [read_json(folder / "manifest.json") for folder in (written[0], again, other)]
    assert manifests[0] == manifests[1] != manifests[2]


def test_the_command_prints_the_optimum(written, tmp_path, capsys):
    flags = ["--num_users", str(NUM_USERS), "--num_items", str(NUM_ITEMS), "--seed", str(SEED)]
    assert synthetic.main([str(tmp_path / "data"), *flags]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["optimum", f"{written[1]['HR@10']['optimum']:.4f}"] in lines


# ------------------------------------------------------------------------------------ the structure


def test_a_file_in_the_way_is_one_line(tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert synthetic.main([str(tmp_path / "taken")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "taken" in error and error.count("\n") == 1


def test_cold_items_are_test_targets_and_nothing_else(drawn, written):
    cold_ids = np.flatnonzero(drawn[0].is_cold) + 1
    assert len(cold_ids) == NUM_ITEMS // 10
    for split in SPLITS:
        events, offsets, _ = open_split(written[0], split)
        is_cold = np.isin(events["item_id"], cold_ids)
        is_last = np.isin(np.arange(len(events)), offsets[1:] - 1)
        assert not is_cold[~is_last | (split != "test")].any()
    assert is_cold[is_last].mean() == written[1]["cold"] > 0.1


def test_nobody_meets_an_item_twice(drawn):
    _, events, offsets, state = drawn
    for k, (start, end) in enumerate(pairwise(offsets)):
        items = events["item_id"][start:end] - 1
        assert 10 <= len(items) == len(set(items.tolist())) <= 40
        assert set(np.flatnonzero(state.seen[k])) == set(items[:-1])


def test_events_follow_home_last_item_action_and_time(drawn):
    process, events, offsets, state = drawn
    clusters = process.clusters[events["item_id"] - 1]
    homes = np.repeat(state.homes, np.diff(offsets))
    is_first = np.isin(np.arange(len(events)), offsets[:-1])
    is_pause = np.diff(events["timestamp"], prepend=0) > 3600
    followers = process.successors[events["action_type"], clusters]
    at_home, follows = clusters == homes, clusters == np.roll(followers, 1)
    # Not the process's 0.9: the likelier items of a cluster run out.
    assert at_home[is_first | is_pause].mean() > 0.7
    assert at_home[~is_first & ~is_pause].mean() < 0.3
    for action in range(3):
        has_action = (np.roll(events["action_type"], 1) == action) & ~is_first
        assert follows[has_action & ~is_pause].mean() > 0.7
        assert follows[has_action & is_pause].mean() < 0.3


def test_features_tell_the_cluster_of_every_item(drawn, written):
    process = drawn[0]
    features = load_features(written[0], "item", NUM_ITEMS)
    first_tags = features["tags"].values[features["tags"].offsets[1:-1]]
    told = features["aisle"].values[1:] - 1 + synthetic.NUM_AISLES * (first_tags - 1)
    np.testing.assert_array_equal(told, process.clusters)


# ------------------------------------------------------------------------------------- the optimum


def draw_next(process, state, k: int, generator) -> int:
    """User k's test target, by the words of the script: draw until it is an item not yet met."""
    while True:
        if generator.random() < synthetic.NOISE:
            cluster = generator.integers(synthetic.NUM_CLUSTERS)
        elif state.is_pause[k]:
            cluster = state.homes[k]
        else:
            cluster = process.successors[state.actions[k], state.clusters[k]]
        is_cold = generator.random() < synthetic.COLD_TARGETS
        items = np.flatnonzero((process.clusters == cluster) & (process.is_cold == is_cold))
        weights = np.ones(len(items)) if is_cold else process.weights[items]
        item = generator.choice(items, p=weights / weights.sum())
        if not state.seen[k, item]:
            return int(item)


def test_the_optimum_knows_how_the_next_item_is_drawn(drawn):
    process, _, _, state = drawn
    pauses, others = np.flatnonzero(state.is_pause), np.flatnonzero(~state.is_pause)
    n = 2000
    chances = synthetic.item_probabilities(process, state, is_test=True)
    generator = np.random.default_rng(0)
    for k in [*pauses[:3], *others[:3]]:
        shares = np.bincount([draw_next(process, state, k, generator) for _ in range(n)]) / n
        best = np.argsort(-chances[k])[:10]
        tolerance = 4 * np.sqrt(0.25 / n)  # four standard errors at most
        assert abs(shares[best].sum() - chances[k, best].sum()) < tolerance
        assert np.abs(np.pad(shares, (0, NUM_ITEMS - len(shares))) - chances[k]).max() < tolerance


def test_the_optimum_on_the_targets_agrees_with_its_expectation(written):
    rates = written[1]["HR@10"]
    assert abs(rates["optimum"] - rates["optimum, expected"]) < 4 * np.sqrt(0.25 / NUM_USERS)


def test_a_hit_is_a_rank_within_ten_and_ties_count_against_it():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 12, (50, 23))
    targets = generator.integers(0, 23, 50)
    hits = [
        sum(other >= row[target] for other in row) <= 10
        for row, target in zip(scores.tolist(), targets, strict=True)
    ]
    assert 0 < np.mean(hits) < 1
    assert synthetic.hit_rate(scores, targets) == np.mean(hits)


@pytest.mark.parametrize("effect", synthetic.EFFECTS)
def test_without_an_effect_a_tenth_of_the_optimum_is_out_of_reach(written, effect):
    rates = written[1]["HR@10"]
    assert rates[f"blind to {effect}"] < 0.9 * rates["optimum"]


def test_popularity_reaches_less_than_a_quarter_of_the_optimum(written):
    rates = written[1]["HR@10"]
    assert 0 < rates["popularity"] < rates["optimum"] / 4

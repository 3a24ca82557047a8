"""TencentGR's files, with every trap of the real ones, to a data folder."""

from __future__ import annotations

import importlib
import json
import pickle
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import prepare_tencentgr as tencentgr
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import main
import tencentgr_source
from files.atomic_io import DataError, read_json
from files.data_folder import original_ids, read_manifest
from files.features import load_features
from files.item_vectors import load_vectors
from files.sequences import open_split

pytestmark = pytest.mark.slow

SAMPLE = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tencentgr-sample"
NUM_ITEMS, NUM_USERS = 17, 40
RAW = 20_000_000_000  # an item that training lacks keeps an id like this
CARDINALITIES = {"103": 9, "106": 5, "100": 6, "115": 7, "111": NUM_ITEMS, "104": 2}


def event(user, item, action, time, features=None):
    return [user, item, None, features or {"100": 1 + item % 6, "111": item}, action, time]


def profile(user, time=10**9, **features):
    return [user, None, features or {"103": 4, "106": [2, 5]}, None, None, time]


def write_source(folder: Path, lines: list, cardinalities: dict | None = None, **extra) -> Path:
    """A source of these lines; `extra` are further files, as text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seq.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = {str(i): {"100": 1 + i % 6, "111": i} for i in range(1, NUM_ITEMS + 1)}
    (folder / "item_feat_dict.json").write_text(json.dumps(items))
    indexer = {
        "u": {f"user_{7 * k}": k for k in range(1, NUM_USERS + 1)},
        "i": {RAW // 1000 + 3 * k: k for k in range(1, NUM_ITEMS + 1)},
        "f": {
            i: {f"{i}-{v}": v for v in range(1, n + 1)}
            for i, n in (cardinalities or CARDINALITIES).items()
        },
        "a": {1: 1, 0: 2},  # undocumented, as in the demo set
    }
    (folder / "indexer.pkl").write_bytes(pickle.dumps(indexer))
    for name, text in extra.items():
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def convert(tmp_path: Path, lines: list, **options) -> tuple[Path, dict]:
    data_dir = tmp_path / "data"
    source = write_source(tmp_path / "source", lines)
    return data_dir, tencentgr.convert(
        source, data_dir, num_workers=1, **{"overwrite": True} | options
    )


def sequences(data_dir: Path, split: str) -> dict[int, list[tuple[int, int, int]]]:
    """User -> its events."""
    events, offsets, users = open_split(data_dir, split)
    parts = np.split(events, offsets[1:-1])
    return {user: part.tolist() for user, part in zip(users.tolist(), parts, strict=True)}


def random_lines(seed: int, users: range | list) -> list:
    """A line per user, shuffled, of 1 to 12 events with times that are often equal."""
    rng = np.random.default_rng(seed)
    lines = []
    for user in rng.permutation(users).tolist():
        times = np.sort(rng.integers(1, 20, rng.integers(1, 13)))
        actions = rng.choice([0, 0, 0, 1, 2, None], len(times))
        items = rng.integers(1, NUM_ITEMS + 1, len(times))
        items[rng.random(len(items)) < 0.1] = RAW // 2
        columns = zip(items.tolist(), actions.tolist(), times.tolist(), strict=True)
        records = [event(user, *values) for values in columns]
        records.insert(int(rng.integers(len(records) + 1)), profile(user))
        lines.append(records)
    return lines


def data_bytes(data_dir: Path) -> dict[str, bytes]:
    files = [path for path in data_dir.rglob("*") if path.is_file()]
    return {path.relative_to(data_dir).as_posix(): path.read_bytes() for path in files}


# -------------------------------------------------------------------------------------- the traps


def test_a_profile_is_no_event_wherever_it_stands(tmp_path):
    lines = [[event(3, 5, 0, 10), profile(3, 11), event(3, 6, 1, 12)]]
    data_dir, counts = convert(tmp_path, lines, valid_users=0)
    assert sequences(data_dir, "test") == {3: [(5, 0, 10), (6, 1, 12)]}
    assert counts["seq: profiles before the last record"] == 1
    users = load_features(data_dir, "user", NUM_USERS)
    assert users["103"].values[3] == 4
    assert users["106"].values.tolist() == [2, 5]


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_items_whose_features_differ_between_lines_are_counted_and_shown(
    tmp_path, monkeypatch, capsys, block_bytes
):
    monkeypatch.setattr(tencentgr_source, "BLOCK_BYTES", block_bytes)
    lines = [[event(user, item, 0, item) for item in (5, 6, 9)] for user in (3, 4, 7)]
    convert(tmp_path, lines)
    assert "warning" not in capsys.readouterr().out
    lines[1][1] = event(4, 6, 0, 6, {"100": 2, "111": 6})
    lines[2][2] = event(7, 9, 0, 9, {"100": 3, "111": 9})
    convert(tmp_path, lines)
    found = "warning: 2 items have other features in some lines than in others, the first: item 6;"
    assert found in capsys.readouterr().out


def test_the_time_of_a_profile_is_not_used(tmp_path):
    contents = []
    for time in (0, 11, 10**12):
        lines = [[profile(3, time), event(3, 5, 0, 10), event(3, 6, 1, 12)]]
        contents.append(data_bytes(convert(tmp_path / str(time), lines)[0]))
    assert contents[0] == contents[1] == contents[2]


def test_an_event_without_an_action_has_action_minus_one_and_is_counted(tmp_path):
    lines = [[event(3, 5, None, 10), event(3, 6, 2, 12), event(3, 7, None, 13)]]
    data_dir, counts = convert(tmp_path, lines, valid_users=0)
    assert [action for _, action, _ in sequences(data_dir, "test")[3]] == [-1, 2, -1]
    assert counts["seq: events without an action type"] == 2


def test_the_line_number_is_not_the_user(tmp_path):
    lines = [[event(user, item, 0, 1), event(user, 1, 0, 2)] for user, item in ((9, 4), (2, 8))]
    data_dir, _ = convert(tmp_path, lines, valid_users=0)
    assert open_split(data_dir, "train")[2].tolist() == [9, 2]
    assert sequences(data_dir, "train") == {9: [(4, 0, 1)], 2: [(8, 0, 1)]}


def test_events_at_one_time_stay_in_the_order_of_the_file(tmp_path):
    items = [9, 3, 12, 1, 7, 5]
    lines = [[event(3, item, 0, 10 + (item == 12)) for item in items]]
    data_dir, counts = convert(tmp_path, lines, valid_users=0)
    assert [item for item, _, _ in sequences(data_dir, "test")[3]] == [9, 3, 1, 7, 5, 12]
    assert counts["seq: users out of the order of time, sorted"] == 1
    assert counts["seq: events at the time of the event before"] == 3


def test_events_of_unseen_items_are_left_out_and_counted(tmp_path):
    items = [RAW, 5, 6, RAW + 1, 7, NUM_ITEMS + 1]
    lines = [[event(3, item, 1, 10 + k) for k, item in enumerate(items)], [event(4, RAW, 1, 9)]]
    data_dir, counts = convert(tmp_path, lines, valid_users=0)
    assert sequences(data_dir, "test") == {3: [(5, 1, 11), (6, 1, 12), (7, 1, 14)]}
    assert counts["seq: events of items that indexer.pkl lacks, left out"] == 4
    assert counts["seq: users without an event of a known item, left out"] == 1


def test_text_values_of_features_are_0_and_counted(tmp_path):
    features = {"103": "1030000099", "106": [2, "1060000099", 3], "104": 2}
    data_dir, counts = convert(tmp_path, [[event(3, 5, 0, 1), profile(3, **features)]])
    users = load_features(data_dir, "user", NUM_USERS)
    assert users["103"].values[3] == 0
    assert users["104"].values[3] == 2
    assert users["106"].values.tolist() == [2, 0, 3]
    assert counts["seq: text values of features, read as 0"] == 2


def test_a_brace_in_an_items_text_does_not_matter(tmp_path):
    texts = ["}", '"}, 1, 2]', "null, {", "]]"]
    lines = [[event(3, 5 + k, 0, k, {"100": text, "101": 4}) for k, text in enumerate(texts)]]
    data_dir, _ = convert(tmp_path, lines, valid_users=0)
    assert sequences(data_dir, "test") == {3: [(5 + k, 0, k) for k in range(len(texts))]}


def test_users_on_two_lines_have_two_sequences_and_are_counted(tmp_path):
    lines = [[event(3, 5, 0, 1), event(3, 6, 0, 2)], [event(3, 7, 0, 3), event(3, 8, 0, 4)]]
    data_dir, counts = convert(tmp_path, lines)
    assert open_split(data_dir, "test")[2].tolist() == [3, 3]
    assert counts["seq: sequences of a user that has one already"] == 1


# ------------------------------------------------------------------------------------- features


def test_the_schema_comes_from_the_indexer_without_the_items_twin(tmp_path, capsys):
    data_dir, _ = convert(tmp_path, [[event(3, 5, 0, 1), profile(3)]])
    types = read_json(data_dir / "feature_types.json")
    assert types["user_sparse"] == ["103", "104"]
    assert types["user_array"] == ["106"]
    assert types["item_sparse"] == ["100", "115"]
    expected = {i: n for i, n in CARDINALITIES.items() if i != "111"}
    assert read_json(data_dir / "feat_statistics.json") == expected
    defaults = read_json(data_dir / "feature_default_value.json")
    assert defaults == {i: [] if i == "106" else 0 for i in expected}
    assert load_features(data_dir, "item", NUM_ITEMS)["100"].values[3] == 4
    assert "feature" not in capsys.readouterr().out


def test_unknown_features_are_typed_from_their_values_and_reported(tmp_path, capsys):
    source = write_source(
        tmp_path / "source",
        [[event(3, 5, 0, 1), profile(3, **{"103": 1, "age": 31.5, "tags": [1], "word": "x"})]],
        CARDINALITIES | {"tags": 4, "brand": 8, "lost": 3},
    )
    items = {"5": {"100": 2, "brand": 7, "price": 3, "parts": [1]}, "6": {"price": 2.5}}
    (source / "item_feat_dict.json").write_text(json.dumps(items))
    tencentgr.convert(source, tmp_path / "data")
    users = load_features(tmp_path / "data", "user", NUM_USERS)
    items = load_features(tmp_path / "data", "item", NUM_ITEMS)
    assert users["tags"].values.tolist() == [1]
    assert users["age"].values[3] == 31.5
    assert items["brand"].values[5] == 7
    assert items["price"].values[5:7].tolist() == [3, 2.5]
    assert capsys.readouterr().out.splitlines()[:7] == [
        "user feature age: not in the schema, taken as user_continual",
        "user feature tags: not in the schema, taken as user_array",
        "user feature word: left out, its values are text or not in indexer.pkl",
        "item feature brand: not in the schema, taken as item_sparse",
        "item feature parts: left out, its values are text or not in indexer.pkl",
        "item feature price: not in the schema, taken as item_continual",
        "feature lost of indexer.pkl: left out, no value seen",
    ]


def test_vectors_of_every_layout_are_found(tmp_path):
    source = write_source(tmp_path / "source", [[event(3, 5, 0, 1)]])
    folder = source / "creative_emb"
    (folder / "emb_82_4").mkdir(parents=True)
    (folder / "emb_83_3").mkdir()
    ids = [RAW // 1000 + 3 * k for k in (2, 5)]
    (folder / "81.pkl").write_bytes(pickle.dumps({i: np.ones(2, np.float32) for i in ids}))
    lines = [json.dumps({"anonymous_cid": str(i), "emb": [1.0] * 4}) + "\n" for i in ids]
    (folder / "emb_82_4" / "part-00000").write_text("".join(lines))
    (folder / "emb_82_4" / "_SUCCESS").write_text("")
    (folder / "emb_83_3" / "a.json").write_text(lines[0])
    tencentgr.convert(source, tmp_path / "data")
    assert read_json(tmp_path / "data" / "feature_types.json")["item_emb"] == ["81", "82", "83"]
    item_ids = pickle.loads((tmp_path / "data" / "indexer.pkl").read_bytes())["i"]
    vectors = load_vectors(tmp_path / "data", ["81", "82"], item_ids, NUM_ITEMS)
    for feature in vectors.values():
        assert np.flatnonzero(feature.present).tolist() == [2, 5]


# --------------------------------------------------------------------- splits, blocks and offsets


def slow_splits(lines, has_predictions):
    """User -> (train, known events without the test target), from the lines themselves."""
    histories = {}
    for records in lines:
        events = [
            (item, -1 if action is None else action, time)
            for _, item, _, _, action, time in records
            if item is not None and item <= NUM_ITEMS
        ]
        if events:
            histories[records[0][0]] = sorted(events, key=lambda e: e[2])
    train = {
        user: events if has_predictions or len(events) == 1 else events[:-1]
        for user, events in histories.items()
    }
    return histories, train


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("has_predictions", [False, True])
def test_the_splits_are_those_of_the_slow_version(tmp_path, monkeypatch, seed, has_predictions):
    monkeypatch.setattr(tencentgr_source, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(tencentgr, "CHUNK", 7)
    lines = random_lines(seed, range(1, NUM_USERS + 1))
    asked = random_lines(seed + 100, [4, 9, 16])
    source = write_source(tmp_path / "source", lines)
    if has_predictions:
        text = "".join(json.dumps(line) + "\n" for line in asked)
        (source / "predict_seq.jsonl").write_text(text)
    tencentgr.convert(source, tmp_path / "data", valid_users=3, seed=seed, num_workers=1)
    train, valid, test = (sequences(tmp_path / "data", s) for s in ("train", "valid", "test"))
    histories, expected = slow_splits(lines, has_predictions)
    assert len(valid) == 3
    for user, events in valid.items():
        shown = expected[user]
        clicks = [k for k, (_, action, _) in enumerate(shown) if action == 1]
        target = clicks[-1] if clicks else len(shown) - 1
        assert events == shown[: target + 1]
        assert len(events) >= 2
        expected[user] = shown[:target]
    assert train == expected
    if has_predictions:
        assert test == slow_splits(asked, True)[0]
    else:
        assert test == {user: e for user, e in histories.items() if len(e) > 1}
    targets = {"train": "next", "valid": "last", "test": "none" if has_predictions else "last"}
    assert read_manifest(tmp_path / "data").targets == targets


def test_the_seed_draws_the_users_of_validation(tmp_path):
    drawn = []
    for seed in (1, 1, 2):
        lines = random_lines(0, range(1, NUM_USERS + 1))
        data_dir, _ = convert(tmp_path / str(len(drawn)), lines, seed=seed)
        drawn.append(open_split(data_dir, "valid")[2].tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == len(slow_splits(lines, False)[0]) // 10


def test_a_click_that_is_the_tests_target_is_none_of_the_validation(tmp_path):
    lines = [[event(u, k, int(k in (2, 4)), k) for k in range(1, 5)] for u in range(1, 11)]
    data_dir, _ = convert(tmp_path, lines)
    assert [e[-1][0] for e in sequences(data_dir, "test").values()] == [4] * 10
    ((user, events),) = sequences(data_dir, "valid").items()
    assert events == [(1, 0, 1), (2, 1, 2)]
    assert sequences(data_dir, "train")[user] == [(1, 0, 1)]


def test_no_users_of_validation_is_no_such_split(tmp_path):
    data_dir, _ = convert(tmp_path, random_lines(0, range(1, NUM_USERS + 1)), valid_users=0)
    assert list(read_manifest(data_dir).targets) == ["train", "test"]


def test_two_processes_json_and_offsets_change_no_byte(tmp_path, monkeypatch):
    lines = random_lines(5, range(1, NUM_USERS + 1))
    source = write_source(tmp_path / "source", lines)
    tencentgr.convert(source, tmp_path / "a", num_workers=1)
    monkeypatch.setattr(tencentgr_source, "BLOCK_BYTES", 1000)
    starts = [0, *np.cumsum([len(json.dumps(line)) + 1 for line in lines]).tolist()[:-1]]
    (source / "seq_offsets.pkl").write_bytes(pickle.dumps(starts))
    tencentgr.convert(source, tmp_path / "b", num_workers=2)
    monkeypatch.setattr(tencentgr_source, "fast_loads", json.loads)
    tencentgr.convert(source, tmp_path / "c", num_workers=1)
    assert data_bytes(tmp_path / "a") == data_bytes(tmp_path / "b") == data_bytes(tmp_path / "c")


@pytest.mark.parametrize("block", [1, 50, 777, 10**6])
def test_no_line_is_lost_or_read_twice_at_the_edge_of_a_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tencentgr_source, "BLOCK_BYTES", block)
    path = tmp_path / "seq.jsonl"
    lines = [[event(user, user, 0, 1)] for user in range(1, 9)]
    path.write_text("\n\n" + "\n".join(map(json.dumps, lines)))  # blank lines, no last newline
    limits = tencentgr_source.Limits(NUM_USERS, NUM_ITEMS)
    blocks = list(tencentgr_source.line_blocks(path, limits, 1, False))
    assert [user for part in blocks for user in part.users] == list(range(1, 9))
    assert sum(part.num_lines for part in blocks) == 10


def test_a_conversion_replaces_all_of_the_one_before(tmp_path):
    source = write_source(tmp_path / "one", random_lines(0, range(1, 30)), predict_set=CANDIDATES)
    (source / "creative_emb").mkdir()
    (source / "creative_emb" / "81.pkl").write_bytes(pickle.dumps({20_000_003: [1.0, 2.0]}))
    tencentgr.convert(source, tmp_path / "data")
    other = write_source(tmp_path / "two", random_lines(1, range(1, 9)))
    tencentgr.convert(other, tmp_path / "data", valid_users=0, overwrite=True)
    tencentgr.convert(other, tmp_path / "fresh", valid_users=0)
    assert data_bytes(tmp_path / "data") == data_bytes(tmp_path / "fresh")
    assert (source / "creative_emb" / "81.pkl").exists()


def test_a_source_without_sequences_leaves_the_data_that_are_there(tmp_path):
    source = write_source(tmp_path / "source", random_lines(0, range(1, 9)))
    tencentgr.convert(source, tmp_path / "data")
    before = data_bytes(tmp_path / "data")
    (source / "seq.jsonl").rename(source / "seq.jsonl.gz")
    with pytest.raises(DataError, match=r"seq\.jsonl: no such file"):
        tencentgr.convert(source, tmp_path / "data", overwrite=True)
    assert data_bytes(tmp_path / "data") == before


def test_vectors_that_the_target_reaches_by_a_link_survive(tmp_path):
    source = write_source(tmp_path / "one", random_lines(0, range(1, 30)))
    (source / "creative_emb").mkdir()
    (source / "creative_emb" / "81.pkl").write_bytes(pickle.dumps({20_000_003: [1.0, 2.0]}))
    tencentgr.convert(source, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "creative_emb")
    (tmp_path / "data" / "creative_emb").symlink_to(source / "creative_emb")
    tencentgr.convert(source, tmp_path / "data", overwrite=True)
    assert (source / "creative_emb" / "81.pkl").exists()


# ---------------------------------------------------------------------------- the prediction side

CANDIDATES = "".join(
    json.dumps({"creative_id": creative, "retrieval_id": k, "features": features}) + "\n"
    for k, (creative, features) in enumerate(
        [
            (RAW // 1000 + 3 * 5, {"100": 6, "111": 5}),
            (RAW + 77, {"100": "1000000099", "115": 3}),
            (RAW // 1000 + 3 * 2, {"100": 3}),
        ]
    )
)


def test_a_prediction_folder_that_holds_none_is_refused(tmp_path):
    (tmp_path / "typo").mkdir()
    with pytest.raises(DataError, match="typo: --predict_dir has no predict_seq"):
        convert(tmp_path, random_lines(0, range(1, 9)), predict_dir=tmp_path / "typo")
    assert not (tmp_path / "data").exists()


def test_the_prediction_set_is_the_test_split_without_targets(tmp_path):
    asked = [
        [event("user_14", 5, 1, 3), profile("user_14", **{"103": 9}), event("user_14", RAW, 0, 4)],
        [event("stranger", 6, None, 7), profile("stranger", **{"103": "new"})],
    ]
    (tmp_path / "predict").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in asked)
    (tmp_path / "predict" / "predict_seq.jsonl").write_text(text)
    lines = random_lines(0, range(1, 30))
    data_dir, counts = convert(tmp_path, lines, predict_dir=tmp_path / "predict", valid_users=0)
    stranger = NUM_USERS + 1
    assert sequences(data_dir, "test") == {2: [(5, 1, 3)], stranger: [(6, -1, 7)]}
    assert sequences(data_dir, "train") == slow_splits(lines, True)[1]
    assert read_manifest(data_dir).num_users == stranger
    indexer = pickle.loads((data_dir / "indexer.pkl").read_bytes())
    assert indexer["u"]["stranger"] == stranger
    assert indexer["a"] == {1: 1, 0: 2}
    assert load_features(data_dir, "user", stranger)["103"].values[[2, stranger]].tolist() == [9, 0]
    assert counts["predict_seq: events of items that indexer.pkl lacks, left out"] == 1
    assert counts["users that indexer.pkl lacks, added"] == 1


def test_candidates_are_a_folder_of_items_of_their_own(tmp_path):
    source = write_source(tmp_path / "source", [[event(3, 5, 0, 1)]], predict_set=CANDIDATES)
    (source / "creative_emb").mkdir()
    vectors = {RAW + 77: [1.0, 2.0], RAW // 1000 + 6: [3.0, 4.0], 5: [5.0, 6.0]}
    (source / "creative_emb" / "81.pkl").write_bytes(pickle.dumps(vectors))
    counts = tencentgr.convert(source, tmp_path / "data")
    folder = tmp_path / "data" / "candidates"
    assert np.fromfile(folder / "retrieval_ids.bin", "<u8").tolist() == [0, 1, 2]
    assert np.fromfile(folder / "item_ids.bin", "<i4").tolist() == [5, 0, 2]
    originals = np.fromfile(folder / "original_ids.bin", "<u8").tolist()
    assert originals == [RAW // 1000 + 15, RAW + 77, RAW // 1000 + 6]
    features = load_features(folder, "item", 3)
    assert features["100"].values.tolist() == [0, 6, 0, 3]
    assert features["115"].values.tolist() == [0, 0, 3, 0]
    rows = {original: row for row, original in enumerate(originals, 1)}
    found = load_vectors(tmp_path / "data", ["81"], rows, 3)["81"]
    assert found.values.tolist() == [[0, 0], [0, 0], [1, 2], [3, 4]]
    assert counts["candidates: cold"] == 1
    assert counts["candidates: text values of features, read as 0"] == 1


def test_users_asked_for_without_a_known_item_are_named(tmp_path, capsys):
    asked = [[event("user_14", 5, 1, 3)], [event("lost", RAW, 0, 4)], [], [profile("user_21")]]
    text = "".join(json.dumps(line) + "\n" for line in asked)
    source = write_source(tmp_path / "source", random_lines(0, range(1, 9)), predict_seq=text)
    tencentgr.convert(source, tmp_path / "data")
    assert "2 users of predict_seq have no event" in (told := capsys.readouterr().out)
    assert "no recommendations: lost, user_21\n" in told


def test_what_a_conversion_left_is_gone_with_the_next(tmp_path):
    """Not only candidates: vectors that a corrected source no longer has, too."""
    bad = [[event(3, 5, 0, 1)], [["?"]]]
    source = write_source(tmp_path / "source", bad, predict_set=CANDIDATES)
    (source / "creative_emb").mkdir()
    (source / "creative_emb" / "81.pkl").write_bytes(pickle.dumps({5: [1.0]}))
    with pytest.raises(DataError, match="line 2"):
        tencentgr.convert(source, tmp_path / "data")
    with pytest.raises(DataError, match="its conversion did not finish"):
        read_manifest(tmp_path / "data")
    assert (tmp_path / "data" / "candidates" / "item_ids.bin").exists()
    (source / "predict_set.jsonl").unlink()
    write_source(source, [[event(3, 5, 0, 1)]])
    tencentgr.convert(source, tmp_path / "data")
    assert not any((tmp_path / "data" / "candidates").iterdir())
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert "creative_emb/81.pkl" in manifest["files"]


def test_two_sources_of_vectors_are_refused_before_anything_is_read(tmp_path):
    source = write_source(tmp_path / "source", [[event(3, 5, 0, 1)]])
    (source / "creative_emb" / "emb_81_2").mkdir(parents=True)
    (source / "creative_emb" / "emb_81_2.pkl").write_bytes(pickle.dumps({5: [1.0, 2.0]}))
    with pytest.raises(
        DataError, match=r"source/creative_emb/emb_81_2\.pkl: feature 81 has emb_81_2"
    ):
        tencentgr.convert(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    (source / "creative_emb" / "emb_81_2").rmdir()
    tencentgr.convert(source, tmp_path / "data")


def train_and_export(data_dir: Path, output: Path, *export: str) -> None:
    folders = [f"--data_dir={data_dir}", f"--output_dir={output}", f"--log_dir={output}/logs"]
    device = ["--device=cpu", "--num_workers=0"]
    small = ["--hidden_units=8", "--attention_dim=4", "--linear_dim=4", "--num_negatives=64"]
    assert main.main(["--num_epochs=1", *small, *folders, *device]) == 0
    infer = ["--inference_only", f"--state_dict_path={output}/model_epoch_1.pt", *export]
    assert main.main([*infer, *folders, *device]) == 0


def test_the_answer_is_candidates_by_retrieval_id_for_the_asked_users(tmp_path, capsys):
    """And what is printed says how to get it, and that its times are guessed."""
    asked = [[event(4, 5, 1, 3)], [profile("stranger"), event("stranger", 6, 0, 7)]]
    text = "".join(json.dumps(line) + "\n" for line in asked)
    lines = random_lines(0, range(1, 30))
    source = write_source(tmp_path / "source", lines, predict_seq=text, predict_set=CANDIDATES)
    tencentgr.convert(source, tmp_path / "data")
    train_and_export(tmp_path / "data", tmp_path, f"--candidates={tmp_path / 'data/candidates'}")
    told = capsys.readouterr().out
    assert f"--inference_only --candidates {tmp_path}/data/candidates --state_dict" in told
    assert "--time_bias request: the validation knows the times of its targets" in told
    assert "taken to come at a user's last event; --request_time says when" in told
    items = np.fromfile(tmp_path / "item_embeddings" / "embedding.fbin", "<f4", offset=8)
    assert_allclose((items.reshape(3, 8) ** 2).sum(1), 1, rtol=1e-5)
    ids = np.fromfile(tmp_path / "item_embeddings" / "id.u64bin", "<u8", offset=8)
    assert ids.tolist() == [0, 1, 2]
    top = np.fromfile(tmp_path / "user_embeddings" / "topk.u64bin", "<i8", offset=8)
    top = top.reshape(2, -1)  # who is asked of has seen candidate 0, the stranger none
    assert sorted(set(top[0].tolist()) - {-1}) == [1, 2]
    assert sorted(set(top[1].tolist()) - {-1}) == [0, 1, 2]


def test_the_documented_commands_end_in_an_answer_in_creative_ids(tmp_path, monkeypatch):
    asked = [[event(4, 5, 1, 3)], [profile("stranger"), event("stranger", 6, 0, 7)]]
    text = "".join(json.dumps(line) + "\n" for line in asked)
    lines = random_lines(0, range(1, 30))
    write_source(tmp_path / "TencentGR", lines, predict_seq=text, predict_set=CANDIDATES)
    docs = Path(main.__file__).parent / "docs" / "own_data.md"
    section = docs.read_text().split("## TencentGR")[1].split("\n## ")[0]
    commands, code = re.findall(r"```(?:python)?\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    for line in commands.splitlines():
        script, *arguments = shlex.split(line.replace("python ", "", 1))
        if script == "main.py":
            arguments += ["--device=cpu", "--num_workers=0", "--num_epochs=1"]
        assert importlib.import_module(Path(script).stem).main(arguments) == 0
    exec(code, scope := {})
    known, cold, other = RAW // 1000 + 15, RAW + 77, RAW // 1000 + 6
    assert set(scope["answer"]) == {"user_28", "stranger"}
    assert set(scope["answer"]["user_28"]) == {cold, other}  # the other one was seen
    assert set(scope["answer"]["stranger"]) == {known, cold, other}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"creative_id": 5}\n', "line 4, from byte .*KeyError 'retrieval_id'"),
        ('{"creative_id": -5, "retrieval_id": 3, "features": {}}\n', "line 4.*id -5, expected 0"),
        ('{"creative_id": 5, "retrieval_id": 1, "features": {}}\n', "retrieval id occurs twice"),
        ("{\n", "line 4"),
    ],
)
def test_a_bad_candidate_is_refused_by_name(tmp_path, text, message):
    text = CANDIDATES + text
    source = write_source(tmp_path / "source", [[event(3, 5, 0, 1)]], predict_set=text)
    with pytest.raises(DataError, match=message):
        tencentgr.convert(source, tmp_path / "data")


# --------------------------------------------------------------------------------------- bad input


def text_of(*records) -> str:
    return json.dumps(list(records))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[[3, 5, null, {}, 0, 1", "at character"),
        ("", None),
        ("[]", None),
        ('{"user": 3}', "not a list of records of six fields"),
        (text_of(event(3, 5, 0, 1)[:5]), "not a list of records of six fields"),
        (text_of(event(3, 5, 0, 1), event(4, 5, 0, 2)), "2 users, expected one"),
        (text_of(event(NUM_USERS + 1, 5, 0, 1)), f"user {NUM_USERS + 1}, expected 1..{NUM_USERS}"),
        (
            text_of(event(3, 5, 0, 1), event(3, 5, 7, 2)),
            "event 2 has action type 7, expected -1..2",
        ),
        (text_of(event(3, 0, 0, 1)), "event 1 has item 0"),
        (text_of(event(3, 2**70, 0, 1)), "event 1 has item 1180591620717411303424"),
        (text_of(event(3, "5", 0, 1, {"100": 1})), "event 1 has item '5'"),
        (text_of(event(3, 5, 0, None)), "event 1 has time None"),
        (text_of(event(3, 5, 0, 1.5)), "event 1 has time 1.5"),
        ("[[3, 5, null, {}, 0, NaN]]", "event 1 has time nan"),
        (text_of([3, None, [1, 2], None, None, 1]), "AttributeError"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_a_broken_line_is_refused_by_file_line_and_byte(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(tencentgr_source, "BLOCK_BYTES", 300)
    good = [json.dumps([event(user, user, 0, 1), event(user, 1, 0, 2)]) for user in range(1, 9)]
    source = write_source(tmp_path / "source", [])
    (source / "seq.jsonl").write_text("\n".join([*good, line, *good]))
    start = sum(map(len, good)) + len(good)
    if message is None:
        tencentgr.convert(source, tmp_path / "data", num_workers=1, overwrite=True)
        return
    with pytest.raises(DataError) as caught:
        tencentgr.convert(source, tmp_path / "data", num_workers=1, overwrite=True)
    assert f"seq.jsonl: line 9, from byte {start}: " in str(caught.value)
    assert message in str(caught.value)
    assert "is_unfinished" in (tmp_path / "data" / "manifest.json").read_text()


def test_a_broken_line_is_named_by_two_processes_as_by_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tencentgr_source, "BLOCK_BYTES", 300)
    source = write_source(tmp_path / "source", [[event(u, u, 0, 1)] for u in range(1, 15)])
    with open(source / "seq.jsonl", "a") as file:
        file.write("[[1, 2]]\n")
    assert tencentgr.main([str(source), str(tmp_path / "data"), "--num_workers=2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source / 'seq.jsonl'}: line 15, from byte ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: (s / "seq.jsonl").unlink(), "seq.jsonl: no such file"),
        (lambda s: (s / "indexer.pkl").unlink(), "indexer.pkl: cannot be read"),
        (lambda s: (s / "seq.jsonl").write_text(""), "no event of an item of indexer.pkl"),
        (lambda s: (s / "seq_offsets.pkl").write_bytes(pickle.dumps([0])), "does not list 2 lines"),
        (lambda s: (s / "seq_offsets.pkl").write_bytes(pickle.dumps(5)), "does not list 2 lines"),
        (
            lambda s: (s / "indexer.pkl").write_bytes(pickle.dumps({"u": {"a": 2}, "i": {1: 1}})),
            "the re-ids of 'u' are not 1..1",
        ),
        (
            lambda s: (s / "indexer.pkl").write_bytes(
                pickle.dumps({"u": {"a": 1}, "i": {5: 1}, "f": {"100": [1, 2]}})
            ),
            "its 'f' is not",
        ),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, change, message):
    lines = [[event(3, 5, 0, 1), event(3, 6, 0, 2)], [event(4, 5, 0, 1)]]
    source = write_source(tmp_path / "source", lines)
    change(source)
    with pytest.raises(DataError, match=message):
        tencentgr.convert(source, tmp_path / "data", num_workers=1, overwrite=True)


def test_a_file_in_the_way_of_the_folder_is_one_line(tmp_path, capsys):
    source = write_source(tmp_path / "source", [[event(3, 5, 0, 1)]])
    (tmp_path / "taken").touch()
    assert tencentgr.main([str(source), str(tmp_path / "taken")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path / "taken") in error
    assert error.count("\n") == 1


def test_random_damage_is_converted_or_refused_by_name_and_nothing_else(tmp_path):
    draw = random.Random(7)
    text = "".join(json.dumps(line) + "\n" for line in random_lines(9, [3, 5]))
    files = {"predict_seq": text, "predict_set": CANDIDATES}
    for _ in range(60):
        source = write_source(tmp_path / "source", random_lines(0, range(1, 9)), **files)
        path = draw.choice(sorted(source.iterdir()))
        content = bytearray(path.read_bytes())
        at = draw.randrange(len(content))
        content[at : at + draw.choice([0, 1, 30, len(content)])] = draw.randbytes(
            draw.choice([0, 1])
        )
        path.write_bytes(content)
        try:
            tencentgr.convert(source, tmp_path / "data", num_workers=1, overwrite=True)
        except DataError as error:
            assert path.name in str(error) or "twice among the candidates" in str(error)


def test_the_source_is_not_written_into(tmp_path):
    source = write_source(tmp_path / "source", [[event(3, 5, 0, 1)]])
    before = data_bytes(source)
    with pytest.raises(DataError, match="is the source"):
        tencentgr.convert(source, tmp_path / "link" / ".." / "source")
    assert data_bytes(source) == before


# ------------------------------------------------------------------------------------ real sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[Path, dict]:
    if not SAMPLE.exists():
        pytest.skip(f"{SAMPLE} is not here")
    data_dir = tmp_path_factory.mktemp("sample") / "data"
    return data_dir, tencentgr.convert(SAMPLE, data_dir)


def test_the_six_real_users_are_converted(sample):
    data_dir, counts = sample
    assert counts["seq: events"] == 530
    assert counts["seq: events without an action type"] == 3
    assert counts["seq: profiles before the last record"] == 1
    manifest = read_manifest(data_dir)
    assert (manifest.num_items, manifest.num_users) == (58_734, 865)
    expected = {}
    for line in (SAMPLE / "seq.jsonl").read_text().splitlines():
        records = [record for record in json.loads(line) if record[1] is not None]
        columns = [(i, -1 if a is None else a, t) for _, i, _, _, a, t in records]
        expected[records[0][0]] = columns
    assert sequences(data_dir, "test") == expected
    names = original_ids(data_dir, "i", manifest.num_items)
    assert names.dtype == np.uint64
    assert load_features(data_dir, "item", manifest.num_items)["100"].values[47086] == 6


def test_the_six_real_users_are_trained_on_and_exported(sample, tmp_path):
    train_and_export(sample[0], tmp_path)
    header = np.fromfile(tmp_path / "item_embeddings" / "embedding.fbin", "<u4", 2)
    assert header.tolist() == [58_734, 8]


# -------------------------------------------------------------------------------- Parquet release


def test_without_duckdb_the_parquet_release_says_what_to_install(tmp_path, monkeypatch):
    source = write_source(tmp_path / "source", [])
    (source / "seq").mkdir()
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(DataError, match=r"pip install -r requirements-data\.txt"):
        tencentgr.convert(source, tmp_path / "data")


def write_parquet(path: Path, rows: list[dict]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the Parquet release needs pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True)
    columns = {name: [row.get(name) for row in rows] for name in {n: 0 for r in rows for n in r}}
    parquet.write_table(pyarrow.table(columns), path)


def parquet_source(folder: Path, lines: list, cold: str) -> Path:
    """The Parquet release of what `write_source` writes, with candidates."""
    write_source(folder, lines)
    (folder / "seq.jsonl").unlink()
    items = json.loads((folder / "item_feat_dict.json").read_text())
    (folder / "item_feat_dict.json").unlink()
    rows = [
        {
            "user_id": records[0][0],
            "seq": [
                {"item_id": item, "action_type": action, "timestamp": time}
                for _, item, _, _, action, time in records
                if item is not None
            ],
        }
        for records in lines
    ]
    write_parquet(folder / "seq" / "part-0.parquet", rows)
    profiles = [
        {"user_id": user, "108": None, **features}
        for records in lines
        for user, _, features, *_ in records
        if features
    ]
    write_parquet(folder / "user_feat" / "part-0.parquet", profiles)
    rows = [{"item_id": int(i), "115": None, **features} for i, features in items.items()]
    write_parquet(folder / "item_feat" / "part-0.parquet", rows)
    rows = [
        {
            "retrieval_id": record["retrieval_id"],
            "item_id": record["creative_id"],
            **{
                i: {"feature_value": int(v), cold: isinstance(v, str)}
                for i, v in record["features"].items()
            },
        }
        for record in map(json.loads, CANDIDATES.splitlines())
    ]
    write_parquet(folder / "candidate" / "part-0.parquet", rows)
    vectors = [{"anonymous_cid": str(RAW // 1000 + 6), "emb": [1.0, 2.0]}]
    write_parquet(folder / "mm_emb" / "emb_81_2_parquet" / "part-0.parquet", vectors)
    return folder


@pytest.mark.parametrize("cold", ["is_str", "cold_start"])
def test_the_parquet_release_gives_the_same_data_as_the_json_lines(tmp_path, monkeypatch, cold):
    monkeypatch.setattr(tencentgr_source, "BLOCK_ROWS", 7)
    lines = random_lines(3, range(1, NUM_USERS + 1))
    parquet = parquet_source(tmp_path / "parquet", lines, cold)
    tencentgr.convert(parquet, tmp_path / "a")
    source = write_source(tmp_path / "source", lines, predict_set=CANDIDATES)
    tencentgr.convert(source, tmp_path / "b")
    a, b = data_bytes(tmp_path / "a"), data_bytes(tmp_path / "b")
    differing = {"item_feat_dict.json", "feature_types.json", "manifest.json"}
    differing |= {"candidates/feature_types.json"}
    assert {name: a[name] for name in b if name not in differing} == {
        name: content for name, content in b.items() if name not in differing
    }
    for folder, count in ((".", NUM_ITEMS), ("candidates", 3)):
        one, two = (load_features(tmp_path / d / folder, "item", count) for d in "ab")
        assert list(one) == list(two)
        for i in one:
            assert_array_equal(one[i].values, two[i].values)
    item_ids = pickle.loads(a["indexer.pkl"])["i"]
    vectors = load_vectors(tmp_path / "a", ["81"], item_ids, NUM_ITEMS)["81"]
    assert np.flatnonzero(vectors.present).tolist() == [2]


def test_a_bad_parquet_file_is_refused_by_name(tmp_path):
    source = parquet_source(tmp_path / "source", random_lines(3, range(1, 9)), "is_str")
    path = source / "seq" / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"part-0\.parquet"):
        tencentgr.convert(source, tmp_path / "data")
    path.unlink()
    path.parent.rmdir()
    write_parquet(path, [{"user_id": 3, "seq": [{"item_id": 2, "time": 4}]}])
    with pytest.raises(DataError, match=r"part-0\.parquet.*action_type.*expected user_id and seq"):
        tencentgr.convert(source, tmp_path / "data")

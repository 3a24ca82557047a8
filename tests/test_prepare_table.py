"""Tables of events to data folders: what is read, split, typed and refused."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import duckdb
import numpy as np
import prepare_table
import pytest
from settings import DATA

import table_log
from dataset import MyDataset
from files.atomic_io import read_json
from files.data_folder import read_indexer, read_manifest
from files.features import load_features
from files.item_vectors import load_vectors
from files.sequences import open_split

pytestmark = pytest.mark.slow

START = 1_700_000_000
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def random_log(num_events: int = 150, seed: int = 5) -> list[dict]:
    """Events of 11 users and 17 items with text ids, in no order, times often equal."""
    rng = np.random.default_rng(seed)
    return [
        {
            "user": f"u{rng.integers(11) ** 2 // 11}",
            "item": f"i{rng.integers(17)}",
            "timestamp": START + int(rng.integers(40)) * 1000,
            "kind": str(rng.choice(["view", "cart", "buy", ""])),
        }
        for _ in range(num_events)
    ]


def write_table(path: Path, rows: list[dict]) -> Path:
    """The rows as the path's suffix says."""
    if path.suffix == ".parquet":
        lines = path.with_suffix(".rows.jsonl")
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_parquet(path, f"SELECT * FROM '{lines}'")
        lines.unlink()
        return path
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if ".json" in path.name:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if ".tsv" in path.name else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def write_parquet(path: Path, query: str, values: Sequence = ()) -> Path:
    duckdb.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE 2048)", values)
    return path


def run(tmp_path: Path, rows: list[dict], *flags: str, name: str = "log.csv") -> Path:
    """The folder that the command writes of the rows."""
    data_dir = tmp_path / "data"
    path = write_table(tmp_path / name, rows)
    assert prepare_table.main([str(path), str(data_dir), "--overwrite", *map(str, flags)]) == 0
    return data_dir


def read_back(data_dir: Path, split: str) -> dict[str, list[tuple]]:
    """User id -> (item id, action type, time) of each event."""
    events, offsets, users = open_split(data_dir, split)
    indexer = read_indexer(data_dir)
    item_of, user_of = ({k: i for i, k in indexer[side].items()} for side in "iu")
    rows = [(item_of[i], a, t) for i, a, t in events.tolist()]
    spans = zip(users.tolist(), offsets[:-1], offsets[1:], strict=True)
    return {user_of[user]: rows[start:end] for user, start, end in spans}


def histories(rows: list[dict]) -> dict[str, list[dict]]:
    """Each user's rows in order of time, equal times as they come."""
    users = {row["user"]: [] for row in rows}
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        users[row["user"]].append(row)
    return users


def items(rows: list) -> list:
    return [row["item"] if isinstance(row, dict) else row[0] for row in rows]


# ------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize(
    "name", ["log.csv.gz", "log.tsv", "log.jsonl", "log.json.gz", "log.parquet", "log.txt"]
)
def test_every_format_gives_the_same_folder(tmp_path, name):
    rows = random_log()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = run(tmp_path / "a", rows, "--action", "kind")
    other = run(tmp_path / "b", rows, "--action", "kind", name=name)
    assert read_json(plain / "manifest.json") == read_json(other / "manifest.json")


def test_text_ids_are_numbered_in_their_order(tmp_path):
    indexer = read_indexer(run(tmp_path, random_log()))
    assert list(indexer["i"]) == sorted(indexer["i"])
    assert list(indexer["i"].values()) == list(range(1, len(indexer["i"]) + 1))


def test_ids_that_are_all_whole_numbers_are_kept_as_numbers(tmp_path):
    rows = [row | {"item": row["item"][1:]} for row in random_log()]
    indexer = read_indexer(run(tmp_path, rows))
    assert list(indexer["i"]) == sorted({int(row["item"]) for row in rows})


def test_columns_may_have_any_name_and_be_in_any_order(tmp_path):
    rows = [{"at": r["timestamp"], "who": r["user"], "what": r["item"]} for r in random_log()]
    data_dir = run(tmp_path, rows, "--user", "who", "--item", "what", "--time", "at")
    assert {u: items(v) for u, v in read_back(data_dir, "test").items()} == {
        u: items(v) for u, v in histories(random_log()).items() if len(v) > 2
    }


def test_a_csv_file_without_a_header_takes_one_from_the_flag(tmp_path):
    path = write_table(tmp_path / "log.csv", random_log())
    path.write_text(path.read_text().split("\n", 1)[1])
    data_dir = tmp_path / "data"
    flags = ["--header", "user", "item", "timestamp", "kind"]
    assert prepare_table.main([str(path), str(data_dir), *flags]) == 0
    assert sum(map(len, read_back(data_dir, "test").values())) == 150


def test_a_log_without_times_keeps_the_order_of_the_file(tmp_path):
    rows = random_log()
    found = read_back(run(tmp_path, rows, "--time", "none"), "test")
    for user, events in found.items():
        assert items(events) == [row["item"] for row in rows if row["user"] == user]
        assert {time for _, _, time in events} == {0}


def test_a_log_larger_than_a_piece_in_memory_gives_the_same_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a", random_log(), "--action", "kind")
    monkeypatch.setattr(table_log, "CHUNK", 7)
    monkeypatch.setattr(prepare_table, "CHUNK", 11)
    parts = run(tmp_path / "b", random_log(), "--action", "kind")
    assert read_json(whole / "manifest.json") == read_json(parts / "manifest.json")


# --------------------------------------------------------------------------------- times and order


def utc(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


@pytest.mark.parametrize(
    ("written", "unit"),
    [
        (lambda t: t, "seconds"),
        (lambda t: t * 1000 + 7, "milliseconds"),
        (lambda t: t * 1_000_000 + 7, "microseconds"),
        (lambda t: t * 1_000_000_000 + 7, "nanoseconds"),
        (lambda t: utc(t).isoformat(), "ISO dates"),
        (lambda t: f"{utc(t):%Y-%m-%d %H:%M:%S}", "ISO dates"),
        (lambda t: f"{utc(t):%Y-%m-%d %H:%M:%S UTC}", "ISO dates"),
        (lambda t: f"{utc(t):%Y-%m-%dT%H:%M:%S.250Z}", "ISO dates"),
        (lambda t: f"{utc(t + 3600):%Y-%m-%dT%H:%M:%S+01:00}", "ISO dates"),
        (lambda t: f"{utc(t):%m/%d/%Y %I:%M:%S %p}", "%m/%d/%Y %I:%M:%S %p"),
        (lambda t: f"{utc(t):%a %b %d %H:%M:%S +0000 %Y}", "%a %b %d %H:%M:%S %z %Y"),
        (lambda t: f"{utc(t):%d.%m.%Y %H:%M:%S}", "%d.%m.%Y %H:%M:%S"),
        (lambda t: f"{utc(t):%Y/%m/%d %H:%M:%S}", "ISO dates"),
        (lambda t: f"{utc(t):%Y%m%d_%H%M%S}", "%Y%m%d_%H%M%S"),
    ],
)
def test_times_end_as_unix_seconds_and_the_unit_is_printed(tmp_path, capsys, written, unit):
    rows = random_log()
    shown = [row | {"timestamp": written(row["timestamp"])} for row in rows]
    found = read_back(run(tmp_path, shown), "test")
    assert f"timestamp in {unit}, 2023-11-14T" in capsys.readouterr().out
    for user, events in found.items():
        assert [t for *_, t in events] == [row["timestamp"] for row in histories(rows)[user]]


def test_milliseconds_decide_the_order_within_a_second(tmp_path):
    rows = [
        {"user": "a", "item": item, "timestamp": START * 1000 + late}
        for item, late in (("x", 900), ("y", 100), ("z", 500), ("w", 300))
    ]
    assert items(read_back(run(tmp_path, rows), "test")["a"]) == ["y", "w", "z", "x"]


def test_equal_times_keep_the_order_of_the_file(tmp_path):
    found = read_back(run(tmp_path, random_log()), "test")
    for user, events in found.items():
        assert items(events) == items(histories(random_log())[user])


def test_the_order_column_decides_among_equal_times_only(tmp_path):
    rng = np.random.default_rng(1)
    rows = [row | {"place": float(rng.random())} for row in random_log()]
    found = read_back(run(tmp_path, rows, "--order", "place"), "test")
    rows.sort(key=lambda row: row["place"])
    for user, events in found.items():
        assert items(events) == items(histories(rows)[user])


# ------------------------------------------------------------------------------------- the actions


def test_the_values_of_one_action_column_are_the_types(tmp_path):
    rows = random_log()
    data_dir = run(tmp_path, rows, "--action", "kind")
    type_of = {"buy": 0, "cart": 1, "view": 2, "": -1}
    for user, events in read_back(data_dir, "test").items():
        assert [a for _, a, _ in events] == [type_of[r["kind"]] for r in histories(rows)[user]]
    manifest = read_manifest(data_dir)
    assert (manifest.num_action_types, manifest.action_names) == (3, ["buy", "cart", "view"])


def test_types_that_are_numbers_count_in_their_order(tmp_path):
    rows = [row | {"kind": [10, 9, 0.5][k % 3]} for k, row in enumerate(random_log())]
    data_dir = run(tmp_path, rows, "--action", "kind")
    found = Counter(a for v in read_back(data_dir, "test").values() for _, a, _ in v)
    type_of = {0.5: 0, 9: 1, 10: 2}
    assert found == Counter(type_of[r["kind"]] for v in histories(rows).values() for r in v)


@pytest.mark.parametrize(("yes", "no"), [(1, 0), ("true", "False"), ("2.5", ""), (True, False)])
def test_of_several_action_columns_the_first_that_is_set_counts(tmp_path, yes, no):
    rng = np.random.default_rng(2)
    names = ["bought", "liked", "clicked"]
    rows = [row | {n: yes if rng.random() < 0.4 else no for n in names} for row in random_log()]
    data_dir = run(tmp_path, rows, "--action", *names, name="log.jsonl")
    expected = [next((3 - k for k, n in enumerate(names) if row[n] == yes), 0) for row in rows]
    rows = [row | {"type": t} for row, t in zip(rows, expected, strict=True)]
    for user, events in read_back(data_dir, "test").items():
        assert [a for _, a, _ in events] == [row["type"] for row in histories(rows)[user]]
    assert set(expected) == {0, 1, 2, 3}
    manifest = read_manifest(data_dir)
    assert manifest.num_action_types == 4
    assert manifest.action_names == ["none", "clicked", "liked", "bought"]


def test_without_an_action_column_the_types_are_unknown(tmp_path):
    data_dir = run(tmp_path, random_log())
    assert read_manifest(data_dir).num_action_types == 0
    assert {a for v in read_back(data_dir, "test").values() for _, a, _ in v} == {-1}


# ------------------------------------------------------------------------------- filters and splits


@pytest.mark.parametrize(("min_user", "min_item"), [(1, 9), (12, 1), (10, 7)])
def test_minimum_counts_hold_for_what_is_left(tmp_path, capsys, min_user, min_item):
    rows = kept = random_log()
    while True:
        users, things = (Counter(row[c] for row in kept) for c in ("user", "item"))
        left = [
            row
            for row in kept
            if users[row["user"]] >= min_user and things[row["item"]] >= min_item
        ]
        if len(left) == len(kept):
            break
        kept = left
    data_dir = run(tmp_path, rows, "--min_user_events", min_user, "--min_item_events", min_item)
    assert 0 < len(kept) < len(rows)
    assert f"150 events; dropped {len(rows) - len(kept)}," in capsys.readouterr().out
    assert set(read_indexer(data_dir)["i"]) == {row["item"] for row in kept}
    for user, events in read_back(data_dir, "test").items():
        assert items(events) == items(histories(kept)[user])


def test_leave_one_out_holds_out_the_last_two_of_users_with_three(tmp_path):
    data_dir = run(tmp_path, random_log(30))
    whole = {user: items(rows) for user, rows in histories(random_log(30)).items()}
    assert min(map(len, whole.values())) < 3
    found = {s: {u: items(v) for u, v in read_back(data_dir, s).items()} for s in ("train", "test")}
    valid = {u: items(v) for u, v in read_back(data_dir, "valid").items()}
    assert found["train"] == {u: v[:-2] if len(v) > 2 else v for u, v in whole.items()}
    assert valid == {u: v[:-1] for u, v in whole.items() if len(v) > 2}
    assert found["test"] == {u: v for u, v in whole.items() if len(v) > 2}


@pytest.mark.parametrize(
    ("cuts", "first", "second"),
    [
        ((START + 20_000, START + 33_000), START + 20_000, START + 33_000),
        (("2023-11-15T03:00:00", "2023-11-15 07:00"), 1_700_017_200, 1_700_031_600),
        ((0.5, 0.75), None, None),
    ],
)
def test_by_time_each_split_predicts_the_last_event_of_its_time(tmp_path, cuts, first, second):
    rows = random_log()
    rows += [rows[0] | {"user": f"once-{k}", "timestamp": START + k} for k in range(0, 40_000, 99)]
    times = [row["timestamp"] for row in rows]
    first, second = first or np.quantile(times, 0.5), second or np.quantile(times, 0.75)
    data_dir = run(tmp_path, rows, "--split", "time", "--cuts", *cuts)
    expected = {"train": {}, "valid": {}, "test": {}}
    for user, own in histories(rows).items():
        old = [row for row in own if row["timestamp"] < first]
        until_test = [row for row in own if row["timestamp"] < second]
        if old:
            expected["train"][user] = items(old)
        if len(until_test) > len(old) and len(until_test) > 1:
            expected["valid"][user] = items(until_test)
        if len(own) > len(until_test) and len(own) > 1:
            expected["test"][user] = items(own)
    for split, users in expected.items():
        assert {u: items(v) for u, v in read_back(data_dir, split).items()} == users
    assert read_manifest(data_dir).targets == {"train": "next", "valid": "last", "test": "last"}


def test_by_user_a_share_of_the_users_is_held_out_whole(tmp_path):
    rows = [row | {"user": f"u{k % 40}"} for k, row in enumerate(random_log(200))]
    rows += [{"user": "single", "item": "i1", "timestamp": START, "kind": ""}]
    data_dir = run(tmp_path, rows, "--split", "user", "--held_out", 0.2)
    found = {split: read_back(data_dir, split) for split in ("train", "valid", "test")}
    assert [len(users) for users in found.values()] == [25, 8, 8]
    merged = found["train"] | found["valid"] | found["test"]
    assert {u: items(v) for u, v in merged.items()} == {
        u: items(v) for u, v in histories(rows).items()
    }
    assert "single" in found["train"]


def test_the_seed_decides_who_is_held_out(tmp_path):
    rows = [row | {"user": f"u{k % 40}"} for k, row in enumerate(random_log(200))]
    valid = [
        set(read_back(run(tmp_path, rows, "--split", "user", "--seed", seed), "valid"))
        for seed in (1, 1, 2)
    ]
    assert valid[0] == valid[1] != valid[2]


# ------------------------------------------------------------------------------------ the features

ITEM_COLUMNS = {  # column -> the value of the k-th item; 17 items
    "copy": lambda k: 900 + k,
    "constant": lambda k: "same",
    "brand": lambda k: ["acme", "best", "", "core"][k % 4],
    "brand_code": lambda k: ["7.0", "3.0", "", "12.0"][k % 4],
    "year": lambda k: 1990 + k % 6,
    "price": lambda k: "" if k == 2 else 10.5 + k % 7,
    "views": lambda k: 0.5 + 10.0**k,
    "genres": lambda k: ["a|b", "b|c", "c", "a|c", ""][k % 5],
    "codes": lambda k: ["11 2", "2", "3 11", "3 2"][k // 5],
    "range": lambda k: ["(0,10]", "(10,50]", "50+"][k % 3],
    "mood": lambda k: ["deep red", "deep", "red"][k // 6],
    "title": lambda k: f"a title, the {k}th",
}
EXPECTED_ROLES = {
    "copy": "drop", "constant": "drop", "brand": "sparse", "brand_code": "drop", "year": "sparse",
    "price": "continual", "views": "continual", "genres": "array", "codes": "array",
    "range": "sparse", "mood": "sparse", "title": "drop",
}  # fmt: skip


def item_rows(count: int = 17) -> list[dict]:
    rows = [{"id": f"i{k}"} | {n: of(k) for n, of in ITEM_COLUMNS.items()} for k in range(count)]
    return [{"id": "i99"} | rows[0] | {"id": "unseen"}, *reversed(rows)]


def run_with_items(tmp_path: Path, *flags: str, rows: list[dict] | None = None) -> Path:
    table = write_table(tmp_path / "items.csv", rows or item_rows())
    return run(tmp_path, random_log(), "--item_features", table, *flags)


def test_the_manifest_tells_apart_features_whose_numbers_mean_something_else(tmp_path):
    def digests(week: str, **changed) -> dict[str, str]:
        (tmp_path / week).mkdir()
        rows = [
            row | ({"id": row["id"]} | changed if row["id"] == "i4" else {}) for row in item_rows()
        ]
        return read_manifest(run_with_items(tmp_path / week, rows=rows)).feature_digests

    first = digests("first")
    assert first.keys() == {name for name, role in EXPECTED_ROLES.items() if role != "drop"}
    assert digests("same", price=7.5, genres="c") == first
    changed = {"brand": "zinc", "genres": "a|d", "price": 1e6}
    other = digests("other", **changed)
    assert {name for name in first if first[name] != other[name]} == changed.keys()


def values_of(data_dir: Path, name: str) -> dict:
    """Item id -> what item_feat_dict.json has for it."""
    records = read_json(data_dir / "item_feat_dict.json")
    return {i: records[str(k)].get(name) for i, k in read_indexer(data_dir)["i"].items()}


def test_roles_are_inferred_and_shown(tmp_path, capsys):
    data_dir = run_with_items(tmp_path)
    lines = [line.split()[1:3] for line in capsys.readouterr().out.splitlines() if "  item" in line]
    assert dict(lines) == EXPECTED_ROLES
    types = read_json(data_dir / "feature_types.json")
    found = {name: key[5:] for key, names in types.items() for name in names}
    assert found == {name: role for name, role in EXPECTED_ROLES.items() if role != "drop"}


def test_values_count_up_in_order_and_a_missing_one_is_unknown(tmp_path):
    data_dir = run_with_items(tmp_path)
    for name, code_of in (("brand", {"": 0, "acme": 1, "best": 2, "core": 3}),
                          ("year", {1990 + k: k + 1 for k in range(6)})):  # fmt: skip
        expected = {f"i{k}": code_of[ITEM_COLUMNS[name](k)] for k in range(17)}
        assert values_of(data_dir, name) == expected
    assert read_json(data_dir / "feat_statistics.json")["brand"] == 3


def test_lists_are_split_and_blanks_separate_whole_numbers_only(tmp_path):
    data_dir = run_with_items(tmp_path)
    genres, codes = values_of(data_dir, "genres"), values_of(data_dir, "codes")
    assert [genres[f"i{k}"] for k in range(5)] == [[1, 2], [2, 3], [3], [1, 3], []]
    assert [codes[f"i{k}"] for k in range(0, 17, 5)] == [[3, 1], [1], [2, 3], [2, 1]]


def test_a_missing_number_is_the_median_and_skewed_ones_become_logarithms(tmp_path):
    data_dir = run_with_items(tmp_path)
    known = [ITEM_COLUMNS["price"](k) for k in range(17) if k != 2]
    assert values_of(data_dir, "price")["i2"] == np.median(known)
    assert values_of(data_dir, "price")["i3"] == 13.5
    assert values_of(data_dir, "views")["i4"] == pytest.approx(np.log1p(10_000.5))


def test_flags_override_the_roles(tmp_path):
    flags = ["--sparse", "title", "--array", "range", "--continual", "year", "--drop", "*"]
    data_dir = run_with_items(tmp_path, *flags)
    types = read_json(data_dir / "feature_types.json")
    assert types["item_sparse"] == ["title"]
    assert types["item_array"] == ["range"]
    assert types["item_continual"] == ["year"]
    assert values_of(data_dir, "year")["i2"] == 1992
    assert values_of(data_dir, "range")["i1"] == [2, 5]  # of "(0" "(10" "10]" "50+" "50]"


def test_an_id_without_a_row_is_unknown_and_the_last_row_of_an_id_counts(tmp_path, capsys):
    rows = item_rows(16)
    rows.append(rows[1] | {"brand": "acme"})
    data_dir = run_with_items(tmp_path, rows=rows)
    assert "16 of 17 ids are in column id; dropped 2 rows" in capsys.readouterr().out
    assert values_of(data_dir, "brand")["i16"] == 0
    assert values_of(data_dir, "brand")["i15"] == 1


def test_the_key_is_named_or_called_as_in_the_events_or_the_first_column(tmp_path):
    rows = [{"nr": k} | row for k, row in enumerate(item_rows())]
    named = run_with_items(tmp_path, "--item_key", "id", rows=rows)
    expected = values_of(named, "brand")
    rows = [row | {"item": row["id"]} for row in rows]
    assert values_of(run_with_items(tmp_path, rows=rows), "brand") == expected


def test_a_name_that_items_and_users_share_gets_a_prefix(tmp_path):
    users = [
        {
            "user": f"u{k}",
            "user_year": k % 2,
            "year": k % 3,
            "tags": [["a"], ["a", "b", None], []][k // 4],
        }
        for k in range(11)
    ]
    table = write_table(tmp_path / "users.jsonl", users)
    data_dir = run_with_items(tmp_path, "--user_features", table)
    types = read_json(data_dir / "feature_types.json")
    assert types["user_sparse"] == ["user_year", "user_user_year"]
    statistics = read_json(data_dir / "feat_statistics.json")
    assert [statistics[name] for name in ("user_year", "user_user_year", "tags")] == [2, 3, 2]
    assert types["user_array"] == ["tags"]


def test_names_are_written_by_re_id(tmp_path):
    data_dir = run_with_items(tmp_path, "--item_names", "title")
    lines = (data_dir / "item_names.txt").read_text().splitlines()
    order = read_indexer(data_dir)["i"]
    assert lines == [f"a title, the {i[1:]}th" for i in order]


@pytest.mark.parametrize("name", ["vectors.npz", "columns.npz", "vectors.parquet"])
def test_vectors_find_their_items(tmp_path, monkeypatch, name):
    monkeypatch.setattr("table_vectors.ROWS", 4)
    monkeypatch.setattr("files.data_writer.VECTOR_ROWS", 3)
    rng = np.random.default_rng(3)
    ids, matrix = [f"i{k}" for k in range(3, 20)], rng.normal(size=(17, 5)).astype(np.float16)
    path = tmp_path / name
    if name.endswith("npz"):
        saved = np.asfortranarray(matrix) if name == "columns.npz" else matrix
        np.savez_compressed(path, item=np.array(ids), emb=saved)
    else:
        rows = zip(matrix.astype(float).tolist(), ids, strict=True)
        write_table(path, [{"vector": v, "id": i} for v, i in rows])
    data_dir = run(tmp_path, random_log(), "--item_vectors", path)
    assert np.load(data_dir / "creative_emb" / "emb_81_5.npy").dtype == np.float32
    index = read_indexer(data_dir)["i"]
    feature = load_vectors(data_dir, ["81"], index, len(index))["81"]
    for item, row in index.items():
        k = int(item[1:]) - 3
        assert feature.present[row] == (k >= 0)
        assert k < 0 or (feature.values[row] == matrix[k]).all()


def test_the_folder_opens_with_every_kind_of_feature(tmp_path):
    users = [{"id": f"u{k}", "age": 20.5 + k, "sex": "fm"[k % 2]} for k in range(11)]
    np.savez(tmp_path / "v.npz", ids=np.array(["i1", "i2"]), emb=np.eye(2, dtype=np.float32))
    data_dir = run_with_items(
        tmp_path, "--action", "kind", "--item_vectors", tmp_path / "v.npz",
        "--user_features", write_table(tmp_path / "users.csv", users),
    )  # fmt: skip
    manifest = read_manifest(data_dir)
    item_features = load_features(data_dir, "item", manifest.num_items)
    assert {f.kind for f in item_features.values()} == {"sparse", "array", "continual"}
    assert set(load_features(data_dir, "user", manifest.num_users)) == {"age", "sex"}
    for split in ("train", "valid", "test"):
        dataset = MyDataset(data_dir, split)
        batch = dataset.collate_fn(dataset.__getitems__(range(len(dataset))))
        assert len(batch.user_ids) == len(dataset) > 3


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.parquet"])
def test_events_without_user_item_or_time_are_left_out_on_request(tmp_path, capsys, name):
    log = [row | {"bought": k % 2, "seen": 1} for k, row in enumerate(random_log())]
    flags = ["--action", "bought", "seen"]
    expected = run(tmp_path, log, *flags, name="whole.csv")
    gaps = [{"user": "NA"}, {"item": ""}, {"timestamp": None}, {"user": r"\N", "item": ""}]
    holes = [row | gap for row, gap in zip(log, gaps, strict=False)]
    path = write_table(tmp_path / name, [*log[:2], *holes[:2], *log[2:], *holes[2:]])
    flags = [str(path), str(tmp_path / "o"), "--overwrite", *flags]
    capsys.readouterr()
    assert prepare_table.main([*flags, "--drop_incomplete"]) == 0
    assert f"{name}: left out 4 events without user, item or time" in capsys.readouterr().out
    assert read_json(tmp_path / "o" / "manifest.json") == read_json(expected / "manifest.json")
    assert prepare_table.main(flags) == 1
    assert "expected an id; --drop_incomplete" in capsys.readouterr().err


def test_na_is_missing_among_numbers_and_a_word_among_words(tmp_path):
    items = [
        {"id": f"i{k}", "price": "NA" if k == 3 else f"{k}.5", "land": "NA" if k % 2 else "DE"}
        for k in range(17)
    ]
    table = write_table(tmp_path / "items.csv", items)
    data_dir = run(tmp_path, random_log(), "--item_features", table)
    manifest = read_manifest(data_dir)
    features = load_features(data_dir, "item", manifest.num_items)
    assert {name: f.kind for name, f in features.items()} == {
        "price": "continual",
        "land": "sparse",
    }
    assert set(features["land"].values[1:].tolist()) == {1, 2}


# ---------------------------------------------------------------------------------------- refusals

HEAD = "user,item,timestamp\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log.csv", HEAD + "a,x,5\nb,x\n", "line 3 has 2 fields, expected 3 (user, item, time"),
        ("log.csv", HEAD + "a,x,5\n\nb,x,soon\n", "event 2: timestamp is 'soon', expected a num"),
        ("log.csv", HEAD + "a,x,nan\n", "event 1: timestamp is '', expected a number or a date"),
        ("log.csv", HEAD + "a,x,inf\n", "event 1: timestamp is 'inf', expected a number"),
        ("log.csv", HEAD + ",x,5\n", "event 1: user is '', expected an id"),
        ("log.csv", HEAD + 'a,"x,5\n', "line 2 has a quote that is not closed; correct"),
        ("log.csv", HEAD + 'a,"x,5\nb,y",6\n', "event 1 has a quote that is closed in a later"),
        ("log.tsv", 'user\titem\ttimestamp\na\tx\t"5\nb\ty\t6"\n', "event 1 has a quote that is"),
        ("log.csv", HEAD + "a,x,20240103\na,y,20231231\n", "20240103 and so on, a date in digits"),
        ("log.csv", HEAD + "a,x,5\na,y,6\na,z,1e20\n", "timestamp 100000000000000000000 among"),
        ("log.csv", "user,item,time\na,x,5\n", "no column timestamp; there are user, item, time"),
        ("log.csv", "user,user\na,x\n", "the names of the columns; 'user' occurs twice"),
        ("log.csv", HEAD + "a,x,2024-01-03\na,y,1704300000000\n", "event 2: timestamp is '17043"),
        ("log.csv", HEAD + "a,x,5\na,y,2024-01-03\n", "event 2: timestamp is '2024-01-03', exp"),
        ("log.csv", HEAD, "no events in it"),
        ("log.jsonl", "", "no events in it"),
        ("log.csv", "", "line 1 is '', expected the names of the columns"),
        ("log.csv", b"user,item,timestamp\n\xff,x,5\n", "line 2 is not UTF-8"),
        ("log.csv", HEAD + "a,x,5\nb,x,6\n", "no user has two events to train on"),
        ("log.csv.gz", b"user", "is damaged or in another form"),
        ("log.csv.gz", gzip.compress(HEAD.encode() * 99, mtime=0)[:-9], "is damaged or in another"),
        ("log.jsonl", '{"user": 1}\n{"user": \n', "line 2: unexpected end of data"),
        ("log.jsonl", '{"user": "\\ud800"}\n', "line 1: no low surrogate in string"),
        ("log.jsonl", "[1]\n", "holds '1', expected JSON objects"),
        ("log.jsonl", '{"user": 1, "item": 2}\n', "no column timestamp; there are user, item"),
        ("log.jsonl", '{"user": null, "item": 2, "timestamp": 3}\n', "event 1: user is '', "),
    ],
)  # fmt: skip
def test_a_bad_log_is_refused_with_file_and_line(tmp_path, capsys, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert prepare_table.main([str(path), str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--action", "timestamp", "kind"], "log.csv: event 1: kind is 'v', expected 0 or 1"),
        (["--action", "absent"], "log.csv: no column absent; there are user, item"),
        (["--order", "kind"], "log.csv: event 1: kind is 'v', expected a number"),
        (["--min_user_events", "999"], "log.csv: no event is left; lower"),
        (["--item_features", "items.csv", "--item_key", "absent"], "items.csv: no column absent"),
        (["--item_features", "items.csv", "--item_key", "year"], "column year holds no id of the"),
        (["--item_features", "items.csv", "--continual", "brand"], "column brand: ['acme'] is no"),
        (["--item_features", "items.csv", "--drop", "absent"], "no column is called absent; there"),
        (["--item_features", "items.csv", "--item_names", "absent"], "--item_names: no column abs"),
        (
            ["--item_features", "items.csv", "--sparse", "year", "--drop", "year"],
            "both --sparse and",
        ),
        (["--time", "kind"], "is 'v', expected a number or an ISO date, all alike, or a --time"),
        (["--item_vectors", "log.csv"], "log.csv: "),
        (["--item_vectors", "flat.npz"], "flat.npz: ids int64[2]; expected ids [n] and float"),
        (["--item_vectors", "other.npz"], "other.npz: none of its 2 ids is an item"),
        (["--item_vectors", "nan.npz"], "nan.npz: the vector of i1 is not finite"),
    ],
)
def test_a_flag_that_does_not_fit_the_files_is_refused(
    tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    write_table(Path("log.csv"), [row | {"kind": "v"} for row in random_log()])
    write_table(Path("items.csv"), item_rows())
    np.savez("flat.npz", ids=np.arange(2))
    np.savez("other.npz", ids=np.arange(2), emb=np.eye(2))
    np.savez("nan.npz", ids=np.array(["i1", "i2"]), emb=np.full((2, 3), np.nan))
    assert prepare_table.main(["log.csv", "data", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("flag", ["--item_features", "--user_features", "--item_vectors"])
def test_a_missing_table_is_an_error_before_the_log_is_read(tmp_path, capsys, flag):
    path = write_table(tmp_path / "log.csv", random_log())
    assert prepare_table.main([str(path), str(tmp_path / "data"), flag, "nowhere.csv"]) == 1
    out, error = capsys.readouterr()
    assert (out, error) == ("", "error: nowhere.csv: No such file or directory\n")


def test_cuts_after_which_there_is_no_event_are_refused(tmp_path, capsys):
    path = write_table(tmp_path / "log.csv", random_log())
    cuts = [str((START + 20_000) * 1000), str((START + 33_000) * 1000)]
    flags = ["--split", "time", "--cuts", *cuts]
    assert prepare_table.main([str(path), str(tmp_path / "data"), *flags]) == 1
    assert f"expected Unix seconds between {START} and " in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, capsys):
    path = write_table(tmp_path / "log.csv", random_log())
    assert prepare_table.main([str(path), str(path)]) == 1
    assert capsys.readouterr().err == (
        f"error: {path}: a file, expected a folder to write or none; name another\n"
    )


def test_a_first_column_without_a_name_is_never_taken_for_ids(tmp_path, capsys):
    (tmp_path / "items.csv").write_text(",movie,colour\n0,i1,red\n1,i2,blue\n")
    path = write_table(tmp_path / "log.csv", random_log())
    flags = ["--item_features", str(tmp_path / "items.csv")]
    assert prepare_table.main([str(path), str(tmp_path / "data"), *flags]) == 1
    assert "items.csv: its first column has no name; say where ids are" in capsys.readouterr().err
    run(tmp_path, random_log(), *flags, "--item_key", "movie")


def test_a_description_of_several_lines_is_read(tmp_path):
    (tmp_path / "items.csv").write_text('item,colour\ni1,"red\nand blue"\ni2,green\n')
    data_dir = run(tmp_path, random_log(), "--item_features", tmp_path / "items.csv",
                   "--sparse", "colour")  # fmt: skip
    assert read_json(data_dir / "feat_statistics.json") == {"colour": 2}


def test_an_action_column_that_holds_no_types_is_refused(tmp_path, capsys):
    log = [row | {"kind": f"k{k}"} for k, row in enumerate(random_log(1001))]
    path = write_table(tmp_path / "log.csv", log)
    assert prepare_table.main([str(path), str(tmp_path / "data"), "--action", "kind"]) == 1
    error = capsys.readouterr().err
    assert error == (
        f"error: {path}: 1,001 different values in kind, expected at most 1,000 types\n"
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "no rows in it"), (["i1"], "['id'], expected a column of ids and one of vectors")],
)
def test_parquet_without_vectors_is_refused(tmp_path, capsys, ids, message):
    vectors = tmp_path / "vectors.parquet"
    write_parquet(vectors, "SELECT unnest($1::VARCHAR[]) AS id", [ids])
    path = write_table(tmp_path / "log.csv", random_log())
    flags = ["--item_vectors", str(vectors)]
    assert prepare_table.main([str(path), str(tmp_path / "data"), *flags]) == 1
    assert capsys.readouterr().err == f"error: {vectors}: {message}\n"


def test_what_may_surprise_is_printed(tmp_path, capsys):
    log = random_log()
    items = [{"item": f"i{k}", "price": f"{k},5"} for k in range(17)]
    table = write_table(tmp_path / "items.csv", items)
    run(tmp_path, [log[0], *log], "--item_features", table)
    text = capsys.readouterr().out
    assert "columns not used: kind" in text
    assert re.search(r"price +drop +numbers with decimal commas", text)
    num_repeated = int(re.search(r"repeated: (\d+) events equal the one before", text)[1])
    run(tmp_path, log)
    assert f"repeated: {num_repeated - 1} events" in capsys.readouterr().out


def test_vectors_with_ids_that_are_python_objects_say_how_to_save_them(tmp_path, capsys):
    path = write_table(tmp_path / "log.csv", random_log())
    np.savez(tmp_path / "v.npz", ids=np.array(["i1", "i2"], object), emb=np.eye(2))
    flags = ["--item_vectors", str(tmp_path / "v.npz")]
    assert prepare_table.main([str(path), str(tmp_path / "data"), *flags]) == 1
    assert "save ids of text as text: ids.astype(str)" in capsys.readouterr().err


def test_ctrl_c_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "log.csv").write_text(HEAD)
    monkeypatch.setattr(prepare_table, "read_log", interrupted)
    assert prepare_table.main([str(tmp_path / "log.csv"), str(tmp_path / "data")]) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"


@pytest.mark.parametrize(
    "flags",
    [
        ["--split", "random"],
        ["--cuts", "0.5", "soon"],
        ["--held_out", "0.7"],
        ["--item_names", "a"],
        ["--held_out", "0.2"],
        ["--seed", "1"],
        ["--split", "user", "--cuts", "0.5", "0.7"],
    ],
)
def test_a_flag_that_cannot_be_exits_2(tmp_path, flags):
    with pytest.raises(SystemExit, match="2"):
        prepare_table.main([str(tmp_path / "log.csv"), str(tmp_path / "data"), *flags])


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.jsonl", "log.parquet"])
def test_a_damaged_log_converts_or_is_refused_in_one_line(tmp_path, capsys, name):
    rng = np.random.default_rng(4)
    path = write_table(tmp_path / name, random_log(40))
    whole = path.read_bytes()
    for _ in range(40):
        place, length = rng.integers(len(whole)), rng.integers(5)
        path.write_bytes(whole[:place] + rng.bytes(length) + whole[place + rng.integers(5) :])
        flags = ["--action", "kind", "--overwrite"]
        code = prepare_table.main([str(path), str(tmp_path / "data"), *flags])
        error = capsys.readouterr().err
        assert code == 0 or (error.startswith(f"error: {path}: ") and error.count("\n") == 1)


def test_without_duckdb_a_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    path = write_table(tmp_path / "log.csv", random_log())
    assert prepare_table.main([str(path), str(tmp_path / "data")]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'data'}: tables are read with DuckDB; "
        "pip install -r requirements-data.txt\n"
    )


# ------------------------------------------------------------------------------------ the real data


def needs(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not on this machine")
    return SHARED / name


def digest(data_dir: Path) -> str:
    """Of the manifest, which has the SHA-256 of every file, but for the indexer's."""
    manifest = read_json(data_dir / "manifest.json")
    del manifest["files"]["indexer.pkl"]
    text = json.dumps(manifest, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_kuairand_and_retailrocket_are_equal_to_the_recorded_folders(tmp_path):
    source, data_dir = needs("kuairand-pure"), tmp_path / "data"
    command = DATA["kuairand"].format(source=source, data=data_dir).split()[1:]
    assert prepare_table.main(command) == 0
    assert digest(data_dir) == "306467dd9f0757a3"
    source, data_dir = needs("retailrocket-multi"), tmp_path / "retail"
    command = [str(source / "interactions.csv.gz"), str(data_dir), "--action", "action"]
    assert prepare_table.main(command) == 0
    assert digest(data_dir) == "bacf7538a1b7081d"


def test_amazon_beauty_converts_in_the_published_order(tmp_path):
    source, data_dir = needs("amazon-beauty"), tmp_path / "data"
    flags = ["--order", "seq_pos", "--item_features", source / "items.csv.gz", "--drop", "n"]
    command = [source / "interactions.csv.gz", data_dir, *flags, "--item_names", "text"]
    assert prepare_table.main([*map(str, command)]) == 0
    assert read_manifest(data_dir)[:3] == (12_101, 22_363, 0)
    with gzip.open(source / "interactions.csv.gz", "rt") as file:
        rows = [line.split(",") for line in file.read().splitlines()[1:]]
    published = {}
    for user, item, _, place in sorted(rows, key=lambda row: (int(row[0]), int(row[3]))):
        published.setdefault(int(user), []).append(int(item))
        assert int(place) == len(published[int(user)]) - 1
    assert {u: items(v) for u, v in read_back(data_dir, "test").items()} == published
    assert read_json(data_dir / "feature_types.json")["item_array"] == ["attributes"]
    assert digest(data_dir) == "e856282ffd2d8360"


def test_kuairand_converts_with_ranked_actions_and_features(tmp_path):
    source, data_dir = needs("kuairand-pure"), tmp_path / "data"
    flags = ["--time", "time_ms", "--action", "is_follow", "is_like", "long_view", "is_click"]
    tables = [
        "--item_features",
        source / "items.csv.gz",
        "--user_features",
        source / "users.csv.gz",
    ]
    command = [source / "interactions.csv.gz", data_dir, *flags, *tables]
    assert prepare_table.main([*map(str, command)]) == 0
    manifest = read_manifest(data_dir)
    assert manifest[:3] == (6361, 25_156, 5)
    assert "tag" in load_features(data_dir, "item", manifest.num_items)
    users = load_features(data_dir, "user", manifest.num_users)
    assert {"onehot_feat3", "user_follow_user_num"} <= set(users)


def test_a_parquet_files_columns_are_listed_where_one_is_missing(tmp_path, capsys):
    path = write_table(tmp_path / "log.parquet", [{"user_id": 1, "item_id": 2, "ts": 3}])
    assert prepare_table.main([str(path), str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    assert "no column user, item, timestamp; there are user_id, item_id, ts. Say" in error


def test_a_table_whose_first_row_is_empty_is_refused_in_one_line(tmp_path, capsys):
    log, items = write_table(tmp_path / "log.csv", random_log()), tmp_path / "items.jsonl"
    items.write_text('{}\n{"item": 1, "colour": 2}\n')
    assert prepare_table.main([str(log), str(tmp_path / "d"), "--item_features", str(items)]) == 1
    assert "items.jsonl: column item holds no id of the events; it has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ([["a", "b"], "a", ["b"], ["b", "a"]], [[1, 2], [1], [2], [2, 1]]),
        ([[["a", "b"]], [["a"]], [["b"]], [["b", "a"]]], [[1, 2], [1], [2], [2, 1]]),
        ([["a, b"], ["c"], ["a, b", "c"], ["c"]], [[1], [2], [1, 2], [2]]),
        ([["a|b"], ["c"], ["a|b", "c"], ["c"]], [[1], [2], [1, 2], [2]]),
    ],
    ids=["a single value among them", "lists in lists", "values with commas", "with bars"],
)
def test_lists_keep_their_values_whole(tmp_path, lists, expected):
    log = write_table(tmp_path / "log.csv", [
        {"user": 1, "item": k, "timestamp": START + k} for k in range(4)
    ])  # fmt: skip
    items = tmp_path / "items.jsonl"
    items.write_text(
        "".join(json.dumps({"item": k, "tags": tags}) + "\n" for k, tags in enumerate(lists))
    )
    folder = tmp_path / "data"
    flags = ["--split", "none", "--item_features", str(items)]
    assert prepare_table.main([str(log), str(folder), *flags]) == 0
    values = read_json(folder / "item_feat_dict.json")
    assert [values[str(k)]["tags"] for k in range(1, 5)] == expected


def test_lists_of_one_value_are_a_value(tmp_path, capsys):
    """And one that every item has of its own is no feature."""
    log = write_table(tmp_path / "log.csv", [
        {"user": 1, "item": k, "timestamp": START + k} for k in range(4)
    ])  # fmt: skip
    rows = [{"item": k, "kind": [f"a, {k % 2}"], "code": [f"c{k}"]} for k in range(4)]
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "data"
    flags = ["--split", "none", "--item_features", str(items)]
    assert prepare_table.main([str(log), str(folder), *flags]) == 0
    assert "4 different values in 4 rows" in capsys.readouterr().out
    assert read_indexer(folder)["f"] == {"kind": {"a, 0": 1, "a, 1": 2}}


def test_a_vector_with_a_missing_number_is_refused(tmp_path, capsys):
    rows = [{"user": 1, "item": "a", "timestamp": START + k} for k in range(2)]
    log = write_table(tmp_path / "log.csv", rows)
    query = "SELECT 'a' AS id, [0.5, NULL, 0.25] AS vector"
    vectors = write_parquet(tmp_path / "vectors.parquet", query)
    flags = ["--split", "none", "--item_vectors", str(vectors)]
    assert prepare_table.main([str(log), str(tmp_path / "data"), *flags]) == 1
    assert "the vector of a is not finite" in capsys.readouterr().err

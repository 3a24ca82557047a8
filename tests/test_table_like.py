"""A new log that is converted like an earlier folder: what is known keeps its number."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import prepare_table
import pytest
from weeks import (
    COLOURS,
    DEARER,
    GONE,
    NEW_ITEM,
    NEW_USER,
    RECOLOURED,
    START,
    convert,
    log_of,
    users_of,
    write_rows,
)

from files.atomic_io import read_json, write_json
from files.data_folder import SPLITS, read_indexer, read_manifest
from files.features import load_features
from files.sequences import open_split

pytestmark = pytest.mark.slow

LOG = ("log.csv", [("a", "x", 1), ("a", "y", 2), ("b", "x", 3), ("b", "y", 4)])


@pytest.fixture(scope="module")
def weeks(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of a week, and the next week's that is like it."""
    folder = tmp_path_factory.mktemp("weeks")
    first = convert(folder, 1)
    return first, convert(folder, 2, "--like", first)


def rows_of(events: list[tuple]) -> list[dict]:
    return [dict(zip(("user", "item", "timestamp"), event, strict=False)) for event in events]


def test_ids_and_values_keep_their_numbers_and_new_ones_get_the_next(weeks):
    before, after = map(read_indexer, weeks)
    assert after["i"] == before["i"] | {NEW_ITEM: 15}
    assert after["u"] == before["u"] | {NEW_USER: 10}
    assert after["f"]["colour"] == {"blue": 1, "green": 2, "red": 3, "amber": 4}
    assert after["f"]["tags"] == before["f"]["tags"] | {"vegan": 4}
    assert after["f"]["city"] == before["f"]["city"]
    assert read_manifest(weeks[1]).action_names == ["buy", "view", "refund"]


def test_the_events_are_those_of_the_new_log(weeks):
    events, offsets, users = open_split(weeks[1], "test")
    user_of, item_of = ({k: i for i, k in read_indexer(weeks[1])[s].items()} for s in "ui")
    names = read_manifest(weeks[1]).action_names
    owners = np.repeat(users, np.diff(offsets))
    found = {
        (user_of[int(user)], item_of[item], names[action], time)
        for user, (item, action, time) in zip(owners, events.tolist(), strict=True)
    }
    assert found == {tuple(row.values()) for row in map(in_order, log_of(2))}


def in_order(row: dict) -> dict:
    return {name: row[name] for name in ("user", "item", "kind", "timestamp")}


def test_a_column_stays_transformed_as_it_was_and_a_missing_number_what_it_was(weeks):
    features = [load_features(f, "item", read_manifest(f).num_items) for f in weeks]
    prices, weights = ([of[name].values for of in features] for name in ("price", "weight"))
    is_other = np.arange(15) != DEARER
    assert np.array_equal(prices[0][is_other], prices[1][:15][is_other])
    assert prices[1][DEARER] == np.float32(99_999.5)  # its logarithm in a conversion without --like
    assert np.array_equal(weights[0], weights[1][:15])
    digests = [read_manifest(folder).feature_digests for folder in weeks]
    assert digests[0]["price"] == digests[1]["price"]


def test_an_item_without_an_event_keeps_its_number_and_its_features(weeks):
    events, *_ = open_split(weeks[1], "test")
    number = read_indexer(weeks[1])["i"][GONE]
    assert number == GONE and GONE not in events["item_id"]
    records = [read_json(folder / "item_feat_dict.json")[str(number)] for folder in weeks]
    assert records[0] == records[1]
    recoloured = [read_json(folder / "item_feat_dict.json")[str(RECOLOURED)] for folder in weeks]
    assert [record["colour"] for record in recoloured] == [1, 4]


def test_what_is_new_is_counted_in_a_line_each(tmp_path, capsys):
    first = convert(tmp_path, 1)
    assert " new" not in capsys.readouterr().out
    convert(tmp_path, 2, "--like", first)
    lines = capsys.readouterr().out.splitlines()
    assert f"items: 1 new, 13 known from {first}, 1 that only {first} has" in lines
    assert f"users: 1 new, 9 known from {first}, 0 that only {first} has" in lines
    assert any(line.startswith("actions: ") and line.endswith("new: refund") for line in lines)
    assert any("colour" in line and "4 values (1 new)" in line for line in lines)


def test_the_same_log_like_its_own_folder_is_the_same_folder(tmp_path):
    first = convert(tmp_path, 1)
    again = convert(tmp_path, 1, "--like", first, name="again")
    assert read_json(again / "manifest.json") == read_json(first / "manifest.json")


def test_a_folder_is_replaced_by_one_like_it(tmp_path, weeks):
    first = convert(tmp_path, 1)
    convert(tmp_path, 2, "--like", first, "--overwrite", name=first.name)
    assert read_json(first / "manifest.json") == read_json(weeks[1] / "manifest.json")


@pytest.mark.parametrize("split", ["leave_one_out", "time", "user", "none"])
def test_a_user_or_an_item_without_events_has_a_number_and_no_sequence(tmp_path, split):
    name, events = LOG
    first = prepare(tmp_path, name, [*events, ("c", "z", 5), ("c", "x", 6), ("c", "y", 7)])
    later = [(user, item, k) for k, item in enumerate("xwxywy") for user in "ade"]
    flags = ["--like", first, "--split", split]
    flags += ["--held_out", "0.3"] if split == "user" else []
    second = prepare(tmp_path, "later.csv", later, *flags)
    assert read_indexer(second)["u"] == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}
    assert read_indexer(second)["i"] == {"x": 1, "y": 2, "z": 3, "w": 4}
    for part in SPLITS:
        if (second / f"{part}_data.bin").exists():
            _, offsets, users = open_split(second, part)
            assert set(users.tolist()) <= {1, 4, 5}
            assert np.diff(offsets).all()


def prepare(tmp_path: Path, name: str, events: list[tuple], *flags: object) -> Path:
    """The folder of a log without tables, named as the log."""
    log, data_dir = write_rows(tmp_path / name, rows_of(events)), tmp_path / Path(name).stem
    assert prepare_table.main([str(log), str(data_dir), *map(str, flags)]) == 0
    return data_dir


def test_ids_that_were_numbers_stay_numbers_beside_new_ones_of_text(tmp_path):
    first = prepare(tmp_path, "one.csv", [(7, 30, 1), (7, 4, 2), (8, 4, 3), (8, 30, 4)])
    later = [(7, "x9", 5), (7, 30, 6), (9, 5, 7), (9, 4, 8)]
    second = prepare(tmp_path, "two.csv", later, "--like", first)
    assert read_indexer(second)["i"] == {4: 1, 30: 2, "5": 3, "x9": 4}
    assert read_indexer(second)["u"] == {7: 1, 8: 2, 9: 3}


def test_action_columns_keep_their_types_and_a_new_one_gets_the_next(tmp_path):
    events = [(u, i, START + k, k % 2, 1) for k, (u, i) in enumerate(["ax", "ay", "bx", "by"])]
    names = ("user", "item", "timestamp", "is_bought", "is_viewed")
    rows = [dict(zip(names, event, strict=True)) for event in events]
    log = write_rows(tmp_path / "log.csv", rows)
    flags = ["--action", "is_bought", "is_viewed"]
    first = tmp_path / "first"
    assert prepare_table.main([str(log), str(first), *flags]) == 0
    rows = [row | {"is_liked": int(k == 3)} for k, row in enumerate(rows)]
    log, second = write_rows(tmp_path / "log.csv", rows), tmp_path / "second"
    flags = ["--action", "is_liked", "is_bought", "is_viewed", "--like", str(first)]
    assert prepare_table.main([str(log), str(second), *flags]) == 0
    assert read_manifest(second).action_names == ["none", "is_viewed", "is_bought", "is_liked"]
    assert open_split(second, "test")[0]["action_type"].tolist() == []
    assert open_split(second, "train")[0]["action_type"].tolist() == [1, 2, 1, 3]


def test_lists_are_split_as_the_known_values_are(tmp_path):
    log = write_rows(tmp_path / "log.csv", rows_of(LOG[1]))

    def tags(name: str, *values: str, flags: tuple = ()) -> dict:
        rows = [{"item": i, "tags": v} for i, v in zip("xy", values, strict=True)]
        items = write_rows(tmp_path / f"{name}.csv", rows)
        command = [log, tmp_path / name, "--item_features", items, *flags]
        assert prepare_table.main([*map(str, command)]) == 0
        return read_indexer(tmp_path / name)["f"]["tags"]

    assert tags("one", "a;b", "b;a", flags=("--array", "tags")) == {"a": 1, "b": 2}
    like = ("--like", tmp_path / "one")
    assert tags("two", "b", "a;c,d", flags=like) == {"a": 1, "b": 2, "c,d": 3}
    assert tags("three", "x,y;z", "z;x,y", flags=("--array", "tags")) == {"x,y": 1, "z": 2}
    assert tags("four", "x,y", "z", flags=("--like", tmp_path / "three")) == {"x,y": 1, "z": 2}


def test_lists_of_values_that_all_occur_alone_too_are_split(tmp_path):
    def folder(name: str, tags: list[str], *flags: object) -> Path:
        rows = [{"item": f"i{k}", "tags": value} for k, value in enumerate(tags)]
        items = write_rows(tmp_path / f"{name}_items.csv", rows)
        events = [(f"u{k % 3}", f"i{k}", START + k) for k in range(len(tags))]
        return prepare(tmp_path, f"{name}.csv", events, "--item_features", items, *flags)

    values = ["a", "b", "c", "a|c", "b|c", "a|b"]
    first = folder("one", values, "--array", "tags")
    second = folder("two", [*values, "c|new one"], "--like", first)
    assert read_indexer(second)["f"]["tags"] == {"a": 1, "b": 2, "c": 3, "new one": 4}


def test_a_missing_number_stays_what_it_was_in_the_first_of_several_weeks(tmp_path):
    def folder(name: str, prices: list, *flags: object) -> Path:
        rows = [{"item": f"i{k}", "price": price} for k, price in enumerate(prices)]
        items = write_rows(tmp_path / f"{name}_items.csv", rows)
        events = [(f"u{k % 3}", f"i{k}", START + k) for k in range(len(prices))]
        return prepare(tmp_path, f"{name}.csv", events, "--item_features", items, *flags)

    def price_of_first(data_dir: Path) -> float:
        feature = load_features(data_dir, "item", read_manifest(data_dir).num_items)["price"]
        return float(feature.values[read_indexer(data_dir)["i"]["i0"]])

    cheap = ["", 1.5, 2.5, 2.0, 1.0, 3.0]
    dear = [*cheap, *(50.5 + k for k in range(9))]
    first = folder("one", cheap, "--continual", "price")
    second = folder("two", dear, "--like", first)
    third = folder("three", dear, "--like", second)
    assert price_of_first(first) == price_of_first(second) == price_of_first(third) == 2


def test_a_log_without_the_column_of_actions_is_a_warning(tmp_path, capsys):
    rows = [dict(row, kind="view") for row in rows_of(LOG[1])]
    log, first = write_rows(tmp_path / "log.csv", rows), tmp_path / "first"
    assert prepare_table.main([str(log), str(first), "--action", "kind"]) == 0
    capsys.readouterr()
    assert prepare_table.main([str(log), str(tmp_path / "second"), "--like", str(first)]) == 0
    assert "has the action types view, but no --action names" in capsys.readouterr().out


def test_columns_that_are_new_are_features_on_request_alone(tmp_path):
    first = convert(tmp_path, 1)
    users = write_rows(
        tmp_path / "users.csv", [row | {"age": "young" if row["city"] == "Rome" else "old"}
                                 for row in users_of(2)]
    )  # fmt: skip
    flags = ("--like", first, "--user_features", users)
    kinds = read_json(convert(tmp_path, 2, *flags) / "feature_types.json")
    assert kinds["user_sparse"] == ["city"]
    asked = convert(tmp_path, 2, *flags, "--sparse", "age", name="asked")
    assert read_json(asked / "feature_types.json")["user_sparse"] == ["city", "age"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sparse", "price"], "column price: --sparse, but it is continual in"),
        (["--drop", "colour"], "column colour: --drop, but it is sparse in"),
    ],
)
def test_a_role_that_is_not_the_earlier_one_is_refused(tmp_path, capsys, flags, message):
    first = convert(tmp_path, 1)
    with pytest.raises(AssertionError):
        convert(tmp_path, 2, "--like", first, *flags)
    assert message in capsys.readouterr().err


def test_a_table_without_an_earlier_feature_is_refused(tmp_path, capsys):
    first = convert(tmp_path, 1)
    items = write_rows(tmp_path / "items.csv", [{"item": k, "title": "a"} for k in range(1, 21)])
    with pytest.raises(AssertionError):
        convert(tmp_path, 2, "--like", first, "--item_features", items)
    error = capsys.readouterr().err
    assert "has the features colour, price, tags, weight of items, but no column" in error
    assert error.count("\n") == 1


def without_values(folder: Path) -> None:
    indexer = read_indexer(folder) | {"f": {}}
    (folder / "indexer.pkl").write_bytes(pickle.dumps(indexer))


def edit(folder: Path, **fields) -> None:
    manifest = read_json(folder / "manifest.json")
    manifest["files"].pop("indexer.pkl", None)  # whose size may be another one
    write_json(folder / "manifest.json", manifest | fields)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without_values, "what the numbers of feature colour stand for is not recorded"),
        (lambda folder: (folder / "indexer.pkl").unlink(), "it has no indexer.pkl"),
        (lambda folder: edit(folder, action_names=None), "names of its action types are not rec"),
        (lambda folder: edit(folder, feature_digests={}), "numbers of feature price stand for is"),
    ],
)
def test_a_folder_that_does_not_say_what_its_numbers_mean_is_refused(
    tmp_path, capsys, spoil, message
):
    first = convert(tmp_path, 1)
    edit(first)
    spoil(first)
    with pytest.raises(AssertionError):
        convert(tmp_path, 2, "--like", first)
    error = capsys.readouterr().err
    assert message in error and error.endswith("which --like needs; convert its log again\n")
    assert not (tmp_path / "week2").exists()


def test_a_number_without_a_logarithm_is_refused(tmp_path, capsys):
    events = [(user, item, START) for user in "ab" for item in "wxyz"]
    log = write_rows(tmp_path / "log.csv", rows_of(events))

    def convert_prices(name: str, *prices: float, flags: tuple = ()) -> int:
        rows = [{"item": i, "p": price} for i, price in zip("wxy", prices, strict=True)]
        items = write_rows(tmp_path / f"{name}.csv", rows)  # z has no row
        command = [log, tmp_path / name, "--item_features", items, "--continual", "p", *flags]
        return prepare_table.main([*map(str, command)])

    assert convert_prices("one", 0.25, 0.5, 1e9) == 0
    like = ("--like", tmp_path / "one")
    assert convert_prices("two", 0.25, 2.5, 7.5, flags=like) == 0
    one, two = (load_features(tmp_path / name, "item", 4)["p"].values for name in ("one", "two"))
    assert np.allclose(two, np.log1p([0, 0.25, 2.5, 7.5, 0.5]))
    assert one[4] == two[4]
    assert convert_prices("three", -1.5, 2.5, 7.5, flags=like) == 1
    assert "column p: -1.5 has no log(1 + x)" in capsys.readouterr().err


def test_colours_of_a_fresh_conversion_would_be_numbered_otherwise(tmp_path):
    fresh = read_indexer(convert(tmp_path, 2))["f"]["colour"]
    assert fresh["amber"] == 1 and set(COLOURS) < fresh.keys()


def test_values_written_as_floats_and_words_in_capitals_keep_their_numbers(tmp_path):
    """As pandas writes a column of whole numbers once a value of it is missing."""
    for week, kinds, flags in (
        ("1", ("3", "7"), ("True", "False")),
        ("2", ("3.0", "7.0"), ("true", "false")),
    ):
        lines = [
            f"{item},{kind},{flag}\n" for item, kind, flag in zip("xy", kinds, flags, strict=True)
        ]
        (tmp_path / f"items{week}.csv").write_text("item,kind,is_new\n" + "".join(lines))
        lines = [
            f"{user},{item},{k},{4 + k}{'.0' * (week == '2')}\n"
            for user in "ab"
            for k, item in enumerate("xy")
        ]
        (tmp_path / f"log{week}.csv").write_text("user,item,timestamp,stars\n" + "".join(lines))
        like = ["--like", str(tmp_path / "1")] * (week == "2")
        command = [str(tmp_path / f"log{week}.csv"), str(tmp_path / week), "--split", "none", *like]
        command += ["--action", "stars", "--sparse", "kind", "is_new"]
        assert (
            prepare_table.main([*command, "--item_features", str(tmp_path / f"items{week}.csv")])
            == 0
        )
    before, after = (read_indexer(tmp_path / week)["f"] for week in "12")
    assert after == before and len(before["kind"]) == 2
    assert read_manifest(tmp_path / "2").action_names == ["4", "5"]
    assert set(open_split(tmp_path / "2", "train")[0]["action_type"]) == {0, 1}

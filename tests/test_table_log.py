"""Logs and tables that would be read wrongly without a word: each is refused, or warned of."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import prepare_table
import pytest

import history_source
import table_log
from files.atomic_io import read_json
from files.data_folder import read_indexer
from files.sequences import open_split

pytestmark = pytest.mark.slow

HEAD = "user,item,timestamp\n"
START = 1_703_970_000


def random_log(num_users: int = 30, num_items: int = 20) -> list[list]:
    rng = random.Random(1)
    return [
        [user, rng.randrange(1, num_items + 1), START + 977 * k + user]
        for user in range(1, num_users + 1)
        for k in range(8)
    ]


def write(path: Path, rows: list[list], head: str = HEAD) -> Path:
    path.write_text(head + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def run(capsys: pytest.CaptureFixture, folder: Path, *command: object) -> tuple[int, str, str]:
    """Exit code, output and error of the command."""
    capsys.readouterr()
    flags = ["--overwrite", *map(str, command[1:])]
    code = prepare_table.main([str(command[0]), str(folder / "data"), *flags])
    return code, *capsys.readouterr()


def refusal(capsys: pytest.CaptureFixture, folder: Path, *command: object) -> str:
    code, _, error = run(capsys, folder, *command)
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


def output(capsys: pytest.CaptureFixture, folder: Path, *command: object) -> str:
    code, text, error = run(capsys, folder, *command)
    assert code == 0, error
    return text


# ---------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    "spelled",
    [lambda k, i: f"{i}.0" if k % 2 else i, lambda k, i: f" {i}" if k % 3 else f"{i} "],
)
def test_one_id_in_several_spellings_is_one_item(tmp_path, capsys, spelled):
    log = [[u, spelled(k, i), t] for k, (u, i, t) in enumerate(random_log())]
    text = output(capsys, tmp_path, write(tmp_path / "log.csv", log))
    assert "30 users, 20 items, 240 events" in text
    assert list(read_indexer(tmp_path / "data")["i"]) == list(range(1, 21))


def test_ids_that_differ_by_zeros_among_other_ids_are_warned_of(tmp_path, capsys):
    log = [*random_log(), [1, "007", START], [1, "x1", START]]
    text = output(capsys, tmp_path, write(tmp_path / "log.csv", log))
    assert "1 ids in item differ from others by zeros or by .0 alone, the first: '007' and" in text


@pytest.mark.parametrize("rounded", ["1.2345678901234567e+18", "12345678901234567000.0"])
def test_ids_that_were_rounded_to_floats_are_refused(tmp_path, capsys, rounded):
    log = write(tmp_path / "log.csv", [*random_log(), [1, rounded, START]])
    error = refusal(capsys, tmp_path, log)
    assert f"item holds {rounded}, a number that has lost digits as a float" in error


def test_a_table_whose_ids_have_another_form_shows_both(tmp_path, capsys):
    log = write(tmp_path / "log.csv", random_log())
    zeros = write(tmp_path / "zeros.csv", [[f"{i:05}", i % 3] for i in range(1, 21)], "item,c\n")
    error = refusal(capsys, tmp_path, log, "--item_features", zeros)
    assert "it has 00001, 00002, 00003, the events have 1, 2, 3: the same in another form" in error
    rows = [[i if i < 15 else f"{i:05}", i % 3] for i in range(1, 21)]
    some = write(tmp_path / "some.csv", rows, "item,c\n")
    text = output(capsys, tmp_path, log, "--item_features", some)
    assert "warning: some.csv: 6 of its ids have another form than those of the events" in text
    assert "such as '00015' and '15'" in text


@pytest.mark.parametrize("kind", [float, "S5"])
def test_vectors_whose_ids_are_floats_or_bytes_find_their_items(tmp_path, capsys, kind):
    vectors = tmp_path / "v.npz"
    np.savez(vectors, ids=np.arange(1, 21).astype(kind), vectors=np.eye(20, dtype="f4"))
    log = write(tmp_path / "log.csv", random_log())
    text = output(capsys, tmp_path, log, "--item_vectors", vectors)
    assert "v.npz: 20 of 20 items have a vector" in text


def test_a_first_column_that_is_not_the_one_of_ids_is_refused(tmp_path, capsys):
    rows = [[i % 4 + 1, i, "ab"[i % 2]] for i in range(1, 21)]
    items = write(tmp_path / "items.csv", rows, "size,id,colour\n")
    log = write(tmp_path / "log.csv", random_log())
    error = refusal(capsys, tmp_path, log, "--item_features", items)
    assert "column size holds 4 ids of the events, column id 20; say which" in error
    output(capsys, tmp_path, log, "--item_features", items, "--item_key", "id")


# ---------------------------------------------------------------------- tables


def test_the_log_as_a_table_of_users_gives_no_column_of_the_held_out_event(tmp_path, capsys):
    rows = [[*row, f"b{row[1] % 5}", f"c{row[0] % 4}"] for row in random_log()]
    log = write(tmp_path / "log.csv", rows, "user,item,timestamp,brand,city\n")
    text = output(capsys, tmp_path, log, "--user_features", log)
    assert read_json(tmp_path / "data" / "feature_types.json")["user_sparse"] == ["city"]
    assert "30 users have several values in the log" in text


def test_several_values_of_one_id_are_warned_of_by_column(tmp_path, capsys):
    rows = [[u, "ab"[u % 2], "xyz"[u % 3]] for u in range(1, 31)]
    rows += [[1, "a", "x"], [2, "a", "x"]]
    users = write(tmp_path / "users.csv", rows, "user,sex,land\n")
    log = write(tmp_path / "log.csv", random_log())
    text = output(capsys, tmp_path, log, "--user_features", users)
    assert "warning: users.csv: sex: 1 users have several values, the last row counts" in text
    assert "warning: users.csv: land: 2 users" in text


def test_a_column_that_counts_an_items_events_is_dropped_unless_asked(tmp_path, capsys):
    log = [[u, 1 + (u * u * k) % 29, t] for k, (u, _, t) in enumerate(random_log())]
    counts = np.bincount([i for _, i, _ in log], minlength=30)
    rows = [[i, 2 * counts[i]] for i in range(1, 30)]
    items = write(tmp_path / "items.csv", rows, "item,sold\n")
    path = write(tmp_path / "log.csv", log)
    text = output(capsys, tmp_path, path, "--item_features", items)
    assert "drop       it counts an item's events, those held out among them" in text
    text = output(capsys, tmp_path, path, "--item_features", items, "--continual", "sold")
    assert "sold                     continual" in text


@pytest.mark.parametrize(
    "written",
    [str, lambda parts: "[" + ", ".join(f'""{p}""' for p in parts) + "]",
     lambda parts: f"[{' '.join(parts)}]", "|".join],
)  # fmt: skip
def test_a_list_is_read_as_its_values_however_it_is_written(tmp_path, capsys, written):
    rng = random.Random(3)
    lists = [rng.sample(["Action", "Indie", "RPG", "War"], rng.randrange(1, 4)) for _ in range(20)]
    rows = [[i + 1, f'"{written(parts)}"'] for i, parts in enumerate(lists)]
    items = write(tmp_path / "items.csv", rows, "item,genres\n")
    output(capsys, tmp_path, write(tmp_path / "log.csv", random_log()), "--item_features", items)
    assert read_json(tmp_path / "data" / "feat_statistics.json") == {"genres": 4}
    codes = {"Action": 1, "Indie": 2, "RPG": 3, "War": 4}
    records = read_json(tmp_path / "data" / "item_feat_dict.json")
    for i, parts in enumerate(lists, 1):
        assert records[str(i)]["genres"] == [codes[part] for part in parts]


# ---------------------------------------------------------------------- times


@pytest.mark.parametrize("form", ["%Y%m%d%H", "%Y%m%d%H%M", "%Y%m%d%H%M%S", "%y%m%d", "%m%d"])
def test_dates_in_digits_are_refused_and_read_where_the_flag_says_so(tmp_path, capsys, form):
    log = [
        [u, i, datetime.fromtimestamp(START + 9999 * k, timezone.utc).strftime(form)]
        for k, (u, i, _) in enumerate(random_log())
    ]
    path = write(tmp_path / "log.csv", log)
    assert f"a date in digits alone; say so with --time_format {form}" in refusal(
        capsys, tmp_path, path
    )
    text = output(capsys, tmp_path, path, "--time_format", form)
    assert f"time: timestamp in {form}, " in text
    if form in ("%y%m%d", "%m%d"):
        assert "in seconds, 1970" in output(capsys, tmp_path, path, "--time_unit", "seconds")


def test_dates_that_two_forms_read_are_refused_with_both(tmp_path, capsys):
    path = write(tmp_path / "log.csv", [[u, i, "05/06/2023"] for u, i, _ in random_log()])
    assert "reads as %m/%d/%Y and as %d/%m/%Y; say which with" in refusal(capsys, tmp_path, path)
    output(capsys, tmp_path, path, "--time_format", "%d/%m/%Y")
    assert set(open_split(tmp_path / "data", "test")[0]["timestamp"]) == {1_685_923_200}


def test_a_date_that_the_told_form_does_not_read_is_named(tmp_path, capsys):
    log = [*random_log()[:3], [1, 2, "soon"]]
    path = write(tmp_path / "log.csv", [[u, i, "2023-01-05"] for u, i, _ in log[:3]] + [log[3]])
    error = refusal(capsys, tmp_path, path, "--time_format", "%Y-%m-%d")
    assert "event 4: timestamp is 'soon', expected a date in the form %Y-%m-%d" in error


def test_times_of_1970_and_of_the_future_are_counted_with_an_example(tmp_path, capsys):
    log = [*random_log(), [1, 2, 0], [2, 3, 0], [3, 4, 9_703_970_000]]
    text = output(capsys, tmp_path, write(tmp_path / "log.csv", log))
    assert "warning: 2 events have a time before 1990, such as 1970-01-01T00:00:00" in text
    assert "warning: 1 events have a time in the future, such as 2277-" in text


# ---------------------------------------------------------------------- actions


def test_types_that_are_numbers_are_printed_so_that_one_can_read_them(tmp_path, capsys):
    log = [[*row, 1 + k % 2] for k, row in enumerate(random_log())]
    path = write(tmp_path / "log.csv", log, "user,item,timestamp,stars\n")
    text = output(capsys, tmp_path, path, "--action", "stars")
    assert "actions: type 0 is '1': 50.0%, type 1 is '2': 50.0%" in text


def test_a_type_for_each_of_many_numbers_is_warned_of(tmp_path, capsys):
    log = [[*row, k / 2] for k, row in enumerate(random_log())]
    path = write(tmp_path / "log.csv", log, "user,item,timestamp,price\n")
    text = output(capsys, tmp_path, path, "--action", "price")
    assert "warning: price holds 240 different numbers (0.0, 0.5, ...), a type for each" in text


@pytest.mark.parametrize(("rule", "left"), [("equal", "xyxx"), ("items", "xy")])
def test_repeated_events_are_dropped_by_the_rule_that_is_told(tmp_path, capsys, rule, left):
    events = [["x", 5], ["x", 5], ["y", 6], ["x", 7], ["x", 8]]
    others = [["b", item, 5 + k] for k, item in enumerate("xyxyz")]
    rows = [["a", item, START + time] for item, time in events] + others
    path = write(tmp_path / "log.csv", rows)
    text = output(capsys, tmp_path, path, "--drop_repeated", rule, "--split", "none")
    item_of = {k: i for i, k in read_indexer(tmp_path / "data")["i"].items()}
    records, offsets, _ = open_split(tmp_path / "data", "test")
    assert "".join(item_of[k] for k in records["item_id"][: offsets[1]].tolist()) == left
    assert "repeated events" in text


def test_a_large_log_says_how_much_disk_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table_log, "LARGE", 200)
    text = output(capsys, tmp_path, write(tmp_path / "log.csv", random_log()))
    assert f"temporary files: about 0.0 GB in {tmp_path / 'data'}" in text
    assert not (tmp_path / "data" / ".tables").exists()


def test_users_with_too_few_events_are_counted(tmp_path, capsys):
    log = [*random_log(), [99, 1, START], [99, 2, START]]
    text = output(capsys, tmp_path, write(tmp_path / "log.csv", log))
    assert "users: 1 of 31 have too few events to be evaluated, and only train" in text


# ---------------------------------------------------------------------- targets


def ends_of(data_dir: Path, split: str) -> list[tuple[int, int]]:
    """User re-id and number of events of each sequence."""
    _, offsets, users = open_split(data_dir, split)
    return list(zip(users.tolist(), np.diff(offsets).tolist(), strict=True))


def test_target_actions_are_held_out_with_all_before_them_as_history(tmp_path, capsys):
    kinds = {1: "vbvbv", 2: "vvvvb", 3: "bvbvv", 4: "vbbbv"}
    rows = [[u, k, START + k, {"v": "view", "b": "buy"}[kind]]
            for u, word in kinds.items() for k, kind in enumerate(word)]  # fmt: skip
    log = write(tmp_path / "log.csv", rows, "user,item,timestamp,kind\n")
    flags = ("--action", "kind", "--target_actions", "buy")
    text = output(capsys, tmp_path, log, *flags)
    assert "users: 2 of 4 have too few events to be evaluated" in text
    assert "events: 2 after the last one of --target_actions are in no split" in text
    data_dir = tmp_path / "data"
    assert ends_of(data_dir, "train") == [(1, 1), (2, 5), (3, 5), (4, 2)]
    assert ends_of(data_dir, "valid") == [(1, 2), (4, 3)]
    assert ends_of(data_dir, "test") == [(1, 4), (4, 4)]
    error = refusal(capsys, tmp_path, log, "--action", "kind", "--target_actions", "sell")
    assert "--target_actions: no type sell; there are buy, view" in error


def test_each_event_of_the_time_is_a_target_where_the_flag_says_so(tmp_path, capsys):
    rows = [[1, k, START + k] for k in range(6)] + [[2, k, START + k] for k in range(3, 6)]
    rows.append([3, 1, START + 5])
    log = write(tmp_path / "log.csv", rows)
    flags = ["--split", "time", "--cuts", str(START + 3), str(START + 5)]
    output(capsys, tmp_path, log, *flags, "--time_targets", "each")
    assert ends_of(tmp_path / "data", "train") == [(1, 3)]
    assert ends_of(tmp_path / "data", "valid") == [(1, 4), (1, 5), (2, 2)]
    assert ends_of(tmp_path / "data", "test") == [(1, 6), (2, 3)]
    output(capsys, tmp_path, log, *flags)
    assert ends_of(tmp_path / "data", "valid") == [(1, 5), (2, 2)]


# ---------------------------------------------------------------------- of one kind, but not all


def test_a_single_item_among_lists_is_refused(tmp_path, capsys):
    rows = [{"user": u, "item": ["a", "b", "c"], "timestamp": START + u} for u in range(9)]
    rows[4]["item"] = "d"
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = refusal(capsys, tmp_path, path, "--split", "none")
    assert """holds lists such as '["a","b","c"]' and single values such as 'd'""" in error


@pytest.mark.parametrize("dates", [("31/12/22", "01/01/23"), ("12/31/22", "1/15/23")])
def test_a_year_of_two_digits_is_refused(tmp_path, capsys, dates):
    """31/12/22 is no day of the year 31, 12/31/22 none of the year 22."""
    log = write(tmp_path / "log.csv", [[1, "a", dates[0]], [1, "b", dates[1]]])
    assert f"timestamp is '{dates[0]}', expected a number or" in refusal(capsys, tmp_path, log)
    day = "%d/%m/%y" if dates[0] == "31/12/22" else "%m/%d/%y"
    output(capsys, tmp_path, log, "--split", "none", "--time_format", day)
    assert (open_split(tmp_path / "data", "train")[0]["timestamp"] > START - 10**8).all()


def test_types_written_as_floats_are_those_written_as_whole_numbers(tmp_path, capsys):
    rows = [[1, "a", START, 4], [1, "b", START + 1, "4.0"], [1, "c", START + 2, 5]]
    log = write(tmp_path / "log.csv", rows, "user,item,timestamp,stars\n")
    output(capsys, tmp_path, log, "--split", "none", "--action", "stars")
    assert read_json(tmp_path / "data" / "manifest.json")["action_names"] == ["4", "5"]
    assert open_split(tmp_path / "data", "train")[0]["action_type"].tolist() == [0, 0, 1]


def test_a_column_of_parts_without_any_but_training_is_refused(tmp_path, capsys):
    rows = [[1, item, START + k, "train"] for k, item in enumerate("abc")]
    log = write(tmp_path / "log.csv", rows, "user,item,timestamp,part\n")
    error = refusal(capsys, tmp_path, log, "--split_column", "part")
    assert "no event to predict in part" in error


def test_ids_that_share_what_is_before_a_point_are_no_forms_of_one(tmp_path, capsys):
    ids = [f"com.shop{k}.app" for k in range(40)]
    log = write(tmp_path / "log.csv", [[1, i, START + k] for k, i in enumerate(ids[:20])])
    items = write(tmp_path / "items.csv", [[i, k % 3] for k, i in enumerate(ids)], "item,kind\n")
    text = output(capsys, tmp_path, log, "--split", "none", "--item_features", items)
    assert "warning" not in text


def test_dates_mean_utc_wherever_the_conversion_runs(tmp_path):
    rows = [[user, k, f"2024-01-0{k} 0{user}:30:00"] for user in (1, 2) for k in range(1, 6)]
    log = write(tmp_path / "log.csv", rows)
    cuts = ["--split", "time", "--cuts", "2024-01-04T01:00:00", "2024-01-05"]
    for zone in ("UTC", "Asia/Shanghai", "America/Los_Angeles"):
        command = [sys.executable, prepare_table.__file__, log, tmp_path / zone, *cuts]
        subprocess.run(command, check=True, env=os.environ | {"TZ": zone})
    zones = [tmp_path / "UTC", tmp_path / "Asia" / "Shanghai", tmp_path / "America/Los_Angeles"]
    for split in ("train", "valid", "test"):
        found = [open_split(zone, split)[0]["timestamp"].tolist() for zone in zones]
        assert found[0] == found[1] == found[2]
    first = datetime(2024, 1, 1, 1, 30, tzinfo=timezone.utc)
    assert open_split(zones[0], "train")[0]["timestamp"][0] == first.timestamp()


def test_a_history_of_dates_means_utc_too(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        assert history_source.time_of("2000-11-02") == 973_123_200
        assert history_source.time_of("2000-11-02T08:00:00+08:00") == 973_123_200
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_other_users_did_in_between_makes_no_event_a_repeated_one(tmp_path, capsys):
    rows = [[user, item, START + 5] for user, item in ("ax", "bx", "ax", "by")]
    log = write(tmp_path / "log.csv", rows)
    code, *_ = run(capsys, tmp_path, log, "--drop_repeated", "equal", "--split", "none")
    assert code == 0
    events, offsets, _ = open_split(tmp_path / "data", "test")
    assert (events["item_id"].tolist(), offsets.tolist()) == ([1, 1, 2], [0, 1, 3])

"""Recommendations in words: the export's own, brute force agrees, and every error is one line."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import recommend
import torch
from conftest import NUM_ITEMS, NUM_USERS, open_dataset, write_tiny
from pyarrow import parquet
from screen import cut

import main as main_module
from dataset import load_emb
from engine.trained_model import load_model
from files.data_folder import read_manifest
from files.data_writer import leave_one_out, write_dataset
from files.sequences import EVENT_DTYPE, Sequences, open_split

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [
    "--device=cpu", "--num_workers=0", "--num_epochs=1", "--batch_size=4", "--maxlen=6",
    "--hidden_units=8", "--attention_dim=5", "--linear_dim=6",
]  # fmt: skip
Row = namedtuple("Row", "rank cosine item name")
TITLES = ["Amélie", "七人の侍", "Alien", "", "a\tb\x1b[31m", "Up", "M"]
TEXT_IDS = ["tt1", "seven, samurai", "tt2", "03", "tt3", "tt4", "tt5"]


def train(folder: Path, *flags: str) -> Path:
    """Train on folder/data into folder/outputs, and export; the latter."""
    output = folder / "outputs"
    folders = [f"--data_dir={folder}/data", f"--output_dir={output}", f"--log_dir={folder}/logs"]
    assert main_module.main([*folders, *TRAIN]) == 0
    infer(folder, *flags)
    return output


def infer(folder: Path, *flags: str) -> None:
    output = folder / "outputs"
    folders = [f"--data_dir={folder}/data", f"--output_dir={output}"]
    checkpoint = f"--state_dict_path={output}/model_best.pt"
    assert main_module.main(["--inference_only", *folders, *TRAIN, checkpoint, *flags]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of data/ with every feature, and of outputs/, exported with a top 7."""
    folder = tmp_path_factory.mktemp("recommend")
    write_tiny(folder / "data")
    train(folder, "--top_k=7")
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """The same of 7 films with ids that are text, one of them without a title."""
    folder = tmp_path_factory.mktemp("films")
    events = np.empty(20, EVENT_DTYPE)
    events["item_id"] = np.tile([1, 2, 3, 4, 5], 4)
    events["action_type"], events["timestamp"] = -1, 0
    splits = leave_one_out(events, np.arange(0, 21, 5))
    ids = {"item_ids": TEXT_IDS, "user_ids": [5, 6, 7, 8]}
    write_dataset(folder / "data", splits, **ids, num_action_types=0, item_names=TITLES)
    train(folder)
    return folder


def flags_of(folder: Path) -> list[str]:
    return [f"--data_dir={folder}/data", f"--output_dir={folder}/outputs"]


def screen(capsys, folder: Path, *flags: object) -> str:
    capsys.readouterr()
    assert recommend.main([*flags_of(folder), *map(str, flags)]) == 0
    return capsys.readouterr().out


def rows_of(text: str) -> list[list[Row]]:
    """The ranked rows of each paragraph."""
    pattern = re.compile(r"^ +(\d+|-)  +(-?\d\.\d{4})  +(\S+)(?:  (.*))?$", re.MULTILINE)
    return [[Row(*found) for found in pattern.findall(part)] for part in text.split("\n\n")]


def error_of(capsys, folder: Path, *flags: object) -> str:
    capsys.readouterr()
    assert recommend.main([*flags_of(folder), *map(str, flags)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]


def exported(folder: Path, name: str) -> np.ndarray:
    return np.array(load_emb(folder / "outputs" / name))


def history_of(folder: Path, user: int) -> tuple[np.ndarray, int]:
    """A user's test history and the re-id of what came next."""
    events, offsets, users = open_split(folder / "data", "test")
    k = int(np.flatnonzero(users == user)[0])
    part = events[offsets[k] : offsets[k + 1]]
    return part[:-1], int(part["item_id"][-1])


# -------------------------------------------------------------------------------------- test users


@pytest.mark.parametrize("flag", ["--remove_seen", "--no-remove_seen"])
def test_what_is_printed_for_a_user_is_what_was_exported(copied, capsys, flag):
    infer(copied, "--top_k=7", flag)
    users = exported(copied, "user_embeddings/id.u64bin")[:, 0]
    top = exported(copied, "user_embeddings/topk.u64bin")
    assert len(users) == NUM_USERS
    for user, items in zip(users, top, strict=True):
        text = screen(capsys, copied, f"--user=user-{user - 1}", "--top_k=7", flag)
        assert [int(row.item) for row in rows_of(text)[1]] == items.tolist()


def test_the_items_of_a_history_of_ones_own_are_left_out_as_asked(trained, tmp_path, capsys):
    history, _ = history_of(trained, 1)
    path, num_seen = write_events(tmp_path / "events.csv", history), len(set(history["item_id"]))
    head, *lines = path.read_text().splitlines()
    of_users = tmp_path / "users.csv"
    of_users.write_text("\n".join([f"user,{head}", *(f"Ann,{line}" for line in lines)]))
    for flag, count in ("--remove_seen", NUM_ITEMS - num_seen), ("--no-remove_seen", NUM_ITEMS):
        flags = [f"--top_k={NUM_ITEMS}", flag]
        assert len(rows_of(screen(capsys, trained, f"--events={path}", *flags))[1]) == count
        target = tmp_path / f"{count}.csv"
        screen(capsys, trained, f"--events={of_users}", f"--write={target}", *flags)
        assert len(target.read_text().splitlines()) == 1 + count


@pytest.mark.parametrize("flag", ["--remove_seen", "--no-remove_seen"])
def test_rank_and_cosine_of_what_was_held_out_are_those_of_brute_force(trained, capsys, flag):
    items = exported(trained, "item_embeddings/embedding.fbin")
    queries = exported(trained, "user_embeddings/embedding.fbin")
    users = exported(trained, "user_embeddings/id.u64bin")[:, 0]
    for user, query in zip(users.tolist(), queries, strict=True):
        history, target = history_of(trained, user)
        scores = items @ query
        seen = set(history["item_id"].tolist()) if "no" not in flag else set()
        others = set(range(1, NUM_ITEMS + 1)) - seen - {target}
        rank = 1 + sum(scores[item - 1] >= scores[target - 1] for item in others)
        text = screen(capsys, trained, f"--user=user-{user - 1}", flag)
        assert f"the best of {NUM_ITEMS - len(seen)} items" in text
        assert ("held out, seen and so not ranked" in text) == (target in seen)
        (row,) = rows_of(text)[2]
        place = "-" if target in seen else str(rank)
        assert (row.rank, int(row.item)) == (place, 1000 + 3 * (target - 1))
        assert float(row.cosine) == pytest.approx(scores[target - 1], abs=1e-4)


def test_the_last_events_are_printed_with_time_action_id_and_name(trained, capsys):
    history, _ = history_of(trained, 3)
    lines = screen(capsys, trained, "--user=user-2").splitlines()
    assert lines[0] == f"user user-2: {len(history)} events, the last of them"
    shown = history[-recommend.NUM_RECENT :]
    for event, line in zip(shown, lines[1 : 1 + len(shown)], strict=True):
        item, kind = int(event["item_id"]), int(event["action_type"])
        time = str(np.datetime64(int(event["timestamp"]), "s")).replace("T", " ")
        words = [*time.split(), *["action", str(kind)] * (kind >= 0)]
        assert line.split() == [*words, str(1000 + 3 * (item - 1)), "item", str(item)]


def test_top_k_is_how_many_are_printed_and_ends_with_the_items(trained, capsys):
    flags = "--user=user-4", "--remove_seen"
    whole = rows_of(screen(capsys, trained, *flags, "--top_k=1000"))[1]
    history, _ = history_of(trained, 5)
    assert len(whole) == NUM_ITEMS - len(set(history["item_id"].tolist()))
    assert [int(row.rank) for row in whole] == list(range(1, len(whole) + 1))
    assert rows_of(screen(capsys, trained, *flags, "--top_k=3"))[1] == whole[:3]


def test_without_targets_nothing_was_held_out(tmp_path, capsys):
    write_tiny(tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["targets"]["test"] = "none"
    path.write_text(json.dumps(manifest))
    train(tmp_path)
    text = screen(capsys, tmp_path, "--user=user-0")
    assert len(rows_of(text)[1]) == 10 and "held out" not in text
    assert f"{len(history_of(tmp_path, 1)[0]) + 1} events" in text


def test_an_export_of_whole_histories_holds_nothing_out(copied, capsys):
    flags = [f"--data_dir={copied}/data", f"--output_dir={copied}/outputs", "--device=cpu"]
    checkpoint = f"--state_dict_path={copied}/outputs/model_best.pt"
    assert main_module.main(["--inference_only", "--whole_history", checkpoint, *flags]) == 0
    text = screen(capsys, copied, "--user=user-0")
    assert "held out" not in text
    assert f"{len(history_of(copied, 1)[0]) + 1} events" in text


# ------------------------------------------------------------------------------------- any history


def write_events(path: Path, history: np.ndarray) -> Path:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["item", "action", "timestamp"])
        for item, kind, time in history.tolist():
            table.writerow([1000 + 3 * (item - 1), kind if kind >= 0 else "", time])
    return path


def test_a_users_own_history_from_a_file_is_answered_as_in_the_test_split(
    trained, tmp_path, capsys
):
    for user in range(1, NUM_USERS + 1):
        history, _ = history_of(trained, user)
        events, offsets, _ = open_split(trained / "data", "test")
        time = int(events["timestamp"][offsets[user] - 1])  # known: --time_bias request
        path = write_events(tmp_path / "events.csv", history)
        name = f"--user=user-{user - 1}"
        told = screen(capsys, trained, name, f"--events={path}", f"--request_time={time}")
        expected = screen(capsys, trained, name)
        assert told.splitlines()[0] == f"{path}: {len(history)} events, the last of them"
        assert told.split("\n\n")[0].splitlines()[1:] == expected.split("\n\n")[0].splitlines()[1:]
        ranked, as_exported = rows_of(told)[1], rows_of(expected)[1]
        assert [row.item for row in ranked] == [row.item for row in as_exported]
        for one, other in zip(ranked, as_exported, strict=True):  # a lone user may round otherwise
            assert float(one.cosine) == pytest.approx(float(other.cosine), abs=2e-4)


def test_without_a_user_no_feature_of_a_user_is_known(trained, tmp_path, capsys):
    path = write_events(tmp_path / "events.csv", history_of(trained, 1)[0])
    anyone = screen(capsys, trained, f"--events={path}")
    assert anyone != screen(capsys, trained, f"--events={path}", "--user=user-0")
    checkpoint = trained / "outputs" / "model_best.pt"
    model = load_model(checkpoint, trained / "data", read_manifest(trained / "data"))
    model._users = lambda *_: None
    history, _ = history_of(trained, 1)
    whole = Sequences(history, np.array([0, len(history)]), np.ones(1, np.int32))
    splits = {"train": whole, "test": whole}
    ids = {"item_ids": range(NUM_ITEMS), "user_ids": range(NUM_USERS)}
    targets = {"test": "none"}
    write_dataset(tmp_path / "one", splits, **ids, num_action_types=3, targets=targets)
    dataset = open_dataset(tmp_path / "one", "test", 6, "batch")
    with torch.no_grad():
        query = model.predict(dataset.collate_fn(dataset[0]))
    scores = exported(trained, "item_embeddings/embedding.fbin") @ query[0].numpy()
    found = [int(row.item) for row in rows_of(anyone)[1]]  # seen ones too, as in the training
    assert found == [1000 + 3 * k for k in np.argsort(-scores)[:10].tolist()]


def test_the_time_of_the_question_counts(trained, tmp_path, capsys):
    history, _ = history_of(trained, 1)
    path, last = write_events(tmp_path / "events.csv", history), int(history["timestamp"][-1])
    told = [
        screen(capsys, trained, f"--events={path}", *flags)
        for flags in ([], [f"--request_time={last}"], [f"--request_time={last + 10**6}"])
    ]
    assert told[0] == told[1] != told[2]


def test_the_action_hoped_for_needs_a_model_that_knows_it_and_then_counts(
    trained, tmp_path, capsys
):
    path = write_events(tmp_path / "events.csv", history_of(trained, 1)[0])
    flags = [f"--events={path}", "--request_action=1"]
    assert "was trained without --target_action" in error_of(capsys, trained, *flags)
    write_tiny(tmp_path / "data")
    folders = [f"--data_dir={tmp_path}/data", f"--output_dir={tmp_path}/outputs"]
    more = [f"--log_dir={tmp_path}/logs", "--target_action", "--lr=0.1"]
    assert main_module.main([*folders, *TRAIN, *more]) == 0
    infer(tmp_path)
    unknown = screen(capsys, tmp_path, flags[0])
    assert screen(capsys, tmp_path, *flags) != unknown


def test_actions_go_by_their_names(tmp_path, capsys):
    events = np.ones(8, EVENT_DTYPE)
    events["action_type"], events["timestamp"] = [0, 1, 0, 1, 1, 0, 1, -1], 0
    splits = leave_one_out(events, np.array([0, 4, 8]))
    ids = {"item_ids": ["a", "b"], "user_ids": ["ann", "bob"], "num_action_types": 2}
    write_dataset(tmp_path / "data", splits, **ids, action_names=["see", "buy"])
    folders = [f"--data_dir={tmp_path}/data", f"--output_dir={tmp_path}/outputs"]
    flags = [f"--log_dir={tmp_path}/logs", "--target_action", "--lr=0.1", "--warmup_steps=0"]
    assert main_module.main([*folders, *TRAIN, *flags]) == 0
    infer(tmp_path)
    lines = screen(capsys, tmp_path, "--user=ann").splitlines()
    assert [line.split() for line in lines[1:4]] == [["see", "a"], ["buy", "a"], ["see", "a"]]

    def answer(rows: str, *flags: str) -> str:
        (tmp_path / "events.csv").write_text(f"item,action\n{rows}")
        return screen(capsys, tmp_path, f"--events={tmp_path}/events.csv", *flags)

    assert answer("a,buy\nb,\na,see") == answer("a,1\nb,\na,0") != answer("a,see\nb,\na,see")
    hoped = [answer("a,buy", f"--request_action={name}") for name in ("buy", "1", "see", "-1")]
    assert hoped[0] == hoped[1] and len(set(hoped)) == 3
    asked = [f"--events={tmp_path}/events.csv", "--request_action=sell"]
    assert f"sell: no action of {tmp_path}/data, expected see, buy, 0, 1, -1" in error_of(
        capsys, tmp_path, *asked
    )
    (tmp_path / "events.csv").write_text("item,action\na,sell\n")
    assert "line 2: action is 'sell', expected one of see, buy, 0, 1, or nothing" in error_of(
        capsys, tmp_path, asked[0]
    )


def test_events_may_come_in_any_order_and_as_json_lines_or_dates(trained, tmp_path, capsys):
    history, _ = history_of(trained, 1)
    expected = rows_of(screen(capsys, trained, f"--events={write_events(tmp_path / 'e', history)}"))
    shuffled = write_events(tmp_path / "shuffled.csv", history[::-1])
    lines = [
        json.dumps(
            {"item": 1000 + 3 * (item - 1), "timestamp": str(np.datetime64(time, "s"))}
            | ({"action": kind} if kind >= 0 else {})
        )
        for item, kind, time in history.tolist()
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    for path in (shuffled, tmp_path / "events.jsonl"):
        assert rows_of(screen(capsys, trained, f"--events={path}")) == expected


def write_users(path: Path, folder: Path, users: list[int]) -> Path:
    """The histories of test users in one table, their events mixed up, and some unknown items."""
    rows = []
    for user in users:
        for item, kind, time in history_of(folder, user)[0].tolist():
            kind = kind if kind >= 0 else ""
            rows.append([f"user-{user - 1}", 1000 + 3 * (item - 1), kind, time])
    rows += [["user-0", 7, "", 5], ["stranger", 8, "", 5]]
    np.random.default_rng(0).shuffle(rows)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["user", "item", "action", "timestamp"], *rows])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_of_users_gives_each_what_a_file_of_their_own_does(
    trained, tmp_path, capsys, suffix
):
    users, target = [3, 1, 9, 2], tmp_path / f"out{suffix}"
    path = write_users(tmp_path / "events.csv", trained, users)
    text = screen(capsys, trained, f"--events={path}", f"--write={target}", "--top_k=4")
    assert "left out: 2 events of items that" in text and ", and 1 users who have no" in text
    assert f"wrote {target}: 4 users, the best 4 items each" in text
    rows = parquet.read_table(target).to_pylist() if suffix == ".parquet" else None
    if rows is None:
        with open(target, newline="") as file:
            rows = list(csv.DictReader(file))
    assert {row["user"] for row in rows} == {f"user-{user - 1}" for user in users}
    for user in users:
        alone = write_events(tmp_path / "one.csv", history_of(trained, user)[0])
        flags = [f"--events={alone}", f"--user=user-{user - 1}", "--top_k=4"]
        expected = rows_of(screen(capsys, trained, *flags))[1]
        found = [row for row in rows if row["user"] == f"user-{user - 1}"]
        # Items are numbers in this log, so they are in Parquet; its users are texts.
        as_text = (
            [row["item"] for row in found]
            if suffix == ".csv"
            else [str(row["item"]) for row in found]
        )
        assert as_text == [row.item for row in expected]
        assert {type(row["item"]) for row in found} == {str if suffix == ".csv" else int}
        assert [int(row["rank"]) for row in found] == [1, 2, 3, 4]
        for row, other in zip(found, expected, strict=True):  # a batch may round otherwise
            assert float(row["score"]) == pytest.approx(float(other.cosine), abs=2e-4)


@pytest.mark.parametrize(
    ("text", "write", "message"),
    [
        ("user,item\na,1003\n", False, "histories of 1 users; name a file for their recomm"),
        ("item\n1003\n", True, "no column user, but --write is for histories of many users"),
        ("user,item\n,1003\n", True, "line 2: user is '', expected a user"),
        ("user,action\na,1\n", True, "line 2 has the columns user, action; expected item"),
        ("user,item\na,7\n", True, "none of its items is one of the 23 items of "),
    ],
)
def test_a_table_of_users_and_a_file_to_write_go_together(
    trained, tmp_path, capsys, text, write, message
):
    path, target = tmp_path / "events.csv", tmp_path / "out.csv"
    path.write_text(text)
    assert message in error_of(capsys, trained, f"--events={path}", *[f"--write={target}"] * write)
    assert not target.exists()


def test_items_alone_are_a_history(films, tmp_path, capsys):
    (tmp_path / "events.csv").write_text('item\n"seven, samurai"\n03\ntt2\n')
    text = screen(capsys, films, f"--events={tmp_path / 'events.csv'}")
    assert text.splitlines()[:4] == [
        f"{tmp_path / 'events.csv'}: 3 events, the last of them",
        "  seven, samurai  七人の侍",
        "              03",
        "             tt2  Alien",
    ]
    assert {row.item for row in rows_of(text)[1]} == {"tt1", "tt3", "tt4", "tt5"}


# ------------------------------------------------------------------------------------------- items


def test_the_items_nearest_to_an_item_are_those_of_brute_force(trained, capsys):
    items = exported(trained, "item_embeddings/embedding.fbin")
    for item in (1, 9, NUM_ITEMS):
        scores = items @ items[item - 1]
        scores[item - 1] = -np.inf
        original = 1000 + 3 * (item - 1)
        text = screen(capsys, trained, f"--item={original}", "--top_k=4")
        assert text.startswith(f"nearest to {original} item {item}, by cosine\n")
        best = np.argsort(-scores)[:4].tolist()
        assert [row[2:] for row in rows_of(text)[0]] == [
            (str(1000 + 3 * k), f"item {k + 1}") for k in best
        ]


def test_items_need_the_export_of_items_alone(copied, capsys):
    expected = screen(capsys, copied, "--item=1003")
    shutil.rmtree(copied / "outputs" / "user_embeddings")
    for path in [*copied.glob("outputs/*.pt"), *copied.glob("data/test_*")]:
        path.write_bytes(b"") if path.suffix == ".pt" else None
    assert screen(capsys, copied, "--item=1003") == expected


def test_without_names_and_without_an_indexer_the_re_ids_are_printed(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        np.array([3, 1, 2, 4], "<i4").tofile(tmp_path / "data" / f"{split}_data.bin")
        np.array([0, 4], "<i8").tofile(tmp_path / "data" / f"{split}_offsets.bin")
    train(tmp_path)
    text = screen(capsys, tmp_path, "--user=1")
    assert text.splitlines()[:4] == ["user 1: 3 events, the last of them", "  3", "  1", "  2"]
    assert [row.item for row in rows_of(text)[2]] == ["4"]
    assert {row.item for row in rows_of(screen(capsys, tmp_path, "--item=2"))[0]} == {*"134"}


# -------------------------------------------------------------------------------------- the screen


def test_no_control_character_of_a_title_reaches_the_screen(films, capsys):
    assert "tt3  a b [31m\n" in screen(capsys, films, "--item=tt1")


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("Alien", 5, "Alien"),
        ("Aliens", 5, "Alie…"),
        ("七人の侍", 8, "七人の侍"),
        ("七人の侍", 7, "七人の…"),
        ("七人の侍", 6, "七人…"),
        ("e\u0301te\u0301", 3, "e\u0301te\u0301"),
        ("", 3, ""),
    ],
)
def test_a_line_is_cut_to_the_columns_it_takes(text, width, expected):
    assert cut(text, width) == expected


def test_only_a_terminal_cuts_lines(trained, capsys, monkeypatch):
    whole = screen(capsys, trained, "--item=1003")
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 24)))
    assert screen(capsys, trained, "--item=1003") == whole
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    lines = screen(capsys, trained, "--item=1003").splitlines()
    assert max(map(len, lines)) == 20
    for line, uncut in zip(lines, whole.splitlines(), strict=True):
        assert line == uncut if len(uncut) <= 20 else line == uncut[:19] + "…"


@pytest.mark.slow
def test_a_pipe_that_cannot_spell_a_title_gets_question_marks(films):
    command = [sys.executable, "scripts/recommend.py", *flags_of(films), "--user=5"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  tt1  Am?lie\n" in done.stdout and "  seven, samurai  ????\n" in done.stdout


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "flags",
    [[], ["--user=1", "--item=1"], ["--item=1", "--events=e"], ["--user=1", "--request_time=5"],
     ["--user=1", "--request_action=1"], ["--item=1", "--state_dict_path=m.pt"],
     ["--events=e", "--write=e.txt"], ["--user=1", "--write=e.csv"],
     ["--events=e", "--user=1", "--write=e.csv"], ["--user=1", "--top_k=0"],
     ["--events=e", "--request_time=1700000000000"]],
)  # fmt: skip
def test_flags_that_make_no_question_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        recommend.main(flags)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


def test_an_unknown_user_or_item_is_an_error_that_says_what_there_is(trained, capsys):
    error = error_of(capsys, trained, "--user=42")
    expected = f"error: --user 42: no such user in {trained}/data; there are 11: user-0, user-1, "
    assert error == expected + "user-2, ..."
    error = error_of(capsys, trained, "--item=7")
    assert error.endswith(f"no such item in {trained}/data; there are 23: 1000, 1003, 1006, ...")


def test_a_user_who_only_trains_is_sent_to_a_file_of_events(tmp_path, capsys):
    events = np.ones(6, EVENT_DTYPE)
    splits = leave_one_out(events, np.array([0, 4, 6]))
    ids = {"item_ids": ["a", "b"], "user_ids": ["ann", "bob"]}
    write_dataset(tmp_path / "data", splits, **ids, num_action_types=2)
    train(tmp_path)
    assert "user ann: 3 events" in screen(capsys, tmp_path, "--user=ann")
    error = error_of(capsys, tmp_path, "--user=bob")
    assert "--user bob: 0 sequences in the test split" in error and "--events" in error


@pytest.mark.parametrize(("name", "flag"), [("item", "--item=1003"), ("user", "--user=user-3")])
def test_without_an_export_the_line_has_the_command_that_makes_it(copied, capsys, name, flag):
    shutil.rmtree(copied / "outputs" / f"{name}_embeddings")
    error = error_of(capsys, copied, flag)
    assert f"{copied}/outputs/{name}_embeddings: no export there; make one: python main.py" in error
    assert main_module.main([*error.split("python main.py ")[1].split(), *TRAIN]) == 0
    assert screen(capsys, copied, flag)


def test_an_export_that_was_not_finished_is_none(copied, capsys):
    (copied / "outputs" / "item_embeddings" / "manifest.json").unlink()
    assert "no export there" in error_of(capsys, copied, "--item=1003")


@pytest.mark.parametrize("content", ["[]", "{}", '{"n": 23, "checkpoint": "model_best.pt"}'])
def test_a_manifest_without_its_fields_is_refused(copied, capsys, content):
    (copied / "outputs" / "item_embeddings" / "manifest.json").write_text(content)
    assert "item_embeddings: damaged; export again" in error_of(capsys, copied, "--item=1003")


@pytest.mark.parametrize("name", ["embedding.fbin", "id.u64bin"])
def test_a_truncated_or_missing_file_of_the_export_is_named(copied, capsys, name):
    path = copied / "outputs" / "item_embeddings" / name
    path.write_bytes(path.read_bytes()[:-1])
    assert f"error: {path}: " in error_of(capsys, copied, "--item=1003")
    path.unlink()
    assert f"error: {path}: No such file" in error_of(capsys, copied, "--item=1003")


def test_an_export_of_a_candidate_set_is_refused_by_name(copied, capsys):
    path = copied / "outputs" / "item_embeddings" / "manifest.json"
    path.write_text(path.read_text().replace('"original"', '"retrieval"'))
    error = error_of(capsys, copied, "--item=1003")
    assert "exported with --candidates" in error and "export all items: python main.py" in error


def test_an_export_of_other_data_is_refused(copied, films, capsys):
    shutil.rmtree(copied / "data")
    shutil.copytree(films / "data", copied / "data")
    error = error_of(capsys, copied, "--item=tt1")
    assert "item_embeddings: its items are not those of" in error


def test_an_export_of_the_same_number_of_other_items_is_refused(copied, capsys):
    path = copied / "data" / "indexer.pkl"
    indexer = pickle.loads(path.read_bytes())
    first, second, *_ = indexer["i"]
    indexer["i"][first], indexer["i"][second] = 2, 1
    path.write_bytes(pickle.dumps(indexer, protocol=4))
    assert "its items are not those of" in error_of(capsys, copied, "--item=1003")


def test_an_export_of_as_many_other_texts_is_refused(films, tmp_path, capsys):
    folder = shutil.copytree(films, tmp_path / "films")
    path = folder / "data" / "indexer.pkl"
    indexer = pickle.loads(path.read_bytes())
    gone = min(indexer["i"])
    indexer["i"]["x" * len(gone)] = indexer["i"].pop(gone)
    path.write_bytes(pickle.dumps(indexer, protocol=4))
    assert "its items are not those of" in error_of(capsys, folder, "--item=tt1")


@pytest.mark.parametrize("change", ["checkpoint", "users", "data"])
def test_queries_of_another_export_than_the_items_are_refused(copied, capsys, change):
    folder = copied / "outputs" / "user_embeddings"
    if change == "checkpoint":
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text()) | {"checkpoint_sha256": "0" * 64}
        path.write_text(json.dumps(manifest))
    elif change == "data":  # the same items, and users of whom each may have another number
        path = copied / "data" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["files"]["train_users.bin"]["sha256"] = "0" * 64
        path.write_text(json.dumps(manifest))
    else:
        ids = np.fromfile(folder / "id.u64bin", "<u8")
        (ids + np.uint64(100) * (ids < 100)).tofile(folder / "id.u64bin")
    error = error_of(capsys, copied, "--user=user-3")
    assert "user_embeddings: not of the export in item_embeddings" in error


def test_a_checkpoint_that_is_gone_or_was_trained_on_since_is_refused(copied, tmp_path, capsys):
    path = write_events(tmp_path / "events.csv", history_of(copied, 1)[0])
    output = copied / "outputs"
    folders = [f"--data_dir={copied}/data", f"--output_dir={output}", f"--log_dir={tmp_path}/logs"]
    more = ["--resume=none", "--overwrite", "--seed=7"]
    assert main_module.main([*folders, *TRAIN, *more]) == 0
    error = error_of(capsys, copied, f"--events={path}")
    assert f"{output}/model_best.pt: is not the model that was exported; export again" in error
    (output / "model_best.pt").unlink()
    error = error_of(capsys, copied, f"--events={path}")
    assert f"{output}/model_best.pt: not there, but --events needs the checkpoint" in error


def test_the_checkpoint_may_lie_elsewhere_than_its_export(trained, copied, tmp_path, capsys):
    path = write_events(tmp_path / "events.csv", history_of(copied, 1)[0])
    shown = screen(capsys, copied, f"--events={path}")
    (copied / "outputs" / "model_best.pt").rename(tmp_path / "model_best.pt")
    flag = f"--state_dict_path={tmp_path}/model_best.pt"
    assert screen(capsys, copied, f"--events={path}", flag) == shown


def test_ids_are_read_as_the_converter_reads_them(trained, tmp_path, capsys):
    path = tmp_path / "events.csv"
    path.write_text("item,action\n1003,1\n1006,2\n")
    shown = screen(capsys, trained, f"--events={path}")
    path.write_text("item,action\n1003.0, 1\n 1006.00,2\n")
    assert screen(capsys, trained, f"--events={path}") == shown


def test_users_in_later_lines_alone_are_no_one_history(trained, tmp_path, capsys):
    path = tmp_path / "events.jsonl"
    path.write_text('{"item": 1003}\n{"item": 1006, "user": "bob"}\n')
    assert f"{path}: line 1 has the columns item; expected" in error_of(
        capsys, trained, f"--events={path}"
    )


def test_a_table_for_a_folder_that_is_not_there_is_refused_at_once(trained, tmp_path, capsys):
    flags = f"--events={tmp_path}/none.csv", f"--write={tmp_path}/absent/top.csv"
    assert "top.csv: no such folder; make it first" in error_of(capsys, trained, *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item\n1003\n7\n", "line 3: item is '7', expected one of the 23 items of "),
        ("item,action\n1003,3\n", "line 2: action is '3', expected one of 0, 1, 2, or nothing"),
        ("item,action\n1003,-1\n", "line 2: action is '-1', expected one of 0, 1, 2, or nothing"),
        ("item,action\n1003,like\n", "line 2: action is 'like', expected one of 0, 1, 2"),
        (
            "item,timestamp\n1003,noon\n",
            "line 2: timestamp is 'noon', expected Unix seconds, not milli",
        ),
        ("item,timestamp\n1003,1700000000000\n", "'1700000000000', expected Unix seconds"),
        ("item,timestamp\n1003,-5\n", "line 2: timestamp is '-5', expected Unix seconds"),
        ("item,timestamp\n1003,5\n1006,\n", "event 2 has no timestamp, but others have one; tell"),
        ("item,time\n1003,5\n", "line 2 has the columns item, time; expected item and, if known, "),
        ("1003\n1006\n", "line 2 has the columns 1003; expected item and, if known, action"),
        ("item,action\n1003\n", "line 2 has 1 fields, expected 2 (item, action)"),
        ("item\n\n", "no events in it, expected a row per event"),
        ("", "line 1 is '', expected the names of the columns"),
        ("item\n1003\n\n\n,\n", "line 5 has 2 fields, expected 1 (item)"),
    ],
)
def test_a_file_of_events_is_refused_by_line(trained, tmp_path, capsys, text, message):
    path = tmp_path / "events.csv"
    path.write_text(text)
    error = error_of(capsys, trained, f"--events={path}")
    assert error.startswith(f"error: {path}: ") and message in error


def test_a_json_line_that_names_no_item_is_refused_by_its_number(trained, tmp_path, capsys):
    path = tmp_path / "events.jsonl"
    path.write_text('{"item": 1003}\n\n{"action": 1, "timestamp": 5}\n')
    error = error_of(capsys, trained, f"--events={path}")
    assert f"{path}: line 3 has the columns action, timestamp; expected item" in error


def test_a_file_of_events_that_is_not_there_is_named(trained, tmp_path, capsys):
    error = error_of(capsys, trained, f"--events={tmp_path}/absent.csv")
    assert f"error: {tmp_path}/absent.csv: No such file" in error


def test_data_without_a_test_split_still_answers_what_needs_none(tmp_path, capsys):
    events = np.ones(4, EVENT_DTYPE)
    events["item_id"] = [1, 2, 1, 3]
    splits = {"train": Sequences(events, np.array([0, 4]), np.ones(1, np.int32))}
    ids = {"item_ids": ["a", "b", "c"], "user_ids": ["ann"]}
    write_dataset(tmp_path / "data", splits, **ids, num_action_types=2)
    train(tmp_path)
    (tmp_path / "events.csv").write_text("item\na\n")
    text = screen(capsys, tmp_path, f"--events={tmp_path}/events.csv")
    assert {row.item for row in rows_of(text)[1]} == {"b", "c"}
    assert len(rows_of(screen(capsys, tmp_path, "--item=a"))[0]) == 2
    assert "no test split there, only train" in error_of(capsys, tmp_path, "--user=ann")

"""The forms in which logs and tables come: each gives the same folder as the plain CSV file."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import duckdb
import prepare_table
import pytest

import table_database
from files.atomic_io import read_json
from files.data_folder import read_indexer, read_manifest
from files.sequences import open_split

pytestmark = pytest.mark.slow

Row = tuple[int, int, int]


def random_rows() -> list[Row]:
    """(user, item, time) of 9 users with 7 events each on 13 items, in no order."""
    rng, rows = random.Random(1), []
    for user in range(1, 10):
        time = 1_703_970_000
        for _ in range(7):
            time += rng.randrange(60, 24_000)
            rows.append((user, rng.randrange(1, 14), time))
    rng.shuffle(rows)
    return rows


ROWS = random_rows()
HEAD = "user,item,timestamp\n"
CSV = HEAD + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS)


def histories() -> dict[int, list[Row]]:
    return {u: sorted((r for r in ROWS if r[0] == u), key=lambda r: r[2]) for u in range(1, 10)}


def plain(folder: Path, text: str = CSV) -> dict:
    """The manifest of the plain CSV file."""
    folder = folder / "plain"
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text(text)
    assert prepare_table.main([str(folder / "log.csv"), str(folder / "data"), "--overwrite"]) == 0
    return read_json(folder / "data" / "manifest.json")


def refusal(capsys: pytest.CaptureFixture, folder: Path, *command: object) -> str:
    capsys.readouterr()
    where, *flags = map(str, command)
    assert prepare_table.main([where, str(folder / "data"), *flags]) == 1
    assert not (folder / "data").exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def converted(folder: Path, path: object, *flags: object) -> dict:
    """The manifest of the folder that the command writes."""
    command = [str(path), str(folder / "data"), *map(str, flags)]
    assert prepare_table.main(command) == 0
    return read_json(folder / "data" / "manifest.json")


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("log.csv.bz2", bz2.compress),
        ("log.csv.xz", lzma.compress),
        ("log.csv.GZ", gzip.compress),
        ("without_a_suffix", gzip.compress),
        ("utf16.csv", lambda text: text.decode().encode("utf-16")),
        ("byte_order_mark.csv", lambda text: b"\xef\xbb\xbf" + text),
        ("windows.csv", lambda text: text.replace(b"\n", b"\r\n")),
        ("excel.csv", lambda text: b"sep=;\n" + text.replace(b",", b";")),
        ("blank_after_comma.csv", lambda text: text.replace(b",", b", ")),
        ("colons.dat", lambda text: text.replace(b",", b"::")),
        ("blanks.txt", lambda text: text.replace(b",", b"  ")),
        ("hive.txt", lambda text: text.replace(b",", b"\x01")),
        ("quoted.csv", lambda text: text.replace(b",", b'","').replace(b"\n", b'"\n"')[:-1]),
    ],
)
def test_a_file_is_read_from_its_first_bytes_and_lines(tmp_path, name, pack):
    packed = pack(CSV.encode())
    (tmp_path / name).write_bytes(b'"' + packed if name == "quoted.csv" else packed)
    assert converted(tmp_path, tmp_path / name) == plain(tmp_path)


def test_zip_and_zstd_are_read(tmp_path):
    plain_manifest = plain(tmp_path)
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        archive.writestr("log.csv", CSV)
    assert converted(tmp_path, tmp_path / "log.zip") == plain_manifest
    source, zst = tmp_path / "plain" / "log.csv", tmp_path / "log.csv.zst"
    duckdb.execute(f"COPY (FROM read_csv('{source}')) TO '{zst}' (COMPRESSION zstd, HEADER)")
    assert converted(tmp_path, zst, "--overwrite") == plain_manifest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("book.xlsx", b"PK\x03\x04 and so on", "it is damaged"),
        ("old.xls", b"\xd0\xcf\x11\xe0 and so on", "an old Excel file; save it as CSV UTF-8"),
        ("log.feather", b"ARROW1 and so on", "an Arrow or Feather file; write it as Parquet"),
        ("log.pkl", b"\x80\x04 and so on", "a pickle; write it as CSV or Parquet"),
        ("log.csv.zst", b"\x28\xb5\x2f\xfd\x04\x00 and so on", "it is damaged or in another"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refusal(capsys, tmp_path, tmp_path / name)


def test_an_excel_file_is_named_from_what_its_archive_holds(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        archive.writestr("[Content_Types].xml", "")
    assert "log.zip: an Excel file; save it as CSV" in refusal(
        capsys, tmp_path, tmp_path / "log.zip"
    )


def write_parquet(path: Path, query: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    duckdb.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet)")


def test_a_folder_of_parts_several_files_and_a_pattern_are_one_log(tmp_path):
    expected = plain(tmp_path)
    lines = CSV.splitlines(keepends=True)
    for part, some in enumerate((lines[1:30], lines[30:])):
        (tmp_path / f"day-{part}.csv").write_text(HEAD + "".join(some))
        query = f"FROM read_csv('{tmp_path}/day-{part}.csv')"
        write_parquet(tmp_path / "hive.parquet" / "day=1" / f"part-0{part}.snappy.parquet", query)
    (tmp_path / "hive.parquet" / "_SUCCESS").touch()
    assert converted(tmp_path, tmp_path / "hive.parquet") == expected
    assert converted(tmp_path, tmp_path / "day-*.csv", "--overwrite") == expected
    paths = [str(tmp_path / f"day-{part}.csv") for part in range(2)]
    assert prepare_table.main([*paths, str(tmp_path / "several")]) == 0
    assert read_json(tmp_path / "several" / "manifest.json") == expected


def test_files_with_other_columns_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "1.csv").write_text(CSV)
    (tmp_path / "log" / "2.csv").write_text("item,user,timestamp\n3,4,5\n")
    error = refusal(capsys, tmp_path, tmp_path / "log")
    assert "2.csv: its columns are item, user, timestamp, expected user, item, timestamp" in error


def test_an_event_of_one_of_several_files_is_named_by_file_and_number(tmp_path, capsys):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "1.csv").write_text(CSV)
    (tmp_path / "log" / "2.csv").write_text(HEAD + "3,4,1703970000\n3,4,soon\n")
    error = refusal(capsys, tmp_path, tmp_path / "log")
    assert f"{tmp_path}/log/2.csv: event 2: timestamp is 'soon'" in error


def test_a_json_array_and_numbers_beside_texts_are_read(tmp_path):
    rows = [
        {"user": float(u) if k % 3 else u, "item": str(i) if k % 2 else i, "timestamp": t}
        for k, (u, i, t) in enumerate(ROWS)
    ]
    (tmp_path / "log.json").write_text(json.dumps(rows, indent=1))
    assert converted(tmp_path, tmp_path / "log.json") == plain(tmp_path)


def test_lists_in_a_row_per_user_are_events(tmp_path):
    users = [
        {"user": u, "item": [i for _, i, _ in rows], "timestamp": [t for *_, t in rows]}
        for u, rows in histories().items()
    ]
    expected = plain(tmp_path)
    lists = tmp_path / "lists.jsonl"
    lists.write_text("".join(json.dumps(user) + "\n" for user in users))
    assert converted(tmp_path, lists) == expected
    write_parquet(tmp_path / "lists.parquet", f"FROM '{lists}'")
    assert converted(tmp_path, tmp_path / "lists.parquet", "--overwrite") == expected
    text = "user,item,timestamp\n"
    text += "".join(
        f'{u["user"]},"{list(map(str, u["item"]))}","{u["timestamp"]}"\n' for u in users
    )
    (tmp_path / "python.csv").write_text(text)
    assert converted(tmp_path, tmp_path / "python.csv", "--overwrite") == expected
    text = text.translate({ord(c): None for c in "[]'\""}).replace(", ", " ")
    (tmp_path / "blanks.csv").write_text(text)
    flags = ("--list_delimiter", " ", "--overwrite")
    assert converted(tmp_path, tmp_path / "blanks.csv", *flags) == expected


def test_ids_that_look_like_lists_are_ids_on_request(tmp_path):
    path = tmp_path / "log.csv"
    rows = [f"{u},shop{u} sku{k},{k}" for u in range(1, 5) for k in range(1, 5)]
    path.write_text(HEAD + "\n".join(rows) + "\n")
    assert converted(tmp_path, path, "--list_delimiter", "none")["num_items"] == 16


def test_lists_without_the_flag_and_of_different_lengths_are_refused(tmp_path, capsys):
    path = tmp_path / "log.csv"
    path.write_text(HEAD + "".join(f"{u},3 {u} 5,9\n" for u in range(1, 9)))
    assert "--list_delimiter ' ' reads an event per" in refusal(capsys, tmp_path, path)
    path.write_text(HEAD + '1,"[1, 2]","[5, 6]"\n2,"[1, 2]","[5]"\n')
    error = refusal(capsys, tmp_path, path)
    assert "1 rows have lists of different lengths in item and timestamp" in error


def test_sessions_and_sequences_are_unfolded(tmp_path):
    sessions = [
        {"session": u, "event": "visit", "events": [{"aid": i, "ts": t * 1000} for _, i, t in rows]}
        for u, rows in histories().items()
    ]
    (tmp_path / "otto.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sessions))
    flags = ("--events_in", "events", "--user", "session", "--item", "aid", "--time", "ts")
    assert converted(tmp_path, tmp_path / "otto.jsonl", *flags) == plain(tmp_path)
    lines = (f"{u} {' '.join(str(i) for _, i, _ in rows)}\n" for u, rows in histories().items())
    (tmp_path / "sas.txt").write_text("".join(lines))
    converted(tmp_path, tmp_path / "sas.txt", "--format", "sequences", "--overwrite")
    events, offsets, _ = open_split(tmp_path / "data", "test")
    item_of = {k: i for i, k in read_indexer(tmp_path / "data")["i"].items()}
    found = [item_of[k] for k in events["item_id"][offsets[2] : offsets[3]].tolist()]
    assert found == [i for _, i, _ in histories()[3]]
    first, *rest = (tmp_path / "sas.txt").read_text().splitlines(keepends=True)
    (tmp_path / "one.txt").write_text(first)
    (tmp_path / "two.txt").write_text("".join(rest))
    before = (tmp_path / "data" / "test_data.bin").read_bytes()
    files = [str(tmp_path / name) for name in ("one.txt", "two.txt", "data")]
    assert prepare_table.main([*files, "--format", "sequences", "--overwrite"]) == 0
    assert (tmp_path / "data" / "test_data.bin").read_bytes() == before


def test_every_type_of_a_parquet_column_is_read(tmp_path):
    (tmp_path / "log.csv").write_text(CSV)
    query = (
        "SELECT user::DECIMAL(9, 2) AS user, encode(item::VARCHAR) AS item, "
        "to_timestamp(timestamp) AS timestamp FROM read_csv('" + str(tmp_path / "log.csv") + "')"
    )
    write_parquet(tmp_path / "log.parquet", query)
    assert converted(tmp_path, tmp_path / "log.parquet") == plain(tmp_path)


def test_a_struct_gives_a_column_for_each_field(tmp_path):
    (tmp_path / "log.csv").write_text(CSV)
    query = "SELECT {'id': user} AS who, item, timestamp FROM read_csv('"
    write_parquet(tmp_path / "log.parquet", query + str(tmp_path / "log.csv") + "')")
    assert converted(tmp_path, tmp_path / "log.parquet", "--user", "who.id") == plain(tmp_path)


def test_quotes_are_characters_where_the_flag_says_so(tmp_path):
    text = HEAD.replace(",", "\t") + 'a\t"x\t5\na\tx"y\t6\nb\tz\t7\n'
    (tmp_path / "log.tsv").write_text(text)
    converted(tmp_path, tmp_path / "log.tsv", "--quote", "none")
    assert list(read_indexer(tmp_path / "data")["i"]) == ['"x', 'x"y', "z"]
    (tmp_path / "log.csv").write_text("'user','item','timestamp'\n'a','x,y','5'\n'a','z','6'\n")
    converted(tmp_path, tmp_path / "log.csv", "--quote", "'", "--split", "none", "--overwrite")
    assert list(read_indexer(tmp_path / "data")["i"]) == ["x,y", "z"]


def test_a_delimiter_that_is_told_overrules_the_lines(tmp_path):
    (tmp_path / "log.txt").write_text("user|item|timestamp\na|x,1|5\na|y,1|6\na|z,1|7\na|x,1|8\n")
    converted(tmp_path, tmp_path / "log.txt", "--delimiter", "|")
    for character, flag in (("\x1f", r"\x1F"), ("§", "§"), ("\t", r"\t")):
        text = (tmp_path / "log.txt").read_text().replace("|", character)
        (tmp_path / "other.txt").write_text(text)
        converted(tmp_path, tmp_path / "other.txt", "--delimiter", flag, "--overwrite")
    assert list(read_indexer(tmp_path / "data")["i"]) == ["x,1", "y,1", "z,1"]


def test_tables_without_names_take_them_from_flags_and_are_refused_without(tmp_path, capsys):
    (tmp_path / "log.csv").write_text(CSV)
    (tmp_path / "items.csv").write_text(
        "".join(f"{i},c{i % 3},{10 + i % 4}\n" for i in range(1, 14))
    )
    (tmp_path / "users.dat").write_text("".join(f"{u}::M{u % 2}\n" for u in range(1, 10)))
    tables = ["--item_features", tmp_path / "items.csv", "--user_features", tmp_path / "users.dat"]
    error = refusal(capsys, tmp_path, tmp_path / "log.csv", *tables)
    assert "line 1 is '1,c1,11', which holds the id 1; name the columns with --item_header" in error
    names = ["--item_header", "item", "colour", "size", "--user_header", "user", "sex"]
    converted(tmp_path, tmp_path / "log.csv", *tables, *names)
    types = read_json(tmp_path / "data" / "feature_types.json")
    assert types["item_sparse"] == ["colour", "size"] and types["user_sparse"] == ["sex"]


def test_a_column_that_says_the_split_is_followed(tmp_path, capsys):
    parts, text = {}, "user,item,timestamp,part\n"
    for rows in histories().values():
        for k, row in enumerate(rows):
            parts[row] = "test" if k == 6 else "valid" if k in (2, 5) else "train"
            text += ",".join(map(str, row)) + f",{parts[row]}\n"
    (tmp_path / "log.csv").write_text(text)
    converted(tmp_path, tmp_path / "log.csv", "--split_column", "part")
    lengths = {}
    for split in ("train", "valid", "test"):
        _, offsets, users = open_split(tmp_path / "data", split)
        lengths[split] = (offsets[1:] - offsets[:-1]).tolist()
        assert users.tolist() == sorted([*range(1, 10)] * (2 if split == "valid" else 1))
    assert lengths == {"train": [4] * 9, "valid": [3, 6] * 9, "test": [7] * 9}
    (tmp_path / "log.csv").write_text(text.replace("valid", "later"))
    again = ["--split_column", "part", "--overwrite"]
    assert prepare_table.main([str(tmp_path / "log.csv"), str(tmp_path / "data"), *again]) == 1
    assert "part is 'later', expected train, valid or test" in capsys.readouterr().err


def test_without_a_split_everything_trains_and_every_user_is_a_query(tmp_path):
    plain(tmp_path)
    manifest = converted(tmp_path, tmp_path / "plain" / "log.csv", "--split", "none")
    assert manifest["targets"] == {"train": "next", "test": "none"}
    for split in ("train", "test"):
        assert len(open_split(tmp_path / "data", split)[0]) == len(ROWS)


def test_words_in_their_order_decide_within_a_second(tmp_path):
    text = "user,item,timestamp,kind\na,x,5,buy\na,x,5,view\na,x,5,cart\na,y,4,view\n"
    (tmp_path / "log.csv").write_text(text)
    flags = ["--action", "kind", "--order", "kind", "view", "cart", "buy"]
    converted(tmp_path, tmp_path / "log.csv", *flags)
    names = read_manifest(tmp_path / "data").action_names
    events = open_split(tmp_path / "data", "test")[0]
    assert [names[k] for k in events["action_type"]] == ["view", "view", "cart", "buy"]


# Logs as they are published, made up here: the commands stand in docs/own_data.md.
PUBLISHED = {
    "amazon": {"ratings_Beauty.csv": ["{u},{i},4.0,{t}"]},
    "retailrocket": {
        "events.csv": ["timestamp,visitorid,event,itemid,transactionid", "{t}123,{u},view,{i},"]
    },
    "yambda": {"flat/50m/listens.parquet": ["uid,item_id,timestamp,is_organic", "{u},{i},{t},1"]},
    "hm": {
        "transactions_train.csv": [
            "t_dat,customer_id,article_id,price,sales_channel_id",
            "{day},{u}abc,0{i:08},0.05,2",
        ],
        "articles.csv": ["article_id,product_type_name,colour", "0{i:08},type {k},red"],
        "customers.csv": ["customer_id,FN,age,postal_code", "{u}abc,1.0,{k},x"],
    },
    "mind": {
        "behaviors.tsv": ["{u}{i}\tU{u}\t11/{d}/2019 9:05:58 AM\tN1 N{i}\tN3-1 N4-0"],
        "news.tsv": ['N{i}\tsports\tsub{k}\tA "title\tText, long\thttps://x\t[]\t[]'],
    },
    "ml-10m": {
        "ml-10M100K/ratings.dat": ["{u}::{i}::{half}::{t}"],
        "ml-10M100K/movies.dat": ["{i}::Film {i} (1995)::Action|Comedy"],
    },
}


def write_published(folder: Path, files: dict[str, list[str]]) -> None:
    for name, lines in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        written = lines[:-1]
        for number, (u, i, t) in enumerate(ROWS):
            values = {"u": u, "i": i, "t": t, "k": i % 3, "d": 1 + number % 20, "half": i % 5 + 0.5}
            written.append(lines[-1].format(**values, day=f"2020-09-{1 + number % 20:02}"))
        path.write_text("\n".join(dict.fromkeys(written)) + "\n")
        if path.suffix == ".parquet":
            path.rename(folder / "rows.csv")
            write_parquet(path, f"FROM read_csv('{folder}/rows.csv')")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_documented_command_reads_the_published_form(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_published(tmp_path, PUBLISHED[name])
    docs = (Path(prepare_table.__file__).parent.parent / "docs" / "own_data.md").read_text()
    commands = [line for line in docs.splitlines() if f" data/{name} " in line]
    assert len(commands) == 1
    assert prepare_table.main(shlex.split(commands[0])[2:]) == 0
    manifest = read_manifest(Path("data") / name)
    assert manifest.num_users == 9 and manifest.num_items == 13


def test_no_extension_is_fetched_and_nothing_is_left_behind(tmp_path):
    with table_database.database(tmp_path / "new" / "data") as connection:
        for setting in ("autoinstall_known_extensions", "autoload_known_extensions"):
            query = f"SELECT current_setting('{setting}')::VARCHAR"
            assert connection.execute(query).fetchone()[0].lower() == "false"
        folder = connection.execute("SELECT current_setting('temp_directory')").fetchone()[0]
        assert Path(folder) == tmp_path / "new" / "data" / ".tables"
    assert not (tmp_path / "new").exists()


def test_what_needs_no_tables_runs_without_duckdb():
    hide = "import sys; sys.modules['duckdb'] = None; sys.path[:0] = ['.', 'scripts']; "
    command = hide + "import prepare_movielens, prepare_tencentgr, recommend, inspect_data"
    root = Path(prepare_table.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", command], cwd=root).returncode == 0


def test_a_line_with_another_number_of_blanks_is_shown(tmp_path, capsys):
    (tmp_path / "log.txt").write_text(CSV.replace(",", " ") + "1 2\n")
    error = refusal(capsys, tmp_path, tmp_path / "log.txt", "--delimiter", " ")
    assert "a line without 3 fields by blanks: 1 2" in error


def test_brackets_in_a_files_name_are_no_pattern(tmp_path):
    for name, item in (("log[1].csv", "a"), ("log1.csv", "b")):
        (tmp_path / name).write_text(f"user,item,timestamp\n1,{item},1703970000\n1,c,1703970001\n")
    folder = tmp_path / "data"
    assert prepare_table.main([str(tmp_path / "log[1].csv"), str(folder), "--split", "none"]) == 0
    assert read_indexer(folder)["i"] == {"a": 1, "c": 2}


def test_a_line_longer_than_a_csv_field_of_python_is_read(tmp_path):
    items = " ".join(map(str, range(30_000)))
    (tmp_path / "log.csv").write_text(f"user,items\n1,{items}\n2,{items}\n")
    flags = ["--split", "none", "--item", "items", "--list_delimiter", " ", "--time", "none"]
    folder = tmp_path / "data"
    assert prepare_table.main([str(tmp_path / "log.csv"), str(folder), *flags]) == 0
    assert read_manifest(folder).num_items == 30_000

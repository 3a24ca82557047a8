"""A shop's log of two weeks; in the second an item, a user and values are new, one item is gone.

Item 20 and user 40 are new, item 14 has no event any more. Item 3 has another colour, which is new,
and item 4 got so dear that a fresh conversion would take the logarithm of the prices.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

import prepare_table

START, WEEK = 1_700_000_000, 7 * 24 * 3600
NEW_ITEM, NEW_USER, GONE, RECOLOURED, DEARER = 20, 40, 14, 3, 4
COLOURS, TAGS = ("blue", "green", "red"), ("old|sale", "sale", "new|old")
FLAGS = ("--action", "kind", "--item_names", "title", "--drop", "title", "--min_user_events", "2")


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    rows = list(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def events(week: int) -> list[dict]:
    """8 events a week of 9 users, over the items but 14 and 20."""
    return [
        {
            "user": 31 + user,
            "item": 1 + (5 * k + 3 * user * week) % (GONE - 1),
            "kind": "buy" if (k + user) % 3 == 0 else "view",
            "timestamp": START + week * WEEK + 1000 * k + user,
        }
        for user in range(9)
        for k in range(8)
    ]


def log_of(week: int) -> list[dict]:
    """All events up to the end of a week, 1 or 2; in the second those of item 14 are lost."""
    if week == 1:
        return [*events(1), {"user": 31, "item": GONE, "kind": "view", "timestamp": START}]
    new = [(31, NEW_ITEM, "view"), (NEW_USER, 5, "refund"), (NEW_USER, NEW_ITEM, "buy")]
    new += [(NEW_USER, item, "view") for item in (6, 7, 8)]
    names = ("user", "item", "kind", "timestamp")
    later = START + 3 * WEEK
    new = [dict(zip(names, (*row, later + k), strict=True)) for k, row in enumerate(new)]
    return [*events(1), *events(2), *new]


def items_of(week: int) -> list[dict]:
    rows = [
        {
            "item": k,
            "title": f"thing {k}",
            "colour": COLOURS[k % 3],
            "tags": TAGS[k % 3 - k % 2],
            "price": 5.5 + k,
            "weight": "" if k % 5 == 0 else 0.5 * k,
        }
        for k in range(1, GONE + 1)
    ]
    if week == 2:
        rows[RECOLOURED - 1]["colour"] = "amber"
        rows[DEARER - 1]["price"] = 99_999.5
        new = {"title": "a new thing", "colour": "red", "tags": "new|vegan", "price": 7.5}
        rows.append({"item": NEW_ITEM, "weight": "", **new})
    return rows


def users_of(week: int) -> list[dict]:
    users = [*range(31, 40), *([NEW_USER] if week == 2 else [])]
    return [{"user": user, "city": ("Rome", "Oslo")[user % 2]} for user in users]


def convert(folder: Path, week: int, *flags: object, name: str | None = None) -> Path:
    """The data folder of a week, in `folder`."""
    source, data_dir = folder / f"tables{week}", folder / (name or f"week{week}")
    source.mkdir(exist_ok=True)
    tables = {"log": log_of(week), "items": items_of(week), "users": users_of(week)}
    log, items, users = (write_rows(source / f"{n}.csv", rows) for n, rows in tables.items())
    command = [log, data_dir, "--item_features", items, "--user_features", users, *FLAGS, *flags]
    assert prepare_table.main([*map(str, command)]) == 0
    return data_dir

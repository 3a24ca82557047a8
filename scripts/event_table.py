"""Histories in a table, of one user or of many, in the ids of the log."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files.atomic_io import DataError
from files.sequences import EVENT_DTYPE
from history_source import Row, parsed, read_rows, time_of

COLUMNS = {"user", "item", "action", "timestamp"}
LATEST = 1e11  # the year 5138 in seconds; a time beyond it is in milliseconds


class Histories(NamedTuple):
    """The events of S users, each user's in the order of time, or without times of the table."""

    users: list[str]  # (S,) as the table has them; [""] without a column of them
    events: np.ndarray  # (E,) EVENT_DTYPE
    offsets: np.ndarray  # (S + 1,) int64
    num_unknown: int  # events of unknown items, which are left out
    num_left_out: int  # users who have no others


def read_histories(
    path: Path, item_ids: Sequence[str], action_types: Mapping[str, int], data_dir: Path
) -> Histories:
    """The table's histories. Unknown items are left out where it has users, and else refused.

    `item_ids`: (X + 1,) of the data by re-id. `action_types`: numbers by name.

    Raises:
        DataError: a line is refused, or no event is left.
    """
    known = {text: re_id for re_id, text in enumerate(item_ids) if re_id}
    items = f"one of the {len(known):,} items of {data_dir}: {examples(item_ids)}"
    types = f"one of {', '.join(action_types)}, or nothing"
    dates = "Unix seconds, not milliseconds, or an ISO date, or nothing"
    actions, rows = {**action_types, "": -1}, read_rows(path)
    if not rows:
        raise DataError(f"{path}: no events in it, expected a row per event")
    has_users = any("user" in row.record for row in rows)
    check_columns(path, rows, {"item", "user"} if has_users else {"item"})
    events, codes, users = np.empty(len(rows), EVENT_DTYPE), np.zeros(len(rows), np.int64), [""]
    if has_users:
        users, codes = first_seen(parsed(path, rows, "user", named, "a user"))
        events["item_id"] = parsed(path, rows, "item", partial(member_or_0, known), "an item")
    else:
        events["item_id"] = parsed(path, rows, "item", partial(member, known), items)
    action = partial(member, actions)
    events["action_type"] = parsed(path, rows, "action", action, types)
    events["timestamp"] = parsed(path, rows, "timestamp", seconds, dates)
    check_times(path, events["timestamp"])
    found = grouped(events, codes, users)
    if not len(found.events):
        raise DataError(f"{path}: none of its items is {items}")
    return found


def first_seen(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different texts in the order in which they come, and each text's place among them."""
    places: dict[str, int] = {}
    codes = np.array([places.setdefault(text, len(places)) for text in texts])
    return list(places), codes


def grouped(events: np.ndarray, codes: np.ndarray, users: Sequence[str]) -> Histories:
    """Events of known items by user, in the order in which the users come."""
    is_known = events["item_id"] > 0
    num_unknown = len(events) - int(is_known.sum())
    events, codes = events[is_known], codes[is_known]
    order = np.lexsort((events["timestamp"], codes))  # stable
    counts = np.bincount(codes, minlength=len(users))
    left = np.flatnonzero(counts)
    offsets = np.append(0, counts[left].cumsum())
    num_left_out = len(users) - len(left)
    names = [users[code] for code in left.tolist()]
    return Histories(names, events[order], offsets, num_unknown, num_left_out)


def check_columns(path: Path, rows: list[Row], needed: set[str]) -> None:
    for line, record in rows:
        if needed - record.keys() or record.keys() - COLUMNS:
            raise DataError(
                f"{path}: line {line} has the columns {', '.join(record)}; expected item and, "
                "if known, action and timestamp, named in the first line or as JSON keys; and user "
                "for histories of many users"
            )


def check_times(path: Path, times: np.ndarray) -> None:
    if times.any() and not times.all():
        raise DataError(
            f"{path}: event {times.argmin() + 1} has no timestamp, but others have one; "
            "tell all of them, or none and the oldest event first"
        )


def examples(known: Sequence[str]) -> str:
    return ", ".join(known[1:4]) + ", ..." * (len(known) > 4)


def member(known: Mapping[str, int], text: str) -> int:
    """Its number; 5.0 is 5, as prepare_table.py reads it."""
    text = text if text in known else re.sub(r"\.0+$", "", text)
    if text not in known:
        raise ValueError(text)
    return known[text]


def member_or_0(known: Mapping[str, int], text: str) -> int:
    try:
        return member(known, text)
    except ValueError:
        return 0


def named(text: str) -> str:
    if not text:
        raise ValueError("missing")
    return text


def seconds(text: str) -> int:
    value = time_of(text or "0")
    if not 0 <= value < LATEST:
        raise ValueError(text)
    return int(value)

"""The one writer of data folders, whole or piece by piece, and the leave-one-out splits.

docs/data_format.md describes every file.
"""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files.atomic_io import DataError, atomic_write, file_entry, read_json, write_json
from files.data_folder import FORMAT_VERSION, SPLITS, Manifest, digest_of_ids
from files.sequences import EVENT_DTYPE, OFFSET_DTYPE, USER_DTYPE, Sequences, gather, split_path

VECTOR_ROWS = 20_000  # written at once
# What may be written below, as patterns; a writer that did not finish may have left any of it.
WRITTEN = (
    *(f"{split}_{what}.bin" for split in SPLITS for what in ("data", "offsets", "users")),
    *("*_feat_dict.json", "feature_types.json", "feat_statistics.json"),
    *("feature_default_value.json", "indexer.pkl", "item_names.txt", "creative_emb/emb_*_*.npy"),
    *(".*.tmp", "creative_emb/.*.tmp", "candidates/.*.tmp"),
    *("candidates/*_ids.bin", "candidates/item_feat_dict.json", "candidates/feat*.json"),
)

CODED = ("sparse", "array")  # kinds whose values are numbers of raw values


class Column(NamedTuple):
    """A feature to write: one value per item (or user), the first belonging to re-id 1."""

    kind: str  # "sparse" | "array" | "continual", or a custom kind
    values: Sequence[Any]  # int >= 0 (0 unknown) | list of int >= 1 | float; None: missing
    # What the numbers stand for: the raw values of 1, 2, ..., each once, or what was done to them.
    # A model is refused data in which that is something else. None: not known, nothing is compared.
    meaning: Sequence[Any] | None = None
    default: float = 0  # of an item without a value; lists have none


def leave_one_out(events: np.ndarray, offsets: np.ndarray) -> dict[str, Sequences]:
    """The splits of every leave-one-out setting: the last event is test, the one before valid.

    train has all events but the last two; valid ends with the last but one as its target; test
    has every event, the last as its target. Sequences below 3 events are in train only, whole.

    Args:
        events: (E,) EVENT_DTYPE, each user's in order of time.
        offsets: (S + 1,) int64; sequence k is user k + 1.
    """
    starts, ends = offsets[:-1], offsets[1:]
    user_ids = np.arange(1, len(offsets), dtype=USER_DTYPE)
    is_long = ends - starts >= 3
    splits = {"train": gather(events, starts, np.where(is_long, ends - 2, ends), user_ids)}
    for split, held_out in (("valid", 1), ("test", 0)):
        splits[split] = gather(events, starts[is_long], ends[is_long] - held_out, user_ids[is_long])
    return splits


def write_dataset(
    data_dir: str | Path,
    splits: Mapping[str, Sequences | Iterable[Sequences]],
    *,
    item_ids: Sequence[Any],
    user_ids: Sequence[Any],
    num_action_types: int,
    targets: Mapping[str, str] | None = None,
    item_features: Mapping[str, Column] | None = None,
    user_features: Mapping[str, Column] | None = None,
    item_vectors: Mapping[str, np.ndarray] | None = None,
    item_names: Sequence[str] | None = None,
    action_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a data folder; its manifest is finished last, so a folder with one is complete.

    Args:
        data_dir: a new or empty folder.
        splits: "train", and "valid" and "test" if there are any: sequences, or chunks of them.
        item_ids, user_ids: the original id of re-id 1, 2, ...
        num_action_types: action types are 0..num_action_types - 1, or -1.
        targets: split -> "last" | "none" for valid and test; "last" if not given.
        item_features, user_features: feature id -> Column.
        item_vectors: feature id -> (X, W) float, NaN rows for items without a vector.
        item_names: a line of text per item, for people.
        action_names: of the action types 0, 1, ..., all different.
        overwrite: in place of the data that the folder holds.

    Raises:
        DataError, ValueError: nothing is written, as the folder is not empty, lengths differ, an id
            occurs twice, or a number is not finite. Other values are checked when they are read.
    """
    data_dir, files, item_vectors = Path(data_dir), [], item_vectors or {}
    sides = {"item": item_features or {}, "user": user_features or {}}
    columns = sides["item"] | sides["user"]
    indexer = {"u": _numbered("user_ids", user_ids), "i": _numbered("item_ids", item_ids)}
    indexer["f"] = _raw_values(columns)
    if item_names is not None and len(item_names) != len(item_ids):
        raise ValueError(f"item_names: {len(item_names)} names, not {len(item_ids)}")
    if action_names is not None and len(set(action_names)) != num_action_types:
        raise ValueError(f"action_names: {list(action_names)}, not {num_action_types} names")
    _check_features(data_dir, sides, item_vectors, {"item": len(item_ids), "user": len(user_ids)})
    begin_folder(data_dir, overwrite)
    for split, chunks in splits.items():
        files += write_split(data_dir, split, [chunks] if isinstance(chunks, Sequences) else chunks)
    with atomic_write(data_dir / "indexer.pkl") as file:
        pickle.dump(indexer, file, protocol=4)
    files += ["indexer.pkl", *_write_features(data_dir, sides, list(item_vectors))]
    files += [_write_vectors(data_dir, name, vectors) for name, vectors in item_vectors.items()]
    if item_names is not None:
        files.append(_write_names(data_dir, item_names))
    counts = len(item_ids), len(user_ids), num_action_types
    targets = {s: "next" if s == "train" else "last" for s in splits} | dict(targets or {})
    meanings = {i: c.meaning for i, c in columns.items() if c.meaning is not None} | indexer["f"]
    digests = {i: digest_of_ids(meaning) for i, meaning in meanings.items()}
    names = None if action_names is None else list(action_names)
    manifest = Manifest(*counts, targets, digest_of_ids(indexer["i"]), names, digests)
    finish_folder(data_dir, manifest, files)


def _numbered(what: str, ids: Sequence[Any]) -> dict[Any, int]:
    """Re-id of each original id."""
    numbers = {_plain(original): k for k, original in enumerate(ids, 1)}
    if len(numbers) != len(ids):
        raise ValueError(f"an original id occurs twice in {what}")
    return numbers


def _raw_values(columns: Mapping[str, Column]) -> dict[str, dict[Any, int]]:
    """Number of each raw value, by feature id, where the values are known."""
    coded = {i: c for i, c in columns.items() if c.kind in CODED and c.meaning is not None}
    numbers = {i: _numbered(f"the values of {i}", c.meaning) for i, c in coded.items()}
    for i, column in coded.items():
        if len(numbers[i]) < (largest := _largest(column)):
            raise ValueError(f"{i}: {len(numbers[i])} raw values, but a number is {largest}")
    return numbers


def _check_features(
    data_dir: Path,
    sides: Mapping[str, Mapping[str, Column]],
    item_vectors: Mapping[str, np.ndarray],
    num_rows: Mapping[str, int],
) -> None:
    columns = [(side, i, c) for side, named in sides.items() for i, c in named.items()]
    columns += [("item", i, Column("emb", vectors)) for i, vectors in item_vectors.items()]
    twice = [i for i, count in Counter(i for _, i, _ in columns).items() if count > 1]
    if twice:
        raise DataError(
            f"{data_dir}: feature {twice[0]} would be listed twice, but an id is unique over the "
            "features of items and users and the vectors; rename one of the two"
        )
    for side, i, column in columns:
        if len(column.values) != num_rows[side]:
            raise ValueError(f"{i}: {len(column.values)} values, not {num_rows[side]}")

        for row, value in enumerate(column.values if column.kind == "continual" else (), 1):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{i}: {value} for {side} {row}; where there is no number, None")


# What write_dataset consists of, for a converter that streams or has some files ready.


def check_folder(data_dir: Path, overwrite: bool = False) -> list[Path]:
    """The files of older data, or of an unfinished conversion, that new data may take the place of.

    Raises:
        DataError: the folder holds data and `overwrite` is off, or files that no manifest of ours
            names.
    """
    path = data_dir / "manifest.json"
    if not path.exists():
        if data_dir.is_dir() and any(file.name[0] != "." for file in data_dir.iterdir()):
            raise DataError(f"{data_dir}: not empty; name a new folder to write, or empty this one")
        return []
    old = read_json(path)
    if not isinstance(old, dict) or "format_version" not in old:
        raise DataError(f"{path}: of another program; name another folder to write")
    if old.get("is_unfinished"):
        linked = [data_dir / name for name in old.get("linked", ())]
        return linked + [file for pattern in WRITTEN for file in data_dir.glob(pattern)]
    if not overwrite:
        raise DataError(f"{data_dir}: holds data; add --overwrite, or name another folder")
    return [data_dir / name for name in old.get("files", ())]


def begin_folder(data_dir: Path, overwrite: bool = False, linked: Sequence[str] = ()) -> None:
    """Make a folder for new data; until `finish_folder`, its manifest says that it is unfinished.

    Older data, as `check_folder` has it, is removed; other files stay. `linked`: names of files
    that the caller puts there, beside those of the functions below.
    """
    files = check_folder(data_dir, overwrite)
    data_dir.mkdir(parents=True, exist_ok=True)
    unfinished = {"format_version": FORMAT_VERSION, "is_unfinished": True, "linked": [*linked]}
    write_json(data_dir / "manifest.json", unfinished)
    for file in files:  # but none that is elsewhere, by a link or a wrong name
        if file.parent.resolve().is_relative_to(data_dir.resolve()):
            file.unlink(missing_ok=True)


def finish_folder(data_dir: Path, manifest: Manifest, files: Sequence[str]) -> None:
    """Write manifest.json, with the sizes and hashes of `files`."""
    head = {"format_version": FORMAT_VERSION, "event_dtype": EVENT_DTYPE.descr}
    entries = {name: file_entry(data_dir / name) for name in files}
    write_json(data_dir / "manifest.json", head | manifest._asdict() | {"files": entries})


def _plain(value: Any) -> Any:
    """A numpy scalar or array, or a list of scalars, as Python's own types."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def write_split(data_dir: Path, split: str, chunks: Iterable[Sequences]) -> list[str]:
    """Write the three files of a split; their names."""
    paths = [split_path(data_dir, split, what) for what in ("data", "offsets", "users")]
    with ExitStack() as complete:
        data, offsets, users = (complete.enter_context(atomic_write(path)) for path in paths)
        total = 0
        offsets.write(np.zeros(1, OFFSET_DTYPE).tobytes())
        for chunk in chunks:
            data.write(np.ascontiguousarray(chunk.events, EVENT_DTYPE).tobytes())
            offsets.write((chunk.offsets[1:] + total).astype(OFFSET_DTYPE).tobytes())
            users.write(chunk.user_ids.astype(USER_DTYPE).tobytes())
            total += len(chunk.events)
    return [path.name for path in paths]


def _write_features(
    data_dir: Path, sides: Mapping[str, Mapping[str, Column]], vector_ids: list[str]
) -> list[str]:
    if not any(sides.values()):
        return []
    types: dict[str, list[str]] = {"item_emb": vector_ids}
    statistics, defaults, names = {}, {}, []
    for side, columns in sides.items():
        for feature_id, column in columns.items():
            types.setdefault(f"{side}_{column.kind}", []).append(feature_id)
            defaults[feature_id] = [] if column.kind == "array" else column.default
            if column.kind in CODED:
                known = 0 if column.meaning is None else len(column.meaning)
                statistics[feature_id] = max(known, _largest(column))
        if columns:
            path = data_dir / f"{side}_feat_dict.json"
            names.append(write_records(path, _records(columns)))
    return names + write_schema(data_dir, types, statistics, defaults)


def write_schema(data_dir: Path, types: dict, statistics: dict, defaults: dict) -> list[str]:
    """Write the three small files that describe the features; their names."""
    names = ["feature_types.json", "feat_statistics.json", "feature_default_value.json"]
    for name, content in zip(names, (types, statistics, defaults), strict=True):
        write_json(data_dir / name, content)
    return names


def _largest(column: Column) -> int:
    rows = column.values if column.kind == "array" else [column.values]
    return max((int(v) for row in rows if row is not None for v in row if v is not None), default=0)


def _records(columns: Mapping[str, Column]) -> Iterator[tuple[int, str]]:
    """Re-id and JSON text of each item (or user)."""
    rows = zip(*(column.values for column in columns.values()), strict=True)
    for re_id, row in enumerate(rows, 1):
        record = {k: _plain(v) for k, v in zip(columns, row, strict=True) if v is not None}
        yield re_id, json.dumps(record, allow_nan=False)


def write_records(path: Path, records: Iterable[tuple[int, str]]) -> str:
    """Write a *_feat_dict.json from re-ids and JSON texts of objects, a line each; its name."""
    with atomic_write(path) as file:
        separator = "{"
        for re_id, text in records:
            file.write(f'{separator}\n"{re_id}": {text}'.encode())
            separator = ","
        file.write(b"{}\n" if separator == "{" else b"\n}\n")
    return path.name


def _write_names(data_dir: Path, item_names: Sequence[str]) -> str:
    with atomic_write(data_dir / "item_names.txt") as file:
        file.writelines((" ".join(name.splitlines()) + "\n").encode() for name in item_names)
    return "item_names.txt"


def _write_vectors(data_dir: Path, feature_id: str, vectors: np.ndarray) -> str:
    num_rows, width = vectors.shape
    name = f"creative_emb/emb_{feature_id}_{width}.npy"
    (data_dir / "creative_emb").mkdir(exist_ok=True)
    with atomic_write(data_dir / name) as file:
        layout = {"descr": "<f4", "fortran_order": False, "shape": (num_rows + 1, width)}
        np.lib.format.write_array_header_1_0(file, layout)
        file.write(np.full(width, np.nan, "<f4").tobytes())  # row 0 is padding
        for start in range(0, num_rows, VECTOR_ROWS):
            file.write(vectors[start : start + VECTOR_ROWS].astype("<f4").tobytes())
    return name

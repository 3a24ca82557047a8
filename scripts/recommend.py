"""What the model recommends, in plain words: to a user, for any history, and beside an item.

Reads what `main.py --inference_only` wrote. A user's query lies there, and items need none; only
--events needs the checkpoint too, to turn a history into a query.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from dataset import MyDataset, Negatives, load_emb
from dot_product_similarity import DotProductSimilarity
from engine.export import read_request
from engine.flags import at_least, unix_seconds
from engine.top_items import newest_histories
from engine.trained_model import load_model
from files.atomic_io import DataError, exit_code, read_json
from files.data_folder import (
    Manifest,
    check_re_ids,
    fingerprint,
    read_indexer,
    read_item_names,
    read_manifest,
)
from files.data_writer import finish_folder, write_split
from files.sequences import EVENT_DTYPE, USER_DTYPE, Sequences
from model import HSTUModel
from table_source import Rows, date, parsed, read_rows, time_of

NUM_RECENT = 5  # events shown
COLUMNS = {"item", "action", "timestamp"}
LATEST = 1e11  # the year 5138 in seconds; a time beyond it is in milliseconds


class Export(NamedTuple):
    """The exported items, X of them in the order of their re-ids, and what to call them."""

    manifest: Manifest
    embeddings: torch.Tensor  # (X, D) float32 of length 1
    item_ids: list[str]  # (X + 1) the original ids; the first is unused
    item_names: list[str]  # (X + 1) empty where there is none
    user_ids: list[str]  # (U + 1)
    checkpoint: str  # file name
    checkpoint_sha256: str
    removes_seen: bool  # its top items leave out what a user has seen


class Question(NamedTuple):
    """What to recommend for."""

    query: torch.Tensor  # (1, D) float32 of length 1
    history: np.ndarray  # (n,) EVENT_DTYPE, oldest first
    target: int | None  # re-id of the item that was held out, if there is one


def main(argv: list[str] | None = None, model_class: type[HSTUModel] = HSTUModel) -> int:
    """`model_class`: your own, if the model was trained with one."""
    args = get_args(argv)
    sys.stdout.reconfigure(errors="replace")  # for titles that the terminal cannot spell
    return exit_code(lambda: answer(args, model_class))


def answer(args: argparse.Namespace, model_class: type[HSTUModel]) -> None:
    export = open_export(args)
    if args.item is not None:
        show_neighbours(args, export)
    else:
        if args.events is None:
            question = ask_export(args, export)
        else:
            question = ask_model(args, export, model_class)
        show_best(args, export, question)


def get_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument
    flag("--user", metavar="ID", help="recommend to this user of the export")
    flag(
        "--events",
        type=Path,
        metavar="FILE",
        help="recommend for this history, a table with the columns item and, if known, action and "
        "timestamp; with the features of --user, if there is one",
    )
    flag("--item", metavar="ID", help="show the items nearest to this one")
    flag("--data_dir", type=Path, default="./data", help="folder of train_data.bin and the rest")
    flag("--output_dir", type=Path, default="./outputs", help="that of main.py --inference_only")
    flag("--top_k", type=at_least(1), default=10, help="items shown")
    flag(
        "--remove_seen",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="leave the history's items out; None: as the export does",
    )
    flag(
        "--request_time",
        type=unix_seconds,
        metavar="SECONDS",
        help="of --events: Unix time of the question; else that of the last event",
    )
    flag(
        "--request_action",
        default="-1",
        metavar="TYPE",
        help="of --events: action that is hoped for, for --target_action: the type's name or "
        "number; -1: unknown",
    )
    flag(
        "--trust_pickle",
        action="store_true",
        help="load .pkl files unchecked: they can run any code",
    )
    args = parser.parse_args(argv)
    has_history = args.user is not None or args.events is not None
    if has_history == (args.item is not None):
        parser.error("name a --user, a file of --events, or an --item and none of the others")
    if args.events is None and (args.request_time is not None or args.request_action != "-1"):
        parser.error("--request_time and --request_action are of --events; --user has the export's")
    return args


# ----------------------------------------------------------------------------------- what there is


def open_export(args: argparse.Namespace) -> Export:
    """The exported items, checked to be those of the data folder.

    Raises:
        DataError: there is no export, it is of other items, or of a candidate set.
    """
    manifest = read_manifest(args.data_dir, trust=args.trust_pickle)
    origin, embeddings, ids = read_folder(args, "item_embeddings")
    folder = args.output_dir / "item_embeddings"
    if origin["item_ids"] == "retrieval":
        raise DataError(
            f"{folder}: exported with --candidates, so its ids are not the data's; export all "
            f"items: {export_command(args)}"
        )
    item_ids, user_ids = original_texts(args, manifest)
    expected = item_ids[1:]
    if origin["item_ids"] != "original":
        expected = [str(re_id) for re_id in range(1, len(item_ids))]
    if [str(exported) for exported in ids.tolist()] != expected:
        raise DataError(
            f"{folder}: its items are not those of {args.data_dir}; name the data that it was made "
            f"of, or export again: {export_command(args)}"
        )
    names = read_item_names(args.data_dir, manifest.num_items)
    of_model = origin["checkpoint"], origin["checkpoint_sha256"], origin.get("removes_seen", True)
    return Export(manifest, embeddings, item_ids, names, user_ids, *of_model)


def read_folder(args: argparse.Namespace, name: str) -> tuple[dict, torch.Tensor, np.ndarray]:
    """The manifest, the embeddings (n, D) and the ids (n,) int64 in a folder of an export."""
    folder = args.output_dir / name
    if not (folder / "manifest.json").exists():
        raise DataError(f"{folder}: no export there; make one: {export_command(args)}")
    manifest = read_json(folder / "manifest.json")
    embeddings, ids = load_emb(folder / "embedding.fbin"), load_emb(folder / "id.u64bin")
    fields = {"checkpoint", "checkpoint_sha256", "item_ids"}
    if not isinstance(manifest, dict) or fields - manifest.keys() or len(ids) != len(embeddings):
        raise DataError(f"{folder}: damaged; export again: {export_command(args)}")
    return manifest, torch.from_numpy(embeddings), ids[:, 0]


def export_command(args: argparse.Namespace) -> str:
    output_dir, data_dir = shlex.quote(str(args.output_dir)), shlex.quote(str(args.data_dir))
    return (
        f"python main.py --inference_only --state_dict_path {output_dir}/model_best.pt "
        f"--data_dir {data_dir} --output_dir {output_dir}"
    )


def original_texts(args: argparse.Namespace, manifest: Manifest) -> tuple[list[str], list[str]]:
    """The original ids of items and of users, by re-id; without an indexer.pkl the re-ids."""
    counts, path = {"i": manifest.num_items, "u": manifest.num_users}, args.data_dir / "indexer.pkl"
    if not path.exists():
        return tuple([str(re_id) for re_id in range(count + 1)] for count in counts.values())
    indexer = read_indexer(args.data_dir, trust=args.trust_pickle)
    for side, count in counts.items():
        check_re_ids(path, side, indexer[side], count)
    return tuple(["", *map(str, sorted(indexer[side], key=indexer[side].get))] for side in counts)


def re_id_of(text: str, known: Sequence[str], args: argparse.Namespace, what: str) -> int:
    """The re-id of a user or an item, `what`, that was named by its original id."""
    if text not in known[1:]:
        raise DataError(
            f"--{what} {text}: no such {what} in {args.data_dir}; there are "
            f"{len(known) - 1:,}: {examples(known)}"
        )
    return known.index(text, 1)


def examples(known: Sequence[str]) -> str:
    return ", ".join(known[1:4]) + ", ..." * (len(known) > 4)


# ------------------------------------------------------------------------------------- the question


def ask_export(args: argparse.Namespace, export: Export) -> Question:
    """The exported query of a user, and the history that it comes from.

    Raises:
        DataError: the user is not in the test split, or twice, or the exports do not fit.
    """
    user = re_id_of(args.user, export.user_ids, args, "user")
    is_there = (args.output_dir / "user_embeddings" / "manifest.json").exists()
    if not is_there and "test" not in export.manifest.targets:
        found = ", ".join(export.manifest.targets)
        raise DataError(
            f"{args.data_dir}: no test split there, only {found}; export with --export_users all"
        )
    origin, queries, ids = read_folder(args, "user_embeddings")
    is_of_all = origin.get("export_users") == "all"
    trust = {"trust_pickle": args.trust_pickle}
    if is_of_all:
        datasets = newest_histories(args.data_dir, export.manifest.targets, **trust)
    else:
        datasets = [MyDataset(args.data_dir, "test", whole_history=True, **trust)]
    histories = [dataset[int(i)] for dataset in datasets for i in dataset.indices_of(user)]
    if len(histories) != 1:
        raise DataError(
            f"--user {args.user}: {len(histories)} sequences in the test split of {args.data_dir}, "
            "expected one (with fewer than 3 events a user is in train alone); export with "
            "--export_users all, or give the history with --events"
        )
    name = args.user if origin.get("user_ids") == "original" else str(user)
    rows = np.flatnonzero(ids.astype(str) == name)
    is_of_items = origin["checkpoint_sha256"] == export.checkpoint_sha256
    is_of_data = origin.get("data_files") == fingerprint(args.data_dir)  # users may have moved
    if (
        len(rows) != 1
        or not (is_of_items and is_of_data)
        or queries.shape[1] != export.embeddings.shape[1]
    ):
        raise DataError(
            f"{args.output_dir / 'user_embeddings'}: not of the export in item_embeddings, or of "
            f"other data than {args.data_dir}; export again: {export_command(args)}"
        )
    events = histories[0].seen.events
    if is_of_all or origin.get("whole_history") or export.manifest.targets["test"] == "none":
        return Question(queries[rows], events, None)
    return Question(queries[rows], events[:-1], int(events["item_id"][-1]))


@torch.no_grad()
def ask_model(args: argparse.Namespace, export: Export, model_class: type[HSTUModel]) -> Question:
    """The model's query for the history in a file, which becomes a test split of one user.

    Raises:
        DataError: the file is refused, or the checkpoint is not the one that was exported.
    """
    user = 0  # row 0 of the features: none are known
    if args.user is not None:
        user = re_id_of(args.user, export.user_ids, args, "user")
    events = read_events(args, export)
    model = load_exported_model(args, export, model_class)
    request = read_request(
        args.data_dir, args.request_time, args.request_action, model.config, export.manifest
    )
    with tempfile.TemporaryDirectory() as folder:
        write_history(Path(folder), export.manifest, events)
        negatives = Negatives(export.manifest.num_items, "batch")
        dataset = MyDataset(folder, "test", model.config.maxlen, negatives, request=request)
        batch = dataset.collate_fn(dataset[0])
    batch = batch._replace(user_ids=torch.full_like(batch.user_ids, user))
    exported = export.embeddings[batch.distinct_ids - 1]
    # Another device rounds in the fifth decimal; another model differs in the first.
    if not torch.allclose(model.item_embeddings(batch.distinct_ids), exported, atol=0.01):
        raise DataError(
            f"{args.output_dir / export.checkpoint}: has changed since it was exported; export "
            f"again: {export_command(args)}"
        )
    return Question(model.predict(batch), events, None)


def load_exported_model(
    args: argparse.Namespace, export: Export, model_class: type[HSTUModel]
) -> HSTUModel:
    path = args.output_dir / export.checkpoint
    if not path.exists():
        raise DataError(
            f"{path}: not there, but --events needs the checkpoint of the export; put it there"
        )
    return load_model(
        path,
        args.data_dir,
        export.manifest,
        mm_emb_device="loader",
        trust_pickle=args.trust_pickle,
        model_class=model_class,
    )


def write_history(folder: Path, manifest: Manifest, events: np.ndarray) -> None:
    """A data folder whose test split is this history, all of it known."""
    history = Sequences(events, np.array([0, len(events)]), np.ones(1, USER_DTYPE))
    targets = {"train": "next", "test": "none"}
    files = [name for split in targets for name in write_split(folder, split, [history])]
    finish_folder(folder, manifest._replace(targets=targets), files)


def read_events(args: argparse.Namespace, export: Export) -> np.ndarray:
    """(n,) EVENT_DTYPE, the file's events in the order of time; without times in their own."""
    known = {text: re_id for re_id, text in enumerate(export.item_ids) if re_id}
    actions = export.manifest.action_types()
    items = f"one of the {len(known):,} items of {args.data_dir}: {examples(export.item_ids)}"
    types = f"one of {', '.join(actions)}, or nothing"
    actions[""] = -1
    dates = "Unix seconds, not milliseconds, or an ISO date, or nothing"
    parts = []
    for rows in read_rows(args.events, (), None):
        check_columns(rows)
        part = np.empty(len(rows.records), EVENT_DTYPE)
        part["item_id"] = parsed(rows, "item", lambda text: member(known, text), items)
        part["action_type"] = parsed(rows, "action", lambda text: member(actions, text), types)
        part["timestamp"] = parsed(rows, "timestamp", seconds, dates)
        parts.append(part)
    if not parts:
        raise DataError(f"{args.events}: no events in it, expected a row per event")
    events = np.concatenate(parts)
    times = events["timestamp"]
    if times.any() and not times.all():
        raise DataError(
            f"{args.events}: event {times.argmin() + 1} has no timestamp, but others have one; "
            "tell all of them, or none and the oldest event first"
        )
    return events[times.argsort(kind="stable")]


def check_columns(rows: Rows) -> None:
    for line, record in zip(rows.lines, rows.records, strict=True):
        if "item" not in record or record.keys() - COLUMNS:
            raise DataError(
                f"{rows.path}: line {line} has the columns {', '.join(record)}; expected item and, "
                "if known, action and timestamp, named in the first line or as JSON keys"
            )


def member(known: dict[str, int], text: str) -> int:
    if text not in known:
        raise ValueError(text)
    return known[text]


def seconds(text: str) -> int:
    value = time_of(text or "0")
    if not 0 <= value < LATEST:
        raise ValueError(text)
    return int(value)


# --------------------------------------------------------------------------------------- the answer


def show_best(args: argparse.Namespace, export: Export, question: Question) -> None:
    query, history, target = question
    who = f"user {args.user}" if args.events is None else str(args.events)
    say(f"{who}: {len(history):,} events, the last of them")
    show_table(event_row(export, event) for event in history[-NUM_RECENT:])
    removes_seen = export.removes_seen if args.remove_seen is None else args.remove_seen
    seen_ids = np.unique(history["item_id"] if removes_seen else []).astype(np.int64)
    seen = torch.from_numpy(seen_ids - 1), torch.tensor([0, len(seen_ids)])
    num_left = len(export.embeddings) - len(seen_ids)
    print()
    say(f"the best of {num_left:,} items{' not seen' * removes_seen}, by cosine")
    show_top(args, export, query, seen)
    if target is not None:
        ranked = query, export.embeddings, torch.tensor([target - 1])
        rank = int(DotProductSimilarity().target_ranks(*ranked, seen))
        cosine = float(query[0] @ export.embeddings[target - 1])
        print()
        is_left_out = target in seen_ids
        say(f"what came next, and was held out{', seen and so not ranked' * is_left_out}")
        place = "-" if is_left_out else str(rank)
        show_table([[place, f"{cosine:.4f}", *label(export, target)]])


def show_neighbours(args: argparse.Namespace, export: Export) -> None:
    item = re_id_of(args.item, export.item_ids, args, "item")
    say(f"nearest to {' '.join(label(export, item)).strip()}, by cosine")
    itself = torch.tensor([item - 1]), torch.tensor([0, 1])
    show_top(args, export, export.embeddings[item - 1 : item], itself)


def show_top(
    args: argparse.Namespace,
    export: Export,
    query: torch.Tensor,
    left_out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    k = min(args.top_k, len(export.embeddings))
    scores, rows = DotProductSimilarity().top_k(query, export.embeddings, k, left_out)
    best = zip(scores[0].tolist(), rows[0].tolist(), strict=True)
    show_table(
        [str(rank), f"{score:.4f}", *label(export, row + 1)]
        for rank, (score, row) in enumerate(best, 1)
        if row >= 0
    )


def event_row(export: Export, event: Any) -> list[str]:
    time, kind = int(event["timestamp"]), int(event["action_type"])
    when = date(time) if time > 0 else ""
    how = export.manifest.action_name(kind) if kind >= 0 else ""
    return [when, how, *label(export, int(event["item_id"]))]


def label(export: Export, re_id: int) -> list[str]:
    """Original id and name of an item."""
    return [export.item_ids[re_id], export.item_names[re_id]]


def show_table(rows: Iterable[list[str]]) -> None:
    """Rows in columns, numbers to the right and names, the last, to the left; no empty columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *cells, name in rows:
        padded = (cell.rjust(w) for cell, w in zip(cells, widths, strict=False) if w)
        say(f"  {'  '.join(padded)}  {name}".rstrip())


def say(text: str) -> None:
    """Print a line, in a terminal no longer than that is wide."""
    # Names are other people's text: no control character of theirs reaches the terminal.
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if sys.stdout.isatty():
        text = cut(text, shutil.get_terminal_size().columns)
    print(text)


def cut(text: str, width: int) -> str:
    """The text in so many columns, of which a Chinese letter takes two and an accent none."""
    columns = np.cumsum([columns_of(letter) for letter in text])
    if not len(text) or columns[-1] <= width:
        return text
    return text[: int((columns < width).sum())] + "…"


def columns_of(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # into `head`, say
    sys.exit(main())

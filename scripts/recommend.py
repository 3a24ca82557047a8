"""What the model recommends, in plain words: to a user, for any history, and beside an item.

Reads what `main.py --inference_only` wrote. A user's query lies there, and items need none; only
--events needs the checkpoint too, to turn a history into a query.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from event_table import Histories, examples, read_histories
from screen import say, show_table

from dataset import MyDataset, load_emb
from dot_product_similarity import DotProductSimilarity
from engine.export import read_request
from engine.flags import at_least, unix_seconds
from engine.recommender import recommend_histories
from engine.top_items import Best, newest_histories
from engine.trained_model import load_model
from files.atomic_io import DataError, atomic_write, exit_code, read_json
from files.data_folder import (
    Manifest,
    fingerprint,
    log_ids,
    number_of,
    read_item_names,
    read_manifest,
)
from files.recommendations import TopItems, write_table
from files.sequences import Sequences
from history_source import date
from model import HSTUModel

NUM_RECENT = 5  # events shown
COMPARED = 1000  # items whose embeddings must be those of the export


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
    return exit_code(lambda: answer(args, model_class))


def answer(args: argparse.Namespace, model_class: type[HSTUModel]) -> None:
    export = open_export(args)
    if args.item is not None:
        show_neighbours(args, export)
    elif args.write is not None:
        write_all(args, export, model_class)
    elif args.events is not None:
        show_best(args, export, ask_model(args, export, model_class))
    else:
        show_best(args, export, ask_export(args, export))


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
        help="recommend for this history, CSV or JSON lines with the columns item and, if known, "
        "action and timestamp; with the features of --user, if there is one",
    )
    flag(
        "--write",
        type=table_file,
        metavar="FILE",
        help="with --events of many users, a table with the column user too: write their top items "
        "to this .csv or .parquet",
    )
    flag("--item", metavar="ID", help="show the items nearest to this one")
    flag("--data_dir", type=Path, default="./data", help="folder of train_data.bin and the rest")
    flag("--output_dir", type=Path, default="./outputs", help="that of main.py --inference_only")
    flag(
        "--state_dict_path",
        type=Path,
        metavar="FILE",
        help="of --events: the checkpoint of the export, if it is not in output_dir",
    )
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
        help="of --events: Unix time of the question, or now; else that of the last event",
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
    if args.write is not None and (args.events is None or args.user is not None):
        parser.error("--write is for --events, whose column user names the users")
    if args.events is None and (args.request_time is not None or args.request_action != "-1"):
        parser.error("--request_time and --request_action are of --events; --user has the export's")
    if args.events is None and args.state_dict_path is not None:
        parser.error("--state_dict_path is of --events, which alone needs the model")
    return args


def table_file(text: str) -> Path:
    """An argparse type: a file to write, .csv or .parquet."""
    if Path(text).suffix not in (".csv", ".parquet"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .csv nor in .parquet")
    return Path(text)


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
    exported = list(map(str, ids.tolist()))
    if origin["item_ids"] != "original":  # they are texts, a line for each
        lines = (folder / "item_ids.txt").read_text(encoding="utf-8", errors="surrogatepass")
        exported = lines.split("\n")[:-1]
        expected = [" ".join(item_id.splitlines()) for item_id in expected]
    if exported != expected:
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
    model = args.state_dict_path or args.output_dir / "model_best.pt"
    model, data_dir, folder = (shlex.quote(str(p)) for p in (model, args.data_dir, args.output_dir))
    return (
        f"python main.py --inference_only --state_dict_path {model} "
        f"--data_dir {data_dir} --output_dir {folder}"
    )


def original_texts(args: argparse.Namespace, manifest: Manifest) -> tuple[list[str], list[str]]:
    """The original ids of items and of users, by re-id; without an indexer.pkl the re-ids."""
    counts, trust = {"i": manifest.num_items, "u": manifest.num_users}, args.trust_pickle
    ids = [log_ids(args.data_dir, side, count, trust=trust) for side, count in counts.items()]
    return tuple(["", *map(str, side[1:].tolist())] for side in ids)


def re_id_of(text: str, known: Sequence[str], args: argparse.Namespace, what: str) -> int:
    """The re-id of a user or an item, `what`, that was named by its original id."""
    if text not in known[1:]:
        raise DataError(
            f"--{what} {text}: no such {what} in {args.data_dir}; there are "
            f"{len(known) - 1:,}: {examples(known)}"
        )
    return known.index(text, 1)


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


def ask_model(args: argparse.Namespace, export: Export, model_class: type[HSTUModel]) -> Question:
    """The model's query for the one history in a file.

    Raises:
        DataError: the file is refused, or the checkpoint is not the one that was exported.
    """
    user = 0  # row 0 of the features: none are known
    if args.user is not None:
        user = re_id_of(args.user, export.user_ids, args, "user")
    histories = histories_of(args, export)
    if histories.users != [""]:
        raise DataError(
            f"{args.events}: histories of {len(histories.users)} users; name a file for their "
            "recommendations with --write"
        )
    (best,) = recommend_to(args, export, histories, np.array([user]), model_class)
    return Question(torch.from_numpy(best.queries), histories.events, None)


def write_all(args: argparse.Namespace, export: Export, model_class: type[HSTUModel]) -> None:
    """Write the top items of all users in a table of histories; say what was left out.

    Raises:
        DataError: as of `ask_model`.
    """
    if not args.write.absolute().parent.is_dir():
        raise DataError(f"{args.write}: no such folder; make it first")
    histories = histories_of(args, export)
    if histories.users == [""]:
        raise DataError(
            f"{args.events}: no column user, but --write is for histories of many users"
        )
    re_ids = {text: k for k, text in enumerate(export.user_ids) if k}
    users = np.array([re_ids.get(text, 0) for text in histories.users])
    found = [
        best._replace(queries=None)  # which would be most of the memory
        for best in recommend_to(args, export, histories, users, model_class)
    ]
    rows = np.concatenate([best.rows for best in found])
    scores = np.concatenate([best.scores for best in found])
    names = as_in_log(histories.users), as_in_log(export.item_ids[1:])
    with atomic_write(args.write) as file:
        write_table(file, args.write.suffix, TopItems(*names, rows, scores))
    if histories.num_unknown:
        say(
            f"left out: {histories.num_unknown:,} events of items that {args.data_dir} does not "
            f"have, and {histories.num_left_out:,} users who have no others"
        )
    say(f"wrote {args.write}: {len(users):,} users, the best {rows.shape[1]} items each")


def as_in_log(ids: Sequence[str]) -> np.ndarray:
    """int64 if all are numbers, as in an export, else texts."""
    numbers = list(map(number_of, ids))
    return np.array(ids, object) if None in numbers else np.array(numbers, np.int64)


def histories_of(args: argparse.Namespace, export: Export) -> Histories:
    types = export.manifest.action_types()
    return read_histories(args.events, export.item_ids, types, args.data_dir)


def recommend_to(
    args: argparse.Namespace,
    export: Export,
    histories: Histories,
    users: np.ndarray,
    model_class: type[HSTUModel],
) -> Iterator[Best]:
    """The best of the exported items for each history, in batches.

    Raises:
        DataError: the checkpoint is not the one that was exported.
    """
    model = load_exported_model(args, export, model_class)
    asked = args.request_time, args.request_action
    request = read_request(args.data_dir, *asked, model.config, export.manifest)
    some = np.unique(histories.events["item_id"])[:COMPARED].astype(np.int64)
    with torch.no_grad():
        embeddings = model.item_embeddings(torch.from_numpy(some))
    # Another device rounds in the fifth decimal; another model differs in the first.
    if not torch.allclose(embeddings, export.embeddings[some - 1], atol=0.01):
        raise DataError(
            f"{args.state_dict_path or args.output_dir / export.checkpoint}: is not the model that "
            f"was exported; export again: {export_command(args)}"
        )
    removes_seen = export.removes_seen if args.remove_seen is None else args.remove_seen
    sequences = Sequences(histories.events, histories.offsets, users)
    options = min(args.top_k, len(export.embeddings)), removes_seen, request
    return recommend_histories(model, export.manifest, sequences, export.embeddings, *options)


def load_exported_model(
    args: argparse.Namespace, export: Export, model_class: type[HSTUModel]
) -> HSTUModel:
    path = args.state_dict_path or args.output_dir / export.checkpoint
    if not path.exists():
        raise DataError(
            f"{path}: not there, but --events needs the checkpoint of the export; name it with "
            "--state_dict_path"
        )
    return load_model(
        path,
        args.data_dir,
        export.manifest,
        mm_emb_device="loader",
        trust_pickle=args.trust_pickle,
        model_class=model_class,
    )


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


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # into `head`, say
    sys.exit(main())

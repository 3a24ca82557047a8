"""The command line: every flag, its default and its help."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any

# Up to this many items "--negatives auto" ranks against all of them: it learns most per second
# there (docs/log.md); beyond, the cost of a step would follow the catalogue.
ALL_NEGATIVES_UP_TO = 20_000
# Up to this many bytes "--mm_emb_device auto" keeps vectors beside the model.
MODEL_VECTORS_UP_TO = 1 << 30
# Flags that a resumed run may change: where and how it runs, not what it computes.
FREE_FLAGS = {
    "data_dir",
    "output_dir",
    "log_dir",
    "num_workers",
    "shard_items",
    "device",
    "kernels",
    "resume",
    "overwrite",
    "mm_emb_device",
    "candidates",
    "save_every_steps",
    "log_every",
    "projector",
    "inference_only",
    "state_dict_path",
    "trust_pickle",
    "top_k",
    "whole_history",
    "request_time",
    "request_action",
    "debug",
}


DEFAULT_MM_EMB_ID = ["81"]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; the only place with defaults."""
    parser = argparse.ArgumentParser(
        usage="python main.py [--flag value ...]; --help tells them all",  # two screens otherwise
        description="Train HSTU on user-event sequences, or export embeddings.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = argparse.BooleanOptionalAction
    data = parser.add_argument_group("data").add_argument
    data("--data_dir", default="./data", help="folder of train_data.bin and the rest")
    data("--maxlen", type=at_least(1), default=101, help="events seen, the newest are kept")
    data(
        "--windows",
        action=flag,
        default=True,
        help="train on all of a history longer than --maxlen, cut into windows, "
        "not on its newest events alone",
    )
    data("--item_features", nargs="+", default=["all"], metavar="ID", help="all, none, or ids")
    data("--user_features", nargs="+", default=["all"], metavar="ID", help="all, none, or ids")
    data("--actions", action=flag, default=True, help="inputs carry the event's action type")
    data(
        "--target_action",
        action=flag,
        default=False,
        help="inputs carry the action type of the event to be predicted, where it is known",
    )
    data(
        "--mm_emb_id",
        nargs="*",
        default=DEFAULT_MM_EMB_ID,
        metavar="ID",
        help="multimodal vectors to use; no value: none",
    )
    data(
        "--mm_missing",
        choices=["learnt", "zero"],
        default="learnt",
        help="what stands for an item without a multimodal vector",
    )
    data(
        "--mm_emb_device",
        choices=["auto", "loader", "model"],
        default="auto",
        help="where multimodal vectors lie: on disk, loaders gather each batch's; or all on the "
        f"model's device; auto: on the device up to {MODEL_VECTORS_UP_TO >> 20} MB",
    )
    data(
        "--mm_projection",
        choices=["learnt", "frozen"],
        default="learnt",
        help="projection of multimodal vectors to the embedding width; "
        "frozen: stays as it was drawn",
    )
    data(
        "--trust_pickle",
        action="store_true",
        help="load .pkl files unchecked: they can run any code",
    )
    data(
        "--num_workers",
        type=at_least(0),
        default=4,
        help="loader processes, at most one per core, and as many for the validation; 0: load in "
        "the main process",
    )

    model = parser.add_argument_group("model").add_argument
    model("--hidden_units", type=at_least(2), default=64, help="embedding width")
    model("--num_blocks", type=at_least(1), default=2, help="HSTU layers")
    model("--num_heads", type=at_least(1), default=1, help="attention heads")
    model("--attention_dim", type=at_least(1), default=64, help="query and key width per head")
    model("--linear_dim", type=at_least(1), default=64, help="value and gate width per head")
    model(
        "--dropout_rate",
        type=between(0, 1, with_low=True),
        default=0.2,
        help="of inputs and blocks; 0: off",
    )
    model(
        "--time_bias",
        choices=["request", "event", "off"],
        default="request",
        help="time a query has: that of the event to predict, of the last seen event, or none",
    )
    model("--position_bias", action=flag, default=True, help="attention bias by distance")

    loss = parser.add_argument_group("loss").add_argument
    loss("--infonce_temp", type=between(0, math.inf), default=0.1, help="temperature, above 0")
    loss(
        "--negatives",
        choices=["auto", "all", "batch", "uniform", "mixed"],
        default="auto",
        help="every item that training predicts, the batch's targets, uniform ones, or batch and "
        f"uniform; auto: all up to {ALL_NEGATIVES_UP_TO:,} items, else mixed",
    )
    loss(
        "--num_negatives",
        type=at_least(1),
        default=1024,
        help="distinct uniform negatives shared by a batch",
    )
    loss(
        "--logq", action=flag, default=True, help="correct in-batch negatives for their popularity"
    )

    optim = parser.add_argument_group("optimisation").add_argument
    optim("--batch_size", type=at_least(1), default=128, help="sequences per batch")
    optim("--num_epochs", type=at_least(1), default=3, help="passes over the training sequences")
    optim("--lr", type=between(0, math.inf), default=0.001, help="highest learning rate")
    optim(
        "--weight_decay",
        type=between(0, math.inf, with_low=True),
        default=0.01,
        help="of matrices but not of tables; 0: off",
    )
    optim(
        "--muon",
        action=flag,
        default=True,
        help="Muon for the blocks' matrices, AdamW for the rest; off: AdamW for all",
    )
    optim(
        "--warmup_steps",
        type=at_least(0),
        default=100,
        help="steps of rising learning rate, before a cosine to 0; 0: none",
    )
    optim(
        "--clip_grad",
        type=between(0, math.inf, with_low=True),
        default=1.0,
        help="largest gradient norm; 0: no clipping",
    )
    optim("--accumulate_steps", type=at_least(1), default=1, help="batches per update")
    optim(
        "--patience",
        type=at_least(0),
        default=5,
        help="epochs without a better validation before the run ends; 0: never",
    )
    optim(
        "--early_stop_on",
        choices=["loss", "ndcg"],
        default="ndcg",
        help="what decides the best epoch: validation loss or NDCG@10",
    )
    optim("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="autocast type")
    optim("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    optim("--compile", action="store_true", help="torch.compile the blocks, attention apart")

    run = parser.add_argument_group("run").add_argument
    run("--output_dir", default="./outputs", help="checkpoints, metrics and exports")
    run("--log_dir", default="./logs", help="TensorBoard files")
    run("--device", type=device_name, default="cuda", help="cuda, cuda:1, cpu; without CUDA: cpu")
    run(
        "--kernels",
        choices=["auto", "plain"],
        default="auto",
        help="auto: the fastest form of attention and loss for the device; plain: as they are "
        "defined, slow, to check and to try things",
    )
    run(
        "--shard_items",
        action="store_true",
        help="under torchrun each process holds a part of the item table; for 20,000 items or "
        "more and sampled negatives",
    )
    run("--seed", type=at_least(0), default=42, help="of weights, order, dropout and negatives")
    run(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="go on from output_dir's newest state, start afresh, or go on from a resume_*.pt",
    )
    run(
        "--overwrite",
        action="store_true",
        help="with --resume none or another folder's state: remove the checkpoints in output_dir",
    )
    run(
        "--save_every_steps",
        type=at_least(0),
        default=0,
        help="steps between saved states, besides each epoch's end; 0: none between",
    )
    run("--log_every", type=at_least(1), default=20, help="steps between log entries")
    run(
        "--projector",
        action="store_true",
        help="at the end, the 5,000 most frequent items in TensorBoard's projector",
    )
    run(
        "--remove_seen",
        action=flag,
        default=True,
        help="leave a user's seen items out of the ranking",
    )
    run("--inference_only", action="store_true", help="export embeddings instead of training")
    run("--state_dict_path", metavar="PATH", help="model_*.pt file to export")
    run(
        "--candidates",
        metavar="DIR",
        help="export and rank this candidate folder instead of all items, as retrieval ids",
    )
    run("--top_k", type=at_least(1), default=10, help="items exported per test user")
    run(
        "--whole_history",
        action="store_true",
        help="export queries for what comes after a test user's last event, which else is held out",
    )
    run(
        "--request_time",
        type=unix_seconds,
        default=None,
        metavar="SECONDS",
        help="Unix time of queries whose target is unknown; else that of the last event",
    )
    run(
        "--request_action",
        default="-1",
        metavar="TYPE",
        help="action of queries whose target is unknown, for --target_action: the type's name or "
        "number; -1: unknown",
    )
    run("--debug", action="store_true", help="show where in the code an error was raised")
    args = parser.parse_args(argv)
    if args.inference_only and not args.state_dict_path:
        parser.error("--inference_only needs --state_dict_path: a model_*.pt file of a training")
    if not args.inference_only and (args.state_dict_path or args.candidates):
        parser.error("--state_dict_path and --candidates are for --inference_only")
    asks = args.whole_history or args.request_time is not None or args.request_action != "-1"
    if asks and not args.inference_only:
        parser.error(
            "--whole_history, --request_time and --request_action are for --inference_only"
        )
    if args.num_heads * args.linear_dim == 1:
        parser.error("--linear_dim 1 with one head: a LayerNorm over one number is always 0")
    if args.overwrite and args.resume == "auto":
        parser.error("--overwrite is for --resume none, or for the state of another folder")
    return args


def device_name(text: str) -> str:
    """An argparse type: cpu, cuda or cuda:N."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    return text


def unix_seconds(text: str) -> int:
    """An argparse type: a time from 1970 to the year 5138; what is beyond is in milliseconds."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no time in Unix seconds")
    if int(text) >= 10**11:
        raise argparse.ArgumentTypeError(f"{text} is no time in seconds; milliseconds / 1000?")
    return int(text)


def at_least(low: int) -> Any:
    """An argparse type: an integer not below `low`."""

    def integer(text: str) -> int:
        value = int(text)
        if not low <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and 2^63 - 1")
        return value

    return integer


def between(low: float, high: float, with_low: bool = False) -> Any:
    """An argparse type: a number above `low` (or from it on) and below `high`."""

    def number(text: str) -> float:
        value = float(text)
        if not (low < value < high or (with_low and value == low)):
            bounds = f"{'at least' if with_low else 'above'} {low:g} and below {high:g}"
            raise argparse.ArgumentTypeError(f"{value:g} is not {bounds}")
        return value

    return number

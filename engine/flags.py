"""The command line: every flag, its default and its help."""

from __future__ import annotations

import argparse
import math
import re
import time
from typing import Any

# Up to this many items "--negatives auto" ranks against all of them: it learns most per second
# there (docs/log.md); beyond, the cost of a step would follow the catalogue.
ALL_NEGATIVES_UP_TO = 20_000
BATCH_SIZE, MIN_UPDATES = 128, 300
# Up to this share of validation targets that their users had before, "--remove_seen auto" is on.
MOST_REPEATS = 0.05
# Up to this many bytes "--mm_emb_device auto" puts vectors on the device of the model.
MODEL_VECTORS_UP_TO = 1 << 30
# Flags that a resumed run may change: where and how it runs, not what it computes.
FREE_FLAGS = {
    "data_dir", "output_dir", "log_dir", "num_workers", "shard_items", "device", "kernels",
    "resume", "overwrite", "mm_emb_device", "candidates", "save_every_steps", "log_every",
    "projector", "inference_only", "evaluate", "state_dict_path", "trust_pickle", "top_k",
    "export_users", "whole_history", "request_time", "request_action", "debug",
}  # fmt: skip
DEFAULT_MM_EMB_ID = ["81"]
_MOST_MB, _MOST_ITEMS = MODEL_VECTORS_UP_TO >> 20, f"{ALL_NEGATIVES_UP_TO:,}"


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; the only place with defaults. docs/flags.md says more about each."""
    parser = argparse.ArgumentParser(
        usage="python main.py [--flag value ...]; --help tells them all",  # two screens otherwise
        description="Train HSTU on user-event sequences, or test or export a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    on_off, switch = {"action": argparse.BooleanOptionalAction}, {"action": "store_true"}
    share, positive = between(0, 1, with_low=True), between(0, math.inf)
    not_negative = between(0, math.inf, with_low=True)

    data = parser.add_argument_group("data").add_argument
    data("--data_dir", default="./data", help="folder of train_data.bin and the rest")
    data("--maxlen", type=at_least(1), default=101, help="events seen, the newest of a history")
    text = "cut histories longer than --maxlen into windows; off: train on the newest events alone"
    data("--windows", **on_off, default=True, help=text)
    data("--item_features", nargs="+", default=["all"], metavar="ID", help="all, none, or ids")
    data("--user_features", nargs="+", default=["all"], metavar="ID", help="all, none, or ids")
    data("--actions", **on_off, default=True, help="inputs carry the event's action type")
    data("--target_action", **on_off, default=False, help="inputs carry the next event's action")
    text = "train to predict events of these action types alone; all events stay inputs"
    data("--target_actions", nargs="+", metavar="TYPE", help=text)
    text = "multimodal vectors to use; no value: none"
    data("--mm_emb_id", nargs="*", default=DEFAULT_MM_EMB_ID, metavar="ID", help=text)
    text = "what stands for an item without a multimodal vector"
    data("--mm_missing", choices=["learnt", "zero"], default="learnt", help=text)
    text = f"loader: vectors stay on disk; model: on its device; auto: there up to {_MOST_MB} MB"
    data("--mm_emb_device", choices=["auto", "loader", "model"], default="auto", help=text)
    text = "projection of multimodal vectors; frozen: stays as it was drawn"
    data("--mm_projection", choices=["learnt", "frozen"], default="learnt", help=text)
    data("--trust_pickle", **switch, help="load .pkl files unchecked: they can run any code")
    data("--num_workers", type=at_least(0), default=4, help="loader processes; 0: the main process")

    model = parser.add_argument_group("model").add_argument
    model("--hidden_units", type=at_least(2), default=64, help="embedding width")
    model("--num_blocks", type=at_least(1), default=2, help="HSTU layers")
    model("--num_heads", type=at_least(1), default=1, help="attention heads")
    model("--attention_dim", type=at_least(1), default=64, help="query and key width per head")
    model("--linear_dim", type=at_least(1), default=64, help="value and gate width per head")
    model("--dropout_rate", type=share, default=0.2, help="of inputs and blocks; 0: off")
    text = "add learnt shares of so many events before it to each event's input; 0: off"
    model("--mix_previous", type=at_least(0), default=0, help=text)
    text = "share of a batch's items that are known by features alone, against overfitting; 0: off"
    model("--id_dropout", type=share, default=0.0, help=text)
    text = "time a query has: that of the event to predict, of the last seen event, or none"
    model("--time_bias", choices=["request", "event", "off"], default="request", help=text)
    model("--position_bias", **on_off, default=True, help="attention bias by distance")
    text = "the last head attends by time and position alone"
    model("--time_head", **on_off, default=False, help=text)
    text = (
        "add the items of the history to the query; auto: where more than "
        f"{MOST_REPEATS:.0%} of the validation targets are among them"
    ).replace("%", "%%")
    model("--history_residual", choices=["auto", "on", "off"], default="auto", help=text)

    loss = parser.add_argument_group("loss").add_argument
    loss("--infonce_temp", type=positive, default=0.1, help="temperature, above 0")
    kinds = ["auto", "all", "batch", "uniform", "mixed"]
    text = f"all items, the batch's targets, uniform ones, or both; auto: all up to {_MOST_ITEMS}"
    loss("--negatives", choices=kinds, default="auto", help=text)
    loss("--num_negatives", type=at_least(1), default=1024, help="uniform negatives per batch")
    loss("--logq", **on_off, default=True, help="correct in-batch negatives for their popularity")

    optim = parser.add_argument_group("optimisation").add_argument
    optim("--batch_size", type=at_least(1), default=BATCH_SIZE, help="sequences per batch")
    text = (
        "steps an epoch, for which a small log's batches are cut; 0: never; not given: "
        f"{MIN_UPDATES} with the defaults of --batch_size and --accumulate_steps, else 0"
    )
    optim("--min_updates", type=at_least(0), help=text)
    optim("--num_epochs", type=at_least(1), default=3, help="passes over the training sequences")
    optim("--lr", type=positive, default=0.001, help="highest learning rate")
    optim("--weight_decay", type=not_negative, default=0.01, help="of matrices, not tables; 0: off")
    optim("--muon", **on_off, default=True, help="Muon for blocks' matrices; off: AdamW for all")
    text = "steps of rising rate; 0: none; not given: 100, or a tenth of all steps if that is less"
    optim("--warmup_steps", type=at_least(0), help=text)
    optim("--clip_grad", type=not_negative, default=1.0, help="largest gradient norm; 0: any")
    optim("--accumulate_steps", type=at_least(1), default=1, help="batches per training step")
    optim("--patience", type=at_least(0), default=5, help="epochs to wait for a better one; 0: all")
    text = "what decides the best epoch: validation loss or NDCG@10"
    optim("--early_stop_on", choices=["loss", "ndcg"], default="ndcg", help=text)
    optim("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="autocast type")
    optim("--gradient_checkpointing", **switch, help="less memory, a third more time")
    optim("--compile", **switch, help="torch.compile the blocks, on a CPU attention apart")

    run = parser.add_argument_group("run").add_argument
    run("--output_dir", default="./outputs", help="checkpoints, metrics and exports")
    run("--log_dir", default="./logs", help="TensorBoard files")
    run("--device", type=device_name, default="cuda", help="cuda, cuda:1, cpu; without CUDA: cpu")
    text = "torch: tuned; triton: on CUDA; auto: what the device can; plain: as defined, slow"
    choices = ["auto", "triton", "torch", "plain"]
    run("--kernels", choices=choices, default="auto", help=text)
    run("--shard_items", **switch, help="torchrun: each process has a part of the item table")
    run("--seed", type=at_least(0), default=42, help="of weights, order, dropout and negatives")
    text = "model_*.pt whose weights a training starts with; one that goes on has its own state"
    run("--init_from", metavar="PATH", help=text)
    text = "go on from output_dir's newest state, start afresh, or go on from that resume_*.pt"
    run("--resume", default="auto", metavar="auto|none|PATH", help=text)
    run("--overwrite", **switch, help="with --resume none: remove output_dir's checkpoints")
    run("--save_every_steps", type=at_least(0), default=0, help="steps between states; 0: an epoch")
    run("--log_every", type=at_least(1), default=20, help="steps between log entries")
    run("--projector", **switch, help="the most frequent items in TensorBoard's projector")
    text = (
        "leave a user's seen items out of the ranking, where a target among them is a miss; auto: "
        f"unless more than {MOST_REPEATS:.0%} of the validation targets are, an export as its model"
    ).replace("%", "%%")
    choices = {"nargs": "?", "const": "on", "choices": ["auto", "on", "off"]}
    run("--remove_seen", **choices, default="auto", help=text)
    run("--no-remove_seen", dest="remove_seen", action="store_const", const="off", help="off")
    run("--debug", **switch, help="show where in the code an error was raised")

    export = parser.add_argument_group("export").add_argument
    export("--inference_only", **switch, help="export embeddings instead of training")
    text = "rank a split, test if none is named, with a trained model instead of training"
    export("--evaluate", nargs="?", const="test", choices=["valid", "test"], help=text)
    export("--state_dict_path", metavar="PATH", help="model_*.pt file to export or evaluate")
    export("--candidates", metavar="DIR", help="candidate folder to export instead of all items")
    text = "whose queries and top items: the test split's, or of all that have an event in any"
    export("--export_users", choices=["test", "all"], default="test", help=text)
    export("--top_k", type=at_least(1), default=10, help="items exported per user")
    export("--whole_history", **switch, help="queries for what follows a test user's last event")
    text = "Unix time of unknown targets, or now"
    export("--request_time", type=unix_seconds, metavar="SECONDS", help=text)
    text = "action hoped for, by name or number, where the target is unknown; -1: unknown"
    export("--request_action", default="-1", metavar="TYPE", help=text)
    args = parser.parse_args(argv)
    refuse_other_use(parser, args)
    if args.num_heads * args.linear_dim == 1:
        parser.error("--linear_dim 1 with one head: a LayerNorm over one number is always 0")
    has_bias = args.time_bias != "off" or args.position_bias
    if args.time_head and (args.num_heads < 2 or not has_bias):
        parser.error("--time_head needs --num_heads 2 or more, and a bias of time or position")
    if args.overwrite and args.resume != "none":
        parser.error("--overwrite is for --resume none")
    return args


def refuse_other_use(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that are for another of training, --evaluate and --inference_only."""
    if args.inference_only and args.evaluate:
        parser.error("--inference_only exports and --evaluate ranks a split; choose one of the two")
    if (args.inference_only or args.evaluate) and not args.state_dict_path:
        name = "--inference_only" if args.inference_only else "--evaluate"
        parser.error(f"{name} needs --state_dict_path: a model_*.pt file of a training")
    if args.state_dict_path and not (args.inference_only or args.evaluate):
        parser.error("--state_dict_path is for --inference_only and --evaluate")
    if args.init_from and (args.inference_only or args.evaluate):
        parser.error("--init_from is for a training; --state_dict_path names the model to use")
    asks = args.whole_history or args.request_time is not None or args.request_action != "-1"
    exports = args.candidates or asks or args.export_users != "test"
    if not args.inference_only and exports:
        names = "--candidates, --export_users, --whole_history and --request_*"
        parser.error(f"{names} are for --inference_only")


def device_name(text: str) -> str:
    """An argparse type: cpu, cuda or cuda:N."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    return text


def unix_seconds(text: str) -> int:
    """An argparse type: "now", or a time from 1970 to 5138; what is beyond is in milliseconds."""
    if text == "now":
        return int(time.time())
    if not text.isdecimal() or int(text) >= 10**11:
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds; in milliseconds?")
    return int(text)


def at_least(low: int) -> Any:
    """An argparse type: an integer not below `low`."""
    return between(low, 2**63, with_low=True, kind=int)


def between(low: float, high: float, with_low: bool = False, kind: type = float) -> Any:
    """An argparse type: a number above `low` (or from it on) and below `high`."""

    def number(text: str) -> float:
        value = kind(text)
        if not (low < value < high or (with_low and value == low)):
            bounds = f"{'at least' if with_low else 'above'} {low:g} and below {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    return number

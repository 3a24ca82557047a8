"""Pictures of a finished training: how it went, whom it serves, and what attention has learnt.

    python scripts/plot_run.py --output_dir outputs --log_dir logs --data_dir data

Writes PNG files; needs matplotlib (`pip install -r requirements-plot.txt`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from engine.evaluation import Ranking, evaluate
from engine.flags import get_args
from engine.metrics import hit
from engine.state import Progress, Run
from engine.trained_model import load_model
from engine.training_setup import eval_loader, prepare_run
from files.atomic_io import DataError, atomic_write, exit_code
from files.checkpoint import load_newest_state
from files.data_folder import read_manifest
from files.sequences import open_split
from simplified_hstu import time_buckets

with suppress(ImportError):  # said in main
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
LINES = [{"color": colour, "linestyle": style} for style in ("-", "--", ":") for colour in COLOURS]
STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e0e0e0",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
NUM_GROUPS = 5  # of about equally many users
UNITS = {
    "≤ 1 s": 1, "1 min": 60, "1 h": 3600, "1 day": 86_400,
    "1 month": 30 * 86_400, "1 year": 365 * 86_400,
}  # fmt: skip
FEW_EPOCHS = 5  # up to so many, the first one's loss is drawn too


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pictures of a finished training.")
    parser.add_argument("--output_dir", type=Path, default="outputs", help="that of the training")
    parser.add_argument("--log_dir", default="logs", help="that of the training")
    parser.add_argument("--data_dir", default="data", help="that of the training")
    parser.add_argument("--picture_dir", type=Path, help="for the PNG files; else output_dir")
    trust_help = "load .pkl files unchecked: they can run any code"
    parser.add_argument("--trust_pickle", action="store_true", help=trust_help)
    args = parser.parse_args(argv)
    return exit_code(lambda: write_pictures(args))


def write_pictures(args: argparse.Namespace) -> None:
    if "matplotlib" not in globals():
        raise DataError("no matplotlib here; pip install -r requirements-plot.txt")
    folder = args.picture_dir or args.output_dir
    with matplotlib.rc_context(STYLE):
        for name, figure in draw_all(args):
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / f"{name}.png") as file:
                figure.savefig(file, dpi=110)
            print(f"wrote {folder / name}.png")


def draw_all(args: argparse.Namespace) -> Iterator[tuple[str, Figure]]:
    """Name and figure of all that there is to see."""
    run, flags = load_run(args.output_dir, args.data_dir, args.trust_pickle)
    yield "learning_curves", draw_learning(read_curves(args.log_dir, run), run.progress.epoch)
    loader = eval_loader(flags, run, "test")
    if loader is not None:
        ranking = evaluate(run.model, loader, precision=flags.precision)
        yield "hit_rate", draw_hit_rate(ranking, run.item_counts)
    weights = run.model.state_dict()
    if biases := weights_named(weights, "time_weight"):
        yield "time_bias", draw_time_bias(biases, longest_span(args.data_dir))
    if biases := weights_named(weights, "position_weight"):
        yield "position_bias", draw_position_bias(biases)


def load_run(output_dir: Path, data_dir: str, trust_pickle: bool) -> tuple[Run, argparse.Namespace]:
    """The best epoch's model, and the flags that it was trained with."""
    state = load_newest_state(output_dir)
    if state is None:
        found = "no resume_*.pt there, by which a training is known (a tune keeps none)"
        raise DataError(f"{output_dir}: {found}; name the --output_dir of a training")
    args = get_args([f"--data_dir={data_dir}", f"--output_dir={output_dir}"])
    then = {flag: value for flag, value in state["binding"].items() if flag in vars(args)}
    specs = state["binding"]["config"]["item_features"]
    vectors = [name for name, spec in specs.items() if spec["kind"] == "emb"]
    of_now = {"compile": False, "init_from": None, "trust_pickle": trust_pickle}
    vars(args).update(then, mm_emb_id=vectors, **of_now)
    run = prepare_run(args)
    if run.binding["data files"] != state["binding"]["data files"]:
        raise DataError(f"{data_dir}: not the data that {output_dir} was trained on")
    run.progress = Progress(**state["progress"])
    # Not prepare_run's: an --init_from training has some of its first model's config.
    options = {n: getattr(args, n) for n in ("device", "mm_emb_device", "kernels", "trust_pickle")}
    manifest = read_manifest(data_dir, trust=trust_pickle)
    run.model = load_model(output_dir / "model_best.pt", data_dir, manifest, **options)
    return run, args


def read_curves(log_dir: str, run: Run) -> dict[str, list[float]]:
    """Tag -> a value per epoch, of the tags that have one.

    Raises:
        DataError: there are none, or those of another run: with another best epoch.
    """
    tags = []
    if Path(log_dir).is_dir():
        events = EventAccumulator(log_dir, {"scalars": 0}).Reload()
        wanted = "Metrics|Loss/(valid|train_epoch)"
        tags = [tag for tag in events.Tags()["scalars"] if re.match(wanted, tag)]
    if not tags:
        raise DataError(f"{log_dir}: no curves there; name the --log_dir of the training")
    curves = {tag: [event.value for event in events.Scalars(tag)] for tag in tags}
    for tag, best in (("Metrics/NDCG@10", "NDCG@10"), ("Loss/valid", "loss")):
        value, values = run.progress.best_metrics.get(best), curves.get(tag, [])
        # A run that went on with another --log_dir has its last epochs there, maybe not the best.
        has_best = run.progress.best_epoch > run.progress.epoch - max(1, len(values))
        if value is not None and has_best and np.float32(value) not in np.float32(values):
            raise DataError(
                f"{log_dir}: the curves of another run than that in {run.output_dir}; name "
                "the --log_dir of this one"
            )
    return curves


def weights_named(weights: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The relative biases of each layer."""
    return [weight.cpu() for key, weight in weights.items() if key.endswith(f"bias.{name}")]


def longest_span(data_dir: str) -> int:
    """Seconds between the first and the last event of a training sequence, at most."""
    events, offsets, _ = open_split(Path(data_dir), "train")
    is_filled = np.diff(offsets) > 0
    firsts, lasts = offsets[:-1][is_filled], offsets[1:][is_filled] - 1
    times = events["timestamp"]
    return int((times[lasts] - times[firsts]).max(initial=0))


# ----------------------------------------------------------------------------------------- drawing


def make_figure(height: float, *titles: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.6, height), layout="constrained")
    axes = list(figure.subplots(len(titles), 1, squeeze=False)[:, 0])
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
    return figure, axes


def draw_learning(curves: Mapping[str, list[float]], last_epoch: int) -> Figure:
    """`last_epoch`: of all curves; the first ones may have been logged elsewhere."""
    figure, (top, bottom) = make_figure(5.6, "Loss (InfoNCE)", "Ranking, validation")
    parts = {
        top: {"Loss/train_epoch": "training", "Loss/valid": "validation"},
        bottom: {"Metrics/HR@10": "HR@10", "Metrics/NDCG@10": "NDCG@10"},
    }
    for ax, names in parts.items():
        for (tag, label), colour in zip(names.items(), COLOURS, strict=False):
            values = curves.get(tag, [])
            epochs = range(last_epoch - len(values) + 1, last_epoch + 1)
            ax.plot(epochs, values, ".-", label=label, color=colour)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    later = [value for tag in parts[top] for value in curves.get(tag, [])[1:]]
    if (
        len(curves.get("Loss/train_epoch", [])) > FEW_EPOCHS
    ):  # the first epoch's loss would press all others flat
        top.set_ylim(min(later) - 0.1, max(later) + 0.1)
    return figure


def draw_hit_rate(ranking: Ranking, counts: Tensor) -> Figure:
    """HR@10 of the test targets, by what is known of the user and of the item."""
    hits = hit(ranking.ranks, 10).numpy()
    over_all = f"(test, dashed: all, {hits.mean():.3f})"
    titles = f"By length of the history {over_all}", f"By popularity of the target {over_all}"
    figure, axes = make_figure(5.6, *titles)
    popularity = counts[ranking.target_ids]
    labels = ("events of the user", "training events of the item")
    for ax, values, label, colour in zip(
        axes, (ranking.num_seen, popularity), labels, COLOURS, strict=False
    ):
        groups = equal_groups(values.numpy())
        means = [hits[members].mean() for members in groups.values()]
        errors = [1.96 * hits[members].std() / len(members) ** 0.5 for members in groups.values()]
        ax.bar(list(groups), means, yerr=errors, color=colour, ecolor="#404040", capsize=3)
        ax.axhline(hits.mean(), color="#404040", linestyle="--", linewidth=1)
        ax.set_xlabel(label)
        ax.set_ylabel("HR@10, 95 % interval")
        ax.grid(axis="x", visible=False)
        ax.tick_params(axis="x", labelsize=10)
    return figure


def equal_groups(values: np.ndarray) -> dict[str, np.ndarray]:
    """Label -> where `values` are in that range; up to NUM_GROUPS of about one size, rising."""
    cuts = np.unique(np.sort(values)[np.arange(1, NUM_GROUPS) * len(values) // NUM_GROUPS])
    owners = np.searchsorted(cuts, values, side="right")
    groups = (np.flatnonzero(owners == group) for group in np.unique(owners))
    return {label_of(values[members]): members for members in groups}


def label_of(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def draw_time_bias(layers: Iterable[Tensor], span: int) -> Figure:
    """Each layer's bias by elapsed time, up to the longest that was trained on."""
    figure, (ax,) = make_figure(3.6, "What attention has learnt about elapsed time")
    seconds = torch.from_numpy(np.unique(np.geomspace(1, max(2, span), 5000).round()))
    buckets = time_buckets(seconds)
    used = buckets.unique()  # a few cover no whole second
    middles = [seconds[buckets == bucket].log().mean().exp().item() for bucket in used]
    for number, (weights, line) in enumerate(zip(layers, cycle(LINES), strict=False), 1):
        ax.plot(middles, weights[used], label=f"layer {number}", **line)
    ax.set_xscale("log")
    marks = {text: at for text, at in UNITS.items() if at <= max(2, span)}
    ax.set_xticks(list(marks.values()), list(marks), rotation=30)
    ax.minorticks_off()
    ax.set_xlabel("time between query and event (log scale)")
    label_biases(ax)
    return figure


def draw_position_bias(layers: Iterable[Tensor]) -> Figure:
    figure, (ax,) = make_figure(3.6, "What attention has learnt about places")
    for number, (weights, line) in enumerate(zip(layers, cycle(LINES), strict=False), 1):
        places = range(1, len(weights) + 1)
        ax.plot(places, weights, label=f"layer {number}", **line)
    ax.set_xscale("log")
    marks = [at for at in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if at <= len(weights)]
    ax.set_xticks(marks, map(str, marks))
    ax.minorticks_off()
    ax.set_xlabel("place of the event, 1 is the newest (log scale)")
    label_biases(ax)
    return figure


def label_biases(ax: Axes) -> None:
    ax.axhline(0, color="#404040", linewidth=0.8)
    ax.set_ylabel("added to the score")
    ax.legend()


if __name__ == "__main__":
    sys.exit(main())

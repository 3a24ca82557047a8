"""How far one gets without a model: rankings of a data folder's targets by counts of its events."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset import MyDataset
from engine.baselines import baseline_metrics, log_baselines
from engine.training_setup import repeats
from files.atomic_io import DataError, exit_code
from files.data_folder import read_manifest
from main import log_to_stdout


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    with log_to_stdout():
        return exit_code(lambda: show(args))


def get_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument
    flag("--data_dir", type=Path, default="./data", help="folder of train_data.bin and the rest")
    flag("--split", choices=["valid", "test"], default="test", help="whose targets are ranked")
    text = "leave the items that a user has seen out of the ranking; auto: as main.py does"
    flag("--remove_seen", choices=["auto", "on", "off"], default="auto", help=text)
    text = "load .pkl files unchecked: they can run any code"
    flag("--trust_pickle", action="store_true", help=text)
    return parser.parse_args(argv)


def show(args: argparse.Namespace) -> None:
    """Print a line per baseline.

    Raises:
        DataError: the data is bad, or the split has no known targets.
    """
    targets = read_manifest(args.data_dir, trust=args.trust_pickle).targets
    if targets.get(args.split) != "last":
        raise DataError(
            f"{args.data_dir}: no {args.split} split with known targets there; name another --split"
        )
    names = {"train", args.split} | targets.keys() & {"valid"}
    of = {n: MyDataset(args.data_dir, n, trust_pickle=args.trust_pickle) for n in names}
    is_removed = repeats(args.remove_seen, "off", of)["removes_seen"]
    log_baselines(baseline_metrics(of["train"].sequences, of[args.split].sequences, is_removed))


if __name__ == "__main__":
    sys.exit(main())

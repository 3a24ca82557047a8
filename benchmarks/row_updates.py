"""Whether moving only the rows of a batch costs quality: one training with it, one without.

    python benchmarks/row_updates.py --data_dir data/ml-1m --seed 1

ML-1M with 1,024 uniform negatives, ids and times only; "whole" is AdamW over the whole table in
every step. Any other flag of main.py can follow. The last line printed is one JSON object, which is
also what is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from record import environment, write
from settings import IDS_AND_TIMES, SMALL

import hstu_components
import main as main_module

FLAGS = (
    f"{IDS_AND_TIMES} {SMALL} --lr=0.003 --infonce_temp=0.05 --num_epochs=20 "
    "--negatives=uniform --num_negatives=1024 --device=cpu --num_workers=1"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--work_dir", default="outputs/row_updates", help="checkpoints, logs")
    parser.add_argument("--seed", type=int, default=1)
    args, more_flags = parser.parse_known_args()
    flags = [*FLAGS.split(), f"--data_dir={args.data_dir}", f"--seed={args.seed}", *more_flags]
    result = {
        "name": "row_updates",
        "flags": " ".join(flags),
    }
    for name, dense_rows in (("rows", 0), ("whole", sys.maxsize)):
        hstu_components.DENSE_ROWS = dense_rows
        folder = Path(args.work_dir) / f"{name}_seed{args.seed}"
        if main_module.main([*flags, f"--output_dir={folder}", f"--log_dir={folder}/logs"]):
            sys.exit(1)
        result[name] = json.loads((folder / "metrics.json").read_text())
    result |= environment("cpu")
    for name in ("rows", "whole"):
        for split in ("valid", "test"):
            scores = result[name][split]
            print(
                f"{name:6} {split:6} HR@10 {scores['HR@10']:.4f}  NDCG@10 {scores['NDCG@10']:.4f}"
            )
    write(f"row_updates_seed{args.seed}", result)


if __name__ == "__main__":
    main()

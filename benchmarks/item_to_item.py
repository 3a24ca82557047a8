"""Item-to-item neighbours on a data folder: a baseline without a model, beside those of main.py.

    python benchmarks/item_to_item.py --data ml-1m --source ../shared/data/ml-1m

An item is as near to another as the cosine of the users who had them in training. A target is
ranked by the mean of its cosines with the newest items of the history, by the ranking of main.py;
validation chooses how many items those are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from record import environment, write
from reproduce import prepare
from settings import DATA

from dataset import MyDataset
from engine.baselines import baseline_metrics
from engine.metrics import ranking_metrics
from engine.training_setup import repeats
from ops.ranking import target_ranks

USERS = 256  # ranked at once
NEWEST = 1, 10, 1000  # items of a history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--source", help="folder of the raw files, if there are any")
    parser.add_argument("--work_dir", type=Path, default="outputs/reproduce")
    args = parser.parse_args()
    data_dir = prepare(args.data, args.source, args.work_dir)
    sets = {split: MyDataset(data_dir, split) for split in ("train", "valid", "test")}
    removes_seen = repeats("auto", "off", sets)["removes_seen"]
    cosines = neighbours(sets["train"])
    result = {"removes_seen": removes_seen}
    by_newest = {n: rank(sets["valid"], cosines, n, removes_seen) for n in NEWEST}
    newest = max(NEWEST, key=lambda n: ranking_metrics(by_newest[n])["NDCG@10"])
    result["newest"] = newest
    for split in ("valid", "test"):
        ranks = rank(sets[split], cosines, newest, removes_seen)
        sequences = sets["train"].sequences, sets[split].sequences
        found = {
            "item-to-item": ranking_metrics(ranks),
            **baseline_metrics(*sequences, removes_seen),
        }
        result[split] = {
            name: {metric: round(values[metric], 4) for metric in ("HR@10", "NDCG@10")}
            for name, values in found.items()
        }
    write(f"item_to_item_{args.data}", result | environment("cpu"))


def neighbours(train: MyDataset) -> torch.Tensor:
    """(X, X) cosine of two items' users, 0 of an item with itself."""
    sequences = train.sequences
    rows = np.repeat(np.arange(len(sequences.offsets) - 1), np.diff(sequences.offsets))
    pairs = np.unique(np.stack([rows, sequences.events["item_id"] - 1]), axis=1)
    shape = len(sequences.offsets) - 1, train.num_items
    ones = torch.ones(pairs.shape[1])
    had = torch.sparse_coo_tensor(pairs, ones, shape, check_invariants=True)  # (users, X)
    counts = torch.sparse.sum(had, 0).to_dense().clamp(min=1)
    unit = (had * counts.rsqrt()).coalesce()
    return torch.sparse.mm(unit.T, unit.to_dense()).fill_diagonal_(0)


def rank(
    dataset: MyDataset, cosines: torch.Tensor, newest: int, removes_seen: bool
) -> torch.Tensor:
    """(S,) int64 rank of each sequence's target."""
    ranks = []
    for some in torch.arange(len(dataset)).split(USERS):
        batch = dataset.collate_fn(dataset.__getitems__(some.numpy()))
        lengths, ends = batch.seen_offsets.diff(), batch.seen_offsets[1:]
        lines = torch.arange(len(some)).repeat_interleave(lengths)
        is_new = torch.arange(len(lines)) >= ends[lines] - newest
        history = torch.zeros(len(some), dataset.num_items)
        history[lines[is_new], batch.seen_ids[is_new] - 1] = 1
        history /= history.sum(1, keepdim=True)  # scores of at most 1 are compared up to 1e-6
        seen = (batch.seen_ids - 1, batch.seen_offsets) if removes_seen else None
        ranks.append(target_ranks(history, cosines, batch.target_ids() - 1, seen))
    return torch.cat(ranks)


if __name__ == "__main__":
    main()

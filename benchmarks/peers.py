"""Trains a peer as its command on stdin says: one step, or one epoch and what it scores then.

step_time.py and time_to_quality.py start it with the python of the peers' own environment:

    pip install torch==2.13.0 rectools==0.19.0 pytorch-lightning==2.5.2 numpy==1.26.4 \
        pandas==2.3.3 pm-implicit torch-rechub==0.9.0
    python benchmarks/peers.py rechub DATA_DIR MAXLEN WIDTH
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import record  # noqa: F401 (puts the package on the path)
import torch
from torch import Tensor

from engine.metrics import ranking_metrics

EVENT = np.dtype([("item_id", "<i4"), ("action_type", "<i4"), ("timestamp", "<i8")])
BATCH_SIZE, BLOCKS, NEGATIVES, TEMPERATURE, LR = 128, 2, 128, 0.05, 1e-3

PEERS = {"rechub": "softmax, all items", "rectools": "softmax, 128 of each position's own"}
# The allocator's settings that help the peers most.
TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


class Peer:
    """A peer in a process of its environment, which does what `main` below says."""

    def __init__(self, python: str, name: str, data_dir: str, maxlen: int, width: int):
        command = [python, __file__, name, data_dir, str(maxlen), str(width)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=os.environ | TUNED,
        )  # fmt: skip
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"{name} did not start: {' '.join(command)}")

    def ask(self, command: str) -> list[float]:
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return [float(number) for number in self.process.stdout.readline().split()]

    def step(self) -> float:
        """Milliseconds."""
        return self.ask("step")[0]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def read(data_dir: Path, split: str) -> list[np.ndarray]:
    """The events of each sequence, oldest first."""
    events = np.fromfile(data_dir / f"{split}_data.bin", EVENT)
    return np.split(events, np.fromfile(data_dir / f"{split}_offsets.bin", "<i8")[1:-1])


def num_items(data_dir: Path) -> int:
    return json.loads((data_dir / "manifest.json").read_text())["num_items"]


def last_targets(sequences: list[np.ndarray], maxlen: int) -> tuple[Tensor, Tensor, Tensor]:
    """The events before each last one, filled up on the left.

    Returns:
        items: (S, maxlen) int64, 0 is padding.
        times: (S, maxlen + 1) int64, the last one the target's; padding has the first event's.
        targets: (S,) int64.
    """
    items = torch.zeros(len(sequences), maxlen, dtype=torch.int64)
    times = torch.zeros(len(sequences), maxlen + 1, dtype=torch.int64)
    targets = torch.tensor([int(events["item_id"][-1]) for events in sequences])
    for row, events in enumerate(sequences):
        kept = events[-maxlen - 1 :]
        items[row, maxlen - len(kept) + 1 :] = torch.from_numpy(kept["item_id"][:-1].astype("i8"))
        times[row] = int(kept["timestamp"][0])
        times[row, maxlen - len(kept) + 1 :] = torch.from_numpy(kept["timestamp"].copy())
    return items, times, targets


class Rechub:
    """torch-rechub: softmax over all items; its MovieLens-1M example's settings at our shape."""

    def __init__(self, data_dir: Path, maxlen: int, width: int):
        from torch_rechub.models.generative.hstu import HSTUModel
        from torch_rechub.trainers import SeqTrainer

        sequences = read(data_dir, "train")
        self.items, self.times, self.targets = last_targets(sequences, maxlen)
        self.model = HSTUModel(
            num_items(data_dir) + 1, width, 1, BLOCKS, width, width, maxlen, dropout=0.2,
            time_bucket_fn="log", time_bucket_divisor=0.301, time_bucket_unit="seconds",
            score_norm="l2", temperature=TEMPERATURE, use_output_bias=False,
            scale_input_embedding=True,
        )  # fmt: skip
        self.trainer = SeqTrainer(self.model, optimizer_params={"lr": LR})

    def batches(self) -> Iterator[Tensor]:
        return iter(torch.randperm(len(self.items)).split(BATCH_SIZE))

    def step(self, rows: Tensor) -> None:
        items, times = self.items[rows], self.times[rows]
        logits = self.model(items, times[:, -1:] - times[:, :-1])
        loss = self.trainer._compute_next_token_loss(logits, items, self.targets[rows])
        self.model.zero_grad()
        loss.backward()
        self.trainer.optimizer.step()
        loss.item()

    def scores(self, items: Tensor, times: Tensor) -> Tensor:
        """(B, X + 1) of every item as the next one; column 0 is none."""
        return self.model(items, times[:, -1:] - times[:, :-1])[:, -1]


class RecTools:
    """Sampled softmax over 128 negatives of each position's own, as its HSTU tutorial has it."""

    def __init__(self, data_dir: Path, maxlen: int, width: int):
        import pandas as pd
        from rectools.dataset import Dataset
        from rectools.models.nn.transformers.hstu import HSTUModel

        sequences = read(data_dir, "train")
        events = np.concatenate(sequences)
        table = pd.DataFrame({
            "user_id": np.repeat(np.arange(len(sequences)), [len(s) for s in sequences]),
            "item_id": events["item_id"], "weight": 1.0,
            "datetime": pd.to_datetime(events["timestamp"], unit="s"),
        })  # fmt: skip
        self.parts = HSTUModel(
            n_blocks=BLOCKS, n_heads=1, n_factors=width, dropout_rate=0.2, session_max_len=maxlen,
            loss="sampled_softmax", n_negatives=NEGATIVES, lr=LR, batch_size=BATCH_SIZE, verbose=0,
            lightning_module_kwargs={"logits_t": TEMPERATURE},
        )  # fmt: skip
        self.parts._build_model_from_dataset(Dataset.construct(table))
        self.module = self.parts.lightning_model
        self.module.log = lambda *_, **__: None
        self.module._xavier_normal_init()  # as on_train_start does
        self.model = self.module.torch_model
        self.optimizer = self.module.configure_optimizers()
        known = self.parts.data_preparator.item_id_map.external_ids[1:].astype("i8")
        self.known = torch.from_numpy(known)  # its own id, less 1 -> ours
        self.own = torch.zeros(num_items(data_dir) + 1, dtype=torch.int64)  # 0: never trained on
        self.own[self.known] = torch.arange(1, len(known) + 1)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.parts.data_preparator.get_dataloader_train())

    def step(self, batch: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad()
        loss = self.module.training_step(batch, 0)
        loss.backward()
        self.optimizer.step()
        loss.item()

    def scores(self, items: Tensor, times: Tensor) -> Tensor:
        table = self.model.item_model.get_all_embeddings()
        batch = {"x": self.own[items], "unix_ts": times}
        queries = self.model.encode_sessions(batch, table)[:, -1:]
        scores = items.new_full((len(items), len(self.own)), -torch.inf, dtype=torch.float32)
        scores[:, self.known] = self.model.similarity_module(queries, table)[:, 0, 1:]
        return scores


@torch.no_grad()
def evaluate(peer: Any, sequences: list[np.ndarray], maxlen: int) -> dict[str, float]:
    """As engine.evaluation.evaluate: every item but the seen ones ranked for each last event."""
    peer.model.eval()
    items, times, targets = last_targets(sequences, maxlen)
    ranks = []
    for rows in torch.arange(len(sequences)).split(BATCH_SIZE):
        scores = peer.scores(items[rows], times[rows])
        best = scores.gather(1, targets[rows, None])
        scores[:, 0] = -torch.inf
        for row, sequence in zip(scores, rows.tolist(), strict=True):
            row[torch.from_numpy(sequences[sequence]["item_id"].astype("i8"))] = -torch.inf
        ranks.append(1 + (scores > best).sum(1))
    peer.model.train()
    return ranking_metrics(torch.cat(ranks))


def main() -> None:
    """A number, or two, on stdout for each line on stdin.

    step: milliseconds of one, whose batch was made in advance.
    epoch: seconds of one.
    valid, test: HR@10 and NDCG@10 of the split.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    name, folder, maxlen, width = sys.argv[1:]
    data_dir, maxlen = Path(folder), int(maxlen)
    torch.set_num_threads(2)
    torch.manual_seed(1)
    peer = {"rechub": Rechub, "rectools": RecTools}[name](data_dir, maxlen, int(width))
    peer.model.train()
    batches: Iterator[Any] = iter(())
    print("ready", flush=True)
    for line in sys.stdin:
        command = line.strip()
        start = time.perf_counter()
        if command == "step":
            batch = next(batches, None)
            if batch is None:
                batches = itertools.cycle(list(itertools.islice(peer.batches(), 8)))
                batch = next(batches)
            start = time.perf_counter()
            peer.step(batch)
            print((time.perf_counter() - start) * 1e3, flush=True)
        elif command == "epoch":
            for batch in peer.batches():
                peer.step(batch)
            print(time.perf_counter() - start, flush=True)
        else:
            found = evaluate(peer, read(data_dir, command), maxlen)
            print(found["HR@10"], found["NDCG@10"], flush=True)


if __name__ == "__main__":
    main()

"""One training step of a peer for each line on stdin; prints its milliseconds.

step_time.py starts it with the python of the peers' own environment:

    pip install torch==2.13.0 rectools==0.19.0 pytorch-lightning==2.5.2 numpy==1.26.4 \
        pandas==2.3.3 pm-implicit torch-rechub==0.9.0
    python benchmarks/peer_step.py rechub DATA_DIR MAXLEN WIDTH
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

EVENT = np.dtype([("item_id", "<i4"), ("action_type", "<i4"), ("timestamp", "<i8")])
BATCH_SIZE, BLOCKS, NEGATIVES, TEMPERATURE, LR = 128, 2, 128, 0.05, 1e-3


def read(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    events = np.fromfile(data_dir / "train_data.bin", EVENT)
    return events, np.fromfile(data_dir / "train_offsets.bin", "<i8")


def rechub(data_dir: Path, maxlen: int, width: int) -> Callable[[], None]:
    """Softmax over all items; its MovieLens-1M example's settings at our shape."""
    from torch_rechub.models.generative.hstu import HSTUModel
    from torch_rechub.trainers import SeqTrainer

    events, offsets = read(data_dir)
    num_items = int(events["item_id"].max())
    sequences = len(offsets) - 1
    tokens = torch.zeros(sequences, maxlen, dtype=torch.int64)  # filled up on the left
    ages, targets = torch.zeros_like(tokens), torch.zeros(sequences, dtype=torch.int64)
    for row, (start, end) in enumerate(itertools.pairwise(offsets)):
        kept = events[max(start, end - maxlen - 1) : end]
        targets[row] = int(kept["item_id"][-1])
        tokens[row, maxlen - len(kept) + 1 :] = torch.from_numpy(kept["item_id"][:-1].astype("i8"))
        age = kept["timestamp"][-1] - kept["timestamp"][:-1]
        ages[row, maxlen - len(kept) + 1 :] = torch.from_numpy(age.copy())
    model = HSTUModel(
        num_items + 1, width, 1, BLOCKS, width, width, maxlen, dropout=0.2, time_bucket_fn="log",
        time_bucket_divisor=0.301, time_bucket_unit="seconds", score_norm="l2",
        temperature=TEMPERATURE, use_output_bias=False, scale_input_embedding=True,
    )  # fmt: skip
    trainer = SeqTrainer(model, optimizer_params={"lr": LR})
    model.train()
    order = torch.randperm(sequences)
    batches = itertools.cycle(order.split(BATCH_SIZE)[:-1])

    def step() -> None:
        rows = next(batches)
        loss = trainer._compute_next_token_loss(model(tokens[rows], ages[rows]), tokens[rows],
                                                targets[rows])  # fmt: skip
        model.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        loss.item()

    return step


def rectools(data_dir: Path, maxlen: int, width: int) -> Callable[[], None]:
    """Sampled softmax over 128 negatives of each position's own, as its HSTU tutorial has it."""
    import pandas as pd
    from rectools.dataset import Dataset
    from rectools.models.nn.transformers.hstu import HSTUModel

    events, offsets = read(data_dir)
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    table = pd.DataFrame({
        "user_id": users, "item_id": events["item_id"], "weight": 1.0,
        "datetime": pd.to_datetime(events["timestamp"], unit="s"),
    })  # fmt: skip
    model = HSTUModel(
        n_blocks=BLOCKS, n_heads=1, n_factors=width, dropout_rate=0.2, session_max_len=maxlen,
        loss="sampled_softmax", n_negatives=NEGATIVES, lr=LR, batch_size=BATCH_SIZE, verbose=0,
        lightning_module_kwargs={"logits_t": TEMPERATURE},
    )  # fmt: skip
    model._build_model_from_dataset(Dataset.construct(table))
    module = model.lightning_model
    module.log = lambda *_, **__: None
    module.train()
    optimizer = module.configure_optimizers()
    # A step without the making of its batch, as for the others.
    batches = list(itertools.islice(model.data_preparator.get_dataloader_train(), 8))
    batches = itertools.cycle(batch for batch in batches if len(batch["x"]) == BATCH_SIZE)

    def step() -> None:
        optimizer.zero_grad()
        loss = module.training_step(next(batches), 0)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    name, data_dir, maxlen, width = sys.argv[1:]
    torch.set_num_threads(2)
    step = {"rechub": rechub, "rectools": rectools}[name](Path(data_dir), int(maxlen), int(width))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print((time.perf_counter() - start) * 1e3, flush=True)


if __name__ == "__main__":
    main()

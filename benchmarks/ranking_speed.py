"""Full-catalogue ranking: users per second, beside the bare matrix product and a flat faiss index.

    python benchmarks/ranking_speed.py

Unit vectors of 64, 100 seen items a user, two threads. The yardstick is torch.mm into one tile that
stays in the cache, in the fastest of several tilings, nothing done with the scores. All is
interleaved; figures are medians over rounds. Two threads wait for each other, so that figures from
a machine with other work on it are worthless. faiss (pip install faiss-cpu) is optional: without it
its columns are absent. The last line printed is one JSON object, which is also what is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from record import environment, write_by_cpu
from torch import Tensor
from torch.nn.functional import normalize

from engine.setup import keep_freed_memory
from ops import ranking

try:
    import faiss
except ImportError:
    faiss = None

# Items -> users ranked in a call.
SIZES = {3_706: 1024, 100_000: 512, 1_000_000: 256}
TILINGS = [(128, 2048), (128, 4096), (256, 512), (256, 1024), (256, 2048), (512, 1024)]
WIDTH, NUM_SEEN, K, ROUNDS, THREADS = 64, 100, 10, 9, 2
CLOSE = 1e-5


def main() -> None:
    torch.set_num_threads(THREADS)
    keep_freed_memory()  # as main does
    result: dict[str, object] = {"threads": THREADS}
    for num_items, num_users in SIZES.items():
        row = result[str(num_items)] = figures(num_items, num_users)
        print(f"{num_items:,} items")
        for name, value in row.items():
            print(f"  {name:40} {value}", flush=True)
    result |= environment("cpu")
    if faiss is None:
        print("faiss is not installed: pip install faiss-cpu to compare")
    write_by_cpu("ranking_speed", result)


@torch.no_grad()
def figures(num_items: int, num_users: int) -> dict[str, object]:
    """Users per second of each way; shares are medians of the ratios within a round."""
    generator = torch.Generator().manual_seed(num_items)
    queries = normalize(torch.randn(num_users, WIDTH, generator=generator))
    items = normalize(torch.randn(num_items, WIDTH, generator=generator))
    targets = torch.randint(num_items, (num_users,), generator=generator)
    seen_rows = torch.randint(num_items, (num_users * NUM_SEEN,), generator=generator)
    seen = seen_rows, NUM_SEEN * torch.arange(num_users + 1)
    tiling = min(TILINGS, key=lambda shape: median(time_of(matmul, queries, items, shape, n=3)))
    ways = {
        "matmul": lambda: matmul(queries, items, tiling),
        "ranks": lambda: ranking.target_ranks(queries, items, targets, seen),
        "top10": lambda: ranking.top_k(queries, items, K, seen),
    }
    if faiss is not None:
        faiss.omp_set_num_threads(THREADS)
        index = faiss.IndexFlatIP(WIDTH)
        index.add(items.numpy())
        ways["faiss_top10"] = lambda: index.search(queries.numpy(), K)
    seconds = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            seconds[name] += time_of(way, n=1)
    row = {f"{name}_users_per_s": round(num_users / median(s)) for name, s in seconds.items()}
    for name in [*ways][1:]:
        shares = [m / s for m, s in zip(seconds["matmul"], seconds[name], strict=True)]
        row[f"{name}_share_of_matmul"] = round(median(shares), 3)
    agrees = None
    if faiss is not None:
        rows = ranking.top_k(queries, items, K)[1], torch.from_numpy(ways["faiss_top10"]()[1])
        agrees = are_alike(queries, items, *rows)
    return row | {"matmul_tile": tiling, "users": num_users, "top10_agrees_with_faiss": agrees}


def time_of(work: Callable, *args: object, n: int) -> list[float]:
    """Seconds of each of n calls."""
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        work(*args)
        seconds.append(time.perf_counter() - started)
    return seconds


def matmul(queries: Tensor, items: Tensor, shape: tuple[int, int]) -> None:
    """All scores, each tile over the one before."""
    tile = torch.empty(shape)
    for block in queries.split(shape[0]):
        for part in items.split(shape[1]):
            torch.mm(block, part.T, out=tile.view(-1)[: len(block) * len(part)].view(-1, len(part)))


def are_alike(queries: Tensor, items: Tensor, ours: Tensor, theirs: Tensor) -> bool:
    """Whether the items at each place are the same, or their exact scores closer than CLOSE."""
    wide = items.double()
    ours, theirs = (torch.einsum("bd,bkd->bk", queries.double(), wide[r]) for r in (ours, theirs))
    return bool(np.all((ours - theirs).abs().numpy() < CLOSE))


if __name__ == "__main__":
    main()

"""What a training step launches on a GPU, counted without one, on a null device.

    python benchmarks/gpu_launches.py --null_device NULL --data_dir data/ml-1m

A null device is a library preloaded below torch's CUDA build that counts each kernel, product, copy
and wait, and runs none; the folder NULL has its Python side, counts.py, with functions reset() and
counts(). As nothing is computed, the self-check of Triton's attention is taken for passed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from types import ModuleType

import torch
from record import environment, write
from step import LOSSES, PLAIN, Ours

from engine import kernels

LOSS = LOSSES["InfoNCE, 1,024 shared"]
# maxlen, width, more flags.
SHAPES = {
    "N 200, d 50, 2 blocks": (200, 50, ""),
    "N 101, d 64, 2 blocks": (101, 64, ""),
    "N 200, d 50, 8 blocks": (200, 50, "--num_blocks 8"),
}
FORMS = {
    "triton": "--kernels triton",
    "triton, --compile": "--kernels triton --compile",
    "torch": "--kernels torch",
}
NAMES = {
    "launch": "kernels",
    "gemm": "products",
    "h2d": "copies from the host",
    "d2h": "copies to the host",
    "d2d": "copies on the device",
    "memset": "memsets",
    "sync": "waits",
}
WARM_UP, STEPS = 3, 3


def count(ours: Ours, counts: ModuleType) -> dict[str, float]:
    """Of a step, the mean of several; the first ones make the optimiser's state, and compile."""
    for _ in range(WARM_UP):
        ours.step()
    counts.reset()
    for _ in range(STEPS):
        ours.step()
    found = counts.counts()
    return {name: round(found[kind] / STEPS, 1) for kind, name in NAMES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--null_device", required=True, help="folder with counts.py")
    parser.add_argument("--data_dir", required=True, help="MovieLens-1M, converted")
    args = parser.parse_args()
    sys.path.insert(0, args.null_device)
    counts = importlib.import_module("counts")
    kernels.largest_error = lambda *_: 0.0
    result = {"flags": f"{PLAIN} {LOSS}", "steps": STEPS}
    for shape, (maxlen, width, more) in SHAPES.items():
        result[shape] = {}
        for form, flags in FORMS.items():
            torch._dynamo.reset()
            with tempfile.TemporaryDirectory() as folder:
                flags = f"{LOSS} {more} {flags}"
                ours = Ours(args.data_dir, maxlen, width, flags, folder, "cuda")
            result[shape][form] = count(ours, counts)
            print(shape, form, result[shape][form], flush=True)
    write("gpu_launches", result | environment(f"null device, CUDA {torch.version.cuda}"))


if __name__ == "__main__":
    main()

"""Memory and time of an HSTU block by length, beside the plain form, and their agreement.

    python benchmarks/attention_memory.py

Two sequences of N events, d 64, one head, forward and backward pass; each case in a process of its
own. The plain form is the definition, `simplified_hstu.gated_attention`, differentiated by
autograd.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from record import environment, write

from model import KERNELS
from simplified_hstu import HSTUAttention

LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
SEQUENCES, WIDTH = 2, 64


def make(
    form: str, length: int, dtype: torch.dtype
) -> tuple[HSTUAttention, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    attention = KERNELS[FORMS[form]].attention
    block = HSTUAttention(WIDTH, 1, WIDTH, WIDTH, 0.0, length, True, True, attention).to(dtype)
    x = torch.randn(SEQUENCES * length, WIDTH, dtype=dtype).requires_grad_()
    times = torch.randint(1, 100_000, (SEQUENCES, length)).cumsum(1).flatten()
    return block, x, times


def run(block: HSTUAttention, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(SEQUENCES + 1) * (len(x) // SEQUENCES)
    return block(x, block.attention.prepare(offsets, times, times + 60, 1))


FORMS = {"ours": "torch", "plain": "plain"}


def run_case(form: str, length: int) -> dict[str, float]:
    """Seconds of the fastest of three, and peak memory beyond what stood before."""
    block, x, times = make(form, length, torch.float32)
    run(*make(form, 16, torch.float32)).sum().backward()  # what the first call alone needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run(block, x, times).square().sum().backward()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"form": form, "N": length, "seconds": round(min(seconds), 3), "mb": round(peak / 1e3)}


def disagreement(length: int) -> dict[str, float]:
    """Largest relative difference of output and of each gradient in float64."""
    results = []
    for form in FORMS:
        block, x, times = make(form, length, torch.float64)
        y = run(block, x, times)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
        names, inputs = zip(*block.named_parameters(), ("input", x), strict=True)
        grads = torch.autograd.grad((y * weights).sum(), inputs)
        results.append({"output": y} | dict(zip(names, grads, strict=True)))
    return {
        name: float(
            (found - results[1][name]).detach().abs().max() / results[1][name].detach().abs().max()
        )
        for name, found in results[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs=2, help="one form and length, for the script itself")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case[0], int(args.case[1]))))
        return
    rows = []
    for length in LENGTHS:
        for form in FORMS:
            command = [sys.executable, __file__, "--case", form, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1])
    differences = {length: disagreement(length) for length in (256, 1024)}
    for length, values in differences.items():
        print(f"float64, N {length}:", {name: f"{value:.1e}" for name, value in values.items()})
    result = {"rows": rows, "float64_relative_differences": differences}
    write("attention_memory", result | environment("cpu"))


if __name__ == "__main__":
    main()

"""Times, launches and memory of a step on any device, and what the device could do."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import record  # noqa: F401 (puts the package on the path)
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from engine.kernels import DTYPES


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(step: Callable[[], object], device: torch.device, count: int) -> float:
    """Of one of `count` steps in a row, with one wait for the device at their end."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / count


def device_rates(device: torch.device, size: int = 8192) -> dict[str, float]:
    """Bytes a second of a large copy, FLOP a second of large products, seconds of a launch."""
    a = torch.randn(size, size, device=device)
    b, number = torch.empty_like(a), torch.zeros(1, device=device)
    operations = {"copy": lambda: b.copy_(a), "launch": lambda: number.add_(1)}
    for precision in ("fp32", "bf16"):
        x = a.to(DTYPES[precision])
        operations[precision] = partial(torch.matmul, x, x)
    best = {}
    for name, operation in operations.items():
        count = 1000 if name == "launch" else 10
        best[name] = min(seconds(operation, device, count) for _ in range(3))
    products = {name: 2 * size**3 / best[name] for name in ("fp32", "bf16")}
    return products | {"copy": 2 * a.nbytes / best["copy"], "launch": best["launch"]}


def measure(step: Callable[[], object], device: torch.device, count: int = 10) -> dict[str, Any]:
    """Milliseconds of a step, of its host and of the busy device; launches; peak memory.

    `longest_ms`: the kernels (on the CPU, operations) that take longest, by name.
    Where the driver forbids profiling, launches and busy time are 0.
    """
    seconds(step, device, 3)  # compiles, and fills caches
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    host = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
        synchronize(device)
    row = {"ms": seconds(step, device, count) * 1e3, "host_ms": median(host) * 1e3}
    if device.type == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    kind, times = device.type.upper(), collections.Counter()
    with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
        seconds(step, device, 1)
    events = [event for event in profiler.events() if is_work(event, kind)]
    for event in events:
        times[event.name[:80]] += event.time_range.elapsed_us() / 1e3
    longest = {name: round(ms, 4) for name, ms in times.most_common(8)}
    return row | {"busy_ms": times.total(), "launches": len(events), "longest_ms": longest}


def is_work(event: Any, kind: str) -> bool:
    """A kernel, copy or memset, and not a range that torch names, such as an optimiser's step."""
    return event.device_type == getattr(DeviceType, kind) and not event.is_user_annotation

"""What tests/test_triton_attention.py runs in processes of their own; prints one line of JSON.

    TRITON_INTERPRET=1 python tests/triton_cases.py interpret NAME...
    python tests/triton_cases.py compile CAPABILITY DTYPE WIDTH
    python tests/triton_cases.py trace

Triton reads TRITON_INTERPRET when it is imported, so that one process cannot do both.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

import ops.triton_attention as tuned
from simplified_hstu import DEFINITION, HSTU, Attention, RelativeAttentionBias

N, D, AROUND = 80, 7, 40
# Lengths, heads, dqk, dv, has a position bias, has a time bias.
CASES = {
    "small": ([37, 5, 1], 2, 6, 4, True, True),
    "three tiles": ([70, 33, 1, 64, 32], 1, 17, 20, True, True),
    "four heads": ([34, 3], 4, 3, 33, True, True),
    "three heads, no time bias": ([40, 2], 3, 20, 17, True, False),
    "no position bias": ([2, 40], 1, 5, 16, False, True),
    "no bias": ([1, 33], 2, 16, 5, False, False),
    "many short sequences": ([1 + k % 3 for k in range(40)], 1, 6, 4, True, True),
}
TUNED = Attention(tuned.prepare, tuned.gated_attention)


def surround(x: Tensor) -> Tensor:
    """`x` in a table with rows of NaN, or of times far away, before and after it."""
    bad = float("nan") if x.is_floating_point() else 2**61
    rows = x.new_full((AROUND, *x.shape[1:]), bad)
    return torch.cat([rows, x, rows])[AROUND:-AROUND]


def errors(lengths, num_heads, dqk, dv, has_position, has_time) -> list[float]:
    """Of the values and of each gradient, as a share of its largest number."""
    torch.manual_seed(0)
    T, widths = sum(lengths), [dv, dv, dqk, dqk]
    key_times = surround(torch.randint(0, 10_000, (T,)).cumsum(0))
    query_times = surround(key_times + torch.randint(0, 5000, (T,))) if has_time else None
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(num_heads * sum(widths), D, dtype=torch.float64, requires_grad=True)
    bias = RelativeAttentionBias(N, has_position, has_time).double()
    for name, parameter in list(bias.named_parameters()):
        setattr(bias, name, nn.Parameter(surround(torch.randn_like(parameter))))
    offsets = surround(torch.tensor([0, *itertools.accumulate(lengths)]))
    gated_grad = torch.randn(T, num_heads * dv, dtype=torch.float64)
    results = []
    for form in (TUNED, DEFINITION):
        sequences = form.prepare(offsets, key_times, query_times, num_heads)
        gated = form.gated_attention(x, weight, bias, sequences, widths, N)
        leaves = [x, weight, *bias.parameters()]
        results.append([gated, *torch.autograd.grad(gated, leaves, gated_grad)])
    # NaN is no number of JSON, and no smaller than a limit.
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True)]


def checkpointed_error() -> list[float]:
    """Gradients of two blocks with gradient checkpointing, against those without."""
    offsets, times = torch.tensor([0, 9, 14, 16]), torch.arange(16) * 50
    grads = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        hstu = HSTU(
            2, "request", hidden_units=D, num_heads=2, attention_dim=6, linear_dim=4,
            dropout_rate=0.0, maxlen=9, has_position_bias=True, attention=TUNED,
        )  # fmt: skip
        hstu.gradient_checkpointing = is_checkpointed
        hstu(torch.randn(16, D), offsets, times, times + 60).square().sum().backward()
        grads.append([p.grad for p in hstu.parameters()])
    return [(a - b).abs().max().item() for a, b in zip(*grads, strict=True)]


def self_check_errors() -> list[float]:
    """What `engine.kernels` finds, in fp32 and fp16."""
    from engine.kernels import largest_error

    config = SimpleNamespace(
        maxlen=50, hidden_units=D, num_heads=2, attention_dim=6, linear_dim=4,
        position_bias=True, time_bias="request",
    )  # fmt: skip
    device = torch.device("cpu")
    return [largest_error(TUNED, device, config, precision) for precision in ("fp32", "fp16")]


def interpret(names: list[str]) -> dict[str, list[float]]:
    tuned.F = SimpleNamespace(linear=F.linear, silu=lambda x: surround(F.silu(x)))
    tuned.wrap_triton = lambda kernel: kernel  # it takes no interpreted one
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    others = {"checkpointing": checkpointed_error, "self-check": self_check_errors}
    found = {}
    for name in names:
        tuned.SUM = tl.constexpr(tl.float32 if name == "self-check" else tl.float64)
        tuned.MOST_PROGRAMS = 10 if name == "three tiles" else 2048  # one program has two blocks
        found[name] = others[name]() if name in others else errors(*CASES[name])
    return found


KERNELS = ("_forward_kernel", "_query_grads_kernel", "_key_grads_kernel")


def compile_kernels(capability: int, dtype: str, width: int) -> dict[str, dict[str, int]]:
    """Spilled bytes, shared memory and matrix instructions of each kernel, by ptxas."""
    shape = capability, dtype, width
    return {name: compile_kernel(getattr(tuned, name), *shape) for name in KERNELS}


def compile_kernel(kernel, capability: int, dtype: str, width: int) -> dict[str, int]:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas  # which comes with Triton
    from triton.compiler import ASTSource

    like = torch.empty(1, 4 * width, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    constants = tuned._sizes(like, width, width)[0]
    types = dict.fromkeys(("offsets", "key_times", "query_times"), "*i64")
    types |= dict.fromkeys(("activated", "attended_grad", "grad"), "*" + dtype)
    types |= {"T": "i32", "N": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(
        kernel, signature, {k: v for k, v in constants.items() if k in signature},
        {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t[0] == "*"},
    )  # fmt: skip
    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        arch = f"-arch=sm_{capability}" + "a" * (capability == 90)
        command = [get_ptxas(capability).path, "-v", arch, file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = max(int(size) for size in re.findall(r"(\d+) bytes spill", said))
    ptx = made.asm["ptx"]
    return {"spilled": spilled, "shared": made.metadata.shared, "mma": ptx.count("mma.sync"),
            "wgmma": ptx.count("wgmma.mma")}  # fmt: skip


def trace() -> list[int]:
    """Graphs of a compiled block so far, after each of several batches; nothing is computed.

    torch asks Triton's compiler which tensors a kernel writes: of one that it believes written to,
    such as the offsets, the backward pass would fail.
    """
    from torch._dynamo.utils import counters
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget

    from engine.training_setup import compile_blocks

    target = GPUTarget("cuda", 80, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    torch.compile = partial(torch.compile, backend="aot_eager")
    num_graphs = []
    with FakeTensorMode():
        hstu = HSTU(
            1, "request", hidden_units=D, num_heads=2, attention_dim=6, linear_dim=4,
            dropout_rate=0.0, maxlen=300, has_position_bias=True, attention=TUNED,
        )  # fmt: skip
        compile_blocks(hstu, "triton")
        # Lengths of one, two and many tiles; sequences of 1, 2 and more than there are heads.
        for lengths in ([50, 20, 7], [60, 44, 3, 2], [290, 5], [5], [1, 1, 1]):
            T, offsets = sum(lengths), [0, *itertools.accumulate(lengths)]
            x, times = torch.randn(T, D, requires_grad=True), torch.zeros(T, dtype=torch.int64)
            sequences = tuned.PackedSequences(torch.tensor(offsets), max(lengths), times, times)
            hstu.blocks[0](x, sequences).sum().backward()
            num_graphs.append(counters["stats"]["unique_graphs"])
    return num_graphs


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        print(json.dumps(interpret(sys.argv[2:])))
    elif sys.argv[1] == "trace":
        print(json.dumps(trace()))
    else:
        print(json.dumps(compile_kernels(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))

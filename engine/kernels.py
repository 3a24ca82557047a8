"""Which forms a model computes with: what --kernels asks for, and whether Triton's can be had."""

from __future__ import annotations

import importlib
import itertools
import logging

import torch

from files.atomic_io import DataError
from model import HSTUConfig, find_kernels
from ops.collectives import all_gather_objects
from simplified_hstu import DEFINITION, Attention, RelativeAttentionBias

log = logging.getLogger("hstu")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the self-check, as a share of the largest number of a tensor; several times what rounding does.
MOST_ERROR = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
CHECKED_LENGTHS = (70, 33, 1)  # three tiles, two and one


def choose_kernels(
    asked: str, device: torch.device, config: HSTUConfig, precision: str = "fp32"
) -> str:
    """A name for `model.find_kernels`, in all processes the same. `asked`: as --kernels.

    Raises:
        DataError: triton is asked for and impossible, or its self-check broke CUDA.
    """
    if asked in ("torch", "plain"):
        return asked
    if asked == "auto" and device.type != "cuda":
        return "torch"
    reasons = all_gather_objects(why_not_triton(device, config, precision))
    reason = next(filter(None, reasons), None)
    if reason is None:
        return "triton"
    if asked == "triton":
        raise DataError(f"--kernels triton: {reason}; use --kernels auto or torch")
    log.info("attention without Triton: %s", reason)
    return "torch"


def why_not_triton(device: torch.device, config: HSTUConfig, precision: str) -> str | None:
    """What speaks against Triton's attention here; None: nothing.

    Raises:
        DataError: after its self-check, nothing can run on the device any more.
    """
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if torch.__version__ < "2.7":
        return f"it needs torch 2.7, not {torch.__version__}"
    try:
        attention = importlib.import_module("ops.triton_attention")
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux, torch for CUDA brings it"
    widths = {"attention_dim": config.attention_dim, "linear_dim": config.linear_dim}
    for name, width in widths.items():
        if width > attention.MOST_WIDTH:
            return f"--{name} {width} is above {attention.MOST_WIDTH}"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"it needs compute capability 8.0, not {'.'.join(map(str, capability))}"
    log.info("checking Triton's attention; compiling it takes half a minute at the first start")
    try:
        error = largest_error(find_kernels("triton").attention, device, config, precision)
    except Exception as error:  # a compiler, a driver and a launcher raise what they like
        found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:  # an illegal access leaves CUDA unusable for the whole process
            raise DataError(
                f"Triton's self-check broke CUDA ({found}); use --kernels torch"
            ) from error
        return f"its self-check failed: {found}"
    if not error <= MOST_ERROR[precision]:  # NaN is no less
        return f"its self-check is off by {error:.2g} of the largest number"
    return None


def largest_error(
    attention: Attention, device: torch.device, config: HSTUConfig, precision: str
) -> float:
    """Of values and gradients on a small ragged batch, as a share of a tensor's largest number.

    The batch has the config's widths, heads and biases, so that what is checked is what will run.
    Expected is what the definition says in float64 on the CPU.
    """
    lengths = [min(length, config.maxlen) for length in CHECKED_LENGTHS]
    widths = [config.linear_dim] * 2 + [config.attention_dim] * 2
    num_rows, D = config.num_heads * sum(widths), config.hidden_units
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, weight = torch.randn(sum(lengths), D), torch.randn(num_rows, D) / D**0.5
        gated_grad = torch.randn(sum(lengths), config.num_heads * config.linear_dim)
        has_biases = config.position_bias, config.time_bias != "off"
        biases = RelativeAttentionBias(config.maxlen, *has_biases)
    x, weight, gated_grad = (t.to(DTYPES[precision]) for t in (x, weight, gated_grad))
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    times = torch.arange(sum(lengths)) ** 2 * 7

    def run(form: Attention, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, weight)]
        rab = biases.to(device, torch.promote_types(dtype, torch.float32))
        seconds = times.to(device)
        query_times = None if rab.time_weight is None else seconds + 60
        sequences = form.prepare(offsets, seconds, query_times, config.num_heads)
        gated = form.gated_attention(*leaves, rab, sequences, widths, config.maxlen)
        leaves += rab.parameters()
        grads = torch.autograd.grad(gated, leaves, gated_grad.to(device, gated.dtype))
        return [t.double().cpu() for t in (gated.detach(), *grads)]

    found = run(attention, device, DTYPES[precision])
    expected = run(DEFINITION, torch.device("cpu"), torch.float64)
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

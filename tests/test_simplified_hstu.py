"""HSTU as it is defined, against numbers worked out by hand, and what must hold in every form."""

from __future__ import annotations

import gc
import math
import shutil

import pytest
import torch
from torch import Tensor

import simplified_hstu
from engine.training_setup import compile_blocks
from model import KERNELS
from simplified_hstu import (
    DEFINITION,
    HSTU,
    HSTUAttention,
    RelativeAttentionBias,
    time_buckets,
)

N, D, H, DQK, DV = 9, 7, 2, 6, 4
LENGTHS = [9, 5, 2]
OFFSETS = torch.tensor([0, 9, 14, 16])


def silu(x: float) -> float:
    return x / (1.0 + math.exp(-x))


@pytest.fixture(params=sorted(KERNELS))
def attention(request) -> simplified_hstu.Attention:
    return KERNELS[request.param].attention


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    # floor(ln(max(1, |dt|)) / 0.301) by hand: ln 2 = 0.693, ln 60 = 4.094, ln 86400 = 11.367.
    [(0, 0), (1, 0), (2, 2), (-2, 2), (60, 13), (86400, 37), (2**62, 128)],
)
def test_time_buckets_are_those_of_the_reference(seconds, bucket):
    assert time_buckets(torch.tensor([seconds])).tolist() == [bucket]


@pytest.mark.parametrize(("has_position", "has_time"), [(True, True), (True, False), (False, True)])
def test_attention_begins_as_a_mean_of_what_was_seen(has_position, has_time):
    """Not as a sum of random signs, which is next to nothing and either sign of what is learnt."""
    bias = RelativeAttentionBias(N, has_position, has_time)
    rab = bias(N, torch.randint(10**6, (1, N, N)))
    mean = 0.5 * (has_position + has_time)
    assert (rab - mean).abs().max() < 0.2  # 7 standard deviations and more


def test_a_block_gives_the_numbers_worked_out_by_hand(attention):
    """Two events, D = 2, one head, dqk = 1, dv = 3, N = 2; every weight is written out.

    LayerNorm of (1, 0) is (1, -1) and of (0, 1) is (-1, 1), up to eps.
    """
    block = HSTUAttention(2, 1, 1, 3, 0.0, 2, True, True, attention).double()
    u, v, q, k = [[2, 0], [1, 1], [0, -1]], [[1, 0], [0, 2], [3, 1]], [[1, 0]], [[0, 2]]
    w_o, b_o = [[1, 0, 2], [0, 1, -1]], [0.5, -0.5]
    with torch.no_grad():
        block.qkv_proj.weight.copy_(torch.tensor(u + v + q + k))
        block.output_proj.weight.copy_(torch.tensor(w_o))
        block.output_proj.bias.copy_(torch.tensor(b_o))
        block.relative_bias.position_weight.copy_(torch.tensor([0.25, -0.75]))
        block.relative_bias.time_weight.zero_()[13] = 1.5

    normed = [(1, -1), (-1, 1)]
    U, V, Q, K = (
        [[silu(sum(w * x for w, x in zip(row, n, strict=True))) for row in rows] for n in normed]
        for rows in (u, v, q, k)
    )
    # Times: events at 0 s and 60 s, each query one minute after its own event. So the query of
    # event 0 sees event 0 from 60 s (bucket 13), that of event 1 sees event 1 from 60 s (13) and
    # event 0 from 120 s: ln 120 = 4.787, bucket 15, weight 0.
    a00 = silu(Q[0][0] * K[0][0] + 0.25 + 1.5) / 2
    a10 = silu(Q[1][0] * K[0][0] - 0.75 + 0.0) / 2
    a11 = silu(Q[1][0] * K[1][0] + 0.25 + 1.5) / 2
    attended = [
        [a00 * V[0][c] for c in range(3)],
        [a10 * V[0][c] + a11 * V[1][c] for c in range(3)],
    ]
    expected = []
    for x, gate, row in zip([(1, 0), (0, 1)], U, attended, strict=True):
        mean = sum(row) / 3
        std = math.sqrt(sum((value - mean) ** 2 for value in row) / 3)
        y = [g * (value - mean) / std for g, value in zip(gate, row, strict=True)]
        expected.append(
            [
                x[d] + sum(w * value for w, value in zip(w_o[d], y, strict=True)) + b_o[d]
                for d in (0, 1)
            ]
        )

    times = torch.tensor([0, 60])
    sequences = attention.prepare(torch.tensor([0, 2]), times, times + 60, num_heads=1)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = block(x, sequences)
    # 1e-4: the hand computation leaves out LayerNorm's eps.
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4
    )


def make_hstu(time_bias: str = "request", num_blocks: int = 2, **options) -> HSTU:
    torch.manual_seed(1)
    block = {"hidden_units": D, "num_heads": H, "attention_dim": DQK, "linear_dim": DV}
    block |= {"dropout_rate": 0.0, "maxlen": N, "has_position_bias": True}
    block |= {"attention": KERNELS["torch"].attention} | options
    hstu = HSTU(num_blocks, time_bias, **block).double()
    with torch.no_grad():  # large enough for every path to matter
        for parameter in hstu.parameters():
            parameter.normal_()
    return hstu


def run_hstu(hstu: HSTU, x: Tensor, offsets: Tensor = OFFSETS, shift: int = 700) -> Tensor:
    times = torch.arange(len(x)) ** 3
    return hstu(x, offsets, times, times + shift)


@pytest.fixture
def events() -> Tensor:
    return torch.randn(sum(LENGTHS), D, generator=torch.Generator().manual_seed(5)).double()


class TwiceTheBlock(HSTUAttention):
    def forward(self, x: Tensor, sequences) -> Tensor:
        return 2 * super().forward(x, sequences)


@pytest.mark.parametrize("own_block", [False, True])
@pytest.mark.parametrize("has_position", [True, False])
@pytest.mark.parametrize("time_bias", ["request", "event", "off"])
def test_the_last_events_alone_get_what_they_get_among_all(
    events, attention, time_bias, has_position, own_block
):
    hstu = make_hstu(time_bias, attention=attention, has_position_bias=has_position)
    if own_block:
        hstu.blocks[-1].__class__ = TwiceTheBlock
    times, last = torch.arange(len(events)) ** 3, OFFSETS[1:] - 1
    arguments = events.requires_grad_(), OFFSETS, times, times + 700
    expected, found = hstu(*arguments)[last], hstu(*arguments, last)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights, leaves = torch.randn_like(expected), [events, *hstu.parameters()]
    one, other = (torch.autograd.grad((y * weights).sum(), leaves) for y in (found, expected))
    for grad, expected_grad in zip(one, other, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-10)


def test_a_long_history_stays_within_the_range_of_float16(attention):
    length = 1000
    generator = torch.Generator().manual_seed(0)
    block = HSTUAttention(64, 1, 64, 64, 0.0, length, False, False, attention)
    with torch.no_grad():
        block.qkv_proj.weight.normal_(std=0.4, generator=generator)
    x = torch.randn(length, 64, generator=generator)
    times = torch.arange(length)
    sequences = attention.prepare(torch.tensor([0, length]), times, None, num_heads=1)
    found, expected = block.half()(x.half(), sequences), block.float()(x, sequences)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_future_events_cannot_change_past_outputs(events, attention):
    hstu, changed = make_hstu(attention=attention), events.clone()
    changed[6] = changed[6].flip(0)  # a plain shift is lost in the LayerNorm
    before, after = run_hstu(hstu, events), run_hstu(hstu, changed)
    assert torch.equal(before[:6], after[:6])
    assert not torch.isclose(before[6:9], after[6:9]).all(-1).any()


def test_other_sequences_cannot_change_a_sequence(events, attention):
    hstu, changed = make_hstu(attention=attention), events.clone()
    changed[9:14] = changed[9:14].flip(1)
    before, after = run_hstu(hstu, events), run_hstu(hstu, changed)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[14:], after[14:])


def test_a_sequence_is_the_same_alone_and_in_a_batch(events, attention):
    hstu, times = make_hstu(attention=attention), torch.arange(16) ** 3
    together = run_hstu(hstu, events)
    alone = hstu(events[9:14], torch.tensor([0, 5]), times[9:14], times[9:14] + 700)
    torch.testing.assert_close(together[9:14], alone, rtol=1e-12, atol=1e-12)


def test_the_time_bias_knows_what_its_name_says(events):
    times = torch.arange(16) ** 3
    requests, late_requests = times + 700, times + 90_000
    outputs = {
        mode: [make_hstu(mode)(events, OFFSETS, times, r) for r in (requests, late_requests)]
        for mode in ("request", "event", "off")
    }
    assert not torch.allclose(*outputs["request"])
    assert torch.equal(*outputs["event"])
    assert torch.equal(*outputs["off"])
    hstu = make_hstu("event")
    assert not torch.allclose(
        hstu(events, OFFSETS, times, times), hstu(events, OFFSETS, times * 50, times)
    )
    hstu = make_hstu("off")
    assert torch.equal(
        hstu(events, OFFSETS, times, times), hstu(events, OFFSETS, times * 50, times)
    )


def test_gradient_checkpointing_changes_nothing_but_memory(events):
    grads = []
    for is_on in (False, True):
        hstu = make_hstu(dropout_rate=0.5)
        hstu.gradient_checkpointing = is_on
        torch.manual_seed(3)
        run_hstu(hstu, events).square().sum().backward()
        grads.append([parameter.grad for parameter in hstu.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


def test_gradient_checkpointing_saves_no_activation_of_a_block(events):
    def num_saved() -> int:  # by attention; and by anything before this test
        gc.collect()
        return sum(type(x) is Tensor and x.is_inference() for x in gc.get_objects())

    hstu = make_hstu()
    for hstu.gradient_checkpointing in (False, True):
        before = num_saved()
        output = run_hstu(hstu, events)
        assert (num_saved() > before) is not hstu.gradient_checkpointing
        del output


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_blocks_give_the_same_for_all_lengths_without_compiling_again(events):
    plain, compiled = make_hstu(), make_hstu()
    compile_blocks(compiled, "torch")
    for first in (0, 2, 3, 5):
        offsets = torch.tensor([0, 9 - first, 16 - first])
        recompiling = torch._dynamo.config.patch(error_on_recompile=first > 2)
        with recompiling:
            found = run_hstu(compiled, events[first:], offsets)
            found.square().sum().backward()
        torch.testing.assert_close(found, run_hstu(plain, events[first:], offsets))


def test_compiling_leaves_a_block_of_ones_own_as_it_is(events):
    hstu = make_hstu()
    hstu.blocks[0] = torch.nn.Identity()
    hstu.blocks[0].forward = lambda x, sequences: x
    compile_blocks(hstu, "torch")
    assert not hasattr(hstu.blocks[0], "merge")


def test_at_initialisation_the_signal_is_finite_and_differs_at_every_position():
    torch.manual_seed(0)
    hstu = HSTU(2, "request", hidden_units=64, num_heads=1, attention_dim=64, linear_dim=64,
                dropout_rate=0.0, maxlen=101, has_position_bias=True,
                attention=DEFINITION)  # fmt: skip
    x = torch.randn(101, 64) * 0.02
    y = run_hstu(hstu, x, torch.tensor([0, 101])) - x  # what the blocks add
    assert y.isfinite().all()
    assert (y.std(-1) > 0.001).all()
    assert y.std(0).min() > 0.001

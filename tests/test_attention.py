"""The attention over padded groups against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import dot_product_similarity as similarity
import simplified_hstu
from ops import attention, ranking
from simplified_hstu import DEFINITION, Attention, RelativeAttentionBias, time_buckets

TUNED = Attention(attention.prepare, attention.gated_attention)
N, D, H, DQK, DV = 211, 7, 2, 6, 4
# Long enough for two tiles, lengths that share groups and lengths that do not.
LENGTHS = [199, 191, 150, 150, 149, 83, 41, 40, 7, 1]


def random_inputs(lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    T = sum(lengths)
    key_times = torch.randint(0, 100_000, (T,), generator=generator).cumsum(0)
    query_times = key_times + torch.randint(0, 5000, (T,), generator=generator)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(H * 2 * (DV + DQK), D, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "offsets": offsets,
            "key_times": key_times, "query_times": query_times}  # fmt: skip


def random_bias(has_position: bool = True, has_time: bool = True) -> RelativeAttentionBias:
    torch.manual_seed(1)
    bias = RelativeAttentionBias(N, has_position, has_time).double()
    for weight in bias.parameters():
        torch.nn.init.normal_(weight)
    return bias


def run(form: Attention, inputs: dict[str, Tensor], bias: RelativeAttentionBias) -> Tensor:
    query_times = None if bias.time_weight is None else inputs["query_times"]
    sequences = form.prepare(inputs["offsets"], inputs["key_times"], query_times, H)
    widths = [DV, DV, DQK, DQK]
    return form.gated_attention(inputs["x"], inputs["weight"], bias, sequences, widths, N)


def assert_equal(inputs: dict[str, Tensor], bias: RelativeAttentionBias) -> None:
    """Values and all gradients."""
    names = ["x", "weight", *(name for name, _ in bias.named_parameters())]
    leaves = [inputs["x"], inputs["weight"], *bias.parameters()]
    found, expected = (run(form, inputs, bias) for form in (TUNED, DEFINITION))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    grads, expected_grads = (
        torch.autograd.grad((y * weights).sum(), leaves) for y in (found, expected)
    )
    for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.fixture(params=["as it is", "small tiles", "one sequence at a time", "no cache"])
def setting(request, monkeypatch):
    changes = {
        "as it is": {},
        "small tiles": {"TILE": 16},
        "one sequence at a time": {"CPU_SCORES": 1},
        "no cache": {"CACHED_BUCKETS": 0, "CACHED_SCORES": 0},
    }
    for name, value in changes[request.param].items():
        monkeypatch.setattr(attention, name, value)


def test_values_and_all_gradients_equal_the_definition(setting):
    assert_equal(random_inputs(), random_bias())


@pytest.mark.parametrize(("has_position", "has_time"), [(True, False), (False, True), (False,) * 2])
def test_biases_that_are_off_are_off(has_position, has_time):
    assert_equal(random_inputs(), random_bias(has_position, has_time))


def test_groups_are_right_in_any_order_of_lengths(setting):
    assert_equal(random_inputs([2, 140, 1, 5, 90, 4]), random_bias())


def test_groups_have_each_event_once_within_the_limit_of_scores(monkeypatch):
    monkeypatch.setattr(attention, "CPU_SCORES", 100)
    lengths = [12, 7, 7, 4, 4, 4, 1, 1]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    groups = attention.prepare(offsets, torch.zeros(40, dtype=torch.int64), None, 1).groups
    bounds = [(group.events.start, group.events.stop) for group in groups]
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == 40
    for group in groups:
        rows = torch.arange(*group.events.indices(40)[:2])[:, None]
        assert torch.equal(group.unpad(group.pad(rows)), rows)
        assert group.shape[0] * group.shape[1] ** 2 <= 100 or group.shape[0] == 1


def test_the_numbers_of_the_definition_are_repeated_as_they_are():
    for name in ("BUCKET_LOG_WIDTH", "NUM_TIME_BUCKETS", "NORM_EPS"):
        assert getattr(attention, name) == getattr(simplified_hstu, name)
    assert (ranking.TIE, ranking.MISS) == (similarity.TIE, similarity.MISS)


def test_time_buckets_equal_the_definition_up_to_a_year():
    seconds = torch.arange(-60, 366 * 86_400, 7)
    assert torch.equal(attention.time_buckets(seconds.double()), time_buckets(seconds))


def test_the_ordered_sums_for_a_gpu_are_those_by_bucket():
    by_pair = torch.randn(3, 5, 7, dtype=torch.float64)
    buckets = torch.randint(0, attention.NUM_TIME_BUCKETS, (3, 35))
    expected = torch.bincount(buckets.flatten(), by_pair.flatten(), attention.NUM_TIME_BUCKETS)
    torch.testing.assert_close(attention._sum_by_bucket(by_pair, buckets), expected)

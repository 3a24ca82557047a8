"""The parts around the encoder that stand alone; test_model.py tests them in the model."""

from __future__ import annotations

import pytest
import torch

from hstu_components import (
    ArrayEncoder,
    Dropout,
    HistoryResidual,
    MixPrevious,
    gather_lists,
    pad_lists,
    running_sums,
)


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)  # not a multiple of the four numbers that share a draw
    y = Dropout(0.2)(x)
    assert (y == 0).float().mean() == pytest.approx(0.2, abs=0.002)
    assert y.mean() == pytest.approx(1.0, abs=0.003)
    assert y[y != 0].unique() == pytest.approx(1.25, rel=1e-4)


def test_dropout_is_even_over_rows_and_columns():
    torch.manual_seed(0)
    is_kept = Dropout(0.3)(torch.ones(2000, 64)) != 0
    # Six standard deviations of a column's and a row's mean.
    assert (is_kept.float().mean(0) - 0.7).abs().max() < 6 * (0.21 / 2000) ** 0.5
    assert (is_kept.float().mean(1) - 0.7).abs().max() < 6 * (0.21 / 64) ** 0.5


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_of_nothing_and_of_all(rate):
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(rate)(x), (1 - rate) * x + 0.0)


def test_dropout_passes_gradients_where_it_keeps():
    x = torch.randn(11, 13, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0) * 2.0)


def test_dropout_is_off_in_evaluation():
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_an_event_gets_shares_of_those_before_in_its_sequence_alone():
    x, positions = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    mix = MixPrevious(2, 3)
    torch.testing.assert_close(mix(x, positions), x)
    one, two = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.5, 1.0, 0.0])
    with torch.no_grad():
        mix.weights.copy_(torch.stack([one, two]))
    expected = [
        x[0],
        x[1] + one * x[0],
        x[2] + one * x[1] + two * x[0],
        x[3] + one * x[2] + two * x[1],
        x[4],
        x[5] + one * x[4],
    ]
    torch.testing.assert_close(mix(x, positions), torch.stack(expected))
    empty = mix(x[:0], positions[:0])  # of several processes one may have no sequence
    assert empty.shape == (0, 3)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 300])
def test_running_sums_are_the_sums_so_far(length):
    x = torch.randn(length, 3, dtype=torch.float64)
    torch.testing.assert_close(running_sums(x), x.cumsum(0))


def test_history_residual_adds_the_items_of_the_own_history_and_the_newest():
    torch.manual_seed(0)
    lengths = [1, 5, 200]
    x, items = torch.randn(206, 7), 3 * torch.randn(206, 7)
    positions = torch.cat([torch.arange(n) for n in lengths])
    unit = [row / row.norm() for row in items]
    expected = []
    for t, n in enumerate((positions + 1).tolist()):
        history = unit[t - n + 1 : t + 1]
        expected.append(x[t] / x[t].norm() + 2 * sum(history) / n**0.5 + 2 * unit[t])
    found = HistoryResidual()(x, items, positions)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_lists_padded_for_a_gpu_have_the_values_and_the_mean_of_gathered_ones():
    values, offsets = torch.tensor([4, 1, 2, 5, 3]), torch.tensor([0, 0, 1, 1, 4, 5])
    rows = torch.tensor([3, 0, 1, 4, 3])
    flat, bags = gather_lists(values, offsets, rows)
    padded, padded_bags = pad_lists(values, offsets, rows, longest=3)
    assert padded.view(5, 3).tolist() == [[1, 2, 5], [0, 0, 0], [4, 0, 0], [3, 0, 0], [1, 2, 5]]
    assert padded[padded > 0].tolist() == flat.tolist()
    encoder = ArrayEncoder(7, 5)
    torch.testing.assert_close(encoder(padded, padded_bags), encoder(flat, bags))
    assert pad_lists(values[:0], offsets * 0, rows, longest=0)[0].tolist() == []


def test_no_lists_padded_for_a_gpu_have_no_vectors():
    """A process's share of a small batch may have no sequence."""
    values, offsets = torch.tensor([4, 1]), torch.tensor([0, 1, 2])
    arguments = pad_lists(values, offsets, torch.zeros(0, dtype=torch.int64), longest=1)
    assert ArrayEncoder(7, 5).to("meta")(*(x.to("meta") for x in arguments)).shape == (0, 7)

"""benchmarks/gpu.py measures on the CPU, at tiny shapes, what it measures on a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpu
import numpy as np
import pytest
import torch
from device_time import device_rates, measure
from gpu import Shape, equal_bits, measure_all, minutes_to, write_like_movielens
from step import hstu_flop, least_bytes

from files.atomic_io import DataError
from files.data_folder import read_manifest
from files.sequences import Split

CPU = torch.device("cpu")
SMALL = "--num_negatives 8 --batch_size 4 --num_blocks 1"
TRAININGS = {"small": (6, 8, SMALL), "small, bf16": (5, 8, f"{SMALL} --precision bf16")}
SHAPES = {
    "block": Shape(2, 1, 9, 8, 2, 4, 3),
    "attention": Shape(3, 1, 5, 1, 2, 4, 3, False, "off"),
}


def test_a_self_check_that_breaks_cuda_leaves_what_is_known(monkeypatch):
    """No measurement works in the process after it."""

    def broken(*_):
        raise DataError("illegal memory access")

    written = {}
    of_cuda = {"is_available": True, "current_device": 0, "get_device_name": "Card 7"}
    for name, value in (of_cuda | {"get_device_capability": (9, 0)}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu, "run_gpu_tests", lambda: {"exit_code": 1})
    monkeypatch.setattr(gpu, "why_not_triton", broken)
    monkeypatch.setattr(gpu, "write", written.__setitem__)
    gpu.main()
    assert written["gpu_card-7"]["why_not_triton"] == "illegal memory access"
    assert written["gpu_card-7"]["gpu_tests"] == {"exit_code": 1}


def test_every_measurement_runs_and_says_a_positive_number(data):
    rates = device_rates(CPU, 64)
    assert all(rate > 0 for rate in rates.values())
    rows = measure_all(data, TRAININGS, SHAPES, rates, CPU)
    kinds = [(row["name"], row["precision"]) for row in rows]
    assert kinds == [
        ("small", "fp32"), ("small, bf16", "bf16"), ("block", "fp32"), ("block", "bf16"),
        ("attention", "fp32"), ("attention", "bf16"),
    ]  # fmt: skip
    for row in rows:
        assert row["kernels"] == "torch"
        for name in ("ms", "host_ms", "busy_ms", "launches", "share_of_limit", "tokens_per_s"):
            assert row[name] > 0, name
        assert row["longest_ms"]
    assert [row["equal_bits"] for row in rows[:2]] == [True, True]
    errors = [row["error_from_float64"] for row in rows[2:]]
    assert 0 < errors[0] < 1e-5 < errors[1] < 0.1


def test_two_trainings_with_other_weights_have_no_equal_bits(data, monkeypatch):
    seeds = iter(["--seed 1", "--seed 2"])
    plain = gpu.Ours
    monkeypatch.setattr(gpu, "Ours", lambda a, b, c, flags, *rest: plain(
        a, b, c, f"{flags} {next(seeds)}", *rest))  # fmt: skip
    assert equal_bits(data, TRAININGS["small"], CPU) == {"equal_bits": False}


def test_a_step_that_does_not_fit_is_a_row_that_says_so():
    def make(device):
        raise torch.OutOfMemoryError("80 GB")

    row = gpu.report("large", "fp32", make, {}, CPU)
    assert row == {"name": "large", "precision": "fp32", "failed": "OutOfMemoryError: 80 GB"}


def test_a_check_that_fails_leaves_the_other_rows(data, monkeypatch):
    def fail(*_):
        raise RuntimeError("an illegal access")

    monkeypatch.setattr(gpu, "largest_error", fail)
    rows = measure_all(data, {}, SHAPES, device_rates(CPU, 64), CPU)
    assert [row["failed"] for row in rows] == ["RuntimeError: an illegal access"] * 4


def test_a_step_is_timed_with_its_host_and_its_operations():
    x = torch.randn(200, 200)
    row = measure(lambda: x @ x, CPU, 3)
    assert row["host_ms"] <= 2 * row["ms"]
    assert "aten::mm" in row["longest_ms"]
    assert row["launches"] >= 1


def test_the_limit_counts_each_product_and_each_tensor_of_a_block():
    shape = SHAPES["block"]._replace(num_blocks=2)
    H, D, dqk, dv = 2, 8, 4, 3
    lengths = torch.tensor([3, 2])
    pairs = (1 + 2 + 3) + (1 + 2)
    flop = hstu_flop(shape, lengths)
    assert flop["attention"] == 2 * 3 * 2 * H * pairs * (dqk + dv)
    assert flop["linear"] == 2 * 3 * 2 * 5 * (D * H * (2 * dqk + 2 * dv) + H * dv * D)
    columns = D + H * (2 * dqk + 2 * dv) + H * dv + D  # in, U V Q K, gated, out
    model = torch.nn.Linear(3, 2)
    for precision, size in (("fp32", 4), ("bf16", 2)):
        found = least_bytes(shape, 5, model, precision)
        assert found == 2 * (2 + 4) * 5 * columns * size + 9 * 4 * 8


def test_a_training_stands_beside_what_is_recorded_and_one_that_fails_says_so(monkeypatch):
    def train(name, *_):
        if name == "ml-1m-large":
            raise subprocess.CalledProcessError(3, [])
        curve = [{"seconds": 60.0, "NDCG@10": 0.1}, {"seconds": 90.0, "NDCG@10": 0.3}]
        return {"curve": curve, "valid": {"NDCG@10": 0.3}, "test": {"NDCG@10": 0.29}}

    monkeypatch.setattr(gpu, "train", train)
    small, large = gpu.movielens("raw", Path("work"), CPU)
    assert large == {"name": "ml-1m-large", "failed": "exit code 3"}
    assert (small["minutes"], small["minutes_to_recorded"]) == (1.5, 1.5)
    assert (small["valid"], small["test"]) == (0.3, 0.29)
    assert len(small["recorded_valid"]) == len(small["recorded_test"]) == 3


def test_minutes_count_until_validation_is_as_good_as_recorded():
    curve = [{"seconds": 60.0 * n, "NDCG@10": n / 10} for n in range(1, 5)]
    assert minutes_to(0.3, curve) == 3
    assert minutes_to(0.5, curve) is None


def test_made_sequences_are_about_as_long_as_movielens(tmp_path):
    manifest = read_manifest(write_like_movielens(tmp_path))
    lengths = np.diff(Split(tmp_path, "train", *manifest[:3]).offsets)
    assert lengths.min() >= 20 and 90 < np.median(lengths) < 102
    assert 150 < lengths.mean() < 180


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "torch finds no CUDA device" in capsys.readouterr().err

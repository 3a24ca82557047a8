"""Several ranks train what one process trains: two gloo processes on the CPU."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import prepare_synthetic
import pytest
import torch
import torch.multiprocessing as mp
from conftest import NUM_ITEMS, write_tiny

import hstu_components
import main as main_module
from dataset import BatchSampler, MyDataset, count_items, deal
from dot_product_similarity import DotProductSimilarity
from engine.flags import get_args
from engine.training_step import Updater
from files.atomic_io import DataError, read_json
from files.checkpoint import load_checkpoint
from files.data_folder import read_manifest
from ops import collectives, sharded_table

ROOT = Path(__file__).resolve().parent.parent
NUM_RANKS = 2
SMALL = [
    "--device=cpu", "--num_workers=0", "--num_epochs=2", "--batch_size=5", "--maxlen=6",
    "--hidden_units=8", "--attention_dim=5", "--linear_dim=6", "--warmup_steps=2",
    "--num_negatives=4", "--log_every=1",
]  # fmt: skip
# Float32 sums in another order: the gradients here are around 0.1.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def environment(rank: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(NUM_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def serve(rank: int, port: int, pipe: Any) -> None:
    """A rank: answers each (function, arguments) with what it returns, or the error's text."""
    os.environ |= environment(rank, port)
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    collectives.join(is_on_cuda=False)
    while (call := pipe.recv()) is not None:
        function, args = call
        try:
            pipe.send((function(*args), None))
        except BaseException as error:
            pipe.send((None, f"{type(error).__name__}: {error}"))
    collectives.leave()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """Calls a function of this module on all ranks at once; their answers in order."""
    context, port = mp.get_context("spawn"), free_port()
    pairs = [context.Pipe() for _ in range(NUM_RANKS)]
    processes = [
        context.Process(target=serve, args=(rank, port, pipe), daemon=True)
        for rank, (_, pipe) in enumerate(pairs)
    ]
    for process in processes:
        process.start()

    def call(function: Callable, *args: Any) -> list[Any]:
        for pipe, _ in pairs:
            pipe.send((function, args))
        answers = []
        for pipe, _ in pairs:
            assert pipe.poll(60), "a rank hangs"
            answers.append(pipe.recv())
        assert [error for _, error in answers] == [None] * NUM_RANKS
        return [answer for answer, _ in answers]

    yield call
    for pipe, _ in pairs:
        pipe.send(None)
    for process in processes:
        process.join(10)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "data")


# ------------------------------------------------------------------------------- loss and gradients


def gradients(
    data: Path, negatives: str, indices: list[int], is_sparse: bool, wrong: str = ""
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, of this rank or of the only process."""
    whole_rows, hstu_components.DENSE_ROWS = hstu_components.DENSE_ROWS, 2 if is_sparse else 99
    args = get_args([*SMALL, f"--data_dir={data}", "--dropout_rate=0", "--clip_grad=0"])
    train_set = make_set(data, "train", negatives)
    run = prepare(args, train_set)
    hstu_components.DENSE_ROWS = whole_rows
    batch = make_batch(train_set, indices)
    if wrong == "mean of each rank":
        own = (batch.target_index >= 0).sum()
        batch = batch._replace(num_targets=own * collectives.num_ranks())
    if wrong == "negatives of others without gradient":
        is_own = torch.zeros(len(batch.distinct_ids), 1, dtype=torch.bool)
        is_own[torch.cat([batch.item_index, batch.target_index])] = True
        plain = run.model.compute_infonce_loss
        run.model.compute_infonce_loss = lambda queries, rows, *rest: plain(
            queries, torch.where(is_own, rows, rows.detach()), *rest
        )
    if wrong == "negatives of each rank":
        batch = batch._replace(negative_index=batch.target_index.unique(), negative_log_q=None)
    found = {}

    def record() -> None:
        named = run.model.named_parameters()
        found.update({n: p.grad.to_dense().clone() for n, p in named if p.grad is not None})

    run.updater.optimizer.step = record
    values = run.updater.step([batch], epoch=1, step=1)
    return float(values["Loss/train"]), found | {"norm": values["Train/grad_norm"]}


def make_set(data: Path, split: str, negatives: str) -> MyDataset:
    counts = count_items(data, "train", NUM_ITEMS)
    return MyDataset(data, split, 6, negatives, 4, target_counts=counts, has_logq=True)


def prepare(args: Any, train_set: MyDataset) -> main_module.Run:
    manifest = read_manifest(args.data_dir)
    with collectives.first_goes_ahead():
        features = main_module.read_features(args, manifest)
    return main_module.prepare_run(args, manifest, features, train_set)


def make_batch(dataset: MyDataset, indices: list[int]) -> Any:
    sampler = BatchSampler(len(indices), 99, 3, False, collectives.rank(), collectives.num_ranks())
    draw = next(iter(sampler))
    return dataset.collate_fn(dataset.__getitems__(draw._replace(indices=np.array(indices))))


@pytest.mark.parametrize("is_sparse", [False, True], ids=["whole tables", "rows"])
@pytest.mark.parametrize("negatives", ["all", "batch", "uniform", "mixed"])
@pytest.mark.parametrize("indices", [[0, 3, 5, 8, 9], [7]], ids=["3 and 2", "1 and 0"])
def test_loss_and_every_gradient_are_those_of_one_process(
    negatives, is_sparse, indices, data, ranks
):
    loss, expected = gradients(data, negatives, indices, is_sparse)
    answers = ranks(gradients, data, negatives, indices, is_sparse)
    for rank_loss, found in answers:
        assert rank_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() >= expected.keys()
        for name, gradient in found.items():
            whole = expected.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, whole, **CLOSE, msg=name)
    # All ranks make the same update: to the bit, or they would drift apart.
    (_, first), (_, second) = answers
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "wrong",
    [
        "mean of each rank",
        "negatives of others without gradient",
        "negatives of each rank",
    ],
)
def test_the_comparison_would_find_a_wrong_form(wrong, data, ranks):
    indices = [0, 3, 5, 8, 9]
    _, expected = gradients(data, "batch", indices, False)
    _, found = ranks(gradients, data, "batch", indices, False, wrong)[0]
    name = "embedding_module.item_emb.weight"
    error = (found[name] - expected[name]).norm() / expected[name].norm()
    assert error > 0.01


def negatives_of(data: Path, split: str, negatives: str, indices: list[int]) -> list[Any]:
    batch = make_batch(make_set(data, split, negatives), indices)
    names = ("distinct_ids", "negative_index", "negative_log_q", "num_targets")
    return [getattr(batch, name) for name in names] + [batch.user_ids.tolist()]


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("negatives", ["all", "batch", "uniform", "mixed"])
def test_negatives_and_their_corrections_are_those_of_one_process(negatives, split, data, ranks):
    *expected, users = negatives_of(data, split, negatives, list(range(7)))
    answers = ranks(negatives_of, data, split, negatives, list(range(7)))
    for *found, _ in answers:
        for one, other in zip(found, expected, strict=True):
            assert one is other is None or torch.equal(one, other)
    shares = [share for *_, share in answers]
    assert sorted(shares[0] + shares[1]) == sorted(users)
    assert [len(share) for share in shares] == [3, 4]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_shares_are_whole_disjoint_and_about_as_long(num_ranks):
    lengths = np.sort(np.random.default_rng(0).zipf(1.5, 64).clip(max=200))[::-1]
    shares = [deal(64, rank, num_ranks) for rank in range(num_ranks)]
    assert (np.sum(shares, 0) == 1).all()
    events = [lengths[share].sum() for share in shares]
    assert max(events) - min(events) <= lengths[0]


# ----------------------------------------------------------------------------------------- training


def train(
    data: Path, output: Path, flags: list[str], steps: int | None = None, dense_rows: int = 99
) -> list[Any]:
    """Train, to the end or killed behind a step; the sequences of each batch, sorted."""
    usual = hstu_components.DENSE_ROWS
    hstu_components.DENSE_ROWS = main_module.DENSE_ROWS = dense_rows
    folders = [f"--data_dir={data}", f"--output_dir={output}", f"--log_dir={output}/logs"]
    fetch, step, drawn, taken = MyDataset.__getitems__, Updater.step, [], []

    def fetching(dataset: MyDataset, draw: Any) -> Any:
        if dataset.split == "train":
            drawn.append(sorted(draw.indices.tolist()))
        return fetch(dataset, draw)

    def stepping(*args: Any) -> Any:
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*args)

    MyDataset.__getitems__, Updater.step = fetching, stepping
    try:
        main_module.train(get_args([*folders, *SMALL, *flags]))
    except KeyboardInterrupt:
        pass
    finally:
        MyDataset.__getitems__, Updater.step = fetch, step
        hstu_components.DENSE_ROWS = main_module.DENSE_ROWS = usual
    return drawn[: len(taken)]


def weights(output: Path, name: str = "model_epoch_2.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(output / name)["weights"]


def assert_alike(one: Path, other: Path) -> None:
    for (name, weight), other_weight in zip(
        weights(one).items(), weights(other).values(), strict=True
    ):
        # Adam divides by a gradient's own size: last bits of small ones count.
        torch.testing.assert_close(weight, other_weight, rtol=1e-3, atol=2e-5, msg=name)
    for split in ("valid", "test"):
        pairs = [read_json(output / "metrics.json")[split] for output in (one, other)]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-4)


EXACT = ["--dropout_rate=0", "--save_every_steps=1"]


@pytest.fixture(scope="module", params=["all", "mixed"])
def whole(request, data, tmp_path_factory) -> tuple[str, Path, list[Any]]:
    """The negatives, output folder and batches of a run of one process."""
    output = tmp_path_factory.mktemp("whole")
    flags = [*EXACT, f"--negatives={request.param}"]
    return request.param, output, train(data, output, flags)


def test_two_ranks_train_what_one_process_trains(whole, data, ranks, tmp_path):
    negatives, output, drawn = whole
    assert ranks(train, data, tmp_path, [*EXACT, f"--negatives={negatives}"]) == [drawn, drawn]
    assert_alike(tmp_path, output)


def test_a_run_goes_on_with_other_numbers_of_ranks(whole, data, ranks, tmp_path):
    negatives, output, drawn = whole
    flags = [*EXACT, f"--negatives={negatives}"]
    first = ranks(train, data, tmp_path, flags, 2)[0]
    second = train(data, tmp_path, flags, 2)
    third = ranks(train, data, tmp_path, flags)[0]
    assert (len(first), len(second)) == (2, 2)
    assert first + second + third == drawn
    assert_alike(tmp_path, output)


def test_with_as_many_ranks_a_resumed_run_ends_with_the_same_bytes(data, ranks, tmp_path):
    flags = ["--dropout_rate=0.4", "--save_every_steps=1", "--negatives=mixed"]
    ranks(train, data, tmp_path / "whole", flags)
    ranks(train, data, tmp_path / "o", flags, 4)
    ranks(train, data, tmp_path / "o", flags)
    for name in ("model_epoch_1.pt", "model_epoch_2.pt", "model_best.pt", "metrics.json"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def seed_of(data: Path, step: int) -> int:
    """The seed of dropout behind a step."""
    args, train_set = get_args([*SMALL, f"--data_dir={data}"]), make_set(data, "train", "all")
    prepare(args, train_set).updater.step([make_batch(train_set, [1, 2])], epoch=1, step=step)
    return torch.initial_seed()


def test_dropout_differs_by_rank_and_step(data, ranks):
    seeds = [ranks(seed_of, data, step) for step in (1, 2, 1)]
    assert seeds[0] == seeds[2]
    assert len({*seeds[0], *seeds[1]}) == 4


def writes_of(data: Path, output: Path) -> list[str]:
    """Files that this rank opens to write during a training."""
    opened: list[str] = []

    def record(event: str, arguments: tuple) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            opened.append(str(arguments[0]))

    sys.addaudithook(record)
    train(data, output, [])
    return [path for path in opened if not path.startswith("/dev/")]


def test_rank_0_alone_writes(data, ranks, tmp_path):
    first, second = ranks(writes_of, data, tmp_path / "o")
    assert any("resume_" in path for path in first)
    assert second == []


# ---------------------------------------------------------------------------------- sharded tables


NUM_ROWS, WIDTH = 103, 7


def look_up(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Vectors, the whole table and its gradient; a rank's part of the batch weighs 1, 2, ..."""
    torch.manual_seed(5)
    sharded_table.CHUNK_ROWS = 32
    table = sharded_table.ShardedEmbedding(NUM_ROWS, WIDTH)
    vectors = table(ids)
    (vectors * (collectives.rank() + 1) * torch.arange(WIDTH)).sum().backward()
    gradient = sharded_table.gather_table(table.weight.grad.to_dense(), NUM_ROWS)
    weight = table.state_dict()["weight"]
    table.load_state_dict({"weight": torch.arange(1.0 * NUM_ROWS * WIDTH).view(NUM_ROWS, WIDTH)})
    loaded = table(ids).detach()
    return vectors.detach(), loaded, len(table.weight), weight, gradient


def test_a_sharded_table_is_the_whole_table(ranks):
    ids = torch.tensor([4, 0, 102, 7, 1, 7, 64])
    answers = ranks(look_up, ids)
    torch.manual_seed(5)
    whole = torch.nn.Embedding(NUM_ROWS, WIDTH, padding_idx=0)
    (whole(ids) * 3 * torch.arange(WIDTH)).sum().backward()
    for vectors, loaded, *_ in answers:
        assert torch.equal(vectors, whole(ids))
        numbers = torch.arange(1.0 * NUM_ROWS * WIDTH).view(NUM_ROWS, WIDTH)
        assert torch.equal(loaded[ids > 0], numbers[ids[ids > 0]])
    assert [size for _, _, size, *_ in answers] == [52, 51]
    *_, weight, gradient = answers[0]
    assert torch.equal(weight, whole.weight)
    torch.testing.assert_close(gradient, whole.weight.grad)
    assert answers[1][-1].device.type == "meta"


def shard_of(data: Path, negatives: str) -> tuple[int, int] | str:
    """Rows of the item table on this rank, and weights of the model; or why there is no shard."""
    main_module.DENSE_ROWS = 2
    args = get_args([*SMALL, f"--data_dir={data}", "--shard_items"])
    try:
        run = prepare(args, make_set(data, "train", negatives))
    except DataError as error:
        return str(error)
    return len(run.model.embedding_module.item_emb.weight), main_module.num_weights(run.model)


def test_each_rank_holds_its_part_of_the_items(data, ranks):
    whole = prepare(get_args([*SMALL, f"--data_dir={data}"]), make_set(data, "train", "mixed"))
    total = sum(weight.numel() for weight in whole.model.parameters())
    assert ranks(shard_of, data, "mixed") == [(12, total), (12, total)]
    assert "sampled negatives" in ranks(shard_of, data, "all")[0]


def ranks_of(split_at: int, *arguments: torch.Tensor) -> torch.Tensor:
    """Ranks of this rank's queries among all items, of which it holds some."""
    queries, items, target_ids, seen_ids, offsets = arguments
    part = [slice(0, split_at), slice(split_at, None)][collectives.rank()]
    bounds = offsets[part.start : None if part.stop is None else part.stop + 1]
    return sharded_table.ranks_over_shards(
        queries[part],
        sharded_table.keep_own_items(items.split(5)),
        target_ids[part],
        (queries[part] * items[target_ids[part] - 1]).sum(1),
        (seen_ids[bounds[0] : bounds[-1]], bounds - bounds[0]),
    )


@pytest.mark.parametrize("split_at", [0, 4, 9])
def test_ranks_among_sharded_items_are_those_among_all(split_at, ranks):
    generator = torch.Generator().manual_seed(3)
    items = torch.nn.functional.normalize(torch.randn(23, 3, generator=generator))
    items[11] = items[6]  # a tie, on the other rank
    queries = torch.nn.functional.normalize(torch.randn(9, 3, generator=generator))
    queries[3] = torch.nan
    target_ids = torch.tensor([7, 12, 23, 1, 2, 7, 5, 5, 9])
    seen_ids = torch.randint(1, 24, (27,), generator=generator)
    offsets = torch.arange(0, 28, 3)
    expected = DotProductSimilarity().target_ranks(
        queries, items, target_ids - 1, (seen_ids - 1, offsets)
    )
    arguments = queries, items, target_ids, seen_ids, offsets
    assert torch.cat(ranks(ranks_of, split_at, *arguments)).tolist() == expected.tolist()


def test_sharded_items_train_and_resume_like_whole_ones(data, ranks, tmp_path):
    flags = [*EXACT, "--negatives=mixed", "--clip_grad=0.1"]
    drawn = train(data, tmp_path / "whole", flags, None, 2)
    sharded = [*flags, "--shard_items"]
    first = ranks(train, data, tmp_path / "o", sharded, 2, 2)[0]
    second = train(data, tmp_path / "o", sharded, 1, 2)
    third = ranks(train, data, tmp_path / "o", sharded, None, 2)[0]
    assert first + second + third == drawn
    assert_alike(tmp_path / "o", tmp_path / "whole")


# -------------------------------------------------------------------------- signals and dead ranks


LONG = [
    "--device=cpu", "--num_workers=0", "--num_epochs=3", "--batch_size=8", "--hidden_units=8",
    "--attention_dim=5", "--linear_dim=6", "--log_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def long_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    prepare_synthetic.write(folder, 200, 400, 7)
    return folder


def start(*flags: str) -> list[subprocess.Popen]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "main.py", *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | environment(rank, port),
        )
        for rank in range(NUM_RANKS)
    ]  # fmt: skip


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stdout:
        if f" step {step}/" in line:
            return
    raise AssertionError(process.stderr.read())


def test_a_signal_to_one_rank_stops_all_with_a_state(long_data, tmp_path):
    folders = [f"--data_dir={long_data}", f"--output_dir={tmp_path}", f"--log_dir={tmp_path}/l"]
    processes = start(*folders, *LONG)
    wait_for_step(processes[0], 30)
    processes[1].send_signal(signal.SIGTERM)
    (out, err), second = (process.communicate(timeout=30) for process in processes)
    assert ([process.returncode for process in processes], err) == ([143] * 2, "")
    assert second == ("", "")
    step = re.search(
        r"^stopped by SIGTERM at epoch 2, step (\d+); the same command goes on", out, re.M
    )[1]
    state = load_checkpoint(tmp_path / f"resume_{step}.pt")
    assert state["progress"]["step"] == int(step)


def test_torchrun_ranks_say_once_why_they_end(long_data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={NUM_RANKS}"]
    flags = [f"--data_dir={long_data}", f"--output_dir={tmp_path}", *LONG]
    done = subprocess.run(
        [*command, "--standalone", "main.py", *flags, "--inference_only", "--state_dict_path=x.pt"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: --inference_only exports in one process: start python, not torchrun"]


@pytest.mark.parametrize("found", [{}, {"WORLD_SIZE": "2"}])
def test_half_of_torchruns_environment_is_one_line(long_data, tmp_path, monkeypatch, capsys, found):
    for name, value in {"RANK": "0", **found}.items():
        monkeypatch.setenv(name, value)
    flags = [f"--data_dir={long_data}", f"--output_dir={tmp_path}", "--device=cpu"]
    assert main_module.main(flags) == 1
    assert "RANK is set in the environment, but not " in capsys.readouterr().err


def test_a_rank_without_a_number_on_its_machine_is_one_line_on_cuda(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(collectives.LostRankError, match="but not LOCAL_RANK"):
        collectives.join(is_on_cuda=True)


def test_a_killed_rank_ends_the_others_with_one_line(long_data, tmp_path):
    folders = [f"--data_dir={long_data}", f"--output_dir={tmp_path}", f"--log_dir={tmp_path}/l"]
    processes = start(*folders, *LONG)
    wait_for_step(processes[0], 3)
    processes[1].kill()
    started = time.perf_counter()
    _, err = processes[0].communicate(timeout=30)
    processes[1].communicate()
    assert time.perf_counter() - started < 10
    assert processes[0].returncode == 1
    assert err.startswith("error: rank 0: another rank has ended")
    assert err.count("\n") == 1

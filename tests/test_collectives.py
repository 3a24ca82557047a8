"""Several processes train what one trains: two gloo processes on the CPU."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import prepare_synthetic
import pytest
import torch
import torch.multiprocessing as mp
from conftest import are_equal_checkpoints, count_items, open_dataset, write_tiny

import hstu_components
import main as main_module
from dataset import BatchSampler, MyDataset, share_of
from dot_product_similarity import DotProductSimilarity
from engine import kernels, training_setup
from engine.flags import get_args
from engine.state import Run
from engine.training_setup import prepare_run
from engine.training_step import TrainingStep
from engine.warm_start import start_from
from files.atomic_io import DataError, read_json
from files.checkpoint import load_checkpoint
from files.data_folder import read_manifest
from files.vocabulary import read_vocabulary
from model import HSTUModel
from ops import collectives, sharded_table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NUM_PROCESSES = 2
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
        "WORLD_SIZE": str(NUM_PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def new_context() -> Any:
    """Its processes fork from one that has imported what each would import for seconds."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])
    return context


def serve(rank: int, port: int, pipe: Any) -> None:
    """A process: answers each (function, arguments) with what it returns, or the error's text."""
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
def on_all() -> Iterator[Callable[..., list[Any]]]:
    """Calls a function of this module in all processes at once; their answers in order."""
    context, port = new_context(), free_port()
    pairs = [context.Pipe() for _ in range(NUM_PROCESSES)]
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
            assert pipe.poll(60), "a process hangs"
            answers.append(pipe.recv())
        assert [error for _, error in answers] == [None] * NUM_PROCESSES
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
    """Loss and gradients of one step, of this process or of the only one."""
    whole_rows, hstu_components.DENSE_ROWS = hstu_components.DENSE_ROWS, 2 if is_sparse else 99
    train_set = make_set(data, "train", negatives)
    run = prepare(data, negatives, "--dropout_rate=0", "--clip_grad=0")
    hstu_components.DENSE_ROWS = whole_rows
    batch = make_batch(train_set, indices)
    if wrong == "mean of each process":
        own = (batch.target_index >= 0).sum()
        batch = batch._replace(num_targets=own * collectives.world_size())
    if wrong == "negatives of others without gradient":
        is_own = torch.zeros(len(batch.distinct_ids), 1, dtype=torch.bool)
        is_own[torch.cat([batch.item_index, batch.target_index])] = True
        plain = run.model.compute_infonce_loss
        run.model.compute_infonce_loss = lambda queries, rows, *rest: plain(
            queries, torch.where(is_own, rows, rows.detach()), *rest
        )
    if wrong == "negatives of each process":
        own_targets = batch.target_index.unique()
        batch = batch._replace(negative_index=own_targets, negative_log_q=None, orders={})
    found = {}

    def record() -> None:
        named = run.model.named_parameters()
        found.update({n: p.grad.to_dense().clone() for n, p in named if p.grad is not None})

    run.training_step.optimizer.step = record
    values = run.training_step([batch], epoch=1, step=1)
    return float(values["Loss/train"]), found | {"norm": values["Train/grad_norm"]}


def make_set(data: Path, split: str, negatives: str) -> MyDataset:
    options = {"target_counts": count_items(data), "has_logq": True}
    return open_dataset(data, split, 6, negatives, 4, **options)


def prepare(data: Path, negatives: str, *flags: str) -> Run:
    return prepare_run(get_args([*SMALL, f"--data_dir={data}", f"--negatives={negatives}", *flags]))


def make_batch(dataset: MyDataset, indices: list[int]) -> Any:
    sampler = BatchSampler(len(indices), 99, 3, False, collectives.rank(), collectives.world_size())
    draw = next(iter(sampler))
    return dataset.collate_fn(dataset.__getitems__(draw._replace(indices=np.array(indices))))


@pytest.mark.parametrize("is_sparse", [False, True], ids=["whole tables", "rows"])
@pytest.mark.parametrize("negatives", ["all", "batch", "uniform", "mixed"])
@pytest.mark.parametrize("indices", [[0, 3, 5, 8, 9], [7]], ids=["3 and 2", "1 and 0"])
def test_loss_and_every_gradient_are_those_of_one_process(
    negatives, is_sparse, indices, data, on_all
):
    loss, expected = gradients(data, negatives, indices, is_sparse)
    answers = on_all(gradients, data, negatives, indices, is_sparse)
    for process_loss, found in answers:
        assert process_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() >= expected.keys()
        for name, gradient in found.items():
            whole = expected.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, whole, **CLOSE, msg=name)
    # All processes make the same step: to the bit, or they would drift apart.
    (_, first), (_, second) = answers
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "wrong",
    [
        "mean of each process",
        "negatives of others without gradient",
        "negatives of each process",
    ],
)
def test_the_comparison_would_find_a_wrong_form(wrong, data, on_all):
    indices = [0, 3, 5, 8, 9]
    _, expected = gradients(data, "batch", indices, False)
    _, found = on_all(gradients, data, "batch", indices, False, wrong)[0]
    name = "embedding_module.item_emb.weight"
    error = (found[name] - expected[name]).norm() / expected[name].norm()
    assert error > 0.01


def negatives_of(data: Path, split: str, negatives: str, indices: list[int]) -> list[Any]:
    batch = make_batch(make_set(data, split, negatives), indices)
    names = ("distinct_ids", "negative_index", "negative_log_q", "num_targets")
    return [getattr(batch, name) for name in names] + [batch.user_ids.tolist()]


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("negatives", ["all", "batch", "uniform", "mixed"])
def test_negatives_and_their_corrections_are_those_of_one_process(negatives, split, data, on_all):
    *expected, users = negatives_of(data, split, negatives, list(range(7)))
    answers = on_all(negatives_of, data, split, negatives, list(range(7)))
    for *found, _ in answers:
        for one, other in zip(found, expected, strict=True):
            assert one is other is None or torch.equal(one, other)
    shares = [share for *_, share in answers]
    assert sorted(shares[0] + shares[1]) == sorted(users)
    assert [len(share) for share in shares] == [3, 4]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shares_are_whole_disjoint_and_about_as_long(world_size):
    lengths = np.sort(np.random.default_rng(0).zipf(1.5, 64).clip(max=200))[::-1]
    shares = [share_of(64, rank, world_size) for rank in range(world_size)]
    assert (np.sum(shares, 0) == 1).all()
    events = [lengths[share].sum() for share in shares]
    assert max(events) - min(events) <= lengths[0]


# ----------------------------------------------------------------------------------------- training


def train(
    data: Path, output: Path, flags: list[str], steps: int | None = None, dense_rows: int = 99
) -> list[Any]:
    """Train, to the end or killed after a step; the sequences of each batch, sorted."""
    usual = hstu_components.DENSE_ROWS
    hstu_components.DENSE_ROWS = training_setup.DENSE_ROWS = dense_rows
    folders = [f"--data_dir={data}", f"--output_dir={output}", f"--log_dir={output}/logs"]
    fetch, step, drawn, taken = MyDataset.__getitems__, TrainingStep.__call__, [], []

    def fetching(dataset: MyDataset, draw: Any) -> Any:
        if dataset.split == "train":
            drawn.append(sorted(draw.indices.tolist()))
        return fetch(dataset, draw)

    def stepping(*args: Any) -> Any:
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*args)

    MyDataset.__getitems__, TrainingStep.__call__ = fetching, stepping
    try:
        main_module.train(get_args([*folders, *SMALL, *flags]), HSTUModel)
    except KeyboardInterrupt:
        pass
    finally:
        MyDataset.__getitems__, TrainingStep.__call__ = fetch, step
        hstu_components.DENSE_ROWS = training_setup.DENSE_ROWS = usual
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


def test_two_processes_train_what_one_trains(whole, data, on_all, tmp_path):
    negatives, output, drawn = whole
    assert on_all(train, data, tmp_path, [*EXACT, f"--negatives={negatives}"]) == [drawn, drawn]
    assert_alike(tmp_path, output)


def test_a_run_goes_on_with_another_number_of_processes(whole, data, on_all, tmp_path):
    negatives, output, drawn = whole
    flags = [*EXACT, f"--negatives={negatives}"]
    first = on_all(train, data, tmp_path, flags, 2)[0]
    second = train(data, tmp_path, flags, 2)
    third = on_all(train, data, tmp_path, flags)[0]
    assert (len(first), len(second)) == (2, 2)
    assert first + second + third == drawn
    assert_alike(tmp_path, output)


def test_with_as_many_processes_a_resumed_run_ends_with_equal_tensors(data, on_all, tmp_path):
    flags = ["--dropout_rate=0.4", "--save_every_steps=1", "--negatives=mixed"]
    on_all(train, data, tmp_path / "whole", flags)
    on_all(train, data, tmp_path / "o", flags, 4)
    on_all(train, data, tmp_path / "o", flags)
    for name in ("model_epoch_1.pt", "model_epoch_2.pt", "model_best.pt"):
        assert are_equal_checkpoints(tmp_path / "o" / name, tmp_path / "whole" / name)
    found = [read_json(tmp_path / output / "metrics.json") for output in ("o", "whole")]
    assert found[0] == found[1]


def refusal_of(data: Path, flags: list[str], *outputs: Path) -> str:
    """Why a training with an output folder for each process does not start."""
    try:
        train(data, outputs[collectives.rank()], flags)
    except DataError as error:
        return str(error)
    return ""


def test_processes_with_folders_of_their_own_are_refused(whole, data, on_all, tmp_path):
    """Whose states differ: one at the end of an epoch, which saves its models again, and none."""
    first = Path(shutil.copytree(whole[1], tmp_path / "first"))
    found = on_all(
        refusal_of, data, [*EXACT, f"--negatives={whole[0]}"], first, tmp_path / "second"
    )
    assert all(re.search(r"processes find states of steps \[0, \d+\]", text) for text in found)


def seed_of(data: Path, step: int) -> int:
    """The seed of dropout after a step."""
    batch = make_batch(make_set(data, "train", "all"), [1, 2])
    prepare(data, "all").training_step([batch], epoch=1, step=step)
    return torch.initial_seed()


def test_dropout_differs_by_process_and_step(data, on_all):
    seeds = [on_all(seed_of, data, step) for step in (1, 2, 1)]
    assert seeds[0] == seeds[2]
    assert len({*seeds[0], *seeds[1]}) == 4


def writes_of(data: Path, output: Path) -> list[str]:
    """Files that this process opens to write during a training."""
    opened: list[str] = []

    def record(event: str, arguments: tuple) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            opened.append(str(arguments[0]))

    sys.addaudithook(record)
    train(data, output, [])
    return [path for path in opened if not path.startswith("/dev/")]


def test_the_main_process_alone_writes(data, on_all, tmp_path):
    first, second = on_all(writes_of, data, tmp_path / "o")
    assert any("resume_" in path for path in first)
    assert second == []


# ---------------------------------------------------------------------------------- sharded tables


NUM_ROWS, WIDTH = 103, 7


def look_up(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Vectors, the whole table and its gradient; a process's part of the batch weighs 1, 2, ..."""
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


def test_a_sharded_table_is_the_whole_table(on_all):
    ids = torch.tensor([4, 0, 102, 7, 1, 7, 64])
    answers = on_all(look_up, ids)
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
    """Rows of the item table here, and weights of the model; or why there is no shard."""
    training_setup.DENSE_ROWS = 2
    try:
        run = prepare(data, negatives, "--shard_items")
    except DataError as error:
        return str(error)
    return len(run.model.embedding_module.item_emb.weight), training_setup.num_weights(run.model)


def test_each_process_has_its_part_of_the_items(data, on_all):
    whole = prepare(data, "mixed")
    total = sum(weight.numel() for weight in whole.model.parameters())
    assert on_all(shard_of, data, "mixed") == [(12, total), (12, total)]
    assert "sampled negatives" in on_all(shard_of, data, "all")[0]


def ranks_of(split_at: int, *arguments: torch.Tensor) -> torch.Tensor:
    """Ranks of this process's queries among all items, of which it has some."""
    queries, items, target_ids, seen_ids, offsets = arguments
    part = [slice(0, split_at), slice(split_at, None)][collectives.rank()]
    bounds = offsets[part.start : None if part.stop is None else part.stop + 1]
    return sharded_table.sharded_target_ranks(
        queries[part],
        sharded_table.keep_own_items(items.split(5)),
        target_ids[part],
        (queries[part] * items[target_ids[part] - 1]).sum(1),
        (seen_ids[bounds[0] : bounds[-1]], bounds - bounds[0]),
    )


@pytest.mark.parametrize("split_at", [0, 4, 9])
def test_ranks_among_sharded_items_are_those_among_all(split_at, on_all):
    generator = torch.Generator().manual_seed(3)
    items = torch.nn.functional.normalize(torch.randn(23, 3, generator=generator))
    items[11] = items[6]  # a tie, in the other process
    queries = torch.nn.functional.normalize(torch.randn(9, 3, generator=generator))
    queries[3] = torch.nan
    target_ids = torch.tensor([7, 12, 23, 1, 2, 7, 5, 5, 9])
    seen_ids = torch.randint(1, 24, (27,), generator=generator)
    offsets = torch.arange(0, 28, 3)
    expected = DotProductSimilarity().target_ranks(
        queries, items, target_ids - 1, (seen_ids - 1, offsets)
    )
    arguments = queries, items, target_ids, seen_ids, offsets
    assert torch.cat(on_all(ranks_of, split_at, *arguments)).tolist() == expected.tolist()


def test_sharded_items_train_and_resume_like_whole_ones(data, on_all, tmp_path):
    flags = [*EXACT, "--negatives=mixed", "--clip_grad=0.1"]
    drawn = train(data, tmp_path / "whole", flags, None, 2)
    sharded = [*flags, "--shard_items"]
    first = on_all(train, data, tmp_path / "o", sharded, 2, 2)[0]
    second = train(data, tmp_path / "o", sharded, 1, 2)
    third = on_all(train, data, tmp_path / "o", sharded, None, 2)[0]
    assert first + second + third == drawn
    assert_alike(tmp_path / "o", tmp_path / "whole")


def carried_over(data: Path, model: Path) -> Any:
    """The item table of a sharded run that starts with the weights of a model; of process 0."""
    training_setup.DENSE_ROWS = 2
    run = prepare(data, "mixed", "--shard_items", f"--init_from={model}")
    start_from(run, model, read_vocabulary(data, read_manifest(data)))
    table = run.model.state_dict()["embedding_module.item_emb.weight"]
    return table.tolist() if collectives.is_main_process() else None


def test_sharded_items_start_with_the_rows_of_an_earlier_model(data, on_all, tmp_path):
    train(data, tmp_path / "o", [*EXACT, "--negatives=mixed"], None, 2)
    model = tmp_path / "o" / "model_best.pt"
    expected = load_checkpoint(model)["weights"]["embedding_module.item_emb.weight"]
    assert on_all(carried_over, data, model)[0] == expected.tolist()


# ------------------------------------------------------------------- signals and dead processes


LONG = [
    "--device=cpu", "--num_workers=0", "--num_epochs=9", "--batch_size=8", "--hidden_units=8",
    "--attention_dim=5", "--linear_dim=6", "--log_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def long_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    prepare_synthetic.write(folder, 200, 400, 7)
    return folder


class Command(NamedTuple):
    """A process that runs the command, and the files that it prints to."""

    process: mp.Process
    out: Path
    err: Path

    def end(self) -> tuple[int, str, str]:
        """Exit code and what was printed, of a process that ends by itself."""
        self.process.join(60)
        assert self.process.exitcode is not None, "the process hangs"
        return self.process.exitcode, self.out.read_text(), self.err.read_text()


def run_command(rank: int, port: int, flags: list[str], out: Path, err: Path) -> None:
    os.environ |= environment(rank, port)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    torch.set_num_threads(1)
    sys.exit(main_module.main(flags))


def start(folder: Path, *flags: str) -> list[Command]:
    port, commands = free_port(), []
    for rank in range(NUM_PROCESSES):
        files = folder / f"out{rank}", folder / f"err{rank}"
        arguments = rank, port, [*flags], *files
        process = new_context().Process(target=run_command, args=arguments, daemon=True)
        process.start()
        commands.append(Command(process, *files))
    return commands


def wait_for_step(command: Command, step: int) -> None:
    while not (command.out.exists() and f" step {step}/" in command.out.read_text()):
        assert command.process.is_alive(), command.err.read_text()
        time.sleep(0.01)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_with_a_state(long_data, tmp_path):
    folders = [f"--data_dir={long_data}", f"--output_dir={tmp_path}", f"--log_dir={tmp_path}/l"]
    first, second = start(tmp_path, *folders, *LONG)
    wait_for_step(first, 30)
    os.kill(second.process.pid, signal.SIGTERM)
    code, out, err = first.end()
    assert (code, err) == (143, "")
    assert second.end() == (143, "", "")
    step = re.search(
        r"^stopped by SIGTERM at epoch \d, step (\d+); the same command goes on", out, re.M
    )[1]
    state = load_checkpoint(tmp_path / f"resume_{step}.pt")
    assert state["progress"]["step"] == int(step)


@pytest.mark.slow
def test_processes_of_torchrun_say_once_why_they_end(long_data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={NUM_PROCESSES}"]
    flags = [f"--data_dir={long_data}", f"--output_dir={tmp_path}", *LONG]
    done = subprocess.run(
        [*command, "--standalone", "main.py", *flags, "--inference_only", "--state_dict_path=x.pt"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: --inference_only runs in one process: start python, not torchrun"]


@pytest.mark.parametrize("found", [{}, {"WORLD_SIZE": "2"}])
def test_half_of_torchruns_environment_is_one_line(long_data, tmp_path, monkeypatch, capsys, found):
    for name, value in {"RANK": "0", **found}.items():
        monkeypatch.setenv(name, value)
    flags = [f"--data_dir={long_data}", f"--output_dir={tmp_path}", "--device=cpu"]
    assert main_module.main(flags) == 1
    assert "RANK is set in the environment, but not " in capsys.readouterr().err


def test_a_process_without_a_number_on_its_machine_is_one_line_on_cuda(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(collectives.LostProcessError, match="but not LOCAL_RANK"):
        collectives.join(is_on_cuda=True)


# ------------------------------------------------------------------------------------ their kernels


def kernels_of(asked: str, unable: int | None) -> tuple[str, list[str]]:
    """What a process computes with, and its log, where Triton fails in process `unable`."""
    lines = []

    def why_not_triton(*_: object) -> str | None:
        return "its self-check failed" if collectives.rank() == unable else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "why_not_triton", why_not_triton)
        patch.setattr(kernels.log, "info", lambda text, *values: lines.append(text % values))
        try:
            return kernels.choose_kernels(asked, torch.device("cuda"), None), lines
        except DataError as error:
            return str(error), lines


def test_one_process_without_triton_is_torch_or_its_reason_in_all(on_all):
    assert on_all(kernels_of, "auto", None) == [("triton", [])] * 2
    line = "attention without Triton: its self-check failed"
    for unable in range(NUM_PROCESSES):
        assert on_all(kernels_of, "auto", unable) == [("torch", [line])] * 2
        for error, _ in on_all(kernels_of, "triton", unable):
            assert error.startswith("--kernels triton: its self-check failed; use")


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_one_line(long_data, tmp_path):
    folders = [f"--data_dir={long_data}", f"--output_dir={tmp_path}", f"--log_dir={tmp_path}/l"]
    first, second = start(tmp_path, *folders, *LONG)
    wait_for_step(first, 3)
    second.process.kill()
    started = time.perf_counter()
    code, _, err = first.end()
    assert time.perf_counter() - started < 30
    assert code == 1
    assert err.startswith("error: process 0: another process has ended")
    assert err.count("\n") == 1

"""RowAdamW against AdamW on whole tables, MuonAdamW against Muon; norms of sparse gradients."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from torch import Tensor, nn

import hstu_components
from engine.flags import get_args
from engine.optimizer import MuonAdamW, RowAdamW, clip_gradients, orthogonal
from engine.training_setup import prepare_run
from hstu_components import ArrayEncoder, SparseEncoder, give_sparse_gradients

X, D = 11, 3
OPTIONS = {"lr": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.0}


def make_table(is_sparse: bool = True) -> nn.Embedding:
    table = nn.Embedding(X + 1, D, padding_idx=0, sparse=is_sparse)
    torch.manual_seed(2)
    with torch.no_grad():
        table.weight[1:] = torch.randn(X, D)
    return table


def weights_of(count: int, seed: int, width: int = D) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def backward(table: nn.Embedding, ids: list[int], seed: int) -> None:
    """A gradient that differs in every place an id stands."""
    (table(torch.tensor(ids)) * weights_of(len(ids), seed)).sum().backward()


def train(table: nn.Embedding, optimizer: torch.optim.Optimizer, batches: list[list[int]]) -> None:
    for step, ids in enumerate(batches):
        optimizer.zero_grad()
        backward(table, ids, step)
        optimizer.step()


def dense_twin(batches: list[list[int]]) -> Tensor:
    """The table after torch.optim.AdamW, not fused, with whole gradients."""
    table = make_table(is_sparse=False)
    train(table, torch.optim.AdamW(table.parameters(), foreach=False, **OPTIONS), batches)
    return table.weight


EVERY = [[*range(1, X + 1)], [*range(X, 0, -1)]] * 3


def test_it_is_adamw_where_every_step_touches_every_row():
    table = make_table()
    train(table, RowAdamW(table.parameters(), **OPTIONS), EVERY)
    torch.testing.assert_close(table.weight, dense_twin(EVERY))


def test_dense_parameters_are_trained_as_by_adamw_beside_a_table():
    torch.manual_seed(0)
    linear, table = nn.Linear(5, 4), make_table()
    twin = copy.deepcopy(linear)
    decay = [{"params": linear.parameters(), "weight_decay": 0.3}, {"params": table.parameters()}]
    ours = RowAdamW(decay, **OPTIONS)
    theirs = torch.optim.AdamW(twin.parameters(), **OPTIONS | {"weight_decay": 0.3})
    for step in range(4):
        for module, optimizer in ((linear, ours), (twin, theirs)):
            optimizer.zero_grad()
            module(torch.full((2, 5), step + 1.0)).square().sum().backward()
        backward(table, [3, 5], step)
        ours.step(), theirs.step()
    torch.testing.assert_close(linear.weight, twin.weight)
    torch.testing.assert_close(linear.bias, twin.bias)


def test_a_row_makes_up_for_the_steps_it_missed_when_it_is_next_touched():
    """Momentum moves all of AdamW's rows in the 9 steps between; here 7 in the last, 3 not yet."""
    every, between = [[*range(1, X + 1)]] * 60, [[2]] * 9
    batches = [*every, *between, [2, 7]]
    table = make_table()
    train(table, RowAdamW(table.parameters(), **OPTIONS), batches)
    waiting, whole = dense_twin(every), dense_twin(batches)
    torch.testing.assert_close(table.weight[3], waiting[3])
    # Bias corrections are those of the last step for all of them.
    torch.testing.assert_close(table.weight[[2, 7]], whole[[2, 7]], rtol=0, atol=0.01)
    assert ((whole - waiting)[[3, 7]].abs() > 0.05).all()


def test_other_rows_keep_weight_and_state_bit_for_bit():
    table = make_table()
    optimizer = RowAdamW(table.parameters(), **OPTIONS)
    train(table, optimizer, EVERY)
    state = optimizer.state[table.weight]
    kept = [table.weight, *(state[name] for name in ("last_step", "exp_avg", "exp_avg_sq"))]
    before = [tensor.detach().clone() for tensor in kept]
    train(table, optimizer, [[4, 9, 4], [9]])
    others = [row for row in range(X + 1) if row not in (4, 9)]
    for old, new in zip(before, kept, strict=True):
        assert torch.equal(old[others], new[others])
        assert not torch.equal(old[4], new[4])


def test_a_gradient_of_repeated_ids_is_their_sum():
    repeated = [[*row, 5, 2, 5] for row in EVERY]
    table = make_table()
    train(table, RowAdamW(table.parameters(), **OPTIONS), repeated)
    torch.testing.assert_close(table.weight, dense_twin(repeated))


def test_gradients_of_several_batches_add_up():
    batches = [[1, 4, 4], [*range(1, X + 1)], [4, 11]]
    tables = make_table(), make_table(is_sparse=False)
    optimizers = [RowAdamW(table.parameters(), **OPTIONS) for table in tables]
    for _ in range(3):
        for table, optimizer in zip(tables, optimizers, strict=True):
            optimizer.zero_grad()
            for seed, ids in enumerate(batches):
                backward(table, ids, seed)
            optimizer.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight)


def test_a_batch_without_any_id_moves_nothing(monkeypatch):
    monkeypatch.setattr(hstu_components, "DENSE_ROWS", 0)
    table = ArrayEncoder(D, X)
    give_sparse_gradients(table)
    optimizer = RowAdamW(table.parameters(), **OPTIONS)
    before = table.weight.detach().clone()
    table(torch.empty(0, dtype=torch.int64), torch.tensor([0, 0, 0])).sum().backward()
    optimizer.step()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("kind", [SparseEncoder, ArrayEncoder])
def test_the_row_of_the_unknown_stays_zero(kind, monkeypatch):
    monkeypatch.setattr(hstu_components, "DENSE_ROWS", 0)
    table = kind(D, X)
    give_sparse_gradients(table)
    optimizer = RowAdamW(table.parameters(), **OPTIONS)
    for _ in range(5):
        optimizer.zero_grad()
        bags = [torch.tensor([0, 3, 6])] if kind is ArrayEncoder else []
        table(torch.tensor([0, 3, 0, 0, 5, 3]), *bags).sum().backward()
        assert table.weight.grad.is_sparse
        optimizer.step()
    assert not table.weight[0].any() and not optimizer.state[table.weight]["exp_avg"][0].any()


def test_weight_decay_of_a_table_is_refused():
    table = make_table()
    backward(table, [1], 0)
    with pytest.raises(ValueError, match=r"weight_decay 0\.5 for a table"):
        RowAdamW(table.parameters(), **OPTIONS | {"weight_decay": 0.5}).step()


def test_state_that_was_saved_and_loaded_goes_on_to_equal_bits():
    table = make_table()
    optimizer = RowAdamW(table.parameters(), **OPTIONS)
    train(table, optimizer, [*EVERY, [2, 8]])
    file = io.BytesIO()
    torch.save([table.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make_table()
    loaded = RowAdamW(other.parameters(), **OPTIONS)
    other.load_state_dict(saved[0]), loaded.load_state_dict(saved[1])
    for one, another in ((table, optimizer), (other, loaded)):
        train(one, another, [[8, 3], [1, 8]])
    assert torch.equal(table.weight, other.weight)
    for name, value in optimizer.state[table.weight].items():
        assert torch.equal(value, loaded.state[other.weight][name]), name


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_orthogonalising_keeps_singular_vectors_and_evens_singular_values(shape):
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ orthogonal(x) @ vh.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-8
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def matrices_of(seed: int) -> list[nn.Parameter]:
    shapes = [(12, 4), (4, 4), (12, 4)]
    return [nn.Parameter(weights_of(a, seed + k, b)) for k, (a, b) in enumerate(shapes)]


def train_matrices(matrices: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for step in range(6):
        for matrix, grad in zip(matrices, matrices_of(10 * step), strict=True):
            matrix.grad = grad.detach().clone()
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with 2.9")
def test_matrices_move_as_by_torchs_muon():
    ours, theirs = matrices_of(1), matrices_of(1)
    options = {"lr": 0.1, "weight_decay": 0.5}
    train_matrices(ours, MuonAdamW([{"params": ours, "muon": True, "weight_decay": 0.5}], lr=0.1))
    muon = torch.optim.Muon(theirs, momentum=0.95, adjust_lr_fn="match_rms_adamw", **options)
    train_matrices(theirs, muon)  # which multiplies in bfloat16
    for start, one, other in zip(matrices_of(1), ours, theirs, strict=True):
        assert (one - start).norm() > 1
        assert (one - other).norm() < 0.02 * (one - start).norm()


def test_what_is_no_matrix_of_muons_moves_as_by_adamw():
    matrices, (plain, twin) = matrices_of(1), (matrices_of(5)[0], matrices_of(5)[0])
    ours = MuonAdamW([{"params": matrices, "muon": True}, {"params": [plain]}], **OPTIONS)
    adamw = torch.optim.AdamW([twin], fused=True, **OPTIONS)
    for _ in range(3):
        for parameter in (*matrices, plain, twin):
            parameter.grad = torch.ones_like(parameter)
        ours.step(), adamw.step()
    assert torch.equal(plain, twin)


def test_muons_state_goes_on_to_equal_bits():
    one, other = matrices_of(1), matrices_of(2)
    groups = [[{"params": matrices, "muon": True}] for matrices in (one, other)]
    optimizer, loaded = (MuonAdamW(group, lr=0.1) for group in groups)
    train_matrices(one, optimizer)
    for source, target in zip(one, other, strict=True):
        target.data.copy_(source.data)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_matrices(one, optimizer), train_matrices(other, loaded)
    for source, target in zip(one, other, strict=True):
        assert torch.equal(source, target)


def test_two_threads_give_equal_bits_every_time():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 900, (20, 7000), generator=generator).tolist()

    def weights() -> Tensor:
        table = nn.Embedding(900, 64, padding_idx=0, sparse=True)
        nn.init.constant_(table.weight, 0.5)
        optimizer = RowAdamW(table.parameters(), **OPTIONS)
        for step, row in enumerate(ids):
            optimizer.zero_grad()
            (table(torch.tensor(row)) * weights_of(len(row), step, 64)).sum().backward()
            optimizer.step()
        return table.weight

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(weights(), weights())
    finally:
        torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping_is_torchs_on_whole_gradients(limit):
    modules = [
        nn.ModuleList([make_table(is_sparse), nn.Linear(D, 2)]) for is_sparse in (True, False)
    ]
    modules[1][1].load_state_dict(modules[0][1].state_dict())
    for table, linear in modules:
        linear(table(torch.tensor([4, 1, 4, 9]))).square().sum().backward()
    sparse, dense = (list(module.parameters()) for module in modules)
    unused = nn.Parameter(torch.ones(2))
    norm = clip_gradients([*sparse, unused], limit)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(dense, limit or torch.inf))
    assert sparse[0].grad.is_sparse
    for ours, theirs in zip(sparse, dense, strict=True):
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad)


def test_where_nothing_has_a_gradient_the_norm_is_zero():
    assert clip_gradients([nn.Parameter(torch.ones(2))], 1.0) == 0


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    table = make_table()
    (table(torch.tensor([3, 3])) * torch.tensor([torch.inf, 1.0, 1.0])).sum().backward()
    assert not clip_gradients(table.parameters(), 1.0).isfinite()


def test_a_loss_scaler_leaves_the_step_as_it_is_or_skips_it():
    plain, scaled = make_table(), make_table()
    optimizers = [RowAdamW(table.parameters(), **OPTIONS) for table in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    backward(plain, [1, 6, 1], 0)
    scaler.scale((scaled(torch.tensor([1, 6, 1])) * weights_of(3, 0)).sum()).backward()
    scaler.unscale_(optimizers[1])
    torch.testing.assert_close(*(clip_gradients(t.parameters(), 0.5) for t in (plain, scaled)))
    optimizers[0].step(), scaler.step(optimizers[1]), scaler.update()
    torch.testing.assert_close(plain.weight, scaled.weight)
    before = scaled.weight.detach().clone()
    scaler.scale((scaled(torch.tensor([2])) * torch.inf).sum()).backward()
    scaler.step(optimizers[1]), scaler.update()
    assert torch.equal(scaled.weight, before)
    assert scaler.get_scale() == 4.0


# ------------------------------------------------------------------------------------ in the model


def sparse_gradients(data_dir, negatives: str) -> tuple[set[str], set[str]]:
    """Names of the tables with a sparse gradient after one batch, and of all tables."""
    flags = ["--hidden_units=7", f"--negatives={negatives}", "--num_negatives=5", "--maxlen=6"]
    run = prepare_run(get_args([f"--data_dir={data_dir}", "--device=cpu", *flags]))
    train_set = run.datasets["train"]
    run.model(train_set.collate_fn(train_set.__getitems__(range(4)))).backward()
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    tables = {name for name in gradients if re.search(r"item_emb|action_emb|sparse_emb", name)}
    assert len(tables) == 6
    return {name for name, gradient in gradients.items() if gradient.is_sparse}, tables


@pytest.mark.parametrize("negatives", ["batch", "uniform", "mixed"])
def test_no_large_table_gets_a_dense_gradient_where_negatives_are_sampled(
    tiny, negatives, monkeypatch
):
    assert sparse_gradients(tiny, negatives)[0] == set()
    monkeypatch.setattr(hstu_components, "DENSE_ROWS", 2)
    found, tables = sparse_gradients(tiny, negatives)
    assert found == tables


def test_gradients_are_whole_where_all_items_are_negatives(tiny):
    assert sparse_gradients(tiny, "all")[0] == set()

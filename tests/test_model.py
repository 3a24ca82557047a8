"""HSTUModel: the loss against a plain softmax, the towers, and what may not matter."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import open_dataset

import model as model_module
from files.data_folder import read_indexer, read_manifest
from files.features import load_features
from files.item_vectors import load_vectors
from hstu_components import FeatureTables, encoder_arguments
from model import KERNELS, HSTUConfig, HSTUModel

TEMPERATURE = 0.3


def read_all_features(data_dir) -> tuple[dict, dict]:
    manifest = read_manifest(data_dir)
    items = load_features(data_dir, "item", manifest.num_items)
    items |= load_vectors(data_dir, ["81"], read_indexer(data_dir)["i"], manifest.num_items)
    return items, load_features(data_dir, "user", manifest.num_users)


def make_model(data_dir, features=None, kernels="torch", **changes) -> HSTUModel:
    manifest = read_manifest(data_dir)
    items, users = features or read_all_features(data_dir)
    config = HSTUConfig(
        num_items=manifest.num_items,
        num_action_types=manifest.num_action_types,
        num_target_action_types=0,
        item_features={k: encoder_arguments(v) for k, v in items.items()},
        user_features={k: encoder_arguments(v) for k, v in users.items()},
        maxlen=9,
        hidden_units=10,
        num_blocks=2,
        num_heads=2,
        attention_dim=6,
        linear_dim=4,
        dropout_rate=0.0,
        time_bias="request",
        position_bias=True,
        infonce_temp=TEMPERATURE,
    )
    torch.manual_seed(4)
    model = HSTUModel(replace(config, **changes), items, users, kernels=kernels)
    with torch.no_grad():  # large enough for every path to matter
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.embedding_module.item_emb.weight[0] = 0
    return model


def make_batch(data_dir, indices=range(11), split="train", **options):
    dataset = open_dataset(data_dir, split, 9, **options)
    return dataset.collate_fn(dataset.__getitems__(list(indices)))


def test_infonce_gives_the_numbers_worked_out_by_hand():
    """Cosines are written out; the third query has no target."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    targets, negatives = torch.tensor([1, 0, -1]), torch.tensor([1, 2])
    log_q = torch.tensor([0.3, -0.2])
    # At temperature .5: query 0 has its positive .6 / .5 and the negative 0 / .5 + .2, as row 1 is
    # its positive; query 1 has 0 / .5, and the negatives .8 / .5 - .3 and -1 / .5 + .2.
    first = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(0.2)))
    second = -math.log(1.0 / (1.0 + math.exp(1.3) + math.exp(-1.8)))
    for kernels in KERNELS.values():
        loss = kernels.infonce_loss(queries, rows, targets, negatives, log_q, 0.5)
        assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


@pytest.mark.parametrize("negatives", ["all", "mixed"])
def test_plain_kernels_train_like_the_tuned_ones(tiny, negatives):
    losses = []
    for kernels in KERNELS:
        model = make_model(tiny, kernels=kernels)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(10):
            batch = make_batch(tiny, range(step % 3, 11), negatives=negatives, num_negatives=6)
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:10] == pytest.approx(losses[10:], abs=1e-4)


def test_the_loss_is_float32_under_autocast(tiny):
    model = make_model(tiny)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(make_batch(tiny))
    assert loss.dtype == torch.float32
    # bf16 keeps 8 bits, so a few per cent.
    assert loss.item() == pytest.approx(model(make_batch(tiny)).item(), rel=0.05)


@pytest.mark.parametrize("negatives", ["all", "batch", "uniform", "mixed"])
def test_every_parameter_tensor_gets_a_gradient(tiny, negatives):
    model = make_model(tiny)
    model(make_batch(tiny, negatives=negatives, num_negatives=6)).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_a_user_that_is_not_known_adds_nothing(tiny):
    model = make_model(tiny)
    assert any(spec["kind"] == "continual" for spec in model.config.user_features.values())
    batch = make_batch(tiny, [0, 1])
    users = model._users(batch._replace(user_ids=torch.tensor([0, 3])))
    start = int(batch.offsets[1])
    assert not users[:start].any() and users[start:].any()


SWITCHES = [
    ("position_bias", True),
    ("history_residual", True),
    ("mix_previous", 2),
    ("time_head", True),
]


@pytest.mark.parametrize("kernels", ["torch", "plain"])
def test_a_time_head_weighs_events_by_rab_alone(tiny, kernels):
    """Its A is SiLU(rab) / N, whatever the events are; the other head's is not."""
    model = make_model(tiny, kernels=kernels, num_heads=2, time_head=True)
    block, batch = model.hstu.blocks[0], make_batch(tiny)
    head, (dv, dqk) = sum(block.widths), block.widths[1:3]
    is_zero = (block.qkv_proj.weight == 0).all(1).nonzero().flatten().tolist()
    assert is_zero == list(range(head + 2 * dv, head + 2 * dv + dqk))
    seen = []
    form = block.attention.gated_attention
    block.attention = block.attention._replace(
        gated_attention=lambda x, weight, *rest: seen.append(form(x, weight, *rest)) or seen[-1]
    )
    model.encode(batch)
    with torch.no_grad():
        keys = slice(2 * dv + dqk, head)
        original = block.qkv_proj.projection.weight
        original[head:][keys] = torch.randn_like(original[head:][keys])
    model.encode(batch)
    torch.testing.assert_close(*seen)  # keys of the time head do nothing
    assert len({type(block.qkv_proj) for block in model.hstu.blocks}) == 1  # or each is compiled
    with torch.no_grad():
        original[keys] = torch.randn_like(original[keys])
    model.encode(batch)
    assert not torch.allclose(seen[1], seen[2])


@pytest.mark.parametrize(("switch", "value"), SWITCHES)
def test_future_events_cannot_move_a_users_earlier_queries(tiny, switch, value):
    model = make_model(tiny, **{switch: value})
    # The residual's sums over the events before a sequence leave some 1e-16 of them.
    tolerance = {"rtol": 0, "atol": 1e-6 if switch == "history_residual" else 0}
    batch = make_batch(tiny)
    changed = batch._replace(item_index=batch.item_index.clone())
    last = int(batch.offsets[1]) - 1
    changed.item_index[last] = (changed.item_index[last] + 1) % model.config.num_items
    before, after = model.encode(batch), model.encode(changed)
    torch.testing.assert_close(before[:last], after[:last], **tolerance)
    assert not torch.allclose(before[last], after[last])
    torch.testing.assert_close(before[last + 1 :], after[last + 1 :], **tolerance)


@pytest.mark.parametrize(("switch", "value"), SWITCHES)
def test_a_user_is_the_same_alone_and_in_a_batch(tiny, switch, value):
    model = make_model(tiny, **{switch: value})
    together = make_batch(tiny)
    queries = model.predict(together)
    for b, user in enumerate(together.user_ids.tolist()):
        alone = model.predict(make_batch(tiny, [user - 1]))
        torch.testing.assert_close(alone[0], queries[b], rtol=1e-5, atol=1e-6)


def test_the_order_of_items_in_the_catalogue_is_irrelevant(tiny):
    """Renumbering the items, and the rows of table and features with them, changes nothing."""
    model = make_model(tiny)
    batch = make_batch(tiny)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(23) + 1])  # new -> old
    items, users = read_all_features(tiny)
    moved = {
        name: feature._replace(values=np.asarray(feature.values)[order.numpy()])
        if feature.present is None
        else feature._replace(
            values=feature.values[order.numpy()], present=feature.present[order.numpy()]
        )
        for name, feature in items.items()
        if feature.kind != "array"
    }
    kept = {name: items[name] for name in moved}
    base, renumbered = (make_model(tiny, (side, users)) for side in (kept, moved))
    renumbered.load_state_dict(base.state_dict())
    with torch.no_grad():
        table = renumbered.embedding_module.item_emb.weight
        table.copy_(table[order].clone())
    new_of_old = order.argsort()
    new_batch = batch._replace(
        item_index=new_of_old[batch.item_index + 1] - 1,
        target_index=new_of_old[batch.target_index + 1] - 1,
        orders={},
    )
    torch.testing.assert_close(base(batch), renumbered(new_batch))
    assert model.config.num_items == 23


def test_forward_encode_and_predict_agree(tiny):
    model, batch = make_model(tiny), make_batch(tiny, split="valid")
    queries = model.encode(batch)
    torch.testing.assert_close(model.predict(batch), queries[batch.offsets[1:] - 1])
    assert torch.equal(model.predict_with_loss(batch)[0], model.predict(batch))
    torch.testing.assert_close(model.predict_with_loss(batch)[1], model(batch))
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(len(queries)))


@pytest.mark.parametrize("feature_id", ["100", "tags", "price", "81", "103", "106", "age"])
def test_each_feature_moves_what_the_model_says(tiny, feature_id):
    items, users = read_all_features(tiny)
    model = make_model(tiny, (items, users))
    weight = next(p for name, p in model.named_parameters() if f"feature_{feature_id}." in name)
    before = model.predict(make_batch(tiny)).clone()
    items_before = model.item_embeddings(torch.arange(1, 24))
    with torch.no_grad():
        weight += torch.randn_like(weight)
    assert not torch.allclose(before, model.predict(make_batch(tiny)))
    is_same = torch.allclose(items_before, model.item_embeddings(torch.arange(1, 24)))
    assert is_same == (feature_id in users)


def test_action_types_move_what_the_model_says_only_if_it_has_them(tiny):
    batch = make_batch(tiny)
    other = batch._replace(action_types=(batch.action_types + 2) % 3)
    assert not torch.allclose(make_model(tiny)(batch), make_model(tiny)(other))
    blind = make_model(tiny, num_action_types=0)
    assert torch.equal(blind(batch), blind(other))


def test_the_targets_action_moves_what_the_model_says_only_if_it_is_to_know_it(tiny):
    batch = make_batch(tiny)
    other = batch._replace(target_action_types=(batch.target_action_types + 2) % 3)
    knowing = make_model(tiny, num_target_action_types=3)
    assert not torch.allclose(knowing(batch), knowing(other))
    assert torch.equal(make_model(tiny)(batch), make_model(tiny)(other))


def test_the_tower_gives_inputs_positives_negatives_and_exports_alike(tiny):
    model, batch = make_model(tiny), make_batch(tiny, negatives="batch")
    rows = model.output_postprocessor(model.item_tower(batch.distinct_ids))
    exported = model.item_embeddings(torch.arange(1, 24))
    torch.testing.assert_close(rows, exported[batch.distinct_ids - 1])


def test_catalogue_chunks_do_not_change_the_embeddings(tiny, monkeypatch):
    model, ids = make_model(tiny), torch.arange(1, 24)
    whole = model.item_embeddings(ids)
    monkeypatch.setattr(model_module, "CHUNK_ITEMS", 5)
    torch.testing.assert_close(model.item_embeddings(ids), whole, rtol=1e-5, atol=1e-6)


def test_a_cold_candidate_is_encoded_from_its_features_alone(tiny):
    model = make_model(tiny)
    items, _ = read_all_features(tiny)
    rows = torch.tensor([5, 9])
    known = model.item_tower(rows, FeatureTables(items), rows)
    torch.testing.assert_close(known, model.item_tower(rows))
    unknown = torch.tensor([0, 0])
    cold = model.item_tower(unknown, FeatureTables(items), rows)
    assert not torch.allclose(known, cold)
    with torch.no_grad():
        model.embedding_module.item_emb.weight.normal_()
        model.embedding_module.item_emb.weight[0] = 0
    assert torch.equal(cold, model.item_tower(unknown, FeatureTables(items), rows))


def test_id_dropout_leaves_whole_items_with_their_features_alone_in_training(tiny):
    model = make_model(tiny, id_dropout=0.5)
    ids = torch.arange(1, model.config.num_items + 1)
    whole = model.eval().item_tower(ids)
    features = whole - model.embedding_module(ids)
    trained = model.train().item_tower(ids)
    is_whole = (trained - whole).abs().amax(1) < 1e-5
    is_alone = (trained - features).abs().amax(1) < 1e-5
    assert is_whole.any() and is_alone.any() and (is_whole ^ is_alone).all()


def test_id_dropout_leaves_out_the_share_asked_for(tiny):
    model, ids = make_model(tiny, id_dropout=0.1), torch.arange(1, 24)
    whole = model.eval().item_tower(ids)
    model.train()
    is_left_out = [(model.item_tower(ids) - whole).abs().amax(1) > 1e-5 for _ in range(50)]
    assert torch.stack(is_left_out).float().mean().item() == pytest.approx(0.1, abs=0.04)


def test_id_dropout_keeps_the_id_of_an_item_whose_features_are_all_zero(tiny):
    model = make_model(tiny, id_dropout=0.999999)
    ids = torch.arange(1, model.config.num_items + 1)
    model._encode_features = lambda *_: torch.zeros(len(ids), model.config.hidden_units)
    assert torch.equal(model.train().item_tower(ids), model.embedding_module(ids))


def test_id_dropout_changes_nothing_without_item_features(tiny):
    model = make_model(tiny, ({}, {}), id_dropout=0.5)
    ids = torch.arange(1, model.config.num_items + 1)
    assert torch.equal(model.train().item_tower(ids), model.embedding_module(ids))


def test_lists_of_any_length_are_pooled_by_their_mean(tiny):
    items, _ = read_all_features(tiny)
    model = make_model(tiny)
    encoder = model._encoder("tags")
    rows = torch.tensor([3, 1, 2, 6])
    found = encoder(*model.item_tables.lookup("tags", rows))
    feature = items["tags"]
    for k, row in enumerate(rows.tolist()):
        values = feature.values[feature.offsets[row] : feature.offsets[row + 1]]
        expected = torch.zeros(10)
        if len(values):
            expected = encoder.weight[torch.from_numpy(np.array(values)).long()].mean(0)
        torch.testing.assert_close(found[k], expected)


def test_numbers_are_standardised_with_the_statistics_of_the_checkpoint(tiny):
    items, _ = read_all_features(tiny)
    prices = items["price"].values[1:].astype(np.float64)
    spec = encoder_arguments(items["price"])
    assert spec["mean"] == pytest.approx(prices.mean())
    encoder = make_model(tiny)._encoder("price")
    value = torch.tensor([prices.mean() + prices.std()], dtype=torch.float32)
    torch.testing.assert_close(encoder(value)[0], encoder.weight[:, 0])


def test_a_number_that_is_always_the_same_says_nothing(tiny):
    items, _ = read_all_features(tiny)
    price = items["price"]._replace(values=np.full_like(items["price"].values, 7.0))
    spec = encoder_arguments(price)
    assert (spec["mean"], spec["std"]) == (7.0, 1.0)


def test_missing_vectors_get_the_learnt_stand_in_or_zero(tiny):
    items, users = read_all_features(tiny)
    missing = ~items["81"].present
    missing[0] = False
    learnt = make_model(tiny)._encoder("81")
    rows = torch.from_numpy(np.flatnonzero(missing))
    values = FeatureTables(items).lookup("81", rows)
    assert torch.equal(learnt(*values), learnt.stand_in.expand(len(rows), -1))
    assert encoder_arguments(items["81"], "zero")["has_stand_in"] is False
    zero = HSTUModel(
        replace(
            make_model(tiny).config,
            item_features={k: encoder_arguments(v, "zero") for k, v in items.items()},
        ),
        items,
        users,
    )._encoder("81")
    assert not zero(*values).any()


def test_a_frozen_projection_keeps_its_weights(tiny):
    items, users = read_all_features(tiny)
    config = make_model(tiny).config
    specs = {k: encoder_arguments(v, projection="frozen") for k, v in items.items()}
    model = HSTUModel(replace(config, item_features=specs), items, users)
    model(make_batch(tiny)).backward()
    encoder = model._encoder("81")
    assert encoder.weight.grad is None
    assert encoder.stand_in.grad.any()


def test_eight_users_are_memorised(tiny):
    torch.manual_seed(0)
    model = make_model(tiny, maxlen=9, infonce_temp=0.1)
    batch = make_batch(tiny, range(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 < math.log(23)

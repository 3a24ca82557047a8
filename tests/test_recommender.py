"""Recommendations in Python are those of an export and of brute force, in the ids of the log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import NUM_ITEMS, NUM_USERS, open_dataset, write_tiny
from test_main import SMALL

from dataset import load_emb
from engine.recommender import History, Recommender
from main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of data/ and of outputs/, exported with whole histories; actions count."""
    folder = tmp_path_factory.mktemp("recommender")
    write_tiny(folder / "data")
    folders = [f"--data_dir={folder}/data", f"--output_dir={folder}/outputs"]
    assert main([*folders, f"--log_dir={folder}/logs", *SMALL, "--target_action"]) == 0
    flags = ["--inference_only", "--whole_history", "--top_k=7", "--remove_seen"]
    assert (
        main([*folders, *SMALL, *flags, f"--state_dict_path={folder}/outputs/model_best.pt"]) == 0
    )
    return folder


@pytest.fixture(scope="module")
def recommender(trained) -> Recommender:
    return Recommender(trained / "outputs" / "model_best.pt", trained / "data")


def history_of(folder: Path, user: int, **changes) -> History:
    """A user's events of the test split."""
    dataset = open_dataset(folder / "data", "test", whole_history=True)
    events = dataset[int(dataset.indices_of(user)[0])].seen.events
    items = (1000 + 3 * (events["item_id"] - 1)).tolist()
    actions, times = events["action_type"].tolist(), events["timestamp"].tolist()
    return History(items, times, actions, f"user-{user - 1}")._replace(**changes)


def test_histories_of_users_get_what_their_export_has(trained, recommender):
    users = np.array(load_emb(trained / "outputs" / "user_embeddings" / "id.u64bin"))[:, 0]
    top = np.array(load_emb(trained / "outputs" / "user_embeddings" / "topk.u64bin"))
    assert len(users) == NUM_USERS
    histories = [history_of(trained, user) for user in users.tolist()]
    item_ids, scores = recommender.recommend(histories, top_k=7, removes_seen=True)
    assert item_ids.tolist() == top.tolist()
    assert scores.dtype == np.float32 and scores.shape == (NUM_USERS, 7)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_the_vectors_of_items_are_those_of_the_export(trained, recommender):
    exported = load_emb(trained / "outputs" / "item_embeddings" / "embedding.fbin")
    found = recommender.item_embeddings([1006, "1000", 1006])
    np.testing.assert_allclose(found, exported[[2, 0, 2]], atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"times": None}, {"actions": None}, {"user": None}, {"items": [1000, 1003, 1006]}]
)
def test_each_part_of_a_history_counts(trained, recommender, changes):
    history = history_of(trained, 1)
    changed = history._replace(**changes)
    if "items" in changes:
        history, changed = (h._replace(times=None, actions=None) for h in (history, changed))
    one, other = (recommender.recommend([h])[1] for h in (history, changed))
    assert not np.allclose(one, other, atol=1e-5)


def test_what_is_asked_for_counts(trained, recommender):
    history = history_of(trained, 1)
    asked = [{}, {"request_time": history.times[-1] + 10**6}, {"request_action": "1"}]
    found = [recommender.recommend([history], **more)[1] for more in asked]
    assert not np.allclose(found[0], found[1], atol=1e-5)
    assert not np.allclose(found[0], found[2], atol=1e-5)
    np.testing.assert_array_equal(recommender.recommend([history], request_action=1)[1], found[2])


def test_histories_are_read_from_memory_and_named_as_such(recommender, tmp_path, caplog):
    history, falling = History([1000, 1003], times=[5, 6]), History([1000, 1003], times=[6, 5])
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("WARNING"):
        patch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
        recommender.recommend([history, falling])
    assert "histories: events older than the one before: 1 of 4" in caplog.text
    assert "sequence 1 event 1" in caplog.text


def test_seen_items_are_left_out_on_request_and_where_none_is_left_there_is_none(recommender):
    history = History([1000 + 3 * k for k in range(NUM_ITEMS - 1)])
    item_ids, scores = recommender.recommend([history], top_k=3, removes_seen=True)
    assert item_ids.tolist() == [[1000 + 3 * (NUM_ITEMS - 1), None, None]]
    assert scores[0, 1:].tolist() == [-np.inf, -np.inf]
    item_ids, _ = recommender.recommend([history], top_k=3, removes_seen=False)
    assert None not in item_ids


def test_no_histories_have_no_recommendations(recommender):
    item_ids, scores = recommender.recommend([], top_k=3)
    assert item_ids.shape == scores.shape == (0, 3)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (History(["1000", "7"]), r"histories\[0\].items\[1\]: '7' is no item of"),
        (History([""]), r"items\[0\]: '' is no item of"),
        (History([]), "0 items, 0 times, 0 actions; expected as many of each, and one at least"),
        (History([1000], times=[1, 2]), "1 items, 2 times"),
        (History([1000], actions=["buy"]), r"actions\[0\]: 'buy', expected one of 0, 1, 2"),
        (History([1000], user="nobody"), r"histories\[0\].user: 'nobody' is no user of"),
    ],
)
def test_what_the_data_does_not_know_is_named(recommender, history, message):
    with pytest.raises(ValueError, match=message):
        recommender.recommend([history])
    with pytest.raises(ValueError, match=r"item_ids\[1\]: 5 is no item of"):
        recommender.item_embeddings([1000, 5])

"""What a user sees of each bad input, through `main`: one line and an exit code, or a warning.

The modules' own tests have the rows: each kind of damage to each file. Here are the faults that
several modules see, and one of each reader: it is put into a good data folder, and the command is
called as a user calls it.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import NUM_ITEMS, write_tiny

import main as main_module
from dataset import load_emb
from engine import training_setup
from files.atomic_io import DataError
from files.checkpoint import load_checkpoint, save_checkpoint, states
from files.embeddings import check_size, warn_of_zeros
from files.sequences import EVENT_DTYPE
from main import main

pytestmark = pytest.mark.slow

SMALL = [
    "--device=cpu", "--num_workers=0", "--num_epochs=1", "--batch_size=6", "--maxlen=6",
    "--warmup_steps=0", "--hidden_units=8", "--attention_dim=5", "--linear_dim=6", "--num_blocks=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A data folder whose caches are built, without the manifest that would compare the sizes."""
    folder = write_tiny(tmp_path_factory.mktemp("good") / "data")
    assert main([*folders(folder, folder.parent / "run"), *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(good) -> Path:
    return good.parent / "run"


def folders(data: Path, output_dir: Path) -> list[str]:
    return [f"--data_dir={data}", f"--output_dir={output_dir}", f"--log_dir={output_dir}/logs"]


def copy_of(good: Path, tmp_path: Path, has_manifest: bool = False) -> Path:
    data = Path(shutil.copytree(good, tmp_path / "data"))
    if not has_manifest:
        (data / "manifest.json").unlink()
    return data


class Seen(NamedTuple):
    """What a call of main left on the screen."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(tmp_path, capsys) -> Iterator[Callable[..., Seen]]:
    def call_main(data: Path, *flags: str) -> Seen:
        code = main([*folders(data, tmp_path / "out"), *SMALL, *flags])
        return Seen(code, *capsys.readouterr())

    yield call_main
    # An error refers to the loader until garbage is collected, which stops no loader process but
    # waits for each, 5 seconds twice. The exit of a command kills them.
    if loader_processes := multiprocessing.active_children():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
            gc.collect()
        for process in loader_processes:
            process.kill()


def assert_refused(seen: Seen, message: str) -> None:
    """Exit code 1, and nothing on stderr but one line that matches."""
    assert seen.code == 1, seen
    first, *rest = seen.err.splitlines()
    assert first.startswith("error: ") and not rest, seen.err
    assert re.search(message, first), first


# ----------------------------------------------------------------------- how to spoil a data folder


class Fault(NamedTuple):
    """One fault, and a pattern of the line that names it."""

    spoil: Callable[[Path], Any]
    message: str
    flags: tuple[str, ...] = ()
    has_manifest: bool = False


def append(name: str, extra: bytes) -> Callable:
    return lambda data: (data / name).write_bytes((data / name).read_bytes() + extra)


def cut(name: str, num_bytes: int) -> Callable:
    return lambda data: (data / name).write_bytes((data / name).read_bytes()[:-num_bytes])


def write(name: str, content: bytes | str) -> Callable:
    raw = content.encode() if isinstance(content, str) else content
    return lambda data: (data / name).write_bytes(raw)


def array(name: str, dtype: Any, change: Callable[[np.ndarray], Any]) -> Callable:
    """`change` edits the array in place, or returns another one."""

    def spoil(data: Path) -> None:
        values = np.fromfile(data / name, dtype)
        changed = change(values)
        (values if changed is None else changed).tofile(data / name)

    return spoil


def put(index: int, value: Any, field: str | None = None) -> Callable:
    def change(values: np.ndarray) -> None:
        (values if field is None else values[field])[index] = value

    return change


def event(field: str, value: int, split: str = "train", index: int = 7) -> Callable:
    return array(f"{split}_data.bin", EVENT_DTYPE, put(index, value, field))


def offset(change: Callable) -> Callable:
    return array("train_offsets.bin", "<i8", change)


def edit(name: str, change: Callable[[Any], Any]) -> Callable:
    """Change a JSON file's value in place."""

    def spoil(data: Path) -> None:
        value = json.loads((data / name).read_text())
        change(value)
        (data / name).write_text(json.dumps(value))

    return spoil


def index(side: str, change: Callable[[dict], Any]) -> Callable:
    def spoil(data: Path) -> None:
        indexer = pickle.loads((data / "indexer.pkl").read_bytes())
        change(indexer[side])
        (data / "indexer.pkl").write_bytes(pickle.dumps(indexer))

    return spoil


def feature(feature_id: str, text: str) -> Callable:
    """Item 2's value of a feature, a JSON text."""

    def spoil(data: Path) -> None:
        path = data / "item_feat_dict.json"
        records = json.loads(path.read_text())
        records["2"][feature_id] = "PLACE"
        path.write_text(json.dumps(records).replace('"PLACE"', text))

    return spoil


def vectors(change: Callable[[dict], Any]) -> Callable:
    """Vectors 82, pickled by original id, spoilt by `change`."""

    def spoil(data: Path) -> None:
        table = {1000 + 3 * k: np.ones(5, np.float32) for k in range(NUM_ITEMS)}
        (data / "creative_emb" / "82.pkl").write_bytes(pickle.dumps(change(table) or table))

    return spoil


def vector(value: Any) -> Callable:
    return vectors(lambda table: table.update({1003: value}))


def remove(*names: str) -> Callable:
    return lambda data: [(data / name).unlink() for name in names]


def directory(name: str) -> Callable:
    """A folder in the place of a file."""

    def spoil(data: Path) -> None:
        (data / name).unlink(missing_ok=True)
        (data / name).mkdir()

    return spoil


def loop(name: str) -> Callable:
    """A symbolic link to itself."""

    def spoil(data: Path) -> None:
        (data / name).unlink(missing_ok=True)
        (data / name).symlink_to(data / name)

    return spoil


def empty(split: str, has_offset: bool) -> Callable:
    def spoil(data: Path) -> None:
        (data / f"{split}_data.bin").write_bytes(b"")
        (data / f"{split}_offsets.bin").write_bytes(bytes(8 * has_offset))
        (data / f"{split}_users.bin").write_bytes(b"")

    return spoil


def both(*faults: Callable) -> Callable:
    return lambda data: [spoil(data) for spoil in faults]


EMB_82 = ("--mm_emb_id", "82")
NPY = "creative_emb/emb_81_6.npy"
HUGE_NPY = b"\x93NUMPY\x01\x00\x76\x00" + (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (24, 1000000000000), }".ljust(117) + b"\n"
)
EVIL = b"cos\nsystem\n(S'true'\ntR."

# ---------------------------------------------------------------------------------------- the table

ERRORS = {
    "1 the manifest knows the size": Fault(
        cut("valid_offsets.bin", 3),
        r"valid_offsets\.bin: 93 bytes, but manifest\.json says 96 bytes",
        has_manifest=True,
    ),
    "5 offsets end beyond the data": Fault(
        cut("train_data.bin", 32),
        r"train_data\.bin: 656 bytes, .* 43 events, 688 bytes .*truncated or from another run",
    ),
    "6 events are big-endian": Fault(
        array(
            "train_data.bin", EVENT_DTYPE, lambda v: v.astype(EVENT_DTYPE.newbyteorder(">"))
        ),
        r"train_data\.bin: sequence 0 event 0: item id \d{8,} is not in 1\.\.23",
        has_manifest=True,
    ),
    "6 big-endian events without a manifest": Fault(
        array(
            "train_data.bin", EVENT_DTYPE, lambda v: v.astype(EVENT_DTYPE.newbyteorder(">"))
        ),
        r"train_data\.bin: the largest action type is \d{7,}, .*dense",
    ),
    "8 a bad action type in a loader process": Fault(
        event("action_type", -2, "valid"),
        r"^error: \S+valid_data\.bin: sequence \d event \d: action type -2",
        ("--num_workers=1",),
    ),
    "9 an item id is above num_items": Fault(
        event("item_id", NUM_ITEMS + 1),
        r"train_data\.bin: sequence \d event \d: item id 24 is not in 1\.\.23",
    ),
    "11 a feature value is above its cardinality": Fault(
        feature("100", "9"),
        r"item_feat_dict\.json: item 2, feature 100 = 9: outside 0\.\.4, the cardinality",
    ),
    "13 two items share a re-id": Fault(
        index("i", lambda ids: ids.update({1003: 5})),
        r"indexer\.pkl: .*1003 and 1012 are both 5",
    ),
    "14 re-ids have a hole": Fault(
        index("i", lambda ids: ids.update({1003: 812_004})),
        r"indexer\.pkl: .*1003 is 812004; write",
    ),
    "14 a re-id is text": Fault(
        index("u", lambda ids: ids.update({"user-3": "4"})), r"indexer\.pkl: .*'user-3' is '4'"
    ),
    "14 the manifest has another count": Fault(
        edit("manifest.json", lambda m: m.update(num_items=22)),
        r"indexer\.pkl: .* not 1\.\.22, each once: ",
        ("--item_features", "none"),
        has_manifest=True,
    ),
    "20 the item features are missing": Fault(
        remove("item_feat_dict.json"), r"item_feat_dict\.json: missing, but feature_types\.json"
    ),
    "21 a cardinality is 0 but there are values": Fault(
        both(
            edit("feat_statistics.json", lambda s: s.update({"100": 0})),
            edit("item_feat_dict.json", lambda r: [r[k].pop("100") for k in r if k != "7"]),
        ),
        r"item_feat_dict\.json: item 7, feature 100 = \d: outside 0\.\.0, the cardinality in",
    ),
    "24 vectors would run code": Fault(
        write("creative_emb/82.pkl", EVIL), r"82\.pkl: refuses to load os\.system", EMB_82
    ),
    "26 an array declares a huge shape": Fault(
        write(NPY, HUGE_NPY), r"emb_81_6\.npy: .*mmap length is greater than file size"
    ),
    "26 the manifest declares two billion actions": Fault(
        edit("manifest.json", lambda m: m.update(num_action_types=2 * 10**9)),
        r"manifest\.json: .*num_action_types=2000000000, .* cannot be",
        has_manifest=True,
    ),
    "26 an item id says two billion items": Fault(
        both(remove("indexer.pkl", NPY), event("item_id", 2 * 10**9)),
        r"the largest item id is 2000000000, .*dense",
    ),
    "26 a user id says two billion users": Fault(
        both(
            remove("indexer.pkl", NPY),
            array("train_users.bin", "<i4", put(1, 2 * 10**9)),
        ),
        r"the largest user id is 2000000000, .*dense",
    ),
    "26 a cardinality needs a terabyte": Fault(
        edit("feat_statistics.json", lambda s: s.update({"100": 2**31 - 1})),
        r"out of memory",
        ("--hidden_units=1024",),
    ),
    "31 a folder in place of the events": Fault(
        directory("train_data.bin"), r"train_data\.bin: a folder; write"
    ),
    "31 a folder in place of the offsets": Fault(
        directory("train_offsets.bin"), r"train_offsets\.bin: a folder; write"
    ),
    "31 a folder in place of the manifest": Fault(
        directory("manifest.json"), r"manifest\.json: cannot be read \(Is a directory\)"
    ),
    "31 a folder in place of the indexer": Fault(
        directory("indexer.pkl"), r"indexer\.pkl: cannot be read \(Is a directory\)"
    ),
    "31 a folder in place of the vectors": Fault(
        directory("creative_emb/82.pkl"), r"creative_emb: no vectors for 82; there are 81", EMB_82
    ),
    "31 the offsets are a link to themselves": Fault(
        loop("train_offsets.bin"), r"train_offsets\.bin: no such file"
    ),
    "31 the item features are a link to themselves": Fault(
        loop("item_feat_dict.json"), r"item_feat_dict\.json: missing"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused_in_one_line(name, good, tmp_path, call):
    fault = ERRORS[name]
    data = copy_of(good, tmp_path, fault.has_manifest)
    fault.spoil(data)
    assert_refused(call(data, *fault.flags), fault.message)


WARNINGS = {
    "2 valid has no sequences": Fault(
        empty("valid", True), r"valid: no sequence to predict, so its results are left out"
    ),
    "2 the test files are empty": Fault(
        empty("test", False), r"test: no sequence to predict, so its results are left out"
    ),
    "8 times fall": Fault(
        event("timestamp", 10, index=1),
        r"train_data\.bin: events older than the one before: 1 of 43, .*: sequence 0 event 1$",
    ),
    "12 a user has no events and another has one": Fault(
        offset(lambda v: v.__setitem__(slice(0, 4), [0, 0, 1, 5])),
        r"train: 2 of 11 sequences have fewer than 2 events and are skipped, the first: 0, 1$",
    ),
    "13 a user has two sequences": Fault(
        array("train_users.bin", "<i4", put(3, 1)),
        r"train_users\.bin: users with several sequences: 1, the first: 1$",
    ),
    "15 a number is NaN": Fault(
        feature("price", "NaN"), r"feature price: 1 values not finite in float32 read as the"
    ),
    "20 a default is missing": Fault(
        edit("feature_default_value.json", lambda d: d.pop("price")),
        r"feature_default_value\.json: no value for price; 0, or an empty list, is used",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNINGS)
def test_input_that_can_be_used_is_one_warning_and_the_run_goes_on(name, good, tmp_path, call):
    fault = WARNINGS[name]
    data = copy_of(good, tmp_path)
    fault.spoil(data)
    seen = call(data, *fault.flags)
    assert (seen.code, seen.err) == (0, "")
    assert len(re.findall(fault.message, seen.out, re.MULTILINE)) == 1, seen.out
    assert (tmp_path / "out" / "model_best.pt").exists()


SILENT = {
    "12 sequences are longer than maxlen": Fault(lambda data: None, "", ("--maxlen=2",)),
    "19 a byte order mark": Fault(
        both(*(lambda data, n=n: write(n, b"\xef\xbb\xbf" + (data / n).read_bytes())(data)
               for n in ("feature_types.json", "item_feat_dict.json"))), "",
    ),
    "22 a list is empty": Fault(feature("tags", "[]"), ""),
    "22 a value is null": Fault(feature("tags", "null"), ""),
    "24 vectors are lists of float16": Fault(vector([np.float16(1)] * 5), "", EMB_82),
    "32 there is no CUDA": Fault(lambda data: None, "no CUDA device here", ("--device=cuda:9",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_what_is_legal_goes_on_without_a_warning(name, good, tmp_path, call, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fault = SILENT[name]
    data = copy_of(good, tmp_path)
    fault.spoil(data)
    with caplog.at_level(logging.WARNING, "hstu"):
        seen = call(data, *fault.flags)
    assert (seen.code, seen.err) == (0, "")
    assert re.search(fault.message, seen.out)
    assert not caplog.records


# ---------------------------------------------------------------- 27: the data change while it runs


def change_after_an_epoch(monkeypatch, change: Callable[[], Any]) -> None:
    save_epoch = main_module.save_epoch

    def save_and_change(run):
        save_epoch(run)
        change()

    monkeypatch.setattr(main_module, "save_epoch", save_and_change)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (append("train_data.bin", b""), "train_data.bin"),
        (append("valid_offsets.bin", bytes(8)), "valid_offsets.bin"),
        (remove("train_users.bin"), "train_users.bin"),
    ],
)
def test_27_data_that_change_between_epochs_end_the_run(
    change, name, good, tmp_path, call, monkeypatch
):
    data = copy_of(good, tmp_path)
    os.utime(data / name, (1, 1))
    change_after_an_epoch(monkeypatch, lambda: change(data))
    seen = call(data, "--num_epochs=3")
    assert_refused(seen, rf"{name.replace('.', '[.]')}: changed since this run opened it")
    assert (tmp_path / "out" / "model_epoch_1.pt").exists()


@pytest.mark.parametrize("has_manifest", [True, False])
def test_27_a_run_resumes_on_a_copy_of_its_data_but_not_on_others(
    good, tmp_path, call, has_manifest
):
    data = copy_of(good, tmp_path, has_manifest)
    assert call(data).code == 0
    os.utime(data / "train_data.bin", (1, 1))
    assert call(data).code == 0
    shutil.rmtree(data)
    write_tiny(data, seed=3)
    if not has_manifest:
        (data / "manifest.json").unlink()
    assert_refused(call(data), "out: was trained on other data. Use the same")


# ---------------------------------------------------------------------------------- 28: checkpoints


def edit_weights(trained: Path, target: Path, change: Callable[[dict], Any]) -> Path:
    """A copy of the trained checkpoint, changed and registered as its own."""
    content = load_checkpoint(trained / "model_best.pt")
    change(content)
    target.parent.mkdir(exist_ok=True)
    save_checkpoint(target, content)
    return target


def rename(prefix: str) -> Callable:
    def change(content: dict) -> None:
        content["weights"] = {prefix + k: v for k, v in content["weights"].items()}

    return change


CHECKPOINTS = {
    "28 of other data": (lambda c: c["config"].update(num_items=99), r"items: 99 then, 23 now"),
    "28 of another width": (
        lambda c: c["config"].update(hidden_units=9),
        r"does not fit the model: .*embedding_module\S+: checkpoint \(24, 8\), model \(24, 9\)",
    ),
    "28 with a prefix of DistributedDataParallel": (
        rename("module."), r"does not fit the model: .*module\.embedding_module\S*: checkpoint \("
    ),

    "28 without weights": (lambda c: c.pop("weights"), r"not a checkpoint of this package"),
    "28 with weights that are none": (lambda c: c.update(weights=[1]), r"not a checkpoint of this"),
    "28 with an unknown setting": (lambda c: c["config"].update(alibi=1), r"\.pt: .*alibi"),
    "28 without a setting": (lambda c: c["config"].pop("maxlen"), r"\.pt: .*maxlen"),
    "28 with a config that is none": (lambda c: c.update(config=3), r"not a checkpoint of this"),
    "29 with an item that is not finite": (
        lambda c: c["weights"]["embedding_module.item_emb.weight"].__setitem__((4, 2), torch.nan),
        r"item_embeddings/embedding\.fbin: row 3 is not finite",
    ),
    "29 with a query that is not finite": (
        lambda c: c["weights"]["input_preprocessor.pos_emb.weight"].fill_(torch.inf),
        r"user_embeddings/embedding\.fbin: row \d+ is not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_in_one_line(name, good, trained, tmp_path, call):
    change, message = CHECKPOINTS[name]
    path = edit_weights(trained, tmp_path / "edited" / "model_1.pt", change)
    assert_refused(call(good, "--inference_only", f"--state_dict_path={path}"), message)


def test_29_an_export_that_is_refused_leaves_the_one_before_as_it_was(
    good, trained, tmp_path, call
):
    export = ["--inference_only", f"--state_dict_path={trained}/model_best.pt"]
    assert call(good, *export).code == 0
    folder = tmp_path / "out" / "item_embeddings"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    change = CHECKPOINTS["29 with an item that is not finite"][0]
    path = edit_weights(trained, tmp_path / "edited" / "model_1.pt", change)
    assert call(good, "--inference_only", f"--state_dict_path={path}").code == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--resume={}/nowhere.pt", r"nowhere\.pt: no such checkpoint file"),
        ("--resume={}/model_best.pt", r"holds weights only; resume from a resume_\*\.pt"),
    ],
)
def test_28_a_state_that_cannot_be_resumed_is_one_line(good, trained, capsys, flag, message):
    code = main([*folders(good, trained), *SMALL, flag.format(trained)])
    assert_refused(Seen(code, *capsys.readouterr()), message)


def test_28_a_state_of_another_version_is_refused(good, tmp_path, call, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr("engine.training_setup.STATE_FORMAT", 1)
        assert call(good).code == 0
    assert_refused(call(good), "of another version of this package; finish it with that one")


def test_28_a_state_of_a_version_without_one_of_the_flags_is_refused_as_such(good, tmp_path, call):
    assert call(good).code == 0
    for path in states(tmp_path / "out"):
        state = load_checkpoint(path)
        del state["binding"]["time_head"]
        save_checkpoint(path, state)
    assert_refused(call(good), "of another version of this package; finish it with that one")


# ------------------------------------------------------------------------------- 2, 13, 30: exports


def export_of(good: Path, trained: Path, tmp_path: Path, call, spoil: Callable) -> Seen:
    data = copy_of(good, tmp_path, has_manifest=True)
    (data / "manifest.json").unlink()
    spoil(data)
    return call(data, "--inference_only", f"--state_dict_path={trained}/model_best.pt")


def test_2_an_export_without_test_users_has_items_alone(good, trained, tmp_path, call):
    seen = export_of(good, trained, tmp_path, call, empty("test", True))
    assert (seen.code, seen.err) == (0, "")
    assert "test: no sequence" in seen.out
    assert not (tmp_path / "out" / "user_embeddings").exists()


def test_13_two_ids_of_one_value_are_exported_as_re_ids(good, trained, tmp_path, call):
    clash = index("i", lambda ids: (ids.pop(1003), ids.update({"1000": 2})))
    seen = export_of(good, trained, tmp_path, call, clash)
    assert seen.code == 0
    ids = load_emb(tmp_path / "out" / "item_embeddings" / "id.u64bin")
    assert ids[:, 0].tolist() == list(range(1, NUM_ITEMS + 1))


def test_30_a_width_of_one_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"5 vectors of width 1, .*--hidden_units"):
        check_size(tmp_path, 5, 1)


def test_30_no_vectors_are_an_error_and_zero_vectors_a_warning(tmp_path, caplog):
    with pytest.raises(ValueError, match="0 vectors of width 4"):
        check_size(tmp_path, 0, 4)
    rows = np.ones((5, 4), np.float32)
    rows[[1, 3]] = 0
    with caplog.at_level(logging.WARNING, "hstu"):
        list(warn_of_zeros(tmp_path, [rows[:2], rows[2:]], np.arange(10, 15)))
    assert "2 vectors are zero, so that no query finds them, the first: 11, 13" in caplog.text


# ---------------------------------------------------------------------------------------- 31: paths


def test_31_a_path_beyond_ascii_is_a_path(good, tmp_path, call):
    data = Path(shutil.copytree(good, tmp_path / "данные 数据 é"))
    assert call(data, f"--log_dir={tmp_path}/журнал").code == 0


def test_31_a_folder_that_is_not_there_is_named(tmp_path, call):
    assert_refused(call(tmp_path / "nowhere"), r"nowhere: no train_data\.bin there; .*--data_dir")


def test_31_output_into_the_data_folder_is_refused(good, tmp_path, call):
    data = copy_of(good, tmp_path)
    before = sorted(path.name for path in data.iterdir())
    seen = call(data, f"--output_dir={data}/../data")
    assert_refused(seen, r"data: --output_dir is the data folder; name another one")
    assert sorted(path.name for path in data.iterdir()) == before


def test_31_output_into_a_file_is_refused(good, trained, tmp_path, call):
    (tmp_path / "taken").write_text("mine")
    export = ["--inference_only", f"--state_dict_path={trained}/model_best.pt"]
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        for flags in ([], export):
            seen = call(good, f"--output_dir={path}", *flags)
            assert_refused(seen, r"taken.*(File exists|Not a directory)")
    assert (tmp_path / "taken").read_text() == "mine"


def test_31_curves_into_a_file_are_one_warning(good, tmp_path, call):
    (tmp_path / "taken").write_text("mine")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        seen = call(good, f"--log_dir={path}", "--resume=none", "--overwrite")
        assert (seen.code, seen.err) == (0, "")
        assert re.search(r"taken.*(File exists|Not a directory); training goes on", seen.out)
    assert (tmp_path / "taken").read_text() == "mine"


def deny(*args, **kwargs):
    raise PermissionError(13, "Permission denied", str(args[0]))


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        (training_setup, "read_manifest", r"data: Permission denied"),
        (Path, "mkdir", r"out: Permission denied"),
        (os, "replace", r"Permission denied"),
    ],
)
def test_31_without_permission_the_path_is_named(good, call, monkeypatch, owner, name, message):
    monkeypatch.setattr(owner, name, deny)
    assert_refused(call(good), message)


def test_debug_shows_where_an_error_was_raised(tmp_path):
    with pytest.raises(ValueError, match=r"no train_data\.bin there"):
        main([*folders(tmp_path / "nowhere", tmp_path / "out"), "--debug"])


# --------------------------------------------------------------------------------- 32: command line


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch_size=0"], ["--lr=nan"], ["--lr=0"], ["--infonce_temp=-1"], ["--infonce_temp=0"],
        ["--maxlen=0"], ["--maxlen=many"], ["--num_workers=-1"], ["--dropout_rate=1"],
        ["--clip_grad=inf"], ["--negatives=none"], ["--device=foo"], ["--device=cuda:x"],
        ["--seed=-1"], ["--seed=99999999999999999999"], ["--top_k=0"], ["--request_time=-1"],
        ["--request_time=9223372036854775808"], ["--num_epochs=0"], ["--no_such_flag"],
        ["--inference_only"], ["--hidden_units=1"], ["--candidates=new"], ["--overwrite"],
        ["--state_dict_path=model_best.pt"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_32_a_wrong_flag_is_argparses_error(flags, good, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*folders(good, tmp_path / "out"), *SMALL, *flags])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and flags[0].split("=")[0] in last
    assert not (tmp_path / "out").exists()


def test_32_a_cuda_device_that_is_not_there_is_named(good, call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    seen = call(good, "--device=cuda:9")
    assert_refused(seen, r"--device cuda:9: there are cuda:0 to cuda:1")

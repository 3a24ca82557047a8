from __future__ import annotations

import collections
import copyreg
import os
import pickle
import random
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from files.safe_pickle import _SCANNED_BYTES, PickleError, load_pickle

pytestmark = pytest.mark.slow

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "tencentgr-sample"
PROTOCOLS = range(6)
EXTRA_MEMORY = 1 << 30  # bytes a forked child may take on top of what it inherits
SECONDS = 60


def in_child(action: Callable[[], str]) -> str:
    """What `action()` returns in a fork with little memory and time; an escape or signal fails."""
    if sys.platform != "linux":
        pytest.skip("needs /proc and RLIMIT_AS")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + EXTRA_MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.alarm(SECONDS)
            os.write(writer, action().encode())
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc(-5).encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"exit code {code} (negative: a signal)\n{text}"
    return text


def outcome(path: Path) -> str:
    """The message of the refusal, or the type of what was loaded."""
    try:
        return f"loaded {type(load_pickle(path)).__name__}"
    except PickleError as error:
        return str(error)


def rewrite(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # ext4 flushes a file that is overwritten: 100 times slower
    path.write_bytes(data)


def outcome_of(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "81.pkl"
    rewrite(path, data)
    return in_child(lambda: outcome(path))


def assert_same(loaded: Any, expected: Any) -> None:
    kind = dict if type(expected) is collections.defaultdict else type(expected)
    assert type(loaded) is kind
    if kind is np.ndarray:
        assert (loaded.dtype, loaded.shape) == (expected.dtype, expected.shape)
        assert loaded.tobytes() == expected.tobytes()
    elif kind in (list, tuple):
        assert len(loaded) == len(expected)
        for one, other in zip(loaded, expected, strict=True):
            assert_same(one, other)
    elif kind is dict:
        assert_same(list(loaded), list(expected))
        assert_same(list(loaded.values()), list(expected.values()))
    else:
        assert loaded == expected


def assert_plain(value: Any) -> None:
    """Every part is a builtin or numpy data, and every array can be read to its end."""
    if isinstance(value, np.ndarray):
        assert type(value) is np.ndarray
        assert value.dtype.kind in "biuf"
        assert not value.flags.writeable
        value.tobytes()
    elif type(value) in (dict, list, tuple, set, frozenset):
        for part in [*value, *value.values()] if type(value) is dict else value:
            assert_plain(part)
    else:
        plain = (type(None), bool, int, float, str, bytes, bytearray, np.number, np.bool_)
        assert isinstance(value, plain)


# --- what loads ---------------------------------------------------------------------------------

BLOCK = np.arange(30, dtype=np.float32).reshape(2, 3, 5)
CONTENT = {
    "builtins": {"a": [1, -(2**70), 2.5, True, None, "é\n'"], 7: ({1, 2}, b"\x00\xff", b"")},
    "empty": [{}, [], (), set(), "", 0],
    "defaultdict": {"f": collections.defaultdict(dict, {"122": {"x": 1}})},
    "list_factory": collections.defaultdict(list, {"a": [1]}),
    "vectors": {i: np.full(4, i, np.float32) for i in range(3)},
    "dtypes": [np.array([0, 1], code) for code in "?bhiqBHIQefd"],
    "scalars": [np.float32(3), np.float16(1), np.int64(-3), np.uint8(200), np.bool_(True)],
    "scalar_keys": {np.int64(5): np.float32(2)},
    "big_endian": [np.array([1, 2], ">f4"), np.array([1, 2], ">i8")],
    "layouts": [BLOCK, BLOCK[0].T, BLOCK[:, ::2], BLOCK.transpose(2, 0, 1)],
    "shapes": [np.array(3.0), np.zeros((0, 4)), np.zeros(0, np.int32)],
    "nested": [("a", BLOCK), {"b": [(BLOCK[0], 1)]}],
}


def respelled(data: bytes, package: str) -> bytes:
    """`data` as numpy 1 (`numpy.core`) or numpy 2 (`numpy._core`) would have written it."""
    if data[2:3] == b"\x95":  # without the frame, whose length would change
        data = data[:2] + data[11:]
    for module in ("multiarray", "numeric"):
        new = f"{package}.{module}".encode()
        for old in (f"numpy.core.{module}".encode(), f"numpy._core.{module}".encode()):
            data = data.replace(b"c" + old + b"\n", b"c" + new + b"\n")
            data = data.replace(bytes([0x8C, len(old)]) + old, bytes([0x8C, len(new)]) + new)
    return data


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("content", CONTENT.values(), ids=CONTENT)
def test_plain_data_round_trips(content, protocol, package, tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(respelled(pickle.dumps(content, protocol), package))
    loaded = load_pickle(path)
    assert_same(loaded, content)
    assert_plain(loaded)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.integers() | st.text() | st.binary()


@settings(deadline=None)
@given(
    st.recursive(
        leaves | st.binary() | st.sets(keys),
        lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner),
    ),
    st.sampled_from(PROTOCOLS),
)
def test_any_tree_of_builtins_round_trips(tmp_path_factory, tree, protocol):
    path = tmp_path_factory.getbasetemp() / "tree.pkl"
    rewrite(path, pickle.dumps(tree, protocol))
    assert_same(load_pickle(path), tree)


def test_shared_and_cyclic_containers_keep_their_shape(tmp_path):
    path = tmp_path / "cycle.pkl"
    shared = (BLOCK[0], [])
    shared[1].extend([shared, BLOCK[1]])
    path.write_bytes(pickle.dumps({"a": shared[1], "b": shared[1], "c": shared}, 4))
    loaded = load_pickle(path)
    assert loaded["a"] is loaded["b"]
    assert loaded["a"][0][1] is loaded["a"]
    for array in (loaded["c"][0], loaded["a"][0][0]):
        assert_same(array, BLOCK[0])


@pytest.mark.parametrize("name", ["indexer.pkl", "seq_offsets.pkl"])
def test_the_real_sample_loads_like_plain_pickle(name):
    if not (SAMPLE / name).exists():
        pytest.skip(f"no {SAMPLE / name}")
    loaded = load_pickle(SAMPLE / name)
    assert_same(loaded, load_pickle(SAMPLE / name, trust=True))
    assert_plain(loaded)


def test_numbers_cost_no_python_call_per_entry(tmp_path):
    path = tmp_path / "indexer.pkl"
    path.write_bytes(pickle.dumps({"i": {f"user_{i}": i for i in range(100_000)}}, 4))
    assert path.stat().st_size > _SCANNED_BYTES
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(event))
    try:
        load_pickle(path)
    finally:
        sys.setprofile(None)
    assert len(calls) < 200


def test_trust_loads_any_object_and_still_names_a_broken_file(tmp_path):
    path = tmp_path / "fraction.pkl"
    path.write_bytes(pickle.dumps(Fraction(1, 3)))
    assert load_pickle(path, trust=True) == Fraction(1, 3)
    with pytest.raises(PickleError, match=r"fraction\.pkl: refuses to load fractions\.Fraction;"):
        load_pickle(path)
    for broken in (path.read_bytes()[:-1], b"cno_such_module\nname\n."):
        path.write_bytes(broken)
        with pytest.raises(PickleError, match=r"fraction\.pkl: cannot be loaded"):
            load_pickle(path, trust=True)


@pytest.mark.parametrize("trust", [False, True])
def test_a_file_that_cannot_be_opened_is_named(trust, tmp_path):
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "no.pkl", "No such file")):
        with pytest.raises(PickleError, match=f"{path.name}: cannot be read .{reason}"):
            load_pickle(path, trust=trust)


# --- names that would run something --------------------------------------------------------------


class Raw(bytes):
    """Opcodes that leave one object on the stack."""


def opcodes(value: Any) -> Raw:
    if isinstance(value, Raw):
        return value
    if type(value) is tuple:
        return Raw(b"(" + b"".join(map(opcodes, value)) + b"t")
    return Raw(pickle.dumps(value, 3)[2:-1])


def imported(full_name: str) -> Raw:
    module, _, name = full_name.rpartition(".")
    return Raw(f"c{module}\n{name}\n".encode())


def call(full_name: str, *args: Any, state: Any = None) -> Raw:
    built = imported(full_name) + opcodes(args) + b"R"
    return Raw(built if state is None else built + opcodes(state) + b"b")


NAMES = """
    os.system posix.system nt.system subprocess.Popen pty.spawn builtins.eval builtins.exec
    __builtin__.eval builtins.__import__ builtins.getattr builtins.compile builtins.open
    builtins.object builtins.frozenset runpy._run_code webbrowser.open importlib.import_module
    operator.attrgetter operator.methodcaller functools.partial types.CodeType types.FunctionType
    socket.create_connection urllib.request.urlopen shutil.rmtree io.FileIO logging.FileHandler
    numpy.testing._private.utils.runstring numpy.load numpy.dtypes.StringDType
    numpy.memmap numpy.matrix numpy.core.multiarray.fromfile torch.load torch.hub.load
    torch.jit.unsupported_tensor_ops pickle.loads _pickle.Unpickler copyreg._reconstructor
    copy_reg._reconstructor sys.modules collections.OrderedDict numpy.ndarray.tofile
    safe_pickle.load_pickle
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_a_name_that_is_not_plain_data_is_refused(name, tmp_path):
    marker = tmp_path / "marker"
    is_python = name.endswith((".eval", ".exec"))
    argument = f"open({str(marker)!r}, 'w')" if is_python else f"touch {marker}"
    refusal = outcome_of(tmp_path, b"\x80\x02" + call(name, argument) + b".")
    assert f"81.pkl: refuses to load {name}; expected only dict, list, str, numbers" in refusal
    assert refusal.endswith("if you trust the file's origin, pass --trust_pickle")
    assert not marker.exists()


SPELLINGS = {
    "reduce": lambda arg: b"cos\nsystem\n(" + arg + b"tR.",
    "stack_global": lambda arg: b"\x8c\x02os\x8c\x06system\x93(" + arg + b"tR.",
    "memo": lambda arg: b"\x8c\x06system\x94\x8c\x02os\x940" + b"0h\x01h\x00\x93(" + arg + b"tR.",
    "dotted": lambda arg: b"\x8c\x05numpy\x8c\x09os.system\x93(" + arg + b"tR.",
    "inst": lambda arg: b"(" + arg + b"ios\nsystem\n.",
    "obj": lambda arg: b"(cos\nsystem\n" + arg + b"o.",
    "newobj": lambda arg: b"cos\nsystem\n(" + arg + b"t\x81.",
    "newobj_ex": lambda arg: b"cos\nsystem\n(" + arg + b"t}\x92.",
    "factory": lambda arg: b"ccollections\ndefaultdict\n(cos\nsystem\ntR" + arg + b"(ds.",
    "second": lambda arg: b"N.\x80\x02cos\nsystem\n(" + arg + b"tR.",
    "persistent_id": lambda arg: arg + b"Q.",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_opcode_reaches_a_function(spelling, tmp_path):
    marker = tmp_path / "marker"
    data = b"\x80\x04" + SPELLINGS[spelling](opcodes(f"touch {marker}"))
    refusal = outcome_of(tmp_path, data)
    assert "81.pkl: " in refusal
    assert "os.system" in refusal or spelling in ("second", "persistent_id")
    assert not marker.exists()


def test_the_payload_would_run_if_it_were_trusted(tmp_path):
    path, marker = tmp_path / "81.pkl", tmp_path / "marker"
    path.write_bytes(b"\x80\x04" + SPELLINGS["reduce"](opcodes(f"touch {marker}")))
    load_pickle(path, trust=True)
    assert marker.exists()


@pytest.mark.parametrize("opcode", [b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"])
def test_a_cached_extension_code_is_refused(opcode, tmp_path):
    path, marker = tmp_path / "81.pkl", tmp_path / "marker"
    path.write_bytes(b"\x80\x04" + opcode + b"(" + opcodes(f"touch {marker}") + b"tR.")

    def load_after_registration() -> str:
        copyreg.add_extension("os", "system", 0xF0)
        pickle.loads(b"\x80\x04" + opcode + b".")
        return outcome(path)

    assert "refuses to load os.system" in in_child(load_after_registration)
    assert not marker.exists()


def test_one_file_cannot_change_how_the_next_is_read(tmp_path):
    good, bad = tmp_path / "good.pkl", tmp_path / "bad.pkl"
    good.write_bytes(pickle.dumps(BLOCK, 2))
    for name in ("numpy.dtype", "numpy._core.multiarray._reconstruct", "_codecs.encode"):
        for state in ({"_build": 1, "__call__": 1}, (None, {"_build": 1, "__call__": 1})):
            bad.write_bytes(b"\x80\x02" + imported(name) + opcodes(state) + b"b.")
            with pytest.raises(PickleError, match="a change to an imported name"):
                load_pickle(bad)
            assert_same(load_pickle(good), BLOCK)


# --- arrays that lie -----------------------------------------------------------------------------

PLAIN_STATE = (3, "<", None, None, None, -1, -1, 0)


def dtype(code: Any = "f4", state: Any = PLAIN_STATE) -> Raw:
    return call("numpy.dtype", code, False, True, state=state)


def array(shape: Any, kind: Any, raw: Any, fortran: Any = False) -> Raw:
    token = call("numpy.core.multiarray._reconstruct", imported("numpy.ndarray"), (0,), b"b")
    return Raw(token + opcodes((1, shape, kind, fortran, raw)) + b"b")


def buffered(*args: Any) -> Raw:
    return call("numpy._core.numeric._frombuffer", *args)


OBJECT_FIELD = (3, "|", None, ("a",), {"a": (dtype("O8"), 0)}, 8, 1, 0)
STORED = Raw(b"\x96" + struct.pack("<Q", 8) + bytes(8) + b"q\xf0")  # a bytearray
GET = Raw(b"h\xf0")
LYING = {
    "object_dtype": array((1,), dtype("O8"), bytes(8)),
    "object_field": array((1,), dtype("V8", OBJECT_FIELD), bytes(8)),
    "fields_on_f8": array((1,), dtype("f8", (3, "<", None, ("a",), {}, -1, -1, 0)), bytes(8)),
    "subarray": array((1,), dtype("f4", (3, "|", ("f4", (2,)), None, None, 8, 1, 0)), bytes(8)),
    "flags": array((1,), dtype("f8", (3, "<", None, None, None, -1, -1, 27)), bytes(8)),
    "item_size": array((1,), dtype("f8", (3, "<", None, None, None, 1 << 40, -1, 0)), bytes(8)),
    "byte_order": array((2,), dtype("f4", (3, "S", None, None, None, -1, -1, 0)), bytes(8)),
    "text_dtype": array((1,), dtype("U2"), bytes(8)),
    "time_dtype": array((1,), dtype("M8[s]"), bytes(8)),
    "code_is_a_list": array((1,), dtype(["f4"]), bytes(4)),
    "huge": array((1 << 62,), dtype(), bytes(4)),
    "beyond_int64": array((1 << 90, 0), dtype(), b""),
    "empty_but_huge": array((0, 1 << 62), dtype(), b""),
    "overflow": array((1 << 32, 1 << 32), dtype("u1"), b""),
    "negative": array((-1,), dtype(), bytes(4)),
    "two_negatives": array((-1, -1), dtype(), bytes(4)),
    "too_short": array((3,), dtype(), bytes(8)),
    "too_long": array((1,), dtype(), bytes(8)),
    "part_of_an_item": array((2,), dtype(), bytes(7)),
    "float_shape": array((2.0,), dtype(), bytes(8)),
    "list_shape": array([2], dtype(), bytes(8)),
    "many_axes": array((1,) * 65, dtype(), bytes(4)),
    "text_bytes": array((2,), dtype(), "\0" * 8),
    "no_dtype": array((2,), "f4", bytes(8)),
    "bool_of_2": array((2,), dtype("b1"), b"\x01\x02"),
    "no_state": call("numpy.core.multiarray._reconstruct", 0, 0, 0),
    "half_state": call("numpy.core.multiarray._reconstruct", 0, state=(1, (2,))),
    "bare_dtype": Raw(b"]" + dtype() + b"a"),
    "bare_name": Raw(b"]" + imported("numpy.dtype") + b"a"),
    "name_in_a_tuple_as_key": Raw(b"}" + imported("numpy.dtype") + b"\x85Ns"),
    "dtype_as_key": Raw(b"}" + dtype() + b"Ns"),
    "array_as_key": Raw(b"}" + array((1,), dtype(), bytes(4)) + b"Ns"),
    "called_ndarray": call("numpy.ndarray", (1 << 40,)),
    "called_list": call("builtins.list", "abc"),
    "sized_bytes": call("builtins.bytes", 1 << 40),
    "short_scalar": call("numpy.core.multiarray.scalar", dtype("i8"), bytes(4)),
    "object_scalar": call("numpy.core.multiarray.scalar", dtype("O8"), bytes(8)),
    "short_buffer": buffered(bytes(4), dtype(), (2,), "C"),
    "unknown_order": buffered(bytes(8), dtype(), (2,), "Z"),
    "wrong_axes": buffered(bytes(8), dtype(), (2, 1), "K", (0, 7)),
    "written_bytes": Raw(STORED + b"K\x09K\x01s"),
    "written_array": Raw(buffered(bytes(8), dtype(), (2,), "C") + b"K\x00K\x01s"),
    "rebuilt_array": Raw(
        buffered(bytes(8), dtype(), (2,), "C")
        + opcodes((1, (1 << 40,), dtype(), False, bytes(8)))
        + b"b"
    ),
    "readonly_view": Raw(STORED + b"\x98"),
    "other_encoding": call("_codecs.encode", "abc", "utf-16"),
    "number_encoded": call("_codecs.encode", 5, "latin1"),
}


@pytest.mark.parametrize("lie", LYING)
def test_a_malformed_array_is_refused(lie, tmp_path):
    refusal = outcome_of(tmp_path, b"\x80\x05" + LYING[lie] + b".")
    assert "81.pkl: cannot be loaded" in refusal or "81.pkl: refuses to load" in refusal


def test_the_bytes_under_an_array_cannot_be_resized(tmp_path):
    grow = buffered(STORED, dtype(), (2,), "C") + GET + b"(" + b"K\x01" * 999 + b"e0"
    assert "81.pkl: cannot be loaded (BufferError" in outcome_of(
        tmp_path, b"\x80\x05" + grow + b"."
    )


def test_a_scan_is_not_what_refuses_a_malformed_array(tmp_path, monkeypatch):
    monkeypatch.setattr("files.safe_pickle._SCANNED_BYTES", 0)
    for lie in LYING.values():
        assert "81.pkl: " in outcome_of(tmp_path, b"\x80\x05" + lie + b".")


# --- files that exhaust memory, time or stack ----------------------------------------------------

PADDING = b"B" + struct.pack("<I", _SCANNED_BYTES) + bytes(_SCANNED_BYTES) + b"0"
BOMBS = {
    "empty": b"",
    "protocol": b"\x80\xff.",
    "binbytes8": b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "binunicode8": b"\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
    "bytearray8": b"\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "beyond_int64": b"\x8e" + b"\xff" * 8 + b".",
    "long4": b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",
    "negative_long4": b"\x8b" + struct.pack("<i", -1) + b"x.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "memo": b"Nr" + struct.pack("<I", (1 << 32) - 1) + b".",
    "text_memo": b"Np4000000000\n.",
    "no_memo": b"h\x07.",
    "no_stop": b"\x80\x04N",
    "trailing_bytes": b"N.\n",
}


@pytest.mark.parametrize("padding", [b"", PADDING], ids=["small", "above_the_scan"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_within_bounds(bomb, padding, tmp_path):
    assert "81.pkl: cannot be loaded" in outcome_of(tmp_path, padding + BOMBS[bomb])


DEEP = _SCANNED_BYTES + 1000


@pytest.mark.parametrize(
    "data", [b"N" + b"\x85" * DEEP, b"]" * DEEP + b"a" * (DEEP - 1)], ids=["tuple", "list"]
)
def test_deep_nesting_is_refused(data, tmp_path):
    assert "81.pkl: cannot be loaded (RecursionError" in outcome_of(tmp_path, data + b".")


def test_a_memo_number_is_refused_before_it_takes_memory(tmp_path):
    refusal = outcome_of(tmp_path, BOMBS["memo"])
    assert "memo number 4294967295 in a file of 7 bytes" in refusal


BIG = 1_000_000
TIMES = 3_000


def test_many_arrays_over_the_same_bytes_stay_small(tmp_path):
    stored = b"B" + struct.pack("<I", BIG) + bytes(BIG) + b"q\xf0" + b"0" + dtype("u1") + b"q\xf10"
    one = buffered(Raw(b"h\xf0"), Raw(b"h\xf1"), (BIG,), "C")
    assert outcome_of(tmp_path, stored + b"](" + one * TIMES + b"e.") == "loaded list"


def test_a_tuple_that_doubles_a_hundred_times_is_visited_once(tmp_path):
    assert outcome_of(tmp_path, b"\x80\x02N" + b"q\x00h\x00\x86" * 100 + b".") == "loaded tuple"


# --- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truncation_at_any_byte_is_refused(protocol, tmp_path):
    path = tmp_path / "81.pkl"
    data = pickle.dumps({"a": [1, 2.5, b"xyz"], 7: BLOCK, "b": np.float32(2)}, protocol)

    def load_each() -> str:
        loaded = []
        for length in range(len(data)):
            rewrite(path, data[:length])
            if "81.pkl: cannot be loaded" not in outcome(path):
                loaded.append(length)
        return str(loaded)

    assert in_child(load_each) == "[]"


@pytest.mark.parametrize("scanned_bytes", [0, _SCANNED_BYTES])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_changed_byte_gives_plain_data_or_a_refusal(
    protocol, scanned_bytes, tmp_path, monkeypatch
):
    """A pickle has no checksum: a changed number loads, but as a number within a sound array."""
    monkeypatch.setattr("files.safe_pickle._SCANNED_BYTES", scanned_bytes)
    path = tmp_path / "81.pkl"
    vectors = {f"item_{i}": np.arange(i, i + 4, dtype=np.float32) for i in range(5)}
    data = pickle.dumps(vectors, protocol)
    generator = random.Random(protocol)

    def load_each() -> str:
        num_refused = 0
        for _ in range(1_000):
            changed = bytearray(data)
            changed[generator.randrange(len(data))] = generator.randrange(256)
            rewrite(path, changed)
            try:
                assert_plain(load_pickle(path))
            except PickleError as error:
                num_refused += "81.pkl: " in str(error)
        return str(num_refused)

    assert 100 < int(in_child(load_each)) < 1_000

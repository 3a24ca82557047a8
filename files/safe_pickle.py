"""Reads a pickle of plain data (`indexer.pkl`, `creative_emb/*.pkl`) without running it.

The C unpickler does the work, but every name that the file imports is refused or becomes a `_Name`,
and dtypes and arrays become stand-ins that check what numpy is asked for.

Covered: no code runs, no array reaches beyond its bytes, a damaged file is a `PickleError`.
Not covered: a file built to cost time, memory or C stack can still stall or end the process.
"""

from __future__ import annotations

import copyreg
import pickle
import pickletools
from pathlib import Path
from typing import IO, Any

import numpy as np

from files.atomic_io import DataError

_SCANNED_BYTES = 1 << 20  # the scan is Python: about 0.1 s per MiB
_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_LEAVES = {type(None), bool, int, float, str, bytes, bytearray, set, frozenset, np.ndarray}
_LEAVES |= {np.dtype(code).type for code in _CODES}
# What the unpickler raises on damaged input, and numpy on arguments it cannot use.
_FAULTS = (ArithmeticError, AttributeError, BufferError, EOFError, ImportError, LookupError)
_FAULTS += (RecursionError, TypeError, ValueError, pickle.UnpicklingError)


class PickleError(DataError):
    """A refused or broken pickle."""


def load_pickle(path: str | Path, *, trust: bool = False) -> Any:
    """The plain data in a pickle of protocol 0 to 5, written under numpy 1 or 2.

    That is dict, list, tuple, set, str, bytes, numbers, None, and numpy scalars and read-only
    arrays of bool, integer and float types; a defaultdict comes back as a dict. `trust` means plain
    `pickle.load`, which runs whatever the file asks for.

    Raises:
        PickleError: the file is unreadable, damaged, or asks for anything else.
    """
    try:
        with open(path, "rb") as file:
            return pickle.load(file) if trust else _load(file)
    except PickleError as error:
        raise PickleError(
            f"{path}: refuses to load {error}; expected only dict, list, str, numbers and numpy "
            "arrays; if you trust the file's origin, pass --trust_pickle"
        ) from error
    except OSError as error:
        raise PickleError(f"{path}: cannot be read ({error.strerror})") from error
    except MemoryError as error:
        found = "cannot be loaded: damaged, or larger than the memory that is free"
        raise PickleError(f"{path}: {found}") from error
    except _FAULTS as error:
        found = f"{type(error).__name__}: {error!s:.200}"
        raise PickleError(f"{path}: cannot be loaded ({found}); write it again") from error


def _load(file: IO[bytes]) -> Any:
    head = file.read(_SCANNED_BYTES + 1)
    if len(head) <= _SCANNED_BYTES:
        _scan(head)
    file.seek(0)
    copyreg.clear_extension_cache()  # what it holds would bypass find_class
    value = _Unpickler(file).load()
    if file.read(1):
        raise ValueError("data after the end of the pickle")
    return _finish(value, {})


def _scan(data: bytes) -> None:
    """Refuses a memo number beyond the file's size: the C memo is an array of that length."""
    for opcode, number, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and number > len(data):
            raise ValueError(f"memo number {number} in a file of {len(data)} bytes")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Name:
        full_name = f"{module}.{name}"
        if full_name not in _BUILDERS:
            raise PickleError(ascii(full_name)[1:-1][:80])
        return _Name(_BUILDERS[full_name])


# A pickle may write to whatever it holds. The next three are closed to that: `__setstate__` comes
# before any write to an attribute, and without a hash none can hide in a key.


class _Name:
    """Stands for an imported name: it can be called, and nothing else."""

    __hash__ = None

    def __init__(self, build: Any):
        self._build = build

    def __call__(self, *args: Any) -> Any:
        return self._build(*args)

    def __setstate__(self, state: Any) -> None:
        raise PickleError("a change to an imported name")


class _Dtype:
    __hash__ = None

    def __init__(self, code: Any, *_is_copy: Any):
        if code not in _CODES:
            raise PickleError(f"numpy dtype {ascii(code)[:40]}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, byte_order, *rest = state
        if byte_order not in ("<", ">", "|") or rest != [None, None, None, -1, -1, 0]:
            raise PickleError("a numpy dtype with fields or flags")
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    __hash__ = None
    array = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.array = _view(raw, dtype, shape, "F" if is_fortran else "C")


def _view(raw: Any, dtype: Any, shape: Any, order: Any = "C", axes: Any = None) -> np.ndarray:
    """A read-only array over `raw`, not a copy of it."""
    # Unlike ndarray(buffer=...), frombuffer holds a bytearray so that no opcode can resize it.
    array = np.frombuffer(raw, dtype.dtype).reshape(shape, order="C" if axes else order)
    if array.shape != shape:  # reshape compares the sizes, but reads -1 as "what fits"
        raise ValueError(f"a numpy array of shape {ascii(shape)[:80]}")
    if array.dtype == bool and array.view(np.uint8).max(initial=0) > 1:
        raise ValueError("a numpy bool that is neither 0 nor 1")
    array.flags.writeable = False
    return array.transpose(axes) if axes else array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise PickleError(f"text in encoding {ascii(encoding)[:40]}")
    return text.encode("latin1")


def _finish(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """`value` with arrays in place of their stand-ins; refuses what is not plain data.

    `done` maps the id of a container to it (so that the id stays taken) and its finished form. The
    types in a container are compared in C: a dict of numbers costs no Python per entry.
    """
    kind = type(value)
    if kind in _LEAVES:
        return value
    if kind is _Array and value.array is not None:
        return value.array
    if kind not in (dict, list, tuple):
        raise PickleError(f"a bare {kind.__name__.lstrip('_')}")
    if id(value) not in done and kind is tuple:
        done[id(value)] = value, tuple([_finish(item, done) for item in value])
    elif id(value) not in done:
        done[id(value)] = value, value  # before its items: it may hold itself
        if not _LEAVES.issuperset(map(type, value.values() if kind is dict else value)):
            for key, item in value.items() if kind is dict else enumerate(value):
                value[key] = _finish(item, done)
    return done[id(value)][1]


_BUILDERS = {"numpy.dtype": _Dtype, "numpy.ndarray": None, "_codecs.encode": _encode}
_BUILDERS |= {"collections.defaultdict": lambda _factory=None: {}}
for _module in ("builtins", "__builtin__"):
    _BUILDERS |= {f"{_module}.{factory}": None for factory in ("dict", "int", "list")}
    _BUILDERS |= {f"{_module}.bytes": lambda: b"", f"{_module}.set": set}
for _module in ("numpy.core", "numpy._core"):
    _BUILDERS[f"{_module}.multiarray._reconstruct"] = lambda *_: _Array()
    _BUILDERS[f"{_module}.multiarray.scalar"] = lambda dtype, raw: _view(raw, dtype, ())[()]
    _BUILDERS[f"{_module}.numeric._frombuffer"] = _view

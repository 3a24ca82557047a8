"""The one way a file is written, and `DataError`, the one way a bad file is refused."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_HASH_BLOCK = 1 << 20  # bytes


class DataError(ValueError):
    """A file that cannot be used: the message says where, what was found, expected, and to do."""


def cause(error: Exception) -> str:
    """What went wrong in a line, the file first."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def exit_code(work: Callable[[], Any]) -> int:
    """Of a script: 0; or 1 for a file it cannot use, 130 for Ctrl-C, with one line on stderr."""
    try:
        work()
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except (DataError, OSError) as error:
        print(f"error: {cause(error)}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def atomic_write(path: str | Path, size: int = 0) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` complete and durable, or not at all.

    The temporary lies in the same folder (a rename across file systems is no rename) and gets the
    mode bits of a plain `open`.

    Args:
        path: of the file.
        size: bytes that it will have, about, which the error of a full disk names.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        size = max(size, temporary.stat().st_size if temporary.exists() else 0)
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            _explain(error, path, size)
        raise


def _explain(error: OSError, path: Path, size: int) -> None:
    """Say of a failed write which file it was for and, of a full disk, what it lacks."""
    error.filename, error.filename2 = str(path), None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        error.strerror += f": it needs {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"


def write_hashed(file: IO[bytes], pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write `pieces` one behind the other; their `file_entry`, without reading the file again.

    The bytes are on the disk when it returns: what a full disk fails, it fails before several files
    that belong together are renamed.

    Args:
        file: open and empty, of `atomic_write`.
        pieces: buffers of one dimension, made one at a time.
    """
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        file.write(piece)
        digest.update(piece)
        size += memoryview(piece).nbytes
    file.flush()
    os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def hold_folder(folder: str | Path) -> Iterator[None]:
    """Keep other processes from holding `folder`, until this one leaves the block or dies.

    Where there are no such locks, as on some network disks, nothing happens.

    Raises:
        DataError: another process holds it.
    """
    with open(Path(folder) / ".hstu.lock", "a+") as file:
        try:
            # Not flock: loader processes would inherit it, and outlive a parent that is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise DataError(
                f"{folder}: process {file.read() or '(unknown)'} is at work in it; wait for its "
                "end, or choose another folder"
            ) from error
        except OSError:  # no locks on this disk
            pass
        with suppress(OSError):  # a full disk: the lock holds, without a name
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}")
            file.flush()
        yield


def sweep_temporaries(folder: str | Path) -> None:
    """Remove what a killed writer left in `folder`."""
    for stray in Path(folder).glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", stray.name):  # of `atomic_write`
            stray.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_entry(path: str | Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as manifests record them."""
    return {"size": os.path.getsize(path), "sha256": sha256_of(path)}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what reading `path` may raise into a DataError with its name."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, RecursionError) as error:
        raise DataError(f"{path}: {error}; the file is damaged or in another format") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a small JSON file; NaN and infinity, which `read_json` refuses, are a ValueError."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def read_json(path: str | Path) -> Any:
    """The value in a small JSON file.

    Raises:
        DataError: the file is unreadable, not UTF-8 (a byte order mark is accepted), not JSON, or
            holds a key twice, NaN, Infinity, an integer beyond int64, or text that is no Unicode.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique_keys(path, pairs),
            parse_constant=lambda name: _refuse(path, name),
            parse_float=lambda digits: _finite(path, digits),
            parse_int=lambda digits: _int64(path, digits),
        )
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}: {error.object[error.start]!a} is half a surrogate pair and no text; remove it"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8; write it again as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {error.lineno} column {error.colno}: {error.msg}; "
            "the file is empty, truncated or not JSON"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply to be one of our files") from error


def _unique_keys(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DataError(f"{path}: key {twice!r} occurs twice in one object; remove one of them")
    return result


def _finite(path: Path, digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(path, digits)


def _int64(path: Path, digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        _refuse(path, digits[:24])
    return int(digits)


def _refuse(path: Path, found: str) -> Any:
    raise DataError(f"{path}: {found} is not a finite number within int64; correct the file")

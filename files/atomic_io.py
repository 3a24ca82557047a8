"""The one way a file is written, and `DataError`, the one way a bad file is refused."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_SECONDS = 10


class DataError(ValueError):
    """A file that cannot be used: the message says where, what was found, expected, and to do."""


def cause(error: Exception) -> str:
    """What went wrong in a line, the file first."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def exit_code(work: Callable[[], Any]) -> int:
    """Of a script: 0; or 1 for a file it cannot use, 130 for Ctrl-C, with one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for names that the terminal cannot spell
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
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` complete and durable, or not at all.

    The temporary lies in the same folder (a rename across file systems is no rename) and gets the
    mode bits of a plain `open`.

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
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.strerror += f": {shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free"
        raise


def write_hashed(file: IO[bytes], pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write `pieces`, one-dimensional buffers; their `file_entry`, without reading the file again.

    The bytes are on the disk when it returns: a full disk shows before several files that belong
    together are renamed.
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
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of network disks that know no such
            raise
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Keep other processes from locking `folder`, until this one leaves the block or dies.

    Where there are no locks, as on some network disks and on Windows, nothing happens.

    Raises:
        DataError: another process has locked it.
    """
    with open(Path(folder) / ".hstu.lock", "ab") as file:
        # Loader processes inherit the lock, and outlive a parent that is killed by some seconds.
        deadline = time.monotonic() + LOCK_SECONDS
        while fcntl and not _lock(file):
            if time.monotonic() >= deadline:
                found = "another process is at work in it"
                raise DataError(f"{folder}: {found}; wait for its end, or name another folder")
            time.sleep(0.05)
        try:
            yield
        finally:
            if fcntl:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)  # for loader processes that are still there


def _lock(file: IO[bytes]) -> bool:
    """Whether the file is ours now, or its disk has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def sweep_temporaries(folder: str | Path) -> None:
    """Remove what killed writers left in `folder`, and not what others here are writing."""
    for stray in Path(folder).glob(".*.tmp"):
        of = re.fullmatch(r"\..+\.(\d+)\.tmp", stray.name)  # of `atomic_write`
        if of and (int(of[1]) == os.getpid() or not Path("/proc", of[1]).exists()):
            stray.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
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
    """Write a small JSON file; NaN and infinity, which are no JSON, are a ValueError."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def read_json(path: str | Path) -> Any:
    """The value in a small JSON file.

    Raises:
        DataError: the file is unreadable, not UTF-8 (a byte order mark is accepted), or not JSON.
    """
    path = Path(path)
    with reading(path):
        try:
            return json.loads(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8; write it again") from error
        except json.JSONDecodeError as error:
            place = f"line {error.lineno} column {error.colno}"
            raise DataError(
                f"{path}: {place}: {error.msg}; empty, truncated or not JSON"
            ) from error

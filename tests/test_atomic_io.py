"""Files appear whole or not at all, and bad JSON is refused by name."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from files.atomic_io import (
    DataError,
    atomic_write,
    file_entry,
    read_json,
    sha256_of,
    sweep_temporaries,
    write_hashed,
    write_json,
)

OLD, NEW = b"the old content", b"the new and longer content"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    path.write_bytes(OLD)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def write_new(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(NEW)


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(target):
    write_new(target)
    assert target.read_bytes() == NEW
    assert names_in(target.parent) == [target.name]


def test_readers_see_the_old_file_until_the_new_one_is_complete(target):
    with atomic_write(target) as file:
        file.write(NEW)
        file.flush()
        assert target.read_bytes() == OLD
    assert target.read_bytes() == NEW


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_while_writing_leaves_the_old_file_and_no_temporary(target, error):
    with pytest.raises(error), atomic_write(target) as file:
        file.write(NEW)
        raise error
    assert target.read_bytes() == OLD
    assert names_in(target.parent) == [target.name]


def test_an_exception_while_writing_a_first_file_leaves_an_empty_folder(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "first.bin") as file:
        file.write(NEW)
        raise RuntimeError
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_written_file_has_the_mode_of_a_plain_open(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_new(tmp_path / "atomic")
        (tmp_path / "plain").write_bytes(NEW)
    finally:
        os.umask(before)
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("fsync", errno.EIO),
        ("fsync", errno.ENOSPC),
        ("replace", errno.EXDEV),
        ("replace", errno.EPERM),
        ("replace", errno.ENOSPC),
    ],
)
def test_an_error_of_the_disk_leaves_the_old_file(target, monkeypatch, function, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_new(target)
    monkeypatch.undo()
    assert target.read_bytes() == OLD
    assert names_in(target.parent) == [target.name]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_cannot_sync_folders_is_written_to(target, monkeypatch, number):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_new(target)
    assert target.read_bytes() == NEW


def test_a_full_disk_error_says_how_much_is_free(target, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"device: \d+\.\d MB are free") as caught:
        write_new(target)
    assert caught.value.filename == str(target)


def test_the_file_is_synced_before_its_rename_and_the_folder_after(target, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert path.is_dir() or path.read_bytes() == NEW
        calls.append(path.name)
        fsync(descriptor)

    def note_replace(source, destination):
        assert Path(source).read_bytes() == NEW
        calls.append("replace")
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_new(target)
    temporary, *rest = calls
    assert temporary.startswith(f".{target.name}.") and temporary.endswith(".tmp")
    assert rest == ["replace", target.parent.name]


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_new(tmp_path / "nowhere" / "file.bin")


def test_the_sweep_removes_what_a_killed_writer_left_and_nothing_else(target):
    writer = atomic_write(target)
    writer.__enter__().write(NEW)  # and then the process is killed
    (target.parent / "notes.tmp").write_bytes(b"a user's file")
    (target.parent / ".hidden").write_bytes(b"a user's file")
    assert len(names_in(target.parent)) == 4
    sweep_temporaries(target.parent)
    assert names_in(target.parent) == [".hidden", "notes.tmp", target.name]


def test_the_sweep_leaves_what_another_process_is_writing(tmp_path):
    if not Path("/proc", str(os.getppid())).exists():
        pytest.skip("needs /proc")
    ours, theirs = (tmp_path / f".values.npy.{pid}.tmp" for pid in (os.getpid(), os.getppid()))
    ours.touch()
    theirs.touch()
    sweep_temporaries(tmp_path)
    assert names_in(tmp_path) == [theirs.name]


@pytest.mark.parametrize("size", [0, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 3])
def test_a_file_entry_is_its_size_and_sha256(tmp_path, size):
    content = bytes(k % 251 for k in range(251)) * (size // 251 + 1)
    path = tmp_path / "file.bin"
    path.write_bytes(content[:size])
    expected = hashlib.sha256(content[:size]).hexdigest()
    assert sha256_of(path) == expected
    assert file_entry(path) == {"size": size, "sha256": expected}


@pytest.mark.parametrize("pieces", [[], [b""], [NEW], [OLD, b"", NEW], [np.arange(7.0).data, NEW]])
def test_the_hash_taken_while_writing_is_that_of_the_file(target, pieces):
    with atomic_write(target) as file:
        entry = write_hashed(file, iter(pieces))
        temporary = Path(file.name)
        assert temporary.read_bytes() == b"".join(pieces)  # no byte waits in a buffer
    assert entry == file_entry(target)
    assert target.read_bytes() == b"".join(pieces)


# ------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "value",
    [
        {"b": [1, -2.5, None, True], "a": {"ü": "日本"}, "": []},
        [-(2**63), 2**63 - 1, 0.1, 1e308, 5e-324],
        {},
        "text",
    ],
)
def test_json_is_read_as_it_was_written(tmp_path, value):
    path = tmp_path / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_json_that_could_not_be_read_again_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", value)
    assert names_in(tmp_path) == []


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "types.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" + b"7" * 5000 + b"]", "Exceeds the limit"),
        ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "line 1 column 2"),
        (b'{"a": "\xe4"}', "byte 7 is not UTF-8"),
        (b"", "line 1 column 1: .*empty"),
        (b"  \n", "line 2 column 1: .*empty"),
        (b'{"a": [1, 2', "truncated"),
        (b'{"a": 1} {', "line 1 column 10"),
        (b"\x80\x04K\x01.", "not UTF-8"),
        (b"[" * 200_000, "maximum recursion depth"),
        (b'{"a":' * 200_000, "maximum recursion depth"),
    ],
)
def test_a_bad_json_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "feature_types.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"feature_types\.json: .*{message}"):
        read_json(path)


def test_a_json_file_that_is_absent_or_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json: cannot be read"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"folder\.json: cannot be read"):
        read_json(tmp_path / "folder.json")


def test_every_truncation_of_a_json_file_is_refused(tmp_path):
    path = tmp_path / "statistics.json"
    text = '{"100": 6, "ü": [1.5, -2], "n": null}'.encode()
    for length in range(len(text)):
        path.write_bytes(text[:length])
        with pytest.raises(DataError, match=r"statistics\.json"):
            read_json(path)

"""Files that are either the old or the new ones."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from casync_updater.files import sync_folder, write_atomic, write_together
from casync_updater.syscalls import (
    NO_EXCHANGE,
    exchange,
    free_space,
    rename_noreplace,
    sync_file_system,
)


def test_a_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomic(file, b"old")
    assert file.stat().st_mode & 0o7777 == 0o644
    write_atomic(file, b"new", mode=0o600)
    assert file.read_bytes() == b"new"
    assert file.stat().st_mode & 0o7777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_several_files_are_replaced(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"old")
    write_together({one: (b"n", b"ew"), two: iter((b"2",))})
    assert (one.read_bytes(), two.read_bytes()) == (b"new", b"2")
    assert sorted(tmp_path.iterdir()) == [one, two]


def test_none_is_replaced_where_one_of_several_fails(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"old")

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write_together({one: (b"new",), two: broken()})
    assert one.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [one]


def test_a_link_is_replaced_itself(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"other")
    (tmp_path / "file").symlink_to("target")
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "target").read_bytes() == b"other"
    assert not (tmp_path / "file").is_symlink()


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomic(file, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomic(file, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "folder", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        sync_folder(tmp_path / "file")


def test_two_names_change_places(tmp_path: Path) -> None:
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "file\udcff").write_bytes(b"x")
    exchange(tmp_path / "folder", tmp_path / "file\udcff")
    assert (tmp_path / "folder").read_bytes() == b"x"
    assert (tmp_path / "file\udcff" / "in").is_dir()
    with pytest.raises(FileNotFoundError) as caught:
        exchange(tmp_path / "folder", tmp_path / "missing")
    assert caught.value.filename == str(tmp_path / "folder")
    assert caught.value.filename2 == str(tmp_path / "missing")


def test_a_name_that_is_taken_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    with pytest.raises(FileExistsError):
        rename_noreplace(tmp_path / "one", tmp_path / "two")
    rename_noreplace(tmp_path / "one", tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == b"1"
    assert (tmp_path / "two").read_bytes() == b"2"


def test_another_file_system_cannot_be_exchanged_with(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="cross-device") as caught:
        exchange(tmp_path / "file", Path("/proc/self/comm"))
    assert caught.value.errno == errno.EXDEV
    assert caught.value.errno in NO_EXCHANGE


def test_syncing_never_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    sync_file_system(tmp_path / "pipe")
    sync_file_system(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_file_system(tmp_path / "missing")


def test_free_space(tmp_path: Path) -> None:
    assert free_space(tmp_path) > 0

"""A block device that remembers every write, and what could be on it after a power cut.

``qemu-storage-daemon`` exports an image through its ``blklogwrites`` filter as a file (FUSE), a
loop device makes a block device of that, and the real programs run on a real file system on it.
The log has the format of the kernel's dm-log-writes: every write with its data, and every flush.

A crash state is everything up to the last flush before an instant, and of the writes after that
none, all, a random part, or a random part of which the last one is torn. That is what disks with
a volatile cache do, and nothing may rely on more.
"""

import contextlib
import json
import mmap
import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_MAGIC = 0x6A736677736872
_FLUSH, _FUA, _DISCARD = 1, 2, 4
_MARK = b"REPORTED"
_MARK_SIZE = 4096
STYLES = ("none", "all", "some", "torn")


@dataclass(frozen=True)
class Entry:
    """One record of the log; sizes and places in bytes."""

    place: int
    size: int
    flags: int
    data: int
    """Where in the log the bytes are."""


@dataclass(frozen=True)
class CrashState:
    """What is on the disk after the power went."""

    image: Path
    number: int
    style: str
    mark: dict[str, Any] | None
    """What had been reported as done before."""


class RecordedDisk:
    """The device, mounted at `mount` while it is recorded; then its crash states, one by one."""

    def __init__(self, folder: Path, mount: Path, size: int) -> None:
        self._folder = folder
        self._mount = mount
        self._size = size
        self._file_system = size - (1 << 20)
        self._loop = ""
        folder.mkdir()
        mount.mkdir(exist_ok=True)

    @property
    def _base(self) -> Path:
        return self._folder / "base.img"

    @property
    def _log(self) -> Path:
        return self._folder / "log.img"

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """A new ext4 file system, and all that happens to it."""
        disk, export = self._folder / "disk.img", self._folder / "export.img"
        with disk.open("wb") as file:
            file.truncate(self._size)
        options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        _run("mke2fs", "-q", "-t", "ext4", "-E", options, disk, f"{self._file_system >> 10}k")
        _run("cp", "--sparse=always", disk, self._base)
        with self._log.open("wb") as file:
            file.truncate(16 << 30)
        export.touch()
        with contextlib.ExitStack() as stack:
            daemon = subprocess.Popen(
                [
                    "qemu-storage-daemon",
                    *("--blockdev", f"driver=file,node-name=disk,filename={disk}"),
                    *("--blockdev", f"driver=file,node-name=log,filename={self._log}"),
                    *("--blockdev", "driver=blklogwrites,node-name=all,file=disk,log=log"),
                    "--export",
                    f"type=fuse,id=all,node-name=all,mountpoint={export},writable=on",
                ]
            )
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            end = time.monotonic() + 20
            while export.stat().st_size != self._size:
                assert daemon.poll() is None, "qemu-storage-daemon ended"
                assert time.monotonic() < end, "qemu-storage-daemon exports nothing"
                time.sleep(0.02)
            # Not --direct-io=on: the export then loses concurrent writes.
            self._loop = _run("losetup", "--show", "--find", export).strip()
            stack.callback(_run, "losetup", "--detach", self._loop)
            _run("mount", "-t", "ext4", self._loop, self._mount)
            stack.callback(_run, "umount", self._mount)
            yield

    def mark(self, value: dict[str, Any]) -> None:
        """Something was reported as done: note that on the disk, past the file system."""
        text = _MARK + json.dumps(value).encode()
        buffer = mmap.mmap(-1, _MARK_SIZE)
        buffer.write(text.ljust(_MARK_SIZE))
        device = os.open(self._loop, os.O_WRONLY | os.O_DIRECT)
        try:
            os.pwrite(device, buffer, self._size - _MARK_SIZE)
        finally:
            os.close(device)

    def crash_states(self, rng: random.Random, count: int) -> Iterator[CrashState]:
        """So many of the states, in the order of time, evenly spread over the log."""
        with self._log.open("rb") as log, self._base.open("r+b") as durable:
            entries = list(_entries(log))
            self._demand_whole(log, entries)
            pending: list[Entry] = []
            mark: dict[str, Any] | None = None
            instants = sorted(rng.randrange(20, len(entries)) for _ in range(count))
            done = 0
            for number, instant in enumerate(instants):
                for entry in entries[done:instant]:
                    if entry.flags & _FLUSH:
                        for earlier in pending:
                            _write(log, earlier, durable)
                        pending = []
                    if not entry.size or entry.flags & _DISCARD:
                        continue
                    if entry.place >= self._file_system:
                        mark = _mark_in(log, entry) or mark
                        continue
                    if entry.flags & _FUA:
                        _write(log, entry, durable)
                    else:
                        pending.append(entry)
                done = instant
                durable.flush()
                style = STYLES[number % len(STYLES)]
                # A name of its own: mount would use the loop device of the last one again while
                # that is being detached, with what was cached of it.
                image = self._folder / f"crashed-{number}.img"
                _run("cp", "--sparse=always", self._base, image)
                with image.open("r+b") as disk:
                    _apply(log, disk, pending, style, rng)
                yield CrashState(image, number, style, mark)
                image.unlink()

    def _demand_whole(self, log: BinaryIO, entries: list[Entry]) -> None:
        """A guard for the recording itself: replayed as a whole, the log gives the disk."""
        replayed = self._folder / "replayed.img"
        _run("cp", "--sparse=always", self._base, replayed)
        with replayed.open("r+b") as disk:
            for entry in entries:
                if not entry.flags & _DISCARD:
                    _write(log, entry, disk)
        _run("cmp", replayed, self._folder / "disk.img")
        replayed.unlink()


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    """A file system in an image, as it is: its journal is replayed, as after every cut."""
    _run("mount", "-t", "ext4", "-o", "loop", image, place)
    try:
        yield
    finally:
        _run("umount", place)


def _apply(
    log: BinaryIO, disk: BinaryIO, pending: list[Entry], style: str, rng: random.Random
) -> None:
    for entry in pending:
        if style == "none" or (style in ("some", "torn") and rng.random() < 0.5):
            continue
        torn = style == "torn" and entry is pending[-1]
        _write(log, entry, disk, rng.randrange(entry.size) & ~511 if torn else None)


def _entries(log: BinaryIO) -> Iterator[Entry]:
    magic, _, _, unit = struct.unpack("<QQQI", log.read(28))
    assert magic == _MAGIC, "this is no log of writes"
    position = unit
    while True:
        log.seek(position)
        sector, count, flags, _ = struct.unpack("<QQQQ", log.read(32))
        if not (sector or count or flags):
            return
        position += unit
        yield Entry(sector * unit, count * unit, flags, position)
        if not flags & _DISCARD:
            position += count * unit


def _write(log: BinaryIO, entry: Entry, disk: BinaryIO, size: int | None = None) -> None:
    log.seek(entry.data)
    disk.seek(entry.place)
    disk.write(log.read(entry.size if size is None else size))


def _mark_in(log: BinaryIO, entry: Entry) -> dict[str, Any] | None:
    log.seek(entry.data)
    data = log.read(entry.size)
    if not data.startswith(_MARK):
        return None
    found: dict[str, Any] = json.loads(data.removeprefix(_MARK).rstrip(b" \0"))
    return found


def _run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

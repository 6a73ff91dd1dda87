"""A block device that remembers every write, and what could be on it after a power cut.

``qemu-storage-daemon`` exports an image through its ``blklogwrites`` filter as a file (FUSE), a
loop device makes a block device of that, and the real programs run on a real file system on it.
The log has the format of the kernel's dm-log-writes: every write with its data, and every flush.

A crash state is everything up to the last flush before an instant, and of the writes after that
none, all, a random part, or a random part of which the last one is torn. That is what disks with
a volatile cache do, and nothing may rely on more.
"""

import contextlib
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
_BLOCK = 4096
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
    mark: dict[str, Any]
    """What had been reported as done before."""


class WriteLog:
    """What was written to a disk, and the states that it could have been in after a cut."""

    def __init__(self, folder: Path, log: Path, base: Path) -> None:
        """Nothing is read yet.

        Args:
            folder: takes the images.
            log: what ``blklogwrites`` writes.
            base: the disk as it was before; changed as time goes on.
        """
        self._folder = folder
        self._log = log
        self._base = base
        self._marks: list[tuple[int, dict[str, Any]]] = []

    def mark(self, value: dict[str, Any]) -> None:
        """Something was reported as done: what was written before that, and flushed, stays."""
        with self._log.open("rb") as log:
            self._marks.append((sum(1 for _ in _entries(log)), value))

    def crash_states(self, rng: random.Random, count: int) -> Iterator[CrashState]:
        """So many of the states, in the order of time, evenly spread over what follows a mark."""
        with self._log.open("rb") as log, self._base.open("r+b") as durable:
            entries = list(_entries(log))
            pending: list[Entry] = []
            begin = self._marks[0][0]
            instants = sorted(rng.randrange(begin, len(entries)) for _ in range(count))
            done = 0
            for number, instant in enumerate(instants):
                for entry in entries[done:instant]:
                    if entry.flags & _FLUSH:
                        for earlier in pending:
                            _write(log, earlier, durable)
                        pending = []
                    if not entry.size or entry.flags & _DISCARD:
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
                mark = [value for place, value in self._marks if place <= instant][-1]
                yield CrashState(image, number, style, mark)
                image.unlink()

    def demand_whole(self, disk: Path) -> None:
        """A guard for the recording itself: replayed as a whole, the log gives the disk."""
        replayed = self._folder / "replayed.img"
        _run("cp", "--sparse=always", self._base, replayed)
        with self._log.open("rb") as log, replayed.open("r+b") as file:
            for entry in _entries(log):
                if not entry.flags & _DISCARD:
                    _write(log, entry, file)
        _run("cmp", replayed, disk)
        replayed.unlink()


class RecordedDisk:
    """A device that is mounted at `mount` while it is recorded."""

    def __init__(self, folder: Path, mount: Path, size: int) -> None:
        self._folder = folder
        self._mount = mount
        self._size = size
        folder.mkdir()
        mount.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def recording(self) -> Iterator[WriteLog]:
        """A new ext4 file system, and all that happens to it."""
        disk, export, base, log = (
            self._folder / f"{name}.img" for name in ("disk", "export", "base", "log")
        )
        with disk.open("wb") as file:
            file.truncate(self._size)
        options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        _run("mke2fs", "-q", "-t", "ext4", "-E", options, disk, f"{self._size >> 10}k")
        _run("cp", "--sparse=always", disk, base)
        with log.open("wb") as file:
            file.truncate(16 << 30)
        export.touch()
        with contextlib.ExitStack() as stack:
            daemon = subprocess.Popen(
                [
                    "qemu-storage-daemon",
                    *("--blockdev", f"driver=file,node-name=disk,filename={disk}"),
                    *("--blockdev", f"driver=file,node-name=log,filename={log}"),
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
            loop = _run("losetup", "--show", "--find", export).strip()
            stack.callback(_run, "losetup", "--detach", loop)
            _run("mount", "-t", "ext4", loop, self._mount)
            stack.callback(_run, "umount", self._mount)
            recorded = WriteLog(self._folder, log, base)
            yield recorded
        recorded.demand_whole(disk)


@contextlib.contextmanager
def mounted(what: Path, place: Path, *options: str) -> Iterator[None]:
    """Something mounted; of a file system its journal is replayed, as after every cut."""
    _run("mount", *options, what, place)
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
        _write(log, entry, disk, _torn(entry.size, rng) if torn else None)


def _torn(size: int, rng: random.Random) -> int:
    """How much of a write is there: whole blocks, as disks have them.

    ext4 does not outlive half a superblock, which has two of the sectors of old disks.
    """
    return rng.randrange(size) & ~(_BLOCK - 1)


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


def _run(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

"""Where a publication lives on disk: the folder of its index, and its chunk store.

::

    FOLDER/X.caidx  X.caidx.cks  X.caidx.mtree  X.caidx.release
    FOLDER/by-hash/SHA256/HEX
    FOLDER/.casync-updater/lock            held by the one publisher of this folder
    FOLDER/.casync-updater/staging/        what is being made; a dead publisher's is removed
    FOLDER/.casync-updater/releases.json   which releases there are, see `record`
    STORE/<4 digits>/<64 digits>.cacnk
    STORE/.casync-updater/lock             held by the one publisher into this store
    STORE/.casync-updater/publishing       there while chunks are written
    STORE/.casync-updater/indexes.json     which indexes use the store, see `record`

The folder's lock is taken first, then the store's. It is one for all indexes of a folder, since
they share ``by-hash``.
"""

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from casync_updater.clock import Clock
from casync_updater.errors import BusyError, LocalError
from casync_updater.files import sync_folder

OWN = ".casync-updater"
LOCK_PATIENCE = 3600.0
"""Seconds that a publisher waits for another one."""

_CASYNC_STRAY_AGE = 86400.0
_CHUNK = re.compile(r"[0-9a-f]{64}(\.cacnk)?")
_CHUNK_TEMPORARY = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{1,16}\.tmp")
_PREFIX = re.compile(r"[0-9a-f]{4}")


@contextlib.contextmanager
def locked(folder: Path, clock: Clock, say: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of a folder or store; a dead holder's is free at once.

    Raises:
        BusyError: another publisher kept it for too long.
    """
    make_folder(folder / OWN)
    descriptor = os.open(folder / OWN / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        own_like_folder(folder / OWN / "lock")
        begin = clock.monotonic()
        waiting = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if clock.monotonic() - begin > LOCK_PATIENCE:
                    raise BusyError(
                        f"another publisher has held {folder} for {LOCK_PATIENCE:.0f} seconds;"
                        " look whether it hangs, and try again"
                    ) from None
                if not waiting:
                    say(f"waiting for another publisher to finish with {folder}")
                    waiting = True
                clock.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, readable for a web server and owned like the one it stands in."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o755)
        path.chmod(0o755)
        own_like_folder(path)


def own_like_folder(path: Path) -> None:
    """Give a file to the owner of its folder, where this user may give files away."""
    folder = path.parent.stat()
    mine = path.lstat()
    if os.geteuid() == 0 and (mine.st_uid, mine.st_gid) != (folder.st_uid, folder.st_gid):
        os.chown(path, folder.st_uid, folder.st_gid, follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class Site:
    """The folder of an index, seen from that index."""

    index: Path

    @property
    def folder(self) -> Path:
        """Where the index and its companions are."""
        return self.index.parent

    @property
    def staging(self) -> Path:
        """Where files are made before they become visible, on the same file system."""
        return self.folder / OWN / "staging"

    def beside(self, suffix: str) -> Path:
        """The index (suffix ``""``) or one of its companions."""
        return self.index.with_name(self.index.name + suffix)

    def by_hash(self, sha256: str) -> Path:
        """The immutable copy of a file."""
        return self.folder / "by-hash" / "SHA256" / sha256

    @contextlib.contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty staging folder, gone afterwards; the folder's lock is held."""
        self._remove_strays()
        make_folder(self.staging)
        try:
            yield self.staging
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _remove_strays(self) -> None:
        """What dead publishers left: our own staging, and casync's of before this program.

        The old publisher takes no lock, so only its files of yesterday are surely dead.
        """
        shutil.rmtree(self.staging, ignore_errors=True)
        stray = re.compile(re.escape(f".#{self.index.name}") + r"[0-9a-f]{1,16}")
        for path in self.folder.iterdir():
            if stray.fullmatch(path.name) and path.lstat().st_mtime < time.time() - (
                _CASYNC_STRAY_AGE
            ):
                path.unlink()

    def install(self, staged: Path, target: Path) -> None:
        """Let a staged file take its place, whole and durable, also across a power cut."""
        descriptor = os.open(staged, os.O_RDONLY)
        try:
            os.fchmod(descriptor, 0o644)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        folder = target.parent.stat()
        if os.geteuid() == 0:
            os.chown(staged, folder.st_uid, folder.st_gid)
        staged.replace(target)
        sync_folder(target.parent)

    def write(self, data: bytes, target: Path) -> None:
        """Put bytes into place like `install`."""
        staged = self.staging / "data"
        staged.write_bytes(data)
        self.install(staged, target)


@dataclass(frozen=True, slots=True)
class Usage:
    """How many chunks an archive has, how many came with this publication; bytes compressed."""

    chunks_new: int
    chunks_total: int
    bytes_new: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class Store:
    """A chunk store; its lock is held."""

    path: Path

    def chunk(self, hex_id: str) -> Path:
        """Where casync keeps a chunk."""
        return self.path / hex_id[:4] / f"{hex_id}.cacnk"

    def begin(self) -> tuple[int, bool]:
        """Mark that chunks are being written.

        Returns:
            The store's own time (ns) before the first one, and whether a dead publisher had
            begun before, so that its chunks are unsynced, and perhaps nobody's.
        """
        marker = self.path / OWN / "publishing"
        try:
            marker.touch(mode=0o644, exist_ok=False)
            interrupted = False
        except FileExistsError:
            interrupted = True
        sync_folder(marker.parent)
        return marker.stat().st_ctime_ns, interrupted

    def end(self) -> None:
        """The chunks are durable, and an index vouches for them."""
        (self.path / OWN / "publishing").unlink(missing_ok=True)

    def usage(self, hex_ids: Iterable[str], since: int) -> Usage:
        """Measure an archive's chunks; the new ones get the store's owner.

        Args:
            hex_ids: the ids, each once.
            since: the store's time (ns) before the first new one.

        Raises:
            LocalError: a chunk is not there.
        """
        chunks_new = chunks_total = bytes_new = bytes_total = 0
        for hex_id in hex_ids:
            path = self.chunk(hex_id)
            try:
                status = path.stat()
            except FileNotFoundError:
                raise LocalError(
                    f"the store lost {path} right after it was written; does another program"
                    " remove files there?"
                ) from None
            chunks_total += 1
            bytes_total += status.st_size
            if status.st_ctime_ns >= since:
                chunks_new += 1
                bytes_new += status.st_size
                own_like_folder(path.parent)
                own_like_folder(path)
        return Usage(chunks_new, chunks_total, bytes_new, bytes_total)

    def chunks(self) -> Iterator[tuple[str, Path]]:
        """Every chunk of the store: its id and file."""
        for path in self._files():
            if _CHUNK.fullmatch(path.name):
                yield path.name.removesuffix(".cacnk"), path

    def remove_temporaries(self) -> None:
        """Remove what a killed casync was writing."""
        for path in self._files():
            if _CHUNK_TEMPORARY.fullmatch(path.name):
                path.unlink()

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove chunks, and their folders where they are empty then."""
        for path in paths:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    def _files(self) -> Iterator[Path]:
        with os.scandir(self.path) as prefixes:
            folders = sorted(item.name for item in prefixes if _PREFIX.fullmatch(item.name))
        for name in folders:
            with os.scandir(self.path / name) as files:
                yield from [Path(item.path) for item in files]

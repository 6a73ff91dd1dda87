"""The last room: the backup drive gets what the device has, byte for byte the publisher's.

Chunks first, then index, ``.cks`` and ``.mtree``, the release last: whoever pulls the drive out
finds the old or the new complete version on it. Chunks are made from the installed tree where
its bytes are those of the index, and fetched else.

While the drive is written to, a mark lies on it. Chunks are not synced one by one, so after a
cut one may be there by name only: where the mark is found, every chunk is read and checked.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zstandard

from casync_updater import syscalls, trust
from casync_updater.cycle.tree import cut
from casync_updater.cycle.values import Chunks
from casync_updater.errors import (
    ContentError,
    LocalError,
    RemoteError,
    SpaceError,
    TrustError,
)
from casync_updater.files import write_atomic
from casync_updater.formats import index as index_format
from casync_updater.formats.store import LocalStore, content, file_limit
from casync_updater.model import (
    ChunkRef,
    Entry,
    FileRef,
    Installed,
    Location,
    Monitor,
    Progress,
    Release,
)
from casync_updater.release import parse_release
from casync_updater.state import StateFolder

_CLUSTER = 32 << 10
"""What a file takes at least on a drive with FAT."""


@dataclass(frozen=True, slots=True)
class Mirrored:
    """What the backup needed: how many chunks were written to it, in bytes."""

    chunks: int
    size: int


def present(location: Location) -> bool:
    """Whether the backup's folders are there; a drive that is not plugged in has none."""
    return Path(location.index).parent.is_dir() and Path(location.store).parent.is_dir()


class Mirror:
    """One entry's backup."""

    def __init__(self, entry: Entry, location: Location, folder: StateFolder) -> None:
        """Nothing is read yet.

        Args:
            entry: whose backup it is.
            location: the backup, as paths.
            folder: has the index, release and manifest of the installed version.
        """
        self._entry = entry
        self._index = Path(location.index)
        self._store = LocalStore(Path(location.store))
        self._folder = folder

    def needs(self, installed: Installed) -> bool:
        """Whether the backup lacks the installed version. Reads the release only.

        Raises:
            TrustError: it is another project's; it is not written to.
            LocalError: it cannot be read.
        """
        kept = self._folder.release(installed)
        try:
            if not kept.exists():
                cks = self._beside(".cks").read_bytes() if self._beside(".cks").exists() else b""
                return cks != installed.digest.encode()
            if not self._beside(".release").exists():
                return True
            there = self._beside(".release").read_bytes()
        except OSError as error:
            raise LocalError(f"{error.filename}: {error.strerror}") from error
        return there != kept.read_bytes() and self._is_older(there, installed)

    def _is_older(self, there: bytes, installed: Installed) -> bool:
        where = str(self._beside(".release"))
        try:
            release = parse_release(trust.unwrap(there), where)
        except ContentError:
            # Half written, or damaged: a drive that is mended.
            return True
        if release.project != self._entry.project:
            raise TrustError(
                "project", expected=self._entry.project, found=release.project, where=where
            )
        return (release.serial, release.date) <= (installed.serial or 0, installed.date or 0.0)

    def refresh(
        self,
        installed: Installed,
        tree: Path,
        *,
        chunks: Chunks,
        published: Callable[[FileRef], bytes],
        monitor: Monitor,
    ) -> Mirrored:
        """Bring the backup up to date.

        Args:
            installed: the version that is mirrored.
            tree: the destination.
            chunks: gives what the destination's bytes cannot make.
            published: fetches the release's manifest where the kept one is not it.
            monitor: told how many bytes of chunks are there.

        Raises:
            SpaceError: the drive is too small; nothing was written.
            LocalError: it cannot be written.
            RemoteError: a chunk that the tree does not hold cannot be had.
        """
        file = self._folder.index(installed)
        data = file.read_bytes()
        index = index_format.parse(data, str(file))
        mark = self._beside(".unfinished")
        cut_off = mark.exists()
        has = self._has_whole if cut_off else self._has
        lacking = {ref.id: ref for ref in index if not has(ref, index)}
        total = sum(ref.size for ref in lacking.values())
        try:
            if cut_off:
                for left in self._store.path.glob("*/.#*"):
                    left.unlink()
            self._demand_space(total, len(lacking))
            self._store.path.mkdir(exist_ok=True)
            write_atomic(mark, b"")
            result = Mirrored(len(lacking), total)
            done = 0
            if lacking:
                for ref, piece in cut(tree, index):
                    if ref.id in lacking and index.chunk_id(piece) == ref.id:
                        self._put(lacking.pop(ref.id).hex, piece)
                        done += ref.size
                        monitor.progress(Progress(done, total))
                for ref, piece in chunks.stream(tuple(lacking.values())):
                    self._put(ref.hex, piece)
                    done += ref.size
                    monitor.progress(Progress(done, total))
                syscalls.sync_file_system(self._store.path)
            self._write_documents(installed, data, published)
            mark.unlink()
        except OSError as error:
            raise LocalError(
                f"the backup {error.filename or self._index} cannot be written: {error.strerror}"
            ) from error
        return result

    def _has(self, ref: ChunkRef, _index: index_format.Index) -> bool:
        return self._store.has(ref.hex)

    def _has_whole(self, ref: ChunkRef, index: index_format.Index) -> bool:
        try:
            raw = self._store.read(ref.hex, file_limit(ref.size))
            content(raw, ref, index, str(self._store.path))
        except (ContentError, RemoteError):
            return False
        return True

    def _put(self, name: str, data: bytes) -> None:
        self._store.put(name, zstandard.compress(data), compressed=True)

    def _demand_space(self, size: int, count: int) -> None:
        free = syscalls.free_space(self._index.parent)
        need = size + count * _CLUSTER
        if need > free:
            raise SpaceError(
                f"{self._index.parent}: the backup needs up to {need / 1e6:.1f} MB, and"
                f" {free / 1e6:.1f} MB are free: make room on the drive"
            )

    def _write_documents(
        self, installed: Installed, index: bytes, published: Callable[[FileRef], bytes]
    ) -> None:
        kept = self._folder.release(installed)
        text = kept.read_bytes() if kept.exists() else None
        release = parse_release(trust.unwrap(text), str(kept)) if text else None
        manifest = self._manifest(installed, release, published)
        write_atomic(self._index, index)
        write_atomic(self._beside(".cks"), installed.digest.encode())
        if manifest is not None:
            write_atomic(self._beside(".mtree"), manifest)
        if text is not None:
            write_atomic(self._beside(".release"), text)

    def _manifest(
        self,
        installed: Installed,
        release: Release | None,
        published: Callable[[FileRef], bytes],
    ) -> bytes | None:
        """The publisher's own bytes; casync makes the same ones of the same tree, usually."""
        file = self._folder.manifest(installed)
        kept = zstandard.decompress(file.read_bytes()) if file.exists() else None
        if release is None:
            return kept
        if release.mtree is None:
            return None
        if kept is not None and hashlib.sha256(kept).hexdigest() == release.mtree.sha256:
            return kept
        return published(release.mtree)

    def _beside(self, suffix: str) -> Path:
        return self._index.with_name(self._index.name + suffix)

"""From a source to a staged index, with every chunk of it in the store and read back."""

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Protocol

from casync_updater.errors import LocalError
from casync_updater.formats import index as index_format
from casync_updater.formats.index import Index
from casync_updater.model import FileRef, Publication
from casync_updater.server.places import OWN, Store, make_folder
from casync_updater.server.times import SourceChangedError, retimed, stable_times
from casync_updater.tools import casync
from casync_updater.tools.process import ProgramError

DEFAULT_FEATURES = ("permissions", "symlinks", "sec-time")
DEFAULT_CHUNK_SIZE = "8192:32768:131072"
"""For trees. An update of small files fetches 40 % less than with casync's own 64 KiB, a first
install 3 % more; `tests/bench/README.md` has the table."""

_FIRST_OFFSET = 64
_ITEM_SIZE = 40


class Reporter(Protocol):
    """Who is told what the publisher does."""

    def say(self, text: str) -> None:
        """One line about what happens, or what somebody should look at."""

    def progress(self, done: int, total: int) -> None:
        """So many of about so many bytes of the source have been read."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an index is made: the flags of its header, its chunk bounds; what is odd about that."""

    flags: int
    chunk_size: str | None
    warnings: tuple[str, ...] = ()


def recipe(publication: Publication, existing: Index | None) -> Recipe:
    """Choose features and chunk bounds.

    An index that exists keeps both: old clients compare digests made with its features, and
    other chunk bounds would make every device load everything anew.
    """
    if existing is None:
        features = publication.features
        if features is None:
            features = DEFAULT_FEATURES if publication.is_archive else ()
        chunk_size = publication.chunk_size
        if chunk_size is None and publication.is_archive:
            chunk_size = DEFAULT_CHUNK_SIZE
        return Recipe(casync.normalised(features), chunk_size)
    warnings = []
    advice = "; to change that, publish a second index beside it, and let clients move to it"
    if publication.features is not None and casync.normalised(publication.features) != (
        existing.flags
    ):
        has = " ".join(existing.features) or "no metadata"
        warnings.append(f"with is not followed: the existing index has {has} and keeps it{advice}")
    elif publication.is_archive and not {"permissions", "symlinks"} <= {*existing.features}:
        warnings.append(
            "the existing index is made without permissions or symlinks, as the old publisher"
            f" did: executable bits or symbolic links are lost on the way{advice}"
        )
    chunk_size = existing.chunk_size_option
    if publication.chunk_size not in (None, chunk_size):
        warnings.append(
            f"chunkSize is not followed: the existing index has {chunk_size} and keeps it{advice}"
        )
    return Recipe(existing.flags, chunk_size, tuple(warnings))


@dataclass(frozen=True, slots=True)
class Survey:
    """What a source looks like from outside; equal before and after means it stood still."""

    size: int
    """Bytes of content, about as many as the archive has."""
    fingerprint: str
    unreadable: Path | None = None


def survey(source: Path) -> Survey:
    """Look at the size, inode and times of everything in a source, and at no content.

    A block device has no times that would tell of writes: nobody may write to one that is read.
    """
    digest = hashlib.sha256()
    size = 0
    unreadable: Path | None = None
    for path, status in _walk(source):
        kind = stat.S_IFMT(status.st_mode)
        times = (status.st_mtime_ns, status.st_ctime_ns)
        digest.update(
            repr((os.fsencode(path), kind, status.st_ino, status.st_size, times)).encode()
        )
        if kind == stat.S_IFREG:
            size += status.st_size
        if unreadable is None and kind in (stat.S_IFREG, stat.S_IFDIR):
            unreadable = None if os.access(path, os.R_OK) else path
    if source.is_block_device():
        size = _device_size(source)
    return Survey(size, digest.hexdigest(), unreadable)


def _walk(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    yield path, path.stat()
    pending = [path] if path.is_dir() else []
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as items:
                found = sorted(items, key=lambda item: item.name)
        except PermissionError:
            continue
        for item in found:
            try:
                yield Path(item.path), item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if item.is_dir(follow_symlinks=False):
                pending.append(Path(item.path))


def _device_size(path: Path) -> int:
    with path.open("rb", buffering=0) as device:
        return device.seek(0, os.SEEK_END)


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the index of one source, as often as it is asked to.

    Attributes:
        source: the directory, file or block device.
        how: the index's features and chunk bounds.
        compression: how chunks are compressed.
        previous: the mtree whose times stay where nothing else changed, None to keep the
            source's own times.
    """

    source: Path
    how: Recipe
    compression: str
    previous: Path | None

    def make(self, staged: Path, store: Path, activity: Callable[[], object] | None = None) -> str:
        """Write the index and the chunks that the store lacks; see `casync.make`."""
        times = {}
        if self.previous is not None:
            times = stable_times(self.previous, self.source, self.how.flags)
        if not times:
            return self._casync(staged, self.source, store, activity)
        # casync makes the same index of an archive's stream in a file as of the tree itself.
        archive = staged.with_name("archive")
        blob = staged.with_name("archive.caibx")
        try:
            with (
                casync.stream_archive(self.source, flags=self.how.flags) as pieces,
                archive.open("wb") as file,
            ):
                file.writelines(retimed(pieces, times, self.how.flags))
            digest = self._casync(blob, archive, store, activity)
        except SourceChangedError:
            return self._casync(staged, self.source, store, activity)
        finally:
            archive.unlink(missing_ok=True)
        blob.replace(staged)
        return digest

    def _casync(
        self, index: Path, content: Path, store: Path, activity: Callable[[], object] | None
    ) -> str:
        return casync.make(
            index,
            content,
            store=store,
            flags=self.how.flags,
            chunk_size=self.how.chunk_size,
            compression=self.compression,
            activity=activity,
        )


@dataclass(frozen=True, slots=True)
class Built:
    """A staged index whose chunks are in the store."""

    path: Path
    index: Index
    ref: FileRef
    digest: str
    maker: Maker

    def chunk_ids(self) -> set[str]:
        """The chunks of the archive, each once."""
        return {chunk.hex for chunk in self.index}


def build(maker: Maker, staged: Path, store: Store, reporter: Reporter) -> Built:
    """Read the source into the store.

    A source that changes meanwhile is read a second time, and then taken as it was read.

    Args:
        maker: what is read, and how.
        staged: the index to write, in a folder of its own.
        store: where the chunks go.
        reporter: who is told.

    Raises:
        LocalError: casync cannot read the source or write to the store.
    """
    source = maker.source
    seen = survey(source)
    for attempt in (1, 2):
        before = seen

        def activity(total: int = before.size) -> int | None:
            done = _indexed(staged)
            if done is not None:
                reporter.progress(min(done, total), total)
            return done

        try:
            digest = maker.make(staged, store.path, activity)
        except ProgramError as error:
            if before.unreadable is not None and "Permission denied" in error.stderr:
                raise LocalError(f"{before.unreadable} cannot be read: no permission") from error
            raise
        seen = survey(source)
        if seen.fingerprint == before.fingerprint:
            break
        reporter.say(
            f"{source} changed while it was read, reading it again"
            if attempt == 1
            else f"{source} changed again while it was read: the published version may mix old and"
            " new files; publish from a place where nobody writes, or from a snapshot"
        )
    data = staged.read_bytes()
    parsed = index_format.parse(data, str(staged))
    if parsed.flags != maker.how.flags:
        raise LocalError(
            f"casync made an index with the features {' '.join(parsed.features)}, which are not"
            " those that it was told"
        )
    ref = FileRef(staged.name, len(data), hashlib.sha256(data).hexdigest())
    return Built(staged, parsed, ref, digest, maker)


def _indexed(staged: Path) -> int | None:
    """How far casync is in its stream: the last end offset in the index that it is writing."""
    try:
        (writing,) = staged.parent.glob(".#*")
        with writing.open("rb") as file:
            items = (file.seek(0, os.SEEK_END) - _FIRST_OFFSET) // _ITEM_SIZE
            if items < 1:
                return 0
            file.seek(_FIRST_OFFSET + (items - 1) * _ITEM_SIZE)
            return int.from_bytes(file.read(8), "little")
    except (OSError, ValueError):
        return None


def read_back(built: Built, store: Store, reporter: Reporter) -> FileRef | None:
    """Read every chunk from the store again; a damaged one is replaced from the source.

    A power cut in the middle of an earlier publication leaves chunks that are empty or torn,
    and casync takes any file with the right name for the chunk.

    Returns:
        The staged mtree, None where the index is of a file or device.
    """
    reading = _mtree if built.path.suffix == ".caidx" else _check
    try:
        return reading(built, store.path)
    except ProgramError as error:
        reporter.say(f"{store.path} has damaged chunks, replacing them ({error})")
        _replace_chunks(built, store)
        return reading(built, store.path)


def _mtree(built: Built, store: Path) -> FileRef | None:
    path = built.path.with_name(f"{built.path.name}.mtree")
    sha256 = hashlib.sha256()
    with (
        casync.mtree(built.path, flags=built.index.flags, store=store) as pieces,
        path.open("wb") as file,
    ):
        for piece in pieces:
            sha256.update(piece)
            file.write(piece)
        size = file.tell()
    return FileRef(path.name, size, sha256.hexdigest())


def _check(built: Built, store: Path) -> FileRef | None:
    found = casync.digest(built.path, flags=built.index.flags, store=store)
    if found != built.digest:
        raise LocalError(f"{store} does not hold what was just written into it")
    return None


def _replace_chunks(built: Built, store: Store) -> None:
    """Make all chunks again elsewhere; those that differ take the places of the damaged ones.

    Chunks of one id have one content, so replacing one is always right.
    """
    fresh = Store(store.path / OWN / "fresh")
    shutil.rmtree(fresh.path, ignore_errors=True)
    try:
        make_folder(fresh.path)
        built.maker.make(built.path.with_name(f"again{built.path.suffix}"), fresh.path)
        for hex_id, path in fresh.chunks():
            target = store.chunk(hex_id)
            if not target.exists() or not cmp(path, target, shallow=False):
                make_folder(target.parent)
                path.replace(target)
    finally:
        shutil.rmtree(fresh.path, ignore_errors=True)

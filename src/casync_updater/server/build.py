"""From a source to a staged index, with every chunk of it in the store and read back."""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Protocol

from casync_updater.errors import LocalError
from casync_updater.formats import index as index_format
from casync_updater.formats.index import Index
from casync_updater.model import FileRef, Publication
from casync_updater.server.places import OWN, Store, make_folder
from casync_updater.tools import casync
from casync_updater.tools.process import ProgramError

DEFAULT_FEATURES = ("permissions", "symlinks", "sec-time")

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
        return Recipe(casync.normalised(features), publication.chunk_size)
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
class Built:
    """A staged index whose chunks are in the store."""

    path: Path
    index: Index
    ref: FileRef
    digest: str

    def chunk_ids(self) -> set[str]:
        """The chunks of the archive, each once."""
        return {chunk.hex for chunk in self.index}


def build(
    publication: Publication, how: Recipe, staging: Path, store: Store, reporter: Reporter
) -> Built:
    """Read the source into the store.

    A source that changes meanwhile is read a second time, and then taken as it was read.

    Raises:
        LocalError: casync cannot read the source or write to the store.
    """
    staged = staging / publication.index.name
    source = publication.source.resolve()
    seen = survey(source)
    for attempt in (1, 2):
        before = seen

        def activity(total: int = before.size) -> int | None:
            done = _indexed(staged)
            if done is not None:
                reporter.progress(min(done, total), total)
            return done

        try:
            digest = casync.make(
                staged,
                source,
                store=store.path,
                flags=how.flags,
                chunk_size=how.chunk_size,
                compression=publication.compression,
                activity=activity,
            )
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
    ref = FileRef(staged.name, len(data), hashlib.sha256(data).hexdigest())
    return Built(staged, parsed, ref, digest)


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


def read_back(
    publication: Publication, how: Recipe, built: Built, store: Store, reporter: Reporter
) -> FileRef | None:
    """Read every chunk from the store again; a damaged one is replaced from the source.

    A power cut in the middle of an earlier publication leaves chunks that are empty or torn,
    and casync takes any file with the right name for the chunk.

    Returns:
        The staged mtree, None where the index is of a file or device.
    """
    reading = _mtree if publication.is_archive else _check
    try:
        return reading(built, store.path)
    except ProgramError as error:
        reporter.say(f"{store.path} has damaged chunks, replacing them ({error})")
        _replace_chunks(publication, how, built, store)
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


def _replace_chunks(publication: Publication, how: Recipe, built: Built, store: Store) -> None:
    """Make all chunks again elsewhere; those that differ take the places of the damaged ones.

    Chunks of one id have one content, so replacing one is always right.
    """
    fresh = Store(store.path / OWN / "fresh")
    shutil.rmtree(fresh.path, ignore_errors=True)
    try:
        make_folder(fresh.path)
        casync.make(
            built.path.with_name(f"again{built.path.suffix}"),
            publication.source.resolve(),
            store=fresh.path,
            flags=how.flags,
            chunk_size=built.index.chunk_size_option,
            compression=publication.compression,
        )
        for hex_id, path in fresh.chunks():
            target = store.chunk(hex_id)
            if not target.exists() or not cmp(path, target, shallow=False):
                make_folder(target.parent)
                path.replace(target)
    finally:
        shutil.rmtree(fresh.path, ignore_errors=True)

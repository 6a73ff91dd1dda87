"""The last room: the backup drive gets what the device has, byte for byte the publisher's.

The new index goes to ``by-hash`` first, so that the chunks that follow belong to an index on the
drive whatever happens; then chunks, a slot of the release, the files beside the index for old
clients, and the other slot. Whoever pulls the drive out finds the old or the new complete version
on it. Chunks are made from the installed tree where its bytes are those of the index, and fetched
else; what no index on the drive needs any more is removed at the very end.
"""

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import zstandard

from casync_updater import syscalls, trust
from casync_updater.cycle.demands import SLOTS, Demands, Slots, Vouched, read_slots
from casync_updater.cycle.record import kept_manifest, kept_pieces
from casync_updater.errors import ContentError, LocalError, RemoteError, SpaceError
from casync_updater.files import write_atomic
from casync_updater.formats import index as index_format
from casync_updater.formats.index import Index
from casync_updater.formats.store import LocalStore, content, file_limit, path_of, read_regular
from casync_updater.model import (
    ChunkRef,
    FileRef,
    Installed,
    Location,
    Monitor,
    Progress,
    Release,
)
from casync_updater.release import parse_release
from casync_updater.sources.base import Chunks, Source
from casync_updater.state import StateFolder

_HEX = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{4}")
_INDEXES = (".caidx", ".caibx")
_WALK_LIMIT = 200_000
"""Names on a drive after which nothing is pruned: somebody keeps a photo collection there."""

_COMPRESSION_SLACK = 1.1
"""How much larger our chunks may be than the publisher's: compressors differ."""


class Condition(StrEnum):
    """What a drive holds, compared with what is installed. A foreign drive is a `TrustError`."""

    CURRENT = "current"
    NEWER = "newer"
    """Something that the device does not have; it is left as it is."""
    INCOMPLETE = "incomplete"
    """Empty, or something is missing."""
    STALE = "stale"
    DAMAGED = "damaged"
    """There are wrong bytes on it."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found on a drive.

    Attributes:
        condition: see there.
        seen: tells this content apart from any other, without reading it; what was read once
            and has the same one is not read again.
        what: what is wrong, in words.
        usable: it has a whole release of the publisher's, whatever else is missing.
    """

    condition: Condition
    seen: str = ""
    what: str = ""
    usable: bool = False


@dataclass(frozen=True, slots=True)
class Mirrored:
    """What the backup needed: how many chunks were written to it, in bytes, and how it is now."""

    chunks: int
    size: int
    seen: str


@dataclass(frozen=True, slots=True)
class _Version:
    """What a complete drive holds: the parts of the installed version."""

    installed: Installed
    index: Index
    index_bytes: bytes
    digest: str
    text: bytes | None
    release: Release | None

    @property
    def refs(self) -> dict[bytes, ChunkRef]:
        """Its chunks, each once."""
        return {ref.id: ref for ref in self.index}


def present(location: Location) -> bool:
    """Whether the backup's folders are there; a drive that is not plugged in has none.

    One that was pulled out, and that nobody unmounted, has nothing but errors.
    """
    try:
        return Path(location.index).parent.is_dir() and Path(location.store).parent.is_dir()
    except OSError:
        return False


def is_read_only(location: Location) -> bool:
    """Whether the backup is mounted so that nobody can write to it."""
    try:
        return bool(os.statvfs(Path(location.index).parent).f_flag & os.ST_RDONLY)
    except OSError:
        return False


class Mirror:
    """One entry's backup."""

    def __init__(self, location: Location, folder: StateFolder) -> None:
        """Nothing is read yet.

        Args:
            location: the backup, as paths.
            folder: has the index, release and manifest of the installed version.
        """
        self._index = Path(location.index)
        self._store = LocalStore(Path(location.store))
        self._folder = folder

    def survey(
        self,
        installed: Installed,
        source: Source,
        demands: Demands,
        *,
        seen: str | None,
        monitor: Monitor,
    ) -> Survey:
        """Find out what is on the drive. Reads all of it, unless it is as it was seen before.

        Args:
            installed: the version that it should have.
            source: the drive, to read from.
            demands: what makes a release the publisher's.
            seen: the `Survey.seen` of a drive that was found current.
            monitor: told how many bytes were read.

        Raises:
            TrustError: the drive is foreign.
            LocalError: it cannot be read.
        """
        version = self._version(installed)
        known = {}
        if version.release is not None and version.text is not None:
            own = Vouched(version.release, version.text, True, "", str(self._index))
            known[version.text] = own
        try:
            slots = read_slots(source, demands, known)
            found = self._compare(version, slots)
            usable = slots.newest is not None
            if found is not None:
                return replace(found, usable=usable)
            now = self._seen(version)
            if now == seen:
                return Survey(Condition.CURRENT, now)
            unfinished = any(body != version.text for body in slots.bodies)
            missing: list[str] = []
            wrong = [] if slots.torn is None else [str(slots.torn)]
            for problem in self._problems(version, monitor):
                # What old clients read is replaced between the two slots.
                damaged = problem.damaged and not (unfinished and problem.beside)
                (wrong if damaged else missing).append(problem.what)
        except OSError as error:
            raise LocalError(f"{error.filename or self._index}: {error.strerror}") from error
        except RemoteError as error:
            raise LocalError(str(error)) from error
        if wrong:
            return Survey(Condition.DAMAGED, what=_listing(wrong))
        if missing or unfinished:
            return Survey(Condition.INCOMPLETE, what=_listing(missing), usable=usable)
        return Survey(Condition.CURRENT, now)

    def _compare(self, version: _Version, slots: Slots) -> Survey | None:
        """Judge by the releases alone; None where the drive should be complete."""
        newest = slots.newest
        if newest is None:
            if slots.torn is not None:
                return Survey(Condition.DAMAGED, what=str(slots.torn))
            if version.text is not None:
                return Survey(Condition.INCOMPLETE, what="it has no release")
            return None
        if version.release is None or newest.release.mark > version.release.mark:
            return Survey(Condition.NEWER, what=f"it has {newest.release.version}")
        if newest.release.mark < version.release.mark or newest.body != version.text:
            return Survey(Condition.STALE, what=f"it has {newest.release.version}")
        return None

    def _version(self, installed: Installed) -> _Version:
        file, kept = self._folder.index(installed), self._folder.release(installed)
        data = file.read_bytes()
        text = kept.read_bytes() if kept.exists() else None
        return _Version(
            installed,
            index_format.parse(data, str(file)),
            data,
            installed.digest,
            text,
            None if text is None else parse_release(trust.unwrap(text), str(kept)),
        )

    def _documents(self, version: _Version) -> Iterator[tuple[Path, FileRef]]:
        """Where a complete drive has which file; the manifest only where a release lists it."""
        index = _ref(self._index.name, version.index_bytes)
        yield self._index, index
        yield self._beside(".cks"), _ref(".cks", version.digest.encode())
        if version.release is not None:
            yield self._by_hash(index.sha256), index
            mtree = version.release.mtree
            if mtree is not None:
                yield self._beside(".mtree"), mtree
                yield self._by_hash(mtree.sha256), mtree

    def _problems(self, version: _Version, monitor: Monitor) -> Iterator["_Problem"]:
        """What is not right on a drive that should be complete."""
        for path, ref in self._documents(version):
            beside = path.parent == self._index.parent
            try:
                data, _ = read_regular(path, ref.size)
            except FileNotFoundError:
                yield _Problem(f"{path} is missing", damaged=False)
                continue
            except (ContentError, NotADirectoryError) as error:
                yield _Problem(str(error), damaged=True, beside=beside)
                continue
            if _ref("", data).sha256 != ref.sha256:
                yield _Problem(f"{path} is damaged", damaged=True, beside=beside)
        for unsound in self._unsound(version, monitor).values():
            yield _Problem(str(unsound), damaged=isinstance(unsound, ContentError))

    def _unsound(
        self, version: _Version, monitor: Monitor
    ) -> dict[bytes, ContentError | RemoteError]:
        """The chunks of a version that the drive does not have, by id. Reads all that it has."""
        problems: dict[bytes, ContentError | RemoteError] = {}
        done, total = 0, sum(ref.size for ref in version.refs.values())
        for ref in version.refs.values():
            try:
                raw = self._store.read(ref.hex, file_limit(ref.size))
                content(raw, ref, version.index, str(self._store.path / path_of(ref.hex)))
            except (ContentError, RemoteError) as error:
                problems[ref.id] = error
            done += ref.size
            monitor.progress(Progress(done, total))
        return problems

    def _seen(self, version: _Version) -> str:
        """Name, size and time of every file that a complete drive has; nothing is read."""
        whole = hashlib.sha256(version.text or b"")
        files = [path for path, _ in self._documents(version)]
        files += [self._beside(suffix) for suffix in SLOTS]
        files += [
            self._store.path / path_of(ref.hex, suffix)
            for ref in version.refs.values()
            for suffix in (".cacnk", "")
        ]
        for path in files:
            with contextlib.suppress(OSError):
                status = path.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    line = f"{path} {status.st_mode} {status.st_size} {status.st_mtime_ns}\n"
                    whole.update(os.fsencode(line))
        return whole.hexdigest()

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
            SpaceError: the drive is too small; it holds what it held.
            LocalError: it cannot be written.
            ContentError: a chunk that the tree does not hold is damaged everywhere.
            RemoteError: such a chunk, or the manifest, cannot be had.
        """
        version = self._version(installed)
        manifest = self._manifest(installed, version.release, published)
        try:
            self._make_folders(version)
            # First: whoever is killed when all is written would find the drive complete, and
            # nothing to do, the next time.
            _remove_temporaries(self._index, self._store.path)
            retired = self._index_at(self._index)
            unsound = self._unsound(version, monitor)
            lacking = {key: ref for key, ref in version.refs.items() if key in unsound}
            result = (len(lacking), sum(ref.size for ref in lacking.values()))
            self._demand_space(version, lacking.values())
            self._write_immutable(version, manifest)
            self._write_chunks(version, lacking, tree, chunks, monitor)
            syscalls.sync_file_system(self._store.path)
            self._write_documents(version, manifest)
            syscalls.sync_file_system(self._index.parent)
            seen = self._seen(version)
            self._prune(retired)
        except OSError as error:
            raise LocalError(
                f"the backup {error.filename or self._index} cannot be written: {error.strerror}"
            ) from error
        return Mirrored(*result, seen)

    def _make_folders(self, version: _Version) -> None:
        self._store.path.mkdir(exist_ok=True)
        if self._store.path.stat().st_dev != self._store.path.parent.stat().st_dev:
            raise LocalError(f"{self._store.path} leads away from the drive: it is not written to")
        if version.release is None:
            return
        for folder in (self._by_hash("").parent, self._by_hash("")):
            _make_real_folder(folder)

    def _demand_space(self, version: _Version, lacking: Iterable[ChunkRef]) -> None:
        """Count in clusters: each file takes whole ones, and so does each folder of a prefix."""
        status = os.statvfs(self._index.parent)
        cluster = max(status.f_bsize, status.f_frsize)
        share = 1.0
        if version.release is not None and version.release.archive_size:
            share = version.release.store_size / version.release.archive_size * _COMPRESSION_SLACK
        need = 3 * len(version.index_bytes)
        folders = set()
        for ref in lacking:
            size = min(ref.size, int(ref.size * share))
            need += (size // cluster + 1) * cluster
            folders.add(ref.hex[:4])
        need += len(folders) * cluster
        free = status.f_bavail * status.f_frsize
        if need > free:
            raise SpaceError(
                f"{self._index.parent}: the backup needs up to {need / 1e6:.1f} MB, and"
                f" {free / 1e6:.1f} MB are free: make room on the drive"
            )

    def _write_immutable(self, version: _Version, manifest: bytes | None) -> None:
        if version.release is not None:
            index = self._by_hash(version.release.index.sha256)
            _write(index, version.index_bytes)
            if version.release.mtree is not None and manifest is not None:
                _write(self._by_hash(version.release.mtree.sha256), manifest)

    def _write_chunks(
        self,
        version: _Version,
        lacking: dict[bytes, ChunkRef],
        tree: Path,
        chunks: Chunks,
        monitor: Monitor,
    ) -> None:
        """Add chunks; where there turns out to be no room, those added are taken away again."""
        done, total = 0, sum(ref.size for ref in lacking.values())
        written: list[ChunkRef] = []
        try:
            for ref, piece in self._pieces(version, lacking, tree, chunks):
                written.append(ref)
                self._put(ref.hex, piece)
                done += ref.size
                monitor.progress(Progress(done, total))
        except LocalError as error:
            if getattr(error.__cause__, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
                raise
            for ref in written:
                self._remove(ref.hex)
            raise SpaceError(f"the backup does not fit: {error}") from error

    def _pieces(
        self,
        version: _Version,
        lacking: dict[bytes, ChunkRef],
        tree: Path,
        chunks: Chunks,
    ) -> Iterator[tuple[ChunkRef, bytes]]:
        """The chunks that are lacking: from the tree first, the rest from the sources."""
        wanted = dict(lacking)
        if wanted:
            for ref, piece in kept_pieces(self._folder, version.installed, tree, lacking):
                yield wanted.pop(ref.id), piece
        if wanted:
            yield from chunks.stream(tuple(wanted.values()))

    def _put(self, name: str, data: bytes) -> None:
        _make_real_folder(self._store.path / name[:4])
        _clear_folder(self._store.path / path_of(name))
        self._store.put(name, zstandard.compress(data), compressed=True)
        # A file without the suffix is only read where there is none with it.
        with contextlib.suppress(OSError):
            (self._store.path / path_of(name, "")).unlink()

    def _remove(self, name: str) -> None:
        for suffix in (".cacnk", ""):
            path = self._store.path / path_of(name, suffix)
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):
            (self._store.path / name[:4]).rmdir()

    def _write_documents(self, version: _Version, manifest: bytes | None) -> None:
        """The files beside the index between the two slots.

        The slot that has the release before is written last, so that one is whole at any time.
        """
        slots: list[str] = []
        if version.text is not None:
            bodies = {suffix: self._body(suffix) for suffix in SLOTS}
            slots = sorted(SLOTS, key=lambda suffix: _is_whole(bodies[suffix]))
            _write(self._beside(slots[0]), version.text)
        _write(self._index, version.index_bytes)
        _write(self._beside(".cks"), version.digest.encode())
        if manifest is not None:
            _write(self._beside(".mtree"), manifest)
        if version.text is not None:
            syscalls.sync_file_system(self._index.parent)
            _write(self._beside(slots[1]), version.text)

    def _body(self, suffix: str) -> bytes:
        try:
            return read_regular(self._beside(suffix), 1 << 20)[0]
        except (OSError, ContentError):
            return b""

    def _manifest(
        self,
        installed: Installed,
        release: Release | None,
        published: Callable[[FileRef], bytes],
    ) -> bytes | None:
        """The publisher's own bytes; casync makes the same ones of the same tree, usually."""
        if release is not None and release.mtree is None:
            return None
        kept = None
        with contextlib.suppress(ContentError):
            kept = kept_manifest(self._folder, installed)
        if release is None or release.mtree is None:
            return kept or None
        if kept is not None and hashlib.sha256(kept).hexdigest() == release.mtree.sha256:
            return kept
        there = self._by_hash(release.mtree.sha256)
        with contextlib.suppress(OSError, ContentError):
            data, _ = read_regular(there, release.mtree.size)
            if _ref("", data).sha256 == release.mtree.sha256:
                return data
        return published(release.mtree)

    def _prune(self, before: Index | None) -> None:
        """Remove what the version before needed, and no index on the drive needs now."""
        folder = self._by_hash("")
        try:
            listed = set(_listed(self._index.parent))
            alive = {ref.hex for index in self._indexes(listed) for ref in index}
        except _UnclearError:
            return
        retired = [before] if before is not None else []
        doomed: list[Path] = []
        if folder.is_dir() and not folder.is_symlink():
            doomed = [
                path
                for path in folder.iterdir()
                if _HEX.fullmatch(path.name) and path.name not in listed
            ]
        retired += [index for path in doomed if (index := self._index_at(path)) is not None]
        for name in {ref.hex for index in retired for ref in index} - alive:
            self._remove(name)
        # The index goes after its chunks: a drive that is pulled out is pruned the next time.
        for path in doomed:
            path.unlink(missing_ok=True)
        syscalls.sync_file_system(self._index.parent)

    def _indexes(self, listed: set[str]) -> Iterator[Index]:
        """Every index on the drive, but those in our own by-hash folder that nobody lists."""
        own = self._by_hash("")
        for path in _walk(_tops(self._index.parent, self._store.path.parent)):
            by_hash = path.parent.name == "SHA256" and path.parent.parent.name == "by-hash"
            if path.parent == own and path.name not in listed:
                continue
            index = self._index_at(path)
            if index is not None:
                yield index
            elif not by_hash:
                raise _UnclearError

    def _index_at(self, path: Path) -> Index | None:
        try:
            data, _ = read_regular(path, 256 << 20)
            return index_format.parse(data, str(path))
        except (OSError, ContentError):
            return None

    def _beside(self, suffix: str) -> Path:
        return self._index.with_name(self._index.name + suffix)

    def _by_hash(self, sha256: str) -> Path:
        return self._index.parent / "by-hash" / "SHA256" / sha256


@dataclass(frozen=True, slots=True)
class _Problem:
    """Something on a drive that is missing or damaged.

    Attributes:
        what: in words.
        damaged: there are wrong bytes.
        beside: it is one of the files beside the index.
    """

    what: str
    damaged: bool
    beside: bool = False


class _UnclearError(Exception):
    """It is not clear what a drive's other files need: nothing is removed."""


def _listing(items: Sequence[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return "; ".join(items[:3]) + more


def _ref(name: str, data: bytes) -> FileRef:
    return FileRef(name, len(data), hashlib.sha256(data).hexdigest())


def _write(path: Path, data: bytes) -> None:
    """Write a file that is not there already: a drive wears, and writing is when it breaks."""
    try:
        if read_regular(path, len(data))[0] == data:
            return
    except (OSError, ContentError):
        pass
    _clear_folder(path)
    write_atomic(path, data)


def _clear_folder(path: Path) -> None:
    """Take an empty folder away that stands where a file belongs; one with files is somebody's."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):
            path.rmdir()


def _is_whole(body: bytes) -> bool:
    try:
        parse_release(trust.unwrap(body), "")
    except ContentError:
        return False
    return True


def _make_real_folder(path: Path) -> None:
    """Make a folder; a link in its place could lead out of the drive."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
    path.mkdir(exist_ok=True)


def _listed(folder: Path) -> Iterator[str]:
    """The SHA-256 of every file that a release in a folder lists."""
    for path in folder.iterdir():
        if path.name.startswith(".") or not path.name.endswith(SLOTS):
            continue
        try:
            release = parse_release(trust.unwrap(read_regular(path, 1 << 20)[0]), str(path))
        except (OSError, ContentError) as error:
            raise _UnclearError from error
        yield release.index.sha256
        if release.mtree is not None:
            yield release.mtree.sha256


def _tops(index: Path, store: Path) -> Sequence[Path]:
    """Where an index that uses the store can be: on the drive, or beside store and index."""
    top = index.resolve()
    while not top.is_mount():
        top = top.parent
    return (index, store) if top == Path("/") else (top,)


def _walk(tops: Sequence[Path]) -> Iterator[Path]:
    """Everything that may be an index."""
    count = 0
    seen: set[Path] = set()
    for top in tops:
        for name, folders, files in os.walk(top):
            here = Path(name)
            folders[:] = [one for one in folders if not _is_store(here / one)]
            count += len(files) + len(folders)
            if count > _WALK_LIMIT:
                raise _UnclearError
            hashed = here.name == "SHA256" and here.parent.name == "by-hash"
            for file in files:
                path = here / file
                fits = _HEX.fullmatch(file) if hashed else file.endswith(_INDEXES)
                if fits and not file.startswith(".") and path not in seen:
                    seen.add(path)
                    yield path


def _is_store(folder: Path) -> bool:
    return folder.suffix == ".castr" or folder.is_mount()


def _remove_temporaries(index: Path, store: Path) -> None:
    """What an earlier mirroring was writing when the drive was pulled out."""
    own = re.compile(re.escape(f".{index.name}") + r"(\.[a-z0-9-]+)?\.new")
    hashed = re.compile(r"\.[0-9a-f]{64}\.new")
    chunk = re.compile(r"\.#[0-9a-f]{64}(\.cacnk)?\.[0-9a-f]{8}")
    places = [(index.parent, own), (index.parent / "by-hash" / "SHA256", hashed)]
    places += [(folder, chunk) for folder in store.iterdir() if _PREFIX.fullmatch(folder.name)]
    for folder, pattern in places:
        if folder.is_symlink() or not folder.is_dir():
            continue
        for path in folder.iterdir():
            if pattern.fullmatch(path.name):
                path.unlink()

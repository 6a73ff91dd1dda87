"""A tree on disk beside the record of what was installed there.

Every path is walked down from the root's descriptor without following anything, so a link that
somebody put in the place of a directory leads nowhere.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from casync_updater.formats.archive import FCAPS, PERMISSIONS, TIMES, UIDS, XATTRS, Node
from casync_updater.formats.record import (
    DIRECTORY,
    END,
    FILE,
    LINK,
    Record,
    Window,
)

READ_SIZE = 1 << 18
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

UNKNOWN, SAME_CONTENT, LINKABLE = 0, 1, 2
"""How far a node of an installed tree is what its record says: not; in its content; in all."""


def open_directory(name: bytes, parent: int) -> int:
    """A directory inside another one, not through a link. -1 where there is none."""
    if parent < 0:
        return -1
    try:
        return os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
    except OSError:
        return -1


def open_file(name: bytes, parent: int) -> int:
    """A regular file in a directory, not through a link; -1 where there is none to read."""
    if parent < 0:
        return -1
    try:
        file = os.open(name, _OPEN_FILE, dir_fd=parent)
    except OSError:
        return -1
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    return -1


def read_exactly(file: int, offset: int, count: int) -> bytes:
    """A range of a file; shorter only where the file is."""
    data = os.pread(file, count, offset)
    while len(data) < count and (more := os.pread(file, count - len(data), offset + len(data))):
        data += more
    return data


class Skeleton(Protocol):
    """What knows where the bytes of an archive stand: a `Record`, or a journal."""

    def pieces(self, start: int, end: int) -> Iterator[bytes | tuple[int, int, int]]:
        """What stands in a range of the stream: bytes, or (file, offset in it, count)."""

    def path(self, node: int) -> bytes:
        """A file's path."""


class TreeFiles:
    """The content of a tree's files, found through its record; closed when the block is left."""

    def __init__(self, record: Skeleton, root: int) -> None:
        self._record = record
        self._root = root
        self._node = -1
        self._file = -1

    def __enter__(self) -> "TreeFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the file that is open."""
        self._use(-1, -1)

    def stream(self, start: int, end: int) -> bytes | None:
        """A range of the archive, made again; None where the tree has it no longer."""
        out = bytearray()
        for piece in self._record.pieces(start, end):
            if isinstance(piece, bytes):
                out += piece
                continue
            node, offset, count = piece
            if node != self._node:
                self._use(node, self._open(node))
            if self._file < 0:
                return None
            out += read_exactly(self._file, offset, count)
        return bytes(out) if len(out) == end - start else None

    def _open(self, node: int) -> int:
        *folders, name = self._record.path(node).split(b"/")
        directory = os.dup(self._root)
        for folder in folders:
            inner = open_directory(folder, directory)
            os.close(directory)
            if inner < 0:
                return -1
            directory = inner
        try:
            return open_file(name, directory)
        finally:
            os.close(directory)

    def _use(self, node: int, file: int) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._node, self._file = node, file


def content_digest(file: int, hash_name: str) -> bytes:
    """The digest of an open file's content, as records keep it."""
    digest = hashlib.new(hash_name)
    offset = 0
    while data := os.pread(file, READ_SIZE, offset):
        digest.update(data)
        offset += len(data)
    return digest.digest()


def visit(record: Record, root: int) -> Iterator[tuple[int, bytes, int]]:
    """Every node of a record but ENDs: its number, its name, and its directory in the tree.

    The directory is an open descriptor, or -1 where the tree has none at that path; the root
    comes with itself and the name ``.``. An END comes with the name ``b""`` while its directory
    is still open.
    """
    kinds, name_of = record.kinds, record.name
    yield 0, b".", root
    open_folders = [os.dup(root)]
    try:
        for node in range(1, len(record)):
            kind = kinds[node]
            folder = open_folders[-1]
            if kind == END:
                yield node, b"", folder
                open_folders.pop()
                if folder >= 0:
                    os.close(folder)
                continue
            name = name_of(node)
            yield node, name, folder
            if kind == DIRECTORY:
                open_folders.append(open_directory(name, folder))
    finally:
        for folder in open_folders:
            if folder >= 0:
                os.close(folder)


def trust(record: Record, root: int, windows: tuple[Window, ...]) -> bytearray:
    """How far each node of a tree is what its record says (UNKNOWN, SAME_CONTENT, LINKABLE).

    One `lstat` a node; a file that only its content can vouch for is read, and its place in the
    record takes the new `lstat`.
    """
    out = bytearray(len(record))
    kinds, lstat, trusted = record.kinds, os.stat, record.trusted
    for node, name, folder in visit(record, root):
        kind = kinds[node]
        if kind in {DIRECTORY, END}:
            out[node] = LINKABLE
            continue
        if folder < 0:
            continue
        try:
            found = lstat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            continue
        if trusted(node, found, windows):
            out[node] = LINKABLE
        elif kind == FILE and found.st_size == record.size(node) and found.st_mode >> 12 == 8:
            out[node] = _trust_content(record, node, _Found(name, folder, found))
    return out


@dataclass(frozen=True, slots=True)
class _Found:
    """What there is at a node's path."""

    name: bytes
    folder: int
    stat: os.stat_result


def _trust_content(record: Record, node: int, found: _Found) -> int:
    """What a file whose `lstat` is not as recorded is worth, by its content."""
    file = open_file(found.name, found.folder)
    if file < 0:
        return UNKNOWN
    try:
        if content_digest(file, record.index.hash_name) != record.digest(node):
            return UNKNOWN
    finally:
        os.close(file)
    # Two names of one inode were not made by this project: linking both would keep them one.
    alone = found.stat.st_ino == record.inodes[node] or found.stat.st_nlink == 1
    drifted = any(_metadata(record, node, record.decode(node), found))
    record.stamp(node, found.stat)
    return LINKABLE if alone and not drifted else SAME_CONTENT


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a tree is not what was installed."""

    path: bytes
    what: str
    """``missing``, ``added``, ``type``, ``content``, ``target``, ``mode``, ``owner``, ``time``,
    ``attributes`` or ``device``."""


def verify_tree(
    record: Record,
    root: int,
    *,
    preserve: Collection[bytes] = (),
    windows: tuple[Window, ...] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[Difference]:
    """Compare a tree with what was installed there.

    Args:
        record: what was installed.
        root: the tree, an open directory.
        preserve: paths in it that belong to the device, and are left out.
        windows: the times of our own operations, for the fast check, which believes a file
            whose `lstat` is as recorded; None reads the content of every file.
        progress: called with the bytes of the archive that are behind.
    """
    skip = 0
    known: list[set[bytes]] = []
    # Moving a preserved path into a tree gives the directory it is in a new time.
    moved_into = {path.rpartition(b"/")[0] or b"." for path in preserve}
    for node, name, folder in visit(record, root):
        kind = record.kinds[node]
        if node < skip:
            continue
        progress(record.starts[node])
        if kind == END:
            yield from _added(record, node, folder, known.pop(), preserve)
            continue
        if known:
            known[-1].add(name)
        if preserve and record.path(node) in preserve:
            skip = node + record.spans[node]
            continue
        what = _at_path(record, node, name, folder, windows)
        path = record.path(node) if what else b""
        for one in what:
            if one != "time" or path not in moved_into:
                yield Difference(path, one)
        if kind == DIRECTORY and what and what[0] in {"missing", "type"}:
            skip = node + record.spans[node]
        elif kind == DIRECTORY:
            known.append(set())


def _at_path(
    record: Record, node: int, name: bytes, folder: int, windows: tuple[Window, ...] | None
) -> list[str]:
    """How the node at a path differs."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return ["missing"]
    return list(_differences(record, node, _Found(name, folder, found), windows))


def _added(
    record: Record, end: int, folder: int, known: set[bytes], preserve: Collection[bytes]
) -> Iterator[Difference]:
    if folder < 0:
        return
    parent = record.path(record.parents[end])
    with os.scandir(folder) as entries:
        names = sorted(os.fsencode(entry.name) for entry in entries)
    for name in names:
        path = name if parent == b"." else parent + b"/" + name
        inside = path + b"/"
        if name not in known and path not in preserve:
            if any(kept.startswith(inside) for kept in preserve):
                continue
            yield Difference(path, "added")


def _differences(
    record: Record, node: int, found: _Found, windows: tuple[Window, ...] | None
) -> Iterator[str]:
    kind = record.kinds[node]
    if windows is not None and kind != DIRECTORY and record.trusted(node, found.stat, windows):
        return
    want = record.decode(node)
    if stat.S_IFMT(want.mode) != stat.S_IFMT(found.stat.st_mode):
        yield "type"
        return
    yield from _metadata(record, node, want, found)
    if kind == FILE:
        file = (
            open_file(found.name, found.folder) if found.stat.st_size == record.size(node) else -1
        )
        if file < 0:
            yield "content"
            return
        try:
            if content_digest(file, record.index.hash_name) != record.digest(node):
                yield "content"
        finally:
            os.close(file)
    elif kind == LINK:
        if os.fsencode(os.readlink(found.name, dir_fd=found.folder)) != want.target:
            yield "target"
    elif want.device != found.stat.st_rdev and (stat.S_ISBLK(want.mode) or stat.S_ISCHR(want.mode)):
        yield "device"


def _metadata(record: Record, node: int, want: Node, found: _Found) -> Iterator[str]:
    """The metadata that the archive carries and the tree has otherwise.

    What the archive does not carry belongs to the device and is no difference.
    """
    flags, kind = record.index.flags, record.kinds[node]
    if flags & PERMISSIONS and kind != LINK and found.stat.st_mode != want.mode:
        yield "mode"
    if flags & UIDS and (found.stat.st_uid, found.stat.st_gid) != (want.uid, want.gid):
        yield "owner"
    if flags & TIMES and found.stat.st_mtime_ns != record.mtimes[node]:
        yield "time"
    if flags & (XATTRS | FCAPS) and kind in {FILE, DIRECTORY}:
        wanted = dict(want.xattrs)
        if want.fcaps is not None:
            wanted[b"security.capability"] = want.fcaps
        if attributes(found.name, found.folder, flags) != wanted:
            yield "attributes"


def attributes(name: bytes, folder: int, flags: int) -> dict[bytes, bytes] | None:
    """The extended attributes of a file or directory that archives with these flags carry.

    None where it cannot be opened: what is not seen is not vouched for.
    """
    try:
        file = os.open(name, _OPEN_FILE, dir_fd=folder)
    except OSError:
        return None
    try:
        return {
            key: os.getxattr(file, key)
            for key in map(os.fsencode, list_attributes(file))
            if carried(key, flags)
        }
    finally:
        os.close(file)


def list_attributes(file: int) -> list[str]:
    """The names of an open file's extended attributes; none where the file system has none."""
    with contextlib.suppress(OSError):
        return os.listxattr(file)
    return []


def carried(key: bytes, flags: int) -> bool:
    """Whether archives with these flags carry the extended attribute of this name."""
    if key == b"security.capability":
        return bool(flags & FCAPS)
    return bool(flags & XATTRS) and key.startswith((b"user.", b"trusted."))


def digest_tree(
    record: Record, root: int, *, progress: Callable[[int], object] = lambda done: None
) -> str:
    """The archive digest of a tree's present content, in the metadata of its record.

    The stream is made again from the record and the files. Together with `verify_tree`, which
    compares the metadata, it is what ``casync digest`` would say.

    Returns:
        Hex digits; a file that is gone or of another size makes it a digest of something else.
    """
    digest = hashlib.new(record.index.hash_name)
    with TreeFiles(record, root) as files:
        for start in range(0, record.index.size, READ_SIZE):
            end = min(start + READ_SIZE, record.index.size)
            data = files.stream(start, end)
            digest.update(b"" if data is None else data)
            progress(end)
    return digest.hexdigest()

"""Trees against what they should be: by the archive's chunks, or by a manifest.

The chunk way reads everything and needs nothing but the index: it proves every byte. The
manifest way can leave paths out that belong to the device, and names what differs.
"""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from casync_updater.errors import ContentError
from casync_updater.formats.index import Index
from casync_updater.formats.mtree import Node
from casync_updater.model import ChunkRef
from casync_updater.tools import casync

_PIECE = 1 << 20

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_CAPABILITY = "security.capability"
_XATTR_FEATURES = (
    ("system.posix_acl", "acl"),
    (_CAPABILITY, "fcaps"),
    ("security.selinux", "selinux"),
)
"""Attributes that an archive carries by a feature of their own, not as ``xattrs``."""
_TIME_GRAINS = {
    "nsec-time": 1,
    "usec-time": 1_000,
    "sec-time": 1_000_000_000,
    "2sec-time": 2_000_000_000,
}


def cut(path: Path, index: Index) -> Iterator[tuple[ChunkRef, bytes]]:
    """What stands at a path, as the pieces that the index divides its stream into.

    The pieces are not verified: where the tree is another one, they are other bytes, and the
    last ones may be missing or short.
    """
    with contextlib.ExitStack() as stack:
        pieces: Iterator[bytes]
        if path.is_dir():
            pieces = stack.enter_context(casync.stream_archive(path, flags=index.flags))
        else:
            file = stack.enter_context(path.open("rb"))
            pieces = _pieces(file)
        buffer = bytearray()
        for ref in index:
            while len(buffer) < ref.size:
                piece: bytes = next(pieces, b"")
                if not piece:
                    break
                buffer += piece
            yield ref, bytes(buffer[: ref.size])
            del buffer[: ref.size]
        if not path.is_block_device() and (buffer or next(pieces, b"") != b""):
            # A tree or file with something more: a piece of no chunk, which no id fits. A block
            # device is as long as it is.
            yield ChunkRef(b"", index.size, 0), bytes(buffer)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


def archive_digest(path: Path, index: Index) -> str:
    """The digest of what stands at a path, every chunk of it compared with the index.

    Raises:
        ContentError: a chunk has another id; the offset is named.
        LocalError: the tree cannot be read.
    """
    whole = hashlib.new(index.hash_name)
    for ref, data in cut(path, index):
        if index.chunk_id(data) != ref.id:
            raise ContentError(
                f"{path} is not what the index describes: the chunk at offset {ref.start} differs"
            )
        whole.update(data)
    return whole.hexdigest()


@dataclass(frozen=True, slots=True)
class Difference:
    """A path of a tree that is not what its manifest says."""

    path: bytes
    what: str
    """``missing``, ``extra``, ``time``, or the property that differs."""


def differences(
    root: Path,
    nodes: Iterable[Node],
    *,
    features: Iterable[str],
    hash_name: str,
    preserve: Iterable[str] = (),
) -> Iterator[Difference]:
    """Compare a tree with a manifest, node by node, contents included.

    The mtime of folders is left out: moving a preserved path, or a program that writes
    temporary files, changes it. Memory grows with the depth and width of one branch only.

    Args:
        root: the tree.
        nodes: its manifest, in the archive's order.
        features: what the archive carries; the rest is not compared.
        hash_name: hashlib's name of what the manifest's digests are made with.
        preserve: relative paths that belong to the device; neither they nor what is below
            them is looked at.

    Raises:
        OSError: something in the tree cannot be read.
    """
    grain = next((_TIME_GRAINS[name] for name in _TIME_GRAINS if name in features), None)
    kept = {os.fsencode(path) for path in preserve}
    base = os.fsencode(root)
    branch: list[tuple[bytes, set[bytes]]] = []
    for node in nodes:
        while branch and not _below(node.path, branch[-1][0]):
            yield from _extras(*branch.pop(), kept)
        if any(_is_or_below(node.path, path) for path in kept):
            continue
        folder, _, name = node.path.rpartition(b"/")
        if node.path != b"." and (not branch or branch[-1][0] != (folder or b".")):
            # Its folder is gone, or is a symbolic link that leads out of the tree.
            yield Difference(node.path, "missing")
            continue
        if branch:
            branch[-1][1].discard(name)
        path = base if node.path == b"." else base + b"/" + node.path
        try:
            status = os.lstat(path)
            what = _what_differs(path, status, node, grain, hash_name)
            names = set(os.listdir(path)) if node.type == "dir" and what != "type" else None
        except (FileNotFoundError, NotADirectoryError):
            yield Difference(node.path, "missing")
            continue
        if what is not None:
            yield Difference(node.path, what)
        if names is not None:
            branch.append((node.path, names))
    while branch:
        yield from _extras(*branch.pop(), kept)


def _below(path: bytes, folder: bytes) -> bool:
    return folder == b"." or path.startswith(folder + b"/")


def _is_or_below(path: bytes, other: bytes) -> bool:
    return path == other or path.startswith(other + b"/")


def _extras(folder: bytes, names: set[bytes], kept: set[bytes]) -> Iterator[Difference]:
    for name in sorted(names):
        path = name if folder == b"." else folder + b"/" + name
        if path in kept:
            continue
        # A folder that only exists to hold a preserved path belongs to the device as well.
        if any(_below(other, path) for other in kept):
            continue
        yield Difference(path, "extra")


def _what_differs(
    path: bytes, status: os.stat_result, node: Node, grain: int | None, hash_name: str
) -> str | None:
    kind = stat.S_IFMT(status.st_mode)
    if _TYPES[kind] != node.type:
        return "type"
    if node.mode is not None and kind != stat.S_IFLNK and stat.S_IMODE(status.st_mode) != node.mode:
        return "mode"
    if node.uid is not None and status.st_uid != node.uid:
        return "owner"
    if node.gid is not None and status.st_gid != node.gid:
        return "group"
    if node.link is not None and os.readlink(path) != node.link:
        return "link target"
    if node.device is not None and node.device != _device(status.st_rdev):
        return "device"
    if kind == stat.S_IFREG and (
        status.st_size != node.size or (node.digest and _hash(path, hash_name) != node.digest)
    ):
        return "content"
    if (
        grain is not None
        and node.time_ns is not None
        and kind != stat.S_IFDIR
        and status.st_mtime_ns // grain != node.time_ns // grain
    ):
        return "time"
    return None


def _device(number: int) -> bytes:
    return b"linux,%d,%d" % (os.major(number), os.minor(number))


def _hash(path: bytes, hash_name: str) -> str | None:
    """A file's hash; None where something else took its place since it was looked at."""
    whole = hashlib.new(hash_name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            return None
        raise
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        for piece in _pieces(file):
            whole.update(piece)
    return whole.hexdigest()


def obstacle(root: Path, path: str) -> Path | None:
    """What keeps a tree from taking a preserved path in: the path itself, or a parent of it.

    A parent that is a symbolic link would lead out of the tree.
    """
    relative = Path(path)
    for folder in reversed(relative.parents[:-1]):
        try:
            status = os.lstat(root / folder)
        except FileNotFoundError:
            return None
        if not stat.S_ISDIR(status.st_mode):
            return folder
    return relative if os.path.lexists(root / relative) else None


def holds(root: Path, path: str) -> bool:
    """True where a preserved path is in a tree itself, not behind a symbolic link."""
    return obstacle(root, path) == Path(path)


def carry_over(new: Path, old: Path | None, *, parent: Path, features: Iterable[str]) -> None:
    """Give a new tree what its archive does not carry, as updating in place would have kept it.

    Owner, group, mode and extended attributes come from the same path in the old tree; nodes
    that are new get the owner of the folder they are in, and 0755 or 0644. (casync itself makes
    the folders of an archive without modes 0700.) A user who may not give files away keeps
    them, and sets what he may.

    Args:
        new: the tree, freshly extracted; a file where the archive is that of a file.
        old: the tree that it follows; None where there is none.
        parent: the folder of the destination; its owner gets a tree that follows none.
        features: what the archive carries.

    Raises:
        OSError: something could not be set.
    """
    carried = frozenset(features)
    no_modes = carried.isdisjoint({"permissions", "read-only", "acl"})
    no_owners = carried.isdisjoint({"16bit-uids", "32bit-uids", "user-names"})
    owners = _Owners(os.fsencode(new), old, parent)
    for path in _walk(os.fsencode(new)):
        status = os.lstat(path)
        before = _counterpart(path, os.fsencode(new), old, status)
        mode = stat.S_IMODE(status.st_mode)
        if no_modes:
            plain = 0o755 if stat.S_ISDIR(status.st_mode) else 0o644
            mode = stat.S_IMODE(before[1].st_mode) if before else plain
        own = {name: os.getxattr(path, name) for name in _lost_with_owner(path, status)}
        if no_owners:
            owner = (before[1].st_uid, before[1].st_gid) if before else owners.of_new(path)
            if owner != (status.st_uid, status.st_gid):
                with _allowed():
                    os.lchown(path, *owner)
        for name, value in own.items():
            os.setxattr(path, name, value)
        if before:
            _copy_xattrs(before[0], path, carried)
        # Last: a new owner clears setuid bits, and an ACL changes the bits of the group.
        if not stat.S_ISLNK(status.st_mode) and stat.S_IMODE(os.lstat(path).st_mode) != mode:
            os.chmod(path, mode)


class _Owners:
    """Who owns what is new: the owner of the nearest folder that was there before."""

    def __init__(self, new: bytes, old: Path | None, parent: Path) -> None:
        self._new = new
        self._old = old
        status = parent.stat()
        self._known = {os.path.dirname(new): (status.st_uid, status.st_gid)}

    def of_new(self, path: bytes) -> tuple[int, int]:
        climbed = []
        folder = os.path.dirname(path)
        while folder not in self._known:
            before = _counterpart(folder, self._new, self._old, os.lstat(folder))
            if before is not None:
                self._known[folder] = (before[1].st_uid, before[1].st_gid)
            else:
                climbed.append(folder)
                folder = os.path.dirname(folder)
        owner = self._known[folder]
        self._known.update(dict.fromkeys(climbed, owner))
        return owner


def _lost_with_owner(path: bytes, status: os.stat_result) -> tuple[str, ...]:
    """Attributes that a change of owner removes: the file's capabilities."""
    if stat.S_ISREG(status.st_mode) and _CAPABILITY in os.listxattr(path):
        return (_CAPABILITY,)
    return ()


@contextlib.contextmanager
def _allowed() -> Iterator[None]:
    """Let a user without privileges go on where only root may do something."""
    try:
        yield
    except PermissionError:
        if os.geteuid() == 0:
            raise


def _walk(root: bytes) -> Iterator[bytes]:
    """Every node, folders after what is in them: their own modes may forbid the way back.

    Not recursive: an archive may be deeper than Python's stack.
    """
    stack = [(root, False)]
    while stack:
        path, entered = stack.pop()
        if entered or not os.path.isdir(path) or os.path.islink(path):
            yield path
            continue
        stack.append((path, True))
        stack.extend((path + b"/" + name, False) for name in os.listdir(path))


def _counterpart(
    path: bytes, new: bytes, old: Path | None, status: os.stat_result
) -> tuple[bytes, os.stat_result] | None:
    if old is None:
        return None
    before = os.fsencode(old) + path[len(new) :]
    try:
        found = os.lstat(before)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (before, found) if stat.S_IFMT(found.st_mode) == stat.S_IFMT(status.st_mode) else None


def _copy_xattrs(source: bytes, target: bytes, carried: frozenset[str]) -> None:
    for name in os.listxattr(source, follow_symlinks=False):
        feature = next((f for prefix, f in _XATTR_FEATURES if name.startswith(prefix)), "xattrs")
        if feature in carried:
            continue
        value = os.getxattr(source, name, follow_symlinks=False)
        with _allowed():
            os.setxattr(target, name, value, follow_symlinks=False)

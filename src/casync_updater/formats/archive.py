"""casync's archive stream (what a ``.caidx`` describes): a decoder that trusts nothing.

The layout is that of ``caformat.h`` in systemd/casync: a node is an ENTRY, metadata records,
and then a payload, a link's target, device numbers, or (FILENAME, node)* and a GOODBYE. Every
record starts with its size and type, little-endian 64 bit.

The decoder pulls bytes from a `Feed` and hands out one node after the other, without recursion
and without ever holding more than one node's metadata. Whatever casync would not have written
is a `ContentError` that names the path: sizes, order and names, types and metadata that the
index's features do not announce, times finer than announced, a GOODBYE that does not fit.
"""

import os
import stat
import struct
from dataclasses import dataclass
from typing import Protocol

from casync_updater.errors import ContentError
from casync_updater.formats.index import FEATURES

HEADER = struct.Struct("<QQ")
ENTRY = struct.Struct("<QQQQQQQQ")
_DEVICE = struct.Struct("<QQQQ")
_TAIL = struct.Struct("<QQQ")

_ENTRY_TYPE = 0x1396FABCEA5BBB51
_XATTR_TYPE = 0xB8157091F80BC486
_FCAPS_TYPE = 0xF7267DB0AFED0629
_SYMLINK_TYPE = 0x664A6FB6830E0D6C
_DEVICE_TYPE = 0xAC3DACE369DFE643
_PAYLOAD_TYPE = 0x8B9E1D93D6DCFFC9
_FILENAME_TYPE = 0x6DBB6EBCB3161F0B
_GOODBYE_TYPE = 0xDFD35C5E8327C403
_TAIL_MARKER = 0x57446FA533702943

_NAME_LIMIT = HEADER.size + 256
_TARGET_LIMIT = HEADER.size + 4096
_ATTRIBUTE_LIMIT = HEADER.size + 256 + (64 << 10)
_ATTRIBUTES_LIMIT = 1 << 20
"""Bytes of metadata records one node may have in all; Linux gives a file at most 64 KiB."""

MAX_DEPTH = 400
"""Directories inside each other. Each takes two descriptors while it is being built."""

XATTR_NAMESPACES = (b"user.", b"trusted.")
"""The only namespaces that casync stores as XATTR (``ca_xattr_name_store``)."""


def _bit(name: str) -> int:
    return 1 << FEATURES.index(name)


UIDS = _bit("16bit-uids") | _bit("32bit-uids")
TIMES = _bit("sec-time") | _bit("usec-time") | _bit("nsec-time") | _bit("2sec-time")
PERMISSIONS = _bit("permissions")
XATTRS = _bit("xattrs")
FCAPS = _bit("fcaps")

_TYPE_FEATURE = {
    stat.S_IFREG: 0,
    stat.S_IFDIR: 0,
    stat.S_IFLNK: _bit("symlinks"),
    stat.S_IFBLK: _bit("device-nodes"),
    stat.S_IFCHR: _bit("device-nodes"),
    stat.S_IFIFO: _bit("fifos"),
    stat.S_IFSOCK: _bit("sockets"),
}
_DECODED = UIDS | TIMES | PERMISSIONS | XATTRS | FCAPS
for _feature in _TYPE_FEATURE.values():
    _DECODED |= _feature
_HIGH_FLAGS = 0xF << 60


def unsupported(flags: int) -> tuple[str, ...]:
    """The features among these flags that this project leaves to casync, by name."""
    rest = flags & ~(_DECODED | _HIGH_FLAGS)
    names = [name for bit, name in enumerate(FEATURES) if rest >> bit & 1]
    if unknown := rest >> len(FEATURES):
        names.append(f"unknown flags {unknown << len(FEATURES):#x}")
    return tuple(names)


def _granularity(flags: int) -> int:
    """Nanoseconds that a time of an archive with these flags is a multiple of; 0: it has none."""
    for name, step in (("nsec-time", 1), ("usec-time", 10**3), ("sec-time", 10**9)):
        if flags & _bit(name):
            return step
    return 2 * 10**9 if flags & _bit("2sec-time") else 0


class Feed(Protocol):
    """Where the decoder gets the stream's bytes from."""

    position: int
    """The offset in the stream of the next byte."""

    def peek(self, count: int) -> tuple[bytes, int]:
        """A buffer, and where in it the next `count` bytes stand; the position stays.

        Raises:
            ContentError: the stream ends before.
        """


class Memory:
    """A feed of bytes that are in memory."""

    def __init__(self, data: bytes) -> None:
        self.position = 0
        self._data = data

    def peek(self, count: int) -> tuple[bytes, int]:
        """See `Feed.peek`."""
        if self.position + count > len(self._data):
            raise ContentError(f"the archive ends early, at {len(self._data)} bytes")
        return self._data, self.position


@dataclass(slots=True)
class Node:
    """A file, directory, link or special file up to its content; or, with mode 0, a GOODBYE."""

    name: bytes
    start: int
    """Where the node begins in the stream: its FILENAME, for the root its ENTRY."""
    raw: bytes
    """The node's bytes, from `start` up to its payload or to a directory's first name."""
    mode: int = 0
    """Type and permission bits as in ``st_mode``; the latter mean nothing without the feature."""
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    """Nanoseconds since 1970."""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    fcaps: bytes | None = None
    target: bytes = b""
    """Where a symbolic link points to."""
    device: int = 0
    """Device number of a device node, as `os.mknod` takes it."""
    size: int = 0
    """Bytes of payload that follow; the reader of the node takes them from the feed."""


class Frame:
    """A directory that is open: what its GOODBYE is judged by."""

    __slots__ = ("children", "entry", "last", "name")

    def __init__(self, name: bytes, entry: int) -> None:
        self.name = name
        self.entry = entry
        self.children = 0
        self.last = b""


class Decoder:
    """The nodes of an archive, one after the other.

    A caller that knows what bytes come next (an unchanged run) may move the feed's position
    over whole nodes, if it reports what it passed with `enter`, `passed` and `leave`.
    """

    def __init__(self, feed: Feed, flags: int) -> None:
        self.frames: list[Frame] = []
        self._feed = feed
        self._flags = flags
        self._step = _granularity(flags)
        self._uid_limit = (
            1 << 32 if flags & _bit("32bit-uids") else 1 << 16 if flags & _bit("16bit-uids") else 1
        )

    def path(self, name: bytes = b"") -> bytes:
        """The path of a name in the directory that is open."""
        parts = [frame.name for frame in self.frames[1:]]
        if name:
            parts.append(name)
        return b"/".join(parts) or b"."

    def next(self) -> Node:
        """The next node, or the GOODBYE of the directory that is open.

        Raises:
            ContentError: the archive is not one that casync writes.
        """
        feed = self._feed
        start = feed.position
        head, name = b"", b""
        if self.frames:
            buffer, at = feed.peek(HEADER.size)
            size, kind = HEADER.unpack_from(buffer, at)
            if kind == _GOODBYE_TYPE:
                return self._goodbye(size)
            if kind != _FILENAME_TYPE or not HEADER.size + 2 <= size <= _NAME_LIMIT:
                raise self._bad("where a name or the directory's end should be")
            buffer, at = feed.peek(size)
            head = buffer[at : at + size]
            name = head[HEADER.size : -1]
            if head[-1] or b"\0" in name or b"/" in name or name in {b".", b".."}:
                raise self._bad(f"with the impossible name {os.fsdecode(name)!r}")
            self.passed(name)
            feed.position += size
        node = self._node(name, start, head)
        if stat.S_ISDIR(node.mode):
            self.enter(name, start + len(head))
        elif not self.frames:
            raise self._bad("whose root is no directory")
        return node

    def passed(self, name: bytes) -> None:
        """A node of this name begins in the directory that is open.

        Raises:
            ContentError: the name does not rise.
        """
        frame = self.frames[-1]
        if name <= frame.last:
            raise self._bad("that is out of order or there twice", name)
        frame.last = name
        frame.children += 1

    def enter(self, name: bytes, entry: int) -> None:
        """A directory begins, whose ENTRY stands at this offset.

        Raises:
            ContentError: it lies too deep.
        """
        if len(self.frames) >= MAX_DEPTH:
            raise self._bad(f"more than {MAX_DEPTH} directories deep")
        self.frames.append(Frame(name, entry))

    def leave(self, start: int, goodbye: bytes) -> None:
        """The directory that is open ends, with this GOODBYE at this offset.

        Raises:
            ContentError: the GOODBYE does not fit the directory.
        """
        frame = self.frames[-1]
        offset, size, marker = _TAIL.unpack_from(goodbye, len(goodbye) - _TAIL.size)
        fits = offset == start - frame.entry and size == len(goodbye) and marker == _TAIL_MARKER
        if not fits or size != HEADER.size + _TAIL.size * (frame.children + 1):
            raise self._bad("whose end does not fit its beginning")
        self.frames.pop()

    def _goodbye(self, size: int) -> Node:
        start = self._feed.position
        if size != HEADER.size + _TAIL.size * (self.frames[-1].children + 1):
            raise self._bad("whose end does not fit its number of names")
        buffer, at = self._feed.peek(size)
        raw = buffer[at : at + size]
        self.leave(start, raw)
        self._feed.position += size
        return Node(b"", start, raw)

    def _node(self, name: bytes, start: int, head: bytes) -> Node:
        feed = self._feed
        buffer, at = feed.peek(ENTRY.size)
        raw = head + buffer[at : at + ENTRY.size]
        size, kind, flags, mode, attributes, uid, gid, mtime = ENTRY.unpack_from(buffer, at)
        if kind != _ENTRY_TYPE or size != ENTRY.size:
            raise self._bad("without an entry", name)
        if flags != self._flags:
            raise self._bad("with other features than the index", name)
        feature = None if mode >> 16 else _TYPE_FEATURE.get(stat.S_IFMT(mode))
        if feature is None or (feature and not feature & flags):
            raise self._bad("of a type that the index does not announce", name)
        if attributes or uid >= self._uid_limit or gid >= self._uid_limit:
            raise self._bad("with an owner or attributes that the index does not announce", name)
        if mtime >> 63 or (mtime % self._step if self._step else mtime):
            raise self._bad("with a time that the index does not announce", name)
        feed.position += ENTRY.size
        node = Node(name, start, raw, mode, uid, gid, mtime)
        if flags & (XATTRS | FCAPS):
            self._attributes(node)
        if stat.S_ISREG(mode):
            node.size = self._take(node, _PAYLOAD_TYPE, HEADER.size, 1 << 63, HEADER.size)
        elif stat.S_ISLNK(mode):
            self._take(node, _SYMLINK_TYPE, HEADER.size + 2, _TARGET_LIMIT)
            node.target = node.raw[len(raw) + HEADER.size : -1]
            if node.raw[-1] or b"\0" in node.target:
                raise self._bad("with a target that does not end where it should", name)
        elif stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
            self._take(node, _DEVICE_TYPE, _DEVICE.size, _DEVICE.size)
            _, _, major, minor = _DEVICE.unpack(node.raw[-_DEVICE.size :])
            if major >> 12 or minor >> 20:
                raise self._bad("with an impossible device number", name)
            node.device = os.makedev(major, minor)
        return node

    def _take(
        self, node: Node, expected: int, least: int, most: int, taken: int | None = None
    ) -> int:
        """Add the next record (or its first `taken` bytes) to the node; bytes left of it."""
        feed = self._feed
        buffer, at = feed.peek(HEADER.size)
        size, kind = HEADER.unpack_from(buffer, at)
        if kind != expected or not least <= size <= most:
            raise self._bad("without the content its type has", node.name)
        count: int = size if taken is None else taken
        buffer, at = feed.peek(count)
        node.raw += buffer[at : at + count]
        feed.position += count
        rest: int = size - count
        return rest

    def _attributes(self, node: Node) -> None:
        """Take the XATTR and FCAPS records, where the features announce them."""
        feed = self._feed
        xattrs: list[tuple[bytes, bytes]] = []
        begin = len(node.raw)
        while True:
            buffer, at = feed.peek(HEADER.size)
            _, kind = HEADER.unpack_from(buffer, at)
            if kind not in {_XATTR_TYPE, _FCAPS_TYPE}:
                break
            before = len(node.raw)
            self._take(node, kind, HEADER.size + 1, _ATTRIBUTE_LIMIT)
            body = node.raw[before + HEADER.size :]
            if len(node.raw) - begin > _ATTRIBUTES_LIMIT:
                raise self._bad("with more extended attributes than a file can have", node.name)
            if kind == _FCAPS_TYPE:
                announced = self._flags & FCAPS and stat.S_ISREG(node.mode)
                if not announced or node.fcaps is not None:
                    raise self._bad("with capabilities that it cannot have", node.name)
                node.fcaps = body
                continue
            key, nul, value = body.partition(b"\0")
            known = any(key.startswith(space) and key != space for space in XATTR_NAMESPACES)
            rises = not xattrs or key > xattrs[-1][0]
            announced = self._flags & XATTRS and node.fcaps is None
            if not (announced and nul and known and rises and len(key) <= 255):
                raise self._bad("with an extended attribute that it cannot have", node.name)
            xattrs.append((key, value))
        node.xattrs = tuple(xattrs)

    def _bad(self, what: str, name: bytes = b"") -> ContentError:
        path = os.fsdecode(self.path(name))
        return ContentError(
            f"the archive is damaged: at offset {self._feed.position}, {path!r}: something {what}"
        )


def decode_node(raw: bytes, flags: int, *, root: bool = False) -> Node:
    """One node from its own bytes (`Node.raw`), as a record keeps them.

    Raises:
        ContentError: they are no node.
    """
    decoder = Decoder(Memory(raw + bytes(HEADER.size)), flags)
    if not root:
        decoder.enter(b"", 0)
    return decoder.next()

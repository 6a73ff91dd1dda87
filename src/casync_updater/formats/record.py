"""The record of an installed tree: what lets the next update leave alone what did not change.

A record is the archive stream without the contents of files (the "skeleton"), the index that
describes the stream, and what `lstat` said about each node when it was installed. With it, any
range of the installed archive is known to be in the record itself or in a file of the tree.

Nodes are numbered in the order of the stream; a directory's GOODBYE is a node too. Everything
about them is packed into columns, and the skeleton stays compressed, in blocks: a record of
86,000 files takes some ten MiB of memory and nothing has to be parsed to use it.

When a file of the tree is trusted
----------------------------------
A file counts as unchanged while size, mtime, inode and mode are what they were, and so is its
ctime. The ctime is the only one that nobody can set back, and also the one that this project
changes itself: a hard link into a new tree, and the removal of an old tree that shares the
inode, both set it to "now". Recording it again after each of these would need another walk
over the tree each time, and a crash before it would lose it. So:

- a build records the ctime of each file after its own link was made, in the new tree;
- every later operation of our own on shared inodes (another build, finished or given up; the
  removal of a tree) is remembered as a `Window`: its beginning and end, by the clock that the
  file system stamps ctimes with. A ctime inside such a window counts as ours;
- what is not trusted by these rules is not lost: its content is read and compared with the
  digest in the record. A window that was never written down, because the power was cut, costs
  one reading of the tree, never a download, and never trust that is not deserved.

What is given up: an edit in place that restores size and mtime is not seen where one of our
own operations touches the same inode after it and before the next check (`lstat` precedes every
build, so that takes an edit between a commit and the removal of the tree before it). The full
check of contents (`verify`) sees it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from operator import sub
from pathlib import Path
from typing import BinaryIO

import zstandard

from casync_updater.errors import ContentError, LocalError
from casync_updater.formats.archive import HEADER, Node, decode_node
from casync_updater.formats.index import Index

DIRECTORY, END, FILE, LINK, SPECIAL = range(1, 6)
"""What a node is; END is a directory's GOODBYE."""

DIGEST_SIZE = 32
"""Bytes of the digest of a file's content; casync's mtree shows all of them."""

_BLOCK = 1 << 18
_LEAST_BLOCK = 1 << 16
"""A block of an old record that is taken over as it is has this size at least, so that blocks
do not become small in the course of many updates."""
_LENGTH = 8
_MAGIC = b"casync-updater record 2\n"
_ONE_SIZE_OF_BLOCK = b"casync-updater record 1\n"
"""How a record began whose blocks all had one size, and whose readers relied on that."""
_INDEX = struct.Struct("<QQQQ")


def kind_of(mode: int) -> int:
    """A node's kind from its mode in the archive."""
    if stat.S_ISREG(mode):
        return FILE
    if stat.S_ISDIR(mode):
        return DIRECTORY
    return LINK if stat.S_ISLNK(mode) else SPECIAL


@dataclass(frozen=True, slots=True)
class Window:
    """A time in which this project itself touched the inodes of an installed tree.

    Nanoseconds, by the file system's own clock, both ends included.
    """

    begin: int
    end: int


def file_system_time(directory: int) -> int:
    """Now in nanoseconds, by the clock that stamps ctimes where this open directory lies."""
    found = os.stat(directory)
    os.utime(directory, ns=(found.st_atime_ns, found.st_mtime_ns))
    return os.stat(directory).st_ctime_ns


class Blocks:
    """The skeleton: compressed in blocks, read anywhere, two blocks unpacked at a time."""

    def __init__(self, frames: list[bytes]) -> None:
        """Read how large the blocks are.

        Raises:
            ValueError: a frame does not say so, or is too large.
        """
        self.frames = frames
        sizes = [zstandard.frame_content_size(frame) for frame in frames]
        if not all(0 < size <= _BLOCK for size in sizes):
            raise ValueError("a block of it has an impossible size")
        self._starts = array("Q", accumulate(sizes, initial=0))
        self._unpacked: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        """Bytes of the skeleton."""
        return self._starts[-1]

    def read(self, start: int, end: int) -> bytes:
        """The bytes from start to end."""
        number = bisect_right(self._starts, start) - 1
        base = self._starts[number]
        block = self._unpacked.get(number) or self._unpack(number)
        if end <= base + len(block):
            return block[start - base : end - base]
        out = bytearray(block[start - base :])
        while len(out) < end - start:
            number += 1
            out += self._unpack(number)[: end - self._starts[number]]
        return bytes(out)

    def whole(self, start: int, end: int) -> bytes | None:
        """The frame of the block that begins here and does not reach beyond the end, if any."""
        number = bisect_right(self._starts, start) - 1
        if self._starts[number] != start or not start < self._starts[number + 1] <= end:
            return None
        return self.frames[number]

    def stop(self, start: int) -> int:
        """Where the block that has this place ends."""
        return self._starts[bisect_right(self._starts, start)]

    def _unpack(self, number: int) -> bytes:
        block = self._unpacked.get(number)
        if block is None:
            block = zstandard.ZstdDecompressor().decompress(self.frames[number])
            if len(self._unpacked) > 1:
                self._unpacked.pop(next(iter(self._unpacked)))
            self._unpacked[number] = block
        return block


@dataclass(slots=True)
class Record:
    """What is known about an installed tree; see the module's description."""

    index: Index
    kinds: bytearray
    starts: array[int]
    """Where each node begins in the stream; one more for the stream's end."""
    places: array[int]
    """Where each node begins in the skeleton; one more for the skeleton's end."""
    spans: array[int]
    """Nodes from a directory up to and with its END; 1 for others."""
    parents: array[int]
    """The directory a node is in; an END is in the directory it closes; the root in itself."""
    inodes: array[int]
    mtimes: array[int]
    ctimes: array[int]
    modes: array[int]
    """``st_mode`` in the tree, not in the archive."""
    skeleton: Blocks

    def __len__(self) -> int:
        return len(self.kinds)

    def raw(self, node: int) -> bytes:
        """A node's bytes in the stream, without a file's content."""
        end = self.places[node + 1] - (DIGEST_SIZE if self.kinds[node] == FILE else 0)
        return self.skeleton.read(self.places[node], end)

    def name(self, node: int) -> bytes:
        """A node's name; empty for the root and for ENDs."""
        if not node or self.kinds[node] == END:
            return b""
        place = self.places[node]
        head = self.skeleton.read(place, place + HEADER.size)
        return self.skeleton.read(place + HEADER.size, place + HEADER.unpack(head)[0] - 1)

    def path(self, node: int) -> bytes:
        """A node's path below the root; ``.`` for the root."""
        parts = []
        while node:
            parts.append(self.name(node))
            node = self.parents[node]
        return b"/".join(reversed(parts)) or b"."

    def decode(self, node: int) -> Node:
        """A node's metadata. Its `Node.size` is right, its `Node.start` is not."""
        return decode_node(self.raw(node), self.index.flags, root=not node)

    def digest(self, node: int) -> bytes:
        """The digest of a file's content."""
        end = self.places[node + 1]
        return self.skeleton.read(end - DIGEST_SIZE, end)

    def content(self, node: int) -> tuple[int, int]:
        """Where a file's content lies in the stream: start and end."""
        place, end = self.places[node], self.starts[node + 1]
        return self.starts[node] + self.places[node + 1] - DIGEST_SIZE - place, end

    def at(self, position: int) -> int:
        """The node that this offset of the stream belongs to."""
        return bisect_right(self.starts, position) - 1

    def pieces(self, start: int, end: int) -> Iterator[bytes | tuple[int, int, int]]:
        """What stands in a range of the stream: bytes, or (file, offset in it, count)."""
        node = self.at(start)
        while start < end:
            begin, limit = self.starts[node], min(end, self.starts[node + 1])
            is_file = self.kinds[node] == FILE
            content = self.content(node)[0] if is_file else self.starts[node + 1]
            if start < content:
                place = self.places[node] - begin
                stop = min(limit, content)
                yield self.skeleton.read(place + start, place + stop)
                start = stop
            if start < limit:
                yield node, start - content, limit - start
                start = limit
            node += 1

    def literal(self, start: int, end: int) -> bytes | None:
        """A range of the stream that takes no file's content; None where it does."""
        out = b""
        for piece in self.pieces(start, end):
            if isinstance(piece, tuple):
                return None
            out += piece
        return out

    def trusted(self, node: int, found: os.stat_result, windows: tuple[Window, ...]) -> bool:
        """Whether what `lstat` found is the node as it was installed."""
        ctime = found.st_ctime_ns
        return self.unchanged(node, found) and (
            ctime == self.ctimes[node]
            or any(window.begin <= ctime <= window.end for window in windows)
        )

    def unchanged(self, node: int, found: os.stat_result) -> bool:
        """Whether a node is still what it was when it was last checked, but for its ctime."""
        return (
            found.st_mtime_ns == self.mtimes[node]
            and found.st_ino == self.inodes[node]
            and found.st_mode == self.modes[node]
            and (self.kinds[node] != FILE or found.st_size == self.size(node))
        )

    def stamp(self, node: int, found: os.stat_result) -> None:
        """Remember what `lstat` says about a node whose content was found to be right."""
        self.inodes[node] = found.st_ino
        self.mtimes[node] = found.st_mtime_ns
        self.ctimes[node] = found.st_ctime_ns
        self.modes[node] = found.st_mode

    def size(self, node: int) -> int:
        """Bytes of a file's content."""
        start, end = self.content(node)
        return end - start

    def packed(self) -> Iterator[bytes]:
        """The file that `load` reads, piece by piece."""
        digest = hashlib.sha256()
        yield _MAGIC
        for part in self._parts():
            head = len(part).to_bytes(_LENGTH, "little")
            digest.update(head)
            digest.update(part)
            yield head
            yield part
        yield bytes(_LENGTH)
        yield digest.digest()

    def _parts(self) -> Iterator[bytes]:
        """What a record's file consists of, one part after the other; none is empty."""
        index = self.index
        yield _INDEX.pack(index.flags, index.chunk_min, index.chunk_avg, index.chunk_max)
        compress = zstandard.ZstdCompressor(level=3).compress
        yield compress(index.table)
        yield compress(self.kinds)
        for column in (self.starts, self.places):
            yield compress(_delta(column).tobytes())
        for column in (
            self.spans,
            self.parents,
            self.inodes,
            self.mtimes,
            self.ctimes,
            self.modes,
        ):
            yield compress(column.tobytes())
        yield self.skeleton.size.to_bytes(_LENGTH, "little")
        yield from self.skeleton.frames


def load(path: Path) -> Record | None:
    """Read a record; None where there is none.

    Raises:
        ContentError: it is damaged, and has to be made again from the tree.
        LocalError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _parse(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, StopIteration, struct.error, zstandard.ZstdError) as error:
        raise ContentError(f"{path} is damaged or cut off: {error}") from error


def _parse(file: BinaryIO) -> Record:
    if file.read(len(_MAGIC)) not in (_MAGIC, _ONE_SIZE_OF_BLOCK):
        raise ValueError("it is no record")
    parts = iter(_checked_parts(file))

    def column(code: str) -> array[int]:
        out = array(code)
        out.frombytes(unpack(next(parts)))
        return out

    unpack = zstandard.ZstdDecompressor().decompress
    flags, chunk_min, chunk_avg, chunk_max = _INDEX.unpack(next(parts))
    index = Index(flags, chunk_min, chunk_avg, chunk_max, unpack(next(parts)))
    kinds = bytearray(unpack(next(parts)))
    starts, places = _sum(column("Q")), _sum(column("Q"))
    spans, parents = column("I"), column("I")
    inodes, mtimes, ctimes, modes = column("Q"), column("q"), column("q"), column("I")
    size = int.from_bytes(next(parts), "little")
    skeleton = Blocks(list(parts))
    if skeleton.size != size:
        raise ValueError("its skeleton has another size than it says")
    return Record(
        index, kinds, starts, places, spans, parents, inodes, mtimes, ctimes, modes, skeleton
    )


def _checked_parts(file: BinaryIO) -> list[bytes]:
    """A record's parts, known to be what was written: a damaged length could be any memory."""
    digest = hashlib.sha256()
    left = os.fstat(file.fileno()).st_size
    parts: list[bytes] = []
    while True:
        head = file.read(_LENGTH)
        size = int.from_bytes(head, "little")
        if len(head) < _LENGTH or size > left:
            raise ValueError("it ends early")
        if not size:
            break
        parts.append(file.read(size))
        digest.update(head)
        digest.update(parts[-1])
    if file.read() != digest.digest():
        raise ValueError("its checksum is wrong")
    return parts


def _delta(column: array[int]) -> array[int]:
    """Differences, which compress far better than what they are the differences of."""
    return array("Q", map(sub, column[1:], column))


def _sum(differences: array[int]) -> array[int]:
    return array("Q", accumulate(differences, initial=0))


class RecordWriter:
    """Makes a record while a stream goes by, from its first byte to its last."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._frames: list[bytes] = []
        self._block = bytearray()
        self._size = 0
        self._compress = zstandard.ZstdCompressor(level=3).compress
        self._open: list[int] = []
        self.kinds = bytearray()
        self.starts, self.places = array("Q"), array("Q")
        self.spans, self.parents = array("I"), array("I")
        self.inodes, self.mtimes, self.ctimes = array("Q"), array("q"), array("q")
        self.modes = array("I")

    def add(self, node: Node, kind: int) -> int:
        """A node that was parsed; a file's digest follows with `digest`. Its number."""
        number = len(self.kinds)
        parent = self._open[-1] if self._open else 0
        self.kinds.append(kind)
        self.starts.append(node.start)
        self.places.append(self._size)
        self.spans.append(1)
        self.parents.append(parent)
        for column in (self.inodes, self.mtimes, self.ctimes, self.modes):
            column.append(0)
        self._append(node.raw)
        if kind == DIRECTORY:
            self._open.append(number)
        elif kind == END:
            self.close(number)
        return number

    def digest(self, digest: bytes) -> None:
        """The digest of the content of the file that was added last."""
        self._append(digest)

    def copy(self, old: Record, first: int, last: int, start: int) -> int:
        """Nodes of an old record, which begin here at offset `start` of the new stream.

        The caller goes over them, reports directories with `open` and `close`, and every
        other node's parent with `adopt`.

        Returns:
            The number of the first one.
        """
        number = len(self.kinds)
        self.kinds += old.kinds[first:last]
        move = (start - old.starts[first]).__add__
        self.starts.extend(map(move, old.starts[first:last]))
        move = (self._size - old.places[first]).__add__
        self.places.extend(map(move, old.places[first:last]))
        self.spans += old.spans[first:last]
        self.parents += old.parents[first:last]
        self.inodes += old.inodes[first:last]
        self.mtimes += old.mtimes[first:last]
        self.ctimes += old.ctimes[first:last]
        self.modes += old.modes[first:last]
        place, end = old.places[first], old.places[last]
        while place < end:
            stop = min(end, old.skeleton.stop(place))
            frame = old.skeleton.whole(place, end)
            if frame is None or stop - place < _LEAST_BLOCK:
                self._append(old.skeleton.read(place, stop))
            elif 0 < len(self._block) < _LEAST_BLOCK:
                # The little that is pending goes along with this one; the next is taken over.
                self._block += old.skeleton.read(place, stop)
                self._size += stop - place
                if len(self._block) > _BLOCK:
                    self._cut(len(self._block) // 2)
                self._flush()
            else:
                self._flush()
                self._frames.append(frame)
                self._size += stop - place
            place = stop
        return number

    def open(self, number: int) -> None:
        """A copied node is a directory that is open now."""
        self.parents[number] = self._open[-1]
        self._open.append(number)

    def close(self, number: int) -> None:
        """A node is the END of the directory that is open."""
        directory = self._open.pop()
        self.parents[number] = directory
        self.spans[directory] = number - directory + 1

    def adopt(self, number: int) -> None:
        """A copied node is in the directory that is open."""
        self.parents[number] = self._open[-1]

    def stamp(self, number: int, found: os.stat_result) -> None:
        """What `lstat` says about a node of the new tree."""
        self.inodes[number] = found.st_ino
        self.mtimes[number] = found.st_mtime_ns
        self.ctimes[number] = found.st_ctime_ns
        self.modes[number] = found.st_mode

    def finish(self) -> Record:
        """The record, after the last node."""
        assert not self._open
        self._flush()
        self.starts.append(self._index.size)
        self.places.append(self._size)
        return Record(
            self._index,
            self.kinds,
            self.starts,
            self.places,
            self.spans,
            self.parents,
            self.inodes,
            self.mtimes,
            self.ctimes,
            self.modes,
            Blocks(self._frames),
        )

    def _flush(self) -> None:
        if self._block:
            self._cut(len(self._block))

    def _cut(self, size: int) -> None:
        """Compress so many of the bytes that are pending."""
        self._frames.append(self._compress(self._block[:size]))
        del self._block[:size]

    def _append(self, data: bytes) -> None:
        block = self._block
        block += data
        self._size += len(data)
        while len(block) >= _BLOCK:
            self._cut(_BLOCK)

"""Make a record again for a tree that has none: an adopted one, or one whose record was lost."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable

from casync_updater.cycle.extract.plan import chunk_ends, chunk_id
from casync_updater.cycle.extract.tree import visit
from casync_updater.errors import ContentError
from casync_updater.formats.archive import Decoder
from casync_updater.formats.index import Index
from casync_updater.formats.record import (
    END,
    FILE,
    Record,
    RecordWriter,
    file_system_time,
    kind_of,
)


def rebuild_record(
    index: Index,
    pieces: Iterable[bytes],
    root: int,
    *,
    progress: Callable[[int], object] = lambda done: None,
) -> Record:
    """Make the record of a tree from its archive stream.

    Args:
        index: what the tree is said to be.
        pieces: the archive as ``casync make - DIR`` writes it with the features of the index.
        root: the tree, an open directory.
        progress: called with the bytes that are behind.

    Raises:
        ContentError: the tree is not what the index describes.
    """
    begin = file_system_time(root)
    stream = _Checked(index, iter(pieces))
    decoder = Decoder(stream, index.flags)
    writer = RecordWriter(index)
    while True:
        node = decoder.next()
        kind = kind_of(node.mode) if node.mode else END
        writer.add(node, kind)
        if kind == FILE:
            digest = hashlib.new(index.hash_name)
            left = node.size
            while left:
                data = stream.some(left)
                digest.update(data)
                left -= len(data)
            writer.digest(digest.digest())
        progress(stream.position)
        if not decoder.frames:
            break
    stream.finish()
    record = writer.finish()
    _stamp(record, root, begin)
    return record


def _stamp(record: Record, root: int, begin: int) -> None:
    """Take the `lstat` of every node; who changed after the beginning is not trusted later."""
    for node, name, folder in visit(record, root):
        if not name or folder < 0:
            continue
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            continue
        if found.st_ctime_ns < begin or stat.S_ISDIR(found.st_mode):
            record.stamp(node, found)


class _Checked:
    """A stream (`archive.Feed`) that is held against the chunk ids of an index."""

    def __init__(self, index: Index, pieces: Iterable[bytes]) -> None:
        self.position = 0
        self._index = index
        self._pieces = iter(pieces)
        self._ends = chunk_ends(index)
        self._number = 0
        self._pending = bytearray()
        """What was read and belongs to no whole chunk yet."""
        self._buffer = b""
        self._base = 0

    def peek(self, count: int) -> tuple[bytes, int]:
        """See `archive.Feed.peek`."""
        while self._base + len(self._buffer) < self.position + count:
            behind = self.position - self._base
            self._buffer = self._buffer[behind:] + self._chunk()
            self._base += behind
        return self._buffer, self.position - self._base

    def some(self, limit: int) -> bytes:
        """The next bytes, at least one."""
        buffer, at = self.peek(1)
        data = buffer[at : at + limit]
        self.position += len(data)
        return data

    def finish(self) -> None:
        """Nothing may be left, in the index or in the stream.

        Raises:
            ContentError: something is.
        """
        more = next(self._pieces, None)
        if more or self._pending or self.position != self._index.size:
            raise ContentError("the tree is longer or shorter than its index says")

    def _chunk(self) -> bytes:
        if self._number == len(self._ends):
            raise ContentError("the tree is longer than its index says")
        start = self._ends[self._number - 1] if self._number else 0
        size = self._ends[self._number] - start
        while len(self._pending) < size:
            piece = next(self._pieces, None)
            if not piece:
                raise ContentError("the tree is shorter than its index says")
            self._pending += piece
        data = bytes(self._pending[:size])
        del self._pending[:size]
        if self._index.chunk_id(data) != chunk_id(self._index, self._number):
            raise ContentError(
                "the tree is not what its index says, in the archive's bytes"
                f" {start} to {start + size}"
            )
        self._number += 1
        return data

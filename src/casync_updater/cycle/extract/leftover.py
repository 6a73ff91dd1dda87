"""What a build that was cut off leaves for the next try.

A staged tree alone does not say which chunks are in it: most chunks are parts of several files
and of the records between them. So a build keeps a journal beside the tree: the index, and each
node that it had to parse, with its place in the stream and without its content. What has been
fetched and is not in the journal is in a file of the tree, finished or not. The next try makes
chunks from both and checks each by its id, so whatever a power cut tore is fetched again and
nothing else is. Nothing is ever linked or taken over from such a tree unread.

The journal is written whenever the build turns to another chunk, and never synced.
"""

import mmap
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from casync_updater.cycle.extract.tree import TreeFiles
from casync_updater.formats.archive import Node
from casync_updater.formats.index import Index

_MAGIC = b"casync-updater journal 1\n"
_SIZE = struct.Struct("<Q")
_NODE = struct.Struct("<QQII")
"""Offset in the stream, size of the content, lengths of the path and of the node's own bytes."""
_CHUNK = struct.Struct("<Q32s")


class Journal:
    """Writes down what a build parses."""

    def __init__(self, file: int, index: Index) -> None:
        self._file = file
        self._pending = bytearray(_MAGIC + _SIZE.pack(len(index.table)) + index.table)

    def add(self, node: Node, path: bytes) -> None:
        """A node was parsed; its content, if it has any, follows in the stream."""
        self._pending += _NODE.pack(node.start, node.size, len(path), len(node.raw))
        self._pending += path
        self._pending += node.raw

    def flush(self) -> None:
        """Hand what is pending to the kernel."""
        while self._pending:
            del self._pending[: os.write(self._file, self._pending)]


class Leftover:
    """A staged tree that was not finished, with its journal."""

    def __init__(self, journal: Path, root: int) -> None:
        """Read a journal as far as it is whole; without one, the tree is of no use.

        Args:
            journal: the journal's path.
            root: an open descriptor of the tree.
        """
        self._starts = array("Q")
        self._ends = array("Q")
        self._places = array("Q")
        self._data: mmap.mmap | bytes = b""
        self.chunks: dict[bytes, tuple[int, int]] = {}
        """The chunks it may have: their ids, and where they began and ended in its stream."""
        self._root = root
        self._files = TreeFiles(self, root)
        try:
            with journal.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            return
        self._read()

    def read(self, chunk: bytes) -> bytes | None:
        """The bytes that should be a chunk's; its id was not checked."""
        start, end = self.chunks[chunk]
        return self._files.stream(start, end)

    def close(self) -> None:
        """Give back files."""
        self._files.close()

    def pieces(self, start: int, end: int) -> Iterator[bytes | tuple[int, int, int]]:
        """See `Record.pieces`."""
        node = bisect_right(self._starts, start) - 1
        while start < end:
            size, path_length, raw_length = self._head(node)
            place = self._places[node] + _NODE.size + path_length - self._starts[node]
            content = self._starts[node] + raw_length
            if start < content:
                stop = min(end, content)
                yield bytes(self._data[place + start : place + stop])
                start = stop
            if start < end and size:
                stop = min(end, self._ends[node])
                yield node, start - content, stop - start
                start = stop
            node += 1

    def path(self, node: int) -> bytes:
        """See `Record.path`."""
        place = self._places[node] + _NODE.size
        return bytes(self._data[place : place + self._head(node)[1]])

    def _head(self, node: int) -> tuple[int, int, int]:
        _, size, path_length, raw_length = _NODE.unpack_from(self._data, self._places[node])
        return size, path_length, raw_length

    def _read(self) -> None:
        data, length = self._data, len(self._data)
        at = len(_MAGIC) + _SIZE.size
        if length < at or data[: len(_MAGIC)] != _MAGIC:
            return
        table = at
        at += _SIZE.unpack_from(data, len(_MAGIC))[0]
        body = at
        while at + _NODE.size <= length:
            start, size, path_length, raw_length = _NODE.unpack_from(data, at)
            stop = at + _NODE.size + path_length + raw_length
            place = at + _NODE.size
            path = bytes(data[place : place + path_length])
            # A torn tail is no node: zeros, or a place that does not rise.
            if stop > length or not raw_length or (self._ends and start < self._ends[-1]):
                break
            if start + raw_length + size >> 63 or b"\0" in path:
                break
            if size:
                # What was cut off is the last file, usually a large one: its other chunks are
                # not here, and whoever is sent for them is not fetched ahead.
                size = min(size, self._written(path))
            self._starts.append(start)
            self._ends.append(start + raw_length + size)
            self._places.append(at)
            at = stop
        if self._starts and body <= length:
            self._find_chunks(bytes(data[table:body]))

    def _written(self, path: bytes) -> int:
        try:
            return os.stat(path, dir_fd=self._root, follow_symlinks=False).st_size
        except OSError:
            return 0

    def _find_chunks(self, table: bytes) -> None:
        """Note the chunks that lie in nodes of the journal without a gap."""
        whole = len(table) // _CHUNK.size * _CHUNK.size
        start = 0
        node = 0
        last = len(self._starts) - 1
        for end, chunk in _CHUNK.iter_unpack(table[:whole]):
            while node < last and self._ends[node] <= start:
                node += 1
            covered = self._starts[node] <= start
            reach = node
            while reach < last and self._ends[reach] < end:
                covered = covered and self._ends[reach] == self._starts[reach + 1]
                reach += 1
            if covered and self._ends[reach] >= end:
                self.chunks.setdefault(chunk, (start, end))
            start = end

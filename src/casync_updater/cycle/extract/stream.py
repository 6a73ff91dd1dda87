"""The bytes of the new archive, from wherever each chunk is: the old tree, a leftover, the net."""

import hashlib
import os

from casync_updater.cycle.extract.leftover import Journal
from casync_updater.cycle.extract.plan import FETCH, ExtractPlan, chunk_at
from casync_updater.cycle.extract.tree import TreeFiles, read_exactly
from casync_updater.errors import ContentError
from casync_updater.model import ChunkRef
from casync_updater.sources.base import Chunks


class Stream:
    """The new stream (`archive.Feed`): chunks from the old tree, or fetched, as they are met."""

    def __init__(
        self, plan: ExtractPlan, chunks: Chunks, root: int, journal: Journal | None
    ) -> None:
        self.position = 0
        self.journal = journal
        self.fetched = 0
        self._plan = plan
        self._chunks = chunks
        self._root = root
        self._stream = iter(chunks.stream(plan.refs()))
        self._repeats = dict(plan.repeats)
        self._spool: dict[bytes, tuple[int, int]] = {}
        self._spool_file = -1
        self._files = TreeFiles(plan.old.record, plan.old.root) if plan.old else None
        self._buffer = b""
        self._base = 0
        complete = all(local < 0 for local in plan.local)
        self.digest = hashlib.new(plan.index.hash_name) if complete else None
        """The digest of the stream, where all of it goes by."""

    def close(self) -> None:
        """Give back files."""
        if self._files is not None:
            self._files.close()
        if self._spool_file >= 0:
            os.close(self._spool_file)

    def peek(self, count: int) -> tuple[bytes, int]:
        """See `archive.Feed.peek`."""
        start = self.position
        at = start - self._base
        if at >= 0 and at + count <= len(self._buffer):
            return self._buffer, at
        end = start + count
        if end > self._plan.index.size:
            raise ContentError(
                f"the archive is damaged: it ends at {self._plan.index.size}, inside of something"
            )
        out = b""
        while start < end:
            number = chunk_at(self._plan.ends, start)
            stop = min(end, self._plan.ends[number])
            out += self._known(number, start, stop) or self._read(start, stop)
            start = stop
        return out, 0

    def piece(self, end: int) -> bytes:
        """The bytes from the position up to `end`, at most up to the end of their chunk."""
        start = self.position
        return self._read(start, min(end, self._plan.ends[chunk_at(self._plan.ends, start)]))

    def _known(self, number: int, start: int, end: int) -> bytes | None:
        """Bytes of an unchanged chunk that the old record itself has."""
        plan = self._plan
        local = plan.local[number]
        if local < 0 or plan.old is None:
            return None
        move = plan.old.start(local) - plan.start(number)
        return plan.old.record.literal(start + move, end + move)

    def _read(self, start: int, end: int) -> bytes:
        """Bytes out of whole chunks. What lies before the position is forgotten."""
        if not self._base <= start <= self._base + len(self._buffer):
            number = chunk_at(self._plan.ends, start)
            self._buffer, self._base = self._chunk(number), self._plan.start(number)
        while (limit := self._base + len(self._buffer)) < end:
            behind = min(max(self.position - self._base, 0), len(self._buffer))
            chunk = self._chunk(chunk_at(self._plan.ends, limit))
            self._buffer = self._buffer[behind:] + chunk
            self._base += behind
        return self._buffer[start - self._base : end - self._base]

    def _chunk(self, number: int) -> bytes:
        """A chunk's bytes, wherever they are."""
        plan = self._plan
        ref = plan.ref(number)
        local = plan.local[number]
        if self.journal is not None:
            self.journal.flush()
        if local < 0:
            made = self._next(ref) if local == FETCH else self._left_over(ref)
            if self.digest is not None:
                self.digest.update(made)
            return made
        assert self._files is not None
        assert plan.old is not None
        start = plan.old.start(local)
        data = self._files.stream(start, start + ref.size)
        if data is None or plan.index.chunk_id(data) != ref.id:
            # Changed since the plan was made, or an edit that lstat does not show.
            data = self._get(ref)
        return data

    def _left_over(self, ref: ChunkRef) -> bytes:
        """A chunk out of a tree that an earlier try left, as far as it is whole."""
        for leftover in self._plan.leftovers:
            if ref.id in leftover.chunks:
                data = leftover.read(ref.id)
                if data is not None and self._plan.index.chunk_id(data) == ref.id:
                    return data
        return self._get(ref)

    def _get(self, ref: ChunkRef) -> bytes:
        """A chunk that the plan did not think would have to be fetched."""
        data = self._chunks.get(ref)
        self.fetched += ref.size
        return data

    def _next(self, ref: ChunkRef) -> bytes:
        """The next fetched chunk, or one that came by already."""
        if ref.id in self._spool:
            offset, size = self._spool[ref.id]
            return read_exactly(self._spool_file, offset, size)
        found = next(self._stream, None)
        if found is None or found[0] != ref or len(found[1]) != ref.size:
            raise AssertionError(f"chunk {ref.hex} was asked for and another one came")
        data = found[1]
        self.fetched += ref.size
        if ref.id in self._repeats:
            if self._spool_file < 0:
                self._spool_file = _nameless_file(self._root)
            offset = os.lseek(self._spool_file, 0, os.SEEK_END)
            write_all(self._spool_file, data, offset)
            self._spool[ref.id] = (offset, len(data))
        return data


def _nameless_file(directory: int) -> int:
    """A file that nobody else sees, on the disk and not in memory."""
    mode = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(".", mode | os.O_TMPFILE, 0o600, dir_fd=directory)
    except OSError:
        # Not every file system can do that.
        name = ".casync-updater-spool"
        file = os.open(name, mode | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        os.unlink(name, dir_fd=directory)
        return file


def write_all(file: int, data: bytes, offset: int) -> None:
    """Write at an offset of a file; a short write goes on."""
    done = os.pwrite(file, data, offset)
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)

"""Chunks, whoever has them: the device itself, a drive, a web server; nearest first.

A chunk that is missing or damaged in one place is taken from the next one. A place that fails
as a whole (a drive that was pulled out, a server that is down) is left out after a few failures.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from casync_updater.errors import (
    ContentError,
    MissingError,
    PortalError,
    RemoteError,
    UpdaterError,
)
from casync_updater.formats.index import Index
from casync_updater.formats.store import content, file_limit
from casync_updater.model import ChunkRef
from casync_updater.sources.base import Source, shown

_PATIENCE = 3
"""Failures in a row, each after the source's own retries, after which it is left out."""
_AHEAD = 512 << 10
"""Bytes that are fetched ahead per connection: two chunks of casync's usual maximum."""
_AHEAD_CHUNKS = 64
"""Chunks that are fetched ahead per connection, where they are tiny or all the same."""
_END = 0.5
"""Seconds that threads get to end; one that is held by a file system is left behind."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was fetched so far."""

    chunks: int
    """How many chunks came from the sources."""
    size: int
    """Their bytes, uncompressed."""
    local: int
    """How many chunks the device had itself."""
    received: tuple[int, ...]
    """Bytes of chunk files (as they came over the wire) per source, nearest first."""


class _Link:
    """A source in the chain, and what is remembered about it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.where = shown(source.location.store)
        self.failures = 0
        self.received = 0


class _Slot:
    """A chunk that is fetched, or will be; one for everybody in the window who wants it."""

    def __init__(self, ref: ChunkRef) -> None:
        self.ref = ref
        self.users = 0
        self.ready = threading.Event()
        self.data: bytes | None = None
        self.error: BaseException | None = None


class Chunks:
    """The chunks of one index. A context manager: leaving it ends what is under way.

    Args:
        sources: where chunks come from, nearest first; they stay open.
        index: whose chunks; verifies each one.
        connections: how many chunks are fetched side by side.
        local: what the device can make of its own files, asked first, by several threads;
            None (or wrong bytes) where it cannot.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        index: Index,
        *,
        connections: int,
        local: Callable[[ChunkRef], bytes | None] | None = None,
    ) -> None:
        self._links = [_Link(source) for source in sources]
        self._index = index
        self._connections = connections
        self._local = local
        self._lock = threading.Lock()
        self._streams: set[_Workers] = set()
        self._chunks = self._size = self._own = 0

    def get(self, ref: ChunkRef) -> bytes:
        """One chunk, verified.

        Raises:
            ContentError: there are only wrong bytes.
            MissingError: no source has it.
            RemoteError: a source that may have it could not be asked.
        """
        if self._local is not None:
            data = self._local(ref)
            if data is not None and self._index.chunk_id(data) == ref.id:
                with self._lock:
                    self._own += 1
                return data
        failures: list[UpdaterError] = []
        for link in self._links:
            if link.failures >= _PATIENCE:
                failures.append(RemoteError(f"{link.where} is left out after {_PATIENCE} failures"))
                continue
            try:
                return self._fetch(link, ref)
            except (RemoteError, ContentError) as error:
                failures.append(error)
        raise _failure(ref, failures)

    def _fetch(self, link: _Link, ref: ChunkRef) -> bytes:
        try:
            raw = link.source.chunk(ref.hex, limit=file_limit(ref.size))
        except MissingError:
            raise
        except RemoteError:
            with self._lock:
                link.failures += 1
            raise
        data = content(raw, ref, self._index, f"chunk {ref.hex} at {link.where}")
        with self._lock:
            link.failures = 0
            link.received += len(raw)
            self._chunks += 1
            self._size += len(data)
        return data

    def stream(self, wanted: Iterable[ChunkRef]) -> Generator[tuple[ChunkRef, bytes], None, None]:
        """Chunks in the order they are wanted, verified, fetched ahead side by side.

        What is ahead is bounded, in chunks and in bytes. An id that is wanted again while it is
        ahead is fetched once. Close the generator (`contextlib.closing`) where it may not be
        read to its end: its threads end then.

        Raises:
            UpdaterError: see `get`; when the chunk's turn comes.
        """
        with _Workers(self, self._connections) as workers:
            with self._lock:
                self._streams.add(workers)
            try:
                yield from self._in_order(iter(wanted), workers)
            finally:
                with self._lock:
                    self._streams.discard(workers)

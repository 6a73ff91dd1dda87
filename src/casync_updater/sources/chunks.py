"""Chunks, whoever has them: a drive, a web server; nearest first.

A chunk that is missing or damaged in one place is taken from the next one. A place that fails
as a whole (a drive that was pulled out, a server that is down) is left out after a few failures.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
_FEW = 8
"""Connections (no more than are allowed) that are used however near a source is."""
_RATE = 12_500_000
"""Bytes per second that the connections are to carry together, if each waits for its answer."""
_COMPRESSED = 0.33
"""What compression leaves of a chunk, rather less than on average."""
_AHEAD, _AHEAD_LIMIT = 4, 256 << 10
"""What is fetched ahead per connection: so many average chunks, but no more than so many bytes."""
_AHEAD_CHUNKS = 64
"""Chunks that are fetched ahead per connection, where they are tiny or all the same."""
_ENDED = "the download was ended"
_END = 0.5
"""Seconds that threads get to end; one that is held by a file system is left behind."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came from one source."""

    where: str
    chunks: int
    size: int
    """Bytes of the chunks' files, as they came over the wire."""

    def __str__(self) -> str:
        return f"{self.size / 1e6:.1f} MB in {self.chunks} chunks from {self.where}"


class _Link:
    """A source in the chain, and what is remembered about it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.where = shown(source.location.store)
        self.failures = 0
        self.last: UpdaterError | None = None
        self.chunks = self.size = 0

    def left_out(self) -> UpdaterError:
        kind = PortalError if isinstance(self.last, PortalError) else RemoteError
        return kind(
            f"{self.where} is left out after {self.failures} failures, the last one: {self.last}"
        )


class _Slot:
    """A chunk that is fetched, or will be; one for everybody in the window who wants it."""

    def __init__(self, ref: ChunkRef) -> None:
        self.ref = ref
        self.users = 0
        self.ready = threading.Event()
        self.data: bytes | None = None
        self.error: BaseException | None = None

    def succeed(self, data: bytes) -> None:
        self.data = data
        self.ready.set()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.ready.set()

    def result(self) -> bytes:
        """Wait for it."""
        self.ready.wait()
        if self.error is not None:
            raise self.error
        assert self.data is not None
        return self.data


class Chunks:
    """The chunks of one index. A context manager: leaving it ends what is under way.

    Args:
        sources: where chunks come from, nearest first; they stay open.
        index: whose chunks; verifies each one.
        connections: how many chunks are fetched side by side at most. As each connection waits
            for an answer before it asks again, a long way to the source takes many of them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        index: Index,
        *,
        connections: int,
    ) -> None:
        self._links = [_Link(source) for source in sources]
        self._index = index
        self._connections = connections
        self._lock = threading.Lock()
        self._streams: set[_Workers] = set()

    def get(self, ref: ChunkRef) -> bytes:
        """One chunk, verified.

        Raises:
            ContentError: there are only wrong bytes.
            MissingError: no source has it.
            RemoteError: a source that may have it could not be asked.
        """
        return self._get(ref, threading.Event())

    def _get(self, ref: ChunkRef, ended: threading.Event) -> bytes:
        failures: list[UpdaterError] = []
        for link in self._links:
            if ended.is_set():
                raise RemoteError(_ENDED)
            if link.failures >= _PATIENCE:
                failures.append(link.left_out())
                continue
            try:
                return self._fetch(link, ref)
            except (RemoteError, ContentError) as error:
                failures.append(error)
                if not isinstance(error, ContentError | MissingError) and not ended.is_set():
                    with self._lock:
                        link.failures += 1
                        link.last = error
        raise _failure(ref, failures)

    def _fetch(self, link: _Link, ref: ChunkRef) -> bytes:
        raw = link.source.chunk(ref.hex, limit=file_limit(ref.size))
        data = content(raw, ref, self._index, f"chunk {ref.hex} at {link.where}")
        with self._lock:
            link.failures = 0
            link.chunks += 1
            link.size += len(raw)
        return data

    def stream(self, wanted: Iterable[ChunkRef]) -> Generator[tuple[ChunkRef, bytes], None, None]:
        """Chunks in the order they are wanted, verified, fetched ahead side by side.

        What is ahead is bounded, in chunks and in bytes. An id that is wanted again while it is
        ahead is fetched once. Close the generator (`contextlib.closing`) where it may not be
        read to its end: its threads end then.

        Raises:
            UpdaterError: see `get`; when the chunk's turn comes.
        """
        with _Workers(self._get, self._abort) as workers:
            with self._lock:
                self._streams.add(workers)
            try:
                yield from self._in_order(iter(wanted), workers)
            finally:
                with self._lock:
                    self._streams.discard(workers)

    def _in_order(
        self, wanted: Iterator[ChunkRef], workers: "_Workers"
    ) -> Iterator[tuple[ChunkRef, bytes]]:
        """The window: what is fetched, or waits for its turn, between the two iterators."""
        window: deque[tuple[ChunkRef, _Slot]] = deque()
        slots: dict[tuple[bytes, int], _Slot] = {}
        ahead, limit = 0, min(_AHEAD * self._index.chunk_avg, _AHEAD_LIMIT)
        coming = next(wanted, None)
        while coming is not None or window:
            count = self._side_by_side()
            while coming is not None and len(window) < _AHEAD_CHUNKS * count:
                slot = slots.get((coming.id, coming.size))
                if slot is None:
                    # One chunk always fits: a store's maximum may be above what is ahead.
                    if window and ahead + coming.size > limit * count:
                        break
                    ahead += coming.size
                    slot = slots[coming.id, coming.size] = workers.submit(coming, count)
                slot.users += 1
                window.append((coming, slot))
                coming = next(wanted, None)
            ref, slot = window.popleft()
            data = slot.result()
            slot.users -= 1
            if not slot.users:
                del slots[ref.id, ref.size]
                ahead -= ref.size
            del slot
            yield ref, data

    def _side_by_side(self) -> int:
        """How many connections fill a fast line, by the round trip that was measured so far."""
        trip = max((link.source.round_trip for link in self._links), default=0.0)
        needed = trip * _RATE / (_COMPRESSED * self._index.chunk_avg)
        return min(self._connections, max(_FEW, int(needed)))

    @property
    def fetched(self) -> tuple[Fetched, ...]:
        """What came so far, from each source, nearest first."""
        with self._lock:
            return tuple(Fetched(link.where, link.chunks, link.size) for link in self._links)

    def close(self) -> None:
        """End every stream, and what it is waiting for."""
        with self._lock:
            streams = tuple(self._streams)
        for workers in streams:
            workers.end()

    def _abort(self) -> None:
        for link in self._links:
            link.source.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Workers:
    """Threads that fetch what is submitted, in that order; leaving the block ends them.

    They are daemon threads: whatever holds one, the process can end.

    Args:
        fetch: gets a chunk; looks at the event now and then, and gives up once it is set.
        abort: makes what `fetch` waits for fail.
    """

    def __init__(
        self,
        fetch: Callable[[ChunkRef, threading.Event], bytes],
        abort: Callable[[], None],
    ) -> None:
        self._fetch = fetch
        self._abort = abort
        self._tasks: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._pending: set[_Slot] = set()
        self._ended = threading.Event()

    def submit(self, ref: ChunkRef, count: int) -> _Slot:
        """Have a chunk fetched, by one of so many threads."""
        slot = _Slot(ref)
        if self._ended.is_set():
            slot.fail(RemoteError(_ENDED))
            return slot
        self._pending.add(slot)
        self._tasks.put(slot)
        # A thread per chunk until there are enough: an update of three needs no sixteen.
        if len(self._threads) < count:
            name = f"chunks-{len(self._threads) + 1}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return slot

    def _run(self) -> None:
        while (slot := self._tasks.get()) is not None and not self._ended.is_set():
            try:
                slot.succeed(self._fetch(slot.ref, self._ended))
            except BaseException as error:
                slot.fail(error)
            self._pending.discard(slot)
            # Not kept until the next one comes: it may be the last reference to its bytes.
            del slot

    def end(self) -> None:
        """Fetch nothing more, and have the threads end, within `_END` seconds."""
        self._ended.set()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _END
        while alive := [thread for thread in self._threads if thread.is_alive()]:
            # Again and again: a thread may have begun a request after it looked at the event.
            if self._pending:
                self._abort()
            left = deadline - time.monotonic()
            if left <= 0:
                break
            alive[0].join(min(left, 0.05))
        for slot in tuple(self._pending):
            slot.fail(RemoteError(_ENDED))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


def _failure(ref: ChunkRef, failures: Sequence[UpdaterError]) -> UpdaterError:
    """What it means that no source gave a chunk."""
    if not failures:
        return MissingError(f"there is no source for chunk {ref.hex}")
    why = "; ".join(str(failure) for failure in failures)
    if any(isinstance(failure, ContentError) for failure in failures):
        return ContentError(
            f"chunk {ref.hex} ({ref.size} bytes) is damaged: {why}; repair the store by"
            " publishing again"
        )
    if all(isinstance(failure, MissingError) for failure in failures):
        return MissingError(
            f"the store lacks chunk {ref.hex} ({ref.size} bytes): {why}; publish again, and see"
            " that the store is uploaded before the index"
        )
    kind = PortalError if any(isinstance(one, PortalError) for one in failures) else RemoteError
    return kind(f"chunk {ref.hex} ({ref.size} bytes) cannot be fetched: {why}")

"""The chain of sources, and chunks fetched ahead."""

import gc
import hashlib
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zstandard

from casync_updater.clock import SystemClock
from casync_updater.errors import (
    ContentError,
    MissingError,
    PortalError,
    RemoteError,
    UpdaterError,
)
from casync_updater.formats.index import SHA512_256, Index
from casync_updater.formats.store import LocalStore, path_of
from casync_updater.model import ChunkRef, FetchSettings, FileRef, Location
from casync_updater.sources import open_source
from casync_updater.sources.base import Document, Validators
from casync_updater.sources.chunks import Chunks, Fetched
from support.webserver import WebServer


class MemorySource:
    """A source whose chunks are in memory, and which does what a test wants with a request."""

    def __init__(self, name: str, chunks: dict[str, bytes]) -> None:
        self.location = Location(f"/{name}/x.caidx", f"/{name}/x.castr")
        self.chunks = chunks
        self.asked: list[str] = []
        self.before: Callable[[str], None] = lambda hex_id: None
        self.aborted = threading.Event()
        self.received = 0
        self.round_trip = 0.0

    def document(
        self, suffix: str, *, limit: int, known: Validators | None = None
    ) -> Document | None:
        raise MissingError(suffix)

    def by_hash(self, ref: FileRef, suffix: str) -> bytes:
        raise MissingError(suffix)

    def chunk(self, hex_id: str, *, limit: int) -> bytes:
        self.asked.append(hex_id)
        self.before(hex_id)
        if hex_id not in self.chunks:
            raise MissingError(f"{self.location.store}/{path_of(hex_id)} does not exist")
        assert len(self.chunks[hex_id]) <= limit
        return self.chunks[hex_id]

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        pass


def index_of(pieces: list[bytes], chunk_max: int = 1 << 20) -> Index:
    table, end = b"", 0
    for piece in pieces:
        end += len(piece)
        table += struct.pack("<Q32s", end, hashlib.new("sha512_256", piece).digest())
    return Index(SHA512_256, 1, 64 << 10, chunk_max, table)


PIECES = [f"chunk {number}".encode() * 50 for number in range(300)]
INDEX = index_of(PIECES)
REFS = list(INDEX)
STORE = {ref.hex: zstandard.compress(piece) for ref, piece in zip(REFS, PIECES, strict=True)}


def raising(error: Exception) -> Callable[[str], None]:
    def fail(hex_id: str) -> None:
        raise error

    return fail


def chunks_from(*sources: MemorySource, connections: int = 4) -> Chunks:
    return Chunks(sources, INDEX, connections=connections)


class TestChain:
    def test_the_nearest_that_has_it(self) -> None:
        near = MemorySource("near", {REFS[0].hex: STORE[REFS[0].hex]})
        far = MemorySource("far", STORE)
        chunks = chunks_from(near, far)
        assert [chunks.get(ref) for ref in REFS[:3]] == PIECES[:3]
        assert far.asked == [REFS[1].hex, REFS[2].hex]
        sizes = [len(STORE[ref.hex]) for ref in REFS[:3]]
        assert chunks.fetched == (
            Fetched("/near/x.castr", 1, sizes[0]),
            Fetched("/far/x.castr", 2, sizes[1] + sizes[2]),
        )
        assert str(Fetched("/near/x.castr", 83, 4_460_000)) == (
            "4.5 MB in 83 chunks from /near/x.castr"
        )

    def test_damage_is_repaired_from_the_next(self) -> None:
        near = MemorySource("near", {ref.hex: STORE[REFS[9].hex] for ref in REFS[:8]})
        far = MemorySource("far", STORE)
        chunks = chunks_from(near, far)
        assert [chunks.get(ref) for ref in REFS[:8]] == PIECES[:8]
        assert len(near.asked) == 8, "one that is damaged says nothing about the next"

    @pytest.mark.parametrize("error", [RemoteError("EIO"), PortalError("page")])
    def test_a_source_that_fails_as_a_whole_is_left_out(self, error: Exception) -> None:
        near, far = MemorySource("near", STORE), MemorySource("far", STORE)
        near.before = raising(error)
        chunks = chunks_from(near, far, connections=1)
        assert [data for _, data in chunks.stream(REFS)] == PIECES
        assert len(near.asked) == 3
        far.chunks = {}
        with pytest.raises(type(error), match=f"left out after 3 failures, the last one: {error}"):
            chunks.get(REFS[0])

    def test_but_not_for_failures_that_are_not_in_a_row(self) -> None:
        near, far = MemorySource("near", STORE), MemorySource("far", STORE)

        def every_other(hex_id: str) -> None:
            if len(near.asked) % 2:
                raise RemoteError("a bad sector")

        near.before = every_other
        chunks = chunks_from(near, far)
        assert [chunks.get(ref) for ref in REFS[:50]] == PIECES[:50]
        assert len(near.asked) == 50

    @pytest.mark.parametrize(
        ("near", "far", "expected", "words"),
        [
            (None, None, MissingError, "publish again"),
            (None, "wrong", ContentError, "is damaged"),
            ("wrong", None, ContentError, "other bytes"),
            ("wrong", RemoteError("no route"), ContentError, "no route"),
            (None, RemoteError("no route"), RemoteError, "cannot be fetched"),
            (RemoteError("EIO"), None, RemoteError, "EIO"),
            (RemoteError("EIO"), PortalError("page"), PortalError, "page"),
        ],
    )
    def test_what_is_said_when_nobody_has_it(
        self, near: object, far: object, expected: type[UpdaterError], words: str
    ) -> None:
        sources = []
        for name, state in (("near", near), ("far", far)):
            source = MemorySource(name, {})
            if isinstance(state, Exception):
                source.before = raising(state)
            elif state:
                source.chunks = {REFS[0].hex: STORE[REFS[1].hex]}
            sources.append(source)
        with pytest.raises(expected, match=words) as caught:
            chunks_from(*sources).get(REFS[0])
        assert type(caught.value) is expected
        assert REFS[0].hex in str(caught.value)
        # Where a source has no reason of its own to give, its store is named.
        for source, state in zip(sources, (near, far), strict=True):
            reason = str(state) if isinstance(state, Exception) else source.location.store
            assert reason in str(caught.value)

    def test_no_source_at_all(self) -> None:
        with pytest.raises(MissingError, match="no source"):
            chunks_from().get(REFS[0])


class TestStream:
    def test_the_order_is_kept(self) -> None:
        source = MemorySource("web", STORE)
        source.before = lambda hex_id: time.sleep(int(hex_id[:2], 16) / 50_000)
        wanted = REFS[::-1]
        with closing(chunks_from(source, connections=8).stream(wanted)) as stream:
            assert list(stream) == list(zip(wanted, PIECES[::-1], strict=True))
        assert threads() == []

    def test_nothing_wanted(self) -> None:
        assert list(chunks_from().stream([])) == []

    def test_it_goes_side_by_side(self) -> None:
        source = MemorySource("web", STORE)
        together = threading.Barrier(4, timeout=5)
        source.before = lambda hex_id: together.wait() and None
        assert len(list(chunks_from(source, connections=4).stream(REFS[:40]))) == 40

    @pytest.mark.parametrize(
        ("round_trip", "connections", "expected"),
        [(0.0, 32, 8), (0.04, 32, 23), (0.3, 32, 32), (0.3, 4, 4)],
    )
    def test_a_long_way_takes_more_connections(
        self, round_trip: float, connections: int, expected: int
    ) -> None:
        """64 KiB chunks, to a fast line's full rate; never more than the settings allow."""
        source = MemorySource("web", STORE)
        source.round_trip = round_trip
        seen = []
        source.before = lambda hex_id: seen.append(len(threads())) or time.sleep(0.005)  # type: ignore[func-returns-value]
        with closing(chunks_from(source, connections=connections).stream(REFS)) as stream:
            assert len(list(stream)) == len(REFS)
        assert max(seen) == expected

    def test_no_more_threads_than_chunks(self) -> None:
        source = MemorySource("web", STORE)
        with closing(chunks_from(source, connections=16).stream(REFS[:2])) as stream:
            next(stream)
            assert len(threads()) <= 2

    def test_what_repeats_is_fetched_once(self) -> None:
        source = MemorySource("web", STORE)
        wanted = [REFS[0], REFS[1]] * 50
        assert [data for _, data in chunks_from(source).stream(wanted)] == PIECES[:2] * 50
        assert len(source.asked) == 2

    def test_what_is_ahead_is_bounded_in_chunks_and_in_bytes(self) -> None:
        source = MemorySource("web", STORE)
        pulled = 0

        def wanted() -> Iterator[ChunkRef]:
            nonlocal pulled
            while True:
                pulled += 1
                yield REFS[0]

        with closing(chunks_from(source, connections=2).stream(wanted())) as stream:
            next(stream)
            assert pulled <= 2 * 64 + 2

        large = [bytes([number]) * 400_000 for number in range(20)]
        index = index_of(large)
        source = MemorySource("web", {ref.hex: large[n] for n, ref in enumerate(index)})
        chunks = Chunks([source], index, connections=2)
        with closing(chunks.stream(index)) as stream:
            for _ in range(10):
                next(stream)
                time.sleep(0.02)
                # A window of 2 x 256 KiB holds one of 400,000 bytes.
                assert len(source.asked) <= 12
            assert [len(data) for _, data in stream] == [400_000] * 10

    def test_chunks_larger_than_the_window_come_one_by_one(self) -> None:
        large = [bytes([number]) * 3_000_000 for number in range(3)]
        index = index_of(large, chunk_max=4 << 20)
        source = MemorySource("web", {ref.hex: large[n] for n, ref in enumerate(index)})
        assert [data for _, data in Chunks([source], index, connections=1).stream(index)] == large

    def test_nothing_is_held_that_was_given_back(self) -> None:
        class Marked(bytes):
            """Bytes that can be counted."""

        class Marking(MemorySource):
            def chunk(self, hex_id: str, *, limit: int) -> bytes:
                return Marked(super().chunk(hex_id, limit=limit))

        source = Marking("web", {ref.hex: PIECES[n] for n, ref in enumerate(REFS)})
        with closing(chunks_from(source, connections=2).stream(REFS[:4])) as stream:
            held = []
            for _ in range(4):
                next(stream)
                gc.collect()
                held.append(sum(type(one) is Marked for one in gc.get_objects()))
            assert held[0] >= 1
            assert held[-1] <= 1

    def test_an_error_comes_when_it_is_its_turn(self) -> None:
        source = MemorySource("web", {ref.hex: STORE[ref.hex] for ref in REFS if ref != REFS[5]})
        seen = []
        with pytest.raises(MissingError, match=REFS[5].hex):
            seen.extend(chunks_from(source).stream(REFS))
        assert threads() == []

    def test_errors_that_are_not_expected_come_through(self) -> None:
        source = MemorySource("web", STORE)
        source.before = raising(ZeroDivisionError("a bug"))
        with pytest.raises(ZeroDivisionError):
            list(chunks_from(source).stream(REFS))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("chunks-")]


class TerminatedError(Exception):
    """What a handler of SIGTERM raises in the main thread."""


class TestEnd:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[WebServer]:
        (tmp_path / "x.castr").mkdir()
        store = LocalStore(tmp_path / "x.castr")
        for ref in REFS:
            store.put(ref.hex, STORE[ref.hex], compressed=True)
        with WebServer(tmp_path) as server:
            yield server

    @pytest.mark.parametrize("fault", [{"silent": True}, {"status": 503, "retry_after": 30}])
    @pytest.mark.parametrize("how", ["close", "exception", "context"])
    def test_closing_early_ends_stalled_requests_at_once(
        self, server: WebServer, fault: dict, how: str
    ) -> None:
        for ref in REFS[20:]:  # by name: requests come in any order
            server.fail(f"*{ref.hex}*", **fault)
        location = Location(f"{server.url}/x.caidx", f"{server.url}/x.castr")
        source = open_source(location, FetchSettings(), SystemClock())
        chunks = Chunks([source], INDEX, connections=8)
        stream = chunks.stream(REFS)
        for _ in range(3):
            next(stream)
        while len(server.requests) < 24:
            time.sleep(0.01)
        begin = time.monotonic()
        if how == "close":
            stream.close()
        elif how == "exception":
            with pytest.raises(TerminatedError), closing(stream):
                raise TerminatedError
        else:
            with chunks:
                pass
            with pytest.raises(RemoteError, match="was ended"):
                list(stream)
        assert time.monotonic() - begin < 1
        assert threads() == []
        server.heal()
        assert chunks.get(REFS[-1]) == PIECES[-1], "the source still works, and is not left out"
        source.close()

    def test_a_thread_that_cannot_be_ended_is_left_behind(self) -> None:
        source = MemorySource("drive", STORE)
        stuck = threading.Event()
        source.before = lambda hex_id: stuck.wait(10) and None
        with chunks_from(source) as chunks:
            stream = chunks.stream(REFS)
            starter = threading.Timer(0.2, chunks.close)
            starter.start()
            begin = time.monotonic()
            with pytest.raises(RemoteError, match="was ended"):
                next(stream)
            assert time.monotonic() - begin < 2
        assert source.aborted.is_set()
        stuck.set()
        while threads():
            time.sleep(0.01)

"""Chunk files: what is accepted, and what a hostile store cannot do."""

import contextlib
import gzip
import hashlib
import lzma
import os
import socket
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from casync_updater.errors import ContentError, LocalError, MissingError, RemoteError
from casync_updater.formats.index import SHA512_256, Index
from casync_updater.formats.store import LocalStore, content, decode, file_limit, path_of
from casync_updater.model import ChunkRef

DATA = b"a line of text\n" * 1000
INDEX = Index(SHA512_256, 1, 1, 1 << 20, b"")
HEX = "ab" * 32


def zstd_sized(data: bytes) -> bytes:
    return zstandard.compress(data)


def zstd_streamed(data: bytes) -> bytes:
    """As casync writes it: the header does not say how much it is."""
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(data) + stream.flush()


COMPRESSIONS = [zstd_sized, zstd_streamed, lzma.compress, gzip.compress]


def ref_of(data: bytes) -> ChunkRef:
    return ChunkRef(hashlib.new("sha512_256", data).digest(), 0, len(data))


def test_the_name_is_casyncs() -> None:
    assert path_of(HEX) == f"abab/{HEX}.cacnk"
    assert path_of(HEX, "") == f"abab/{HEX}"


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_every_compression_is_known_by_its_magic(compress) -> None:
    assert decode(compress(DATA), len(DATA), "it") == DATA


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("off", [-1, 1])
def test_another_size_is_an_error(compress, off: int) -> None:
    with pytest.raises(ContentError, match="it is damaged"):
        decode(compress(DATA), len(DATA) + off, "it")


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_file_that_is_cut_off_is_an_error(compress) -> None:
    raw = compress(DATA)
    for length in (len(raw) - 1, len(raw) // 2, 7):
        with pytest.raises(ContentError):
            decode(raw[:length], len(DATA), "it")


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("more", [b"x", b"\0\0\0\0", None])
def test_something_after_the_end_is_an_error(compress, more: bytes | None) -> None:
    raw = compress(DATA)
    with pytest.raises(ContentError):
        decode(raw + (raw if more is None else more), len(DATA), "it")


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_bomb_takes_no_memory(compress) -> None:
    bomb = compress(bytes(200 << 20))
    Path("/proc/self/clear_refs").write_text("5")  # The peak is what is resident now, proc(5).
    before = resident_peak()
    with pytest.raises(ContentError):
        decode(bomb, 1000, "it")
    assert resident_peak() - before < 20 << 20


def resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def test_a_header_that_lies_about_the_size_is_an_error() -> None:
    raw = bytearray(zstd_sized(b"x" * 300))
    assert zstandard.get_frame_parameters(bytes(raw)).content_size == 300
    raw[5:7] = (1000 - 256).to_bytes(2, "little")
    assert zstandard.get_frame_parameters(bytes(raw)).content_size == 1000
    for size in (300, 1000):
        with pytest.raises(ContentError):
            decode(bytes(raw), size, "it")


@pytest.mark.parametrize("magic", [b"", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"\x1f\x8b"])
def test_an_uncompressed_chunk_may_begin_like_a_compressed_one(magic: bytes) -> None:
    raw = magic + b"but it is not one"
    assert decode(raw, len(raw), "it") == raw
    assert content(raw, ref_of(raw), INDEX, "it") == raw
    with pytest.raises(ContentError):
        decode(raw, len(raw) + 1, "it")


def test_an_uncompressed_chunk_that_is_a_whole_compressed_file_is_told_by_its_id() -> None:
    # Without the id it cannot be told: this is a gzip file of as many bytes as it has itself.
    inner = os.urandom(50)
    raw = next(
        raw
        for length in range(20, 120)
        if len(raw := gzip.compress((inner + bytes(70))[:length])) == length
    )
    assert decode(raw, len(raw), "it") != raw
    assert content(raw, ref_of(raw), INDEX, "it") == raw
    unpacked = gzip.decompress(raw)
    assert content(raw, ref_of(unpacked), INDEX, "it") == unpacked


def test_content_refuses_other_bytes() -> None:
    with pytest.raises(ContentError, match="it holds other bytes"):
        content(zstd_sized(DATA[::-1]), ref_of(DATA), INDEX, "it")


def test_content_goes_by_the_indexs_own_hash() -> None:
    ref = ChunkRef(hashlib.sha256(DATA).digest(), 0, len(DATA))
    assert content(zstd_sized(DATA), ref, Index(0, 1, 1, 1 << 20, b""), "it") == DATA
    with pytest.raises(ContentError):
        content(zstd_sized(DATA), ref, INDEX, "it")


@given(st.binary(min_size=1, max_size=4096))
def test_no_compression_exceeds_the_limit_of_a_file(data: bytes) -> None:
    for compress in COMPRESSIONS:
        assert len(compress(data)) <= file_limit(len(data))


def test_incompressible_chunks_fit_the_limit() -> None:
    data = os.urandom(1 << 20)
    assert all(len(compress(data)) <= file_limit(len(data)) for compress in COMPRESSIONS)
    assert len(zlib.compress(data, 0)) <= file_limit(len(data))


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_are_content_or_a_content_error(raw: bytes, size: int) -> None:
    for start in (b"", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", b"\x1f\x8b\x08\x00"):
        with contextlib.suppress(ContentError):
            assert len(decode(start + raw, size, "it")) == size


class TestLocalStore:
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        (tmp_path / "x.castr").mkdir()
        return LocalStore(tmp_path / "x.castr")

    @pytest.mark.parametrize("compressed", [True, False])
    def test_what_is_put_can_be_read(self, store: LocalStore, compressed: bool) -> None:
        assert not store.has(HEX)
        store.put(HEX, b"bytes", compressed=compressed)
        assert store.has(HEX)
        assert store.read(HEX, 5) == b"bytes"
        name = path_of(HEX, ".cacnk" if compressed else "")
        assert [file.name for file in (store.path / "abab").iterdir()] == [Path(name).name]

    def test_put_replaces(self, store: LocalStore) -> None:
        store.put(HEX, b"one", compressed=True)
        store.put(HEX, b"two", compressed=True)
        assert store.read(HEX, 5) == b"two"

    def test_a_put_that_fails_leaves_nothing(self, store: LocalStore) -> None:
        (store.path / path_of(HEX)).mkdir(parents=True)
        with pytest.raises(LocalError, match=r"\.cacnk cannot be written: Is a directory"):
            store.put(HEX, b"bytes", compressed=True)
        assert len(list((store.path / "abab").iterdir())) == 1

    def test_a_store_that_is_not_there(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path / "none")
        with pytest.raises(RemoteError, match="is not there") as caught:
            store.read(HEX, 5)
        assert not isinstance(caught.value, MissingError)
        with pytest.raises(LocalError):
            store.put(HEX, b"bytes", compressed=True)

    def test_a_chunk_that_is_not_there(self, store: LocalStore) -> None:
        with pytest.raises(MissingError, match=r"\.cacnk does not exist"):
            store.read(HEX, 5)
        (store.path / "abab").mkdir()
        with pytest.raises(MissingError):
            store.read(HEX, 5)

    def test_too_long(self, store: LocalStore) -> None:
        store.put(HEX, b"123456", compressed=True)
        with pytest.raises(ContentError, match="6 bytes, at most 5"):
            store.read(HEX, 5)

    @pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "socket", "folder"])
    def test_what_is_no_regular_file_is_neither_followed_nor_waited_for(
        self, store: LocalStore, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = store.path / path_of(HEX)
        path.parent.mkdir()
        if kind == "link":
            (tmp_path / "secret").write_bytes(b"12345")
            path.symlink_to(tmp_path / "secret")
        elif kind == "dangling":
            path.symlink_to("nowhere")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            monkeypatch.chdir(path.parent)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name)
        else:
            path.mkdir()
        assert not store.has(HEX)
        with pytest.raises(ContentError, match="is no regular file"):
            store.read(HEX, 5)

    def test_folders_that_are_links_lead_nowhere(self, store: LocalStore, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / f"{HEX}.cacnk").write_bytes(b"12345")
        (store.path / "abab").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ContentError, match="is no folder"):
            store.read(HEX, 5)
        with pytest.raises(LocalError):
            store.put(HEX[:4] + "00" * 30, b"x", compressed=True)
        assert len(list((tmp_path / "elsewhere").iterdir())) == 1

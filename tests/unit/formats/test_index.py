"""casync's index, byte by byte."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casync_updater.errors import ContentError
from casync_updater.formats import index
from casync_updater.model import ChunkRef

FLAGS = 0xB000000000000308
LIMITS = (16, 64, 256)


def packed(
    ends: tuple[int, ...] = (100, 150, 406),
    *,
    flags: int = FLAGS,
    limits: tuple[int, int, int] = LIMITS,
    header: tuple[int, int] = (48, 0x96824D9C7B129FF9),
    table: tuple[int, int] = (2**64 - 1, 0xE75B9E112F17417D),
    tail: tuple[int, ...] | None = None,
) -> bytes:
    items = b"".join(struct.pack("<Q32s", end, bytes([end % 256]) * 32) for end in ends)
    end_words = tail or (0, 0, 48, 56 + len(items), 0x4B4F050E5549ECD1)
    return (
        struct.pack("<QQQQQQ", *header, flags, *limits)
        + struct.pack("<QQ", *table)
        + items
        + struct.pack("<QQQQQ", *end_words)
    )


def test_an_index() -> None:
    found = index.parse(packed(), "x")
    assert list(found) == [
        ChunkRef(bytes([100]) * 32, 0, 100),
        ChunkRef(bytes([150]) * 32, 100, 50),
        ChunkRef(bytes([150]) * 32, 150, 256),
    ]
    assert (len(found), found.size) == (3, 406)
    assert found.features == ("sec-time", "permissions", "symlinks")
    assert found.chunk_size_option == "16:64:256"
    assert found.hash_name == "sha512_256"
    assert found.chunk_id(b"x") == hashlib.new("sha512_256", b"x").digest()
    assert index.parse(packed(flags=0x8), "x").chunk_id(b"x") == hashlib.sha256(b"x").digest()


def test_an_index_of_nothing() -> None:
    found = index.parse(packed(()), "x")
    assert (len(found), found.size, list(found)) == (0, 0, [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no casync index"),
        (b"<html>" * 100, "is no casync index"),
        (packed()[:103], "is no casync index"),
        (packed(header=(40, 0x96824D9C7B129FF9)), "is no casync index"),
        (packed()[:-1], "cut off"),
        (packed()[:-40], "no valid tail"),
        (packed() + bytes(40), "no valid tail"),
        (packed(table=(5, 0xE75B9E112F17417D)), "no table"),
        (packed(tail=(0, 0, 48, 57, 0x4B4F050E5549ECD1)), "no valid tail"),
        (packed(limits=(0, 64, 256)), "impossible chunk sizes 0:64:256"),
        (packed(limits=(65, 64, 256)), "impossible chunk sizes"),
        (packed(limits=(1, 64, 63)), "impossible chunk sizes"),
        (packed(limits=(1, 64, (128 << 20) + 1)), "impossible chunk sizes"),
        (packed((0,)), "ends at 0 after"),
        (packed((100, 100)), "ends at 100 after one that ends at 100"),
        (packed((100, 50)), "ends at 50 after"),
        (packed((257,)), "ends at 257 after"),
        (packed((2**64 - 1,)), "ends at"),
    ],
)
def test_what_is_no_index_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ContentError, match=message) as caught:
        index.parse(data, "http://host/x.caidx")
    assert str(caught.value).startswith("http://host/x.caidx")


@given(st.integers(0, len(packed()) - 1), st.integers(0, 255), st.integers(0, 80))
def test_no_damage_does_more_than_a_content_error(position: int, byte: int, cut: int) -> None:
    data = bytearray(packed())
    data[position] = byte
    damaged = bytes(data[: len(data) - cut])
    try:
        found = index.parse(damaged, "x")
    except ContentError:
        return
    assert sum(ref.size for ref in found) == found.size
    assert all(0 < ref.size <= found.chunk_max for ref in found)

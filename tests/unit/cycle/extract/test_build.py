"""Archives that casync would never write, and chunks that do not come, against the builder."""

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from casync_updater.cycle.extract import Extracted, extract, plan_extract, supported
from casync_updater.errors import ContentError, MissingError
from casync_updater.formats.index import SHA512_256, Index
from casync_updater.model import ChunkRef
from support.catar import (
    FLAGS,
    PAYLOAD,
    SYMLINK,
    entry,
    file,
    folder,
    goodbye,
    record,
)


class Pieces:
    """A stream, cut into chunks of some size."""

    def __init__(self, stream: bytes, size: int) -> None:
        table = b""
        self.data = {}
        for start in range(0, len(stream), size):
            piece = stream[start : start + size]
            name = hashlib.new("sha512_256", piece).digest()
            self.data[name] = piece
            table += struct.pack("<Q32s", start + len(piece), name)
        self.index = Index(FLAGS | SHA512_256, 1, size, size, table)

    def stream(self, refs: Iterable[ChunkRef]) -> Iterator[tuple[ChunkRef, bytes]]:
        for ref in refs:
            yield ref, self.data[ref.id]

    def get(self, ref: ChunkRef) -> bytes:
        raise MissingError(ref.hex)


def build(stream: bytes, root: Path, size: int = 1 << 16) -> Extracted:
    pieces = Pieces(stream, size)
    root.mkdir()
    descriptor = os.open(root, os.O_RDONLY)
    try:
        return extract(plan_extract(pieces.index, None, -1), pieces, descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_chunks_may_end_anywhere(tmp_path: Path, size: int) -> None:
    stream = folder(
        (b"a", file(b"hello" * 30)),
        (b"d", folder((b"e", file(b"")), (b"l", entry(0o120777) + record(SYMLINK, b"../a\0")))),
        (b"z", file(b"end", mode=0o100600)),
    )
    done = build(stream, tmp_path / "root", size)
    assert (tmp_path / "root" / "a").read_bytes() == b"hello" * 30
    assert (tmp_path / "root" / "d" / "l").readlink() == Path("../a")
    assert (tmp_path / "root" / "z").stat().st_mode == 0o100600
    assert done.digest == hashlib.new("sha512_256", stream).hexdigest()


HOSTILE = {
    "nothing": b"",
    "trailing data": folder((b"a", file())) + b"more",
    "a second root": folder() + folder(),
    "a file longer than the archive": entry(0o40755)
    + record(0x6DBB6EBCB3161F0B, b"a\0")
    + entry(0o100644)
    + struct.pack("<QQ", 1 << 60, PAYLOAD),
    "a file through a link": folder(
        (b"l", entry(0o120777) + record(SYMLINK, b"/tmp\0")),
        (b"l", folder((b"x", file()))),
    ),
    "a path": folder((b"../escaped", file())),
    "no end": folder((b"a", file()))[:-64],
    "an end that lies": entry(0o40755) + goodbye(0, 0),
}


@pytest.mark.parametrize("stream", HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives_are_refused(tmp_path: Path, stream: bytes) -> None:
    with pytest.raises(ContentError, match="damaged"):
        build(stream, tmp_path / "root")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_chunk_that_does_not_come_is_the_callers_error(tmp_path: Path) -> None:
    pieces = Pieces(folder((b"a", file(b"data"))), 16)

    class Broken(Pieces):
        def __init__(self) -> None:
            pass

        def stream(self, refs: Iterable[ChunkRef]) -> Iterator[tuple[ChunkRef, bytes]]:
            for number, ref in enumerate(refs):
                if number == 3:
                    raise MissingError("chunk is gone")
                yield ref, pieces.data[ref.id]

    root = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(MissingError, match="gone"):
        extract(plan_extract(pieces.index, None, -1), Broken(), root)
    os.close(root)


def test_what_casync_has_to_extract_is_said() -> None:
    assert supported(Index(FLAGS, 1, 1, 1, b"")) is None
    reason = supported(Index(FLAGS | 1 << 30 | 1 << 26, 1, 1, 1, b""))
    assert reason is not None
    assert "subvolume, selinux" in reason

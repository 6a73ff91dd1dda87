import hashlib
import os
from array import array
from pathlib import Path

import pytest
import zstandard

from casync_updater.errors import ContentError
from casync_updater.formats import record as record_format
from casync_updater.formats.archive import Decoder, Memory
from casync_updater.formats.index import Index
from casync_updater.formats.record import (
    DIGEST_SIZE,
    DIRECTORY,
    END,
    FILE,
    Record,
    RecordWriter,
    Window,
    kind_of,
)
from support.catar import FLAGS, file, folder

DATA = b"0123456789" * 50
STREAM = folder(
    (b"a", file(DATA)),
    (b"d", folder((b"e", file(b"")), (b"f", file(b"tail")))),
    *((b"n%06d" % number, file(b"")) for number in range(6000)),
)


@pytest.fixture
def record() -> Record:
    index = Index(FLAGS, 1, 1, 1 << 20, array("Q", [len(STREAM), 0, 0, 0, 0]).tobytes())
    feed = Memory(STREAM)
    decoder = Decoder(feed, FLAGS)
    writer = RecordWriter(index)
    while True:
        node = decoder.next()
        kind = kind_of(node.mode) if node.mode else END
        writer.add(node, kind)
        if kind == FILE:
            writer.digest(b"D" * DIGEST_SIZE)
            feed.position += node.size
        if not decoder.frames:
            return writer.finish()


def test_any_range_is_in_the_record_or_in_a_file(record: Record) -> None:
    content = {b"a": DATA, b"d/f": b"tail"}
    for start in range(0, len(STREAM), 977):
        for size in (1, 16, 500, 5000):
            end = min(start + size, len(STREAM))
            out = b""
            for piece in record.pieces(start, end):
                if isinstance(piece, bytes):
                    out += piece
                else:
                    node, offset, count = piece
                    out += content[record.path(node)][offset : offset + count]
            assert out == STREAM[start:end]


def test_a_range_without_content_is_literal(record: Record) -> None:
    start, end = record.content(1)
    assert STREAM[start:end] == DATA
    assert record.literal(0, start) == STREAM[:start]
    assert record.literal(0, start + 1) is None
    assert record.literal(end, end + 100) == STREAM[end : end + 100]


def test_it_is_the_same_after_it_was_saved(record: Record, tmp_path: Path) -> None:
    record.stamp(1, os.lstat(tmp_path))
    (tmp_path / "record").write_bytes(b"".join(record.packed()))
    loaded = record_format.load(tmp_path / "record")
    assert loaded is not None
    for name in ("starts", "places", "spans", "parents", "inodes", "mtimes", "ctimes", "modes"):
        assert getattr(loaded, name) == getattr(record, name)
    assert (loaded.index, loaded.kinds) == (record.index, record.kinds)
    assert loaded.skeleton.frames == record.skeleton.frames
    assert loaded.path(4) == b"d/f"
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_damage_anywhere_is_found(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"".join(record.packed()))
    good = path.read_bytes()
    for place in range(0, len(good), max(1, len(good) // 60)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        with pytest.raises(ContentError, match="damaged"):
            record_format.load(path)
        path.write_bytes(good[:place])
        with pytest.raises(ContentError, match="damaged"):
            record_format.load(path)


def test_nothing_is_unpacked_before_the_checksum_is_right(record: Record, tmp_path: Path) -> None:
    """A damaged frame can announce any amount of memory, a damaged column overflow its sums."""
    path = tmp_path / "record"
    path.write_bytes(b"".join(record.packed()))
    good = path.read_bytes()
    frame = good.index(bytes.fromhex("28b52ffd"))
    bomb = bytes.fromhex("28b52ffd") + b"\xe0" + (1 << 60).to_bytes(8, "little")
    path.write_bytes(good[:frame] + bomb + good[frame + len(bomb) :])
    with pytest.raises(ContentError, match="checksum"):
        record_format.load(path)


def test_a_record_without_parts_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"casync-updater record 2\n" + bytes(8) + hashlib.sha256().digest())
    with pytest.raises(ContentError, match="damaged"):
        record_format.load(path)


def test_a_record_of_the_version_before_is_read(record: Record, tmp_path: Path) -> None:
    """That version would misread this one's blocks, so the two begin differently."""
    path = tmp_path / "record"
    written = b"".join(record.packed())
    path.write_bytes(written.replace(b"casync-updater record 2\n", b"casync-updater record 1\n", 1))
    assert path.read_bytes() != written
    found = record_format.load(path)
    assert found is not None
    assert [found.name(node) for node in range(len(found))] == [
        record.name(node) for node in range(len(record))
    ]


def test_no_record_is_none(tmp_path: Path) -> None:
    assert record_format.load(tmp_path / "record") is None


def test_trust(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    before = path.lstat()
    record.stamp(1, before)
    assert record.trusted(1, before, ())
    while path.lstat().st_ctime_ns == before.st_ctime_ns:
        path.chmod(0o600)
        path.chmod(before.st_mode)
    after = path.lstat()
    assert not record.trusted(1, after, ())
    ctime = after.st_ctime_ns
    assert record.trusted(1, after, (Window(ctime, ctime),))
    assert not record.trusted(1, after, (Window(ctime + 1, ctime + 9), Window(0, ctime - 1)))
    path.write_bytes(DATA + b"longer")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not record.trusted(1, path.lstat(), (Window(0, 1 << 62),))


def test_the_clock_of_a_file_system_leaves_mtimes_alone(tmp_path: Path) -> None:
    os.utime(tmp_path, (7, 8))
    directory = os.open(tmp_path, os.O_RDONLY)
    now = record_format.file_system_time(directory)
    os.close(directory)
    assert tmp_path.stat().st_mtime == 8
    assert now == tmp_path.stat().st_ctime_ns


def test_blocks_that_did_not_change_are_taken_over(record: Record) -> None:
    """As they are, compressed; and however often that is done, they do not become small."""
    stretched, taken = record, 0
    for _ in range(5):
        before = stretched
        stretched = copied(before, twice=500)
        assert len(stretched) == len(before) + 1
        for node in range(len(before)):
            now = node + (node > 500)
            assert stretched.raw(now) == before.raw(node)
            assert stretched.path(now) == before.path(node)
        old = {id(frame) for frame in before.skeleton.frames}
        taken += sum(id(frame) in old for frame in stretched.skeleton.frames)
        sizes = [zstandard.frame_content_size(frame) for frame in stretched.skeleton.frames]
        assert min(sizes[:-1]) >= 64 << 10
        assert (
            sum(sizes)
            == stretched.skeleton.size
            == before.skeleton.size + len(before.raw(500)) + DIGEST_SIZE
        )
    assert taken >= 3


def copied(old: Record, twice: int) -> Record:
    """A record that has one file of another one twice."""
    writer = RecordWriter(old.index)
    writer.add(old.decode(0), DIRECTORY)
    for first, last in ((1, twice + 1), (twice, len(old))):
        begin = writer.copy(old, first, last, old.starts[first])
        for number in range(begin, begin + last - first):
            kind = writer.kinds[number]
            if kind == END:
                writer.close(number)
            elif kind == DIRECTORY:
                writer.open(number)
            else:
                writer.adopt(number)
    return writer.finish()

"""Times are exchanged in the stream, never together with other content."""

import hashlib
import stat
import struct
from collections.abc import Iterator

import pytest

from casync_updater.formats.mtree import Node
from casync_updater.server.times import SourceChangedError, StableTime, compare, retimed

FLAGS = 0xB000000000000308


def entry(mode: int, time_ns: int) -> bytes:
    return struct.pack("<8Q", 64, 0x1396FABCEA5BBB51, FLAGS, mode, 0, 0, 0, time_ns)


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("<QQ", 16 + len(body), kind) + body


def named(name: bytes) -> bytes:
    return record(0x6DBB6EBCB3161F0B, name + b"\0")


def payload(data: bytes) -> bytes:
    return record(0x8B9E1D93D6DCFFC9, data)


GOODBYE = record(0xDFD35C5E8327C403, b"x" * 24)
FOLDER, FILE = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644


def archive(root: int, folder: int, inner: int, outer: int) -> bytes:
    return b"".join(
        (
            entry(FOLDER, root),
            named(b"a"),
            entry(FOLDER, folder),
            named(b"file"),
            entry(FILE, inner),
            payload(b"inner"),
            GOODBYE,
            named(b"file"),
            entry(FILE, outer),
            payload(b"outer"),
            GOODBYE,
        )
    )


def sha(data: bytes) -> str:
    return hashlib.new("sha512_256", data).hexdigest()


def cut(data: bytes, size: int) -> Iterator[bytes]:
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_each_node_gets_its_own_time(size: int) -> None:
    times = {
        b".": StableTime(11, None),
        b"a": StableTime(12, None),
        b"a/file": StableTime(13, sha(b"inner")),
    }
    found = b"".join(retimed(cut(archive(1, 2, 3, 4), size), times, FLAGS))
    assert found == archive(11, 12, 13, 4)
    times = {b"file": StableTime(14, sha(b"outer"))}
    found = b"".join(retimed(cut(archive(1, 2, 3, 4), size), times, FLAGS))
    assert found == archive(1, 2, 3, 14)


def test_other_content_never_gets_an_old_time() -> None:
    times = {b"a/file": StableTime(13, sha(b"what it was"))}
    with pytest.raises(SourceChangedError):
        list(retimed([archive(1, 2, 3, 4)], times, FLAGS))


def test_only_the_time_may_differ() -> None:
    old = [
        Node(b".", "dir", 0o755, time_ns=1),
        Node(b"same", "file", 0o644, size=5, digest="a", time_ns=1),
        Node(b"mode", "file", 0o644, size=5, digest="a", time_ns=1),
        Node(b"text", "file", 0o644, size=5, digest="a", time_ns=1),
        Node(b"link", "link", link=b"x", time_ns=1),
        Node(b"gone", "dir", 0o755, time_ns=1),
        Node(b"gone/file", "file", 0o644, size=5, digest="a", time_ns=1),
    ]
    new = [
        Node(b".", "dir", 0o755, time_ns=2),
        Node(b"same", "file", 0o644, size=5, digest="a", time_ns=2),
        Node(b"mode", "file", 0o600, size=5, digest="a", time_ns=2),
        Node(b"text", "file", 0o644, size=5, digest="b", time_ns=2),
        Node(b"link", "link", link=b"y", time_ns=2),
        Node(b"gone", "dir", 0o755, time_ns=2),
    ]
    assert compare(old, new) == {b".": StableTime(1, None), b"same": StableTime(1, "a")}

import os
import stat
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casync_updater.errors import ContentError
from casync_updater.formats import archive
from casync_updater.formats.archive import Decoder, Memory, Node
from support.catar import (
    ACL_USER,
    ATTRIBUTES,
    DEVICE,
    FCAPS,
    FILENAME,
    FLAGS,
    PAYLOAD,
    SECOND,
    SYMLINK,
    UNIX,
    USER,
    XATTR,
    entry,
    file,
    folder,
    goodbye,
    record,
)


def decode(data: bytes, flags: int = FLAGS) -> list[Node]:
    feed = Memory(data)
    decoder = Decoder(feed, flags)
    nodes = [decoder.next()]
    while decoder.frames:
        feed.position += nodes[-1].size
        nodes.append(decoder.next())
    assert feed.position == len(data)
    return nodes


def test_nodes_come_out_with_their_metadata() -> None:
    data = folder(
        (b"a", file(b"hello", mtime=5 * SECOND)),
        (b"b", folder((b"link", entry(0o120777) + record(SYMLINK, b"../a\0")))),
        (b"c", folder()),
    )
    nodes = decode(data)
    assert [node.name for node in nodes] == [b"", b"a", b"b", b"link", b"", b"c", b"", b""]
    assert (nodes[1].size, nodes[1].mtime, nodes[1].mode) == (5, 5 * SECOND, 0o100644)
    assert nodes[3].target == b"../a"
    assert [node.mode for node in nodes if not node.name] == [0o40755, 0, 0, 0]
    assert b"".join(node.raw for node in nodes) == data.replace(b"hello", b"")


def test_special_files() -> None:
    data = folder(
        (b"block", entry(0o60600, flags=UNIX) + record(DEVICE, struct.pack("<QQ", 8, 17))),
        (b"fifo", entry(0o10600, flags=UNIX, uid=65535)),
        (b"socket", entry(0o140600, flags=UNIX)),
        flags=UNIX,
    )
    nodes = decode(data, UNIX)
    assert nodes[1].device == os.makedev(8, 17)
    assert nodes[2].uid == 65535
    assert stat.S_ISSOCK(nodes[3].mode)


def test_extended_attributes_and_capabilities() -> None:
    extra = record(XATTR, b"trusted.x\0") + record(XATTR, b"user.a\0b\0c") + record(FCAPS, b"caps")
    node = decode(
        folder((b"f", file(extra=extra, flags=ATTRIBUTES)), flags=ATTRIBUTES), ATTRIBUTES
    )[1]
    assert node.xattrs == ((b"trusted.x", b""), (b"user.a", b"b\0c"))
    assert node.fcaps == b"caps"


BAD = {
    "root is a file": file(),
    "dot": folder((b".", file())),
    "dot dot": folder((b"..", file())),
    "slash": folder((b"a/b", file())),
    "nul inside": folder((b"a\0b", file())),
    "empty name": folder((b"", file())),
    "name too long": folder((b"n" * 256, file())),
    "name without nul": entry(0o40755) + record(FILENAME, b"ab") + file() + goodbye(180, 1),
    "twice": folder((b"a", file()), (b"a", file())),
    "out of order": folder((b"b", file()), (b"a", file())),
    "link not announced": folder((b"f", entry(0o10644))),
    "device not announced": folder((b"d", entry(0o20644) + record(DEVICE, bytes(16)))),
    "type unknown": folder((b"x", entry(0o644))),
    "mode too large": folder((b"x", file(mode=0o100644 | 1 << 20))),
    "other flags": folder((b"x", file(flags=FLAGS | 1))),
    "chattr": folder((b"x", file(attributes=1))),
    "owner": folder((b"x", file(uid=1))),
    "group": folder((b"x", file(gid=1))),
    "time too fine": folder((b"x", file(mtime=1))),
    "time before 1970": folder((b"x", file(mtime=2**64 - 2 * SECOND))),
    "xattr not announced": folder((b"x", file(extra=record(XATTR, b"user.a\0b")))),
    "user not announced": folder((b"x", file(extra=record(USER, b"root\0")))),
    "acl not announced": folder((b"x", file(extra=record(ACL_USER, bytes(24))))),
    "no payload": folder((b"x", entry(0o100644))),
    "two payloads": folder((b"x", file() + record(PAYLOAD, b""))),
    "empty target": folder((b"l", entry(0o120777) + record(SYMLINK, b"\0"))),
    "target with nul": folder((b"l", entry(0o120777) + record(SYMLINK, b"a\0b\0"))),
    "target without nul": folder((b"l", entry(0o120777) + record(SYMLINK, b"ab"))),
    "target too long": folder((b"l", entry(0o120777) + record(SYMLINK, b"a" * 4096 + b"\0"))),
    "goodbye offset": entry(0o40755) + goodbye(63, 0),
    "goodbye marker": entry(0o40755) + goodbye(64, 0, marker=1),
    "goodbye size": entry(0o40755) + goodbye(64, 0, size=41),
    "goodbye of more names": entry(0o40755) + goodbye(64, 1),
    "cut off": folder((b"a", file()))[:-1],
    "nothing": b"",
    "zeros": bytes(200),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_what_casync_would_not_write_is_refused(data: bytes) -> None:
    with pytest.raises(ContentError):
        decode(data)


BAD_ATTRIBUTES = {
    "namespace": record(XATTR, b"security.selinux\0x"),
    "only a namespace": record(XATTR, b"user.\0x"),
    "no nul": record(XATTR, b"user.a"),
    "order": record(XATTR, b"user.b\0") + record(XATTR, b"user.a\0"),
    "twice": record(XATTR, b"user.b\0") * 2,
    "name too long": record(XATTR, b"user." + b"a" * 251 + b"\0"),
    "too long": record(XATTR, b"user.a\0" + bytes(66_000)),
    "two capabilities": record(FCAPS, b"x") * 2,
    "after capabilities": record(FCAPS, b"x") + record(XATTR, b"user.a\0"),
    "too many": b"".join(
        record(XATTR, b"user.%03d\0" % number + bytes(65_000)) for number in range(20)
    ),
}


@pytest.mark.parametrize("extra", BAD_ATTRIBUTES.values(), ids=BAD_ATTRIBUTES)
def test_impossible_attributes_are_refused(extra: bytes) -> None:
    data = folder((b"f", file(extra=extra, flags=ATTRIBUTES)), flags=ATTRIBUTES)
    with pytest.raises(ContentError):
        decode(data, ATTRIBUTES)


def test_a_directory_cannot_have_capabilities() -> None:
    inner = entry(0o40755, flags=ATTRIBUTES) + record(FCAPS, b"x")
    data = folder((b"d", inner + goodbye(len(inner), 0)), flags=ATTRIBUTES)
    with pytest.raises(ContentError, match="capabilities"):
        decode(data, ATTRIBUTES)


def test_depth_is_limited_without_recursion() -> None:
    tree = folder()
    for _ in range(archive.MAX_DEPTH - 1):
        tree = folder((b"d", tree))
    assert len(decode(tree)) == 2 * archive.MAX_DEPTH
    with pytest.raises(ContentError, match="deep"):
        decode(folder((b"d", tree)))


def test_the_message_names_the_path() -> None:
    with pytest.raises(ContentError, match="'outer/bad'"):
        decode(folder((b"outer", folder((b"bad", file(uid=7))))))


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_any_damage_is_an_archive_or_a_content_error(noise: bytes, where: int) -> None:
    good = folder(
        (b"a", file(b"hello")),
        (b"b", folder((b"link", entry(0o120777) + record(SYMLINK, b"../a\0")))),
    )
    data = good[:where] + noise + good[where + len(noise) :]
    try:
        nodes = decode(data)
    except (ContentError, AssertionError):
        return
    assert all(b"/" not in node.name and node.name not in {b".", b".."} for node in nodes)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (FLAGS, ()),
        (UNIX, ()),
        (ATTRIBUTES, ()),
        (0xB000000000000040, ()),
        (FLAGS | 1 << 29, ("acl",)),
        (FLAGS | 1 << 7 | 1 << 2, ("user-names", "read-only")),
        (FLAGS | 1 << 40, ("unknown flags 0x10000000000",)),
    ],
)
def test_what_is_left_to_casync_is_named(flags: int, names: tuple[str, ...]) -> None:
    assert archive.unsupported(flags) == names


def test_a_node_can_be_decoded_from_its_own_bytes() -> None:
    for node in decode(folder((b"a", file(b"hello")), (b"d", folder()))):
        if node.mode:
            again = archive.decode_node(node.raw, FLAGS, root=not node.name)
            assert (again.name, again.mode, again.size) == (node.name, node.mode, node.size)

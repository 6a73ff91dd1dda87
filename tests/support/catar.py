"""Archive streams by hand: what casync writes, and what it never would."""

import struct

FLAGS = 0xB000000000000308
UNIX = 0xB000000000001F09
ATTRIBUTES = 0xB000000090000308

ENTRY, FILENAME, PAYLOAD = 0x1396FABCEA5BBB51, 0x6DBB6EBCB3161F0B, 0x8B9E1D93D6DCFFC9
GOODBYE, SYMLINK, DEVICE = 0xDFD35C5E8327C403, 0x664A6FB6830E0D6C, 0xAC3DACE369DFE643
XATTR, FCAPS, USER = 0xB8157091F80BC486, 0xF7267DB0AFED0629, 0xF453131AAEEACCB3
ACL_USER = 0x297DC88B2EF12FAF
TAIL = 0x57446FA533702943
SECOND = 10**9


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("<QQ", 16 + len(body), kind) + body


def entry(
    mode: int,
    *,
    flags: int = FLAGS,
    attributes: int = 0,
    uid: int = 0,
    gid: int = 0,
    mtime: int = SECOND,
) -> bytes:
    return struct.pack("<QQQQQQQQ", 64, ENTRY, flags, mode, attributes, uid, gid, mtime)


def file(data: bytes = b"data", mode: int = 0o100644, extra: bytes = b"", **fields: int) -> bytes:
    return entry(mode, **fields) + extra + record(PAYLOAD, data)


def folder(*children: tuple[bytes, bytes], mode: int = 0o40755, **fields: int) -> bytes:
    body = entry(mode, **fields)
    for name, node in children:
        body += record(FILENAME, name + b"\0") + node
    return body + goodbye(len(body), len(children))


def goodbye(offset: int, children: int, *, marker: int = TAIL, size: int | None = None) -> bytes:
    total = 16 + 24 * (children + 1)
    tail = struct.pack("<QQQ", offset, total if size is None else size, marker)
    return struct.pack("<QQ", total, GOODBYE) + bytes(24 * children) + tail

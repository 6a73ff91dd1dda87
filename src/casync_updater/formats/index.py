"""casync's index, ``.caidx`` and ``.caibx``.

The layout is that of ``caformat.h`` and ``caindex.c`` in systemd/casync: a header, a table of
(end offset, chunk id) and a tail, all integers little-endian 64 bit.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from casync_updater.errors import ContentError
from casync_updater.model import ChunkRef

_HEADER = struct.Struct("<QQQQQQ")
_TABLE = struct.Struct("<QQ")
_ITEM = struct.Struct("<Q32s")
_TAIL = struct.Struct("<QQQQQ")
_OVERHEAD = _HEADER.size + _TABLE.size + _TAIL.size

_INDEX_TYPE = 0x96824D9C7B129FF9
_TABLE_TYPE = 0xE75B9E112F17417D
_TAIL_MARKER = 0x4B4F050E5549ECD1
_CHUNK_LIMIT = 128 << 20

SHA512_256 = 0x2000000000000000
"""The feature flag of indexes whose chunk ids are SHA-512/256; without it they are SHA-256."""

FEATURES: tuple[str, ...] = (
    "16bit-uids",
    "32bit-uids",
    "user-names",
    "sec-time",
    "usec-time",
    "nsec-time",
    "2sec-time",
    "read-only",
    "permissions",
    "symlinks",
    "device-nodes",
    "fifos",
    "sockets",
    "flag-hidden",
    "flag-system",
    "flag-archive",
    "flag-append",
    "flag-noatime",
    "flag-compr",
    "flag-nocow",
    "flag-nodump",
    "flag-dirsync",
    "flag-immutable",
    "flag-sync",
    "flag-nocomp",
    "flag-projinherit",
    "subvolume",
    "subvolume-ro",
    "xattrs",
    "acl",
    "selinux",
    "fcaps",
    "quota-projid",
)
"""casync's ``--with=`` names, by the bit they stand for."""


@dataclass(frozen=True, slots=True)
class Index:
    """A parsed index. The table stays packed: a large tree has tens of thousands of chunks."""

    flags: int
    chunk_min: int
    chunk_avg: int
    chunk_max: int
    table: bytes

    def __len__(self) -> int:
        return len(self.table) // _ITEM.size

    def __iter__(self) -> Iterator[ChunkRef]:
        start = 0
        for end, chunk_id in _ITEM.iter_unpack(self.table):
            yield ChunkRef(chunk_id, start, end - start)
            start = end

    @property
    def size(self) -> int:
        """Bytes of the stream that the index describes."""
        end: int = _ITEM.unpack(self.table[-_ITEM.size :])[0] if self.table else 0
        return end

    @property
    def features(self) -> tuple[str, ...]:
        """The metadata features the archive was made with, as casync's ``--with`` names."""
        return tuple(name for bit, name in enumerate(FEATURES) if self.flags >> bit & 1)

    @property
    def hash_name(self) -> str:
        """The hashlib name of the digest that chunk ids and the archive digest are made with."""
        return "sha512_256" if self.flags & SHA512_256 else "sha256"

    def chunk_id(self, data: bytes) -> bytes:
        """The id that a chunk of these uncompressed bytes has."""
        return hashlib.new(self.hash_name, data).digest()

    @property
    def chunk_size_option(self) -> str:
        """The value of casync's ``--chunk-size`` that makes chunks with the same bounds."""
        return f"{self.chunk_min}:{self.chunk_avg}:{self.chunk_max}"


def parse(data: bytes, where: str) -> Index:
    """Read an index.

    Args:
        data: the whole file.
        where: how the message of an error names it.

    Raises:
        ContentError: it is no casync index, or one that contradicts itself.
    """
    if len(data) < _OVERHEAD or _HEADER.unpack_from(data)[:2] != (_HEADER.size, _INDEX_TYPE):
        raise ContentError(f"{where} is no casync index")
    _, _, flags, chunk_min, chunk_avg, chunk_max = _HEADER.unpack_from(data)
    table = data[_HEADER.size + _TABLE.size : -_TAIL.size]
    if len(table) % _ITEM.size:
        raise ContentError(f"{where}: the casync index is cut off")
    if _TABLE.unpack_from(data, _HEADER.size) != (2**64 - 1, _TABLE_TYPE):
        raise ContentError(f"{where}: the casync index has no table")
    tail = (0, 0, _HEADER.size, len(data) - _HEADER.size, _TAIL_MARKER)
    if _TAIL.unpack_from(data, len(data) - _TAIL.size) != tail:
        raise ContentError(f"{where}: the casync index has no valid tail, is it cut off?")
    if not 1 <= chunk_min <= chunk_avg <= chunk_max <= _CHUNK_LIMIT:
        raise ContentError(
            f"{where}: the casync index has impossible chunk sizes"
            f" {chunk_min}:{chunk_avg}:{chunk_max}"
        )
    start = 0
    for end, _ in _ITEM.iter_unpack(table):
        if not start < end <= start + chunk_max:
            raise ContentError(
                f"{where}: the casync index has a chunk that ends at {end} after one that ends"
                f" at {start}, with at most {chunk_max} bytes a chunk"
            )
        start = end
    return Index(flags, chunk_min, chunk_avg, chunk_max, table)

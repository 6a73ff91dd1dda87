"""Stable times: what did not change keeps the mtime it has in the previous release.

Modification times are part of an archive, so a build that touches every file would make every
chunk a new one. The source is not touched: the times are exchanged in the archive's stream, on
its way from casync to casync, and the content of each file is hashed again there, so that no
reader ever sees changed content under an old time.
"""

import hashlib
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from casync_updater.formats import mtree
from casync_updater.formats.index import FEATURES, SHA512_256
from casync_updater.formats.mtree import Node
from casync_updater.tools import casync

_HEADER = struct.Struct("<QQ")
_ENTRY = struct.Struct("<QQQQQQ")
_ENTRY_TYPE = 0x1396FABCEA5BBB51
_PAYLOAD_TYPE = 0x8B9E1D93D6DCFFC9
_FILENAME_TYPE = 0x6DBB6EBCB3161F0B
_GOODBYE_TYPE = 0xDFD35C5E8327C403

_GRANULARITY = {"2sec-time": 2 * 10**9, "sec-time": 10**9, "usec-time": 10**3, "nsec-time": 1}


class SourceChangedError(Exception):
    """A file has other content than a moment ago."""


@dataclass(frozen=True, slots=True)
class StableTime:
    """The time (ns) that a node keeps, and the hash its content must have for that."""

    time_ns: int
    digest: str | None


def stable_times(manifest: Path, source: Path, flags: int) -> dict[bytes, StableTime]:
    """Which nodes of a source keep the time of the previous release.

    The content is hashed only where a time differs at all.

    Args:
        manifest: the previous release's mtree, checked.
        source: the directory that is published now.
        flags: the feature flags of both archives.
    """
    features = [name for bit, name in enumerate(FEATURES) if flags >> bit & 1]
    with manifest.open("rb") as lines:
        old = list(mtree.parse(lines, features, str(manifest)))
    if not _touched(old, source, features):
        return {}
    with casync.mtree(source, flags=flags) as pieces:
        lines_now = b"".join(pieces).splitlines()
    return compare(old, list(mtree.parse(lines_now, features, str(source))))


def _touched(old: Iterable[Node], source: Path, features: Iterable[str]) -> bool:
    step = next((_GRANULARITY[name] for name in features if name in _GRANULARITY), None)
    if step is None:
        return False
    root = bytes(source)
    for node in old:
        try:
            now = Path((root + b"/" + node.path).decode(errors="surrogateescape")).lstat()
        except OSError:
            continue
        if now.st_mtime_ns // step * step != node.time_ns:
            return True
    return False


def compare(old: list[Node], new: list[Node]) -> dict[bytes, StableTime]:
    """The nodes that differ in their time only; folders with the same names in them."""
    before = {node.path: node for node in old}
    names_before, names_now = _names(old), _names(new)
    stable = {}
    for node in new:
        known = before.get(node.path)
        if (
            known is not None
            and known.time_ns is not None
            and known.time_ns != node.time_ns
            and replace(node, time_ns=known.time_ns) == known
            and names_before.get(node.path) == names_now.get(node.path)
        ):
            stable[node.path] = StableTime(known.time_ns, node.digest)
    return stable


def _names(nodes: Iterable[Node]) -> dict[bytes, set[bytes]]:
    """The names in each folder."""
    names: dict[bytes, set[bytes]] = {}
    for node in nodes:
        if node.path != b".":
            folder, _, name = node.path.rpartition(b"/")
            names.setdefault(folder or b".", set()).add(name)
    return names


def retimed(
    pieces: Iterable[bytes], times: Mapping[bytes, StableTime], flags: int
) -> Iterator[bytes]:
    """An archive's stream with other times.

    Raises:
        SourceChangedError: a file that should keep its time has other content by now.
    """
    hash_name = "sha512_256" if flags & SHA512_256 else "sha256"
    stream = _Stream(pieces)
    folders: list[bytes] = []
    name: bytes | None = None
    stable: StableTime | None = None
    while header := stream.upto(_HEADER.size):
        size, kind = _HEADER.unpack(header)
        left = size - _HEADER.size
        if kind == _ENTRY_TYPE:
            *fields, time_ns = _ENTRY.unpack(stream.upto(left))
            path = folders if name is None else [*folders, name]
            stable = times.get(b"/".join(path) or b".")
            yield header + _ENTRY.pack(*fields, time_ns if stable is None else stable.time_ns)
            if stat.S_ISDIR(fields[1]):
                folders = path
        elif kind == _FILENAME_TYPE:
            body = stream.upto(left)
            name = body[:-1]
            yield header + body
        else:
            yield header
            digest = hashlib.new(hash_name)
            for piece in stream.through(left):
                digest.update(piece)
                yield piece
            if kind == _PAYLOAD_TYPE and stable is not None and digest.hexdigest() != stable.digest:
                raise SourceChangedError
            if kind == _GOODBYE_TYPE:
                folders = folders[:-1]


class _Stream:
    """Exact amounts of bytes from pieces of any size."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = b""

    def through(self, size: int) -> Iterator[bytes]:
        """The next bytes in pieces; fewer only where the stream ends."""
        while size:
            piece = self._rest or next(self._pieces, b"")
            if not piece:
                return
            self._rest = piece[size:]
            yield piece[:size]
            size -= min(size, len(piece))

    def upto(self, size: int) -> bytes:
        """The next bytes in one piece."""
        return b"".join(self.through(size))

r"""The output of ``casync mtree``: one line for each node of a tree, in the archive's order.

A line is the path (bytes outside of the plain ones as ``\ooo``, the root as ``.``) and
``key=value`` words; see ``ca_sync_mtree`` in casync's ``casync-tool.c`` and mtree(5).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from casync_updater.errors import ContentError
from casync_updater.model import Changes

_ESCAPE = re.compile(rb"\\([0-7]{3})")
_OUTSIDE = frozenset({b"", b".", b".."})
_TYPES = frozenset({"file", "dir", "link", "char", "block", "fifo", "socket"})
_MODE_FEATURES = frozenset({"permissions", "read-only", "acl"})


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a tree; what the archive's features do not carry is None."""

    path: bytes
    type: str
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    user: bytes | None = None
    group: bytes | None = None
    size: int | None = None
    link: bytes | None = None
    device: bytes | None = None
    digest: str | None = None
    time_ns: int | None = None

    @property
    def order(self) -> tuple[bytes, ...]:
        """Sorts nodes as an archive has them: a folder's whole content after it."""
        return () if self.path == b"." else tuple(self.path.split(b"/"))


def escape(path: bytes) -> str:
    """A path as one printable word, the way casync writes it."""
    return "".join(
        chr(byte) if 33 <= byte <= 126 and byte not in b"\\#" else f"\\{byte:03o}" for byte in path
    )


def parse(lines: Iterable[bytes], features: Iterable[str], where: str) -> Iterator[Node]:
    """The nodes of an mtree, one by one.

    Args:
        lines: the lines, with or without their line ends.
        features: the archive's features; where none of them carries modes, ``mode`` is None,
            since casync then prints a made-up one.
        where: how the message of an error names the mtree.

    Raises:
        ContentError: a line that casync would not have written.
    """
    with_modes = not _MODE_FEATURES.isdisjoint(features)
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        try:
            yield _node(words, with_modes)
        except (ValueError, KeyError) as error:
            raise ContentError(f"{where}: line {number} is not mtree: {error}") from error


def _node(words: list[bytes], with_modes: bool) -> Node:
    values: dict[bytes, bytes] = {}
    for word in words[1:]:
        key, _, values[key] = word.partition(b"=")

    def number(key: bytes, base: int = 10) -> int | None:
        return int(values[key], base) if key in values else None

    path, kind = _unescape(words[0]), values[b"type"].decode("ascii")
    if path != b"." and not _OUTSIDE.isdisjoint(path.split(b"/")):
        raise ValueError(f"{escape(path)} leads out of the tree")
    if kind not in _TYPES:
        raise ValueError(f"there is no type {kind!r}")
    return Node(
        path=path,
        type=kind,
        mode=number(b"mode", 8) if with_modes else None,
        uid=number(b"uid"),
        gid=number(b"gid"),
        user=values.get(b"uname"),
        group=values.get(b"gname"),
        size=number(b"size"),
        link=_unescape(values[b"link"]) if b"link" in values else None,
        device=values.get(b"device"),
        digest=values[b"sha512256digest"].decode("ascii")
        if b"sha512256digest" in values
        else values[b"sha256digest"].decode("ascii")
        if b"sha256digest" in values
        else None,
        time_ns=_time(values[b"time"]) if b"time" in values else None,
    )


def _unescape(word: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), word)


def _time(word: bytes) -> int:
    seconds, _, fraction = word.partition(b".")
    return int(seconds) * 10**9 + int(fraction.ljust(9, b"0")[:9] or b"0")


def diff(old: Iterable[Node], new: Iterable[Node]) -> Changes:
    """What differs between two trees: type, content, mode, owner, link target.

    A new mtime alone is no change. What only one of the two archives carries (modes, say) is
    not compared, and the root itself is no addition: what is in it is. Both are read once, side
    by side, so memory grows with the difference only.
    """
    added: list[bytes] = []
    changed: list[bytes] = []
    removed: list[bytes] = []
    olds, news = iter(old), iter(new)
    before, after = next(olds, None), next(news, None)
    while before is not None or after is not None:
        if before is None or (after is not None and after.order < before.order):
            assert after is not None
            if after.path != b".":
                added.append(after.path)
            after = next(news, None)
        elif after is None or before.order < after.order:
            removed.append(before.path)
            before = next(olds, None)
        else:
            if not _same(before, after):
                changed.append(after.path)
            before, after = next(olds, None), next(news, None)
    return Changes(tuple(added), tuple(changed), tuple(removed))


def _same(old: Node, new: Node) -> bool:
    if (old.type, old.size, old.link, old.device, old.digest) != (
        new.type,
        new.size,
        new.link,
        new.device,
        new.digest,
    ):
        return False
    pairs = (
        (old.mode, new.mode),
        (old.uid, new.uid),
        (old.gid, new.gid),
        (old.user, new.user),
        (old.group, new.group),
    )
    return all(a is None or b is None or a == b for a, b in pairs)

"""A record as ``casync mtree`` shows the same archive, byte for byte.

So a version that this project extracted itself has its manifest without reading the tree again;
`mtree.parse` reads it like casync's own.
"""

import os
import stat
from collections.abc import Iterator

from casync_updater.formats.archive import TIMES, UIDS, Node
from casync_updater.formats.mtree import escape
from casync_updater.formats.record import END, FILE, Record

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def manifest(record: Record) -> bytes:
    """The mtree lines of a record's archive."""
    return "".join(_lines(record)).encode("ascii")


def _lines(record: Record) -> Iterator[str]:
    flags = record.index.flags
    digest_key = f"{record.index.hash_name.replace('_', '')}digest"
    prefixes: list[str] = []
    for number in range(len(record)):
        if record.kinds[number] == END:
            prefixes.pop()
            continue
        node = record.decode(number)
        name = escape(record.name(number)) if number else "."
        path = f"{prefixes[-1]}{name}" if prefixes else name
        words = [path, f"type={_TYPES[stat.S_IFMT(node.mode)]}", f"mode={node.mode & 0o7777:04o}"]
        if record.kinds[number] == FILE:
            words.append(f"size={record.size(number)}")
        words += _details(node)
        if flags & UIDS:
            words += [f"uid={node.uid}", f"gid={node.gid}"]
        if flags & TIMES:
            words.append(f"time={node.mtime // 10**9}.{node.mtime % 10**9:09}")
        if record.kinds[number] == FILE:
            words.append(f"{digest_key}={record.digest(number).hex()}")
        yield " ".join(words) + "\n"
        if stat.S_ISDIR(node.mode):
            prefixes.append(f"{path}/" if number else "")


def _details(node: Node) -> Iterator[str]:
    if stat.S_ISLNK(node.mode):
        yield f"link={escape(node.target)}"
    elif stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
        yield f"device=linux,{os.major(node.device)},{os.minor(node.device)}"

"""Manifests of real trees, made without casync."""

import hashlib
import os
import stat
from pathlib import Path

from casync_updater.formats.mtree import Node

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def nodes_of(root: Path, hash_name: str = "sha256") -> list[Node]:
    """What a manifest with modes, owners and times would say of a tree, in its order."""
    found = []
    for path in (root, *root.rglob("*")):
        status = path.lstat()
        kind = _KINDS[stat.S_IFMT(status.st_mode)]
        regular = kind == "file"
        found.append(
            Node(
                path=os.fsencode(path.relative_to(root)),
                type=kind,
                mode=None if kind == "link" else stat.S_IMODE(status.st_mode),
                uid=status.st_uid,
                gid=status.st_gid,
                size=status.st_size if regular else None,
                link=os.fsencode(path.readlink()) if kind == "link" else None,
                digest=hashlib.new(hash_name, path.read_bytes()).hexdigest() if regular else None,
                time_ns=status.st_mtime_ns,
            )
        )
    return sorted(found, key=lambda node: node.order)

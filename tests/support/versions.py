"""Versions as the state keeps them, made without casync: an index without chunks, a manifest."""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from casync_updater.cycle.staging import identity
from casync_updater.formats.mtree import escape
from casync_updater.model import Installed, Origin
from support.manifests import nodes_of

FLAGS = 0xB000000000000308


def index_bytes(number: int) -> bytes:
    """An index of an empty stream; the number makes it another file."""
    header = struct.pack("<QQQQQQ", 48, 0x96824D9C7B129FF9, FLAGS, 1, 1, 1000 + number)
    table = struct.pack("<QQ", 2**64 - 1, 0xE75B9E112F17417D)
    return header + table + struct.pack("<QQQQQ", 0, 0, 48, 56, 0x4B4F050E5549ECD1)


def manifest_bytes(root: Path) -> bytes:
    """What ``casync mtree`` prints of a tree with permissions, symlinks and sec-time."""
    lines = []
    for node in nodes_of(root, "sha512_256"):
        words = [escape(node.path), f"type={node.type}"]
        if node.mode is not None:
            words.append(f"mode={node.mode:04o}")
        if node.size is not None:
            words.append(f"size={node.size}")
        if node.link is not None:
            words.append(f"link={escape(node.link)}")
        assert node.time_ns is not None
        words.append(f"time={node.time_ns // 10**9}.000000000")
        if node.digest is not None:
            words.append(f"sha512256digest={node.digest}")
        lines.append(" ".join(words))
    return "\n".join(lines).encode() + b"\n"


@dataclass(frozen=True)
class Version:
    """A version with its companions."""

    installed: Installed
    index: bytes
    manifest: bytes


def version_of(tree: Path, number: int, *, since: float = 0.0) -> Version:
    """A tree as version ``number``."""
    index = index_bytes(number)
    installed = Installed(
        digest=hashlib.sha256(b"%d" % number).hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        since=since,
        source="http://localhost/x.caidx",
        origin=Origin.SOURCE,
        version=str(number),
        serial=number,
        date=float(number),
        root=identity(tree),
    )
    return Version(installed, index, manifest_bytes(tree))

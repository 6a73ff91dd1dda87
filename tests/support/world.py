"""Versions of a small tree, published and signed, for tests that tamper with them."""

import hashlib
import os
import random
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import zstandard

from casync_updater.formats import index as index_format
from casync_updater.formats.store import path_of
from casync_updater.model import FileRef, Release
from casync_updater.release import format_release
from support.signed import Publisher, copy, release_of
from support.trees import snapshot


def make_small_tree(root: Path, version: int) -> Path:
    """A tree of some forty chunks, a third of which differ between two versions."""
    rng = random.Random(7)
    root.mkdir(parents=True)
    for number in range(12):
        (root / f"file-{number}").write_bytes(rng.randbytes(3000))
    (root / "version").write_text(str(version))
    (root / "link").symlink_to(f"file-{version}")
    (root / "large").write_bytes(random.Random(version).randbytes(20_000) + bytes(20_000))
    return root


class World:
    """Three versions of a tree, each as a site that is complete by itself.

    Attributes:
        publisher: signs them.
        trees: what was published, by version.
        sites: where, signed.
        unsigned: the first two versions without signatures.
    """

    def __init__(self, folder: Path) -> None:
        self.publisher = Publisher(folder / "publisher")
        self.trees = {n: make_small_tree(folder / f"tree-{n}", n) for n in (1, 2, 3)}
        self.sites: dict[int, Path] = {}
        self.unsigned: dict[int, Path] = {}
        for n, tree in self.trees.items():
            self.publisher.publish(folder / "site", tree, version=f"{n}.0")
            self.sites[n] = copy(folder / "site", folder / f"site-{n}")
        for n in (1, 2):
            self.publisher.publish(
                folder / "unsigned", self.trees[n], version=f"{n}.0", signed=False
            )
            self.unsigned[n] = copy(folder / "unsigned", folder / f"unsigned-{n}")
        self.snapshots = {n: snapshot(tree) for n, tree in self.trees.items()}

    def replace_release(self, place: Path, **changes: object) -> None:
        """Publish another text under a right signature: what only the key's holder can do."""
        release = replace(release_of(place), **changes)  # type: ignore[arg-type]
        self.sign_into(place, release)

    def sign_into(self, place: Path, release: Release) -> None:
        body = self.publisher.sign(format_release(release).encode())
        (place / "tree.caidx.release").write_bytes(body)

    def publish_stream(self, place: Path, stream: bytes, flags: int | None = None) -> None:
        """Publish any bytes as an archive, signed: a publisher's key in the wrong hands."""
        if flags is None:
            flags = index_format.parse(read_index(place), "site").flags
        index = make_index(stream, flags)
        store_chunks(place / "store.castr", index, stream)
        self.publish_index(
            place, index, len(stream), index_format.parse(index, "").chunk_id(stream)
        )

    def publish_index(self, place: Path, index: bytes, size: int, digest: bytes) -> None:
        """Publish any bytes as an index, signed."""
        ref = FileRef("tree.caidx", len(index), hashlib.sha256(index).hexdigest())
        (place / "tree.caidx").write_bytes(index)
        (place / "by-hash" / "SHA256" / ref.sha256).write_bytes(index)
        self.replace_release(place, index=ref, mtree=None, digest=digest.hex(), archive_size=size)


def read_index(place: Path) -> bytes:
    return (place / "tree.caidx").read_bytes()


def make_index(stream: bytes, flags: int, size: int = 8192) -> bytes:
    """An index of a stream in chunks of one size."""
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    parsed = index_format.Index(flags, 1, size, size, b"")
    end, table = 0, b""
    for piece in pieces:
        end += len(piece)
        table += struct.pack("<Q32s", end, parsed.chunk_id(piece))
    return wrap_table(table, flags, size)


def wrap_table(table: bytes, flags: int, size: int) -> bytes:
    """An index around a table, whatever the table says."""
    head = struct.pack("<QQQQQQ", 48, 0x96824D9C7B129FF9, flags, 1, size, size)
    head += struct.pack("<QQ", 2**64 - 1, 0xE75B9E112F17417D)
    length = 16 + len(table) + 40
    return head + table + struct.pack("<QQQQQ", 0, 0, 48, length, 0x4B4F050E5549ECD1)


def store_chunks(store: Path, index: bytes, stream: bytes) -> None:
    for ref in index_format.parse(index, "an index"):
        path = store / path_of(ref.hex)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zstandard.compress(stream[ref.start : ref.start + ref.size]))


def archive_of(tree: Path) -> bytes:
    """casync's stream of a tree, with the features that sites are published with."""
    output = tree.with_suffix(".catar")
    options = [f"--with={name}" for name in ("permissions", "symlinks", "sec-time")]
    environment = {**os.environ, "TMPDIR": str(tree.parent)}
    subprocess.run(
        ["casync", "make", *options, output, tree], check=True, capture_output=True, env=environment
    )
    return output.read_bytes()

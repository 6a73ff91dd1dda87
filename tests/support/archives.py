"""Archives that the real casync makes, and chunks out of its stores without a network."""

import hashlib
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from casync_updater.formats import index as index_format
from casync_updater.formats.index import Index
from casync_updater.model import ChunkRef


def casync(*arguments: str | Path) -> str:
    """Run casync; what it printed."""
    done = subprocess.run(
        ["casync", *map(str, arguments)], capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode().strip()


def options(features: Sequence[str]) -> list[str]:
    """casync's options for exactly these features."""
    return [f"--with={feature}" for feature in features]


def make_archive(
    tree: Path, where: Path, features: Sequence[str], *, chunk_size: str = "64K"
) -> Index:
    """Archive a tree into the store beside the index."""
    store = where.parent / "store.castr"
    casync(
        "make", *options(features), f"--chunk-size={chunk_size}", f"--store={store}", where, tree
    )
    return index_format.parse(where.read_bytes(), str(where))


def tree_digest(tree: Path, features: Sequence[str]) -> str:
    """What casync says a tree's archive digest is."""
    return casync("digest", *options(features), tree)


def archive_digest(index: Index, chunks: "StoreChunks") -> str:
    """The archive digest that stands for an index: that of its whole stream."""
    digest = hashlib.new(index.hash_name)
    for ref in index:
        digest.update(chunks.read(ref))
    return digest.hexdigest()


@dataclass
class StoreChunks:
    """Chunks from a store on this machine, verified; notes what was asked for."""

    store: Path
    hash_name: str = "sha512_256"
    streamed: list[ChunkRef] = field(default_factory=list)
    single: list[ChunkRef] = field(default_factory=list)

    def stream(self, refs: Iterable[ChunkRef]) -> Iterator[tuple[ChunkRef, bytes]]:
        for ref in refs:
            self.streamed.append(ref)
            yield ref, self.read(ref)

    def get(self, ref: ChunkRef) -> bytes:
        self.single.append(ref)
        return self.read(ref)

    def read(self, ref: ChunkRef) -> bytes:
        packed = (self.store / ref.hex[:4] / f"{ref.hex}.cacnk").read_bytes()
        data = zstandard.ZstdDecompressor().decompress(packed, max_output_size=ref.size)
        assert hashlib.new(self.hash_name, data).digest() == ref.id
        return data


def open_root(path: Path) -> int:
    """An open descriptor of a directory, which is made where it is not there."""
    path.mkdir(exist_ok=True)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)

"""What the state kept of a version, and whether a tree still is that version."""

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import zstandard

from casync_updater.cycle.extract.tree import TreeFiles
from casync_updater.cycle.tree import Difference, archive_digest, cut, differences
from casync_updater.errors import ContentError
from casync_updater.formats import index as index_format
from casync_updater.formats import mtree
from casync_updater.formats import record as record_format
from casync_updater.formats.index import Index
from casync_updater.formats.manifest import manifest
from casync_updater.model import ChunkRef, Entry, Installed
from casync_updater.state import StateFolder


def kept_index(folder: StateFolder, installed: Installed) -> Index:
    """The index of a version.

    Raises:
        ContentError: it is gone, or damaged.
    """
    file = folder.index(installed)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ContentError(f"{file} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != installed.index_sha256:
        raise ContentError(f"{file} is damaged")
    return index_format.parse(data, str(file))


def kept_manifest(folder: StateFolder, installed: Installed) -> bytes:
    """The mtree lines of a version.

    Raises:
        ContentError: they are gone, or damaged.
        LocalError: they cannot be read.
    """
    record = record_format.load(folder.record(installed))
    if record is not None:
        return manifest(record)
    file = folder.manifest(installed)
    try:
        return zstandard.decompress(file.read_bytes())
    except OSError as error:
        raise ContentError(f"{file} cannot be read: {error.strerror}") from error
    except zstandard.ZstdError as error:
        raise ContentError(f"{file} is damaged: {error}") from error


def kept_pieces(
    folder: StateFolder, installed: Installed, tree: Path, wanted: Collection[bytes]
) -> Iterator[tuple[ChunkRef, bytes]]:
    """Chunks of a version, made again from its tree; verified, and only those it still has.

    Args:
        folder: has the version's record, usually; without one casync reads the whole tree.
        installed: the version.
        tree: where it stands.
        wanted: the ids of the chunks.

    Raises:
        ContentError: what was kept of the version is gone, or damaged.
        LocalError: the tree cannot be read.
    """
    index = kept_index(folder, installed)
    record = record_format.load(folder.record(installed))
    pieces = cut(tree, index) if record is None else _recorded_pieces(record, tree, wanted)
    missing = set(wanted)
    for ref, data in pieces:
        if ref.id in missing and index.chunk_id(data) == ref.id:
            missing.discard(ref.id)
            yield ref, data


def _recorded_pieces(
    record: record_format.Record, tree: Path, wanted: Collection[bytes]
) -> Iterator[tuple[ChunkRef, bytes]]:
    root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with TreeFiles(record, root) as files:
            for ref in record.index:
                if ref.id in wanted:
                    yield ref, files.stream(ref.start, ref.start + ref.size) or b""
    finally:
        os.close(root)


def kept_nodes(folder: StateFolder, installed: Installed) -> Iterator[mtree.Node]:
    """The manifest of a version, node by node.

    Raises:
        ContentError: it is gone, or damaged.
    """
    lines = kept_manifest(folder, installed).splitlines()
    features = kept_index(folder, installed).features
    return mtree.parse(lines, features, str(folder.manifest(installed)))


def version_differences(
    path: Path, installed: Installed, entry: Entry, folder: StateFolder, preserve: Iterable[str]
) -> Iterator[Difference]:
    """How what stands at a path differs from a version; see `tree.differences`.

    Raises:
        ContentError: what was kept of the version is gone, or damaged.
        OSError: something in the tree cannot be read.
    """
    index = kept_index(folder, installed)
    if entry.is_archive:
        yield from differences(
            path,
            kept_nodes(folder, installed),
            features=index.features,
            hash_name=index.hash_name,
            preserve=preserve,
        )
        return
    try:
        archive_digest(path, index)
    except FileNotFoundError:
        yield Difference(b".", "missing")
    except ContentError:
        yield Difference(b".", "content")

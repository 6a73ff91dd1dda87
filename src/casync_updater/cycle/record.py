"""What the state kept of a version, and whether a tree still is that version."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from casync_updater.cycle.tree import Difference, archive_digest, differences
from casync_updater.errors import ContentError
from casync_updater.formats import index as index_format
from casync_updater.formats import mtree
from casync_updater.formats.index import Index
from casync_updater.model import Entry, Installed
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
    """
    file = folder.manifest(installed)
    try:
        return zstandard.decompress(file.read_bytes())
    except OSError as error:
        raise ContentError(f"{file} cannot be read: {error.strerror}") from error
    except zstandard.ZstdError as error:
        raise ContentError(f"{file} is damaged: {error}") from error


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

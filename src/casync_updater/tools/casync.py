"""The real casync, as typed functions.

Paths are absolute: casync takes ``host:path`` for a server to reach with ssh and ``-`` for
standard input, and only a leading ``/`` makes sure that it does not. What an archive carries is
said by the feature flags of its index's header (`Index.flags`), never by a guess: every entry of
an archive repeats them, so a digest made with other flags is another digest.

casync never syncs what it writes; that is left to the callers.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from casync_updater.errors import LocalError
from casync_updater.formats.index import FEATURES, SHA512_256
from casync_updater.tools import process

STALL = 600.0
"""Seconds in which casync must read, write or say something."""

_EXCLUDE_FILE = 0x1000000000000000
_EXCLUDE_SUBMOUNTS = 0x4000000000000000
_EXCLUDE_NODUMP = 0x8000000000000000
_ENTRY_FLAGS = slice(16, 24)


def make(
    index: Path,
    source: Path,
    *,
    store: Path,
    flags: int,
    chunk_size: str | None = None,
    compression: str | None = None,
    activity: Callable[[], object] | None = None,
) -> str:
    """Write an index of a directory, file or block device, and the chunks the store lacks.

    casync's own ``--cache`` is not offered: with it casync prints no digest, so another pass over
    all chunks would be needed, which costs what the cache saves (212 MB in 12,448 files: 0.9 s
    without, 0.1 s with it and 0.7 s for the digest), and the second run over a tree of one small
    file fails with "Broken pipe".

    Args:
        index: where it is written; the suffix decides between archive and blob.
        source: what is read.
        store: the chunk store, made where it is missing.
        flags: the feature flags of the index's header.
        chunk_size: ``MIN:AVG:MAX`` in bytes, None for casync's default.
        compression: ``zstd``, ``xz`` or ``gzip``, None for casync's default.
        activity: asked twice a second; a value that changes while casync gets on.

    Returns:
        The digest of the whole stream, in hex.
    """
    options = [f"--store={_absolute(store)}", *_options(flags)]
    if chunk_size is not None:
        options.append(f"--chunk-size={chunk_size}")
    if compression is not None:
        options.append(f"--compression={compression}")
    argv = ["casync", "make", *options, _absolute(index), _absolute(source)]
    return _digest_line(process.run(argv, stall=STALL, activity=activity))


@contextlib.contextmanager
def mtree(path: Path, *, flags: int, store: Path | None = None) -> Iterator[Iterator[bytes]]:
    """The manifest of an archive index or a directory, piece by piece.

    For an index casync reads, and so checks, every chunk of the archive on the way.
    """
    argv = ["casync", "mtree", *_store(store), *_options(flags), _absolute(path)]
    with process.stream(argv, stall=STALL) as pieces:
        yield pieces


def digest(path: Path, *, flags: int, store: Path | None = None) -> str:
    """The digest of an index's stream, or the one that a directory or file would have.

    For an index casync reads, and so checks, every chunk.
    """
    argv = ["casync", "digest", *_store(store), *_options(flags), _absolute(path)]
    return _digest_line(process.run(argv, stall=STALL))


def extract(
    index: Path,
    destination: Path,
    *,
    store: Path,
    flags: int,
    seeds: Sequence[Path] = (),
    hardlink: bool = False,
    reflink: bool = True,
    keep_fds: Sequence[int] = (),
    temporary: Path | None = None,
    activity: Callable[[], object] | None = None,
) -> None:
    """Make a directory, file or block device equal to an index.

    Args:
        index: what to extract.
        destination: where to; what is there already serves as a seed, and what is not in the
            archive is deleted.
        store: the local chunk store.
        flags: the metadata to restore, normally `Index.flags`; less where this user may not
            restore all of it.
        seeds: trees or files that chunks may be taken from.
        hardlink: link equal files of the seeds instead of copying them.
        reflink: share equal extents with the seeds where the file system can.
        keep_fds: descriptors that casync holds open (a lock that shall live as long).
        temporary: where casync puts what it finds in the seeds; it leaves that there when it is
            killed. None for the system's folder for temporary files.
        activity: asked twice a second; a value that changes while casync gets on.
    """
    argv = [
        "casync",
        "extract",
        f"--store={_absolute(store)}",
        *(f"--seed={_absolute(seed)}" for seed in seeds),
        f"--hardlink={'yes' if hardlink else 'no'}",
        f"--reflink={'yes' if reflink else 'no'}",
        *_features(flags),
        _absolute(index),
        _absolute(destination),
    ]
    env = None if temporary is None else {**os.environ, "TMPDIR": _absolute(temporary)}
    process.run(argv, stall=STALL, activity=activity, keep_fds=keep_fds, env=env)


@contextlib.contextmanager
def stream_archive(directory: Path, *, flags: int) -> Iterator[Iterator[bytes]]:
    """The archive stream of a directory, piece by piece."""
    argv = ["casync", "make", *_options(flags), "-", _absolute(directory)]
    with process.stream(argv, stall=STALL) as pieces:
        yield pieces


def normalised(features: Iterable[str]) -> int:
    """The flags that casync itself gives an archive with these features.

    casync takes group names (``unix``) and drops what another feature includes (``acl`` drops
    ``permissions``); the ENTRY that begins the archive of an empty folder shows the outcome.

    Raises:
        LocalError: casync does not know one of the features.
    """
    options = [f"--with={feature}" for feature in features] or ["--without=all"]
    with tempfile.TemporaryDirectory() as empty:
        argv = ["casync", "make", *options, "-", _absolute(Path(empty))]
        archive = process.run(argv, timeout=60).stdout
    return int.from_bytes(archive[_ENTRY_FLAGS], "little")


def _absolute(path: Path) -> str:
    if not path.is_absolute():
        raise ValueError(f"casync is only given absolute paths, not {str(path)!r}")
    return str(path)


def _store(store: Path | None) -> list[str]:
    return [] if store is None else [f"--store={_absolute(store)}"]


def _features(flags: int) -> list[str]:
    """Several ``--with`` add up, and the first one takes the place of the default, ``best``."""
    names = [name for bit, name in enumerate(FEATURES) if flags >> bit & 1]
    return [f"--with={name}" for name in names] or ["--without=all"]


def _options(flags: int) -> list[str]:
    return [
        *_features(flags),
        f"--digest={'sha512-256' if flags & SHA512_256 else 'sha256'}",
        f"--exclude-nodump={'yes' if flags & _EXCLUDE_NODUMP else 'no'}",
        f"--exclude-submounts={'yes' if flags & _EXCLUDE_SUBMOUNTS else 'no'}",
        f"--exclude-file={'yes' if flags & _EXCLUDE_FILE else 'no'}",
    ]


def _digest_line(result: process.Result) -> str:
    line = result.stdout.decode("ascii", "replace").strip()
    if len(line) != 64 or line.strip("0123456789abcdef"):
        raise LocalError(f"casync printed {line[:80]!r} in place of a digest")
    return line

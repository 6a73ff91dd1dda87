"""Files that are either the old or the new ones, also after a power cut."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from casync_updater.syscalls import sync_file_system


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace a file: temporary file beside it, write, fsync, rename, fsync of the folder.

    One writer at a time. The temporary name is always the same, so that one left by a kill is
    used up by the next write: nothing grows.

    Raises:
        OSError: nothing was changed, and no temporary file is left.
    """
    temporary = _temporary(path)
    try:
        _write(temporary, (data,), mode, sync=True)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_together(files: Mapping[Path, Iterable[bytes]]) -> None:
    """Replace several files of one folder, each as `write_atomic` does it, in their order.

    One sync of the file system takes the place of one for each file, for which the medium would
    be waited for again and again.

    Raises:
        OSError: some of them may be replaced; no temporary file is left.
    """
    (folder,) = {path.parent for path in files}
    try:
        for path, pieces in files.items():
            _write(_temporary(path), pieces, 0o644, sync=False)
        sync_file_system(folder)
        for path in files:
            _temporary(path).replace(path)
    except BaseException:
        for path in files:
            with suppress(OSError):
                _temporary(path).unlink()
        raise
    sync_folder(folder)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _write(path: Path, pieces: Iterable[bytes], mode: int, *, sync: bool) -> None:
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with named(path), os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fchmod(file.fileno(), mode)
        if sync:
            os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make what was created, renamed or removed in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with named(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What fails in here says which file it was about: errors of a descriptor do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise

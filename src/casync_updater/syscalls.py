"""System calls that Python's os module does not have."""

import ctypes
import errno
import os
import stat
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)

NO_EXCHANGE = frozenset({errno.EXDEV, errno.EBUSY, errno.EINVAL, errno.ENOSYS})
"""What renameat2 answers where an exchange cannot work at all: a lower layer of overlayfs, a
mount point, a file system or a kernel without it."""


def exchange(first: Path, second: Path) -> None:
    """Let two names change places in one atomic step (renameat2, RENAME_EXCHANGE).

    Raises:
        OSError: see `NO_EXCHANGE` for the errors that will not go away.
    """
    _renameat2(first, second, _RENAME_EXCHANGE)


def rename_noreplace(source: Path, target: Path) -> None:
    """Rename, and fail with EEXIST where the target is there."""
    _renameat2(source, target, _RENAME_NOREPLACE)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    arguments = (os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags)
    if _libc.renameat2(_AT_FDCWD, *arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source), None, str(target))


def sync_file_system(path: Path) -> None:
    """Write everything of the file system that holds a path to its medium (syncfs).

    One call for a whole tree: thousands of single fsyncs would each wait for the medium. The
    file system of a block device's node is that of /dev, so a device is synced by itself.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if stat.S_ISBLK(os.fstat(descriptor).st_mode):
            os.fsync(descriptor)
        elif _libc.syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)


def free_space(path: Path) -> int:
    """Bytes that this user may still write to the file system that holds a path."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize

"""System calls that Python's os module does not have."""

import ctypes
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2

_UNCHANGEABLE = 0x10 | 0x20  # FS_IMMUTABLE_FL, FS_APPEND_FL
_LONG = struct.calcsize("L")
_FS_IOC_GETFLAGS = 0x80006601 | _LONG << 16
_FS_IOC_SETFLAGS = 0x40006602 | _LONG << 16

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h

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
        else:
            sync_around(descriptor)
    finally:
        os.close(descriptor)


def sync_around(descriptor: int) -> None:
    """Write everything of the file system that holds an open file to its medium (syncfs)."""
    if _libc.syncfs(descriptor):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def save_memory() -> None:
    """Have malloc give back what was freed: threads come and go here, and chunks and columns.

    It would keep eight arenas for each processor, each with what its threads freed, and put ever
    larger pieces among small ones, where they leave holes when they grow. Only the GNU C library
    has such settings.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 2)
        _libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)
        _libc.mallopt(_M_TRIM_THRESHOLD, 256 << 10)


def is_unchangeable(path: Path) -> bool:
    """Whether a file or folder is immutable or append-only (chattr +i, +a)."""
    return _inode_flags(path, None, take=0) & _UNCHANGEABLE != 0


def make_changeable(name: bytes, folder: int) -> None:
    """Take these two flags away from what an open folder holds.

    Raises:
        PermissionError: without CAP_LINUX_IMMUTABLE.
    """
    _inode_flags(name, folder, take=_UNCHANGEABLE)


def _inode_flags(name: Path | bytes, folder: int | None, *, take: int) -> int:
    """The flags of FS_IOC_GETFLAGS, none for what cannot have them; those to `take` are cleared."""
    mode = os.lstat(name, dir_fd=folder).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return 0
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
    except PermissionError:
        return 0  # nor could this user clear them
    try:
        flags: int
        try:
            # Declared as a long, and read and written as an int, since ever.
            found = fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, bytes(_LONG))
        except OSError:
            return 0  # a file system without them
        (flags,) = struct.unpack_from("I", found)
        if flags & take:
            left = struct.pack("I", flags & ~take).ljust(_LONG, b"\0")
            fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, left)
        return flags
    finally:
        os.close(descriptor)


def free_space(path: Path) -> int:
    """Bytes that this user may still write to the file system that holds a path."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize

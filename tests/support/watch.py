"""Who opened what: the kernel's own record (inotify) of every access below a folder."""

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

_EVENT = struct.Struct("iIII")
_OPEN = 0x20
_LIBC = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Reports what was opened (files read, folders listed) since it was made."""

    def __init__(self, root: Path) -> None:
        self._descriptor = _LIBC.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self._names: dict[int, str] = {}
        for path in (root, *root.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                number = _LIBC.inotify_add_watch(self._descriptor, os.fsencode(path), _OPEN)
                if number < 0:
                    raise OSError(ctypes.get_errno(), str(path))
                self._names[number] = str(path.relative_to(root))

    def opened(self) -> set[str]:
        """What was opened, as paths relative to the folder."""
        found = set()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._descriptor, 1 << 16):
                while data:
                    number, _, _, size = _EVENT.unpack_from(data)
                    name = data[_EVENT.size : _EVENT.size + size].rstrip(b"\0")
                    found.add(os.path.normpath(f"{self._names[number]}/{os.fsdecode(name)}"))
                    data = data[_EVENT.size + size :]
        return found

    def close(self) -> None:
        os.close(self._descriptor)


@contextlib.contextmanager
def watch(root: Path) -> Iterator[Watch]:
    """Watch a folder and everything below it that is there now."""
    watching = Watch(root)
    try:
        yield watching
    finally:
        watching.close()

"""Writes to the disk while the network is waited for, so that the commit has little left to sync.

The kernel itself keeps new data for half a minute; a first install would be fetched in the time
of its bytes on the line, and written when everybody waits for nothing else.
"""

import threading
from types import TracebackType
from typing import Self

from casync_updater.syscalls import sync_around

_STEP = 16 << 20
"""Bytes; an update writes less, and is synced once."""


class Writeback:
    """Syncs the file system beside the build; leaving the block waits for it.

    Args:
        root: an open descriptor on that file system.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._pending = 0
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def wrote(self, count: int) -> None:
        """So many bytes were written.

        Raises:
            OSError: what was written before did not reach the disk. Only this descriptor is told.
        """
        self._pending += count
        if self._pending < _STEP or (self._thread is not None and self._thread.is_alive()):
            return
        self._raise()
        self._pending = 0
        self._thread = threading.Thread(target=self._sync, name="writeback", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.join()
        if error is None:
            self._raise()

    def _sync(self) -> None:
        try:
            sync_around(self._root)
        except OSError as error:
            self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

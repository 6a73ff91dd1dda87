"""How a cycle ends early: at once where it can be resumed, at the next safe point elsewhere."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from casync_updater.errors import UpdaterError


class StoppedError(UpdaterError):
    """The updater was told to stop; nothing failed, the next start goes on."""

    retryable = True


class Stop:
    """Turns SIGTERM and SIGINT into `StoppedError` in the main thread.

    Resumable steps are simply left, wherever they are. What must not be cut (a commit, the
    hand-over of an action, an update in place) stands in a `shielded` block: a signal that
    comes in it is raised when the block is left.
    """

    def __init__(self) -> None:
        self._shields = 0
        self._wanted = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["Stop"]:
        """Handle the signals while the block lasts."""
        handlers = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Finish the block before a signal counts."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        self.check()

    def check(self) -> None:
        """A safe point.

        Raises:
            StoppedError: a signal came.
        """
        if self._wanted and not self._shields:
            raise StoppedError("stopped; the next start goes on")

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._wanted = True
        self.check()

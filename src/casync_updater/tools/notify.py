"""What systemd is told about the service, see sd_notify(3) and sd_watchdog_enabled(3)."""

import os
from collections.abc import Callable, Mapping

Send = Callable[[str], None]
"""Takes lines of ``NAME=value``."""


class Notifier:
    """Tells the service manager; does nothing where none asked to be told."""

    def __init__(self, send: Send | None, watchdog: float | None = None) -> None:
        self._send = send
        self.watchdog = watchdog
        """Seconds within which the manager wants a sign of life; None for never."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Notifier":
        """The manager that this process's environment names."""
        if not environment.get("NOTIFY_SOCKET"):
            return cls(None)
        try:
            from systemd.daemon import notify  # noqa: PLC0415 - only where there is a manager
        except ImportError:
            return cls(None)
        watchdog = None
        microseconds = environment.get("WATCHDOG_USEC", "")
        wanted = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        if wanted and microseconds.isdecimal() and int(microseconds):
            watchdog = int(microseconds) / 1e6
        return cls(notify, watchdog)

    def ready(self) -> None:
        """The service is up, or has reloaded."""
        self._tell("READY=1")

    def reloading(self, monotonic: float) -> None:
        """The configuration is being read again; `monotonic` is CLOCK_MONOTONIC in seconds."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={int(monotonic * 1e6)}")

    def stopping(self) -> None:
        """The service comes to its end."""
        self._tell("STOPPING=1")

    def status(self, words: str) -> None:
        """What goes on, for people."""
        self._tell("STATUS=" + " ".join(words.split()))

    def alive(self) -> None:
        """The loop turns."""
        self._tell("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """The start or stop takes as long from now on."""
        self._tell(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _tell(self, lines: str) -> None:
        if self._send is not None:
            self._send(lines)

"""Time as an interface, so that tests can move it."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(seconds: float) -> datetime:
    """Seconds since 1970 as a date, also where time_t ends in 2038 (Debian 12 with 32 bits).

    Raises:
        OverflowError: it is not within the years 1 to 9999.
    """
    return _EPOCH + timedelta(seconds=seconds)


class Clock(Protocol):
    """Where a room gets the time from."""

    def time(self) -> float:
        """Wall clock, in seconds since 1970; may jump, may be wrong."""

    def monotonic(self) -> float:
        """Seconds that only go forward."""

    def sleep(self, seconds: float) -> None:
        """Wait."""

    def boot_id(self) -> str:
        """The kernel's identifier of the running boot."""


class SystemClock:
    """The machine's own clock."""

    def time(self) -> float:
        """See `Clock.time`."""
        return time.time()

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """See `Clock.sleep`."""
        time.sleep(seconds)

    def boot_id(self) -> str:
        """See `Clock.boot_id`."""
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

"""What a cycle's process tells the daemon: JSON lines over an inherited pipe.

::

    {"step": "build", "version": "1.4.2"}
    {"done": 123, "total": 456}
    {"result": {"outcome": "updated", "exit": 0, "message": "...", ...}}

The last line is the result; a process that ends without one has crashed. The reading side
believes nothing: a process that dies can leave half a line, and what hangs in it can write
anything.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from casync_updater.clock import Clock
from casync_updater.model import Origin, Progress, Step

LINE_LIMIT = 1 << 20
"""Bytes; a longer line is no report. A result names every trigger command that ran."""

_PROGRESS_PAUSE = 0.2


class Outcome(StrEnum):
    """How a cycle ended."""

    CURRENT = "current"
    UPDATED = "updated"
    ADOPTED = "adopted"
    REFUSED = "refused"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    BUSY = "busy"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Began:
    """A step begins; version is what is being installed, where that is known."""

    step: Step
    version: str | None = None


@dataclass(frozen=True, slots=True)
class CycleEnd:
    """The result: the last report of a cycle."""

    outcome: Outcome
    exit: int
    message: str
    serial: int | None = None
    version: str | None = None
    """The version that is installed now."""
    actions: tuple[str, ...] = ()
    """The commands that ran as triggers; `startup` does not repeat them."""
    source: Origin | None = None
    had: str | None = None
    """The version that was installed before."""
    received: int = 0
    """Bytes that came over a network, without the headers of HTTP and below."""

    @property
    def checked(self) -> bool:
        """True where the entry's own source answered and there is nothing left to fetch."""
        done = (Outcome.CURRENT, Outcome.UPDATED, Outcome.ADOPTED)
        return self.source is Origin.SOURCE and self.outcome in done

    @property
    def reached(self) -> bool:
        """False where the entry's own source could not be used, a backup in its place or not."""
        return self.outcome is not Outcome.UNREACHABLE and self.source is not Origin.BACKUP


Report = Began | Progress | CycleEnd


def encode(report: Report) -> bytes:
    """A report as one line, with its newline."""
    match report:
        case Began(step, version):
            document: dict[str, Any] = {"step": step, "version": version}
        case Progress(done, total):
            document = {"done": done, "total": total}
        case CycleEnd():
            document = {"result": dataclasses.asdict(report)}
    return json.dumps(document).encode() + b"\n"


def decode(line: bytes) -> Report | None:
    """The report in a line; None for whatever is none.

    Unknown keys are left alone, so that a daemon understands the process of a newer package.
    """
    try:
        return _report(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None


class LineReader:
    """Cuts what came out of a pipe into reports; keeps the unfinished end."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False
        self.rejected = 0
        """Lines that were no report."""

    def feed(self, data: bytes) -> Iterator[Report]:
        """The reports that these bytes complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            report = None if self._skipping else decode(line)
            self._skipping = False
            if report is None:
                self.rejected += 1
            else:
                yield report
        if len(self._rest) > LINE_LIMIT:
            self._rest = b""
            self._skipping = True


class PipeMonitor:
    """A `Monitor` that reports over a pipe, and takes the result at the end.

    The daemon ends a process that reports nothing for its `stall_timeout`. Whoever waits long
    for something that moves (a program, an action) calls `progress` again and again, also with
    the same figures: at most five lines a second are written, and the last one always is.
    A daemon that is gone is no reason to fail: reports are then dropped.
    """

    def __init__(self, fd: int, clock: Clock) -> None:
        self._fd = fd
        self._clock = clock
        self._last = -_PROGRESS_PAUSE
        self._held: Progress | None = None

    def step(self, step: Step, version: str | None = None) -> None:
        """See `Monitor.step`."""
        self._flush()
        self._write(Began(step, version))

    def progress(self, progress: Progress) -> None:
        """See `Monitor.progress`."""
        self._held = progress
        if self._clock.monotonic() - self._last >= _PROGRESS_PAUSE:
            self._flush()

    def finish(self, result: CycleEnd) -> None:
        """The cycle is over; nothing is reported after this."""
        self._flush()
        self._write(result)

    def _flush(self) -> None:
        if self._held is not None:
            self._last = self._clock.monotonic()
            self._write(self._held)
            self._held = None

    def _write(self, report: Report) -> None:
        data = encode(report)
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(self._fd, data) :]


def _report(document: Any) -> Report | None:
    match document:
        case {"step": str(step)}:
            return Began(Step(step), _optional(document.get("version")))
        case {"done": done}:
            total = document.get("total")
            return Progress(_count(done), None if total is None else _count(total))
        case {"result": {"outcome": str(outcome), "exit": code, "message": str(message), **rest}}:
            source = _optional(rest.get("source"))
            serial = rest.get("serial")
            actions = rest.get("actions") or ()
            if not isinstance(actions, list | tuple):
                raise TypeError(actions)
            return CycleEnd(
                Outcome(outcome),
                _count(code),
                message,
                None if serial is None else _count(serial),
                _optional(rest.get("version")),
                tuple(_text(command) for command in actions),
                None if source is None else Origin(source),
                _optional(rest.get("had")),
                _count(rest.get("received", 0)),
            )
    return None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _optional(value: Any) -> str | None:
    return None if value is None else _text(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:  # a bool is an int to isinstance
        raise TypeError(value)
    return value

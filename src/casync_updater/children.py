"""The daemon's children: started, listened to, told to stop, and ended where they hang."""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from casync_updater.errors import LocalError
from casync_updater.logs import fields
from casync_updater.model import Progress, Reason, Step
from casync_updater.reports import Began, CycleEnd, LineReader

log = logging.getLogger(__name__)

_FOR_THE_DAEMON_ONLY = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Kind(StrEnum):
    """What a child was started for, which is also its command."""

    RECOVER = "recover"
    CYCLE = "update"
    STARTUP = "startup"
    ATTACH = "attach"
    DETACH = "detach"


@dataclass(frozen=True, slots=True)
class Task:
    """What a child is to do."""

    kind: Kind
    name: str = ""
    """The entry; empty where the task is about all of them, or about a drive."""
    reason: Reason | None = None
    input: Any = None
    """What the child reads as JSON from its standard input."""
    offline: bool = False
    """The entry's source is believed to be out of reach: one short attempt is enough."""

    @property
    def title(self) -> str:
        """How messages begin."""
        return self.name or self.kind.value


class Child:
    """One process: its pidfd, its report pipe, and what it has said.

    It gets SIGTERM when the daemon dies, however that happens.

    Raises:
        LocalError: it could not be started.
    """

    def __init__(self, program: Sequence[str], task: Task, now: float, wall: float) -> None:
        self.task = task
        self.since = wall
        self.step = Step.RECOVER if task.kind is Kind.RECOVER else Step.CHECK
        self.version: str | None = None
        self.progress: Progress | None = None
        self.result: CycleEnd | None = None
        self._heard = now
        self._told: float | None = None
        """When it was told to end for having said nothing."""
        self._killed = False
        self._asked = False
        self._lines = LineReader()
        self._reports, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reports, False)
        try:
            inherited = (writer,) if task.kind is Kind.CYCLE else ()
            self._process = _start([*program, *_arguments(task, writer)], inherited, task.input)
        except BaseException:
            os.close(self._reports)
            raise
        finally:
            os.close(writer)
        self.pidfd = os.pidfd_open(self._process.pid)

    @property
    def reports(self) -> int:
        """The descriptor of its reports; -1 once there will be none."""
        return self._reports

    @property
    def killed(self) -> bool:
        """True where nothing but the kernel can end it now."""
        return self._killed

    def listen(self, now: float) -> None:
        """Take in what it has reported."""
        while self._reports >= 0:
            try:
                data = os.read(self._reports, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                os.close(self._reports)
                self._reports = -1
            for report in self._lines.feed(data):
                self._heard = now
                match report:
                    case Began(step, version):
                        self.step, self.version, self.progress = step, version, None
                    case Progress():
                        self.progress = report
                    case CycleEnd():
                        self.result = report

    def tell_to_stop(self, now: float) -> None:
        """SIGTERM: what is safe to leave is left, what is not is finished first."""
        self._asked = True
        self._heard = now  # its silence counts anew
        self._process.send_signal(signal.SIGTERM)

    def supervise(self, now: float, silence: float | None, grace: float) -> float | None:
        """End it where it has said nothing for too long; gives the time to look again.

        Args:
            now: monotonic seconds.
            silence: seconds that it may say nothing, None for ever.
            grace: seconds between SIGTERM and SIGKILL; whoever reports in them goes on.
        """
        if silence is None or self._killed:
            return None
        if self._told is not None and self._heard > self._told:
            self._told = None
        if self._told is None:
            if now < self._heard + silence:
                return self._heard + silence
            log.error(
                "%s: its process has said nothing for %.0f seconds and is ended",
                self.task.title,
                now - self._heard,
                extra=fields(self.task.name),
            )
            self._told = self._heard = now
            self._process.send_signal(signal.SIGTERM)
        if now < self._told + grace:
            return self._told + grace
        log.error(
            "%s: its process does not end and is killed",
            self.task.title,
            extra=fields(self.task.name),
        )
        self._kill_group()
        self._killed = True
        return None

    def never_began(self, code: int) -> bool:
        """Whether SIGTERM came as it was told, before the program could take it as a request."""
        return self._asked and self.result is None and code == -signal.SIGTERM

    def reap(self, now: float) -> int:
        """After its end: take the last reports, give everything back; its exit code."""
        self.listen(now)
        if self._reports >= 0:
            # Something it started holds the pipe; nobody listens any longer.
            os.close(self._reports)
            self._reports = -1
        self._kill_group()  # before the pid can be given to another process
        code = self._process.wait()
        os.close(self.pidfd)
        if self._lines.rejected:
            log.warning(
                "%s: its process sent %d lines that are no reports",
                self.task.title,
                self._lines.rejected,
                extra=fields(self.task.name),
            )
        return code

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _arguments(task: Task, report: int) -> list[str]:
    match task.kind:
        case Kind.RECOVER | Kind.ATTACH | Kind.DETACH:
            return [task.kind.value]
        case Kind.STARTUP:
            return ["startup", "--", task.name]
        case Kind.CYCLE:
            options = ["--reason", str(task.reason), "--report", str(report)]
            options += ["--offline"] * task.offline
            return ["update", *options, "--", task.name]


def _start(argv: Sequence[str], inherited: Sequence[int], document: Any) -> subprocess.Popen[bytes]:
    if shutil.which("setpriv") is None:
        raise LocalError("setpriv is not installed; it is part of util-linux")
    environment = {
        name: value for name, value in os.environ.items() if name not in _FOR_THE_DAEMON_ONLY
    }
    # Commands do not fit on every command line, and a file in memory never blocks the daemon.
    with os.fdopen(os.memfd_create("input"), "wb+") as stdin:
        stdin.write(json.dumps(document).encode())
        stdin.seek(0)
        try:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *argv],
                stdin=stdin,
                env=environment,
                pass_fds=inherited,
                process_group=0,
            )
        except (OSError, ValueError) as error:
            raise LocalError(f"{argv[0]} cannot be started: {error}") from error

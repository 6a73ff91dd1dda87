"""The daemon: waits for an event or a deadline, decides, and supervises its children.

Everything that takes memory or time, or can hang, happens in a child process: recovery at the
start, each cycle, the startup commands. What is decided is in `scheduler`; here is one loop
around one selector, with the signals, the children and the network's watcher in it.
"""

import contextlib
import json
import logging
import math
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from casync_updater import scheduler
from casync_updater.children import Child, Kind, Task
from casync_updater.clock import Clock
from casync_updater.config.configuration import Configuration
from casync_updater.drives.drives import Drives
from casync_updater.errors import LocalError
from casync_updater.live import Live, LiveEntry, only_daemon, write_live
from casync_updater.logs import fields
from casync_updater.model import Progress, Reason, Settings, Step
from casync_updater.reports import CycleEnd, Outcome
from casync_updater.scheduler import (
    Configured,
    Ended,
    Event,
    MediaAppeared,
    Order,
    RunStartup,
    Schedule,
    StartCycle,
)
from casync_updater.tools.notify import Notifier

log = logging.getLogger(__name__)

_GRACE = 30.0
_EXTENSION = 60.0
_TELL_PAUSE = 1.0

_VERBS = {
    Step.IDLE: "waiting",
    Step.RECOVER: "finishing what was interrupted",
    Step.CHECK: "checking",
    Step.PLAN: "comparing",
    Step.BUILD: "fetching",
    Step.VERIFY: "verifying",
    Step.COMMIT: "installing",
    Step.ACT: "running the actions of",
    Step.MIRROR: "refreshing the backup of",
}

_TOLD = (Step.BUILD, Step.VERIFY, Step.COMMIT, Step.ACT, Step.MIRROR)
"""The steps that take long, of which the journal has those that a drive waits for."""

_LONG = 10_000_000
"""Bytes from which on the quarters of a step are in the journal too."""

_LEVELS = {
    Outcome.CURRENT: logging.INFO,
    Outcome.UPDATED: logging.INFO,
    Outcome.ADOPTED: logging.INFO,
    Outcome.STOPPED: logging.INFO,
    Outcome.BUSY: logging.WARNING,
    Outcome.UNREACHABLE: logging.WARNING,
    Outcome.FAILED: logging.ERROR,
    Outcome.REFUSED: logging.ERROR,
}


class Watcher(Protocol):
    """Sees the network come back, in the daemon's own loop; never waits."""

    def fileno(self) -> int:
        """One descriptor that is readable when `handle` has something to do."""

    def deadline(self) -> float | None:
        """When to call `handle` at the latest, in monotonic seconds."""

    def handle(self) -> Sequence[Event]:
        """Take in what happened.

        Raises:
            LocalError: it can see nothing any more; the daemon goes on without it.
        """

    def configure(self, configuration: Configuration) -> None:
        """The configuration was read again.

        Raises:
            LocalError: as above.
        """

    def cycle_ended(self, name: str, *, reached: bool) -> None:
        """A cycle of this entry is over, and did or did not get to the entry's own source."""

    def believed_offline(self, name: str) -> bool:
        """True where this entry's own source seems to be out of reach."""

    def report(self) -> Any:
        """What it sees, as `json.dumps` takes it."""

    def close(self) -> None:
        """Give everything back."""


class Daemon:
    """One service, from its start to its end.

    Args:
        program: the command line that every child's command is appended to.
        load: reads the configuration.
        watch: begins to watch the network, after recovery, where the settings want it.
        state_dir: where the lock is.
        live: the file for `status`.
        signals: a descriptor from which the numbers of received signals are read, one byte
            each (see `signal.set_wakeup_fd`).
        notifier: the service manager.
        clock: the time.
        draw: a random number of seconds up to its argument.
        grace: seconds between SIGTERM and SIGKILL for a child that hangs.
    """

    def __init__(
        self,
        *,
        program: Sequence[str],
        load: Callable[[], Configuration],
        watch: Callable[[Configuration], Watcher],
        state_dir: Path,
        live: Path,
        signals: int,
        notifier: Notifier,
        clock: Clock,
        draw: Callable[[float], float],
        grace: float = _GRACE,
    ) -> None:
        self._program = program
        self._load = load
        self._watch = watch
        self._state_dir = state_dir
        self._live = live
        self._signals = signals
        self._notifier = notifier
        self._clock = clock
        self._draw = draw
        self._grace = grace
        self._configuration = Configuration((), Settings())
        self._schedule = Schedule()
        self._events: list[Event] = []
        self._children: list[Child] = []
        self._watcher: Watcher | None = None
        self._drives: Drives | None = None
        self._selector: selectors.BaseSelector
        self._offset = 0.0
        """What turns monotonic seconds into seconds since 1970."""
        self._phase = "starting"
        self._reload = False
        self._last: dict[str, tuple[Outcome, str]] = {}
        self._reasons: dict[str, Reason] = {}
        """Who started the last cycle of each entry."""
        self._heard_of: dict[str, tuple[Step, int]] = {}
        """What the journal has of each cycle that a drive is waiting for."""
        self._told: tuple[Live, str] | None = None
        self._tell_at = self._extend_at = self._ping_at = -math.inf

    def run(self) -> int:
        """Work until SIGTERM or SIGINT.

        Returns:
            The exit code, 0.

        Raises:
            BusyError: another daemon has the state directory.
            LocalError: the state directory cannot be used.
        """
        with (
            only_daemon(self._state_dir, self._live),
            selectors.DefaultSelector() as self._selector,
            self._cleared(),
        ):
            self._selector.register(self._signals, selectors.EVENT_READ, self._take_signals)
            self._read_configuration()
            if not self._configuration.entries or not self._start(Task(Kind.RECOVER)):
                self._begin()
            while self._phase != "stopping" or self._children:
                self._turn()
        return 0

    @contextlib.contextmanager
    def _cleared(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._unwatch()
            self._leave_drives()
            self._live.unlink(missing_ok=True)

    def _turn(self) -> None:
        """One turn of the loop: wait, take in what happened, decide, tell."""
        now = self._clock.monotonic()
        deadlines = [*self._deadlines(now)]
        wait = None if not deadlines else max(0.0, min(deadlines) - now)
        for key, _ in self._selector.select(wait):
            key.data()
        now = self._clock.monotonic()
        self._ask_watcher()
        if self._phase == "running":
            if self._reload:
                self._do_reload(now)
            self._ask_drives(now)
            self._decide(now)
            self._serve_drives()
        self._tell(now)

    def _deadlines(self, now: float) -> Iterable[float]:
        """When the loop has something to do without being called."""
        for child in self._children:
            at = child.supervise(now, self._silence(child), self._grace)
            if at is not None:
                yield at
        if self._phase == "running":
            if self._events:
                yield now
            if self._schedule.deadline is not None:
                yield self._schedule.deadline
        if self._watcher is not None and (at := self._watcher.deadline()) is not None:
            yield at
        if self._notifier.watchdog is not None:
            yield self._ping_at
        if self._waiting_for_children():
            yield self._extend_at
        if self._told != self._picture(now):
            yield self._tell_at

    # What happens

    def _take_signals(self) -> None:
        for number in os.read(self._signals, 64):
            if number == signal.SIGHUP:
                self._reload = True
            elif self._phase == "stopping":
                log.info("still waiting for what must not be cut off")
            else:
                log.info("%s: stopping", signal.Signals(number).name)
                self._stop()

    def _take_end(self, child: Child) -> None:
        now = self._clock.monotonic()
        if child.reports >= 0:
            self._selector.unregister(child.reports)
        self._selector.unregister(child.pidfd)
        self._children.remove(child)
        code = child.reap(now)
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        task = child.task
        if task.kind is Kind.CYCLE:
            result = child.result or CycleEnd(
                Outcome.FAILED, 1, f"its process {how} without a result"
            )
            if child.never_began(code):
                result = CycleEnd(Outcome.STOPPED, 1, "stopped before it began")
            self._log_result(task, result)
            if self._watcher is not None:
                self._watcher.cycle_ended(task.name, reached=result.reached)
            if self._drives is not None:
                self._drives.cycle_ended(task.name, result)
            self._events.append(Ended(task.name, result.checked, result.actions))
        elif code < 0 and self._phase != "stopping":
            # With an exit code, it has said itself what failed.
            log.error("%s: its process %s", task.title, how, extra=fields(task.name))
        if task.kind in (Kind.ATTACH, Kind.DETACH) and self._drives is not None:
            self._drives.task_ended(task, ok=code == 0)
        if task.kind is Kind.RECOVER and self._phase == "starting":
            self._begin()

    def _take_reports(self, child: Child) -> None:
        descriptor = child.reports
        child.listen(self._clock.monotonic())
        if descriptor >= 0 > child.reports:
            self._selector.unregister(descriptor)

    def _ask_watcher(self) -> None:
        watcher = self._watcher
        if watcher is None:
            return
        try:
            self._events += watcher.handle()
        except LocalError as error:
            self._blind(error)

    def _ask_drives(self, now: float) -> None:
        """Take in which drives appeared; what is being fetched may be on one of them."""
        assert self._drives is not None
        for event in self._drives.take_events():
            self._events.append(event)
            self._hurry(event, now)

    def _hurry(self, event: MediaAppeared, now: float) -> None:
        """End the fetching over the network: the drive goes on with what is there of it."""
        for child in self._children:
            task = child.task
            if task.kind is Kind.CYCLE and task.name in event.names and child.step is Step.BUILD:
                log.info(
                    "%s: a drive appeared: the fetching begins anew, and keeps what it has",
                    task.name,
                    extra=fields(task.name),
                )
                child.tell_to_stop(now)

    # What is done

    def _begin(self) -> None:
        """Recovery is over: the service is up, and network and drives count from here."""
        self._phase = "running"
        self._notifier.ready()
        self._events.append(Configured(self._configuration.entries))
        self._look()
        self._drives = Drives(self._configuration, self._selector, self._clock)

    def _do_reload(self, now: float) -> None:
        self._reload = False
        self._notifier.reloading(now)
        self._read_configuration()
        self._events.append(Configured(self._configuration.entries))
        self._look()
        if self._drives is not None:
            self._drives.configure(self._configuration)
        self._notifier.ready()

    def _look(self) -> None:
        """Watch the network as the configuration says, also where that did not work before."""
        try:
            if not self._configuration.settings.online.enabled:
                self._unwatch()
            elif self._watcher is not None:
                self._watcher.configure(self._configuration)
            else:
                self._watcher = self._watch(self._configuration)
                self._selector.register(self._watcher, selectors.EVENT_READ, lambda: None)
        except LocalError as error:
            self._blind(error)

    def _read_configuration(self) -> None:
        self._configuration = configuration = self._load()
        for problem in configuration.problems:
            log.error("%s", problem)
        for warning in configuration.warnings:
            log.warning("%s", warning)
        count = len(configuration.entries)
        if count:
            log.info("%d %s", count, "entry" if count == 1 else "entries")
        else:
            log.warning("there is no entry to look after; reload the service when there is one")
        names = {entry.name for entry in configuration.entries}
        self._last = {name: last for name, last in self._last.items() if name in names}
        self._reasons = {name: why for name, why in self._reasons.items() if name in names}

    def _decide(self, now: float) -> None:
        """Let the scheduler decide, and follow its orders."""
        online = self._configuration.settings.online
        events, self._events = self._events, []
        self._schedule, orders = scheduler.step(
            self._schedule,
            now,
            events,
            min_age=online.min_age,
            splay=lambda: self._draw(online.splay),
        )
        for order in orders:
            self._follow(order)

    def _follow(self, order: Order) -> None:
        match order:
            case StartCycle(name, reason):
                log.debug("%s: a cycle starts (%s)", name, reason, extra=fields(name))
                self._reasons[name] = reason
                self._heard_of.pop(name, None)
                if self._drives is not None:
                    self._drives.cycle_started(name)
                offline = self._watcher is not None and self._watcher.believed_offline(name)
                if not self._start(Task(Kind.CYCLE, name, reason, offline=offline)):
                    self._events.append(Ended(name, checked=False))
                    if self._drives is not None:
                        end = CycleEnd(Outcome.FAILED, 1, "its process cannot be started")
                        self._drives.cycle_ended(name, end)
            case RunStartup(name, skip):
                commands = self._schedule.slots[name].entry.startup
                if any(command not in skip for command in commands):
                    self._start(Task(Kind.STARTUP, name, input=skip))

    def _serve_drives(self) -> None:
        """Start what mounts and unmounts them."""
        assert self._drives is not None
        while tasks := self._drives.take_tasks():
            for task in tasks:
                if not self._start(task):
                    self._drives.task_ended(task, ok=False)

    def _start(self, task: Task) -> bool:
        try:
            child = Child(self._program, task, self._clock.monotonic(), self._clock.time())
        except LocalError as error:
            log.error("%s: %s", task.title, error, extra=fields(task.name))
            return False
        self._children.append(child)
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._take_end(child))
        self._selector.register(
            child.reports, selectors.EVENT_READ, lambda: self._take_reports(child)
        )
        return True

    def _stop(self) -> None:
        self._phase = "stopping"
        self._extend_at = -math.inf
        self._notifier.stopping()
        self._unwatch()
        self._leave_drives()
        for child in self._children:
            child.tell_to_stop(self._clock.monotonic())

    def _blind(self, error: LocalError) -> None:
        log.warning("the network is not watched any longer, only intervals count: %s", error)
        self._unwatch()

    def _unwatch(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            self._selector.unregister(watcher)
            watcher.close()

    def _leave_drives(self) -> None:
        drives, self._drives = self._drives, None
        if drives is not None:
            drives.close()

    def _silence(self, child: Child) -> float | None:
        """Seconds that a child may say nothing."""
        match child.task.kind:
            case Kind.RECOVER | Kind.CYCLE:
                return self._configuration.settings.daemon.stall_timeout
            case Kind.STARTUP if self._phase == "stopping":
                # Its commands outlive the child that watches them.
                return self._grace
        # Startup commands take as long as they like; what is done with a drive has time-outs.
        return None

    # What is told

    def _log_result(self, task: Task, result: CycleEnd) -> None:
        """Say what is news; what was said after the last cycle is no news."""
        last = (result.outcome, result.message)
        news = result.outcome in (Outcome.UPDATED, Outcome.ADOPTED)
        news = news or self._last.get(task.name) != last
        self._last[task.name] = last
        log.log(
            _LEVELS[result.outcome] if news else logging.DEBUG,
            "%s: %s (%s)",
            task.name,
            result.message,
            task.reason,
            extra=fields(task.name, serial=result.serial, reason=task.reason),
        )

    def _waiting_for_children(self) -> bool:
        """True while a start or a stop takes the time that it takes."""
        return self._phase != "running" and any(not child.killed for child in self._children)

    def _tell(self, now: float) -> None:
        """Tell the service manager and `status`; once a second at most, and only news."""
        if self._notifier.watchdog is not None and now >= self._ping_at:
            self._notifier.alive()
            self._ping_at = now + self._notifier.watchdog / 2
        if self._waiting_for_children() and now >= self._extend_at:
            self._notifier.extend(_EXTENSION)
            self._extend_at = now + _EXTENSION / 4
        self._tell_of_drives()
        picture = self._picture(now)
        if picture == self._told or now < self._tell_at:
            return
        live, words = picture
        if self._told is None or self._told[1] != words:
            self._notifier.status(words)
        self._told = picture
        self._tell_at = now + _TELL_PAUSE
        try:
            write_live(self._live, live)
        except OSError as error:
            log.debug("%s cannot be written: %s", self._live, error.strerror)

    def _picture(self, now: float) -> tuple[Live, str]:
        """The daemon at this moment, for programs and for people."""
        running = {
            child.task.name: child for child in self._children if child.task.kind is Kind.CYCLE
        }
        offset = self._clock.time() - now
        if abs(offset - self._offset) > 1.0:  # the clock was set; less is the two reads apart
            self._offset = offset
        entries = {}
        for name, slot in self._schedule.slots.items():
            child = running.get(name)
            if child is not None:
                entries[name] = LiveEntry(
                    child.step, child.version, child.progress, child.task.reason, child.since
                )
            else:
                due = slot.due
                entries[name] = LiveEntry(
                    reason=self._reasons.get(name),
                    next_check=None if due is None else due + self._offset,
                )
        online = None
        if self._watcher is not None:
            online = json.loads(json.dumps(self._watcher.report()))
        drives = [] if self._drives is None else self._drives.report()
        live = Live(os.getpid(), self._phase, entries, online, drives)
        return live, self._words(live)

    def _tell_of_drives(self) -> None:
        """The journal gets each step, and each quarter of a long one, that a drive waits for."""
        for child in self._children:
            name = child.task.name
            drive = self._drive_of(child)
            if drive is None or child.step not in _TOLD:
                continue
            progress = child.progress
            quarter = 0
            if progress is not None and (progress.total or 0) > _LONG:
                assert progress.total is not None
                quarter = 4 * progress.done // progress.total
            if self._heard_of.get(name) != (child.step, quarter):
                self._heard_of[name] = (child.step, quarter)
                words = _doing(child, from_drive=True)
                log.info("drive %s: %s: %s", drive, name, words, extra=fields(name))

    def _drive_of(self, child: Child) -> str | None:
        if self._drives is None or child.task.kind is not Kind.CYCLE:
            return None
        return self._drives.of_entry(child.task.name)

    def _words(self, live: Live) -> str:
        busy = []
        for child in self._children:
            if child.task.kind in (Kind.RECOVER, Kind.CYCLE):
                drive = self._drive_of(child)
                words = f"{child.task.title}: {_doing(child, from_drive=drive is not None)}"
                busy.append(words if drive is None else f"drive {drive}: {words}")
        if self._phase == "stopping":
            return "; ".join(["stopping", *busy])
        if self._drives is not None:
            busy += self._drives.words()
        if any(child.task.kind is not Kind.STARTUP for child in self._children):
            return "; ".join(busy)
        if not live.entries:
            return "; ".join([*busy, "no entries"])
        at = min(
            (entry.next_check for entry in live.entries.values() if entry.next_check), default=0
        )
        idle = f"idle; next check at {time.strftime('%H:%M:%S', time.localtime(at))}"
        return "; ".join([*busy, idle])


def _doing(child: Child, *, from_drive: bool) -> str:
    """What a child does, in words: ``fetching 1.4.2, 34 %, 3.1 of 9.2 MB``."""
    words = "reading" if from_drive and child.step is Step.BUILD else _VERBS[child.step]
    if child.version is not None:
        words += f" {child.version}"
    return words + _amount(child.progress)


def _amount(progress: Progress | None) -> str:
    if progress is None:
        return ""
    done = progress.done / 1e6
    if not progress.total:
        return f", {done:.1f} MB"
    share = min(100, 100 * progress.done // progress.total)
    return f", {share} %, {done:.1f} of {progress.total / 1e6:.1f} MB"

"""The detector as the daemon sees it: one descriptor, one deadline, what came online.

::

    detector = Online(hosts_of(entries, settings, os.environ), settings, clock, log.info)
    selector.register(detector, EVENT_READ)
    while True:
        selector.select(until(detector.deadline()))
        for came in detector.handle():
            ...  # start a cycle for came.entries, after their min_age and splay

Nothing here waits: the kernel's answers are immediate, and a probe is a process of its own.
There is one probe per host at most, also when its resolver hangs for ever.
"""

import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from casync_updater.clock import Clock
from casync_updater.model import OnlineSettings
from casync_updater.online import detector
from casync_updater.online.detector import Announce, Event, Pace, Phase, Probe, State, Stop
from casync_updater.online.hosts import Host
from casync_updater.online.netlink import Changes, Monitor, Path, path_to
from casync_updater.online.probe import (
    Finding,
    Icmp,
    Method,
    Outcome,
    Question,
    RunningProbe,
)
from casync_updater.online.report import HostStatus

_CLOCK_SET = 1.0
"""Seconds that the wall clock has to be off before that counts as having been set."""

_SUSPENDED = 1.0
"""Seconds of suspension that count as one, and not as two clocks read one after the other."""


@dataclass(frozen=True, slots=True)
class CameOnline:
    """A host is back within reach: once per return.

    Attributes:
        host: its name.
        entries: names of the entries that wait for it.
        at: when, by `Clock.monotonic`; the scheduler applies `min_age` and `splay` from there.
    """

    host: str
    entries: tuple[str, ...]
    at: float


def suspended() -> float:
    """Seconds that the machine has slept since it was booted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


@dataclass
class _Watched:
    """A host with what is known of it and what is under way."""

    host: Host
    since: float
    state: State = field(default_factory=State)
    probe: RunningProbe | None = None
    dropped: bool = False
    """The answer of `probe` is not wanted any more."""
    waiting: float | None = None
    """The limit of the probe that starts when a dropped one is gone."""
    addresses: tuple[str, ...] = ()
    """What the name stood for at last, the one that answered in front."""
    path: Path | None = None
    finding: Finding | None = None
    method: Method | None = None
    round_trip: float | None = None
    address: str | None = None
    icmp: Icmp | None = None


class Online:
    """Watches hosts.

    Args:
        hosts: whom to watch.
        settings: how often, and by what method.
        clock: the time.
        say: is told what happens, one line each, for the log.
        slept: how long the machine has been suspended so far.

    Raises:
        LocalError: the kernel does not tell about the network.
    """

    def __init__(
        self,
        hosts: tuple[Host, ...],
        settings: OnlineSettings,
        clock: Clock,
        say: Callable[[str], object],
        slept: Callable[[], float] = suspended,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._say = say
        self._slept = slept
        self._slept_before = slept()
        self._offset = 0.0
        """What turns monotonic seconds into seconds since 1970."""
        self._watched: dict[str, _Watched] = {}
        self._leaving: list[RunningProbe] = []
        self._came: list[CameOnline] = []
        self._monitor = Monitor()
        self._epoll = select.epoll()
        self._epoll.register(self._monitor, select.EPOLLIN)
        self.configure(hosts, settings)

    def configure(self, hosts: tuple[Host, ...], settings: OnlineSettings) -> None:
        """Watch these hosts from now on; what is known of those that stay is kept."""
        self._settings = settings
        now = self._clock.monotonic()
        before, self._watched = self._watched, {}
        for host in hosts:
            watched = before.pop(host.name, None)
            if watched is None:
                watched = _Watched(host, now)
                watched.addresses = (host.name,) if host.is_address else ()
                self._watched[host.name] = watched
                self._step(watched, Event.CHANGED, now)
            else:
                watched.host = host
                self._watched[host.name] = watched
        for watched in before.values():
            if watched.probe is not None:
                watched.probe.kill()
                self._leaving.append(watched.probe)

    def fileno(self) -> int:
        """One descriptor for everything: readable when `handle` has something to do."""
        return self._epoll.fileno()

    def deadline(self) -> float | None:
        """When to call `handle` at the latest, by `Clock.monotonic`."""
        times = [watched.state.deadline for watched in self._watched.values()]
        times += [watched.probe.kill_at for watched in self._watched.values() if watched.probe]
        return min((time for time in times if time is not None), default=None)

    def handle(self) -> tuple[CameOnline, ...]:
        """Take in whatever happened; never waits. May be called at any time.

        Raises:
            LocalError: the kernel does not tell about the network any more.
        """
        ready = {fd for fd, _ in self._epoll.poll(0)}
        self._look_for_suspension()
        if self._monitor.fileno() in ready:
            changes = self._monitor.read()
            if changes:
                self._say("; ".join(changes.said))
                for watched in self._watched.values():
                    self._network_changed(watched, changes)
        for watched in self._watched.values():
            self._look_after(watched, ready)
        self._leaving = [
            probe for probe in self._leaving if probe.fileno() not in ready or probe.read() is None
        ]
        came, self._came = tuple(self._came), []
        return came

    def doubt(self, entry: str) -> None:
        """Look at once whether an entry's hosts still are there: a cycle could not use one."""
        now = self._clock.monotonic()
        for watched in self._watched.values():
            if entry in watched.host.entries and watched.state.phase is Phase.ONLINE:
                self._step(watched, Event.CHANGED, now)

    def report(self) -> tuple[HostStatus, ...]:
        """Every host as it is believed to be now; the same as long as nothing happens."""
        offset = self._clock.time() - self._clock.monotonic()
        if abs(offset - self._offset) > _CLOCK_SET:
            self._offset = offset
        return tuple(self._status(watched) for watched in self._watched.values())

    def close(self) -> None:
        """End what is running and give everything back."""
        running = [watched.probe for watched in self._watched.values() if watched.probe]
        for probe in running + self._leaving:
            probe.close()
        self._watched, self._leaving = {}, []
        self._epoll.close()
        self._monitor.close()

    def _look_for_suspension(self) -> None:
        """A machine that slept knows nothing of its hosts: being there afterwards is a return.

        Nothing wakes for this. Waking up moves links, or else the next probe notices it.
        """
        slept = self._slept()
        if slept - self._slept_before < _SUSPENDED:
            return
        self._say(f"the machine was suspended for {slept - self._slept_before:.0f} s")
        self._slept_before = slept
        now = self._clock.monotonic()
        for watched in self._watched.values():
            watched.finding = None
            self._step(watched, Event.LOST, now)
            self._step(watched, Event.CHANGED, now)

    def _network_changed(self, watched: _Watched, changes: Changes) -> None:
        now = self._clock.monotonic()
        paths = (path_to(address) for address in watched.addresses)
        path = next((path for path in paths if path is not None), None)
        before, watched.path = watched.path, path
        went_down = before is not None and before.index in changes.down
        if went_down or (watched.addresses and path is None):
            watched.finding = Finding.NO_PATH
            self._step(watched, Event.LOST, now)
        # A name may stand for something else in this network than it did in the last one.
        # An address without a path is not worth a process.
        hopeful = not watched.host.is_address and self._monitor.network.usable()
        if path is None and not hopeful:
            return
        # Changes that leave the way to a host alone (a container starts) are not its business.
        if watched.state.phase is not Phase.ONLINE or path != before:
            self._step(watched, Event.CHANGED, now)

    def _look_after(self, watched: _Watched, ready: set[int]) -> None:
        now = self._clock.monotonic()
        probe = watched.probe
        if probe is not None and probe.fileno() in ready:
            outcome = probe.read()
            if outcome is not None:
                watched.probe = None
                if watched.dropped:
                    watched.dropped = False
                else:
                    self._take(watched, outcome, now)
        elif probe is not None and probe.kill_at is not None and now >= probe.kill_at:
            probe.kill()
        if watched.state.deadline is not None and now >= watched.state.deadline:
            self._step(watched, Event.TICK, now)
        if watched.waiting is not None and watched.probe is None:
            limit, watched.waiting = watched.waiting, None
            self._start(watched, limit, now)

    def _take(self, watched: _Watched, outcome: Outcome, now: float) -> None:
        watched.finding = outcome.finding
        watched.icmp = outcome.icmp or watched.icmp
        if outcome.addresses:
            first = (outcome.address,) if outcome.address else ()
            others = tuple(a for a in outcome.addresses if a != outcome.address)
            watched.addresses = first + others
        if outcome.finding is Finding.ANSWERED:
            watched.method = outcome.method
            watched.round_trip = outcome.round_trip
            watched.address = outcome.address
            watched.path = path_to(outcome.address) if outcome.address else None
            self._step(watched, Event.ANSWERED, now)
        elif outcome.finding is Finding.NO_PATH:
            self._step(watched, Event.NO_PATH, now)
        else:
            self._step(watched, Event.UNANSWERED, now)

    def _step(self, watched: _Watched, event: Event, now: float) -> None:
        pace = Pace(self._settings.interval_offline, self._settings.interval_online)
        before = watched.state
        watched.state, commands = detector.step(before, event, now, pace)
        if watched.state.phase is not before.phase:
            watched.since = now
            self._say(_transition(watched))
        for command in commands:
            match command:
                case Probe(limit):
                    self._start(watched, limit, now)
                case Stop():
                    watched.waiting = None
                    if watched.probe is not None:
                        watched.probe.kill()
                        watched.dropped = True
                case Announce():
                    self._came.append(CameOnline(watched.host.name, watched.host.entries, now))

    def _start(self, watched: _Watched, limit: float, now: float) -> None:
        if watched.probe is not None:
            watched.waiting = limit
            return
        question = Question(
            watched.host, self._methods(watched), limit, self._monitor.network.usable()
        )
        try:
            watched.probe = RunningProbe(question, now)
        except OSError as error:
            self._say(f"{watched.host.name}: no process for a probe: {error.strerror}")
            self._take(watched, Outcome(Finding.FAILED), now)
            return
        self._epoll.register(watched.probe, select.EPOLLIN)

    def _methods(self, watched: _Watched) -> tuple[Method, ...]:
        if self._settings.method != "auto":
            return (Method(self._settings.method),)
        first = watched.method or Method.ICMP
        return (first, *(method for method in Method if method is not first))

    def _status(self, watched: _Watched) -> HostStatus:
        host = watched.host
        return HostStatus(
            name=host.name,
            ports=host.ports,
            entries=host.entries,
            proxy_for=host.proxy_for,
            state=watched.state.phase,
            finding=watched.finding,
            since=watched.since + self._offset,
            method=watched.method,
            round_trip=watched.round_trip,
            address=watched.address,
            interface=watched.path.interface if watched.path else None,
            icmp=watched.icmp,
        )


def _transition(watched: _Watched) -> str:
    """A line for the log about the state that a host is in now."""
    line = f"{watched.host.name}: {watched.state.phase}"
    if watched.state.phase is Phase.ONLINE:
        return f"{line} ({watched.method}, {1000 * (watched.round_trip or 0):.1f} ms)"
    if watched.state.phase is Phase.OFFLINE:
        return f"{line} ({watched.finding or 'not known yet'})"
    return line

r"""Is a host within reach? A state machine per host: pure, old state and time in, new state out.

::

                 changed                    answered
      OFFLINE ------------> PROBING ----------------------> ONLINE
         ^  \\                 |                               |
         |   `-- answered -----|-----------------------------^|
         |       (slow probe)  |                               |
         `---------------------+-------------------------------'
            lost, no path, or unanswered often enough

- After a change of the network the first probe goes out at once, the next ones at growing
  distances (`FAST`), later ones every `Pace.offline` seconds.
- The loss of link, address or route is believed at once; silence only after `PATIENCE` probes.
- A return is announced once, at once. Only a host that keeps coming and going faster than
  `FLAPPING` has to stay for `SETTLED` first, so that a loose contact is no storm; the last
  return always is announced.

Times are seconds of a clock that only goes forward.
"""

from dataclasses import dataclass, replace
from enum import Enum, StrEnum

FAST = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds between the starts of the probes that follow a change of the network."""

FAST_LIMITS = (1.0, 1.0, 2.0, 4.0, 5.0, 5.0)
"""How long each of them may take. The first ones are short, since a resolver that was asked
over the old network, or before the new name server was known, is best asked anew."""

LIMIT = 5.0
"""How long every other probe may take."""

CLOSEST = 0.2
"""Seconds between the starts of two probes, whatever happens."""

PATIENCE = 4
"""Probes in a row without an answer until a host that was there counts as gone: no less than
seven seconds, so that a name server may be restarted meanwhile."""

FLAPPING = 1.0
SETTLED = 0.5


class Phase(StrEnum):
    """Where a host is; PROBING is "something changed, being found out"."""

    OFFLINE = "offline"
    PROBING = "probing"
    ONLINE = "online"


class Event(Enum):
    """What can happen to a host."""

    CHANGED = "the network changed, the host may be within reach, or differently so"
    LOST = "there is no path to the host any more"
    ANSWERED = "the probe was answered"
    UNANSWERED = "the probe was not answered"
    NO_PATH = "the probe found no path"
    TICK = "time went by"


@dataclass(frozen=True, slots=True)
class Probe:
    """Command: ask the host now, for at most `limit` seconds, then report what came of it."""

    limit: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Command: give the running probe up, its answer is not wanted any more."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Command: tell that the host came online."""


Command = Probe | Stop | Announce


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between probes when nothing happens."""

    offline: float
    online: float


@dataclass(frozen=True, slots=True)
class State:
    """All that is remembered of a host."""

    phase: Phase = Phase.OFFLINE
    running: bool = False
    """A probe is under way. There is never more than one."""
    again: bool = False
    """The network changed while it was."""
    failures: int = 0
    """Probes without an answer since the last answer, loss or change."""
    started: float | None = None
    probe_at: float | None = None
    announce_at: float | None = None
    returned: float | None = None

    @property
    def deadline(self) -> float | None:
        """When to report `Event.TICK`; None while only an event can bring something new."""
        times = [time for time in (self.probe_at, self.announce_at) if time is not None]
        return min(times, default=None)


Next = tuple[State, tuple[Command, ...]]


def step(state: State, event: Event, now: float, pace: Pace) -> Next:
    """What an event makes of a state, and what is to be done about it."""
    if event is Event.TICK:
        return _tick(state, now)
    if event is Event.CHANGED:
        return _changed(state, now)
    if event is Event.LOST:
        return _lost(state, now, pace)
    if not state.running:
        return state, ()  # the answer to a probe that was given up
    ended = replace(state, running=False, again=False)
    if event is Event.ANSWERED:
        after, commands = _answered(ended, now, pace)
    elif event is Event.NO_PATH or _given_up(ended):
        after, commands = _offline(ended, now, pace), ()
    else:
        after, commands = _missed(ended, now, pace), ()
    if not state.again:
        return after, commands
    # What this probe found may be older than the change: one more look, by a fast schedule
    # that goes on where it was, but has some steps left. Were it to start anew each time,
    # a host that takes a second to answer would never get it between frequent changes.
    phase = Phase.ONLINE if after.phase is Phase.ONLINE else Phase.PROBING
    failures = min(after.failures, len(FAST) - 2)
    after, more = _probe(replace(after, phase=phase, failures=failures), now, now)
    return after, commands + more


def _tick(state: State, now: float) -> Next:
    commands: tuple[Command, ...] = ()
    if state.announce_at is not None and now >= state.announce_at:
        state, commands = replace(state, announce_at=None), (Announce(),)
    if state.probe_at is not None and now >= state.probe_at:
        state, more = _probe(state, now, now)
        commands += more
    return state, commands


def _changed(state: State, now: float) -> Next:
    if state.phase is not Phase.ONLINE:
        state = replace(state, phase=Phase.PROBING)
    if state.running:
        return replace(state, again=True), ()
    return _probe(replace(state, failures=0), now, now)


def _lost(state: State, now: float, pace: Pace) -> Next:
    if state.phase is Phase.OFFLINE and not state.running and state.probe_at is not None:
        return state, ()
    commands = (Stop(),) if state.running else ()
    return _offline(replace(state, running=False, again=False), now, pace), commands


def _answered(state: State, now: float, pace: Pace) -> Next:
    after = replace(state, phase=Phase.ONLINE, failures=0)
    after = _later(after, now + pace.online)
    if state.phase is Phase.ONLINE:
        return after, ()
    flapping = state.returned is not None and now - state.returned < FLAPPING
    after = replace(after, returned=now)
    if flapping:
        return replace(after, announce_at=now + SETTLED), ()
    return after, (Announce(),)


def _given_up(state: State) -> bool:
    allowed = {Phase.ONLINE: PATIENCE, Phase.PROBING: len(FAST) + 1, Phase.OFFLINE: 0}
    return state.failures + 1 >= allowed[state.phase]


def _missed(state: State, now: float, pace: Pace) -> State:
    assert state.started is not None
    if state.phase is Phase.ONLINE:
        distance = FAST[state.failures + len(FAST) - (PATIENCE - 1)]
    else:
        distance = min(FAST[state.failures], pace.offline)
    return _later(replace(state, failures=state.failures + 1), max(now, state.started + distance))


def _offline(state: State, now: float, pace: Pace) -> State:
    gone = replace(state, phase=Phase.OFFLINE, failures=0, announce_at=None)
    return _later(gone, now + pace.offline)


def _probe(state: State, when: float, now: float) -> Next:
    """A probe at `when`, or as soon after it as the distance to the one before allows."""
    state = _later(state, when)
    if state.probe_at is not None and state.probe_at > now:
        return state, ()
    limit = FAST_LIMITS[state.failures] if state.phase is Phase.PROBING else LIMIT
    return replace(state, running=True, started=now, probe_at=None), (Probe(limit),)


def _later(state: State, when: float) -> State:
    if state.started is not None:
        when = max(when, state.started + CLOSEST)
    return replace(state, probe_at=when)

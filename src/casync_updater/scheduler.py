"""Decides which cycle runs when: time, old state and events in, new state and orders out.

Nothing here waits, reads a clock or draws a random number. All times are monotonic seconds.

The rules:

- An entry has a cycle at once when it becomes known, and then at the first multiple of its
  interval after its last start that is still to come. A cycle that takes longer than its
  interval therefore leaves out turns, and never queues them.
- Never are there two cycles of one entry at a time. What asks for one meanwhile is remembered
  once, and has its turn when the running one has ended.
- A cycle that starts serves every request that came before, whatever the requests were for.
- After the first cycle of an entry, however it ended, its startup commands are ordered; once.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from casync_updater.model import Entry, Reason


@dataclass(frozen=True, slots=True)
class Configured:
    """The configuration was read: these are the entries now."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class CameOnline:
    """The host of these entries can be reached again."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MediaAppeared:
    """The backup drive of these entries was plugged in."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Requested:
    """The operator asks for these entries now."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """A cycle is over, whether it reported, crashed or was ended.

    `checked` is true where the entry's own source answered and all went well.
    `actions` are the commands that ran as triggers.
    """

    name: str
    checked: bool
    actions: tuple[str, ...] = ()


Event = Configured | CameOnline | MediaAppeared | Requested | Ended


@dataclass(frozen=True, slots=True)
class StartCycle:
    """Start a cycle of this entry now."""

    name: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class RunStartup:
    """Run this entry's startup commands now, but for those in `skip`."""

    name: str
    skip: tuple[str, ...]


Order = StartCycle | RunStartup


@dataclass(frozen=True, slots=True)
class Wake:
    """A request for a cycle before the interval is over."""

    at: float
    reason: Reason


@dataclass(frozen=True, slots=True)
class Slot:
    """One entry's place in the schedule."""

    entry: Entry
    turn: float
    """When its interval is over."""
    wake: Wake | None = None
    started: float | None = None
    """When the last cycle started; None before the first."""
    running: bool = False
    checked: float | None = None
    """When the last cycle started that went well."""
    removed: bool = False
    """No longer configured; kept until its cycle has ended."""

    @property
    def due(self) -> float | None:
        """When the next cycle starts; None while one runs."""
        if self.running:
            return None
        return self.turn if self.wake is None else min(self.turn, self.wake.at)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything the scheduler remembers, by name of the entry."""

    slots: Mapping[str, Slot] = field(default_factory=dict)
    started_up: frozenset[str] = frozenset()
    """Entries whose startup commands were ordered since the service started."""

    @property
    def deadline(self) -> float | None:
        """When there is something to do without any further event."""
        return min((slot.due for slot in self.slots.values() if slot.due is not None), default=None)


def step(
    schedule: Schedule,
    now: float,
    events: Iterable[Event],
    *,
    min_age: float,
    splay: Callable[[], float],
) -> tuple[Schedule, tuple[Order, ...]]:
    """Take in what happened, and say what starts now.

    Args:
        schedule: what the last call returned.
        now: monotonic seconds.
        events: what happened since the last call, in its order.
        min_age: an entry that was checked less than so many seconds ago is spared the cycle
            that its host's return would start.
        splay: gives the (random) seconds by which such a cycle is delayed.

    Returns:
        The new schedule, whose deadline lies in the future, and the orders; whoever gives a
        `StartCycle` answers with `Ended`, also where the start itself failed.
    """
    slots = dict(schedule.slots)
    started_up = schedule.started_up
    orders: list[Order] = []
    for event in events:
        match event:
            case Configured(entries):
                slots = _configured(slots, entries, now)
            case CameOnline(names) | MediaAppeared(names) | Requested(names):
                for name in names:
                    if name in slots and not slots[name].removed:
                        slots[name] = _asked(slots[name], event, now, min_age, splay)
            case Ended(name, checked, actions) if name in slots:
                slot = slots.pop(name)
                if not slot.removed:
                    slots[name] = _ended(slot, now, checked=checked)
                    if name not in started_up:
                        started_up |= {name}
                        orders.append(RunStartup(name, actions))
    for name, slot in slots.items():
        slots[name], reason = _started(slot, now, min_age)
        if reason is not None:
            orders.append(StartCycle(name, reason))
    return Schedule(slots, started_up), tuple(orders)


def _configured(slots: Mapping[str, Slot], entries: Iterable[Entry], now: float) -> dict[str, Slot]:
    """Unchanged entries keep their schedule, others have a cycle now."""
    known = dict(slots)
    result = {}
    for entry in entries:
        slot = known.pop(entry.name, None)
        if slot is None:
            result[entry.name] = Slot(entry, math.inf, Wake(now, Reason.START))
            continue
        old, slot = slot.entry, replace(slot, entry=entry, removed=False)
        if entry.interval != old.interval:
            slot = replace(slot, turn=_turn(slot, now))
        if entry != replace(old, interval=entry.interval):
            slot = _woken(slot, Wake(now, Reason.OPERATOR))
        result[entry.name] = slot
    gone = {name: replace(slot, removed=True) for name, slot in known.items() if slot.running}
    return result | gone


def _spared(slot: Slot, now: float, min_age: float) -> bool:
    return slot.checked is not None and now - slot.checked < min_age


def _asked(
    slot: Slot,
    event: CameOnline | MediaAppeared | Requested,
    now: float,
    min_age: float,
    splay: Callable[[], float],
) -> Slot:
    match event:
        case CameOnline():
            if _spared(slot, now, min_age):
                return slot
            return _woken(slot, Wake(now + splay(), Reason.ONLINE))
        case MediaAppeared():
            return _woken(slot, Wake(now, Reason.MEDIA))
        case Requested():
            return _woken(slot, Wake(now, Reason.OPERATOR))


def _woken(slot: Slot, wake: Wake) -> Slot:
    """One request at most is kept: the earliest time, and a reason that is not spared."""
    old = slot.wake
    if old is not None:
        reason = wake.reason if old.reason is Reason.ONLINE else old.reason
        wake = Wake(min(old.at, wake.at), reason)
    return replace(slot, wake=wake)


def _ended(slot: Slot, now: float, *, checked: bool) -> Slot:
    slot = replace(slot, running=False, turn=_turn(slot, now))
    return replace(slot, checked=slot.started) if checked else slot


def _turn(slot: Slot, now: float) -> float:
    """The first multiple of the interval after the last start that is still to come."""
    if slot.started is None:
        return slot.turn
    interval = slot.entry.interval
    turn = slot.started + (math.floor((now - slot.started) / interval) + 1) * interval
    # Rounding may put it on `now` itself, which would be started twice in one instant.
    return max(turn, math.nextafter(now, math.inf))


def _started(slot: Slot, now: float, min_age: float) -> tuple[Slot, Reason | None]:
    """The slot after what is due has started, and the reason for it."""
    wake = slot.wake
    if slot.running:
        return slot, None
    if wake is not None and wake.at <= now:
        # What was asked for while a cycle ran may have been served by that cycle.
        if wake.reason is not Reason.ONLINE or not _spared(slot, now, min_age):
            return replace(slot, wake=None, started=now, running=True), wake.reason
        slot = replace(slot, wake=None)
    if slot.turn <= now:
        return replace(slot, wake=None, started=now, running=True), Reason.INTERVAL
    return slot, None

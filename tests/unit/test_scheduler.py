import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from casync_updater.model import Entry, Location, Reason
from casync_updater.scheduler import (
    CameOnline,
    Configured,
    Ended,
    Event,
    MediaAppeared,
    Order,
    Requested,
    RunStartup,
    Schedule,
    StartCycle,
    step,
)


def an_entry(name: str, interval: float = 60.0, index: str = "http://host/a.caidx") -> Entry:
    return Entry(name, name, interval, Location(index, "http://host/s"), None, Path("/srv") / name)


class Bench:
    """A schedule with a hand-moved clock."""

    def __init__(self, *entries: Entry, min_age: float = 60.0, splay: float = 0.0) -> None:
        self.schedule = Schedule()
        self.now = 500.0
        self.min_age = min_age
        self.splay = splay
        self.first = self.tell(Configured(entries))

    def tell(self, *events: Event) -> tuple[Order, ...]:
        self.schedule, orders = step(
            self.schedule, self.now, events, min_age=self.min_age, splay=lambda: self.splay
        )
        return orders

    def at(self, now: float, *events: Event) -> tuple[Order, ...]:
        self.now = 500.0 + now
        return self.tell(*events)

    @property
    def deadline(self) -> float | None:
        deadline = self.schedule.deadline
        return None if deadline is None else deadline - 500.0


def settled(*entries: Entry, checked: bool = True, **pace: float) -> Bench:
    """Every entry's first cycle has started at 0 and ended at 1."""
    bench = Bench(*entries, **pace)
    bench.at(1, *[Ended(entry.name, checked) for entry in entries])
    return bench


def test_every_entry_has_a_cycle_at_start() -> None:
    bench = Bench(an_entry("a"), an_entry("b"))
    assert bench.first == (StartCycle("a", Reason.START), StartCycle("b", Reason.START))
    assert bench.deadline is None


def test_no_entries_no_deadline() -> None:
    assert Bench().deadline is None


def test_the_interval_counts_from_start_to_start() -> None:
    bench = settled(an_entry("a", 60))
    assert bench.deadline == 60
    assert bench.at(59.9) == ()
    assert bench.at(60) == (StartCycle("a", Reason.INTERVAL),)


def test_a_slow_cycle_leaves_turns_out_and_queues_none() -> None:
    bench = Bench(an_entry("a", 60), an_entry("b", 60))
    bench.at(1, Ended("b", True))
    assert bench.at(60) == (StartCycle("b", Reason.INTERVAL),)
    assert bench.at(185, Ended("a", True)) == (RunStartup("a", ()),)
    assert bench.deadline == 240


def test_a_cycle_that_ends_exactly_on_its_turn_does_not_start_twice_at_once() -> None:
    bench = Bench(an_entry("a", 60))
    bench.at(60, Ended("a", True))
    assert bench.deadline == 120


def test_startup_runs_once_after_the_first_cycle_however_it_ended() -> None:
    bench = Bench(an_entry("a", 10))
    assert bench.at(1, Ended("a", False, ("x",))) == (RunStartup("a", ("x",)),)
    bench.at(10)
    assert bench.at(11, Ended("a", True)) == ()
    bench.at(12, Configured(()))
    assert bench.at(13, Configured((an_entry("a"),))) == (StartCycle("a", Reason.START),)
    assert bench.at(14, Ended("a", True)) == ()


def test_the_return_of_the_network_starts_a_cycle_of_exactly_these_entries() -> None:
    bench = settled(an_entry("a"), an_entry("b"), checked=False)
    assert bench.at(5, CameOnline(("b", "unknown"))) == (StartCycle("b", Reason.ONLINE),)


def test_splay_delays_it() -> None:
    bench = settled(an_entry("a"), checked=False, splay=3)
    assert bench.at(5, CameOnline(("a",))) == ()
    assert bench.deadline == 8
    assert bench.at(6, CameOnline(("a",))) == ()
    assert bench.at(8) == (StartCycle("a", Reason.ONLINE),)


def test_who_was_checked_a_moment_ago_is_spared() -> None:
    bench = settled(an_entry("a", 1000), min_age=60)
    assert bench.at(59, CameOnline(("a",))) == ()
    assert bench.deadline == 1000
    assert bench.at(60, CameOnline(("a",))) == (StartCycle("a", Reason.ONLINE),)


def test_a_failed_check_spares_nobody() -> None:
    bench = settled(an_entry("a", 1000), checked=False)
    assert bench.at(2, CameOnline(("a",))) == (StartCycle("a", Reason.ONLINE),)


def test_min_age_zero_spares_nobody() -> None:
    bench = settled(an_entry("a"), min_age=0)
    assert bench.tell(CameOnline(("a",))) == (StartCycle("a", Reason.ONLINE),)


def test_returns_during_a_cycle_queue_one_more() -> None:
    bench = Bench(an_entry("a", 1000))
    for moment in (1, 2, 3):
        assert bench.at(moment, CameOnline(("a",))) == ()
    assert bench.at(4, Ended("a", False))[-1] == StartCycle("a", Reason.ONLINE)
    assert bench.at(5, Ended("a", False)) == ()
    assert bench.deadline == 1004


def test_a_return_during_a_cycle_is_served_by_it_where_that_is_recent_enough() -> None:
    bench = Bench(an_entry("a", 1000), min_age=60)
    bench.at(1, CameOnline(("a",)))
    assert bench.at(2, Ended("a", True)) == (RunStartup("a", ()),)
    slow = Bench(an_entry("a", 1000), min_age=60)
    slow.at(1, CameOnline(("a",)))
    assert slow.at(70, Ended("a", True))[-1] == StartCycle("a", Reason.ONLINE)


def test_an_interval_that_comes_first_serves_the_return() -> None:
    bench = settled(an_entry("a", 10), checked=False, splay=5)
    bench.at(8, CameOnline(("a",)))
    assert bench.at(10) == (StartCycle("a", Reason.INTERVAL),)
    assert bench.at(20, Ended("a", False)) == ()
    assert bench.deadline == 30


def test_failure_is_not_retried_in_the_dark() -> None:
    assert settled(an_entry("a", 3600), checked=False).deadline == 3600


@pytest.mark.parametrize(
    ("event", "reason"),
    [(MediaAppeared(("a",)), Reason.MEDIA), (Requested(("a",)), Reason.OPERATOR)],
)
def test_drives_and_operators_are_not_spared_and_not_delayed(event: Event, reason: Reason) -> None:
    bench = settled(an_entry("a"), splay=5)
    assert bench.at(2, event) == (StartCycle("a", reason),)


def test_a_drive_that_appears_while_a_return_waits_is_not_spared_with_it() -> None:
    bench = settled(an_entry("a", 1000), checked=False, splay=5)
    bench.at(2, CameOnline(("a",)))
    assert bench.at(3, MediaAppeared(("a",))) == (StartCycle("a", Reason.MEDIA),)
    running = Bench(an_entry("b", 1000))
    running.at(1, MediaAppeared(("b",)))
    running.at(2, CameOnline(("b",)))
    assert running.at(3, Ended("b", True))[-1] == StartCycle("b", Reason.MEDIA)


def test_a_reload_keeps_the_schedule_of_what_did_not_change() -> None:
    bench = settled(an_entry("a", 60), an_entry("b", 60))
    changed = an_entry("b", 60, "http://elsewhere/b.caidx")
    orders = bench.at(10, Configured((an_entry("a", 60), changed, an_entry("c"))))
    assert orders == (StartCycle("b", Reason.OPERATOR), StartCycle("c", Reason.START))
    assert bench.deadline == 60


def test_a_new_interval_counts_from_the_last_start() -> None:
    bench = settled(an_entry("a", 60))
    assert bench.at(10, Configured((an_entry("a", 30),))) == ()
    assert bench.deadline == 30
    assert bench.at(25, Configured((an_entry("a", 10),))) == ()
    assert bench.deadline == 30
    bench.at(26, Configured((an_entry("a", 100),)))
    assert bench.deadline == 100


def test_a_removed_entry_may_finish_and_is_then_forgotten() -> None:
    bench = Bench(an_entry("a", 10), an_entry("b", 10))
    bench.at(1, Ended("b", True))
    bench.at(2, Configured(()))
    assert set(bench.schedule.slots) == {"a"}
    assert bench.at(3, CameOnline(("a",)), Requested(("a",))) == ()
    assert bench.at(4, Ended("a", True)) == ()
    assert bench.schedule.slots == {}


def test_an_entry_that_returns_while_its_cycle_runs_has_no_second_one() -> None:
    bench = Bench(an_entry("a", 10))
    bench.at(1, Configured(()))
    assert bench.at(2, Configured((an_entry("a", 10),))) == ()
    assert bench.at(3, Ended("a", True)) == (RunStartup("a", ()),)
    assert bench.deadline == 10


@pytest.mark.parametrize("interval", [1e-9, 0.1, 1e9])
def test_rounding_never_gives_a_deadline_in_the_past(interval: float) -> None:
    bench = Bench(an_entry("a", interval))
    for now in (0.3, 1e5, 1e9):
        bench.at(now, Ended("a", True))
        deadline = bench.schedule.deadline
        assert deadline is not None
        assert deadline > bench.now
        bench.now = deadline
        assert bench.tell() == (StartCycle("a", Reason.INTERVAL),)


NAMES = ("a", "b", "c")


class Machine(RuleBasedStateMachine):
    """Random histories against what must hold in each of them."""

    @initialize(
        min_age=st.sampled_from([0.0, 20.0]),
        splay=st.sampled_from([0.0, 3.0]),
        names=st.sets(st.sampled_from(NAMES)),
    )
    def begin(self, min_age: float, splay: float, names: set[str]) -> None:
        self.bench = Bench(min_age=min_age, splay=splay)
        self.running: set[str] = set()
        self.configured: dict[str, Entry] = {}
        self.startups: dict[str, int] = {}
        self.owed: dict[str, float] = {}
        """Requests that must be served, with the latest time for it while nothing runs."""
        self.reload({name: an_entry(name, 30) for name in names})

    def take(self, orders: tuple[Order, ...]) -> None:
        for order in orders:
            match order:
                case StartCycle(name, _):
                    assert name not in self.running
                    assert name in self.configured
                    self.running.add(name)
                    self.owed.pop(name, None)
                case RunStartup(name, _):
                    self.startups[name] = self.startups.get(name, 0) + 1
                    assert self.startups[name] == 1
        for name, latest in self.owed.items():
            assert name in self.running or latest > self.bench.now

    def reload(self, entries: dict[str, Entry]) -> None:
        for name in entries.keys() - self.configured.keys() - self.running:
            self.owed[name] = self.bench.now
        self.owed = {name: at for name, at in self.owed.items() if name in entries}
        self.configured = entries
        self.take(self.bench.tell(Configured(tuple(entries.values()))))

    @rule(
        names=st.sets(st.sampled_from(NAMES)),
        interval=st.sampled_from([7.0, 30.0]),
        index=st.sampled_from("xy"),
    )
    def reloaded(self, names: set[str], interval: float, index: str) -> None:
        self.reload({name: an_entry(name, interval, f"http://{index}/a.caidx") for name in names})

    @rule(names=st.sets(st.sampled_from(NAMES)))
    def drive(self, names: set[str]) -> None:
        for name in names & self.configured.keys():
            self.owed[name] = self.bench.now
        self.take(self.bench.tell(MediaAppeared(tuple(names))))

    @rule(names=st.sets(st.sampled_from(NAMES)))
    def online(self, names: set[str]) -> None:
        for name in names & self.configured.keys():
            if self.bench.min_age == 0:
                self.owed.setdefault(name, self.bench.now + self.bench.splay)
        self.take(self.bench.tell(CameOnline(tuple(names))))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), checked=st.booleans())
    def cycle_ends(self, data: st.DataObject, checked: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        self.running.remove(name)
        self.take(self.bench.tell(Ended(name, checked)))

    @rule(seconds=st.floats(0, 50))
    def time_passes(self, seconds: float) -> None:
        until = self.bench.now + seconds
        while (deadline := self.bench.schedule.deadline) is not None and deadline <= until:
            self.bench.now = deadline
            before = len(self.running)
            orders = self.bench.tell()
            self.take(orders)
            assert len(self.running) > before or self.bench.schedule.deadline != deadline
        self.bench.now = max(until, self.bench.now)
        self.take(self.bench.tell())

    @invariant()
    def nothing_is_due_in_the_past_and_nobody_is_forgotten(self) -> None:
        if not hasattr(self, "bench"):
            return
        deadline = self.bench.schedule.deadline
        assert deadline is None or deadline > self.bench.now
        idle = self.configured.keys() - self.running
        for name in idle:
            due = self.bench.schedule.slots[name].due
            assert due is not None
            assert due <= self.bench.now + self.configured[name].interval
        known = {name for name, slot in self.bench.schedule.slots.items() if slot.running}
        assert known == self.running


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMachine = Machine.TestCase


def test_schedules_are_values() -> None:
    bench = Bench(an_entry("a"))
    before = bench.schedule
    copy = replace(before, slots=dict(before.slots))
    bench.at(1, Ended("a", True))
    assert before == copy
    assert math.isinf(before.slots["a"].turn)

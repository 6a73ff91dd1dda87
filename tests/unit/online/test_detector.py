"""The state machine, by hand and against random worlds."""

import math
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from casync_updater.online.detector import (
    CLOSEST,
    FAST,
    LIMIT,
    PATIENCE,
    SETTLED,
    Announce,
    Command,
    Event,
    Pace,
    Phase,
    Probe,
    State,
    Stop,
    step,
)

PACE = Pace(offline=60.0, online=300.0)


@dataclass
class Run:
    """A state with its time, and what it commanded."""

    state: State = field(default_factory=State)
    now: float = 1000.0

    def __call__(self, event: Event, after: float = 0.0) -> tuple[Command, ...]:
        self.now += after
        self.state, commands = step(self.state, event, self.now, PACE)
        return commands


def online() -> Run:
    run = Run()
    run(Event.CHANGED)
    assert run(Event.ANSWERED, 0.01) == (Announce(),)
    return run


def test_the_first_probe_goes_out_at_once_and_an_answer_is_a_return() -> None:
    run = Run()
    assert run(Event.CHANGED) == (Probe(1.0),)
    assert run.state.phase is Phase.PROBING
    assert run(Event.ANSWERED, 0.01) == (Announce(),)
    assert run.state.phase is Phase.ONLINE
    assert run.state.deadline == run.now + PACE.online


def test_silence_after_a_change_is_asked_about_fast_then_slowly() -> None:
    run = Run()
    run(Event.CHANGED)
    for distance in FAST:
        assert run(Event.UNANSWERED) == ()
        assert run.state.phase is Phase.PROBING
        assert run.state.deadline == run.now + distance
        (probe,) = run(Event.TICK, distance)
        assert isinstance(probe, Probe)
    run(Event.UNANSWERED)
    assert run.state.phase is Phase.OFFLINE
    assert run.state.deadline == run.now + PACE.offline
    assert run(Event.TICK, PACE.offline) == (Probe(LIMIT),)
    assert run(Event.ANSWERED) == (Announce(),)


def test_a_loss_is_believed_at_once_and_silence_only_after_patience() -> None:
    run = online()
    assert run(Event.LOST, 5) == ()
    assert run.state.phase is Phase.OFFLINE

    run = online()
    begin = run.now
    for _ in range(PATIENCE):
        assert run.state.phase is Phase.ONLINE
        assert run.state.deadline is not None
        run(Event.TICK, run.state.deadline - run.now)
        run(Event.UNANSWERED)
    assert run.state.phase is Phase.OFFLINE
    assert run.now - begin >= PACE.online + 7


def test_one_answer_restores_the_patience() -> None:
    run = online()
    for _ in range(3 * PATIENCE):
        run(Event.TICK, 400)
        run(Event.UNANSWERED)
        run(Event.TICK, 400)
        assert run(Event.ANSWERED) == ()
    assert run.state.phase is Phase.ONLINE


def test_a_loss_while_probing_gives_the_probe_up_and_ignores_what_it_still_says() -> None:
    run = Run()
    run(Event.CHANGED)
    assert run(Event.LOST, 0.1) == (Stop(),)
    assert run(Event.ANSWERED, 0.1) == ()
    assert run.state.phase is Phase.OFFLINE


def test_repeated_losses_do_not_put_the_next_probe_off() -> None:
    run = online()
    run(Event.LOST)
    deadline = run.state.deadline
    run(Event.LOST, 30)
    assert run.state.deadline == deadline


def test_a_change_during_a_probe_leads_to_one_more_at_its_end() -> None:
    run = Run()
    run(Event.CHANGED)
    assert run(Event.CHANGED, 0.3) == ()
    assert run(Event.UNANSWERED, 0.7) == (Probe(1.0),)

    run = Run()
    run(Event.CHANGED)
    run(Event.CHANGED, 0.3)
    announce, probe = run(Event.ANSWERED, 0.1)
    assert announce == Announce()
    assert probe == Probe(LIMIT)
    assert run(Event.ANSWERED, 0.1) == ()


def test_a_slow_host_gets_its_time_also_between_frequent_changes() -> None:
    run = Run()
    commands = run(Event.CHANGED)
    limits = []
    for _ in range(10):
        (probe,) = commands
        assert isinstance(probe, Probe)
        limits.append(probe.limit)
        run(Event.CHANGED, 0.1)
        commands = run(Event.UNANSWERED, probe.limit)
    assert max(limits) >= 4


def test_a_loose_contact_is_announced_at_its_first_and_last_return_only() -> None:
    run = online()
    announced = 0
    for _ in range(20):
        run(Event.LOST, 0.25)
        run(Event.CHANGED, 0.25)
        if not run.state.running:
            run(Event.TICK, CLOSEST)
        announced += run(Event.ANSWERED, 0.001).count(Announce())
    assert announced == 0
    assert run.state.announce_at is not None
    assert run(Event.TICK, SETTLED) == (Announce(),)
    assert run(Event.TICK, SETTLED) == ()


class World(RuleBasedStateMachine):
    """A cable and a far host that come and go, seen through probes that take their time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.state = State()
        self.linked = False
        self.alive = True
        self.probing_until: float | None = None
        self.limit = 0.0
        self.starts: list[float] = []
        self.owed = 0
        """Returns since the last announcement; an announcement without one is one too many."""

    def happen(self, event: Event) -> None:
        before = self.state
        self.state, commands = step(before, event, self.now, PACE)
        if before.phase is not Phase.ONLINE and self.state.phase is Phase.ONLINE:
            self.owed += 1
        for command in commands:
            match command:
                case Probe(limit):
                    assert self.probing_until is None, "two probes at once"
                    self.limit = limit
                    self.starts.append(self.now)
                    self.probing_until = self.now + 0.01
                case Stop():
                    assert self.probing_until is not None
                    self.probing_until = None
                case Announce():
                    assert self.owed >= 1, "announced what was no return, or twice"
                    self.owed = 0
                    assert self.state.phase is Phase.ONLINE

    def advance(self, seconds: float) -> None:
        """Let time pass, with every deadline and every end of a probe at its moment."""
        end = self.now + seconds
        for _ in range(10_000):
            times = [t for t in (self.probing_until, self.state.deadline) if t is not None]
            following = min(times, default=math.inf)
            if following > end:
                break
            self.now = max(self.now, following)
            if self.probing_until is not None and self.now >= self.probing_until:
                self.end_probe()
            else:
                self.happen(Event.TICK)
        else:
            raise AssertionError("it never comes to rest")
        self.now = end

    def end_probe(self) -> None:
        self.probing_until = None
        if not self.linked:
            self.happen(Event.NO_PATH)
        else:
            self.happen(Event.ANSWERED if self.alive else Event.UNANSWERED)

    @rule(seconds=st.one_of(st.floats(0, 1), st.floats(0, 700)))
    def time_passes(self, seconds: float) -> None:
        self.advance(seconds)

    @rule()
    def plug(self) -> None:
        self.linked = True
        self.happen(Event.CHANGED)

    @rule()
    def unplug(self) -> None:
        self.linked = False
        self.happen(Event.LOST)

    @rule()
    def something_else_changes(self) -> None:
        self.happen(Event.CHANGED)

    @rule(alive=st.booleans())
    def far_host(self, alive: bool) -> None:
        self.alive = alive

    @precondition(lambda self: self.probing_until is not None)
    @rule(share=st.floats(0, 1))
    def the_probe_takes_longer(self, share: float) -> None:
        self.probing_until = max(self.now, self.starts[-1] + share * self.limit)

    @rule(event=st.sampled_from([Event.ANSWERED, Event.UNANSWERED, Event.NO_PATH]))
    @precondition(lambda self: self.probing_until is None)
    def a_probe_that_was_given_up_still_says_something(self, event: Event) -> None:
        before = self.state
        self.happen(event)
        assert self.state == before

    @invariant()
    def never_stuck(self) -> None:
        if not self.starts and self.state == State():
            return  # nothing has happened at all yet
        assert self.state.running == (self.probing_until is not None)
        assert self.state.running or self.state.probe_at is not None

    @invariant()
    def no_storm(self) -> None:
        pairs = zip(self.starts, self.starts[1:], strict=False)
        assert all(later - earlier >= CLOSEST - 1e-6 for earlier, later in pairs)

    @invariant()
    def gone_is_never_believed_to_be_there(self) -> None:
        if not self.linked and self.state.phase is Phase.ONLINE:
            raise AssertionError("online without a link")

    def teardown(self) -> None:
        if self.state == State():
            return
        self.advance(3 * PACE.online)
        reachable = self.linked and self.alive
        assert self.state.phase is (Phase.ONLINE if reachable else Phase.OFFLINE)
        assert not (reachable and self.owed), "a return was lost"


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

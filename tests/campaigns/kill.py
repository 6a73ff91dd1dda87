"""SIGKILL: at every step by name, and at random instants, over updates in a row.

    python3 tests/campaigns/kill.py --seed 1 --count 2000

Without systemd, so that the actions are processes of their own; the boot stays the same, which
makes every action run exactly once, however often the updater is killed.
"""

import argparse
import ctypes
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from campaigns.world import BrokenPromiseError, World, demand, report, workplace

_KILLED = -signal.SIGKILL


class Story:
    """One appliance through update after update; each may be disturbed, and is then completed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.current: str | None = None
        self.preserved = False
        self.kills_of_update = 0

    def begin(self) -> None:
        """The first version, undisturbed."""
        self.update(lambda *_, **__: 0)
        if not self.world.in_place:
            self.world.preserve()
            self.preserved = True

    def update(self, disturb: Callable[..., int], *, bad: bool = False) -> None:
        """Publish a version, let the update be disturbed, complete it, and look at everything.

        `disturb` runs the command that it is given, and gives the number of kills.
        """
        world, old = self.world, self.current
        new = world.publish(bad=bad).name
        final = world.promise_update(old, new)
        world.fetched()
        kills = disturb("update", check=lambda: self._instant(old, new))
        self._instant(old, new)
        for attempt in range(3):
            code, said = world.run("update")
            failed = bad and old is not None and attempt == 0
            if code == 0 or (failed and code == 1):
                break
        demand(code == 0 or failed, f"update: exit code {code}: {said}")
        self.current = final
        # A second cycle: what the first one learnt stays so, and nothing runs again.
        code, said = world.run("update")
        demand(code == 0, f"second update: exit code {code}: {said}")
        world.check_fetched(old, new, kills)
        self._quiet(final)
        if world.drive and final == new:
            world.check_drive(final)

    @property
    def has_way_back(self) -> bool:
        """False after a bad version: that is what a resumed entry would come to again."""
        if list(self.world.versions.values())[-1].bad:
            return False
        kept = [one["installed"]["version"] for one in self.world.state["previous"]]
        return any(not self.world.versions[name].bad for name in kept)

    def rollback(self, disturb: Callable[..., int]) -> None:
        """Back to the version before by hand, and forward again."""
        world, new = self.world, self.current
        assert new is not None
        (kept,) = world.state["previous"]
        old = kept["installed"]["version"]
        world.promise(new, old)
        disturb("rollback", "tree", check=lambda: self._instant(old, new))
        code, said = world.run("recover")
        demand(code == 0, f"recover: {code}: {said}")
        if world.state["installed"]["version"] == new:
            code, said = world.run("rollback", "tree")
            demand(code == 0, f"rollback: exit code {code}: {said}")
        code, said = world.run("update")
        demand(code == 0, f"update of a held entry: exit code {code}: {said}")
        demand(world.state["held"], "a rollback does not hold the entry")
        self._quiet(old)
        code, said = world.run("resume", "tree")
        demand(code == 0, f"resume: exit code {code}: {said}")
        world.promise_update(old, new)
        code, said = world.run("update")
        demand(code == 0, f"update after resume: exit code {code}: {said}")
        self._quiet(new)

    def _instant(self, *allowed: str | None) -> None:
        self.world.check_instant(*allowed, preserved=self.preserved)

    def _quiet(self, version: str) -> None:
        self.world.check_quiet(version, preserved=self.preserved)


def at_step(world: World, name: str, at: int, when: str) -> Callable[..., int]:
    """Kills at one step."""

    def disturb(*arguments: str, check: Callable[[], None]) -> int:
        killer = ("--kill", name, "--at", str(at), "--when", when)
        code, _ = world.run(*arguments, killer=killer)
        check()
        return int(code == _KILLED)

    return disturb


def at_random(world: World, most: int) -> Callable[..., int]:
    """Kills several times, each time at another instant of what a whole run takes."""

    def disturb(*arguments: str, check: Callable[[], None]) -> int:
        kills = 0
        for _ in range(world.rng.randint(1, most)):
            instant = world.rng.uniform(0.0, 1.1 * world.duration)
            begin = time.monotonic()
            process = world.start(*arguments)
            if process.ended(instant):
                # How long a whole run takes here depends on what else this machine does.
                world.duration += (time.monotonic() - begin - world.duration) / 4
            process.kill()
            killed = process.wait().code == _KILLED
            kills += killed
            check()
            if not killed:
                break
            world.duration = max(world.duration, instant)
        world.kills += kills
        return kills

    return disturb


def traced(world: World, file: Path) -> Callable[..., int]:
    """Disturbs nothing, and writes down the steps."""

    def disturb(*arguments: str, check: Callable[[], None]) -> int:
        code, said = world.run(*arguments, killer=("--trace", str(file)))
        demand(code in (0, 1), f"{arguments}: {code}: {said}")
        check()
        return 0

    return disturb


SCENARIOS = ("update", "bad", "rollback", "in-place")


def play(story: Story, scenario: str, disturb: Callable[..., int]) -> None:
    if scenario == "rollback":
        story.rollback(disturb)
    else:
        story.update(disturb, bad=scenario == "bad")


def by_name(folder: Path, rng: random.Random, scenario: str, share: float) -> Iterator[str]:
    """Kill at each step of a scenario, before and after it; gives each point as it was survived.

    A step that is taken many times is killed at its first, its last and one other time. `share`
    of the points are taken.
    """
    folder.mkdir()
    with World(folder, rng, in_place=scenario == "in-place") as world:
        story = Story(world)
        story.begin()
        if scenario == "rollback":
            story.update(lambda *_, **__: 0)
        trace = folder / "trace"
        play(story, scenario, traced(world, trace))
        points = []
        for name, count in Counter(trace.read_text().split()).items():
            for at in sorted({0, count - 1, rng.randrange(count)}):
                points += [(name, at, "before"), (name, at, "after")]
        for name, at, when in points:
            if rng.random() >= share:
                continue
            before = world.kills
            try:
                play(story, scenario, at_step(world, name, at, when))
            except BrokenPromiseError as error:
                raise BrokenPromiseError(f"{scenario}: {name} #{at} {when}: {error}") from error
            hit = "" if world.kills > before else " (not reached)"
            yield f"{scenario}: {when} {name} #{at}{hit}"


def randomly(folder: Path, rng: random.Random, count: int, **kind: bool) -> int:
    """Kill at so many random instants; gives the number of updates.

    Args:
        folder: where this world lives.
        rng: decides everything.
        count: kills, at least.
        kind: what this world has, and has not: see `World`.
    """
    folder.mkdir()
    updates = 0
    with World(folder, rng, **kind) as world:
        story = Story(world)
        story.begin()
        story.update(lambda *_, **__: 0)
        while world.kills < count:
            weights = (1, 0, 0) if world.in_place else (6, 2, 2)
            scenario = rng.choices(SCENARIOS[:3], weights)[0]
            before = world.kills
            if scenario == "rollback" and not story.has_way_back:
                scenario = "update"
            try:
                play(story, scenario, at_random(world, 6))
            except BrokenPromiseError as error:
                raise BrokenPromiseError(f"{scenario}, kill {before}: {error}") from error
            updates += 1
            if updates % 50 == 0:
                report(f"{folder.name}: survived {world.kills} kills in {updates} updates")
            _forget_old_versions(world)
    return updates


def _forget_old_versions(world: World) -> None:
    """Keep the campaign's own memory, disk and log short."""
    state = world.state
    there = {one["installed"]["version"] for one in (state, *state["previous"])}
    for name in list(world.versions)[:-6]:
        if name not in there:
            world.versions[name].tree.clear()


@dataclass(frozen=True)
class Part:
    """What one process of the campaign does, in a world of its own."""

    name: str
    folder: Path
    seed: str
    share: float = 0.0
    """Of the points by name of the scenario that it is named after."""
    count: int = 0
    """Kills at random instants."""
    kind: tuple[tuple[str, bool], ...] = ()

    def run(self) -> str:
        rng = random.Random(self.seed)
        if self.count:
            updates = randomly(self.folder, rng, self.count, **dict(self.kind))
            return f"survived {self.count} kills at random instants in {updates} updates"
        survived = 0
        for line in by_name(self.folder, rng, self.name, self.share):
            report(line)
            survived += "not reached" not in line
        return f"survived {survived} kills at named steps"


KINDS: tuple[dict[str, bool], ...] = ({}, {"drive": False}, {}, {"in_place": True})
_KILLS = 250
"""Of one world."""


def parts(options: argparse.Namespace, folder: Path) -> Iterator[Part]:
    """All of the campaign."""
    for scenario in options.only or SCENARIOS:
        seed = f"{options.seed} {scenario}"
        yield Part(scenario, folder / scenario, seed, share=options.share)
    for number, done in enumerate(range(0, options.count, _KILLS)):
        name = f"random-{number}"
        kind = tuple(KINDS[number % len(KINDS)].items())
        count = min(_KILLS, options.count - done)
        yield Part(name, folder / name, f"{options.seed} {name}", count=count, kind=kind)


def _end_with_the_parent() -> None:
    """However the campaign ends, its worlds end with it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200, help="kills at random instants")
    parser.add_argument("--share", type=float, default=1.0, help="of the named points")
    parser.add_argument("--only", choices=SCENARIOS, action="append")
    parser.add_argument("--jobs", type=int, default=2, help="worlds side by side")
    parser.add_argument("--keep", action="store_true", help="leave the folder of a failure")
    options = parser.parse_args()
    # What a kill leaves does not depend on the disk: the kernel has it already.
    folder = workplace("/dev/shm" if Path("/dev/shm").is_dir() else None)
    begin = time.monotonic()
    failed: list[str] = []
    with ProcessPoolExecutor(
        options.jobs, get_context("spawn"), initializer=_end_with_the_parent
    ) as pool:
        running = {pool.submit(part.run): part for part in parts(options, folder)}
        for future in as_completed(running):
            part = running[future]
            try:
                report(f"{part.name}: {future.result()}")
            except BrokenPromiseError as error:
                report(f"{part.name}: FAILED: {error}")
                failed.append(part.name)
                continue
            shutil.rmtree(part.folder)
    if failed and options.keep:
        report(f"what is left: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    report(f"{time.monotonic() - begin:.0f} s, seed {options.seed}, failed: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

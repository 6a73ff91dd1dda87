"""Power cuts: updates on a disk that remembers its writes, and every kind of cut replayed.

    python3 tests/campaigns/power.py --seed 1 --count 200
    python3 tests/campaigns/power.py --no-sync        # must fail: shows that the test bites

For each crash state the file system is mounted as after a cut, and looked at before anything
else: destination, state, preserved paths, drive. Then the client is started on it, comes to the
newest version, and every action that was promised must have run, at least once.
"""

import argparse
import contextlib
import random
import shlex
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

from campaigns.recorded import CrashState, RecordedDisk, WriteLog, mounted
from campaigns.world import BrokenPromiseError, World, demand, report, workplace
from casync_updater import syscalls

_SIZE = 128 << 20


class PowerCampaign(ABC):
    """Records a story of updates, and replays its cuts.

    Who inherits says where the story takes place.
    """

    _log: WriteLog

    def __init__(self, world: World) -> None:
        self._world = world
        self._preserved = False
        self._promised: dict[str, list[str]] = {}
        """What must have run once a version stands in the destination."""
        self._make_actions_durable()

    def _make_actions_durable(self) -> None:
        """What an action writes without syncing is lost with the power like anything else."""
        entry, log = self._world.appliance.entry, shlex.quote(str(self._world.appliance.journal))
        for trigger in entry["triggers"]:
            trigger["actions"] = [f"{action} && sync {log}" for action in trigger["actions"]]

    @abstractmethod
    def run(self, count: int) -> Counter[str]:
        """Record and replay; gives how many states of each style were survived."""

    def _replay(self, count: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        for state in self._log.crash_states(self._world.rng, count):
            with self._mounted(state):
                self._check(state)
            seen[state.style] += 1
        return seen

    @abstractmethod
    def _mounted(self, state: CrashState) -> contextlib.AbstractContextManager[None]:
        """The file system as it is after a cut, where the appliance lives."""

    # While it is recorded

    @abstractmethod
    def _update(self) -> tuple[int, str]:
        """An update: exit code, and what it said."""

    @abstractmethod
    def _preserve(self) -> None:
        """Write the device's own data into the destination, durably."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """The client's state."""

    @abstractmethod
    def _written(self) -> list[str]:
        """What the actions have written."""

    def _record(self) -> None:
        world = self._world
        current = None
        self._mark()
        for number in range(4):
            new = world.publish(bad=number == 2).name
            before = len(world.expected)
            current, old = world.promise_update(current, new), current
            arrival = [line for line in world.expected[before:] if f">{new} " in line]
            self._promised[new] = [*world.expected[:before], *arrival]
            for attempt in range(2):
                code, said = self._update()
                failed = number == 2 and attempt == 0
                demand(code == int(failed), f"while recording: exit code {code}: {said}")
                self._mark()
            if number == 0:
                self._preserve()
                self._mark(preserved=True)
            demand(old != current or number == 2, "the recorded story went another way")

    def _mark(self, *, preserved: bool | None = None) -> None:
        if preserved is not None:
            self._preserved = preserved
        installed = self._state().get("installed") or {}
        self._log.mark(
            {
                "version": installed.get("version"),
                "preserved": self._preserved,
                "log": [line for line in self._written() if line != "health"],
            }
        )

    def _check(self, state: CrashState) -> None:
        world = self._world
        where = f"crash state {state.number} ({state.style}, reported: {state.mark})"
        try:
            mark = state.mark
            # The configuration was written without a sync, and belongs to the test.
            world.appliance.destination.parent.mkdir(parents=True, exist_ok=True)
            world.appliance.settings(world.settings)
            names = list(world.versions)
            preserved = bool(mark.get("preserved"))
            found = world.check_instant(None, *names, preserved=preserved, cut=True)
            demand(world.has_drive() or not mark.get("version"), "the drive has lost its release")
            demand(
                found is not None or mark.get("version") is None,
                f"{mark.get('version')} was installed, and is gone",
            )
            if mark.get("version"):
                # A bad version may stand there for the moment of its health check.
                demand(
                    found is not None and names.index(found) >= names.index(mark["version"]),
                    f"{found} is there after {mark['version']} was",
                )
            log = world.appliance.log()
            missing = [line for line in mark.get("log", ()) if line not in log]
            demand(not missing, f"reported as run, and not in the log: {missing}")
            world.usb.mkdir(exist_ok=True)
            for _ in range(3):
                code, said = world.run("update")
                if code == 0:
                    break
            demand(code == 0, f"update: exit code {code}: {said}")
            self._check_after(found, log)
        except BrokenPromiseError as error:
            raise BrokenPromiseError(f"{where}: {error}") from error

    def _check_after(self, found: str | None, before: list[str]) -> None:
        world = self._world
        newest = list(world.versions)[-1]
        tree = world.appliance.destination
        demand(world.version_of(tree) == newest, f"{newest} is not in the destination")
        log = world.appliance.log()
        promised = list(self._promised.get(found, ())) if found else []
        missing = [line for line in promised if line != "health" and line not in log]
        demand(not missing, f"promised with {found}, and never run: {missing}")
        demand(
            found == newest or any(f">{newest} " in line for line in log[len(before) :]),
            f"nothing ran for {newest}",
        )
        world.check_drive(newest)
        world.check_leftovers()


class _OnThisMachine(PowerCampaign):
    """On a device of this machine's kernel."""

    def __init__(self, folder: Path, rng: random.Random, *, syncs: bool) -> None:
        self._mount = folder / "mount"
        self._disk = RecordedDisk(folder / "disk", self._mount, _SIZE)
        self._killer = () if syncs else ("--no-sync",)
        super().__init__(World(folder, rng, device=self._mount))

    def run(self, count: int) -> Counter[str]:
        world = self._world
        with world:
            with self._disk.recording() as self._log:
                # The mount hides what the world has made in its place.
                for folder in (world.usb, world.appliance.destination.parent):
                    folder.mkdir(parents=True, exist_ok=True)
                world.appliance.settings(world.settings)
                self._record()
            return self._replay(count)

    def _mounted(self, state: CrashState) -> contextlib.AbstractContextManager[None]:
        return mounted(state.image, self._mount, "-t", "ext4", "-o", "loop")

    def _update(self) -> tuple[int, str]:
        return self._world.run("update", killer=self._killer)

    def _preserve(self) -> None:
        self._world.preserve()
        self._world.run("update")
        syscalls.sync_file_system(self._mount)

    def _state(self) -> dict[str, Any]:
        return self._world.state

    def _written(self) -> list[str]:
        return self._world.appliance.log()


def campaign(folder: Path, rng: random.Random, count: int, *, syncs: bool = True) -> Counter[str]:
    return _OnThisMachine(folder, rng, syncs=syncs).run(count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100, help="crash states")
    parser.add_argument("--no-sync", action="store_true", help="without the client's syncs")
    parser.add_argument("--keep", action="store_true", help="leave the folder of a failure")
    options = parser.parse_args()
    folder = workplace()
    begin = time.monotonic()
    failed = True
    try:
        seen = campaign(
            folder, random.Random(options.seed), options.count, syncs=not options.no_sync
        )
        report(f"survived {sum(seen.values())} crash states: {dict(seen)}")
        failed = False
    finally:
        if not (failed and options.keep):
            shutil.rmtree(folder, ignore_errors=True)
    report(f"{time.monotonic() - begin:.0f} s, seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

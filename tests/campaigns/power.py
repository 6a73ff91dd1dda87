"""Power cuts: updates on a disk that remembers its writes, and every kind of cut replayed.

    python3 tests/campaigns/power.py --seed 1 --count 200
    python3 tests/campaigns/power.py --no-sync        # must fail: shows that the test bites

For each crash state the file system is mounted as after a cut, and looked at before anything
else: destination, state, preserved paths, drive. Then the client is started on it, comes to the
newest version, and every action that was promised must have run, at least once.
"""

import argparse
import random
import shlex
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from campaigns.recorded import CrashState, RecordedDisk, mounted
from campaigns.world import BrokenPromiseError, World, demand, report, workplace

_SIZE = 128 << 20


class PowerCampaign:
    """Records a story of updates, and replays its cuts."""

    def __init__(self, folder: Path, rng: random.Random, *, syncs: bool) -> None:
        self._mount = folder / "mount"
        self._disk = RecordedDisk(folder / "disk", self._mount, _SIZE)
        self._killer = () if syncs else ("--no-sync",)
        self._world = World(folder, rng, device=self._mount)
        self._promised: dict[str, list[str]] = {}
        """What must have run once a version stands in the destination."""
        self._make_actions_durable()

    def _make_actions_durable(self) -> None:
        """What an action writes without syncing is lost with the power like anything else."""
        entry, log = self._world.appliance.entry, shlex.quote(str(self._world.appliance.journal))
        for trigger in entry["triggers"]:
            trigger["actions"] = [f"{action} && sync {log}" for action in trigger["actions"]]

    def run(self, count: int) -> Counter[str]:
        """Record and replay; gives how many states of each style were survived."""
        with self._world:
            with self._disk.recording():
                # The mount hides what the world has made in its place.
                for folder in (self._world.usb, self._world.appliance.destination.parent):
                    folder.mkdir(parents=True, exist_ok=True)
                self._world.appliance.settings(self._world.settings)
                self._record()
            seen: Counter[str] = Counter()
            for state in self._disk.crash_states(self._world.rng, count):
                with mounted(state.image, self._mount):
                    self._check(state)
                seen[state.style] += 1
        return seen

    def _record(self) -> None:
        world = self._world
        current = None
        for number in range(4):
            new = world.publish(bad=number == 2).name
            before = len(world.expected)
            current, old = world.promise_update(current, new), current
            arrival = [line for line in world.expected[before:] if f">{new} " in line]
            self._promised[new] = [*world.expected[:before], *arrival]
            for attempt in range(2):
                code, said = world.run("update", killer=self._killer)
                failed = number == 2 and attempt == 0
                demand(code == int(failed), f"while recording: exit code {code}: {said}")
                self._mark()
            if number == 0:
                world.preserve()
                world.run("update")
                subprocess_sync(self._mount)
                self._mark(preserved=True)
            demand(old != current or number == 2, "the recorded story went another way")

    def _mark(self, *, preserved: bool | None = None) -> None:
        world = self._world
        self._preserved = getattr(self, "_preserved", False) if preserved is None else preserved
        installed = world.state.get("installed") or {}
        release = world.usb / "backup.caidx.release"
        self._disk.mark(
            {
                "version": installed.get("version"),
                "preserved": self._preserved,
                "drive": release.exists(),
                "log": [line for line in world.appliance.log() if line != "health"],
            }
        )

    def _check(self, state: CrashState) -> None:
        world = self._world
        where = f"crash state {state.number} ({state.style}, reported: {state.mark})"
        try:
            mark = state.mark or {}
            # The configuration was written without a sync, and belongs to the test.
            world.appliance.destination.parent.mkdir(parents=True, exist_ok=True)
            world.appliance.settings(world.settings)
            names = list(world.versions)
            found = world.check_instant(None, *names, preserved=bool(mark.get("preserved")))
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


def subprocess_sync(path: Path) -> None:
    from casync_updater import syscalls  # noqa: PLC0415

    syscalls.sync_file_system(path)


def campaign(folder: Path, rng: random.Random, count: int, *, syncs: bool = True) -> Counter[str]:
    return PowerCampaign(folder, rng, syncs=syncs).run(count)


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

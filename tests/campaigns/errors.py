"""I/O errors: one call after the other fails with EIO, ENOSPC or EROFS, in every place.

    python3 tests/campaigns/errors.py --seed 1 --count 300

Each round lets the n-th write, fsync, rename, mkdir, ... on the file system of the destination,
the state, the drive or the cache fail, once or from then on. Either the update arrives, or the
old version stays as it is, and the message says what failed, and where; when nothing fails any
more, the next cycle goes on, and no action is lost or run twice. A destination that is updated
in place is not among the places: casync extracts to no FUSE file system.
"""

import errno
import os
import random
import sys
from collections import Counter
from pathlib import Path

from campaigns.failing import FailingFolder
from campaigns.world import BrokenPromiseError, World, by_hand, demand

PLACES = ("destination", "state", "drive", "cache")
_NUMBERS = (errno.EIO, errno.ENOSPC, errno.EROFS)


def campaign(folder: Path, rng: random.Random, count: int) -> Counter[str]:
    """Rounds for each place; gives how often what happened."""
    outcomes: Counter[str] = Counter()
    for place in PLACES:
        home = folder / place
        home.mkdir()
        # Only what casync builds has chunks in the cache.
        with World(home, rng, drive=place == "drive", in_place=place == "cache") as world:
            world.forgetful = place == "state"
            where = _where(world, place)
            real = home / "real"
            real.mkdir()
            where.mkdir(parents=True, exist_ok=True)
            with FailingFolder(real, where) as disk:
                _Rounds(world, disk, place, where, outcomes).play(count // len(PLACES))
    return outcomes


def _where(world: World, place: str) -> Path:
    return {
        "destination": world.appliance.destination.parent,
        "state": world.appliance.state_dir,
        "drive": world.usb,
        "cache": world.appliance.state_dir / "cache",
    }[place]


class _Rounds:
    """Update after update in one world."""

    def __init__(
        self, world: World, disk: FailingFolder, place: str, where: Path, outcomes: Counter[str]
    ) -> None:
        self._world = world
        self._disk = disk
        self._place = place
        self._where = where
        self._outcomes = outcomes
        self._current: str | None = None
        self._preserved = False

    def play(self, count: int) -> None:
        world, rng = self._world, self._world.rng
        self._complete(self._publish())
        if not world.in_place:
            world.preserve()
            self._preserved = True
        # What an update calls, and how often.
        new = self._publish()
        self._disk.fail("none", 0, after=0)
        self._complete(new)
        calls, _ = self._disk.heal()
        points = [
            (operation, after)
            for operation, times in sorted(calls.items())
            for after in range(times)
            if operation != "all"
        ]
        rng.shuffle(points)
        for number in range(count):
            operation, after = points[number % len(points)]
            error, lasting = rng.choice(_NUMBERS), rng.random() < 0.3
            how = f"{self._place}: {operation} #{after}: {errno.errorcode[error]}"
            try:
                self._round(operation, after, error, lasting)
            except BrokenPromiseError as broken:
                how += " from then on" if lasting else ""
                raise BrokenPromiseError(f"{how}: {broken}") from broken

    def _publish(self) -> str:
        new = self._world.publish().name
        self._world.promise_update(self._current, new)
        return new

    def _round(self, operation: str, after: int, error: int, lasting: bool) -> None:
        world, old = self._world, self._current
        new = self._publish()
        self._disk.fail(operation, error, after=after, lasting=lasting)
        code, said = world.run("update")
        _, failed = self._disk.heal()
        world.check_instant(old, new, preserved=self._preserved)
        if code:
            demand(failed, f"exit code {code} although nothing failed: {said}")
            demand(code == 1, f"exit code {code}: {said}")
            demand(os.strerror(error) in said, f"no word of {os.strerror(error)!r} in: {said}")
            # casync says what failed, and not where.
            named = str(self._where) in said or "casync failed" in said
            demand(named, f"no word of {self._where} in: {said}")
            how = "waited"
        else:
            how = "arrived all the same" if failed else "not reached"
        self._outcomes[f"{self._place}: {how}"] += 1
        self._complete(new)

    def _complete(self, new: str) -> None:
        """The next cycle goes on, and the one after that has nothing left to do."""
        world = self._world
        for what in ("the next cycle", "the one after that"):
            code, said = world.run("update")
            demand(code == 0, f"{what}: exit code {code}: {said}")
        world.check_quiet(new, preserved=self._preserved)
        if world.drive:
            world.check_drive(new)
        self._current = new


def main() -> int:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    return by_hand(__doc__, campaign, count=100, unit="rounds, over all places", where=memory)


if __name__ == "__main__":
    sys.exit(main())

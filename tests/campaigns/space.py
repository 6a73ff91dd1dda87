"""Full disks and I/O errors, for the destination, the state and the cache.

    python3 tests/campaigns/space.py --seed 1 --count 60

Each round leaves another number of bytes on a tiny file system, before the update starts or, so
that its own look at the room is no help, in the middle of it. Either it
arrives, or the old version stays as it is, and the message says what there is no room for; with
room again, the next cycle goes on, and no action is lost or run twice.
"""

import contextlib
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from campaigns.world import BrokenPromiseError, World, by_hand, demand
from support.webserver import Request

PLACES = ("destination", "state", "cache")
_SIZES = {"destination": 14 << 20, "state": 12 << 20, "cache": 12 << 20}
_WORDS = ("No space left", "are free", "does not fit")


def campaign(folder: Path, rng: random.Random, count: int) -> Counter[str]:
    """Rounds for each place; gives how often an update arrived, and how often it had to wait."""
    outcomes: Counter[str] = Counter()
    for place in PLACES:
        home = folder / place
        home.mkdir()
        with World(home, rng, drive=False) as world, tiny(world, place) as full:
            current = _round(world, None, outcomes, place)
            world.preserve()
            for number in range(count // len(PLACES)):
                # Few bytes are where the interesting failures are: each write is the last one.
                spread = _SIZES[place] if number % 2 else 96 << 10
                leave = rng.randrange(spread)
                if number % 4 < 2:
                    _fill(full, leave)
                else:
                    world.server.on_request = _Filler(full, leave, after=rng.randrange(9))
                try:
                    current = _round(world, current, outcomes, f"{place}, {leave} bytes free")
                except BrokenPromiseError as error:
                    raise BrokenPromiseError(f"{place}, {leave} bytes free: {error}") from error
    return outcomes


@contextlib.contextmanager
def tiny(world: World, place: str) -> Iterator[Path]:
    """A tiny file system in one of the places."""
    appliance = world.appliance
    where = {
        "destination": appliance.destination.parent,
        "state": appliance.state_dir,
        "cache": appliance.state_dir / "cache",
    }[place]
    where.mkdir(parents=True, exist_ok=True)
    image = world.folder / "tiny.img"
    with image.open("wb") as file:
        file.truncate(_SIZES[place])
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", "-b", "1024", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, where], check=True)
    try:
        (where / "lost+found").rmdir()
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def _round(world: World, old: str | None, outcomes: Counter[str], where: str) -> str:
    """One version: tried with what room there is, completed when there is more."""
    new = world.publish().name
    world.promise_update(old, new)
    preserved = old is not None
    code, said = world.run("update")
    if code:
        demand(code == 1, f"exit code {code}: {said}")
        demand(any(word in said for word in _WORDS), f"no word of space in: {said}")
        world.check_instant(old, new, preserved=preserved)
        _make_room(world)
        code, said = world.run("update")
        demand(code == 0, f"with room again: exit code {code}: {said}")
        outcomes[f"{where.partition(',')[0]}: waited for room"] += 1
    else:
        _make_room(world)
        outcomes[f"{where.partition(',')[0]}: arrived"] += 1
    code, said = world.run("update")
    demand(code == 0, f"once more: exit code {code}: {said}")
    world.check_quiet(new, preserved=preserved)
    return new


class _Filler:
    """Takes the room while chunks are fetched."""

    def __init__(self, where: Path, leave: int, after: int) -> None:
        self._where = where
        self._leave = leave
        self._left = after
        self._lock = threading.Lock()

    def __call__(self, _request: Request) -> None:
        with self._lock:
            if self._left == 0:
                _fill(self._where, self._leave)
            self._left -= 1


def _fill(where: Path, leave: int) -> None:
    """Take all room but so many bytes; what cannot be had at once, in small pieces."""
    free = shutil.disk_usage(where).free
    with contextlib.suppress(OSError), (where / ".filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10):
            with contextlib.suppress(OSError):
                while free - file.tell() > leave:
                    file.write(bytes(min(size, free - file.tell() - leave)))


def _make_room(world: World) -> None:
    world.server.on_request = None
    appliance = world.appliance
    for where in (appliance.destination.parent, appliance.state_dir, appliance.state_dir / "cache"):
        (where / ".filler").unlink(missing_ok=True)


def main() -> int:
    return by_hand(__doc__, campaign, count=60, unit="rounds, over all places")


if __name__ == "__main__":
    sys.exit(main())

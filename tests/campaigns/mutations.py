"""Mutations of a valid site and of a valid drive: the tree that was published, or a refusal.

    make campaign-mutations COUNT=10000
    PYTHONPATH=src:tests /usr/bin/python3 tests/campaigns/mutations.py --count 1 --first 4711

Each mutation has a number, and is made from the seed and that number alone. Bytes are flipped,
cut off, repeated and inserted, files are removed, swapped with each other and taken from other
drives (older, newer, unsigned, a stranger's), or stand there as a folder, link or FIFO. A device
with version 1 then runs a cycle with the mutated drive, the mutated site (as a folder, or behind a
web server), or both, and after that one with a sound site. Cycles run in this process: they are
what the client's processes run, and an interpreter's start would be all that is measured.
Whatever happens:

- its tree is exactly one of the published ones, and never older than before;
- a cycle that says 0 and names a version has that version;
- no exception leaves a cycle, and no cycle takes longer than `LIMIT` seconds;
- with a sound site the device is up to date, and the drive is sound too, or foreign.

The exit code is 0 where all of that held, else 1 with the numbers to look at.
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from support.device import Device
from support.signed import copy, location
from support.trees import snapshot
from support.webserver import WebServer
from support.world import World

SEED = 20261123
LIMIT = 300
"""Seconds of an endless cycle: no request waits for more than a few, but machines may be busy."""

PLACES = (
    ("drive",),
    ("drive", "offline"),
    ("site",),
    ("site", "web"),
    ("drive", "site"),
    ("drive", "site", "web"),
)
"""What is mutated, and how the device gets to it."""


class HangError(BaseException):
    """A cycle took too long. Not an `Exception`, so that no handler takes it for its own."""


@dataclass(frozen=True)
class Result:
    """What came of one mutation.

    Attributes:
        number: the mutation.
        code: exit code of the first cycle; None where it has not come to its end.
        finding: the promise that was broken; empty where all of them were kept.
    """

    number: int
    code: int | None = None
    finding: str = ""


class Campaign:
    """A world that mutations are made of."""

    def __init__(self, folder: Path, seed: int = SEED) -> None:
        self.folder = folder
        self.seed = seed
        self.world = World(folder / "world")
        keyring = self.world.publisher.keys.keyring
        donors = {"1": self.world.sites[1], "3": self.world.sites[3]}
        donors["unsigned"] = self.world.unsigned[2]
        donors["stranger"] = folder / "stranger"
        self.world.publisher.publish(
            donors["stranger"], self.world.trees[3], keys=self.world.publisher.strangers
        )
        self.donors = donors
        filled = Device(folder / "filled", location(self.world.sites[2]), keyring=keyring)
        filled.backup = location(folder / "drive")
        (folder / "drive").mkdir()
        assert filled.cycle().exit == 0
        fresh = Device(folder / "fresh" / "device", location(self.world.sites[1]), keyring=keyring)
        assert fresh.cycle().exit == 0

    def run(self, number: int) -> Result:
        """Make one mutation, and let a device meet it."""
        rng = random.Random(f"{self.seed}/{number}")
        work = Path(tempfile.mkdtemp(prefix="mutation-", dir=self.folder))
        encounter = _Encounter(self, rng, work)
        finding = ""
        try:
            with _limited():
                encounter.run()
        except HangError:
            finding = f"{encounter.story}: no end after {LIMIT} s"
        except AssertionError as error:
            finding = f"{encounter.story}: {error}: {encounter.log}"
        except Exception:
            finding = f"{encounter.story}: {traceback.format_exc()}"
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return Result(number, encounter.code, finding)


class _Encounter:
    """One mutation, and the device that meets it.

    Attributes:
        story: what was changed.
        code: exit code of the first cycle.
    """

    def __init__(self, campaign: Campaign, rng: random.Random, work: Path) -> None:
        self.campaign = campaign
        self.story = "nothing"
        self.code: int | None = None
        self.log: list[str] = []
        self._rng = rng
        self._work = work

    def run(self) -> None:
        world, work, rng = self.campaign.world, self._work, self._rng
        drive, site = copy(self.campaign.folder / "drive", work / "drive"), work / "site"
        copy(world.sites[2], site)
        places = rng.choice(PLACES)
        said = []
        for place in (drive, site):
            if place.name in places:
                said += [self._mutate(place) for _ in range(rng.choice((1, 1, 2, 5)))]
        self.story = f"{', '.join(places)}: {', '.join(said)}"
        shutil.copytree(self.campaign.folder / "fresh" / "device", work / "device", symlinks=True)
        device = Device(
            work / "device",
            location("/nowhere" if "offline" in places else site),
            location(drive) if "drive" in places else None,
            world.publisher.keys.keyring,
            log=self.log,
        )
        with WebServer(site) if "web" in places else contextlib.nullcontext() as server:
            if server is not None:
                device.source = location(server.url)
            end = device.cycle()
        self.code = end.exit
        assert end.exit in (0, 1, 3, 4), end
        version = self._version(device)
        if end.exit == 0:
            assert end.version == f"{version}.0", f"{end}, but the tree is {version}"
        # A release of version 3 that came from another drive is newer than the sound site.
        device.source = location(world.sites[3])
        again = device.cycle()
        assert self._version(device) == 3, f"then {again}"
        if "drive" in places and again.exit not in (0, 4):
            assert device.cycle().exit == 0, "the drive was not mended"

    def _version(self, device: Device) -> int:
        found = snapshot(device.destination)
        for version, expected in self.campaign.world.snapshots.items():
            if found == expected:
                return version
        raise AssertionError("the tree is none that was published")

    def _mutate(self, place: Path) -> str:
        """Change one thing; gives it in words."""
        rng, donors = self._rng, self.campaign.donors
        files = sorted(path for path in place.rglob("*") if path.is_file())
        # Chunks are many, and the other files are where the decisions are.
        few = [path for path in files if ".castr" not in str(path)]
        path = rng.choice(few if few and rng.random() < 0.6 else files)
        change = rng.choice(CHANGES)
        name = path.relative_to(place)
        if change is _from_donor:
            donor = rng.choice(sorted(donors))
            other = donors[donor] / name
            if not other.is_file():
                other = donors[donor] / "tree.caidx.release"
            path.write_bytes(other.read_bytes())
            return f"{name} of {donor}"
        change(rng, path, files)
        return f"{name} {change.__name__.strip('_')}"


@contextmanager
def _limited() -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


Change = Callable[[random.Random, Path, list[Path]], None]


def _edited(edit: Callable[[random.Random, bytearray], None]) -> Change:
    def change(rng: random.Random, path: Path, _files: list[Path]) -> None:
        data = bytearray(path.read_bytes())
        edit(rng, data)
        path.write_bytes(data)

    change.__name__ = edit.__name__
    return change


def flipped(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 3, 20))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut_off(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def cut_out(rng: random.Random, data: bytearray) -> None:
    begin = rng.randrange(len(data) + 1)
    del data[begin : begin + rng.randrange(1, 200)]


def repeated(rng: random.Random, data: bytearray) -> None:
    begin = rng.randrange(len(data) + 1)
    piece = data[begin : begin + rng.randrange(1, 5000)]
    data[begin:begin] = piece * rng.choice((1, 2, 100))


def inserted(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((b"\n", b"\r\n", b"\0" * 512, b"-----BEGIN PGP", b"Serial: 9\n"))


def zeroed(rng: random.Random, data: bytearray) -> None:
    begin = rng.randrange(len(data) + 1) // 512 * 512
    piece = data[begin : begin + 4096]
    data[begin : begin + 4096] = bytes(len(piece))


def _swapped(rng: random.Random, path: Path, files: list[Path]) -> None:
    other = rng.choice(files)
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


def _removed(_rng: random.Random, path: Path, _files: list[Path]) -> None:
    path.unlink()


def _made_odd(rng: random.Random, path: Path, files: list[Path]) -> None:
    target = rng.choice(files)
    path.unlink()
    rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(target)))()


def _from_donor(_rng: random.Random, _path: Path, _files: list[Path]) -> None:
    """Stands for what `Campaign` does itself: only it knows the donors."""


CHANGES: tuple[Change, ...] = (
    *map(_edited, (flipped, flipped, cut_off, cut_out, repeated, inserted, zeroed)),
    _swapped,
    _removed,
    _made_odd,
    _from_donor,
    _from_donor,
)


def in_processes(campaign: Campaign, numbers: range, jobs: int) -> Iterator[Result]:
    """Run mutations side by side; each process has the world as it was at the fork."""
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs) as pool:
        yield from pool.imap_unordered(campaign.run, numbers, chunksize=10)


def main() -> int:
    """Run mutations from the command line."""
    parser = argparse.ArgumentParser(description="Mutate valid sites and drives.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    codes: collections.Counter[int | None] = collections.Counter()
    findings = 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-", ignore_cleanup_errors=True) as name:
        campaign = Campaign(Path(name), arguments.seed)
        numbers = range(arguments.first, arguments.first + arguments.count)
        for done, result in enumerate(in_processes(campaign, numbers, arguments.jobs), 1):
            codes[result.code] += 1
            if result.finding:
                findings += 1
                print(f"mutation {result.number}: {result.finding}", flush=True)
            if done % 1000 == 0:
                print(f"{done} in {time.monotonic() - begin:.0f} s", flush=True)
    known = ", ".join(f"{count} x exit {code}" for code, count in codes.most_common())
    seconds = time.monotonic() - begin
    print(f"{arguments.count} mutations in {seconds:.0f} s: {known}; {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

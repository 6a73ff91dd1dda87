"""Mutations of a valid site and of a valid drive: the tree that was published, or a refusal.

    PYTHONPATH=src:tests /usr/bin/python3 -m campaigns.mutations 10000
    PYTHONPATH=src:tests /usr/bin/python3 -m campaigns.mutations 1 --first 4711   # one again

Each mutation has a number, and is made from the seed and that number alone. Bytes are flipped,
cut off, repeated and inserted, files are removed, swapped with each other and taken from other
drives (older, newer, unsigned, a stranger's), or stand there as a folder, link or FIFO. A device
with version 1 then runs a cycle with the mutated drive, the mutated site, or both, and after that
one with a sound site. Whatever happens:

- its tree is exactly one of the published ones, and never older than before;
- a cycle that says 0 and names a version has that version;
- no exception leaves a cycle, and no cycle takes longer than `LIMIT` seconds;
- with a sound site the device is up to date, and the drive is sound too, or foreign.

The exit code is 0 where all of that held, else 1 with the numbers to look at.
"""

import argparse
import collections
import itertools
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
from support.world import World

SEED = 20261123
LIMIT = 30


class HangError(BaseException):
    """A cycle took too long. Not an `Exception`, so that no handler takes it for its own."""


@dataclass(frozen=True)
class Finding:
    """A mutation that broke a promise."""

    number: int
    what: str


class Campaign:
    """A world that mutations are made of.

    Attributes:
        counts: how often the first cycle of a mutation ended with which exit code.
    """

    def __init__(self, folder: Path, seed: int = SEED) -> None:
        self.folder = folder
        self.seed = seed
        self.world = World(folder / "world")
        self.counts: collections.Counter[int] = collections.Counter()
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

    def run(self, number: int) -> Finding | None:
        """Make one mutation, and let a device meet it."""
        rng = random.Random(f"{self.seed}/{number}")
        work = Path(tempfile.mkdtemp(prefix="mutation-", dir=self.folder))
        try:
            with _limited():
                self._meet(rng, work)
        except HangError:
            return Finding(number, f"no end after {LIMIT} s")
        except AssertionError as error:
            return Finding(number, f"{error}")
        except Exception:
            return Finding(number, traceback.format_exc())
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return None

    def _meet(self, rng: random.Random, work: Path) -> None:
        drive, site = copy(self.folder / "drive", work / "drive"), work / "site"
        copy(self.world.sites[2], site)
        where = rng.choice(("drive", "site", "drive and site", "drive, offline"))
        said = []
        for place in (drive, site):
            if place.name in where:
                said += [self._mutate(rng, place) for _ in range(rng.choice((1, 1, 2, 5)))]
        shutil.copytree(self.folder / "fresh" / "device", work / "device", symlinks=True)
        device = Device(
            work / "device",
            location("/nowhere" if "offline" in where else site),
            location(drive) if "drive" in where else None,
            self.world.publisher.keys.keyring,
            options={"destination": work / "device" / "device" / "tree"},
        )
        story = f"{where}: {', '.join(said)}"
        end = device.cycle()
        self.counts[end.exit] += 1
        assert end.exit in (0, 1, 3, 4), f"{story}: {end}"
        version = self._version(device, story)
        if end.exit == 0:
            assert end.version == f"{version}.0", f"{story}: {end}, but the tree is {version}"
        # A release of version 3 that came from another drive is newer than the sound site.
        device.source = location(self.world.sites[3])
        again = device.cycle()
        assert self._version(device, story) == 3, f"{story}: then {again} {device.log}"
        if "drive" in where and again.exit not in (0, 4):
            assert device.cycle().exit == 0, f"{story}: the drive was not mended: {device.log}"

    def _version(self, device: Device, story: str) -> int:
        found = snapshot(device.destination)
        for version, expected in self.world.snapshots.items():
            if found == expected:
                return version
        raise AssertionError(f"{story}: the tree is none that was published: {device.log}")

    def _mutate(self, rng: random.Random, place: Path) -> str:
        """Change one thing; gives it in words."""
        files = sorted(path for path in place.rglob("*") if path.is_file())
        # Chunks are many, and the other files are where the decisions are.
        few = [path for path in files if ".castr" not in str(path)]
        path = rng.choice(few if few and rng.random() < 0.6 else files)
        change = rng.choice(CHANGES)
        name = path.relative_to(place)
        if change is _from_donor:
            donor = rng.choice(sorted(self.donors))
            other = self.donors[donor] / name
            if not other.is_file():
                other = self.donors[donor] / "tree.caidx.release"
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


def main() -> int:
    """Run mutations from the command line."""
    parser = argparse.ArgumentParser(description="Mutate valid sites and drives.")
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    findings = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-", ignore_cleanup_errors=True) as name:
        campaign = Campaign(Path(name), arguments.seed)
        for number in itertools.islice(itertools.count(arguments.first), arguments.count):
            finding = campaign.run(number)
            if finding is not None:
                findings.append(finding)
                print(f"mutation {finding.number}: {finding.what}", flush=True)
    codes = ", ".join(f"{count} x exit {code}" for code, count in sorted(campaign.counts.items()))
    seconds = time.monotonic() - begin
    print(f"{arguments.count} mutations in {seconds:.0f} s: {codes}; {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

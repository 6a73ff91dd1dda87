"""One drive, ten devices: carried from one to the next, while new versions are published.

    python3 tests/campaigns/carry.py --seed 1 --count 50

Only the first device has a network. All begin with different versions; some have a clock of
1970, some went back to the version before. Each round may publish a version, and carries the
drive to any device, which has a cycle as if it were plugged in; now and then it is pulled out
in the middle. What must hold after each round: nothing anywhere is older than it was, every
destination is exactly one published version, and the drive holds one complete, valid release.
"""

import argparse
import random
import shutil
import sys
import time
from pathlib import Path

from campaigns.world import BrokenPromiseError, demand, report, workplace
from casync_updater.clock import SystemClock
from casync_updater.cycle.inspect import inspect
from casync_updater.model import Location, Reason
from casync_updater.reports import CycleEnd
from support.device import Device
from support.signed import Publisher, copy, location, release_of
from support.trees import snapshot
from support.world import make_small_tree

DEVICES = 10
NOWHERE = Location("http://127.0.0.1:9/tree.caidx", "http://127.0.0.1:9/store.castr")


class Journey:
    """The devices, the drive, and what was published."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder = folder
        self.rng = rng
        self.publisher = Publisher(folder / "publisher")
        self.site = folder / "site"
        self.trees: dict[str, object] = {}
        self.drive = folder / "drive"
        self.drive.mkdir()
        self.drive_serial = 0
        self.serials = [0] * DEVICES
        self.rolled_back: set[int] = set()
        self.devices = []
        for number in range(DEVICES):
            # A new device now and then: their ages differ.
            if number == 0 or rng.random() < 0.5:
                self.publish()
            home = folder / f"device-{number}"
            device = Device(home, location(self.site), None, self.publisher.keys.keyring)
            demand(device.cycle().exit == 0, "the first installation failed")
            device.backup = location(home / "usb")
            if number:
                device.source = NOWHERE
            if number in (3, 7):
                device.clock.set(86400.0)
            self.devices.append(device)
            self.serials[number] = self._serial(device)

    def publish(self) -> None:
        number = len(self.trees) + 1
        tree = make_small_tree(self.folder / f"tree-{number}", number)
        name = f"{number}.0"
        self.publisher.publish(self.site, tree, version=name)
        self.trees[name] = snapshot(tree)

    def round(self) -> str:
        """One stop of the drive."""
        if self.rng.random() < 0.4:
            self.publish()
        number = self.rng.choice([0, *range(DEVICES)])
        device = self.devices[number]
        if number and self.rng.random() < 0.08 and number not in self.rolled_back:
            self._roll_back(number)
        plugged = device.folder / "usb"
        if self.rng.random() < 0.15:
            end = self._pulled_out(device, plugged)
        else:
            self.drive.rename(plugged)
            try:
                end = device.cycle(reason=Reason.MEDIA)
            finally:
                plugged.rename(self.drive)
            self._demand_equal(number, end)
        self._demand_order(number, end)
        self._demand_drive(end)
        version = device.state.installed
        return f"device {number}: {end.message} (has {version and version.version})"

    def _roll_back(self, number: int) -> None:
        if self.devices[number].rollback().exit == 0:
            self.rolled_back.add(number)
            # That is the operator's own wish, and the only way down.
            self.serials[number] = self._serial(self.devices[number])

    def _pulled_out(self, device: Device, plugged: Path) -> CycleEnd:
        """A drive of which only a part can be read; what was written before is on it."""
        part = copy(self.drive, plugged)
        files = sorted(path for path in plugged.rglob("*") if path.is_file())
        for path in files:
            if self.rng.random() < 0.5:
                path.unlink()
        end = device.cycle(reason=Reason.MEDIA)
        shutil.rmtree(part)
        return end

    def _demand_equal(self, number: int, end: CycleEnd) -> None:
        """After an undisturbed stop, device and drive have the newest that one of them had."""
        if number in self.rolled_back:
            return
        demand(end.exit == 0 or not self.drive_serial, f"device {number}: {end.message}")
        newest = max(self.drive_serial, self.serials[number])
        if number == 0:
            newest = release_of(self.site).serial
        demand(
            self._serial(self.devices[number]) == newest == release_of(self.drive).serial,
            f"device {number} and the drive do not have the newest: {end.message}",
        )

    def _demand_order(self, number: int, end: CycleEnd) -> None:
        for other, device in enumerate(self.devices):
            serial = self._serial(device)
            demand(serial >= self.serials[other], f"device {other} went back: {end.message}")
            demand(other == number or serial == self.serials[other], f"device {other} changed")
            self.serials[other] = serial
            if other == number:
                version = device.state.installed
                demand(version is not None, f"device {other} has nothing")
                assert version is not None
                assert version.version is not None
                same = snapshot(device.destination) == self.trees[version.version]
                demand(same, f"device {other} is not {version.version}")

    def _demand_drive(self, end: CycleEnd) -> None:
        found = list(inspect(self.drive, [self.publisher.keys.keyring], SystemClock()))
        if not found and not self.drive_serial:
            return
        demand(len(found) == 1, f"the drive has {len(found)} releases: {end.message}")
        demand(found[0].error is None, f"the drive: {found[0].error} after: {end.message}")
        assert found[0].vouched is not None
        serial = found[0].vouched.release.serial
        demand(serial >= self.drive_serial, f"the drive went back: {end.message}")
        self.drive_serial = serial

    def _serial(self, device: Device) -> int:
        installed = device.state.installed
        return installed.serial or 0 if installed is not None else 0


def campaign(folder: Path, rng: random.Random, count: int) -> list[str]:
    """So many stops; gives a line for each."""
    folder.mkdir(exist_ok=True)
    journey = Journey(folder, rng)
    lines = []
    for number in range(count):
        lines.append(journey.round())
        report(f"{number + 1}: {lines[-1]}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=50, help="stops of the drive")
    options = parser.parse_args()
    folder = workplace()
    begin = time.monotonic()
    try:
        campaign(folder / "world", random.Random(options.seed), options.count)
    except BrokenPromiseError as error:
        report(str(error))
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(f"{options.count} stops, nothing went back: {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

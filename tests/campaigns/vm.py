"""Power cuts of a virtual machine: an installed client, a kernel of its own, a recorded disk.

    python3 tests/campaigns/vm.py --seed 1 --count 100
    python3 tests/campaigns/vm.py --no-sync        # must fail: shows that the test bites

The machine (Debian 12 with this tree's package) lives through the same story as in `power`, and
QEMU writes down all that its kernel hands to its disk. Each crash state is that disk after a cut:
it is mounted, looked at before anything else, and gone on with.
"""

import argparse
import contextlib
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaigns.power import PowerCampaign
from campaigns.recorded import CrashState, WriteLog, mounted
from campaigns.world import BrokenPromiseError, World, demand, report, workplace
from support.webserver import WebServer
from system.conftest import make_appliance
from system.repository import build
from system.vm import System, VirtualMachine, kernel

_WITHOUT_SYNCS = """\
import os, sys
from casync_updater import syscalls
os.fsync = lambda _descriptor: None
syscalls.sync_file_system = lambda _path: None
from casync_updater.cli.main import main
sys.exit(main())
"""


class VirtualCampaign(PowerCampaign):
    """The story of `PowerCampaign`, lived through by a virtual machine.

    Paths in the machine are those that the world has here, so that a crash state is gone on with
    here as well.
    """

    def __init__(self, system: System, folder: Path, rng: random.Random, *, syncs: bool) -> None:
        self._system = system
        self._folder = folder
        self._root = folder / "root"
        self._root.mkdir()
        self._syncs = syncs
        super().__init__(World(folder, rng))

    def run(self, count: int) -> Counter[str]:
        """Record and replay; gives how many states of each style were survived."""
        log, base = self._folder / "log.img", self._folder / "base.img"
        shutil.copy(self._system.disk, base)
        self._log = WriteLog(self._folder, log, base)
        machine = VirtualMachine(self._system, self._folder / "vm", write_log=log)
        with self._world, machine as self._machine:
            machine.boot()
            with WebServer(self._world.site.root, host=machine.host) as server:
                self._prepare(server)
                report("the machine is up")
                self._record()
                report("recorded")
                machine.kill()
                self._log.demand_whole(machine.disk)
                return self._replay(count)

    def _prepare(self, server: WebServer) -> None:
        """Configure the client in the machine; the updates are started by hand."""
        world, machine = self._world, self._machine
        device = world.appliance
        machine.run("systemctl", "disable", "--now", "casync-updater")
        machine.run("mkdir", "-p", str(device.destination.parent), str(world.usb))
        entry = dict(device.entry)
        for key in ("srcIndex", "srcStore"):
            entry[key] = entry[key].replace(world.server.url, server.url)
        machine.write(str(device.config), json.dumps(entry))
        machine.write(str(device.conf), world.settings)
        machine.write("/root/client.py", _WITHOUT_SYNCS)
        machine.run("sync")

    def _update(self) -> tuple[int, str]:
        device = self._world.appliance
        program = ["casync-updater"] if self._syncs else ["python3", "/root/client.py"]
        options = ["--config", str(device.config), "--state-dir", str(device.state_dir)]
        done = self._machine.run(
            *program, *options, "--settings", str(device.conf), "update", check=False
        )
        return done.returncode, done.stdout + done.stderr

    def _preserve(self) -> None:
        world = self._world
        world.appliance.destination.mkdir(parents=True, exist_ok=True)
        world.preserve()
        for file in ("var/data/file", "local.conf"):
            path = world.appliance.destination / file
            self._machine.write(str(path), path.read_text())
        shutil.rmtree(world.appliance.destination)
        self._update()
        self._machine.run("sync")

    def _state(self) -> dict[str, Any]:
        device = self._world.appliance
        text = self._read(device.state_dir / device.name / "state.json")
        found: dict[str, Any] = json.loads(text) if text else {}
        return found

    def _written(self) -> list[str]:
        return self._read(self._world.appliance.journal).splitlines()

    def _read(self, path: Path) -> str:
        return self._machine.run("cat", str(path), check=False).stdout

    @contextlib.contextmanager
    def _mounted(self, state: CrashState) -> Iterator[None]:
        """The machine's root, and the appliance's folder in it where this world has it."""
        home = self._world.appliance.folder
        with mounted(state.image, self._root, "-t", "ext4", "-o", "loop"):
            there = self._root / home.relative_to("/")
            demand(there.is_dir(), f"{home} is gone")
            with mounted(there, home, "--bind"):
                yield


def make_system(folder: Path) -> System:
    """Debian 12 with this tree's packages."""
    packages = folder / "packages"
    packages.mkdir()
    build(packages, version=None)
    made = folder / "system"
    made.mkdir()
    make_appliance(sorted(packages.glob("*.deb")), made)
    return System("bookworm", "amd64", kernel("bookworm"), made / "disk")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100, help="crash states")
    parser.add_argument("--no-sync", action="store_true", help="without the client's syncs")
    options = parser.parse_args()
    folder = workplace("/var/tmp")
    begin = time.monotonic()
    try:
        (folder / "world").mkdir()
        campaign = VirtualCampaign(
            make_system(folder),
            folder / "world",
            random.Random(options.seed),
            syncs=not options.no_sync,
        )
        seen = campaign.run(options.count)
        report(f"survived {sum(seen.values())} crash states: {dict(seen)}")
    except BrokenPromiseError as error:
        report(str(error))
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(f"{time.monotonic() - begin:.0f} s, seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

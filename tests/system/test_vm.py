"""The virtual machines that other system tests stand on: one is used the way all of them are."""

import json
from pathlib import Path

import pytest

from system.repository import serve
from system.vm import System, VirtualMachine, make_drive

pytestmark = [pytest.mark.system, pytest.mark.long]


def test_a_machine_gets_a_drive_loses_its_power_and_boots_again(
    appliance: System, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/greeting").write_text("hello")
    drive = tmp_path / "drive"
    make_drive(drive, "vfat", label="UPDATE", files=[tmp_path / "files/greeting"])
    with VirtualMachine(appliance, tmp_path / "vm") as machine:
        machine.boot()
        assert machine.output("systemctl", "is-active", "casync-updater") == "active"
        with serve(machine.host, {"web": tmp_path / "files"}) as server:
            check = machine.run("casync-updater", "status", "--json")
            assert json.loads(check.stdout)["entries"] == []
            copied = machine.run("python3", "-c", FETCH, f"{server}/web/greeting")
            assert copied.stdout == "hello"

        machine.plug("stick", drive)
        device = "/dev/disk/by-label/UPDATE"
        exists = ("test", "-b", device)
        machine.wait(lambda: machine.run(*exists, check=False).returncode == 0, "the drive")
        machine.run("mount", device, "/mnt")
        assert machine.output("cat", "/mnt/greeting") == "hello"
        machine.run("umount", "/mnt")
        machine.unplug("stick")
        machine.wait(lambda: machine.run(*exists, check=False).returncode == 1, "its end")

        machine.write("/root/synced", "safe")
        machine.run("sync", "/root/synced")
        machine.write("/root/not-synced", "x" * 1_000_000)
        machine.kill()
        machine.boot()
        assert machine.read("/root/synced") == b"safe"
        assert machine.output("cat", "/root/not-synced") == ""
        with pytest.raises(AssertionError, match="exit code 3"):
            machine.run("sh", "-c", "exit 3")
        machine.poweroff()
    assert not (tmp_path / "vm").exists()


FETCH = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode(), end='')"

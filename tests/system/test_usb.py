"""USB drives that are plugged into a virtual machine, and pulled out when it hurts most.

All tests share one machine. `USB_PULLS` says how often a drive is pulled out in the middle
(``make campaign-drives``).
"""

import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from system.usb import FOLDER, LABEL, POINT, Stick
from system.vm import System, VirtualMachine, make_drive

pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.xdist_group("usb")]
PULLS = int(os.environ.get("USB_PULLS", "2"))


@pytest.fixture(scope="module")
def stick(appliance: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stick]:
    folder = tmp_path_factory.mktemp("usb")
    with VirtualMachine(appliance, folder / "vm") as machine:
        machine.boot()
        yield Stick(machine, folder / "stick")


@pytest.fixture
def fresh(stick: Stick) -> Stick:
    """A device that has nothing yet."""
    stick.configure(LABEL)
    return stick


def test_the_whole_offline_update(fresh: Stick) -> None:
    """Plug it in, wait, pull it out."""
    stick = fresh
    drive = stick.drive(stick.publish(1))
    with stick.plugged(drive):
        stick.ended("success")
        done = ["can be pulled out (done)"]
        stick.until(lambda: stick.drives() == done, "the end of the visit")
        status = stick.machine.output("systemctl", "show", "-P", "StatusText", "casync-updater")
        assert f"drive {LABEL} can be pulled out (done); idle" in status
        journal = stick.journal()
        assert f"drive {LABEL}: tree: reading 1.0" in journal
        assert f"drive {LABEL} can be pulled out (done)" in journal
        assert POINT not in stick.machine.output("cat", "/proc/self/mountinfo")
        stick.demand("1.0")
    assert stick.light() == [f"start {LABEL}", "success"]
    inside = stick.demand_drive(drive, "1.0")
    (report,) = stick.reports(inside)
    for line in ("it had:     nothing", "it has now: 1.0", "the drive:  1.0", "updated to 1.0"):
        assert line in report
    assert "Device:   appliance (" in report


@pytest.mark.parametrize("filesystem", ["vfat", "exfat", "ext4"])
def test_pulled_out_while_it_is_read(fresh: Stick, filesystem: str) -> None:
    stick, rng = fresh, random.Random(filesystem)
    with stick.plugged(stick.drive(stick.publish(1), filesystem)):
        stick.ended("success")
    old = "1.0"
    number = {"vfat": 10, "exfat": 11, "ext4": 12}[filesystem]
    drive = stick.drive(stick.publish(number, large=8), filesystem)
    for _ in range(PULLS):
        with stick.plugged(drive, quiet=True):
            wanted = rng.choice(["plan", "build", "build", "verify", "mirror"])
            stick.until(
                lambda wanted=wanted: stick.step() == wanted or len(stick.light()) == 2,  # type: ignore[misc]
                "the reading",
                step=0.02,
            )
        stick.until(lambda: len(stick.light()) == 2, "the end of the visit")
        stick.idle()
        old = stick.installed() or old
        stick.demand(old)
    with stick.plugged(drive):
        stick.ended("success")
    stick.demand(f"{number}.0")
    if filesystem != "exfat":
        (report,) = stick.reports(stick.demand_drive(drive, f"{number}.0", filesystem))
        assert f"it had:     {old}" in report


@pytest.mark.parametrize("filesystem", ["vfat", "exfat", "ext4"])
def test_pulled_out_while_it_is_written(fresh: Stick, filesystem: str) -> None:
    stick = fresh
    content = stick.publish(20)
    with stick.plugged(stick.drive(stick.publish(21, large=6))):
        stick.ended("success")
    drive = stick.drive(content, filesystem)
    for number in range(PULLS):
        with stick.plugged(drive, quiet=True):
            stick.until(
                lambda: stick.step() == "mirror" or len(stick.light()) == 2, "it", step=0.02
            )
            stick.machine.run("sleep", str(0.4 * (1 + number % 8)))
        stick.until(lambda: len(stick.light()) == 2, "the end of the visit")
        stick.idle()
        stick.demand("21.0")
    with stick.plugged(drive):
        stick.ended("success")
    if filesystem != "exfat":
        stick.demand_drive(drive, "21.0", filesystem)
    with stick.plugged(drive):
        stick.ended("success")
        assert "refreshed the backup" not in stick.journal(4)


def test_read_only(fresh: Stick) -> None:
    stick = fresh
    drive = stick.drive(stick.publish(1))
    before = drive.read_bytes()
    with stick.plugged(drive, read_only=True):
        stick.ended("success")
        assert "read-only" in stick.journal()
        assert "the report cannot be written: Read-only file system" in stick.journal()
    stick.demand("1.0")
    assert drive.read_bytes() == before


def test_full(fresh: Stick) -> None:
    """What does not fit leaves the drive as it was."""
    stick = fresh
    old = stick.publish(30)
    with stick.plugged(stick.drive(stick.publish(31, large=8))):
        stick.ended("success")
    filler = stick.folder / "filler"
    filler.write_bytes(b"")
    # Room for half of what is new.
    os.truncate(filler, (62 << 20) - _on_fat(old) - (1 << 20))
    drive = stick.folder / "full"
    make_drive(drive, "vfat", label=LABEL, files=[old, filler])
    with stick.plugged(drive):
        stick.ended("failure")
        assert "make room on the drive" in stick.journal()
    (report,) = stick.reports(stick.demand_drive(drive, "30.0"))
    assert "make room on the drive" in report
    assert "the drive:  30.0" in report


def _on_fat(folder: Path, cluster: int = 2048) -> int:
    """Bytes that a folder takes: files and folders take whole clusters."""
    sizes = [path.stat().st_size if path.is_file() else 1 for path in folder.rglob("*")]
    return sum(-(-size // cluster) * cluster for size in sizes)


@pytest.mark.parametrize("direction", ["read", "write"])
def test_it_fails_in_the_middle(fresh: Stick, direction: str) -> None:
    """Sectors that cannot be read or written: no hang, no half update, and a good drive helps."""
    stick = fresh
    old = stick.publish(40)
    new = stick.publish(41, large=8)
    drive = stick.drive(old if direction == "write" else new)
    if direction == "write":
        with stick.plugged(stick.drive(new)):
            stick.ended("success")
    # Past the FATs and the folders: what is broken is in the middle of the chunks.
    broken = [
        {"event": "none", "iotype": direction, "errno": 5, "sector": sector}
        for sector in range((8 << 20) // 512, (9 << 20) // 512, 64)
    ]
    with stick.plugged(drive, errors=broken):
        stick.ended("failure")
        stick.idle()
    if direction == "read":
        assert stick.installed() is None
    with stick.plugged(drive):
        stick.ended("success")
    stick.demand("41.0")
    stick.demand_drive(drive, "41.0")


def test_labels_that_lie(fresh: Stick) -> None:
    stick = fresh
    photo = stick.folder / "photo.jpg"
    photo.write_bytes(b"a holiday")
    for content, said in (
        (photo, "has nothing of ours: no report is written"),
        (stick.publish(50, stranger=True), "refused (signature)"),
    ):
        drive = stick.drive(content)
        before = sorted(path.name for path in stick.on_drive(drive).rglob("*"))
        with stick.plugged(drive):
            stick.ended("failure")
            assert said in stick.journal()
            assert stick.installed() is None
        assert sorted(path.name for path in stick.on_drive(drive).rglob("*")) == before
    swap = stick.folder / "swap"
    make_drive(swap, "ext4", label=LABEL)
    partition = stick.folder / "partition"
    with partition.open("wb") as file:
        file.truncate(20 << 20)
    subprocess.run(["mkswap", "-q", "-L", LABEL, partition], check=True)
    put = ["dd", f"if={partition}", f"of={swap}", "bs=1M", "seek=1", "conv=notrunc", "status=none"]
    subprocess.run(put, check=True)
    with stick.plugged(swap):
        stick.until(
            lambda: "holds no file system but swap: left alone" in stick.journal(), "the refusal"
        )


def test_a_file_system_that_the_kernel_refuses(fresh: Stick) -> None:
    stick = fresh
    drive = stick.drive(stick.publish(1), "ext4")
    with drive.open("r+b") as file:
        base = (1 << 20) + 1024
        file.seek(base + 0x64)
        (ro_compat,) = struct.unpack("<I", file.read(4))
        file.seek(base + 0x60)
        (incompat,) = struct.unpack("<I", file.read(4))
        file.seek(base + 0x60)
        # A feature of the future; and no checksum that would give it away before.
        file.write(struct.pack("<II", incompat | 0x4000_0000, ro_compat & ~0x400))
    with stick.plugged(drive):
        stick.ended("failure")
        assert f"drive {LABEL} (/dev/" in stick.journal()
        assert "cannot be mounted" in stick.journal()
        failed = ["can be pulled out (failed, see the journal)"]
        stick.until(lambda: stick.drives() == failed, "the end of the visit")
    with stick.plugged(stick.drive(stick.publish(1))):
        stick.ended("success")


@pytest.mark.parametrize("label", ["My Own", "a$b`c;d, e"])
def test_strange_labels(stick: Stick, label: str) -> None:
    stick.configure(label)
    drive = stick.drive(stick.publish(1), "ext4", label)
    with stick.plugged(drive):
        stick.ended("success")
        assert stick.light()[0] == f"start {label}"
    stick.demand("1.0")
    stick.demand_drive(drive, "1.0", "ext4")


def test_two_at_once(fresh: Stick) -> None:
    """Two of the same label one after the other, one of another label beside them."""
    stick = fresh
    old, new = stick.drive(stick.publish(60)), stick.drive(stick.publish(61))
    other = stick.drive(None, "ext4", "My Own")
    with (
        stick.plugged(other),
        stick.plugged(old, quiet=True),
        stick.plugged(new, quiet=True),
    ):
        stick.until(
            lambda: (
                [one for one in stick.drives() if one.startswith("can be")] == stick.drives()
                and len(stick.drives()) == 3
            ),
            "all three",
        )
        assert "no entry has its backupIndex there" in stick.journal()
        stick.demand("61.0")
    stick.demand_drive(new, "61.0")


def test_at_boot_before_the_service(fresh: Stick) -> None:
    stick = fresh
    stick.machine.run("systemctl", "stop", "casync-updater")
    with stick.plugged(stick.drive(stick.publish(1))):
        stick.until(lambda: stick.exists(f"/dev/disk/by-label/{LABEL}"), "the drive")
        stick.machine.run("systemctl", "start", "casync-updater")
        stick.ended("success")
    stick.demand("1.0")


def test_the_service_stops_in_the_middle(fresh: Stick) -> None:
    """The next start goes on with the drive that is still mounted."""
    stick = fresh
    with stick.plugged(stick.drive(stick.publish(70, large=8))):
        stick.until(lambda: stick.step() == "build", "the reading", step=0.02)
        stick.machine.run("systemctl", "restart", "casync-updater")
        stick.ended("success")
    stick.demand("70.0")


def test_somebody_still_uses_it(fresh: Stick) -> None:
    stick = fresh
    with stick.plugged(stick.drive(stick.publish(80, large=8)), quiet=True):
        stick.until(lambda: stick.exists(f"{POINT}/{FOLDER}"), "the mount", step=0.02)
        # Not as the unit's WorkingDirectory: systemd would end it before it unmounts.
        camp = f"cd {POINT} && exec sleep 600"
        stick.machine.run("systemd-run", "--unit=camper", "sh", "-c", camp)
        stick.ended("failure")
        assert "is still in use by something else" in stick.journal()
        stick.demand("80.0")
        stick.machine.run("systemctl", "stop", "camper")
    stick.until(lambda: stick.drives() == [], "its end")


def test_mounted_by_somebody_else(fresh: Stick) -> None:
    """An automounter's drive is used where it is, and is not taken away from it."""
    stick = fresh
    stick.machine.run("sh", "-c", f"rm -rf /media/pi; mkdir -p /media/pi {POINT}")
    drive = stick.drive(stick.publish(90), label="HOLIDAY")
    stick.machine.plug(drive.name, drive)
    stick.forget()
    node = "/dev/disk/by-label/HOLIDAY"
    stick.until(lambda: stick.exists(node), "the drive")
    stick.machine.run("mount", node, POINT)
    stick.ended("success")
    stick.demand("90.0")
    assert stick.exists(f"{POINT}/{FOLDER}")
    assert not stick.exists(f"{POINT}/casync-updater-reports")
    stick.machine.unplug(drive.name)
    stick.machine.run("umount", "-l", POINT)
    stick.until(lambda: stick.drives() == [], "its end")


def test_an_automount_of_systemd(fresh: Stick) -> None:
    """A cycle that looks for the drive mounts it, and does not wait for one that is not there."""
    stick = fresh
    line = f"LABEL=AUTO {POINT} vfat nofail,x-systemd.automount,x-systemd.device-timeout=3"
    unit = stick.machine.output("systemd-escape", "--path", "--suffix=automount", POINT)
    drive = stick.drive(stick.publish(95), label="AUTO")
    stick.machine.run("sh", "-c", f"echo '{line}' >> /etc/fstab && systemctl daemon-reload")
    stick.machine.run("systemctl", "start", unit)
    try:
        begin = time.monotonic()
        done = stick.machine.run("casync-updater", "update", "tree", check=False)
        assert done.returncode == 3, done.stderr
        assert time.monotonic() - begin < 60
        stick.machine.plug(drive.name, drive)
        stick.until(lambda: stick.exists("/dev/disk/by-label/AUTO"), "the drive")
        done = stick.machine.run("casync-updater", "update", "tree")
        assert "updated to 95.0" in done.stdout
        stick.demand("95.0")
        stick.idle()
        stick.machine.unplug(drive.name)
    finally:
        stick.machine.run("systemctl", "stop", unit)
        stick.machine.run("sed", "-i", "/AUTO/d", "/etc/fstab")
        stick.machine.run("systemctl", "daemon-reload")
    stick.demand_drive(drive, "95.0")

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casync_updater.drives.mounts import Mount, appeared, holder, parse, resolve

# What Debian 12 shows on a Raspberry Pi with a drive, an automounter and a bind mount.
REAL = rb"""23 1 179:2 / / rw,noatime shared:1 - ext4 /dev/mmcblk0p2 rw
24 23 0:5 / /dev rw,relatime shared:2 - devtmpfs udev rw,size=1679772k,mode=755
26 23 0:23 / /run rw,nosuid,nodev,noexec,relatime shared:5 - tmpfs tmpfs rw,size=388256k,mode=755
64 23 179:1 / /boot/firmware rw,relatime shared:33 - vfat /dev/mmcblk0p1 rw,fmask=0022
70 23 0:44 / /media/auto rw,relatime shared:40 - autofs systemd-1 rw,fd=58,pgrp=1,direct
72 23 8:1 / /media/pi/MY\040DRIVE rw,nosuid,nodev shared:45 - vfat /dev/sda1 rw,uid=1000,flush
75 23 179:2 /srv/updates /mnt/a\134b rw,noatime shared:1 master:7 - ext4 /dev/mmcblk0p2 rw
"""
DRIVE = b"90 23 8:17 / /media/usb rw,relatime shared:50 - vfat /dev/sdb1 rw\n"
OVER = b"95 23 8:33 / /media rw,relatime - ext4 /dev/sdc1 rw\n"


def points(data: bytes, path: str) -> str | None:
    found = holder(parse(data), path)
    return None if found is None else found.point


def test_the_table_is_read_as_the_kernel_writes_it() -> None:
    table = parse(REAL)
    assert len(table) == 7
    assert table[5] == Mount(72, 23, "8:1", "/", "/media/pi/MY DRIVE", "vfat", "/dev/sda1")
    assert (table[6].root, table[6].point) == ("/srv/updates", "/mnt/a\\b")


def test_this_machine_has_a_table() -> None:
    table = parse(Path("/proc/self/mountinfo").read_bytes())
    root = holder(table, "/")
    assert root is not None
    assert root.point == "/"
    for mount in table:
        if holder(table, mount.point) == mount and mount.device != "0:0":
            with_device = Path(mount.point)
            try:
                number = with_device.stat().st_dev
            except OSError:
                continue
            if mount.type not in ("btrfs", "overlay", "fuse", "autofs"):
                assert mount.device == f"{os.major(number)}:{os.minor(number)}"


@given(st.binary(max_size=300))
def test_no_bytes_are_too_strange(data: bytes) -> None:
    for mount in parse(data + b"\n" + REAL):
        holder((mount,), "/x")


def test_the_longest_point_holds_a_path() -> None:
    assert points(REAL, "/media/pi/MY DRIVE/updates/a.caidx") == "/media/pi/MY DRIVE"
    assert points(REAL, "/media/pi/MY DRIVE2/a.caidx") == "/"
    assert points(REAL, "/media/pi") == "/"
    assert points(REAL, "/run") == "/run"
    assert points(b"", "/run") is None


def test_what_a_later_mount_hides_holds_nothing() -> None:
    assert points(REAL + DRIVE, "/media/usb/a") == "/media/usb"
    assert points(REAL + DRIVE + OVER, "/media/usb/a") == "/media"
    twice = b"99 90 8:49 / /media/usb rw - vfat /dev/sdd1 rw\n"
    found = holder(parse(REAL + DRIVE + twice), "/media/usb/a")
    assert found is not None
    assert found.device == "8:49"


PLACES = {"a": "/media/usb/a.caidx", "b": "/media/usb/sub/b.caidx", "c": "/srv/c.caidx"}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(REAL, REAL + DRIVE, [("/media/usb", ("a", "b"))], id="plugged in"),
        pytest.param(REAL + DRIVE, REAL, [], id="pulled out"),
        pytest.param(REAL + DRIVE, REAL + DRIVE, [], id="nothing"),
        pytest.param(REAL, REAL + OVER, [("/media", ("a", "b"))], id="a folder above"),
        pytest.param(REAL + DRIVE + OVER, REAL + DRIVE, [], id="uncovered again"),
        pytest.param(
            REAL + DRIVE,
            REAL + DRIVE.replace(b"8:17", b"8:18").replace(b"sdb1", b"sdb2"),
            [("/media/usb", ("a", "b"))],
            id="another drive in one instant",
        ),
        pytest.param(
            REAL, REAL + DRIVE.replace(b"/media/usb", b"/media/other"), [], id="elsewhere"
        ),
        pytest.param(
            REAL, REAL + DRIVE.replace(b"- vfat", b"- autofs"), [], id="an automounter's promise"
        ),
        pytest.param(
            REAL,
            REAL + DRIVE.replace(b"/media/usb", b"/media/usb/sub"),
            [("/media/usb/sub", ("b",))],
            id="deeper",
        ),
    ],
)
def test_what_appeared(old: bytes, new: bytes, expected: list[tuple[str, tuple[str, ...]]]) -> None:
    found = appeared(parse(old), parse(new), PLACES)
    assert [(mount.point, names) for mount, names in found.items()] == expected


def follow(path: str, made: dict[str, str], data: bytes = REAL, new: bytes = b"") -> str:
    looked: list[str] = []

    def read_link(where: str) -> str:
        looked.append(where)
        if where not in made:
            raise OSError(22, "no link")
        return made[where]

    found = resolve(path, parse(data + new), parse(data), read_link)
    untouchable = ("/media/usb",) if new else ("/media/auto",)
    assert not [where for where in looked if where.startswith(untouchable)]
    return found


def test_links_are_followed_up_to_the_drive() -> None:
    assert follow("/srv/a.caidx", {}) == "/srv/a.caidx"
    assert follow("/srv/link/a", {"/srv/link": "/media/usb"}) == "/media/usb/a"
    assert follow("/srv/link/a", {"/srv/link": "../media/usb/x"}) == "/media/usb/x/a"
    assert follow("/a/../b/./c", {"/b": "/media/auto"}) == "/media/auto/c"
    assert follow("/x/a", {"/x": "/x"}) == "/x/a"
    assert follow("/", {}) == "/"


def test_no_drive_is_looked_into() -> None:
    assert follow("/media/usb/a", {"/media/usb/a": "/etc"}, new=DRIVE) == "/media/usb/a"
    assert follow("/media/auto/a/b", {}) == "/media/auto/a/b"
    assert follow("/l/a", {"/l": "/media/usb/deep"}, new=DRIVE) == "/media/usb/deep/a"

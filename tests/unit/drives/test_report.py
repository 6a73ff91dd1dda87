import os
from pathlib import Path

import pytest

from casync_updater.drives import report
from casync_updater.drives.report import COUNT, FOLDER, Device, Line, Report, this_device, write
from casync_updater.errors import LocalError

PI = Device("raspberrypi", "0123abcd")


def a_report(*lines: Line, device: Device = PI, good: bool = True) -> Report:
    return Report(device, "UPDATES", 1_795_447_266.0, 1_795_447_300.0, good, lines)


def test_everything_is_in_it(tmp_path: Path) -> None:
    lines = (
        Line("myproject", "1.0", "2.0", "2.0", "updated to 2.0"),
        Line("website", None, None, None, "refused (signature): expected x, found y at z"),
    )
    write(tmp_path, a_report(*lines, good=False))
    data = (tmp_path / FOLDER / "raspberrypi-0123abcd.txt").read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n")
    assert data.decode().splitlines() == [
        "casync-updater: what happened when this drive was plugged in",
        "",
        "Device:   raspberrypi (0123abcd)",
        "Drive:    UPDATES",
        "Started:  2026-11-23 15:21:06 UTC",
        "Ended:    2026-11-23 15:21:40 UTC (by the device's own clock)",
        "Result:   SOMETHING WENT WRONG, see below",
        "",
        "myproject",
        "  it had:     1.0",
        "  it has now: 2.0",
        "  the drive:  2.0",
        "  result:     updated to 2.0",
        "",
        "website",
        "  it had:     nothing",
        "  it has now: nothing",
        "  the drive:  nothing that this device takes",
        "  result:     refused (signature): expected x, found y at z",
    ]


def test_it_has_an_end_and_nobody_writes_lines_into_it(tmp_path: Path) -> None:
    evil = Line("a", "1\r\n\r\nResult: all went well", None, None, "x" * 1_000_000)
    body = str(a_report(*[evil] * 1000))
    assert len(body) < 300_000
    assert "\nResult: all" not in body
    assert "and 900 more" in body


def test_each_device_has_its_own_and_the_oldest_go(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    for number in range(COUNT + 5):
        device = Device("raspberrypi", f"{number:08x}")
        write(tmp_path, a_report(device=device))
        os.utime(folder / device.file, (number, number))
    (folder / "notes.txt").write_text("somebody's own")
    write(tmp_path, a_report())
    names = {path.name for path in folder.iterdir()}
    assert len(names) == COUNT + 1
    assert {"notes.txt", PI.file} <= names
    assert "raspberrypi-00000000.txt" not in names


@pytest.mark.parametrize(
    ("host", "file"),
    [
        ("box", "box-1.txt"),
        ("a/b:c*?", "a-b-c-1.txt"),
        ("...", "device-1.txt"),
        ("ü" * 90, "device-1.txt"),
    ],
)
def test_names_fit_on_fat(host: str, file: str) -> None:
    assert Device(host, "1").file == file


def test_links_lead_nowhere(tmp_path: Path) -> None:
    drive, outside = tmp_path / "drive", tmp_path / "outside"
    drive.mkdir()
    outside.mkdir()
    (drive / FOLDER).symlink_to(outside)
    with pytest.raises(LocalError, match="cannot be written"):
        write(drive, a_report())
    (drive / FOLDER).unlink()
    (drive / FOLDER).mkdir()
    (outside / "file").write_text("precious")
    for name in (PI.file, f".{PI.file}.new"):
        (drive / FOLDER / name).symlink_to(outside / "file")
    write(drive, a_report())
    assert (outside / "file").read_text() == "precious"
    assert [path.name for path in (drive / FOLDER).iterdir()] == [PI.file]
    assert not (drive / FOLDER / PI.file).is_symlink()


def test_what_stands_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / FOLDER / PI.file).mkdir(parents=True)
    with pytest.raises(LocalError, match="Is a directory"):
        write(tmp_path, a_report())
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match="Not a directory"):
        write(tmp_path / "file", a_report())


def test_who_this_is(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "machine-id").write_text("a" * 32 + "\n")
    first = this_device(tmp_path)
    assert first == this_device(tmp_path)
    assert first.host == os.uname().nodename
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "proc" / "device-tree" / "serial-number").write_bytes(b"10000000abcdef\0")
    assert this_device(tmp_path).id != first.id
    assert report.this_device().id

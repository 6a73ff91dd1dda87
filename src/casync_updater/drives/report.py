"""The report on a drive: what happened to this device, for the person who carries the drive.

``casync-updater-reports/HOST-ID.txt``: a file for each device, written anew with each visit. Its
lines end as Windows wants them, and its name fits on FAT.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from casync_updater.errors import LocalError
from casync_updater.files import write_atomic

FOLDER = "casync-updater-reports"
COUNT = 200
"""Reports that stay on a drive."""

_MESSAGE = 2000
_ENTRIES = 100
_UNFIT = re.compile(r"[^A-Za-z0-9-]+")


@dataclass(frozen=True, slots=True)
class Line:
    """What the report says of one entry.

    Attributes:
        name: the entry.
        had: the version that was installed when the drive came; None for none.
        has: the version that is installed now.
        drive: the version that the drive holds now; None where it holds none.
        result: what happened, refusals included.
    """

    name: str
    had: str | None
    has: str | None
    drive: str | None
    result: str


@dataclass(frozen=True, slots=True)
class Device:
    """Which device it is: its name, and an id that tells two of the same name apart."""

    host: str
    id: str

    @property
    def file(self) -> str:
        """The name of its report."""
        return f"{_UNFIT.sub('-', self.host).strip('-')[:60] or 'device'}-{self.id}.txt"


def this_device(root: Path = Path("/")) -> Device:
    """Name and id of this machine.

    The id is made of what the hardware and the installation say of themselves, since whole SD
    cards are copied; it gives away neither of the two.
    """
    whole = hashlib.sha256(b"casync-updater report\n")
    for name in ("etc/machine-id", "proc/device-tree/serial-number"):
        with contextlib.suppress(OSError):
            whole.update((root / name).read_bytes().strip(b"\0\n") + b"\n")
    return Device(os.uname().nodename, whole.hexdigest()[:8])


@dataclass(frozen=True, slots=True)
class Report:
    """One visit of a drive at a device. Times are seconds since 1970, by the device's clock."""

    device: Device
    title: str
    began: float
    ended: float
    good: bool
    lines: Sequence[Line]

    def __str__(self) -> str:
        parts = [
            "casync-updater: what happened when this drive was plugged in",
            "",
            f"Device:   {self.device.host} ({self.device.id})",
            f"Drive:    {_one_line(self.title)}",
            f"Started:  {_time(self.began)}",
            f"Ended:    {_time(self.ended)} (by the device's own clock)",
            f"Result:   {'all went well' if self.good else 'SOMETHING WENT WRONG, see below'}",
        ]
        for line in self.lines[:_ENTRIES]:
            parts += [
                "",
                f"{_one_line(line.name)}",
                f"  it had:     {_one_line(line.had or 'nothing')}",
                f"  it has now: {_one_line(line.has or 'nothing')}",
                f"  the drive:  {_one_line(line.drive or 'nothing that this device takes')}",
                f"  result:     {_one_line(line.result)}",
            ]
        if len(self.lines) > _ENTRIES:
            parts += ["", f"and {len(self.lines) - _ENTRIES} more"]
        return "\r\n".join(parts) + "\r\n"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _one_line(words: str) -> str:
    """Text that cannot pretend to be another line of the report, and has an end."""
    plain = "".join(one if one.isprintable() else " " for one in words)
    return plain if len(plain) <= _MESSAGE else f"{plain[:_MESSAGE]} [...]"


def write(point: Path, report: Report) -> None:
    """Write a report onto a drive, never to where a link on it leads.

    Raises:
        LocalError: it cannot be written; a report that was there still is.
    """
    try:
        with _folder(point) as folder:
            # The folder by its descriptor: its name may be exchanged meanwhile.
            here = Path(f"/proc/self/fd/{folder}")
            name = report.device.file
            write_atomic(here / name, str(report).encode(errors="replace"))
            _thin_out(here, name)
    except OSError as error:
        raise LocalError(f"the report cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _folder(point: Path) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    top = os.open(point, flags)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(FOLDER, dir_fd=top)
        folder = os.open(FOLDER, flags, dir_fd=top)
    finally:
        os.close(top)
    try:
        yield folder
    finally:
        os.close(folder)


def _thin_out(folder: Path, own: str) -> None:
    """Let only the newest stay; a device that wrote long ago writes again when it must."""
    named = re.compile(r"[A-Za-z0-9-]+-[0-9a-f]{8}\.txt")
    found = [path for path in folder.iterdir() if named.fullmatch(path.name) and path.name != own]
    found.sort(key=lambda path: path.lstat().st_mtime, reverse=True)
    for path in found[COUNT - 1 :]:
        path.unlink()

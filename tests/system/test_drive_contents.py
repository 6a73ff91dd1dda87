"""Drives with the file systems that people have, under a real kernel, tampered with elsewhere.

What holds for folders (`integration/test_signed_drive.py`, `integration/test_attacks.py`) holds on
FAT, exFAT and ext4: complete after each update, mended where it is damaged, never written where
it is foreign, left alone where it is read-only, refused in time where it is too small, which its
clusters decide. FAT and ext4 are changed from outside of the machine, on the image; exFAT, for
which no such tool is in Debian, at another mount point, as on another computer.
"""

import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.client import Site, run
from support.webserver import WebServer
from support.world import make_small_tree
from system.vm import System, VirtualMachine, make_drive

pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.xdist_group("drives")]

FILESYSTEMS = ("vfat", "exfat", "ext4")
FOREIGN = {
    "._tree.caidx": b"\0\5\x16\7",
    "System Volume Information/IndexerVolumeGuid": b"guid",
    "holiday/photo.jpg": b"\xff\xd8",
}
"""What other systems, and people, put on drives."""
_START = 1 << 20


@pytest.fixture(scope="module")
def machine(
    appliance: System, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VirtualMachine]:
    """One machine for all drives; nobody but the test starts a cycle on it."""
    with VirtualMachine(appliance, tmp_path_factory.mktemp("drives") / "vm") as machine:
        machine.boot()
        machine.run("systemctl", "stop", "casync-updater")
        yield machine


class Publisher:
    """A site with two versions, signed, and one of somebody else.

    Attributes:
        keyring: what devices have.
        versions: the folder that is served, by version.
    """

    def __init__(self, folder: Path) -> None:
        self.versions: dict[int, Path] = {}
        for name in ("keys", "mallory"):
            keygen = ("-m", "casync_updater.server", "keygen", folder / name, "--owner", "X <x@x>")
            run(sys.executable, *keygen)
        self.keyring = folder / "keys" / "keyring.gpg"
        secret = str(folder / "keys" / "working-secret.asc")
        site = Site(folder / "site", signKey=secret, chunkSize="1K:4K:16K")
        for version in (1, 2):
            shutil.rmtree(site.source, ignore_errors=True)
            make_small_tree(site.source, version)
            site.publish(version=f"{version}.0")
            self.versions[version] = folder / f"version-{version}"
            shutil.copytree(site.root, self.versions[version])
        secret = str(folder / "mallory" / "working-secret.asc")
        evil = Site(folder / "evil", signKey=secret)
        evil.source.mkdir(parents=True)
        (evil.source / "evil").write_text("evil")
        evil.publish(version="9.0")
        self.foreign = evil.beside(".release").read_bytes()


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return Publisher(tmp_path_factory.mktemp("publisher"))


class Drive:
    """A drive, plugged in or not.

    Attributes:
        plugged: the one that is, if any.
    """

    plugged: "Drive | None" = None

    def __init__(
        self, machine: VirtualMachine, folder: Path, filesystem: str, size: int = 64 << 20
    ) -> None:
        self.machine = machine
        self.filesystem = filesystem
        self.image = folder / "drive"
        self.mount = f"/media/{filesystem}"
        self._folder = folder
        self._count = 0
        make_drive(self.image, filesystem, label="DRIVE", size=size)

    def plug(self, options: str = "rw") -> None:
        machine, device = self.machine, "/dev/disk/by-label/DRIVE"
        machine.plug("drive", self.image)
        Drive.plugged = self
        exists = ("test", "-b", device)
        machine.wait(
            lambda: machine.run(*exists, check=False).returncode == 0, "the drive", timeout=300
        )
        machine.run("mkdir", "-p", self.mount)
        machine.run("mount", "-o", options, device, self.mount)

    def unplug(self, *, mounted: bool = True) -> None:
        self.machine.run("umount", self.mount, check=mounted)
        self.machine.unplug("drive")
        Drive.plugged = None
        gone = ("test", "-b", "/dev/disk/by-label/DRIVE")
        self.machine.wait(
            lambda: self.machine.run(*gone, check=False).returncode == 1, "its end", timeout=300
        )

    def content(self) -> dict[str, bytes]:
        """Every file on it, by its path; the drive is not plugged in."""
        self._count += 1
        target = self._folder / f"content-{self._count}"
        target.mkdir()
        if self.filesystem == "vfat":
            run("mcopy", "-s", "-i", f"{self.image}@@{_START}", "::*", target)
        elif self.filesystem == "ext4":
            with self._partition() as partition:
                run("debugfs", "-R", f"rdump / {target}", partition)
        else:
            self.plug("ro")
            archive = "/root/drive.tar"
            self.machine.run("tar", "-C", self.mount, "-cf", archive, ".")
            (target.with_suffix(".tar")).write_bytes(self.machine.read(archive))
            run("tar", "-C", target, "-xf", target.with_suffix(".tar"))
            self.unplug()
        self.last = target
        return {
            str(path.relative_to(target)): path.read_bytes()
            for path in sorted(target.rglob("*"))
            if path.is_file() and "lost+found" not in path.parts
        }

    def put(self, files: dict[str, bytes]) -> None:
        """Write files onto it; the drive is not plugged in."""
        source = self._folder / "put"
        shutil.rmtree(source, ignore_errors=True)
        for name, data in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        if self.filesystem == "vfat":
            run("mcopy", "-s", "-D", "o", "-i", f"{self.image}@@{_START}", *source.iterdir(), "::")
        elif self.filesystem == "ext4":
            commands = "".join(
                line
                for name in files
                for line in (
                    *(f'mkdir "/{parent}"\n' for parent in reversed(Path(name).parents[:-1])),
                    f'rm "/{name}"\nwrite "{source / name}" "/{name}"\n',
                )
            )
            script = self._folder / "commands"
            script.write_text(commands)
            with self._partition() as partition:
                run("debugfs", "-w", "-f", script, partition)
        else:
            self.plug()
            for name, data in files.items():
                self.machine.write(f"{self.mount}/{name}", data)
            self.unplug()

    def _partition(self) -> "Partition":
        return Partition(self.image, self._folder / "partition")


@pytest.fixture(autouse=True)
def unplugged(machine: VirtualMachine) -> Iterator[None]:
    """A test that fails leaves no drive to the next one."""
    yield
    if Drive.plugged is not None:
        Drive.plugged.unplug(mounted=False)


class Partition:
    """A drive's partition as a file of its own, put back at the end."""

    def __init__(self, image: Path, file: Path) -> None:
        self._image = image
        self._file = file

    def __enter__(self) -> Path:
        run("dd", f"if={self._image}", f"of={self._file}", "bs=1M", "skip=1", "conv=sparse")
        return self._file

    def __exit__(self, *_: object) -> None:
        run("dd", f"if={self._file}", f"of={self._image}", "bs=1M", "seek=1", "conv=notrunc")


class Device:
    """An entry on the machine whose backup is a drive."""

    _numbers = itertools.count()

    def __init__(self, machine: VirtualMachine, publisher: Publisher, drive: Drive) -> None:
        self.machine = machine
        self.publisher = publisher
        self._drive = drive
        self._root = f"/root/device-{next(self._numbers)}"
        self._put("keyring.gpg", publisher.keyring.read_bytes())

    def update(self, version: int | None) -> tuple[int, str]:
        """A cycle: exit code and message. The web has a version; offline where it is None."""
        if version is None:
            return self._update("http://127.0.0.1:1")
        with WebServer(self.publisher.versions[version], host=self.machine.host) as server:
            return self._update(server.url)

    def version(self) -> str:
        return self.machine.output("cat", f"{self._root}/tree/version")

    def refused(self) -> dict[str, str] | None:
        status = self.machine.run(*self._command("status", "--json"))
        refused: dict[str, str] | None = json.loads(status.stdout)["entries"][0]["refused"]
        return refused

    def _put(self, name: str, data: bytes) -> None:
        self.machine.write(f"{self._root}/{name}", data)

    def _command(self, *arguments: str) -> tuple[str, ...]:
        config, state = f"{self._root}/entry.json", f"{self._root}/state"
        return ("casync-updater", "--config", config, "--state-dir", state, *arguments)

    def _update(self, base: str) -> tuple[int, str]:
        entry = {
            "interval": 3_600_000,
            "srcIndex": f"{base}/tree.caidx",
            "srcStore": f"{base}/store.castr",
            "backupIndex": f"{self._drive.mount}/tree.caidx",
            "backupStore": f"{self._drive.mount}/store.castr",
            "dstPath": f"{self._root}/tree",
            "signedBy": f"{self._root}/keyring.gpg",
        }
        self._put("entry.json", json.dumps(entry).encode())
        done = self.machine.run(*self._command("update", "--json"), check=False)
        (end,) = json.loads(done.stdout).values()
        return done.returncode, str(end["message"])


def is_complete(drive: Drive, publisher: Publisher, version: int) -> bool:
    """Whether the drive is that version, byte for byte the publisher's, with what was foreign."""
    content = drive.content()
    assert FOREIGN.items() <= content.items()
    site = publisher.versions[version]
    for name in ("tree.caidx", "tree.caidx.release", "tree.caidx.mtree", "tree.caidx.cks"):
        assert content[name] == (site / name).read_bytes(), name
    checked = run(
        *(sys.executable, "-m", "casync_updater", "verify-store", drive.last),
        *("--keyring", publisher.keyring),
    )
    assert f"{version}.0" in checked.stdout
    assert "complete" in checked.stdout
    return True


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_a_drive_through_its_life(
    machine: VirtualMachine, publisher: Publisher, tmp_path: Path, filesystem: str
) -> None:
    drive = Drive(machine, tmp_path, filesystem)
    drive.put(FOREIGN)
    device = Device(machine, publisher, drive)

    drive.plug()
    assert device.update(1) == (0, "updated to 1.0")
    drive.unplug()
    assert is_complete(drive, publisher, 1)

    drive.plug()
    assert device.update(1) == (0, "up to date")
    assert device.update(2) == (0, "updated to 2.0")
    drive.unplug()
    assert is_complete(drive, publisher, 2)

    content = drive.content()
    first, second, third, *_ = sorted(name for name in content if name.endswith(".cacnk"))
    flipped = bytearray(content[first])
    flipped[len(flipped) // 2] ^= 1
    drive.put({first: bytes(flipped), second: b"", third: content[first]})
    drive.plug()
    code, message = device.update(2)
    assert (code, "damaged" in message) == (1, True), message
    drive.unplug()
    assert is_complete(drive, publisher, 2)
    drive.plug()
    assert device.update(2) == (0, "up to date")
    drive.unplug()

    drive.put({"tree.caidx.release": publisher.foreign})
    before = drive.content()
    drive.plug()
    code, message = device.update(2)
    assert (code, "refused (signature)" in message) == (4, True), message
    assert (device.refused() or {})["check"] == "signature"
    assert device.update(None)[0] == 4
    drive.unplug()
    assert drive.content() == before, "a foreign drive is never written to"
    assert device.version() == "2"


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_a_drive_brings_an_update_and_may_be_read_only(
    machine: VirtualMachine, publisher: Publisher, tmp_path: Path, filesystem: str
) -> None:
    drive = Drive(machine, tmp_path, filesystem)
    device = Device(machine, publisher, drive)
    assert device.update(1)[0] == 0
    site = publisher.versions[2]
    drive.put(
        FOREIGN
        | {
            str(path.relative_to(site)): path.read_bytes()
            for path in site.rglob("*")
            if path.is_file()
        }
    )
    drive.plug("ro")
    code, message = device.update(None)
    assert message.startswith("updated to 2.0")
    assert code == 0, "it has no second slot, and cannot get one"
    assert device.version() == "2"
    drive.unplug()

    old = Drive(machine, _made(tmp_path / "old"), filesystem)
    device = Device(machine, publisher, old)
    old.plug()
    assert device.update(1)[0] == 0
    old.unplug()
    before = old.content()
    old.plug("ro")
    code, message = device.update(2)
    assert code == 0, "a source that cannot be written is no failure"
    assert message == "updated to 2.0"
    old.unplug()
    assert old.content() == before


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_a_full_drive_keeps_what_it_holds(
    machine: VirtualMachine, publisher: Publisher, tmp_path: Path, filesystem: str
) -> None:
    """Room for every byte is not enough where each chunk takes a cluster, and a folder another."""
    # FAT16 has at least 4,085 clusters.
    drive = Drive(machine, tmp_path, filesystem, size=256 << 20)
    if filesystem != "ext4":
        _format_in_large_clusters(drive)
    drive.put(FOREIGN)
    device = Device(machine, publisher, drive)
    drive.plug()
    assert device.update(1)[0] == 0
    free = int(machine.output("stat", "-f", "-c", "%a", drive.mount))
    cluster = int(machine.output("stat", "-f", "-c", "%S", drive.mount))
    left = 3
    film, size = f"{drive.mount}/holiday/film", str((free - left) * cluster)
    # exFAT has no fallocate, and no holes either.
    fill = ("truncate", "-s") if filesystem == "exfat" else ("fallocate", "-l")
    machine.run(*fill, size, film)
    code, message = device.update(2)
    assert code == 1
    assert "make room on the drive" in message
    assert device.version() == "2"
    machine.run("rm", film)
    drive.unplug()
    assert is_complete(drive, publisher, 1)
    drive.plug()
    assert device.update(2)[0] == 0
    drive.unplug()
    assert is_complete(drive, publisher, 2)


def _format_in_large_clusters(drive: Drive) -> None:
    """The clusters that shops format large drives with."""
    partition = drive.image.with_name("formatted")
    with partition.open("wb") as file:
        file.truncate(drive.image.stat().st_size - _START)
    if drive.filesystem == "vfat":
        run("mkfs.vfat", "-F", "16", "-s", "64", "-n", "DRIVE", partition)
    else:
        run("mkfs.exfat", "-c", "32K", "-L", "DRIVE", partition)
    run("dd", f"if={partition}", f"of={drive.image}", "bs=1M", "seek=1", "conv=notrunc")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder

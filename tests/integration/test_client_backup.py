"""The backup drive's folder: mirrored, read from when the server is gone, never authored."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from casync_updater.formats import index as index_format
from support.client import Appliance, Site, digest_of, fill
from support.trees import mutate_tree, snapshot
from support.webserver import WebServer


class Drive:
    """A folder that a drive would be mounted on."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "drive"
        self.index = self.root / "offline.caidx"
        self.store = self.root / "offline.castr"

    def plug_in(self) -> None:
        self.root.mkdir()

    def beside(self, suffix: str) -> Path:
        return self.index.with_name(self.index.name + suffix)

    def chunks(self) -> set[str]:
        return {path.stem for path in self.store.rglob("*.cacnk")}

    def equals(self, site: Site) -> None:
        """Byte for byte what the publisher has, whatever the files are called."""
        for suffix in ("", ".cks", ".mtree", ".release"):
            assert self.beside(suffix).read_bytes() == site.beside(suffix).read_bytes(), suffix
        assert self.chunks() >= needed(site)

    def files(self) -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.stat().st_ino, path.read_bytes())
            for path in self.root.rglob("*")
            if path.is_file()
        }


def needed(site: Site) -> set[str]:
    """The chunks of the version that the site has now."""
    return {ref.hex for ref in index_format.parse(site.index.read_bytes(), site.name)}


@pytest.fixture
def drive(tmp_path: Path) -> Drive:
    return Drive(tmp_path)


@pytest.fixture
def appliance(tmp_path: Path, server: WebServer, drive: Drive) -> Appliance:
    appliance = Appliance(
        tmp_path, server.url, backupIndex=str(drive.index), backupStore=str(drive.store)
    )
    appliance.impatient()
    return appliance


@pytest.fixture
def mirrored(site: Site, appliance: Appliance, drive: Drive) -> Drive:
    """The drive, with version 1.0 on it; the appliance has it too."""
    drive.plug_in()
    appliance.trigger(".")
    appliance.update()
    appliance.journal.unlink()
    return drive


def updated(site: Site, seed: int = 2) -> None:
    mutate_tree(site.source, seed)
    site.publish(version=f"{seed}.0")


def test_a_folder_that_is_not_there_is_said_once(appliance: Appliance, drive: Drive) -> None:
    first = appliance.update()
    assert first["exit"] == 0
    assert f"the backup folder of {drive.index} is not there" in first["stderr"]
    for _ in range(2):
        again = appliance.update()
        assert again["exit"] == 0
        assert "backup" not in again["stderr"]
    assert appliance.status()["lastError"] is None
    assert not drive.root.exists()


def test_it_is_mirrored_without_fetching_anything_twice(
    site: Site, server: WebServer, appliance: Appliance, drive: Drive
) -> None:
    drive.plug_in()
    appliance.update()
    drive.equals(site)
    assert drive.chunks() == needed(site)
    fetched = server.paths("*.cacnk")
    assert len(fetched) == len(set(fetched)) == len(needed(site))
    updated(site)
    server.requests.clear()
    appliance.update()
    drive.equals(site)
    fetched = server.paths("*.cacnk")
    assert len(fetched) == len(set(fetched)) <= len(needed(site)) // 2
    before = drive.files()
    server.requests.clear()
    appliance.update()
    assert len(server.requests) == 1
    assert drive.files() == before


def test_a_drive_that_is_plugged_in_later_is_made_from_the_installed_tree(
    site: Site, server: WebServer, appliance: Appliance, drive: Drive
) -> None:
    appliance.update()
    drive.plug_in()
    server.requests.clear()
    assert appliance.update()["outcome"] == "current"
    drive.equals(site)
    assert server.paths("*.cacnk") == []


def test_the_drive_gets_what_an_adopted_tree_is(
    site: Site, server: WebServer, appliance: Appliance, drive: Drive
) -> None:
    drive.plug_in()
    appliance.update()
    shutil.rmtree(appliance.state_dir)
    shutil.rmtree(drive.root)
    drive.plug_in()
    server.requests.clear()
    assert appliance.update()["outcome"] == "adopted"
    drive.equals(site)
    assert server.paths("*.cacnk") == []


def test_a_drive_that_another_device_made(
    site: Site, server: WebServer, mirrored: Drive, appliance: Appliance, tmp_path: Path
) -> None:
    """The server is down, and the drive has what this device has never seen."""
    updated(site)
    appliance.update()
    mirrored.equals(site)
    server.close()
    other = Appliance(
        tmp_path / "other", server.url, **{
            key: appliance.entry[key] for key in ("backupIndex", "backupStore")
        }
    )  # fmt: skip
    other.impatient()
    end = other.update()
    assert (end["outcome"], end["source"], end["exit"]) == ("updated", "backup", 0)
    assert digest_of(other.destination, site) == site.release().digest
    assert other.status()["installed"]["version"] == "2.0"


class TestTheServerIsDown:
    @pytest.fixture(autouse=True)
    def down(self, site: Site, server: WebServer, mirrored: Drive) -> None:
        """The drive has 1.0 as the device has; 2.0 is prepared; nothing is reachable."""
        updated(site)
        server.close()

    def carry(self, site: Site, drive: Drive) -> None:
        """The operator brings the new version on the drive."""
        shutil.rmtree(drive.store)
        shutil.copytree(site.store, drive.store)
        for suffix in ("", ".cks", ".mtree", ".release"):
            shutil.copy(site.beside(suffix), drive.beside(suffix))

    def test_the_drive_is_newer(self, site: Site, mirrored: Drive, appliance: Appliance) -> None:
        self.carry(site, mirrored)
        end = appliance.update()
        assert (end["outcome"], end["source"], end["version"]) == ("updated", "backup", "2.0")
        assert digest_of(appliance.destination, site) == site.release().digest
        assert appliance.log() == ["."]
        assert appliance.update()["outcome"] == "current"

    def test_the_drive_is_not_newer(self, mirrored: Drive, appliance: Appliance) -> None:
        before, files = snapshot(appliance.destination), mirrored.files()
        end = appliance.update()
        assert (end["outcome"], end["source"], end["exit"]) == ("current", "backup", 0)
        assert snapshot(appliance.destination) == before
        assert mirrored.files() == files
        assert appliance.log() == []

    def test_the_drive_is_not_there(self, mirrored: Drive, appliance: Appliance) -> None:
        shutil.rmtree(mirrored.root)
        end = appliance.update(code=3)
        assert end["outcome"] == "unreachable"

    def test_the_drive_lacks_a_chunk(
        self, site: Site, mirrored: Drive, appliance: Appliance
    ) -> None:
        before = mirrored.chunks()
        self.carry(site, mirrored)
        for chunk in mirrored.chunks() - before:
            (mirrored.store / chunk[:4] / f"{chunk}.cacnk").unlink()
        tree = snapshot(appliance.destination)
        end = appliance.update(code=1)
        assert ".cacnk" in end["message"]
        assert snapshot(appliance.destination) == tree
        assert appliance.verify() == {}

    def test_a_chunk_on_the_drive_is_damaged(
        self, site: Site, mirrored: Drive, appliance: Appliance
    ) -> None:
        before = mirrored.chunks()
        self.carry(site, mirrored)
        for chunk in mirrored.chunks() - before:
            _damage(mirrored.store / chunk[:4] / f"{chunk}.cacnk")
        tree = snapshot(appliance.destination)
        end = appliance.update(code=1)
        assert "offline.castr" in end["message"]
        assert snapshot(appliance.destination) == tree
        assert appliance.verify() == {}

    def test_the_index_on_the_drive_is_damaged(
        self, site: Site, mirrored: Drive, appliance: Appliance
    ) -> None:
        self.carry(site, mirrored)
        _damage(mirrored.index)
        tree = snapshot(appliance.destination)
        assert "is damaged" in appliance.update(code=1)["message"]
        assert snapshot(appliance.destination) == tree

    def test_the_drive_is_of_another_project(
        self, site: Site, mirrored: Drive, appliance: Appliance
    ) -> None:
        site.write("x", "y")
        site.publish(project="other")
        self.carry(site, mirrored)
        files = mirrored.files()
        end = appliance.update(code=4)
        assert "expected tree, found other" in end["message"]
        assert appliance.status()["refused"]["check"] == "project"
        assert mirrored.files() == files


class TestTheServerIsUp:
    def test_the_drive_is_older(
        self, site: Site, server: WebServer, mirrored: Drive, appliance: Appliance
    ) -> None:
        updated(site)
        assert appliance.update()["source"] == "source"
        mirrored.equals(site)

    def test_the_drive_is_newer(
        self, site: Site, server: WebServer, mirrored: Drive, appliance: Appliance, tmp_path: Path
    ) -> None:
        """What the server has counts; and the drive is not made older."""
        newer = site.copy(tmp_path / "newer")
        updated(newer)
        TestTheServerIsDown().carry(newer, mirrored)
        files = mirrored.files()
        assert appliance.update()["outcome"] == "current"
        assert mirrored.files() == files

    def test_another_projects_drive_is_never_written(
        self, site: Site, server: WebServer, appliance: Appliance, drive: Drive, tmp_path: Path
    ) -> None:
        other = site.copy(tmp_path / "other")
        other.write("x", "y")
        other.publish(project="other")
        drive.plug_in()
        drive.store.mkdir()
        TestTheServerIsDown().carry(other, drive)
        files = drive.files()
        end = appliance.update(code=4)
        assert (end["outcome"], end["version"]) == ("updated", "1.0")
        assert drive.files() == files
        refused = appliance.status()["refused"]
        assert (refused["check"], refused["expected"], refused["found"]) == (
            "project", "tree", "other",
        )  # fmt: skip
        assert appliance.update(code=4)["outcome"] == "current"
        shutil.rmtree(drive.root)
        assert appliance.update()["exit"] == 0
        status = appliance.status()
        assert (status["refused"], status["lastError"]) == (None, None)

    def test_missing_and_damaged_chunks_come_from_the_server(
        self, site: Site, server: WebServer, mirrored: Drive, appliance: Appliance, tmp_path: Path
    ) -> None:
        before = mirrored.chunks()
        updated(site)
        TestTheServerIsDown().carry(site, mirrored)
        new = sorted(needed(site) - before)
        (mirrored.store / new[0][:4] / f"{new[0]}.cacnk").unlink()
        _damage(mirrored.store / new[1][:4] / f"{new[1]}.cacnk")
        server.requests.clear()
        assert appliance.update(code=1)["outcome"] == "updated"
        mirrored.equals(site)
        assert digest_of(appliance.destination, site) == site.release().digest
        fetched = {path.rpartition("/")[2][:64] for path in server.paths("*.cacnk")}
        assert fetched == set(new[:2])

    @pytest.mark.parametrize("suffix", ["", ".release"])
    def test_a_half_written_drive_is_mended(
        self, site: Site, server: WebServer, mirrored: Drive, appliance: Appliance, suffix: str
    ) -> None:
        updated(site)
        mirrored.beside(suffix).write_bytes(mirrored.beside(suffix).read_bytes()[:50])
        appliance.update()
        mirrored.equals(site)

    def test_a_path_on_the_drive_that_is_a_link(
        self, site: Site, server: WebServer, mirrored: Drive, appliance: Appliance, tmp_path: Path
    ) -> None:
        """Nothing outside of the drive is written to."""
        outside = tmp_path / "outside"
        outside.mkdir()
        shutil.rmtree(mirrored.store)
        mirrored.store.mkdir()
        updated(site)
        for chunk in needed(site):
            (mirrored.store / chunk[:4]).unlink(missing_ok=True)
            (mirrored.store / chunk[:4]).symlink_to(outside)
        assert appliance.update()["outcome"] == "updated"
        assert list(outside.iterdir()) == []
        mirrored.equals(site)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
class TestRealDrives:
    @pytest.fixture(autouse=True)
    def mounted(self, drive: Drive, site: Site) -> Iterator[None]:
        drive.plug_in()
        options = ["-t", "tmpfs", "-o", "size=4M", "none"]
        subprocess.run(["mount", *options, str(drive.root)], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(drive.root)], check=True)

    def remount(self, drive: Drive, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(drive.root)], check=True)

    def test_read_only(self, site: Site, appliance: Appliance, drive: Drive) -> None:
        self.remount(drive, "ro")
        end = appliance.update(code=1)
        assert end["outcome"] == "updated"
        assert "Read-only file system" in end["message"]
        assert digest_of(appliance.destination, site) == site.release().digest
        assert "Read-only file system" in appliance.status()["lastError"]
        self.remount(drive, "rw")
        assert appliance.update()["exit"] == 0
        drive.equals(site)
        self.remount(drive, "ro")
        assert appliance.update()["exit"] == 0

    def test_full(self, site: Site, appliance: Appliance, drive: Drive) -> None:
        fill(drive.root, leave=500_000)
        before = drive.files()
        end = appliance.update(code=1)
        assert end["outcome"] == "updated"
        assert "make room on the drive" in end["message"]
        assert drive.files() == before
        (drive.root / "filler").unlink()
        assert appliance.update()["exit"] == 0
        drive.equals(site)


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.unlink()
    path.write_bytes(data)


def test_the_configuration_needs_both_halves(appliance: Appliance) -> None:
    del appliance.entry["backupStore"]
    done = appliance.run("validate", code=2)
    assert "backupStore" in done.stderr
    assert json.loads(appliance.config.read_text())["backupIndex"]

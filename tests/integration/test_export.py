"""Drives made by hand, and checked on a machine that is no device."""

import shutil
from pathlib import Path

import pytest

from casync_updater.formats import index as index_format
from casync_updater.formats.store import path_of
from support.client import Appliance
from support.signed import copy
from support.trees import snapshot
from support.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def appliance(world: World, tmp_path: Path) -> Appliance:
    site = copy(world.sites[1], tmp_path / "site")
    keyring = str(world.publisher.keys.keyring)
    appliance = Appliance(tmp_path / "first", site, signedBy=keyring)
    appliance.update()
    return appliance


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    folder = tmp_path / "drive"
    folder.mkdir()
    return folder


def test_the_folder_is_made(appliance: Appliance, drive: Path) -> None:
    assert "is complete" in appliance.run("export", "tree", drive / "updates").stdout
    assert "complete" in appliance.run("verify-store", drive).stdout


def test_an_exported_drive_updates_another_device(
    world: World, appliance: Appliance, drive: Path, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "site")
    assert "is complete" in appliance.run("export", "tree", drive).stdout
    keyring = str(world.publisher.keys.keyring)
    done = appliance.run("verify-store", drive, "--keyring", keyring)
    assert "tree 1.0" in done.stdout
    assert ", signed," in done.stdout
    other = Appliance(tmp_path / "other", drive, signedBy=keyring)
    other.update()
    assert snapshot(other.destination) == world.snapshots[1]
    (release,) = appliance.run("verify-store", drive, "--keyring", keyring, "--json").json[
        "releases"
    ]
    assert (release["project"], release["version"]) == ("tree", "1.0")
    assert release["signed"] is release["complete"] is True
    assert release["chunks"] > 0
    assert "0 chunks" in appliance.run("export", "tree", drive).stdout


def test_the_names_are_those_of_the_backup(appliance: Appliance, drive: Path) -> None:
    appliance.entry |= {"backupIndex": "/media/x/offline.caidx", "backupStore": "/media/x/chunks"}
    appliance.run("export", "tree", drive)
    assert (drive / "offline.caidx.release").exists()
    assert (drive / "chunks").is_dir()
    assert "complete" in appliance.run("verify-store", drive).stdout


def test_what_is_not_written_to(
    world: World, appliance: Appliance, drive: Path, tmp_path: Path
) -> None:
    missing = drive / "not" / "plugged in"
    assert "cannot be made" in appliance.run("export", "tree", missing, code=1).stderr
    assert not missing.parent.exists()
    (drive / "file").write_text("x")
    assert "File exists" in appliance.run("export", "tree", drive / "file", code=1).stderr
    assert "no entry" in appliance.run("export", "nobody", drive, code=2).stderr
    newer = copy(world.sites[2], tmp_path / "newer")
    before = snapshot(newer)
    assert "is newer" in appliance.run("export", "tree", newer, code=1).stderr
    assert snapshot(newer) == before
    foreign = copy(world.unsigned[2], tmp_path / "foreign")
    before = snapshot(foreign)
    assert "refused (signature)" in appliance.run("export", "tree", foreign, code=4).stderr
    assert snapshot(foreign) == before


def test_verify_store_finds_what_is_wrong(
    world: World, appliance: Appliance, drive: Path, tmp_path: Path
) -> None:
    site = copy(world.sites[2], tmp_path / "other-site")
    keyring = ("--keyring", str(world.publisher.keys.keyring))
    strangers = ("--keyring", str(world.publisher.strangers.keyring))
    assert "complete" in appliance.run("verify-store", site, *keyring).stdout
    assert "unknown key" in appliance.run("verify-store", site, *strangers, code=4).stdout
    index = index_format.parse((site / "tree.caidx").read_bytes(), "the site")
    chunk = site / "store.castr" / path_of(next(iter(index)).hex)
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-1])
    assert chunk.name in appliance.run("verify-store", site, *keyring, code=1).stdout
    chunk.unlink()
    assert chunk.stem in appliance.run("verify-store", site, *keyring, code=1).stdout
    (broken,) = appliance.run("verify-store", site, "--json", code=1).json["releases"]
    assert broken["complete"] is False
    assert chunk.stem in broken["error"]
    chunk.write_bytes(data)
    (site / "tree.caidx.release").unlink()
    assert "no release" in appliance.run("verify-store", site, *keyring, code=1).stdout
    assert "neither" in appliance.run("verify-store", drive, code=1).stderr

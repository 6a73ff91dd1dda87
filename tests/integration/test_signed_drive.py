"""The backup drive of an entry with signatures: its states, both directions, its end."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from casync_updater.formats import index as index_format
from casync_updater.model import Publication
from casync_updater.server.publish import resign
from support.device import Device
from support.signed import Silent, copy, location, release_of
from support.trees import snapshot
from support.webserver import WebServer
from support.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def site(world: World, tmp_path: Path) -> Path:
    return copy(world.sites[1], tmp_path / "site")


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    folder = tmp_path / "drive"
    folder.mkdir()
    return folder


@pytest.fixture
def device(world: World, site: Path, drive: Path, tmp_path: Path) -> Device:
    return Device(
        tmp_path / "device", location(site), location(drive), world.publisher.keys.keyring
    )


def serve(site: Path, new: Path) -> None:
    """A new version on the site."""
    shutil.rmtree(site)
    copy(new, site)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def chunk_files(folder: Path) -> list[Path]:
    return sorted((folder / "store.castr").rglob("*.cacnk"))


def is_complete(folder: Path, site: Path) -> bool:
    """Whether a drive is that version, whole, with nothing else of ours on it."""
    index = index_format.parse((site / "tree.caidx").read_bytes(), "site")
    names = {"tree.caidx", "tree.caidx.cks", "tree.caidx.mtree", "tree.caidx.release"}
    assert all((folder / name).read_bytes() == (site / name).read_bytes() for name in names)
    release = release_of(site)
    assert (folder / "tree.caidx.release-2").read_bytes() == (
        site / "tree.caidx.release"
    ).read_bytes()
    hashed = {release.index.sha256, release.mtree.sha256} if release.mtree else set()
    assert {path.name for path in (folder / "by-hash" / "SHA256").iterdir()} == hashed
    assert {path.stem for path in chunk_files(folder)} == {ref.hex for ref in index}
    return True


def test_an_empty_drive_is_filled(world: World, device: Device, drive: Path) -> None:
    assert device.cycle().exit == 0
    assert is_complete(drive, world.sites[1])
    before = {path: path.stat().st_mtime_ns for path in drive.rglob("*")}
    assert device.cycle().exit == 0
    assert {path: path.stat().st_mtime_ns for path in drive.rglob("*")} == before


def test_a_stale_drive_is_refreshed_and_pruned(
    world: World, device: Device, site: Path, drive: Path
) -> None:
    device.cycle()
    serve(site, world.sites[2])
    assert device.cycle().exit == 0
    assert is_complete(drive, world.sites[2])


def test_a_device_takes_what_is_newer_on_the_drive(
    world: World, device: Device, drive: Path
) -> None:
    device.cycle()
    shutil.rmtree(drive)
    copy(world.sites[3], drive)
    end = device.cycle()
    assert (end.exit, end.version) == (0, "3.0")
    assert snapshot(device.destination) == snapshot(world.trees[3])
    end = device.cycle()
    assert (end.exit, end.version) == (0, "3.0"), "the web source is the older one now"


def test_offline_the_drive_is_the_source(
    world: World, device: Device, site: Path, drive: Path
) -> None:
    shutil.rmtree(drive)
    copy(world.sites[2], drive)
    shutil.rmtree(site)
    assert device.cycle().exit == 0
    assert snapshot(device.destination) == snapshot(world.trees[2])
    before = files(drive)
    assert device.cycle().exit == 0
    assert before.items() <= files(drive).items()


def test_a_current_drive_spares_the_network(
    world: World, device: Device, site: Path, drive: Path
) -> None:
    shutil.rmtree(drive)
    copy(world.sites[1], drive)
    with WebServer(site) as server:
        device.source = location(server.url)
        assert device.cycle().exit == 0
        assert not [r for r in server.requests if "castr" in r.path]


def test_without_a_drive_a_cycle_that_finds_nothing_asks_once(
    device: Device, site: Path, drive: Path
) -> None:
    drive.rmdir()
    with WebServer(site) as server:
        device.source = location(server.url)
        device.cycle()
        server.requests.clear()
        assert device.cycle().exit == 0
        assert len(server.requests) == 1


def test_an_unsigned_drive_is_no_source_while_the_web_answers(
    world: World, device: Device, site: Path, drive: Path
) -> None:
    device.keyring = None
    serve(site, world.unsigned[1])
    shutil.rmtree(drive)
    copy(world.unsigned[2], drive)
    end = device.cycle()
    assert (end.exit, end.version) == (0, "1.0")
    shutil.rmtree(site)
    end = device.cycle()
    assert (end.exit, end.version) == (0, "2.0")


@pytest.mark.parametrize("online", [True, False])
def test_a_foreign_drive_is_refused_and_never_written(
    world: World, device: Device, site: Path, drive: Path, tmp_path: Path, online: bool
) -> None:
    device.cycle()
    installed = snapshot(device.destination)
    shutil.rmtree(drive)
    other = tmp_path / "other"
    world.publisher.publish(other, world.trees[2], keys=world.publisher.strangers)
    copy(other, drive)
    before = files(drive)
    if online:
        serve(site, world.sites[2])
    else:
        shutil.rmtree(site)
    end = device.cycle()
    assert end.exit == 4
    assert files(drive) == before
    refused = device.state.refused
    assert refused is not None
    assert refused.check == "signature"
    assert snapshot(device.destination) == (snapshot(world.trees[2]) if online else installed)
    shutil.rmtree(drive)
    drive.mkdir()
    if online:
        assert device.cycle().exit == 0
        assert device.state.refused is None
        assert is_complete(drive, world.sites[2])


def test_a_slot_of_somebody_else_makes_the_drive_foreign(
    world: World, device: Device, drive: Path, tmp_path: Path
) -> None:
    device.cycle()
    other = tmp_path / "other"
    world.publisher.publish(other, world.trees[2], project="something-else")
    shutil.copy(other / "tree.caidx.release", drive)
    before = files(drive)
    end = device.cycle()
    assert end.exit == 4
    assert files(drive) == before
    assert "project" in str(device.state.refused)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


DAMAGE: list[tuple[str, Callable[[Path], None], int]] = [
    ("chunk", flip, 1),
    ("chunk", cut_off, 1),
    ("chunk", fifo, 1),
    ("chunk", link, 1),
    ("chunk", Path.unlink, 0),
    ("tree.caidx", flip, 1),
    ("tree.caidx", Path.unlink, 0),
    ("tree.caidx.cks", flip, 1),
    ("tree.caidx.mtree", cut_off, 1),
    ("by-hash", flip, 1),
    ("by-hash", link, 1),
    ("tree.caidx.release", cut_off, 1),
    ("tree.caidx.release", Path.unlink, 0),
    ("tree.caidx.release-2", cut_off, 1),
    ("tree.caidx.release-2", lambda path: path.write_bytes(b""), 1),
]


@pytest.mark.parametrize(("name", "damage", "code"), DAMAGE)
def test_damage_gives_1_and_is_mended(
    world: World, device: Device, drive: Path, name: str, damage: Callable[[Path], None], code: int
) -> None:
    device.cycle()
    if name == "chunk":
        path = chunk_files(drive)[3]
    elif name == "by-hash":
        path = drive / "by-hash" / "SHA256" / release_of(drive).index.sha256
    else:
        path = drive / name
    damage(path)
    assert device.cycle().exit == code, device.log
    assert is_complete(drive, world.sites[1])
    assert device.cycle().exit == 0


@pytest.mark.parametrize("name", ["chunk", "index"])
def test_offline_a_damaged_drive_gives_1_and_changes_nothing(
    world: World, device: Device, site: Path, drive: Path, name: str
) -> None:
    device.cycle()
    shutil.rmtree(drive)
    copy(world.sites[2], drive)
    shutil.rmtree(site)
    for path in chunk_files(drive) if name == "chunk" else [drive / "tree.caidx"]:
        flip(path)
    if name == "index":
        shutil.rmtree(drive / "by-hash")
    end = device.cycle()
    assert end.exit == 1
    assert "damaged" in end.message
    assert snapshot(device.destination) == snapshot(world.trees[1])


def test_a_damaged_index_on_the_drive_comes_from_the_web(
    world: World, device: Device, site: Path, drive: Path
) -> None:
    shutil.rmtree(drive)
    copy(world.sites[2], drive)
    shutil.rmtree(drive / "by-hash")
    flip(drive / "tree.caidx")
    serve(site, world.sites[3])
    (site / "tree.caidx.release").write_bytes((world.sites[1] / "tree.caidx.release").read_bytes())
    end = device.cycle()
    assert end.version == "2.0"
    assert snapshot(device.destination) == snapshot(world.trees[2])


def test_foreign_files_and_other_projects_stay(
    world: World, device: Device, site: Path, drive: Path
) -> None:
    for name in ("._tree.caidx.release", ".Spotlight-V100/x", "System Volume Information/y"):
        (drive / name).parent.mkdir(exist_ok=True)
        (drive / name).write_bytes(b"\0\5\x16\7 not ours")
    (drive / "._tree.caidx").write_bytes(b"junk")
    device.cycle()
    (drive / "holiday").mkdir()
    for name in ("tree.caidx", "tree.caidx.release"):
        shutil.copy(world.sites[1] / name, drive / "holiday" / name)
    serve(site, world.sites[2])
    assert device.cycle().exit == 0
    assert (drive / "System Volume Information" / "y").exists()
    assert (drive / "._tree.caidx.release").exists()
    needed = index_format.parse((drive / "holiday" / "tree.caidx").read_bytes(), "")
    assert {ref.hex for ref in needed} <= {path.stem for path in chunk_files(drive)}
    shutil.rmtree(drive / "holiday")
    serve(site, world.sites[3])
    assert device.cycle().exit == 0
    assert (drive / "tree.caidx.release").read_bytes() == (
        world.sites[3] / "tree.caidx.release"
    ).read_bytes()


def test_an_index_that_cannot_be_read_stops_the_pruning(
    world: World, device: Device, site: Path, drive: Path
) -> None:
    device.cycle()
    (drive / "other.caidx").write_bytes(b"half")
    before = {path.stem for path in chunk_files(drive)}
    serve(site, world.sites[2])
    assert device.cycle().exit == 0
    assert before <= {path.stem for path in chunk_files(drive)}


def test_a_rolled_back_device_refreshes_nothing(
    world: World, device: Device, site: Path, drive: Path
) -> None:
    device.cycle()
    serve(site, world.sites[2])
    device.cycle()
    assert device.rollback().exit == 0
    shutil.rmtree(drive)
    drive.mkdir()
    device.cycle()
    assert list(drive.iterdir()) == []


def test_a_release_that_was_signed_again_gets_onto_the_drive(
    world: World, device: Device, site: Path, drive: Path
) -> None:
    device.cycle()
    old = (drive / "tree.caidx.release").read_bytes()
    publisher = world.publisher
    publisher.clock.added += 100
    publication = Publication(
        index=site / "tree.caidx",
        store=site / "store.castr",
        source=Path("/nowhere"),
        project="tree",
        sign_keys=(str(publisher.keys.working),),
    )
    resign(publication, publisher.clock, Silent())
    assert device.cycle().exit == 0
    new = (site / "tree.caidx.release").read_bytes()
    assert new != old
    for name in ("tree.caidx.release", "tree.caidx.release-2"):
        assert (drive / name).read_bytes() == new


def test_pulled_out_at_any_moment(world: World, site: Path, tmp_path: Path) -> None:
    """Every prefix of the writes to a drive is the old or the new complete version."""
    keyring = world.publisher.keys.keyring
    drive = tmp_path / "drive"
    drive.mkdir()
    first = Device(tmp_path / "first", location(site), location(drive), keyring)
    first.cycle()
    serve(site, world.sites[2])
    states: list[Path] = []

    def before_each_rename(event: str, _arguments: object) -> None:
        if event == "os.rename" and watching:
            states.append(copy(drive, tmp_path / f"state-{len(states)}"))

    # A hook for the interpreter's own events cannot be taken away, only switched off.
    watching = [True]
    sys.addaudithook(before_each_rename)
    assert first.cycle().exit == 0
    watching.clear()
    states.append(drive)
    assert len(states) > 10
    versions = []
    for number, state in enumerate(states[-14:]):
        device = Device(
            tmp_path / f"reader-{number}", location("/nowhere"), location(state), keyring
        )
        end = device.cycle()
        assert end.exit == 0, (number, end, device.log)
        assert snapshot(device.destination) == snapshot(world.trees[int(end.version[0])])  # type: ignore[index]
        versions.append(end.version)
        second = Device(tmp_path / f"mender-{number}", location(site), location(state), keyring)
        assert second.cycle().exit in (0, 1)
        assert is_complete(state, world.sites[2])
    assert versions == sorted(versions)
    assert set(versions) == {"1.0", "2.0"}


def test_state_rebuilt_from_an_unverified_signature_raises_no_signed_mark(
    world: World, device: Device
) -> None:
    device.keyring = None
    assert device.cycle().exit == 0
    assert any("does not count" in line for line in device.log)
    assert device.state.signed_mark is None
    assert "does not count" in str(device.state.last_error)
    file = device.folder / "state" / "tree" / "state.json"
    file.write_text("{")
    device.cycle()
    assert device.state.signed_mark is None
    assert device.state.unsigned_mark is not None
    device.keyring = world.publisher.keys.keyring
    device.cycle()
    file.write_text("{")
    device.cycle()
    assert device.state.signed_mark is not None


def test_accept_legacy_never_lifts_the_need_for_a_signature(
    world: World, device: Device, site: Path, drive: Path
) -> None:
    drive.rmdir()
    device.trust = replace(device.trust, keyrings=world.publisher.keys.keyring)
    device.keyring = None
    device.cycle()
    assert device.state.signed_mark is not None
    serve(site, world.unsigned[2])
    for legacy in (False, True):
        if legacy:
            (site / "tree.caidx.release").unlink()
        end = device.cycle(accept_legacy=True)
        assert end.exit == 4
        assert snapshot(device.destination) == snapshot(world.trees[1])

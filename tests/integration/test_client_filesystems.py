"""Destinations on real file systems: what exchanges, what does not, and what stands in the way."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.client import Appliance, Site, digest_of
from support.trees import mutate_tree, snapshot
from support.webserver import WebServer

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode,
        reason="only root mounts",
    ),
]

_MAKE = {
    "ext4": ("mke2fs", "-q", "-t", "ext4"),
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
}


@pytest.fixture
def appliance(tmp_path: Path, server: WebServer) -> Appliance:
    return Appliance(tmp_path, server.url)


@contextlib.contextmanager
def mounted(point: Path, *arguments: str) -> Iterator[None]:
    """Something mounted on a folder; unmounted lazily, whatever happens."""
    subprocess.run(["mount", *arguments, str(point)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


@contextlib.contextmanager
def on(kind: str, appliance: Appliance) -> Iterator[None]:
    """A new file system for the destination and what is beside it."""
    place = appliance.destination.parent
    if kind == "tmpfs":
        with mounted(place, "-t", "tmpfs", "-o", "size=64M", "none"):
            yield
        return
    image = appliance.folder / "image"
    with image.open("wb") as file:
        file.truncate(320 << 20)  # xfs takes no less
    subprocess.run([*_MAKE[kind], str(image)], check=True, capture_output=True)
    with mounted(place, "-t", kind, "-o", "loop", str(image)):
        yield


@pytest.mark.parametrize("kind", [*_MAKE, "tmpfs"])
def test_there_and_back(site: Site, appliance: Appliance, kind: str) -> None:
    appliance.entry["preserve"] = ["var/data"]
    with on(kind, appliance):
        tree = appliance.destination
        appliance.update()
        (tree / "var" / "data").mkdir(parents=True)
        (tree / "var" / "data" / "own").write_text("the device's")
        first = snapshot(site.source)
        mutate_tree(site.source, 2)
        site.publish()
        assert appliance.update()["outcome"] == "updated"
        assert appliance.status()["atomic"]
        assert appliance.verify() == {}
        appliance.run("rollback", "tree")
        assert (tree / "var" / "data" / "own").read_text() == "the device's"
        now = snapshot(tree)
        assert {path: now[path] for path in first if path in now and path != b"var"} == {
            path: node for path, node in first.items() if path != b"var"
        }
        appliance.run("resume", "tree")
        assert appliance.update()["outcome"] == "updated"
        assert appliance.verify() == {}
        assert (tree / "var" / "data" / "own").read_text() == "the device's"


@contextlib.contextmanager
def in_a_lower_layer(appliance: Appliance) -> Iterator[None]:
    """A destination that the image of the system brought along, under an overlay."""
    layers = appliance.folder / "layers"
    lower, upper, work = (layers / name for name in ("lower", "upper", "work"))
    for folder in (upper, work):
        folder.mkdir(parents=True)
    appliance.destination.parent.rename(lower)
    appliance.destination.parent.mkdir()
    options = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=off"
    with mounted(appliance.destination.parent, "-t", "overlay", "-o", options, "none"):
        yield


def test_a_lower_layer_is_found_out_before_anything_is_fetched(
    site: Site, server: WebServer, appliance: Appliance
) -> None:
    appliance.update()
    with in_a_lower_layer(appliance):
        why = "an exchange does not work there (Invalid cross-device link)"
        before = sorted(appliance.destination.parent.iterdir())
        assert f"in place, not atomic: {why}" in appliance.run("validate").stdout
        assert sorted(appliance.destination.parent.iterdir()) == before
        mutate_tree(site.source, 2)
        site.publish()
        server.fail("*.cacnk", status=503)
        appliance.impatient()
        tree = snapshot(appliance.destination)
        appliance.update(code=3)
        assert appliance.status()["notAtomicBecause"] == why
        assert snapshot(appliance.destination) == tree
        server.heal()
        end = appliance.update()
        assert end["outcome"] == "updated"
        assert f"in place, which is not atomic: {why}" in end["stderr"]
        assert digest_of(appliance.destination, site) == site.release().digest
        assert appliance.update()["outcome"] == "current"


def test_a_folder_of_the_upper_layer_is_exchanged(site: Site, appliance: Appliance) -> None:
    with in_a_lower_layer(appliance):
        appliance.update()
        mutate_tree(site.source, 2)
        site.publish()
        appliance.update()
        assert appliance.status()["atomic"]
        assert appliance.verify() == {}


@pytest.mark.parametrize("apply", ["atomic", "in-place"])
def test_a_read_only_file_system(site: Site, appliance: Appliance, apply: str) -> None:
    appliance.entry["apply"] = apply
    with on("ext4", appliance):
        place = appliance.destination.parent
        appliance.update()
        tree = snapshot(appliance.destination)
        mutate_tree(site.source, 2)
        site.publish()
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        message = appliance.update(code=1)["message"]
        assert "read-only" in message.lower()
        assert str(place) in message
        assert snapshot(appliance.destination) == tree
        assert appliance.status()["installed"] is not None
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        assert appliance.update()["outcome"] == "updated"
        assert appliance.verify() == {}


def chattr(change: str, *paths: Path) -> None:
    subprocess.run(["chattr", change, *map(str, paths)], check=True)


def test_immutable_files_in_the_old_tree(site: Site, appliance: Appliance) -> None:
    """The new tree is made beside them, and they go with the version that they belong to."""
    with on("ext4", appliance):
        appliance.update()
        tree = appliance.destination
        chattr("+i", tree / "bin" / "tool", tree / "bin")
        for seed in (2, 3):
            mutate_tree(site.source, seed)
            site.publish()
            assert appliance.update()["outcome"] == "updated"
            assert appliance.verify() == {}
        assert len(list(appliance.staging.glob("previous-*"))) == 1


def test_an_immutable_destination(site: Site, appliance: Appliance) -> None:
    with on("ext4", appliance):
        appliance.update()
        tree = snapshot(appliance.destination)
        mutate_tree(site.source, 2)
        site.publish()
        chattr("+i", appliance.destination)
        try:
            message = appliance.update(code=1)["message"]
            assert str(appliance.destination) in message
            assert f"chattr -ia {appliance.destination}" in message
            assert snapshot(appliance.destination) == tree
        finally:
            chattr("-i", appliance.destination)
        assert appliance.update()["outcome"] == "updated"


def test_an_immutable_file_in_a_destination_that_is_updated_in_place(
    site: Site, appliance: Appliance
) -> None:
    appliance.entry["apply"] = "in-place"
    with on("ext4", appliance):
        appliance.update()
        file = appliance.destination / "bin" / "tool"
        site.write("bin/tool", "another tool", 0o755)
        site.publish()
        chattr("+i", file)
        try:
            message = appliance.update(code=1)["message"]
            assert "bin/tool" in message
        finally:
            chattr("-i", file)
        assert appliance.update()["outcome"] == "updated"
        assert digest_of(appliance.destination, site) == site.release().digest

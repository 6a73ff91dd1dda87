"""Where a tree goes, and how staged trees are removed."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from casync_updater.cycle.staging import (
    Site,
    identity,
    is_mount_point,
    make_staging,
    mounts_below,
    remove,
    survey,
    try_exchange,
)
from casync_updater.errors import LocalError
from casync_updater.model import Apply, Entry, Location
from support.trees import make_tree

ODD = ("plain", "with space", "tab\tand\nline", "back\\slash", "\udcff", "#", "\\040")


def entry(destination: Path, suffix: str = ".caidx") -> Entry:
    source = Location(f"http://localhost/x{suffix}", "http://localhost/x.castr")
    return Entry("x", "x", 60.0, source, None, destination)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[Path, Path], None]]:
    mounted: list[Path] = []

    def bind(source: Path, target: Path) -> None:
        argv = ["mount", "--bind", str(source), str(target)]
        if subprocess.run(argv, check=False, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(target)

    try:
        yield bind
    finally:
        for target in reversed(mounted):
            subprocess.run(["umount", str(target)], check=True)


def test_a_folder_is_exchanged(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    site = survey(entry(tmp_path / "x"), None)
    assert (site.destination, site.apply, site.why) == (tmp_path / "x", Apply.ATOMIC, None)
    assert site.staging == tmp_path / ".x.casync-updater"
    assert survey(entry(tmp_path / "new"), None).apply is Apply.ATOMIC
    assert survey(entry(tmp_path / "x"), "did not work").why == "did not work"
    in_place = survey(replace(entry(tmp_path / "x"), apply=Apply.IN_PLACE), None)
    assert in_place.apply is Apply.IN_PLACE
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_symbolic_links_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "far" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/real")
    (tmp_path / "dangling").symlink_to("far/missing")
    assert survey(entry(tmp_path / "link"), None).destination == tmp_path / "far" / "real"
    assert survey(entry(tmp_path / "dangling"), None).destination == tmp_path / "far" / "missing"
    (tmp_path / "lost").symlink_to("nowhere/at all")
    with pytest.raises(LocalError, match="nowhere of the destination is not there"):
        survey(entry(tmp_path / "lost"), None)


@pytest.mark.parametrize(
    ("suffix", "make", "message"),
    [
        (".caidx", lambda p: p.write_bytes(b""), "is a file"),
        (".caibx", lambda p: p.mkdir(), "is a directory"),
        (".caibx", os.mkfifo, "neither a file"),
    ],
)
def test_what_an_archive_cannot_take_the_place_of(
    tmp_path: Path, suffix: str, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "x")
    with pytest.raises(LocalError, match=message):
        survey(entry(tmp_path / "x", suffix), None)


@pytest.mark.parametrize("name", ODD)
def test_bind_mounts_of_the_same_file_system_are_mount_points(
    tmp_path: Path, mount: Callable[[Path, Path], None], name: str
) -> None:
    other, target = tmp_path / "other", tmp_path / name
    other.mkdir()
    target.mkdir()
    assert not is_mount_point(target)
    mount(other, target)
    assert is_mount_point(target)
    assert survey(entry(target), None).why == "it is a mount point"
    assert mounts_below(tmp_path) == (target,)
    assert mounts_below(target) == ()


def test_a_tree_with_a_mount_point_is_not_removed(
    tmp_path: Path, mount: Callable[[Path, Path], None]
) -> None:
    precious, tree = tmp_path / "precious", tmp_path / "tree"
    precious.mkdir()
    (precious / "file").write_bytes(b"precious")
    (tree / "a" / "data").mkdir(parents=True)
    (tree / "0").write_bytes(b"")
    mount(precious, tree / "a" / "data")
    with pytest.raises(LocalError, match="data is a mount point"):
        remove(tree)
    assert (precious / "file").exists()
    assert (tree / "0").exists()


def test_nasty_trees_are_removed(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 1)
    (tree / "locked" / "in").mkdir(parents=True)
    (tree / "locked" / "in").chmod(0)
    (tree / "locked").chmod(0o500)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"")
    (tree / "to-outside").symlink_to(outside)
    os.mkfifo(tree / "pipe")
    remove(tree)
    assert not tree.exists()
    assert (outside / "file").exists()
    link = tmp_path / "link"
    link.symlink_to(outside)
    remove(link)
    assert not link.is_symlink()
    assert (outside / "file").exists()
    remove(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"")
    remove(tmp_path / "file")
    assert sorted(tmp_path.iterdir()) == [outside]


def test_a_tree_deeper_than_a_path_may_be_long(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    folder = os.open(tree, os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("dd", dir_fd=folder)
        inner = os.open("dd", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    try:
        remove(tree)
        assert not tree.exists()
    finally:
        subprocess.run(["rm", "-rf", str(tree)], check=True)


def test_what_cannot_be_removed_is_named() -> None:
    with pytest.raises(LocalError, match=r"^/proc/self/comm cannot be removed: "):
        remove(Path("/proc/self/comm"))


def test_what_is_immutable_is_removed_as_well(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "folder").mkdir(parents=True)
    for name in ("file", "folder/log"):
        (tree / name).write_bytes(b"")
    nodes = [str(tree / name) for name in ("file", "folder/log", "folder")]
    if subprocess.run(["chattr", "+i", *nodes[:1]], check=False).returncode:
        pytest.skip("no immutable files here")
    try:
        subprocess.run(["chattr", "+a", nodes[1]], check=True)
        subprocess.run(["chattr", "+i", nodes[2]], check=True)
        remove(tree)
        assert not tree.exists()
        single = tmp_path / "single"
        single.write_bytes(b"")
        nodes = [str(single)]
        subprocess.run(["chattr", "+i", *nodes], check=True)
        remove(single)
        assert not single.exists()
    finally:
        subprocess.run(["chattr", "-f", "-i", "-a", *nodes], check=False)


def test_the_staging_folder_is_nobody_else_s(tmp_path: Path) -> None:
    site = survey(entry(tmp_path / "x"), None)
    token = make_staging(site)
    assert len(token) == 32
    assert make_staging(site) == token
    assert site.staging.stat().st_mode & 0o7777 == 0o700
    site.staging.chmod(0o755)
    make_staging(site)
    assert site.staging.stat().st_mode & 0o7777 == 0o700


def test_something_else_in_place_of_the_staging_folder(tmp_path: Path) -> None:
    site = survey(entry(tmp_path / "x"), None)
    (tmp_path / "elsewhere").mkdir()
    site.staging.symlink_to("elsewhere")
    with pytest.raises(LocalError, match="not a folder of this user"):
        make_staging(site)
    site.staging.unlink()
    site.staging.write_bytes(b"")
    with pytest.raises(LocalError, match="cannot be used"):
        make_staging(site)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_staging_folder_of_somebody_else(tmp_path: Path) -> None:
    site = survey(entry(tmp_path / "x"), None)
    site.staging.mkdir()
    os.chown(site.staging, 1000, 1000)
    with pytest.raises(LocalError, match="not a folder of this user"):
        make_staging(site)


def test_identity_is_that_of_the_node_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    found = identity(tmp_path / "link")
    assert found is not None
    assert found.inode == (tmp_path / "link").lstat().st_ino
    assert identity(tmp_path / "nowhere") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_full_file_system_says_nothing_about_exchanges(tmp_path: Path) -> None:
    """The plan has to come to the point where it makes room."""
    place = tmp_path / "small"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k,nr_inodes=5", "none", str(place)]
    if subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("no mounts here")
    try:
        tree = place / "tree"
        tree.mkdir()
        site = Site(tree, place / ".tree.casync-updater", Apply.ATOMIC, None)
        make_staging(site)
        assert try_exchange(site, site.staging / "try") is None
        assert sorted(site.staging.iterdir()) == [site.token_file]
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)

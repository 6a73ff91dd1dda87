"""What an update takes, before anything is written."""

import contextlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from casync_updater.cycle.plan import lacking, plan
from casync_updater.cycle.record import kept_index, kept_manifest, version_differences
from casync_updater.cycle.staging import survey
from casync_updater.cycle.values import Candidate, Offer, Plan
from casync_updater.errors import ContentError, LocalError, SpaceError
from casync_updater.formats.index import Index
from casync_updater.model import Apply, ChunkRef, Entry, Location, Origin
from casync_updater.state import Intent, Journal, State, StateFolder
from support.fakes import FakeSource
from support.versions import FLAGS, version_of

USER_NAMES = 1 << 2
"""A feature that is left to casync, whose plan needs no tree that fits the index."""
PLACE = Location("http://localhost/x.caidx", "http://localhost/x.castr")


def index_of(*chunks: tuple[int, int]) -> Index:
    """Chunks as (number that makes the id, size)."""
    table, end = b"", 0
    for number, size in chunks:
        end += size
        table += end.to_bytes(8, "little") + bytes([number]) * 32
    return Index(FLAGS | USER_NAMES, 1, 1, 1 << 20, table)


class Scene:
    def __init__(self, root: Path, index: Index) -> None:
        self.entry = Entry("x", "x", 60.0, PLACE, None, root / "tree")
        self.folder = StateFolder(root / "state", self.entry)
        self.folder.prepare()
        (root / "tree" / "sub").mkdir(parents=True)
        (root / "tree" / "file").write_bytes(b"1")
        version = version_of(root / "tree", 1)
        self.installed, self.manifest = version.installed, version.manifest
        self.folder.keep_version(
            version.installed,
            version.index,
            None,
            zstandard.compress(version.manifest),
            signed=False,
        )
        self.state = State(str(root / "tree"), installed=version.installed)
        candidate = Candidate(
            Origin.SOURCE, FakeSource(PLACE), None, None, False, None, None, "http://localhost"
        )
        self.offer = Offer(candidate, index, b"", "e" * 64, True)
        self.spool = root / "cache" / "x" / "chunks.castr"

    def plan(self, *preserve: str, apply: Apply = Apply.ATOMIC) -> Plan:
        site = replace(survey(self.entry, None), apply=apply, why="so it is")
        with contextlib.ExitStack() as stack:
            return plan(
                self.offer,
                site,
                self.state,
                self.folder,
                spool=self.spool,
                preserve=preserve,
                stack=stack,
            )


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, index_of((1, 10), (2, 20), (1, 10), (3, 30)))


def test_each_chunk_is_fetched_once(scene: Scene) -> None:
    found = scene.plan()
    assert found.fetch == (
        ChunkRef(b"\1" * 32, 0, 10),
        ChunkRef(b"\2" * 32, 10, 20),
        ChunkRef(b"\3" * 32, 40, 30),
    )
    assert (found.fetch_size, found.space) == (60, 70)
    assert found.old == scene.installed
    assert found.before == scene.manifest
    assert [ref.id[0] for ref in lacking(scene.offer, frozenset({b"\1" * 32}))] == [2, 3]
    assert scene.plan(apply=Apply.IN_PLACE).space == 60
    assert not scene.spool.exists()


def test_a_tree_that_was_replaced_is_not_the_recorded_one(scene: Scene) -> None:
    tree = scene.entry.destination
    tree.rename(tree.with_name("aside"))
    (tree / "other").mkdir(parents=True)
    found = scene.plan()
    assert found.old is None
    assert b"other type=dir" in found.before


def test_a_repair_trusts_no_record(scene: Scene) -> None:
    scene.offer = replace(scene.offer, repair=True)
    (scene.entry.destination / "added").write_bytes(b"")
    (scene.entry.destination / "sub" / "data").write_bytes(b"")
    (scene.entry.destination / "sub-2").write_bytes(b"")
    found = scene.plan("sub")
    assert found.old is None
    assert b"added type=file" in found.before
    assert b"sub-2 type=file" in found.before
    assert b"sub type=dir" not in found.before
    assert b"sub/data" not in found.before


def test_a_first_install_has_nothing_before(scene: Scene) -> None:
    shutil.rmtree(scene.entry.destination)
    scene.state = State("x")
    assert (scene.plan().before, scene.plan().old) == (b"", None)


def test_an_update_in_place_that_was_cut_goes_on_from_the_version_before(scene: Scene) -> None:
    """What the cut update has written is a change whose actions have not run."""
    journal = Journal(Intent.IN_PLACE, scene.installed, replaced=scene.installed)
    scene.state = replace(scene.state, installed=None, journal=journal)
    (scene.entry.destination / "half").write_bytes(b"written")
    found = scene.plan(apply=Apply.IN_PLACE)
    assert found.old is None
    assert found.before == scene.manifest


@pytest.mark.parametrize("damage", ["gone", "truncated", "changed"])
def test_a_damaged_record_is_none(scene: Scene, damage: str) -> None:
    for file in (scene.folder.index(scene.installed), scene.folder.manifest(scene.installed)):
        data = file.read_bytes()
        if damage == "gone":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(data[: len(data) // 2])
        else:
            file.write_bytes(b"\0" + data[1:])
    for read in (kept_index, kept_manifest):
        with pytest.raises(ContentError, match=r"versions/"):
            read(scene.folder, scene.installed)
    tree = scene.entry.destination
    with pytest.raises(ContentError):
        list(version_differences(tree, scene.installed, scene.entry, scene.folder, ()))
    found = scene.plan()
    assert found.old is None
    assert b"file type=file" in found.before


def test_nothing_is_preserved_in_place(scene: Scene) -> None:
    with pytest.raises(LocalError, match=r"updated in place \(so it is\).*preserved data"):
        scene.plan("data", apply=Apply.IN_PLACE)


def test_a_mount_point_in_the_destination(scene: Scene) -> None:
    target = scene.entry.destination / "sub"
    bind = ["mount", "--bind", str(target), str(target)]
    if subprocess.run(bind, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for apply in Apply:
            with pytest.raises(LocalError, match="sub is a mount point in"):
                scene.plan(apply=apply)
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_too_little_space_is_said_with_figures(scene: Scene) -> None:
    huge = index_of(*((number % 200, 1 << 60) for number in range(8)))
    scene.offer = replace(scene.offer, index=huge)
    with pytest.raises(SpaceError, match=r"needs [0-9.]+ MB there, and [0-9.]+ MB are free"):
        scene.plan()

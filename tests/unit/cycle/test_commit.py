"""A commit that is cut anywhere leaves exactly one version, and loses nothing."""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from casync_updater.cycle import commit as room
from casync_updater.cycle.cycle import Cycle
from casync_updater.cycle.operator import Operator
from casync_updater.cycle.record import version_differences
from casync_updater.cycle.session import Surroundings
from casync_updater.cycle.staging import Site, identity, make_staging, survey
from casync_updater.cycle.stop import Stop
from casync_updater.cycle.values import Candidate, Offer, Plan, Staged, Verified
from casync_updater.errors import ContentError, LocalError
from casync_updater.formats import index as index_format
from casync_updater.model import (
    Apply,
    Entry,
    Identity,
    Installed,
    Location,
    Origin,
    Reason,
    Settings,
    SilentMonitor,
    Trigger,
)
from casync_updater.reports import Outcome
from casync_updater.state import Intent, Journal, Kept, PendingAction, State, StateFolder
from support.crashes import killed_at
from support.fakes import FakeClock, FakeSource, FolderRunner
from support.versions import Version, version_of

PRESERVE = ("data", "var/lib/db", "conf/local", "not-there")
ACTIONS = (PendingAction("id-1", "first"), PendingAction("id-2", "second"))
DEVICE_FILES = {"data/log": "of the device", "data/deep/file": "too", "var/lib/db": "database"}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


class World:
    """A destination with version 1 and the device's own files, and version 2 beside it."""

    def __init__(self, root: Path, *, first: bool = False, keep: int = 1) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.clock = FakeClock()
        self.runner = FolderRunner(root / "runner")
        self.entry = Entry(
            "x",
            "x",
            60.0,
            Location("http://localhost/x.caidx", "http://localhost/x.castr"),
            None,
            root / "tree",
            triggers=(Trigger((".",), ("changed",)),),
            preserve=PRESERVE,
            keep=keep,
        )
        self.folder = StateFolder(root / "state", self.entry)
        self.folder.prepare()
        state = State(str(self.entry.destination))
        self.one: Version | None = None
        if not first:
            tree = write(root / "tree", {"version": "1", "bin/tool": "1", "conf/file": "1"})
            self.one = version_of(tree, 1)
            self.keep(self.one)
            write(tree, DEVICE_FILES)
            state = replace(state, installed=self.one.installed)
        self.folder.save(state)
        site = self.site()
        make_staging(site)
        write(site.new, {"version": "2", "bin/more/tool": "2", "var/file": "2"})
        self.two = version_of(site.new, 2, since=10.0)
        self.verified = verified(self.two, site)

    def site(self) -> Site:
        return survey(self.entry, None)

    def keep(self, version: Version) -> None:
        self.folder.keep_version(
            version.installed,
            version.index,
            None,
            zstandard.compress(version.manifest),
            signed=False,
        )

    def commit(self) -> State:
        return room.commit(
            self.verified,
            entry=self.entry,
            state=self.folder.load(),
            folder=self.folder,
            installed=replace(self.two.installed, root=None),
            actions=ACTIONS,
            now=77.0,
        )

    @property
    def outside(self) -> Surroundings:
        return Surroundings(
            settings=Settings(),
            state_dir=self.root / "state",
            cache_dir=self.root / "cache",
            clock=self.clock,
            stop=Stop(),
            runner=self.runner,
            open_source=FakeSource,
        )

    def cycle(self) -> Cycle:
        return Cycle(self.entry, self.outside, SilentMonitor(), 0, logging.getLogger("test"))

    def operator(self) -> Operator:
        return Operator(self.entry, self.outside, SilentMonitor(), 0, logging.getLogger("test"))

    def recover(self) -> None:
        self.cycle().load_and_recover()

    def state(self) -> State:
        return self.folder.load()

    def is_version(self, tree: Path, installed: Installed, preserve: tuple[str, ...]) -> bool:
        found = version_differences(tree, installed, self.entry, self.folder, preserve)
        return list(found) == []

    def assert_whole(self, *, device_files: bool = True) -> int:
        """Exactly one version, with the device's files; tells which."""
        state = self.state()
        tree = self.entry.destination
        assert state.journal is None
        if state.installed is None:
            assert not tree.exists()
            return 0
        assert state.installed.root == identity(tree)
        assert self.is_version(tree, state.installed, PRESERVE)
        if device_files:
            found = {
                str(file.relative_to(tree)): file.read_text()
                for name in PRESERVE
                for file in ((tree / name), *(tree / name).rglob("*"))
                if file.is_file()
            }
            assert found == DEVICE_FILES
        for kept in state.previous:
            folder = self.site().staging / kept.folder
            assert self.is_version(folder, kept.installed, kept.preserved)
        assert len({kept.folder for kept in state.previous}) == len(state.previous)
        assert state.installed.serial is not None
        return state.installed.serial


def verified(version: Version, site: Site) -> Verified:
    location = Location("http://localhost/x.caidx", "http://localhost/x.castr")
    candidate = Candidate(
        Origin.SOURCE,
        FakeSource(location),
        None,
        b"the release's text",
        False,
        version.installed.digest,
        None,
        location.index,
    )
    index = index_format.parse(version.index, "test")
    offer = Offer(candidate, index, version.index, version.installed.index_sha256, True)
    plan = Plan(offer, site, None, b"", (), 0, 0)
    return Verified(Staged(plan), version.installed.digest, version.manifest)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


def test_a_commit(world: World) -> None:
    assert world.one is not None
    state = world.commit()
    assert state == world.state()
    assert world.assert_whole() == 2
    assert state.pending == ACTIONS
    assert state.last_verify == 77.0
    (kept,) = state.previous
    assert kept.installed == world.one.installed
    assert not (world.site().staging / kept.folder / "data").exists()
    assert not world.site().new.exists()
    assert world.folder.release(world.two.installed).read_bytes() == b"the release's text"


def test_times_of_folders_stay(world: World) -> None:
    before = (world.site().new / "var").stat().st_mtime_ns
    os.utime(world.site().new / "var", (5, 5))
    world.commit()
    assert before != 5 * 10**9
    assert (world.entry.destination / "var").stat().st_mtime_ns == 5 * 10**9


def test_made_parents_are_like_the_old_ones(world: World) -> None:
    shutil.rmtree(world.site().new / "var")
    (world.entry.destination / "var").chmod(0o711)
    (world.entry.destination / "var" / "lib").chmod(0o2750)
    world.two = version_of(world.site().new, 2)
    world.verified = verified(world.two, world.site())
    world.commit()
    tree = world.entry.destination
    assert (tree / "var").stat().st_mode & 0o7777 == 0o711
    assert (tree / "var" / "lib").stat().st_mode & 0o7777 == 0o2750
    world.assert_whole()


def every_crash(
    tmp_path: Path, begin: Callable[[Path], World], step: int = 1
) -> Iterator[tuple[int, World]]:
    """A world for each point where a commit can be cut (or every few points), cut there."""
    for count in range(0, 1000, step):
        world = begin(tmp_path / str(count))
        cut = killed_at(count, world.commit)
        yield count, world
        if not cut:
            assert count > 20
            return


def test_a_commit_that_is_cut_anywhere_is_completed_or_undone(tmp_path: Path) -> None:
    seen = set()
    for count, world in every_crash(tmp_path, World):
        world.recover()
        version = world.assert_whole()
        seen.add(version)
        state = world.state()
        assert state.pending == (ACTIONS if version == 2 else ()), count
        assert len(state.previous) == (1 if version == 2 else 0), count
        world.recover()
        assert world.state() == state
    assert seen == {1, 2}


def test_a_recovery_that_is_cut_itself(tmp_path: Path) -> None:
    for count, world in every_crash(tmp_path, World, 2):
        if world.state().journal is not None:
            for again in range(count % 8, 60, 8):
                if not killed_at(again, world.recover):
                    break
        world.recover()
        version = world.assert_whole()
        assert world.state().pending == (ACTIONS if version == 2 else ()), count


def test_a_first_install_that_is_cut_anywhere(tmp_path: Path) -> None:
    seen = set()
    for count, world in every_crash(tmp_path, lambda root: World(root, first=True)):
        world.recover()
        version = world.assert_whole(device_files=False)
        seen.add(version)
        assert world.state().pending == (ACTIONS if version == 2 else ()), count
        assert world.state().previous == ()
    assert seen == {0, 2}


def test_after_a_reboot_with_other_device_numbers(tmp_path: Path) -> None:
    seen = set()
    for _, world in every_crash(tmp_path, World, 3):
        state = world.state()
        journal = state.journal
        if journal is not None:
            assert journal.old is not None
            assert journal.new is not None
            moved = replace(
                journal,
                old=Identity(journal.old.device + 1, journal.old.inode),
                new=Identity(journal.new.device + 1, journal.new.inode),
            )
            world.folder.save(replace(state, journal=moved))
        world.recover()
        seen.add(world.assert_whole())
    assert seen == {1, 2}


@pytest.mark.parametrize("token", [None, "another", "\udcff"])
def test_by_content_where_the_token_says_nothing(tmp_path: Path, token: str | None) -> None:
    seen = set()
    for count, world in every_crash(tmp_path, World, 5):
        state = world.state()
        if state.journal is not None:
            # As after a restored backup: nothing has the inode that it had.
            journal = replace(state.journal, old=Identity(1, 1), new=Identity(1, 2))
            state = replace(state, journal=journal)
            world.folder.save(state)
            world.site().token_file.unlink()
            if token is not None:
                world.site().token_file.write_bytes(os.fsencode(token))
        world.recover()
        after = world.state()
        assert after.journal is None
        assert after.installed is not None
        serial = after.installed.serial
        seen.add(serial)
        assert world.is_version(world.entry.destination, after.installed, PRESERVE)
        assert (world.entry.destination / "data" / "log").read_text() == "of the device"
        assert after.pending == (ACTIONS if serial == 2 else ()), count
    assert seen == {1, 2}


def test_a_destination_that_was_removed_after_the_exchange(tmp_path: Path) -> None:
    """What belongs to the device is still in the old tree, and must come back."""
    for _, world in every_crash(tmp_path, World):
        aside = world.site().new / "data" / "log"
        if world.state().journal is None or not aside.exists():
            continue
        shutil.rmtree(world.entry.destination)
        world.recover()
        assert (world.entry.destination / "data" / "log").read_text() == "of the device"
        return
    pytest.fail("no cut between the exchange and the moves")


def test_a_destination_that_is_gone_before_the_exchange(world: World) -> None:
    world.folder.save(
        replace(
            world.state(),
            journal=Journal(
                Intent.EXCHANGE,
                world.two.installed,
                make_staging(world.site()),
                identity(world.entry.destination),
                identity(world.site().new),
                moves=PRESERVE,
            ),
        )
    )
    shutil.rmtree(world.entry.destination)
    world.recover()
    state = world.state()
    assert state.journal is None
    assert state.installed is not None
    assert state.installed.serial == 1


def test_a_tree_that_somebody_put_there_is_no_version_to_go_back_to(world: World) -> None:
    tree = world.entry.destination
    tree.rename(tree.with_name("moved-away"))
    write(tree, {"of": "somebody", "data/log": "new"})
    state = world.commit()
    assert state.previous == ()
    assert (tree / "data" / "log").read_text() == "new"


def test_a_repair_keeps_nothing_of_the_drifted_tree(world: World) -> None:
    assert world.one is not None
    tree = world.entry.destination
    (tree / "version").write_text("tampered")
    shutil.rmtree(world.site().new)
    write(world.site().new, {"version": "1", "bin/tool": "1", "conf/file": "1"})
    world.verified = verified(world.one, world.site())
    world.two = version_of(world.site().new, 1)
    world.keep(world.two)
    state = world.commit()
    assert state.previous == ()
    assert world.assert_whole() == 1


def test_what_is_in_the_way_of_a_preserved_path_stops_the_commit_before(world: World) -> None:
    new = world.site().new
    for make in (
        lambda: write(new, {"data": "a file"}),
        lambda: (new / "data").unlink() or shutil.rmtree(new / "var") or write(new, {"var": "f"}),
        lambda: (new / "var").unlink() or (new / "var").symlink_to("/var"),
    ):
        make()
        with pytest.raises(LocalError, match="the entry preserves"):
            world.commit()
        assert world.state().journal is None
        assert world.assert_whole() == 1
    assert not Path("/var/lib/db").exists()


def test_a_preserved_path_behind_a_symbolic_link_is_not_in_the_tree(world: World) -> None:
    tree = world.entry.destination
    outside = world.root / "outside"
    shutil.move(tree / "var", outside)
    (tree / "var").symlink_to(outside)
    world.commit()
    assert (outside / "lib" / "db").read_text() == "database"
    assert not (tree / "var" / "lib").exists()


def test_a_mount_point_in_the_destination_stops_the_commit_before(world: World) -> None:
    precious = world.root / "precious"
    write(precious, {"file": "precious"})
    target = world.entry.destination / "data"
    bind = ["mount", "--bind", str(precious), str(target)]
    if subprocess.run(bind, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(LocalError, match="data is a mount point"):
            world.commit()
        assert (target / "file").read_text() == "precious"
    finally:
        subprocess.run(["umount", str(target)], check=True)
    assert world.assert_whole() == 1


def test_what_fails_after_the_exchange_is_completed_later(world: World) -> None:
    """An application of the device wrote the path anew in the moment between."""
    journal = Journal(
        Intent.EXCHANGE,
        world.two.installed,
        make_staging(world.site()),
        identity(world.entry.destination),
        identity(world.site().new),
        moves=PRESERVE,
        actions=ACTIONS,
    )
    world.keep(world.two)
    world.folder.save(replace(world.state(), journal=journal))
    tree = world.entry.destination
    spare = tree.with_name("spare")
    tree.rename(spare)
    world.site().new.rename(tree)
    spare.rename(world.site().new)
    write(tree, {"var/lib/db": "made anew"})
    for reason in ("first", "again"):
        end = world.cycle().run(Reason.START)
        assert end.outcome is Outcome.FAILED, reason
        assert "preserved, but it is in the new tree too" in end.message
        assert world.state().journal == journal
        assert (world.site().new / "var" / "lib" / "db").read_text() == "database"
    (tree / "var" / "lib" / "db").unlink()
    world.recover()
    assert world.assert_whole() == 2
    assert world.state().pending == ACTIONS


def test_an_error_never_takes_back_what_was_announced(world: World) -> None:
    cycle = world.cycle()
    cycle.load_and_recover()
    journal = Journal(Intent.EXCHANGE, world.two.installed, new=Identity(1, 1))
    world.folder.save(replace(world.state(), journal=journal))
    cycle._failed(LocalError("the disk is full"))
    assert world.state().journal == journal
    assert world.state().last_error == "the disk is full"


def test_a_state_of_a_newer_format_is_not_touched_by_a_cycle(world: World) -> None:
    file = world.folder.path / "state.json"
    text = file.read_text().replace('"format": 1', '"format": 2')
    file.write_text(text)
    end = world.cycle().run(Reason.START)
    assert end.outcome is Outcome.FAILED
    assert "newer casync-updater" in end.message
    assert file.read_text() == text


# Going back.


def updated(root: Path) -> World:
    world = World(root)
    state = world.commit()
    world.folder.save(replace(state, pending=()))
    world.clock.now = 1000.0
    return world


def test_a_rollback_that_is_cut_anywhere(tmp_path: Path) -> None:
    seen = set()
    for count in range(1000):
        world = updated(tmp_path / str(count))
        cut = killed_at(count, lambda: world.operator().rollback())  # noqa: B023 - called at once
        cycle = world.cycle()
        cycle.load_and_recover()
        version = world.assert_whole()
        seen.add(version)
        state = world.state()
        assert len(state.previous) == 1
        assert state.previous[0].installed.serial == 3 - version
        assert (state.held == "rolled back to 1") is (version == 1)
        cycle._act()
        assert world.runner.started == (["changed"] if version == 1 else []), count
        if not cut:
            assert version == 1
            break
    assert seen == {1, 2}


def test_there_is_one_way_back(tmp_path: Path) -> None:
    world = updated(tmp_path / "world")
    world.operator().rollback()
    assert world.assert_whole() == 1
    with pytest.raises(LocalError, match="no previous version"):
        world.operator().rollback()


def test_a_clock_that_went_back_hides_no_version(tmp_path: Path) -> None:
    world = World(tmp_path / "world")
    assert world.one is not None
    late = replace(world.one.installed, since=1_800_000_000.0)
    world.folder.save(replace(world.state(), installed=late))
    world.commit()
    world.clock.now = 20.0
    world.operator().rollback()
    assert world.assert_whole() == 1


def test_what_the_entry_preserves_no_more_comes_back_as_well(tmp_path: Path) -> None:
    world = updated(tmp_path / "world")
    world.entry = replace(world.entry, preserve=())
    world.operator().rollback()
    assert world.assert_whole() == 1


def test_what_is_preserved_now_but_was_in_the_older_version(tmp_path: Path) -> None:
    world = updated(tmp_path / "world")
    world.entry = replace(world.entry, preserve=(*PRESERVE, "bin"))
    with pytest.raises(LocalError, match="contains bin"):
        world.operator().rollback()
    assert world.state().journal is None
    assert world.assert_whole() == 2


def test_a_kept_version_that_changed_is_not_taken(tmp_path: Path) -> None:
    world = updated(tmp_path / "world")
    kept = world.site().staging / world.state().previous[0].folder
    mtime = (kept / "version").stat().st_mtime_ns
    (kept / "version").write_text("0")
    with pytest.raises(ContentError, match=r"version \(content\)"):
        world.operator().rollback()
    (kept / "version").write_text("1")
    os.utime(kept / "version", ns=(0, mtime))
    assert world.assert_whole() == 2


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_as_many_versions_stay_as_the_entry_says(tmp_path: Path, keep: int) -> None:
    world = World(tmp_path / "world", keep=keep)
    orphan = world.site().staging / "previous-0-orphan"
    for number in range(3, 6):
        cycle = world.cycle()
        world.commit()
        orphan.mkdir()
        cycle._state = world.state()
        cycle._prune(world.site())
        state = world.state()
        assert len(state.previous) == min(keep, number - 2)
        left = {path.name for path in world.site().staging.iterdir()}
        assert left == {"token", *(kept.folder for kept in state.previous)}
        for kept in state.previous:
            assert world.folder.index(kept.installed).exists()
        write(world.site().new, {"version": str(number)})
        world.two = version_of(world.site().new, number)
        world.verified = verified(world.two, world.site())


# Files, and updates in place.


def test_a_file_is_exchanged_as_well(tmp_path: Path) -> None:
    entry = Entry(
        "x", "x", 60.0, Location("/x.caibx", "/x.castr"), None, tmp_path / "file", preserve=()
    )
    folder = StateFolder(tmp_path / "state", entry)
    folder.prepare()
    entry.destination.write_text("1")
    site = survey(entry, None)
    make_staging(site)
    site.new.write_text("2")
    before = version_of(tmp_path / "file", 1)
    new = version_of(site.new, 2)
    state = room.commit(
        replace(verified(new, site), manifest=b""),
        entry=entry,
        state=State(str(entry.destination), installed=before.installed),
        folder=folder,
        installed=new.installed,
        actions=ACTIONS,
        now=1.0,
    )
    assert entry.destination.read_text() == "2"
    (kept,) = state.previous
    assert (site.staging / kept.folder).read_text() == "1"
    assert not folder.manifest(new.installed).exists()


def test_an_update_in_place_remembers_what_it_replaces(world: World) -> None:
    assert world.one is not None
    state = room.begin_in_place(world.state(), world.folder, world.two.installed)
    assert world.state() == state
    assert state.installed is None
    assert room.standing(state) == world.one.installed
    # Cut off, and begun once more.
    world.recover()
    state = room.begin_in_place(world.state(), world.folder, world.two.installed)
    assert room.standing(state) == world.one.installed
    world.folder.forget_versions(state)
    assert world.folder.manifest(world.one.installed).exists()
    site = replace(world.site(), apply=Apply.IN_PLACE)
    state = room.commit(
        verified(world.two, site),
        entry=world.entry,
        state=state,
        folder=world.folder,
        installed=world.two.installed,
        actions=ACTIONS,
        now=5.0,
    )
    assert state.journal is None
    assert state.pending == ACTIONS
    assert state.installed is not None
    assert state.installed.root == identity(world.entry.destination)


def test_kept_versions_have_names_of_their_own(world: World) -> None:
    assert world.one is not None
    first, second = (
        world.site().previous(world.one.installed),
        world.site().previous(world.two.installed),
    )
    assert first != second
    assert Kept(first.name, world.one.installed).preserved == ()

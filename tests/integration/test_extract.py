"""The extractor against casync itself: whatever it builds, `casync digest` must agree."""

import os
import random
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casync_updater.cycle.extract import (
    Extracted,
    Leftover,
    extract,
    plan_extract,
    rebuild_record,
    verify_tree,
)
from casync_updater.errors import ContentError, LocalError
from casync_updater.formats.index import Index
from casync_updater.formats.record import Record, load
from casync_updater.model import Changes, ChunkRef, Progress
from casync_updater.tools.casync import stream_archive
from support.archives import (
    StoreChunks,
    archive_digest,
    casync,
    make_archive,
    open_root,
    tree_digest,
)

DEFAULT = ("permissions", "symlinks", "sec-time")
MORE = int(os.environ.get("CASYNC_UPDATER_TEST_SCALE", "1"))
"""How many times as many generated trees and updates in a row as in an ordinary run."""

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")


class Lab:
    """A source tree, its archives, and the versions of it that were installed."""

    def __init__(self, base: Path, features: tuple[str, ...] = DEFAULT) -> None:
        base.mkdir(exist_ok=True)
        self.base = base
        self.features = features
        self.source = base / "source"
        self.source.mkdir()
        self.installed: Path | None = None
        self.record: Record | None = None
        self.index: Index | None = None
        self.chunks = StoreChunks(base / "store.castr")
        self.count = 0

    def publish(self) -> Index:
        return make_archive(self.source, self.base / "index.caidx", self.features)

    def update(self, *, remove_old: bool = True) -> Extracted:
        """Publish, install beside what is installed, check against casync, exchange."""
        index = self.publish()
        self.count += 1
        target = self.base / f"installed-{self.count}"
        root = open_root(target)
        old = -1 if self.installed is None else open_root(self.installed)
        self.chunks = StoreChunks(self.base / "store.castr")
        try:
            plan = plan_extract(index, self.record, old)
            done = extract(plan, self.chunks, root)
        finally:
            os.close(root)
            if old >= 0:
                os.close(old)
        wanted = archive_digest(index, self.chunks)
        assert tree_digest(target, self.features) == wanted
        assert done.digest in {None, wanted}
        assert done.bytes_fetched == sum(ref.size for ref in self.chunks.streamed) + sum(
            ref.size for ref in self.chunks.single
        )
        (self.base / "record").write_bytes(b"".join(done.record.packed()))
        loaded = load(self.base / "record")
        assert loaded is not None
        if remove_old and self.installed is not None:
            shutil.rmtree(self.installed)
        self.installed, self.record, self.index = target, loaded, index
        return done

    def differences(self, *, fast: bool = False) -> list[tuple[bytes, str]]:
        assert self.record is not None
        assert self.installed is not None
        root = open_root(self.installed)
        try:
            found = verify_tree(self.record, root, windows=() if fast else None)
            return [(one.path, one.what) for one in found]
        finally:
            os.close(root)


def write(path: Path, data: bytes, mtime: int = 1_700_000_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (mtime, mtime))


def populate(root: Path, seed: int = 1) -> None:
    """Files of all sizes around the bounds of chunks, and everything beside files."""
    rng = random.Random(seed)
    for size in (0, 1, 16383, 16384, 16385, 65536, 262143, 262144, 262145, 900_000):
        write(root / "sizes" / str(size), rng.randbytes(size))
    for number in range(60):
        write(root / "many" / f"d{number // 10}" / f"f{number}", rng.randbytes(rng.randrange(9000)))
    write(root / "bin" / "tool", b"#!/bin/sh\n")
    (root / "bin" / "tool").chmod(0o4755)
    write(root / "twins" / "a", b"equal" * 100)
    write(root / "twins" / "b", b"equal" * 100)
    write(root / "twins" / "large-a", bytes(400_000) + b"x" * 200_000)
    write(root / "twins" / "large-b", bytes(400_000) + b"x" * 200_000)
    (root / "hard").mkdir()
    write(root / "hard" / "one", rng.randbytes(100_000))
    os.link(root / "hard" / "one", root / "hard" / "two")
    (root / "empty").mkdir(mode=0o1777)
    (root / "link").symlink_to("bin/tool")
    (root / "dangling").symlink_to("/nowhere")
    (root / os.fsdecode(b"raw\xff\n")).write_bytes(b"name")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = Lab(tmp_path / "lab")
    populate(lab.source)
    return lab


@pytest.mark.parametrize(
    "features",
    [
        DEFAULT,
        ("2sec-time",),
        ("usec-time", "permissions"),
        ("nsec-time", "symlinks"),
        pytest.param(("unix",), marks=root_only),
        pytest.param(("32bit-uids", "permissions", "xattrs", "fcaps"), marks=root_only),
    ],
    ids="+".join,
)
def test_install_and_update(tmp_path: Path, features: tuple[str, ...]) -> None:
    lab = Lab(tmp_path / "lab", features)
    populate(lab.source)
    if os.geteuid() == 0:
        os.chown(lab.source / "bin", 5, 6)
        os.mkfifo(lab.source / "fifo")
        os.mknod(lab.source / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.setxattr(lab.source / "bin" / "tool", "user.note", b"hi")
        os.setxattr(lab.source / "bin", "trusted.note", b"there")
        # cap_net_raw=ep, as setcap writes it
        capability = bytes.fromhex("0100000200200000000000000000000000000000")
        os.setxattr(lab.source / "many" / "d0" / "f1", "security.capability", capability)
    fresh = lab.update()
    assert fresh.digest is not None
    assert lab.differences() == []
    write(lab.source / "many" / "d3" / "f33", b"new content")
    with (lab.source / "sizes" / "900000").open("r+b") as file:
        file.seek(500_000)
        file.write(b"changed")
    update = lab.update()
    assert update.changes == Changes(changed=(b"many/d3/f33", b"sizes/900000"))
    assert update.files_written <= 2
    assert lab.differences() == []
    assert lab.differences(fast=True) == []


def test_an_unchanged_tree_is_linked_and_nothing_is_fetched(lab: Lab) -> None:
    lab.update()
    again = lab.update()
    assert (again.bytes_fetched, again.bytes_written, again.files_written) == (0, 0, 0)
    assert not again.changes
    assert again.files_linked > 70


def test_a_first_install_adds_everything(lab: Lab) -> None:
    done = lab.update()
    paths = {os.fsencode(path.relative_to(lab.source)) for path in lab.source.rglob("*")}
    assert set(done.changes.added) == paths
    assert not done.changes.changed
    assert not done.changes.removed


def test_equal_files_stay_separate_files(lab: Lab) -> None:
    lab.update()
    lab.update()
    assert lab.installed is not None
    inodes = [path.stat().st_ino for path in lab.installed.rglob("*") if path.is_file()]
    names = [path for path in lab.installed.rglob("*") if path.is_symlink()]
    assert len(set(inodes)) >= len(inodes) - len(names)
    for first, second in (("a", "b"), ("large-a", "large-b")):
        folder = lab.installed / "twins"
        assert (folder / first).stat().st_ino != (folder / second).stat().st_ino


def test_repeated_chunks_are_fetched_once(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab")
    data = random.Random(3).randbytes(1_500_000)
    for name in ("a", "b", "c"):
        write(lab.source / name, data)
    done = lab.update()
    assert done.bytes_fetched < 2_500_000
    ids = [ref.id for ref in lab.chunks.streamed]
    assert len(ids) == len(set(ids))


def test_long_zeros_become_holes(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab")
    write(lab.source / "zeros", bytes(3_000_000))
    lab.update()
    assert lab.installed is not None
    found = (lab.installed / "zeros").stat()
    assert found.st_size == 3_000_000
    assert found.st_blocks * 512 < 1_000_000


@pytest.mark.parametrize(
    "damage",
    [
        lambda tree: (tree / "sizes" / "16385").write_bytes(b"short"),
        lambda tree: (tree / "sizes" / "900000").unlink(),
        lambda tree: shutil.rmtree(tree / "many" / "d2"),
        lambda tree: (tree / "bin" / "tool").chmod(0o777),
        lambda tree: os.utime(tree / "twins" / "a", (1, 1)),
        lambda tree: _replace_by_link(tree / "many"),
        lambda tree: _edit_in_place(tree / "sizes" / "65536"),
        lambda tree: write(tree / "sizes" / "0", b"not empty"),
        lambda tree: (tree / "link").unlink(),
        lambda tree: write(tree / "added", b"by somebody"),
        lambda tree: _hard_link(tree / "twins" / "a", tree / "twins" / "b"),
    ],
)
@pytest.mark.parametrize("published", [True, False], ids=["with an update", "without"])
def test_local_damage_is_repaired(
    lab: Lab, damage: Callable[[Path], object], published: bool
) -> None:
    lab.update()
    assert lab.installed is not None
    damage(lab.installed)
    if published:
        write(lab.source / "many" / "d2" / "f22", b"another version", 1_700_000_100)
    lab.update()
    assert lab.differences() == []
    assert lab.installed is not None
    folder = lab.installed / "twins"
    assert (folder / "a").stat().st_ino != (folder / "b").stat().st_ino


def _replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _edit_in_place(path: Path) -> None:
    """Size and mtime stay."""
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"edited")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def _hard_link(source: Path, target: Path) -> None:
    target.unlink()
    os.link(source, target)


def test_an_edit_that_keeps_size_and_time_is_seen(lab: Lab) -> None:
    lab.update()
    assert lab.installed is not None
    _edit_in_place(lab.installed / "sizes" / "65536")
    assert lab.differences(fast=True) == [(b"sizes/65536", "content")]
    assert lab.differences() == [(b"sizes/65536", "content")]


def test_own_operations_cost_no_trust(lab: Lab) -> None:
    """The old tree stays for rollback, and goes later: both change ctimes of shared inodes."""
    lab.update()
    old, old_record = lab.installed, lab.record
    assert old is not None
    assert old_record is not None
    write(lab.source / "new", b"file")
    done = lab.update(remove_old=False)
    root = open_root(old)
    unread = list(verify_tree(old_record, root, windows=(done.window,)))
    os.close(root)
    assert unread == []
    assert lab.record is not None
    node = next(n for n in range(len(lab.record)) if lab.record.name(n) == b"900000")
    assert lab.installed is not None
    found = os.lstat(lab.installed / "sizes" / "900000")
    assert lab.record.trusted(node, found, ())
    shutil.rmtree(old)
    found = os.lstat(lab.installed / "sizes" / "900000")
    assert not lab.record.trusted(node, found, ())


def test_metadata_alone_makes_a_copy_and_leaves_the_old_tree(lab: Lab) -> None:
    lab.update()
    old = lab.installed
    assert old is not None
    (lab.source / "sizes" / "900000").chmod(0o600)
    done = lab.update(remove_old=False)
    assert done.changes == Changes(changed=(b"sizes/900000",))
    assert stat.S_IMODE((old / "sizes" / "900000").stat().st_mode) == 0o644


def test_a_new_time_alone_is_no_change(lab: Lab) -> None:
    lab.update()
    os.utime(lab.source / "sizes" / "16384", (1_700_000_500, 1_700_000_500))
    assert not lab.update().changes


def test_what_archives_do_not_carry_stays_with_the_path(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "lab", ("2sec-time",))
    write(lab.source / "tool", b"one")
    write(lab.source / "folder" / "kept", b"same")
    lab.update()
    assert lab.installed is not None
    (lab.installed / "tool").chmod(0o750)
    (lab.installed / "folder").chmod(0o711)
    os.setxattr(lab.installed / "tool", "user.mine", b"1")
    write(lab.source / "tool", b"another one", 1_700_000_100)
    write(lab.source / "new" / "file", b"new")
    lab.update()
    assert stat.S_IMODE((lab.installed / "tool").stat().st_mode) == 0o750
    assert os.getxattr(lab.installed / "tool", "user.mine") == b"1"
    assert stat.S_IMODE((lab.installed / "folder").stat().st_mode) == 0o711
    assert stat.S_IMODE((lab.installed / "new").stat().st_mode) == 0o755
    assert stat.S_IMODE((lab.installed / "new" / "file").stat().st_mode) == 0o644


@pytest.mark.parametrize("shape", ["link-for-folder", "folder-for-link", "file-for-folder"])
def test_types_that_change(lab: Lab, shape: str) -> None:
    lab.update()
    if shape == "link-for-folder":
        shutil.rmtree(lab.source / "many")
        (lab.source / "many").symlink_to("sizes")
    elif shape == "folder-for-link":
        (lab.source / "link").unlink()
        write(lab.source / "link" / "inside", b"x")
    else:
        shutil.rmtree(lab.source / "twins")
        write(lab.source / "twins", b"a file")
    lab.update()
    assert lab.differences() == []


def test_moved_content_is_not_fetched_again(lab: Lab) -> None:
    lab.update()
    (lab.source / "sizes").rename(lab.source / "renamed")
    done = lab.update()
    assert done.bytes_fetched < 700_000
    assert lab.differences() == []


def test_a_record_is_rebuilt_from_the_tree(lab: Lab) -> None:
    lab.update()
    assert lab.installed is not None
    assert lab.index is not None
    assert lab.record is not None
    root = open_root(lab.installed)
    flags = lab.index.flags
    with stream_archive(lab.installed, flags=flags) as pieces:
        record = rebuild_record(lab.index, pieces, root)
    assert record.skeleton.frames == lab.record.skeleton.frames
    assert record.spans == lab.record.spans
    (lab.installed / "bin" / "tool").write_bytes(b"other bytes")
    with (
        stream_archive(lab.installed, flags=flags) as pieces,
        pytest.raises(ContentError, match="not what its index says"),
    ):
        rebuild_record(lab.index, pieces, root)
    os.close(root)


def test_verify_names_what_differs(lab: Lab) -> None:
    lab.update()
    tree = lab.installed
    assert tree is not None
    (tree / "bin" / "tool").chmod(0o755)
    (tree / "link").unlink()
    (tree / "link").symlink_to("elsewhere")
    (tree / "dangling").unlink()
    shutil.rmtree(tree / "empty")
    (tree / "empty").write_bytes(b"")
    (tree / "many" / "d0" / "mine").write_bytes(b"")
    found = lab.differences()
    wanted = {
        (b"bin/tool", "mode"),
        (b"link", "link target"),
        (b"dangling", "missing"),
        (b"empty", "type"),
        (b"many/d0/mine", "extra"),
    }
    assert {one for one in found if one[1] != "time"} == wanted
    root = open_root(tree)
    assert lab.record is not None
    kept = {path for path, _ in wanted} - {b"many/d0/mine"} | {b"many"}
    left = verify_tree(lab.record, root, preserve=kept)
    assert {one.what for one in left} <= {"time"}
    os.close(root)


def test_a_build_can_be_interrupted_and_leaves_no_descriptors(lab: Lab) -> None:
    index = lab.publish()
    root = open_root(lab.base / "interrupted")
    before = len(list(Path("/proc/self/fd").iterdir()))

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(plan_extract(index, None, -1), lab.chunks, root, progress=interrupt)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    os.close(root)


class CutError(Exception):
    pass


class CutChunks(StoreChunks):
    """Chunks that end after so many, as a kill would end them."""

    def __init__(self, store: Path, after: int) -> None:
        super().__init__(store)
        self.after = after

    def read(self, ref: ChunkRef) -> bytes:
        self.after -= 1
        if self.after < 0:
            raise CutError
        return super().read(ref)


@pytest.mark.parametrize("kind", ["fresh", "update"])
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power cut"])
def test_what_was_fetched_before_a_cut_is_not_fetched_again(
    lab: Lab, kind: str, power: bool
) -> None:
    if kind == "update":
        lab.update()
        shutil.rmtree(lab.source)
        populate(lab.source, seed=2)
    index = lab.publish()
    old = -1 if lab.installed is None else open_root(lab.installed)
    leftovers: list[Leftover] = []
    fetched: list[bytes] = []
    for attempt, after in enumerate((7, 9, 1_000_000)):
        root = open_root(lab.base / f"try-{attempt}")
        journal = lab.base / f"journal-{attempt}"
        plan = plan_extract(index, lab.record, old, leftovers=tuple(leftovers))
        chunks = CutChunks(lab.base / "store.castr", after)
        with journal.open("wb") as file:
            try:
                done = extract(plan, chunks, root, journal=file.fileno())
            except CutError:
                assert attempt < 2
        fetched += [ref.id for ref in chunks.streamed[:after] + chunks.single[:after]]
        if power and attempt == 0:
            with journal.open("r+b") as file:
                file.truncate(journal.stat().st_size - 30)
            largest = max((lab.base / "try-0").rglob("*"), key=lambda path: path.lstat().st_size)
            largest.write_bytes(b"")
        leftovers.append(Leftover(journal, root))
        if not power:
            # What it says it has is there: every other chunk is fetched ahead, not one by one.
            left = leftovers[-1]
            assert all(index.chunk_id(left.read(one) or b"") == one for one in left.chunks)
    assert tree_digest(lab.base / "try-2", DEFAULT) == archive_digest(index, lab.chunks)
    assert done.digest is None or done.digest == archive_digest(index, lab.chunks)
    again = len(fetched) - len(set(fetched))
    # At most the chunk in flight of each cut; after a power cut what it tore as well.
    assert again <= (9 if power else 2)
    assert len(fetched) >= 16


def test_a_journal_that_is_nothing_is_no_leftover(tmp_path: Path) -> None:
    root = open_root(tmp_path / "tree")
    journal = tmp_path / "journal"
    assert Leftover(journal, root).chunks == {}
    for content in (b"", b"casync-updater journal 1\n", bytes(500), b"x" * 500):
        journal.write_bytes(content)
        assert Leftover(journal, root).chunks == {}
    os.close(root)


def test_a_path_of_zeros_in_a_journal_is_a_torn_end(tmp_path: Path) -> None:
    """What a power cut leaves of a block that was not written; `stat` knows no such path."""
    root = open_root(tmp_path / "tree")
    table = struct.pack("<Q32s", 26, bytes(32))
    nodes = b""
    for start, path in ((0, b"a"), (10, bytes(3)), (20, b"c")):
        nodes += struct.pack("<QQII", start, 5, len(path), 5) + path + b"bytes"
    journal = tmp_path / "journal"
    head = b"casync-updater journal 1\n" + struct.pack("<Q", len(table)) + table
    journal.write_bytes(head + nodes)
    left = Leftover(journal, root)
    assert left.chunks == {}
    left.close()
    os.close(root)


def test_a_folder_that_is_not_empty_is_refused(lab: Lab) -> None:
    root = open_root(lab.base / "full")
    write(lab.base / "full" / "bin", b"in the way")
    with pytest.raises(LocalError, match="'bin' cannot"):
        extract(plan_extract(lab.publish(), None, -1), lab.chunks, root)
    os.close(root)


def test_a_file_that_changes_between_plan_and_build_is_not_taken_over(lab: Lab) -> None:
    lab.update()
    assert lab.installed is not None
    old, new = open_root(lab.installed), open_root(lab.base / "new")
    write(lab.source / "many" / "d2" / "f22", b"another version", 1_700_000_100)
    index = lab.publish()
    plan = plan_extract(index, lab.record, old)
    write(lab.installed / "sizes" / "900000", b"changed in the meantime")
    extract(plan, lab.chunks, new)
    assert tree_digest(lab.base / "new", DEFAULT) == archive_digest(index, lab.chunks)
    os.close(old)
    os.close(new)


# Trees and updates that nobody thought of.

NAMES = st.one_of(
    st.sampled_from([b"a", b"b", b"A", b"a.b", b"a-b", b"-", b"\xff", b" ", b"\n", b"l" * 255]),
    st.binary(min_size=1, max_size=6).filter(
        lambda name: b"\0" not in name and b"/" not in name and name not in {b".", b".."}
    ),
)
SIZES = st.one_of(
    st.integers(0, 2000),
    st.sampled_from([16383, 16384, 16385, 65535, 65536, 65537, 262143, 262144, 262145, 400_000]),
)
LEAF = st.one_of(
    st.tuples(st.just("file"), SIZES, st.integers(0, 3), st.sampled_from([0o644, 0o755, 0o4711])),
    st.tuples(st.just("link"), st.sampled_from([b"a", b"../b", b"/etc", b"\xff"])),
    st.tuples(st.just("hard"), st.integers(0, 3)),
)
TREE = st.recursive(
    st.dictionaries(NAMES, LEAF, max_size=6),
    lambda children: st.dictionaries(NAMES, st.one_of(LEAF, children), max_size=5),
    max_leaves=20,
)


def build(root: Path, tree: dict[bytes, object], made: list[Path]) -> None:
    for name, what in tree.items():
        path = root / os.fsdecode(name)
        if isinstance(what, dict):
            path.mkdir()
            build(path, what, made)
            continue
        kind, *rest = what  # type: ignore[misc]
        if kind == "link":
            path.symlink_to(os.fsdecode(rest[0]))
        elif kind == "hard" and made:
            os.link(made[rest[0] % len(made)], path)
        else:
            size, seed, mode = rest if kind == "file" else (5, 0, 0o644)
            path.write_bytes(random.Random(seed).randbytes(size))
            path.chmod(mode)
            os.utime(path, (1_700_000_000 + size, 1_700_000_000 + size))
            made.append(path)


def hurt(root: Path, rng: random.Random) -> None:
    """Do something to the installed tree that no update did."""
    paths = [path for path in root.rglob("*") if not path.is_symlink()]
    for path in rng.sample(paths, min(len(paths), rng.randrange(3))):
        if not path.exists() or path.is_symlink():
            continue
        if path.is_dir():
            shutil.rmtree(path)
        elif rng.random() < 0.5 and path.stat().st_size:
            _edit_in_place(path)
        else:
            path.write_bytes(b"hurt")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    base = tmp_path_factory.mktemp("generated")
    count = iter(range(1_000_000))
    return lambda: base / str(next(count))


@given(versions=st.lists(TREE, min_size=2, max_size=3), seed=st.integers(0, 1000))
@settings(max_examples=12 * MORE, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_generated_trees(
    scratch: Callable[[], Path], versions: list[dict[bytes, object]], seed: int
) -> None:
    lab = Lab(scratch())
    rng = random.Random(seed)
    try:
        for version in versions:
            shutil.rmtree(lab.source)
            lab.source.mkdir()
            build(lab.source, version, [])
            os.utime(lab.source, (1_700_000_000, 1_700_000_000))
            if lab.installed is not None:
                hurt(lab.installed, rng)
            lab.update()
            assert lab.differences() == []
    finally:
        shutil.rmtree(lab.base)


def test_a_chain_of_updates(lab: Lab) -> None:
    rng = random.Random(50)
    for step in range(50):
        evolve(lab.source, rng, step)
        if step % 4 == 3 and lab.installed is not None:
            hurt(lab.installed, rng)
        lab.update()
    assert lab.differences() == []


def evolve(root: Path, rng: random.Random, step: int) -> None:
    """One version more: files grow, shrink, move, vanish, appear and change type."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    for path in rng.sample(files, 4):
        action = rng.randrange(6)
        data = path.read_bytes()
        time = 1_700_000_000 + step
        if action == 0:
            write(path, data + rng.randbytes(rng.randrange(70_000)), time)
        elif action == 1:
            write(path, data[: len(data) // 2], time)
        elif action == 2:
            path.rename(path.with_name(f"moved-{step}-{path.name[-30:]}"))
        elif action == 3:
            path.unlink()
            path.symlink_to(f"target-{step}")
        elif action == 4:
            path.unlink()
            write(path / "inside", data, time)
        else:
            place = rng.randrange(len(data) + 1)
            write(path, data[:place] + b"inserted" + data[place:], time)
    write(root / "versions" / str(step), rng.randbytes(rng.randrange(300_000)))


def test_casync_is_there() -> None:
    """What every test above compares with."""
    assert "casync" in casync("--version")


def test_the_middle_of_a_large_file_is_reported(lab: Lab) -> None:
    """Who supervises a build ends it when it hears nothing: a file may take an hour."""
    shutil.rmtree(lab.source)
    write(lab.source / "large", random.Random(1).randbytes(3_000_000))
    index = lab.publish()
    seen: list[int] = []
    root = open_root(lab.base / "reported")
    try:
        plan = plan_extract(index, None, -1)
        extract(plan, lab.chunks, root, progress=lambda progress: seen.append(progress.done))
    finally:
        os.close(root)
    assert len([done for done in seen if 0 < done < 3_000_000]) >= 3_000_000 // (256 << 10)
    assert seen == sorted(seen)

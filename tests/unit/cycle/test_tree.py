"""Trees against manifests, and what a new tree takes over from the old one."""

import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from casync_updater.cycle.tree import carry_over, differences
from casync_updater.formats.mtree import Node
from support.manifests import nodes_of
from support.trees import make_tree

FEATURES = ("permissions", "symlinks", "sec-time", "16bit-uids")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do that")


def found(root: Path, nodes: list[Node], *preserve: str) -> dict[bytes, str]:
    return {
        difference.path: difference.what
        for difference in differences(
            root, nodes, features=FEATURES, hash_name="sha256", preserve=preserve
        )
    }


def replace(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree", 1)


@pytest.fixture
def nodes(tree: Path) -> list[Node]:
    return nodes_of(tree)


def test_a_tree_is_what_its_manifest_says(tree: Path, nodes: list[Node]) -> None:
    assert found(tree, nodes) == {}


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("read-only", lambda p: replace(p, lambda q: q.write_bytes(b"read 0nly\n")), "mode"),
        ("bin/tool", lambda p: p.chmod(0o700), "mode"),
        ("bin/setuid", lambda p: p.chmod(0o755), "mode"),
        ("sticky", lambda p: p.chmod(0o777), "mode"),
        ("chunks", lambda p: p.write_bytes(b"x" + p.read_bytes()[1:]), "content"),
        ("chunks", lambda p: p.write_bytes(b"short"), "content"),
        ("empty-file", lambda p: p.write_bytes(b"x"), "content"),
        ("read-only", lambda p: os.utime(p, (5, 5)), "time"),
        ("links/to-file", lambda p: replace(p, lambda q: q.symlink_to("other")), "link target"),
        ("links/to-file", lambda p: replace(p, lambda q: q.write_bytes(b"")), "type"),
        ("links/to-file", lambda p: p.unlink(), "missing"),
        ("empty-folder", lambda p: p.rmdir(), "missing"),
        ("empty-folder", lambda p: replace(p, lambda q: q.symlink_to("bin")), "type"),
        ("read-only", lambda p: replace(p, os.mkfifo), "type"),
        ("read-only", lambda p: replace(p, lambda q: q.mkdir()), "type"),
        ("new\nline", lambda p: p.write_bytes(b""), "extra"),
        ("bin/\udcff", lambda p: p.mkdir(), "extra"),
        ("bin/pipe", os.mkfifo, "extra"),
    ],
)
def test_every_kind_of_difference(
    tree: Path, nodes: list[Node], name: str, change: Callable[[Path], object], what: str
) -> None:
    change(tree / name)
    assert found(tree, nodes) == {os.fsencode(name): what}


@as_root
def test_owner_and_group(tree: Path, nodes: list[Node]) -> None:
    os.chown(tree / "read-only", 1, -1)
    os.lchown(tree / "links" / "to-file", -1, 1)
    assert found(tree, nodes) == {b"read-only": "owner", b"links/to-file": "group"}


@as_root
def test_a_device_node_is_that_of_its_device(tmp_path: Path) -> None:
    os.mknod(tmp_path / "node", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    null, zero = (
        Node(b"node", "char", device=b"linux,1,%d" % minor, mode=0o600) for minor in (3, 5)
    )
    root = Node(b".", "dir")
    assert found(tmp_path, [root, null]) == {}
    assert found(tmp_path, [root, zero]) == {b"node": "device"}


def test_a_folder_s_time_is_no_difference(tree: Path, nodes: list[Node]) -> None:
    os.utime(tree / "bin", (1, 1))
    os.utime(tree, (1, 1))
    assert found(tree, nodes) == {}


def test_a_tree_that_is_gone(tmp_path: Path, nodes: list[Node]) -> None:
    assert set(found(tmp_path / "gone", nodes).values()) == {"missing"}
    assert len(found(tmp_path / "gone", nodes)) == len(nodes)


def test_a_file_with_the_name_of_one_in_a_missing_folder_is_extra(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "name").write_bytes(b"")
    nodes = nodes_of(root)
    shutil.rmtree(root / "folder")
    (root / "name").write_bytes(b"planted")
    assert found(root, nodes) == {
        b"folder": "missing",
        b"folder/name": "missing",
        b"name": "extra",
    }


def test_a_symbolic_link_in_place_of_a_folder_is_not_followed(
    tmp_path: Path, tree: Path, nodes: list[Node]
) -> None:
    (tree / "bin").rename(tmp_path / "outside")
    (tree / "bin").symlink_to(tmp_path / "outside")
    assert found(tree, nodes) == {
        b"bin": "type",
        b"bin/tool": "missing",
        b"bin/setuid": "missing",
    }


def test_extra_folders_are_named_once(tree: Path, nodes: list[Node]) -> None:
    (tree / "bin" / "more" / "and-more").mkdir(parents=True)
    assert found(tree, nodes) == {b"bin/more": "extra"}


def test_preserved_paths_are_not_looked_at(tree: Path, nodes: list[Node]) -> None:
    (tree / "var" / "data" / "deep").mkdir(parents=True)
    (tree / "var" / "settings").write_bytes(b"")
    (tree / "data-2").write_bytes(b"")
    assert found(tree, nodes, "var/data", "var/settings") == {b"data-2": "extra"}
    # Not even where the manifest has them: `preserve` may be younger than the version.
    (tree / "bin" / "tool").unlink()
    (tree / "secret" / "key").write_bytes(b"changed")
    assert found(tree, nodes, "var", "bin", "secret/key") == {b"data-2": "extra"}


def test_a_file_that_becomes_a_pipe_while_it_is_looked_at_does_not_hang(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    file = root / "file"
    file.write_bytes(b"content")
    nodes = nodes_of(root)
    pipe = root.parent / "pipe"
    os.mkfifo(pipe)
    kept = root.parent / "kept"
    kept.hardlink_to(file)
    stop = threading.Event()

    def juggle() -> None:
        spare = root.parent / "spare"
        while not stop.is_set():
            for source in (pipe, kept):
                spare.unlink(missing_ok=True)
                spare.hardlink_to(source)
                spare.replace(file)

    thread = threading.Thread(target=juggle)
    thread.start()
    try:
        seen = {tuple(found(root, nodes).items()) for _ in range(300)}
    finally:
        stop.set()
        thread.join()
    assert seen <= {(), ((b"file", "type"),), ((b"file", "content"),)}


def test_what_cannot_be_read_is_an_error(tree: Path, nodes: list[Node]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (tree / "read-only").chmod(0)
    with pytest.raises(PermissionError):
        found(tree, nodes)


# What a new tree takes over.


def fresh(tmp_path: Path) -> tuple[Path, Path]:
    """A place for the old tree, and one for the new tree in a staging folder."""
    (tmp_path / ".tree.casync-updater").mkdir(mode=0o700)
    return tmp_path / "tree", tmp_path / ".tree.casync-updater" / "new"


def take_over(new: Path, old: Path | None, *features: str) -> None:
    carry_over(new, old, parent=new.parent.parent, features=features)


def bits(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_modes_of_an_archive_without_modes_come_from_the_old_tree(tmp_path: Path) -> None:
    old, new = fresh(tmp_path)
    for root, mode in ((old, 0o711), (new, 0o700)):
        (root / "folder").mkdir(parents=True)
        (root / "folder" / "file").write_bytes(b"")
        (root / "folder").chmod(mode)
    (old / "folder" / "file").chmod(0o4755)
    (new / "added").mkdir(mode=0o700)
    (new / "added" / "file").write_bytes(b"")
    (new / "added" / "file").chmod(0o600)
    (new / "link").symlink_to("/etc/passwd")
    before = bits(Path("/etc/passwd"))
    take_over(new, old, "2sec-time")
    assert bits(new / "folder") == 0o711
    assert bits(new / "folder" / "file") == 0o4755
    assert bits(new / "added") == 0o755
    assert bits(new / "added" / "file") == 0o644
    assert bits(Path("/etc/passwd")) == before


def test_modes_that_the_archive_carries_stay(tmp_path: Path) -> None:
    old, new = fresh(tmp_path)
    for root, mode in ((old, 0o600), (new, 0o755)):
        root.mkdir()
        (root / "file").write_bytes(b"")
        (root / "file").chmod(mode)
    take_over(new, old, "permissions")
    assert bits(new / "file") == 0o755


@as_root
def test_owners_come_from_the_old_tree_and_setuid_bits_survive_them(tmp_path: Path) -> None:
    old, new = fresh(tmp_path)
    for root in (old, new):
        root.mkdir()
        (root / "tool").write_bytes(b"x")
        (root / "tool").chmod(0o6755)
        (root / "link").symlink_to("tool")
    os.chown(old / "tool", 1000, 1001)
    (old / "tool").chmod(0o6755)
    os.lchown(old / "link", 1002, 1003)
    take_over(new, old, "permissions", "symlinks")
    status = (new / "tool").stat()
    assert (status.st_uid, status.st_gid) == (1000, 1001)
    assert bits(new / "tool") == 0o6755
    assert ((new / "link").lstat().st_uid, (new / "link").lstat().st_gid) == (1002, 1003)


@as_root
def test_owners_that_the_archive_carries_stay(tmp_path: Path) -> None:
    old, new = fresh(tmp_path)
    for root in (old, new):
        root.mkdir()
        (root / "file").write_bytes(b"x")
    os.chown(old / "file", 1000, 1000)
    take_over(new, old, "16bit-uids", "permissions")
    assert (new / "file").stat().st_uid == 0


@as_root
def test_new_nodes_get_the_owner_of_their_folder(tmp_path: Path) -> None:
    old, new = fresh(tmp_path)
    (old / "www").mkdir(parents=True)
    os.chown(old, 1000, 1000)
    os.chown(old / "www", 33, 33)
    (new / "www" / "more" / "deep").mkdir(parents=True)
    (new / "www" / "more" / "deep" / "file").write_bytes(b"")
    (new / "top").write_bytes(b"")
    take_over(new, old, "permissions")
    for path in ("www/more", "www/more/deep", "www/more/deep/file"):
        assert (new / path).stat().st_uid == 33, path
    assert (new / "top").stat().st_uid == 1000
    assert new.stat().st_uid == 1000


@as_root
def test_a_first_install_belongs_to_the_owner_of_the_destination_s_folder(tmp_path: Path) -> None:
    os.chown(tmp_path, 1000, 1001)
    _, new = fresh(tmp_path)
    new.mkdir()
    (new / "file").write_bytes(b"")
    take_over(new, None, "permissions")
    assert ((new / "file").stat().st_uid, new.stat().st_gid) == (1000, 1001)


@as_root
def test_attributes_come_along_and_leave_the_mode_alone(tmp_path: Path) -> None:
    old, new = fresh(tmp_path)
    for root in (old, new):
        root.mkdir()
        (root / "file").write_bytes(b"x")
        (root / "file").chmod(0o640)
    os.setxattr(old / "file", "user.note", b"kept")
    # u::rw- u:1000:rwx g::r-- m::rwx o::---
    acl = bytes.fromhex(
        "02000000 01000600ffffffff 02000700e8030000 04000400ffffffff 10000700ffffffff"
        " 20000000ffffffff"
    )
    try:
        os.setxattr(old / "file", "system.posix_acl_access", acl)
    except OSError:
        pytest.skip("no ACLs on this file system")
    take_over(new, old, "permissions")
    assert os.getxattr(new / "file", "user.note") == b"kept"
    assert "system.posix_acl_access" in os.listxattr(new / "file")
    assert bits(new / "file") == 0o640


@as_root
def test_attributes_that_the_archive_carries_are_its_own(tmp_path: Path) -> None:
    old, new = fresh(tmp_path)
    for root in (old, new):
        root.mkdir()
        (root / "tool").write_bytes(b"x")
    raw, bind = (bytes.fromhex(f"0100000200{bits:02x}0000") + bytes(12) for bits in (32, 4))
    os.setxattr(old / "tool", "security.capability", raw)
    os.chown(old / "tool", 1000, 1000)
    os.setxattr(old / "tool", "security.capability", raw)
    os.setxattr(new / "tool", "security.capability", bind)
    os.setxattr(old / "tool", "user.note", b"old")
    take_over(new, old, "permissions", "fcaps", "xattrs")
    assert (new / "tool").stat().st_uid == 1000
    assert os.getxattr(new / "tool", "security.capability") == bind
    assert os.listxattr(new / "tool") == ["security.capability"]


def test_nothing_but_its_metadata_is_taken_from_a_node_of_another_type(tmp_path: Path) -> None:
    old, new = fresh(tmp_path)
    (old / "turncoat").mkdir(parents=True, mode=0o700)
    new.mkdir()
    (new / "turncoat").write_bytes(b"")
    take_over(new, old)
    assert bits(new / "turncoat") == 0o644


def test_times_stay(tmp_path: Path) -> None:
    old, new = fresh(tmp_path)
    make_tree(old, 1)
    make_tree(new, 2)
    before = {path: path.lstat().st_mtime_ns for path in (new, *new.rglob("*"))}
    take_over(new, old)
    assert {path: path.lstat().st_mtime_ns for path in (new, *new.rglob("*"))} == before


def test_a_file_takes_over_as_well(tmp_path: Path) -> None:
    old, new = fresh(tmp_path)
    old.write_bytes(b"old")
    old.chmod(0o751)
    new.write_bytes(b"new")
    take_over(new, old)
    assert bits(new) == 0o751


def test_a_tree_deeper_than_python_s_stack(tmp_path: Path) -> None:
    depth = min(1050, (4000 - len(str(tmp_path)) - 40) // 2)
    old, new = fresh(tmp_path)
    deep = "d/" * depth
    try:
        for root in (old, new):
            subprocess.run(["mkdir", "-p", str(root / deep)], check=True)
        (old / deep).chmod(0o711)
        (new / deep / "f").write_bytes(b"")
        take_over(new, old)
        assert bits(new / deep) == 0o711
    finally:
        subprocess.run(["rm", "-rf", str(old), str(new)], check=True)


@as_root
def test_a_user_who_may_not_give_files_away_keeps_them(tmp_path: Path) -> None:
    """The destination's folder belongs to somebody else, as /tmp and /srv do."""
    old, new = fresh(tmp_path)
    new.mkdir()
    (new / "file").write_bytes(b"")
    os.chown(old.parent, 0, 0)
    for path in (new.parent, new, new / "file"):
        os.chown(path, 65534, 65534)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(new.parent)
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            carry_over(Path("new"), None, parent=Path("/"), features=("permissions",))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert (new / "file").stat().st_uid == 65534

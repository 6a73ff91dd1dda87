"""The wrappers say to the real casync what they claim to say."""

import subprocess
from pathlib import Path

import pytest

from casync_updater.errors import LocalError
from casync_updater.formats import index
from casync_updater.tools import casync
from support.trees import make_tree, snapshot

SOFTWARE = 0xB000000000000308


def flags_of(path: Path) -> int:
    return index.parse(path.read_bytes(), str(path)).flags


@pytest.mark.parametrize(
    ("features", "flags"),
    [
        (("2sec-time",), 0xB000000000000040),
        (("permissions", "symlinks", "sec-time"), SOFTWARE),
        (("unix",), 0xB000000000001F09),
        (("acl", "permissions", "nsec-time", "sec-time"), 0xB000000020000026),
        ((), 0xB000000000000000),
    ],
)
def test_features_become_the_flags_that_stand_in_the_index(
    tmp_path: Path, features: tuple[str, ...], flags: int
) -> None:
    assert casync.normalised(features) == flags
    (tmp_path / "tree").mkdir()
    made = tmp_path / "x.caidx"
    casync.make(made, tmp_path / "tree", store=tmp_path / "x.castr", flags=flags)
    assert flags_of(made) == flags


def test_an_unknown_feature_is_an_error() -> None:
    with pytest.raises(LocalError, match="warp-time"):
        casync.normalised(["warp-time"])


def test_exclusions_and_hash_are_those_of_the_flags(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / ".caexclude").write_text("left-out\n")
    (tree / "left-out").write_text("x")
    flags = 0x4000000000000008
    made = tmp_path / "x.caidx"
    value = casync.make(made, tree, store=tmp_path / "x.castr", flags=flags)
    assert flags_of(made) == flags
    assert value == casync.digest(tree, flags=flags)
    assert value == casync.digest(made, store=tmp_path / "x.castr", flags=flags)


@pytest.mark.parametrize("folder", ["host:path", "-x", "a=b c", "new\nline", "\udcff"])
def test_no_path_is_an_address_or_an_option(tmp_path: Path, folder: str) -> None:
    base = tmp_path / folder
    base.mkdir()
    tree = make_tree(base / "tree", 1, count=5)
    made, store = base / "x.caidx", base / "x.castr"
    value = casync.make(made, tree, store=store, flags=SOFTWARE, chunk_size="1024:4096:16384")
    casync.extract(made, base / "copy", store=store, flags=SOFTWARE, seeds=[tree])
    assert snapshot(base / "copy", mtimes=True) == snapshot(tree, mtimes=True)
    assert casync.digest(base / "copy", flags=SOFTWARE) == value
    assert index.parse(made.read_bytes(), "x").chunk_size_option == "1024:4096:16384"


def test_the_stream_is_what_the_index_describes(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 2, count=5)
    made = tmp_path / "x.caidx"
    casync.make(made, tree, store=tmp_path / "x.castr", flags=SOFTWARE)
    parsed = index.parse(made.read_bytes(), "x")
    with casync.stream_archive(tree, flags=SOFTWARE) as pieces:
        archive = b"".join(pieces)
    assert len(archive) == parsed.size
    assert all(
        parsed.chunk_id(archive[ref.start : ref.start + ref.size]) == ref.id for ref in parsed
    )


def test_compression_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    casync.make(
        tmp_path / "x.caidx",
        tmp_path / "tree",
        store=tmp_path / "x.castr",
        flags=SOFTWARE,
        compression="xz",
    )
    (chunk,) = tmp_path.glob("x.castr/*/*.cacnk")
    assert chunk.read_bytes().startswith(b"\xfd7zXZ")


def test_relative_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absolute"):
        casync.digest(Path("host:tree"), flags=SOFTWARE)


def test_casyncs_own_words_are_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="No such file or directory"):
        casync.digest(tmp_path / "nothing", flags=SOFTWARE)


def test_old_commands_give_the_same_bytes(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 3, count=5)
    old, new = tmp_path / "old.caidx", tmp_path / "new.caidx"
    store = tmp_path / "x.castr"
    said = subprocess.run(
        ["casync", "make", "--with=2sec-time", f"--store={store}", old, tree],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    value = casync.make(new, tree, store=store, flags=flags_of(old))
    assert said.strip() == value
    assert new.read_bytes() == old.read_bytes()
    manifest = subprocess.run(
        ["casync", "mtree", f"--store={store}", "--with=2sec-time", old],
        check=True,
        capture_output=True,
    ).stdout
    with casync.mtree(new, store=store, flags=flags_of(new)) as pieces:
        assert b"".join(pieces) == manifest
    assert not list(tmp_path.glob(".#*"))

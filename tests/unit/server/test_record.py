"""What is kept, what was never visible, what is garbage since when."""

import dataclasses
from pathlib import Path

import pytest

from casync_updater.errors import LocalError
from casync_updater.model import FileRef, Release
from casync_updater.server.record import (
    FolderRecord,
    Garbage,
    History,
    Kept,
    StoreRecord,
    read_folder,
    read_garbage,
    write_folder,
    write_garbage,
)

RELEASE = Release(
    project="x",
    version="1",
    serial=20,
    date=20.0,
    valid_until=None,
    index=FileRef("x.caidx", 5, "a" * 64),
    mtree=FileRef("x.caidx.mtree", 5, "b" * 64),
    digest="c" * 64,
    features=(),
    archive_size=1,
    store_size=1,
)
OLD = Kept(10, "d" * 64, ("d" * 64,))
KILLED = Kept(30, "e" * 64, ("e" * 64,))


def test_what_never_became_visible_is_forgotten() -> None:
    history = History("x.caidx", (OLD, Kept.of(RELEASE), KILLED))
    assert history.published(RELEASE).releases == (OLD, Kept.of(RELEASE))
    assert History("x.caidx", (OLD, KILLED)).published(RELEASE).releases == (
        OLD,
        Kept.of(RELEASE),
    )
    assert history.published(None).releases == ()


def test_the_newest_are_kept() -> None:
    history = History("x.caidx", (OLD, Kept.of(RELEASE), KILLED))
    assert history.limited(None) == history
    assert history.limited(2).releases == (Kept.of(RELEASE), KILLED)
    assert history.limited(9) == history


def test_a_folder_knows_the_files_of_all_its_indexes(tmp_path: Path) -> None:
    (tmp_path / ".casync-updater").mkdir()
    assert read_folder(tmp_path) == FolderRecord()
    record = FolderRecord().having(History("x.caidx", (OLD,))).having(History("y", (KILLED,)))
    record = record.having(History("x.caidx", (Kept.of(RELEASE),)))
    write_folder(tmp_path, record)
    assert read_folder(tmp_path) == record
    assert record.files() == {"a" * 64, "b" * 64, "e" * 64}
    assert record.of("z") == History("z")


@pytest.mark.parametrize("text", ["", "[]", '{"indexes": 5}', '{"indexes": [{}]}', "\xff"])
def test_a_broken_record_is_never_taken_for_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / ".casync-updater").mkdir()
    (tmp_path / ".casync-updater" / "releases.json").write_text(text, encoding="latin-1")
    with pytest.raises(LocalError, match=r"releases\.json cannot be understood"):
        read_folder(tmp_path)


def test_indexes_are_stored_relative_to_the_store() -> None:
    store = Path("/srv/site/x.castr")
    record = StoreRecord().having(store, Path("/srv/site/x.caidx"))
    assert record.having(store, Path("/srv/site/x.caidx")) == record
    moved = Path("/mnt/site/x.castr")
    assert list(record.paths(moved)) == [Path("/mnt/site/x.caidx")]


def test_garbage_keeps_its_time_until_it_is_needed_again(tmp_path: Path) -> None:
    garbage = Garbage().seen({"a", "b"}, 100.0).seen({"b", "c"}, 200.0)
    assert garbage.since == {"b": 100.0, "c": 200.0}
    assert garbage.older(100.0) == ["b"]
    assert garbage.without(["b"]).since == {"c": 200.0}
    assert garbage.seen({"c"}, 150.0).since == {"c": 150.0}
    (tmp_path / ".casync-updater").mkdir()
    write_garbage(tmp_path, garbage)
    assert read_garbage(tmp_path) == garbage
    (tmp_path / ".casync-updater" / "garbage.json").write_text("[1")
    assert read_garbage(tmp_path) == Garbage()


def test_a_release_without_mtree() -> None:
    bare = dataclasses.replace(RELEASE, mtree=None)
    assert Kept.of(bare) == Kept(20, "a" * 64, ("a" * 64,))

"""A source that is written to while it is read does not go unseen."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from casync_updater.server.build import survey


def grow(tree: Path) -> None:
    with (tree / "file").open("a") as file:
        file.write("more")


def rewrite_under_the_old_time(tree: Path) -> None:
    before = (tree / "file").stat()
    (tree / "file").write_text("xxxx")
    os.utime(tree / "file", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "folder").mkdir(parents=True)
    (tree / "file").write_text("text")
    (tree / "folder" / "other").write_text("12345")
    (tree / "link").symlink_to("/")
    os.utime(tree / "file", (1.0, 1.0))
    return tree


def test_the_same_source_looks_the_same(tree: Path) -> None:
    assert survey(tree) == survey(tree)
    assert survey(tree).size == 9
    assert survey(tree / "file").size == 4


@pytest.mark.parametrize(
    "change",
    [
        grow,
        rewrite_under_the_old_time,
        lambda tree: (tree / "file").unlink(),
        lambda tree: (tree / "file").rename(tree / "renamed"),
        lambda tree: (tree / "folder" / "new").touch(),
        lambda tree: (tree / "file").chmod(0o600),
    ],
)
def test_a_change_is_seen(tree: Path, change: Callable[[Path], object]) -> None:
    before = survey(tree)
    change(tree)
    assert survey(tree).fingerprint != before.fingerprint

"""Manifests: casync's words, and what differs between two of them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casync_updater.errors import ContentError
from casync_updater.formats import mtree
from casync_updater.formats.mtree import Node
from casync_updater.model import Changes

MODES = ("permissions", "symlinks", "sec-time")

names = st.binary(min_size=1, max_size=3).filter(
    lambda name: b"\0" not in name and b"/" not in name and name not in (b".", b"..")
)
paths = st.lists(names, min_size=1, max_size=3).map(b"/".join)


def one(line: bytes, features: tuple[str, ...] = MODES) -> Node:
    (node,) = mtree.parse([line], features, "test")
    return node


def test_a_line_of_each_kind() -> None:
    digest = b"a" * 64
    assert one(
        b"bin/tool type=file mode=0755 size=12 time=1600000000.000000005 sha512256digest=" + digest
    ) == Node(
        b"bin/tool",
        "file",
        mode=0o755,
        size=12,
        time_ns=1_600_000_000_000_000_005,
        digest=digest.decode(),
    )
    assert one(b". type=dir mode=1777 uid=1 gid=2 uname=a gname=b\n") == Node(
        b".", "dir", mode=0o1777, uid=1, gid=2, user=b"a", group=b"b"
    )
    assert one(b"l type=link mode=0777 link=a\\040b\\377").link == b"a b\xff"
    assert one(b"d type=char mode=0600 device=native,1,3").device == b"native,1,3"
    assert one(b"f type=file size=0 sha256digest=" + digest).digest == digest.decode()
    assert one(b"t type=file time=5.5").time_ns == 5_500_000_000
    assert one(b"t type=file time=5").time_ns == 5_000_000_000


def test_modes_that_the_archive_does_not_carry_are_made_up() -> None:
    assert one(b"f type=file mode=0666", ("2sec-time",)).mode is None
    assert one(b"f type=file mode=0666", ("read-only",)).mode == 0o666
    assert one(b"f type=file mode=0666", ("acl",)).mode == 0o666


@pytest.mark.parametrize(
    "line",
    [
        b"name",
        b"name type",
        b"name type=door",
        b"name size=1",
        b"name type=file size=x",
        b"name type=file mode=9",
        b"name type=\xff",
        b"name type=file time=x",
        b"name type=file time=1.x",
        b".. type=dir",
        b"a/../b type=file",
        b"/etc/passwd type=file",
        b"a//b type=file",
        b"a/. type=file",
        b"a\\057b/.. type=file",
    ],
)
def test_a_line_that_casync_never_writes_is_named(line: bytes) -> None:
    with pytest.raises(ContentError, match=r"^where: line 3 is not mtree"):
        list(mtree.parse([b". type=dir", b"", line], MODES, "where"))


@given(paths)
def test_a_path_is_one_printable_word_and_comes_back(path: bytes) -> None:
    word = mtree.escape(path)
    assert re.fullmatch(r"[!-~]+", word)
    assert "#" not in word
    assert one(f"{word} type=file".encode()).path == path


def nodes(tree: dict[bytes, tuple[int, int | None]]) -> list[Node]:
    found = [Node(path, "file", size=size, mode=mode) for path, (size, mode) in tree.items()]
    return sorted(found, key=lambda node: node.order)


trees = st.dictionaries(
    paths, st.tuples(st.integers(0, 2), st.none() | st.integers(0, 1)), max_size=12
)


@given(trees, trees)
def test_what_differs_is_what_two_dictionaries_differ_in(
    old: dict[bytes, tuple[int, int | None]], new: dict[bytes, tuple[int, int | None]]
) -> None:
    found = mtree.diff(nodes(old), nodes(new))
    assert set(found.added) == new.keys() - old.keys()
    assert set(found.removed) == old.keys() - new.keys()
    assert set(found.changed) == {
        path
        for path in old.keys() & new.keys()
        if old[path][0] != new[path][0]
        or (None not in (old[path][1], new[path][1]) and old[path][1] != new[path][1])
    }
    for part in (found.added, found.changed, found.removed):
        assert len(set(part)) == len(part)
        assert [tuple(path.split(b"/")) for path in part] == sorted(
            tuple(path.split(b"/")) for path in part
        )


def test_a_folder_s_content_follows_it() -> None:
    words = [b"a-b", b"a/b", b"a", b".", b"a.b", b"a/b/c", b"a/b-c"]
    ordered = sorted((Node(word, "file") for word in words), key=lambda node: node.order)
    assert [node.path for node in ordered] == [
        b".", b"a", b"a/b", b"a/b/c", b"a/b-c", b"a-b", b"a.b"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"time_ns": 9}, False),
        ({"type": "dir"}, True),
        ({"size": 2}, True),
        ({"digest": "b"}, True),
        ({"link": b"x"}, True),
        ({"device": b"native,1,3"}, True),
        ({"mode": 0o600}, True),
        ({"mode": None}, False),
        ({"uid": 1}, True),
        ({"uid": None}, False),
        ({"gid": 1}, True),
        ({"user": b"x"}, True),
        ({"group": b"x"}, True),
    ],
)
def test_a_new_time_is_no_change(change: dict[str, object], differs: bool) -> None:
    words = {"mode": 0o644, "uid": 0, "gid": 0, "user": b"a", "group": b"a", "size": 1}
    old = Node(b"f", "file", digest="a", time_ns=1, **words)  # type: ignore[arg-type]
    values = {**words, "type": "file", "digest": "a", "time_ns": 1, **change}
    new = Node(b"f", **values)  # type: ignore[arg-type]
    assert mtree.diff([old], [new]) == (Changes(changed=(b"f",)) if differs else Changes())
    assert mtree.diff([new], [old]) == (Changes(changed=(b"f",)) if differs else Changes())

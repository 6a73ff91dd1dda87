"""Publisher entries: what loads, one broken fixture per error, and nothing that is ever raised."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casync_updater.config.publications import load_publications
from casync_updater.formats.index import FEATURES
from casync_updater.model import Compression, Mtimes, Publication

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a source of each kind."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "image").write_bytes(b"image")
    (tmp_path / "CHANGELOG").write_text("* a change\n")
    (tmp_path / "secret.asc").write_text("key")
    (tmp_path / "place.caidx").mkdir()
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plain(**changes: object) -> dict[str, object]:
    entry: dict[str, object] = {
        "index": "site/x.caidx",
        "store": "site/x.castr",
        "source": "tree",
    }
    entry |= changes
    return {key: value for key, value in entry.items() if value is not ...}


def written(folder: Path, value: object) -> Path:
    file = folder / "server.json"
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def only(folder: Path, **changes: object) -> Publication:
    loaded = load_publications(written(folder, plain(**changes)))
    assert loaded.problems == ()
    (publication,) = loaded.entries
    return publication


def test_the_old_entry_loads_as_it_is(folder: Path) -> None:
    assert only(folder) == Publication(
        index=folder / "site/x.caidx",
        store=folder / "site/x.castr",
        source=folder / "tree",
        project="x",
        file=folder / "server.json",
    )


def test_the_installed_example_loads(folder: Path) -> None:
    for name in ("myproject", "website"):
        (folder / "build" / name).mkdir(parents=True)
    (folder / "build/website/CHANGELOG").touch()
    example = shutil.copy(ROOT / "conf" / "examples" / "server.json", folder)
    loaded = load_publications(Path(example))
    assert (loaded.problems, loaded.warnings) == ((), ())
    assert [each.project for each in loaded.entries] == ["myproject", "website"]


def test_every_new_key_is_read(folder: Path) -> None:
    changes = {
        "project": "shop",
        "version": "1.4.2-1",
        "with": "unix xattrs",
        "signKey": ["secret.asc", "0x0123 4567 89ab cdef"],
        "validFor": "30d",
        "keep": 3,
        "changes": "CHANGELOG",
        "chunkSize": "16K:64K:256K",
        "compression": "xz",
        "mtimes": "keep",
    }
    found = only(folder, **changes)
    assert (found.project, found.version, found.features) == ("shop", "1.4.2-1", ("unix", "xattrs"))
    assert found.sign_keys == (str(folder / "secret.asc"), "0123456789ABCDEF")
    assert (found.valid_for, found.keep) == (30 * 86400.0, 3)
    assert (found.changes, found.chunk_size) == (folder / "CHANGELOG", "16384:65536:262144")
    assert (found.compression, found.mtimes) == (Compression.XZ, Mtimes.KEEP)


def test_a_file_becomes_a_caibx(folder: Path) -> None:
    assert not only(folder, index="site/x.caibx", source="image").is_archive


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("12h", 43200), ("1.5 d", 129600), ("4w", 2419200), (7, 604800), (0.5, 43200)],
)
def test_validity(folder: Path, value: object, seconds: float) -> None:
    assert only(folder, validFor=value).valid_for == seconds


@pytest.mark.parametrize(
    ("value", "option"),
    [
        ("64K", "16384:65536:262144"),
        (65536, "16384:65536:262144"),
        ("32M", "8388608:33554432:134217728"),
        ("64M", "16777216:67108864:134217728"),
        ("64:64:64", "64:64:64"),
    ],
)
def test_chunk_sizes_as_casync_2_writes_them_into_an_index(
    folder: Path, value: object, option: str
) -> None:
    assert only(folder, chunkSize=value).chunk_size == option


@pytest.mark.parametrize("value", ["two\nlines", "a fix and/or two", "x" * 5000])
def test_changes_that_name_no_file_are_the_text(folder: Path, value: str) -> None:
    loaded = load_publications(written(folder, plain(changes=value)))
    assert (loaded.entries[0].changes, loaded.problems, loaded.warnings) == (value, (), ())


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"index": ...}, "index", "is missing"),
        ({"index": "site/x"}, "index", "ends in .caidx"),
        ({"index": "https://host/x.caidx"}, "index", "the publisher writes to folders"),
        ({"index": "site/x.caibx"}, "index", "is a folder: use .caidx"),
        ({"source": "image"}, "index", "is a file or block device: use .caibx"),
        ({"index": "tree/x.caidx"}, "index", "put it beside the source"),
        ({"index": "place.caidx"}, "index", "name the file in it"),
        ({"store": ...}, "store", "is missing"),
        ({"store": "tree"}, "store", "put it beside the source"),
        ({"store": "image"}, "store", "is no folder"),
        ({"store": 5}, "store", "and is a number"),
        ({"source": ...}, "source", "is missing"),
        ({"source": "missing"}, "source", "No such file"),
        ({"source": "fifo"}, "source", "a folder, a file or a block device"),
        ({"project": ""}, "project", "is empty"),
        ({"version": 1.4}, "version", "in double quotes, and is a number"),
        ({"version": " 1"}, "version", "one line"),
        ({"with": []}, "with", "names no feature"),
        ({"with": ["permissions", "symlink"]}, "with", "'symlink', which casync does not know"),
        ({"with": {"a": 1}}, "with", "must be a list"),
        ({"with": [["a"]]}, "with", "a list, which casync does not know"),
        ({"with": "permissions usec-time"}, "with", "cannot extract its own archive"),
        ({"signKey": "me@example.org"}, "signKey", "no fingerprint"),
        ({"signKey": "12345678"}, "signKey", "no fingerprint"),
        ({"signKey": ["secret.asc", ""]}, "signKey[1]", "is empty"),
        ({"signKey": []}, "signKey", "names no key"),
        ({"validFor": "30"}, "validFor", 'write "30d"'),
        ({"validFor": "1 month"}, "validFor", 'write "30d"'),
        ({"validFor": 0}, "validFor", "more than nothing"),
        ({"validFor": 10**400}, "validFor", "at most ten years"),
        ({"validFor": "999999w"}, "validFor", "at most ten years"),
        ({"keep": 0}, "keep", "1 or more"),
        ({"chunkSize": "16K:64K"}, "chunkSize", "or MIN:AVG:MAX"),
        ({"chunkSize": "64k"}, "chunkSize", "or MIN:AVG:MAX"),
        ({"chunkSize": "1:2:3"}, "chunkSize", "from 64 bytes"),
        ({"chunkSize": "64K:16K:256K"}, "chunkSize", "must rise"),
        ({"chunkSize": "129M"}, "chunkSize", "to 128M at most"),
        ({"chunkSize": -1}, "chunkSize", "or MIN:AVG:MAX"),
        ({"compression": "lz4"}, "compression", "'zstd' or 'xz' or 'gzip'"),
        ({"mtimes": True}, "mtimes", "'stable' or 'keep'"),
        ({"signkey": "x"}, "signkey", "did you mean 'signKey'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_value_is_reported_and_other_entries_go_on(
    folder: Path, changes: dict[str, object], key: str, message: str
) -> None:
    file = written(folder, [plain(**changes), plain(index="site/y.caidx")])
    loaded = load_publications(file)
    assert [each.project for each in loaded.entries] == ["y"]
    (problem,) = loaded.problems
    assert re.fullmatch(
        rf"{re.escape(str(file))}: entry 1( \(.*\))?: {re.escape(key)}: .*{message}.*", problem
    )


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"with": ["read-only"]}, "with: 'read-only' makes casync"),
        ({"with": "fat"}, "with: 'fat' makes casync"),
        ({"changes": "debian/changelog"}, "is no file, and is published as text"),
        ({"comment": 1}, "comment: is no known key"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(
    folder: Path, changes: dict[str, Any], warning: str
) -> None:
    loaded = load_publications(written(folder, plain(**changes)))
    assert (len(loaded.entries), loaded.problems) == (1, ())
    assert warning in loaded.warnings[0]


def test_two_entries_cannot_write_one_index(folder: Path) -> None:
    (folder / "link").symlink_to("site")
    entries = [plain(), plain(index="link/x.caidx"), plain(index="site/y.caidx")]
    loaded = load_publications(written(folder, entries))
    assert [each.project for each in loaded.entries] == ["y"]
    (problem,) = loaded.problems
    assert "entry 2 (x.caidx): index: " in problem
    assert "is also that of entry 1 (x.caidx)" in problem


KEYS = st.sampled_from(
    [*Publication.__dataclass_fields__, "with", "signKey", "validFor", "chunkSize"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*FEATURES[:3], "64K", "1:1:1", "30d", "/", "\ud800", "~", "tree"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@hypothesis.settings(deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_whatever_the_json_says_nothing_is_raised(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, object]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "tree").mkdir(exist_ok=True)
    entry = plain(index="/nonexistent/x.caidx", store="/nonexistent/x", source=str(folder / "tree"))
    file = written(folder, [entry | extra, extra])
    loaded = load_publications(file)
    for message in loaded.problems + loaded.warnings:
        assert message.startswith(f"{file}: ")
        assert message.isprintable()

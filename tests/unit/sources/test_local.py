"""Sources in folders."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

from casync_updater.clock import SystemClock
from casync_updater.errors import ConfigError, ContentError, MissingError, RemoteError
from casync_updater.formats.store import path_of
from casync_updater.model import FetchSettings, FileRef, Location
from casync_updater.sources import open_source
from casync_updater.sources.base import Source, shown
from casync_updater.tools.process import run

HEX = "cd" * 32


def source_in(folder: Path, prefix: str = "") -> Source:
    location = Location(f"{prefix}{folder}/x.caidx", f"{prefix}{folder}/x.castr")
    return open_source(location, FetchSettings(), SystemClock())


def write(path: Path, data: bytes, age: float = 100.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    then = SystemClock().time() - age
    os.utime(path, (then, then))


def ref_for(data: bytes, name: str = "x.caidx") -> FileRef:
    return FileRef(name, len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("prefix", ["", "file:", "file://", "FILE://localhost"])
def test_documents_and_chunks(tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "a folder"
    write(folder / "x.caidx", b"index")
    write(folder / "x.caidx.release", b"release")
    write(folder / "x.castr" / path_of(HEX), b"chunk")
    source = source_in(tmp_path / ("a folder" if not prefix else "a%20folder"), prefix)
    index = source.document("", limit=10)
    release = source.document(".release", limit=10)
    assert index is not None
    assert release is not None
    assert (index.body, release.body) == (b"index", b"release")
    assert index.where == f"{folder}/x.caidx"
    assert source.chunk(HEX, limit=5) == b"chunk"
    assert source.received == 17
    source.abort()
    source.close()


def test_a_document_that_did_not_change_is_not_given_again(tmp_path: Path) -> None:
    path = tmp_path / "x.caidx.cks"
    write(path, b"1")
    source = source_in(tmp_path)
    first = source.document(".cks", limit=10)
    assert first is not None
    assert source.document(".cks", limit=10, known=first.validators) is None
    write(path, b"2", age=50)
    again = source.document(".cks", limit=10, known=first.validators)
    assert again is not None
    assert again.body == b"2"


def test_a_file_that_was_just_written_may_change_unseen(tmp_path: Path) -> None:
    write(tmp_path / "x.caidx", b"1", age=0.5)
    document = source_in(tmp_path).document("", limit=10)
    assert document is not None
    assert not document.validators


def test_missing_files_and_missing_drives_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"x\.caidx\.release does not exist"):
        source_in(tmp_path).document(".release", limit=10)
    with pytest.raises(RemoteError, match="/drive is not there") as caught:
        source_in(tmp_path / "drive").document("", limit=10)
    assert not isinstance(caught.value, MissingError)
    with pytest.raises(RemoteError, match=r"x\.castr is not there") as caught:
        source_in(tmp_path / "drive").chunk(HEX, limit=10)
    assert not isinstance(caught.value, MissingError)


def test_what_cannot_be_read_is_not_missing(tmp_path: Path) -> None:
    # The loopback interface has no speed: reading this regular file fails with EINVAL.
    for index, why in (
        ("/sys/class/net/lo/speed", "Invalid argument"),
        (f"{tmp_path}/{'x' * 300}", "File name too long"),
    ):
        source = open_source(Location(index, "/none"), FetchSettings(), SystemClock())
        with pytest.raises(RemoteError, match=f"cannot be read: {why}") as caught:
            source.document("", limit=4096)
        assert not isinstance(caught.value, MissingError)


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "long"])
def test_what_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.caidx"
    if kind == "link":
        write(tmp_path / "target", b"1")
        path.symlink_to("target")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        write(path, b"12345678901")
    with pytest.raises(ContentError, match=r"x\.caidx"):
        source_in(tmp_path).document("", limit=10)


class TestByHash:
    def test_the_immutable_copy_first(self, tmp_path: Path) -> None:
        ref = ref_for(b"right")
        write(tmp_path / "x.caidx", b"newer")
        write(tmp_path / "by-hash/SHA256" / ref.sha256, b"right")
        assert source_in(tmp_path).by_hash(ref, "") == b"right"

    @pytest.mark.parametrize("copy", [None, b"wrong", b"much longer than it should be"])
    def test_the_name_otherwise(self, tmp_path: Path, copy: bytes | None) -> None:
        ref = ref_for(b"right", "x.caidx.mtree")
        write(tmp_path / "x.caidx.mtree", b"right")
        if copy is not None:
            write(tmp_path / "by-hash/SHA256" / ref.sha256, copy)
        assert source_in(tmp_path).by_hash(ref, ".mtree") == b"right"

    def test_wrong_bytes(self, tmp_path: Path) -> None:
        ref = ref_for(b"right")
        write(tmp_path / "x.caidx", b"wrong")
        with pytest.raises(ContentError, match=r"x\.caidx is not the x\.caidx of the release"):
            source_in(tmp_path).by_hash(ref, "")
        (tmp_path / "x.caidx").rename(tmp_path / "copy")
        write(tmp_path / "by-hash/SHA256" / ref.sha256, b"wrong")
        with pytest.raises(ContentError, match="by-hash"):
            source_in(tmp_path).by_hash(ref, "")

    def test_nothing_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(MissingError, match=r"x\.caidx does not exist"):
            source_in(tmp_path).by_hash(ref_for(b"right"), "")


@pytest.mark.parametrize(
    "address",
    ["x.caidx", "", "ftp://host/x.caidx", "file://host/x.caidx", "file:x.caidx", "/a\0b",
     "file:///x.caidx?y", "http:///x.caidx", "http://h:port/x", "https://"],
)  # fmt: skip
def test_addresses_that_are_none(address: str) -> None:
    for location in (Location(address, "/store"), Location("/index", address)):
        with pytest.raises(ConfigError):
            open_source(location, FetchSettings(), SystemClock())


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/a@b?c#d", "/a@b?c#d"),
        ("https://h/x.caidx", "https://h/x.caidx"),
        ("https://user:p@ss@h:8/x.caidx?token=1#f", "https://h:8/x.caidx"),
        ("HTTPS://u@[::1]:8/x", "HTTPS://[::1]:8/x"),
        ("https://h/a@b", "https://h/a@b"),
    ],
)
def test_addresses_are_shown_without_secrets(address: str, expected: str) -> None:
    assert shown(address) == expected


def test_a_local_source_does_not_load_the_web(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from casync_updater.clock import SystemClock\n"
        "from casync_updater.model import FetchSettings, Location\n"
        "from casync_updater.sources import open_source, chunks\n"
        "open_source(Location('/a', '/b'), FetchSettings(), SystemClock())\n"
        "print(*(name for name in sys.modules if name in ('requests', 'urllib3', 'ssl')))\n"
    )
    assert run([sys.executable, "-c", program], timeout=20, env=env()).stdout.strip() == b""


def env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": "src"}

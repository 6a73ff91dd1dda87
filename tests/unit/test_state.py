"""What is remembered of an entry, whatever happens to the file."""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import pytest

import casync_updater.state
from casync_updater.errors import BusyError, LocalError
from casync_updater.model import Entry, FileRef, Installed, Location, Mark, Origin, Release
from casync_updater.release import format_release
from casync_updater.state import (
    Answer,
    Intent,
    Journal,
    Kept,
    PendingAction,
    State,
    StateFolder,
    accepted,
)
from support.keys import key_maker

DAY = 86400.0


def entry(destination: str = "/srv/x", name: str = "x", suffix: str = ".caidx") -> Entry:
    return Entry(name, name, 60.0, Location(f"/i{suffix}", "/s"), None, Path(destination))


def installed(index: str = "aa", serial: int = 1) -> Installed:
    return Installed("d" * 64, index * 32, 1.0, "here", Origin.SOURCE, "1", serial, 1.0)


def release(serial: int, date: float) -> bytes:
    text = format_release(
        Release(
            "x", "1", serial, date, None, FileRef("x.caidx", 5, "a" * 64), None, "b" * 64, (), 5, 5
        )
    )
    return text.encode()


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    folder = StateFolder(tmp_path / "state", entry())
    folder.prepare()
    return folder


FULL = State(
    "/srv/x",
    signed_mark=Mark(5, 50.0),
    unsigned_mark=Mark(4, 40.0),
    installed=installed(),
    previous=(Kept("previous", installed("bb"), ("data",)),),
    pending=(PendingAction("id", "command", (("a", "b"),), 5.0),),
    newest_date=50.0,
    held="rolled back",
)


def test_what_was_saved_is_loaded(folder: StateFolder) -> None:
    assert folder.load() == State("/srv/x")
    folder.save(FULL)
    assert folder.load() == FULL
    assert folder.peek() == FULL
    assert not list(folder.path.glob(".*"))


def test_another_destination_keeps_the_marks_only(folder: StateFolder, tmp_path: Path) -> None:
    folder.save(FULL)
    moved = StateFolder(tmp_path / "state", entry("/srv/y")).load()
    assert moved == State(
        "/srv/y", signed_mark=Mark(5, 50.0), unsigned_mark=Mark(4, 40.0), newest_date=50.0
    )


@pytest.mark.parametrize("number", [1, 2], ids=["a field", "a format"])
def test_what_is_newer_is_refused_and_stays(folder: StateFolder, number: int) -> None:
    file = folder.path / "state.json"
    text = json.dumps({"format": number, "destination": "/srv/x", "something": "new"})
    file.write_text(text)
    with pytest.raises(LocalError, match=rf"written by a newer casync-updater \(format {number}\)"):
        folder.load()
    assert folder.peek() == State("/srv/x")
    assert file.read_text() == text
    assert [path.name for path in folder.path.iterdir() if path.is_file()] == ["state.json"]


@pytest.fixture
def newer(tmp_path: Path) -> Iterator[ModuleType]:
    """The module as a later version may have it: another format, with a field more."""
    source = Path(casync_updater.state.__file__).read_text()
    for before, after in (
        ("FORMAT = 1\n", "FORMAT = 2\n"),
        ("    format: int = FORMAT\n", "    format: int = FORMAT\n    novelty: str = 'none'\n"),
    ):
        assert source.count(before) == 1
        source = source.replace(before, after)
    file = tmp_path / "newer_state.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("newer_state", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["newer_state"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["newer_state"]


def test_up_and_down_again(folder: StateFolder, newer: ModuleType, tmp_path: Path) -> None:
    """Each version finds what it left itself; the marks are the highest of all."""
    folder.save(FULL)
    before = (folder.path / "state.json").read_bytes()

    above = newer.StateFolder(tmp_path / "state", entry())
    state = above.load()
    assert state.installed == FULL.installed
    assert state.novelty == "none"
    state = replace(state, novelty="found", held=None, signed_mark=Mark(9, 9 * DAY))
    above.keep_version(installed("cc", 9), b"i", release(9, 9 * DAY), None, signed=True)
    above.save(state)
    assert (folder.path / "state.json.format-1").read_bytes() == before

    down = folder.load()
    assert down == replace(FULL, signed_mark=Mark(9, 9 * DAY), newest_date=9 * DAY)
    assert json.loads((folder.path / "state.json").read_bytes())["novelty"] == "found"
    folder.save(replace(down, held="down"))
    kept = json.loads((folder.path / "state.json.format-2").read_bytes())
    assert kept["novelty"] == "found"
    assert folder.load().held == "down"

    again = above.load()
    assert (again.held, again.novelty) == ("down", "none")


@pytest.mark.parametrize("left", [b"{", b"[]", b'{"destination": 5}'])
def test_an_own_file_that_is_broken_costs_the_newer_one_nothing(
    folder: StateFolder, left: bytes
) -> None:
    (folder.path / "state.json").write_text('{"format": 2}')
    (folder.path / "state.json.format-1").write_bytes(left)
    with pytest.raises(LocalError, match=r"state\.json\.format-1 cannot be read"):
        folder.load()
    assert (folder.path / "state.json").read_text() == '{"format": 2}'


BROKEN = [
    b"",
    b"\0" * 4096,
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b'{"destination": "/srv/x", "format": "2"}',
    b'{"destination": "/srv/x", "format": null}',
    b'{"destination": 5}',
    b'{"destination": "/srv/x", "journal": {"intent": "perhaps"}}',
    b"[" * 200_000,
    b'{"destination": "/srv/x", "last_check": ' + b"9" * 5000 + b"}",
    b'{"destination": "/srv/x", "last_check": ' + b"9" * 400 + b"}",
    b'{"destination": "/srv/x", "newest_date": NaN}',
    b'{"destination": "/srv/x", "newest_date": 1e999}',
]


@pytest.mark.parametrize("data", BROKEN, ids=lambda data: repr(data[:40]))
def test_a_broken_file_is_set_aside(folder: StateFolder, data: bytes) -> None:
    (folder.path / "state.json").write_bytes(data)
    assert folder.peek() == State("/srv/x")
    assert (folder.path / "state.json").read_bytes() == data
    assert folder.load() == State("/srv/x")
    assert (folder.path / "state.json.broken").read_bytes() == data
    assert not (folder.path / "state.json").exists()


def test_the_marks_come_back_from_the_releases_that_are_kept(folder: StateFolder) -> None:
    for number, (serial, signed) in enumerate([(7, True), (9, True), (8, False), (3, False)]):
        folder.keep_version(
            installed(f"{number:02}", serial),
            b"index",
            release(serial, serial * DAY),
            None,
            signed=signed,
        )
    (folder.path / "versions" / "garbage.release").write_bytes(b"\xff not a release")
    (folder.path / "versions" / "folder.release").mkdir()
    (folder.path / "state.json").write_bytes(b"broken")
    assert folder.load() == State(
        "/srv/x",
        signed_mark=Mark(9, 9 * DAY),
        unsigned_mark=Mark(8, 8 * DAY),
        newest_date=9 * DAY,
    )


def test_the_mark_comes_back_of_what_was_accepted_and_never_installed(folder: StateFolder) -> None:
    """Also when a cycle with a lost state has forgotten every version since."""
    folder.keep_version(installed(serial=5), b"index", release(5, DAY), None, signed=True)
    folder.keep_accepted(release(6, 2 * DAY), signed=True)
    for _ in range(2):
        (folder.path / "state.json").write_bytes(b"broken")
        state = folder.load()
        assert state.signed_mark == Mark(6, 2 * DAY)
        assert state.signed_mark.digest == "b" * 64
        folder.forget_versions(state)
    folder.keep_accepted(release(7, 3 * DAY), signed=False)
    state = folder.load()
    assert (state.signed_mark, state.unsigned_mark) == (None, Mark(7, 3 * DAY))
    folder.keep_accepted(None, signed=False)
    assert not folder.load().accepted_release


def test_a_mark_of_an_earlier_version_has_no_digest(folder: StateFolder) -> None:
    text = {"destination": "/srv/x", "signed_mark": {"serial": 5, "date": 50}}
    (folder.path / "state.json").write_text(json.dumps(text))
    mark = folder.load().signed_mark
    assert mark == Mark(5, 50.0)
    assert mark.digest is None
    state = accepted(folder.load(), Mark(5, 50.0, "d"), signed=True)
    assert state.signed_mark is not None
    assert state.signed_mark.digest == "d"


def test_a_signature_that_nobody_verified_is_none(folder: StateFolder) -> None:
    """A publisher signs, and this device has no keyring: no signature is demanded from then on."""
    with key_maker() as maker:
        maker.key("publisher")
        text = maker.sign(release(5, 5 * DAY), "publisher")
    folder.keep_version(installed(), b"index", text, None, signed=False)
    state = folder.load()
    assert state.signed_mark is None
    assert state.unsigned_mark == Mark(5, 5 * DAY)


def test_marks_only_rise() -> None:
    state = accepted(State("/x"), Mark(5, 5.0), signed=True)
    state = accepted(state, Mark(4, 9.0), signed=True)
    assert state.signed_mark == Mark(5, 5.0)
    assert state.unsigned_mark is None
    state = accepted(state, Mark(99, 2.0), signed=False)
    assert state.signed_mark == Mark(5, 5.0)
    assert state.unsigned_mark == Mark(99, 2.0)


def test_no_unsigned_date_makes_every_release_expire() -> None:
    state = accepted(State("/x"), Mark(5, 5.0), signed=True)
    state = accepted(state, Mark(6, 4_000_000_000.0), signed=False)
    assert state.newest_date == 5.0


def test_answers_are_replaced_by_their_key() -> None:
    state = State("/x").with_answer(Answer("a", "here", "1")).with_answer(Answer("b", "", "2"))
    state = state.with_answer(Answer("a", "there", "3"))
    assert state.answer("a") == Answer("a", "there", "3")
    assert state.answer("c") is None
    assert len(state.answers) == 2


def test_companions_stay_as_long_as_they_are_named(folder: StateFolder) -> None:
    names = ("aa", "bb", "cc", "dd", "ee")
    for name in names:
        folder.keep_version(installed(name), b"i", b"r", b"m", signed=True)
    versions = folder.path / "versions"
    (versions / ".cut-off.release.x1y2").write_bytes(b"")
    journal = Journal(Intent.IN_PLACE, installed("cc"), replaced=installed("dd"))
    folder.forget_versions(replace(FULL, journal=journal))
    left = {path.name.partition(".")[0] for path in versions.iterdir()}
    assert left == {name * 32 for name in names[:4]}
    assert folder.index(installed("aa")).suffix == ".caidx"
    blob = StateFolder(folder.path.parent, entry(suffix=".caibx"))
    assert blob.index(installed("aa")).suffix == ".caibx"
    folder.forget_versions(State("/srv/x"))
    assert list(versions.iterdir()) == []


def test_a_state_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"a file")
    with pytest.raises(LocalError, match="no state can be kept here"):
        StateFolder(tmp_path / "state", entry()).prepare()


def test_a_lock_that_cannot_be(folder: StateFolder) -> None:
    (folder.path / "lock").mkdir()
    with pytest.raises(LocalError, match="lock: Is a directory"), folder.locked("x", wait=0):
        pass


def hold(root: Path, pipe: Connection) -> None:
    with StateFolder(root, entry()).locked("interval", wait=0):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def holder(folder: StateFolder) -> Iterator[tuple[multiprocessing.Process, Connection]]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=hold, args=(folder.path.parent, there))
    process.start()
    assert here.poll(30)
    try:
        yield process, here
    finally:
        process.kill()
        process.join()


def test_one_process_holds_an_entry(
    folder: StateFolder, holder: tuple[multiprocessing.Process, Connection]
) -> None:
    process, pipe = holder
    with (
        pytest.raises(BusyError, match=rf"^x is held by process {process.pid} \(interval\)$"),
        folder.locked("operator", wait=0.15),
    ):
        pass
    pipe.send("let go")
    with folder.locked("operator", wait=10):
        text = (folder.path / "lock").read_text()
    assert text == f"process {os.getpid()} (operator)"


def test_the_lock_dies_with_its_holder(
    folder: StateFolder, holder: tuple[multiprocessing.Process, Connection]
) -> None:
    process, _ = holder
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with folder.locked("operator", wait=10):
        pass


def test_a_program_that_inherits_the_lock_holds_the_entry(folder: StateFolder) -> None:
    with folder.locked("first", wait=0) as lock:
        child = subprocess.Popen(["sleep", "30"], pass_fds=(lock,))
    try:
        with pytest.raises(BusyError), folder.locked("second", wait=0):
            pass
    finally:
        child.kill()
        child.wait()
    with folder.locked("second", wait=10):
        pass


def test_the_lock_is_let_go_after_an_error(folder: StateFolder) -> None:
    with pytest.raises(ZeroDivisionError), folder.locked("first", wait=0):
        raise ZeroDivisionError
    with folder.locked("second", wait=0):
        pass


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "tiny"
    target.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(target)]
    if subprocess.run(argv, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_a_full_disk_leaves_the_old_state_and_a_lock_to_be_had(tiny: Path) -> None:
    folder = StateFolder(tiny, entry())
    folder.prepare()
    folder.save(FULL)
    with pytest.raises(OSError, match="No space left"):
        (tiny / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(LocalError, match="state cannot be saved: No space left"):
        folder.save(replace(FULL, last_error="x" * 100_000))
    assert folder.load() == FULL
    with folder.locked("operator", wait=0):
        pass
    assert not list(folder.path.glob(".state.json*"))


def fields_of(kind: object, found: dict[str, str]) -> None:
    """The fields of a dataclass and the words of an enumeration, and of all within, by name."""
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        found[kind.__name__] = " ".join(kind)
    if isinstance(kind, type) and is_dataclass(kind) and kind.__name__ not in found:
        found[kind.__name__] = " ".join(field.name for field in fields(kind))
        for hint in get_type_hints(kind).values():
            fields_of(hint, found)
    for inner in get_args(kind):
        fields_of(inner, found)


def test_a_format_is_what_its_fields_are() -> None:
    """A version refuses fields that it does not know; one that has failed has to be left again.

    Whoever changes one raises `FORMAT`, so that the version before finds what it left.
    Before the first release of a format, only the list here changes.
    """
    found: dict[str, str] = {}
    fields_of(State, found)
    assert (casync_updater.state.FORMAT, found) == (
        1,
        {
            "State": (
                "destination format unsigned_mark signed_mark installed previous"
                " journal pending answers trial trial_boot bad held no_exchange refused"
                " last_check last_success last_verify last_error backup_absent"
                " backup_seen windows newest_date keys"
            ),
            "Mark": "serial date digest",
            "Installed": "digest index_sha256 since source origin version serial date root",
            "Identity": "device inode",
            "Kept": "folder installed preserved left",
            "Journal": (
                "intent installed token old new folder replaced moves actions trial hold bad"
            ),
            "PendingAction": "id command env timeout state",
            "Bad": "digest serial index_sha256",
            "Answer": "key where body etag last_modified",
            "Refusal": "check expected found source since",
            "Window": "begin end",
            "Origin": "source backup",
            "Intent": "exchange in-place",
            "ActionState": "waiting running left ended",
        },
    )

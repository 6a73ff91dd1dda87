"""What is installed, what is pending, what was refused: one folder of files for each entry.

::

    STATE/NAME/state.json        this module's `State`, replaced as a whole
    STATE/NAME/state.json.broken what could not be read, set aside
    STATE/NAME/state.json.format-N  the last state that a version with another format has left
    STATE/NAME/lock              held while a cycle runs
    STATE/NAME/queued            what actions of the same entry asked for: a command in JSON a line
    STATE/NAME/versions/HEX.*    per installed version, named by the SHA-256 of its index:
                                 .caidx/.caibx the index, .release the release's text,
                                 .signed (empty) where a signature of that was verified,
                                 .record what the own extractor knows of the tree, or else
                                 .mtree.zst its manifest
    STATE/NAME/versions/accepted.release, .signed
                                 likewise, of the release that is marked as the highest
    STATE/NAME/actions/          lists of changed paths, as handed to actions
    STATE/.actions/              commands under way and their results: see `tools.actions`

The companions of a version are written and synced before the state that names them, so a state
never names a file that is not there.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from casync_updater import codec
from casync_updater.errors import BusyError, ContentError, LocalError
from casync_updater.files import write_atomic, write_together
from casync_updater.formats.record import Record, Window
from casync_updater.model import Entry, Identity, Installed, Mark

FORMAT = 1

_ACCEPTED = "accepted"


class ActionState(StrEnum):
    """Where a promised action is."""

    WAITING = "waiting"
    RUNNING = "running"
    LEFT = "left"
    """It was running when the updater was told to stop: it goes on by itself and is not
    repeated, however it ends."""
    ENDED = "ended"
    """Its result is known; what the runner kept of it is being removed."""


@dataclass(frozen=True, slots=True)
class PendingAction:
    """A command that was promised to run, in the order of the state's list."""

    id: str
    command: str
    env: tuple[tuple[str, str], ...] = ()
    timeout: float | None = None
    state: ActionState = ActionState.WAITING


@dataclass(frozen=True, slots=True)
class Bad:
    """A version that failed here and is not installed again."""

    digest: str
    serial: int | None
    index_sha256: str | None = None
    """Tells the version where a source says no digest."""


class Intent(StrEnum):
    """What a journal announces."""

    EXCHANGE = "exchange"
    IN_PLACE = "in-place"


@dataclass(frozen=True, slots=True)
class Journal:
    """The intent of a commit, written before it and removed with its result.

    Attributes:
        token: the content of the staging folder's token file: tells that folder apart from
            every other one, also where device numbers changed with a reboot.
        old: the tree in the destination before the exchange; None where there was none.
        new: the tree that takes its place.
        folder: where that stands in the staging folder, and the old one after the exchange.
        installed: what the state records when the new tree is in place.
        replaced: the version that stood in a destination before it was updated in place.
        moves: preserved paths, relative to the destination: what is there of them moves from
            old to new.
        actions: what is promised to run once the new tree is in place.
        trial: a health check has to succeed afterwards.
        hold: the entry is held there afterwards (a rollback).
        bad: what failed and is left by this exchange.
    """

    intent: Intent
    installed: Installed
    token: str = ""
    old: Identity | None = None
    new: Identity | None = None
    folder: str = "new"
    replaced: Installed | None = None
    moves: tuple[str, ...] = ()
    actions: tuple[PendingAction, ...] = ()
    trial: bool = False
    hold: str | None = None
    bad: tuple[Bad, ...] = ()


@dataclass(frozen=True, slots=True)
class Kept:
    """A previous version that stays for a rollback: a folder inside the staging folder."""

    folder: str
    installed: Installed
    preserved: tuple[str, ...] = ()
    """Paths that were moved out of it, to be moved back by a rollback."""
    left: bool = False
    """It was rolled back from: no version that a rollback goes to."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What was refused, until it is resolved."""

    check: str
    expected: str
    found: str
    source: str
    since: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The last body of a document, with the validators that belong to it.

    The key is made of a hash, since an address may hold a password; the body is kept byte for
    byte, as Latin-1.
    """

    key: str
    where: str
    body: str
    etag: str | None = None
    last_modified: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """Everything the client remembers about one entry."""

    destination: str
    format: int = FORMAT
    unsigned_mark: Mark | None = None
    signed_mark: Mark | None = None
    installed: Installed | None = None
    previous: tuple[Kept, ...] = ()
    journal: Journal | None = None
    pending: tuple[PendingAction, ...] = ()
    answers: tuple[Answer, ...] = ()
    trial: int | None = None
    """How often the health check of the installed version was begun; None where it has passed, or
    there is none. One that still runs, or came to its end, is collected and not begun again."""
    trial_boot: str = ""
    """The boot in which it was begun the last time."""
    bad: tuple[Bad, ...] = ()
    held: str | None = None
    """Why the entry stays where it is until `resume`."""
    no_exchange: str | None = None
    """Why an exchange was found not to work for the destination."""
    refused: Refusal | None = None
    last_check: float | None = None
    last_success: float | None = None
    last_verify: float | None = None
    last_error: str | None = None
    backup_absent: bool = False
    """It was said that the backup's folder is not there."""
    backup_seen: str | None = None
    """What a backup drive looked like when all of it was found right."""
    windows: tuple[Window, ...] = ()
    """When this program itself touched inodes of the installed tree; see `formats.record`."""
    newest_date: float | None = None
    """The newest Date of any verified release: a lower bound for the clock."""
    keys: str | None = None
    """SHA-256 of the keyrings by which the signed mark was last judged; see `cycle.marks`."""

    @property
    def accepted_release(self) -> bool:
        """True once a release was accepted: from then on a source without one is none."""
        return self.unsigned_mark is not None or self.signed_mark is not None

    def answer(self, key: str) -> Answer | None:
        """The stored body of a document, by its key."""
        return next((answer for answer in self.answers if answer.key == key), None)

    def with_answer(self, answer: Answer) -> "State":
        """The state with a document's body replaced."""
        others = tuple(other for other in self.answers if other.key != answer.key)
        return replace(self, answers=(*others, answer))


class UnrecordedError(LocalError):
    """What happened is not in the state: what is on the disk says how the next start goes on.

    Whoever catches it must not save the state that it has in memory, which knows less.
    """


class StateFolder:
    """The folder of one entry's state. Whoever writes holds `locked`."""

    def __init__(self, root: Path, entry: Entry) -> None:
        """Name the folder; nothing is made or read yet.

        Args:
            root: the state directory of the client.
            entry: whose state it is; its destination belongs to the state.
        """
        self.path = root / entry.name
        self._destination = str(entry.destination)
        self._index_suffix = ".caidx" if entry.is_archive else ".caibx"

    @property
    def actions(self) -> Path:
        """Where commands and lists of changed paths are kept for actions."""
        return self.path / "actions"

    def index(self, installed: Installed) -> Path:
        """The index of a version."""
        return self._version(installed, self._index_suffix)

    def release(self, installed: Installed) -> Path:
        """The text of a version's release, as published."""
        return self._version(installed, ".release")

    def record(self, installed: Installed) -> Path:
        """What the project's own extractor knows of a version's tree."""
        return self._version(installed, ".record")

    def manifest(self, installed: Installed) -> Path:
        """The manifest of a version: mtree lines, zstd."""
        return self._version(installed, ".mtree.zst")

    def _version(self, installed: Installed, suffix: str) -> Path:
        return self.path / "versions" / f"{installed.index_sha256}{suffix}"

    def prepare(self) -> None:
        """Make the folders.

        Raises:
            LocalError: they cannot be made.
        """
        try:
            for folder in (self.path / "versions", self.actions):
                folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.actions.chmod(0o700)
        except OSError as error:
            raise LocalError(f"{self.path}: no state can be kept here: {error.strerror}") from error

    def load(self) -> State:
        """The entry's state.

        A state file that cannot be read is set aside and rebuilt from the releases that are
        kept beside it: the marks never fall back to nothing. State of another destination
        keeps the marks only.

        One of another format is kept: whichever version wrote it finds it again, when it is
        installed again. Of a newer format nothing can be told but that; what counts then is
        what this version left before the newer one came, with the marks of the releases that
        were accepted since. Trees that were installed since are drift to it, and looked at.

        Raises:
            LocalError: the file is of a newer format, and there is no other, or it cannot be
                read or kept.
        """
        try:
            state, other = self._read()
            if other is not None:
                write_atomic(self._other(other[0]), other[1])
        except FileNotFoundError:
            return self._rebuilt()
        except OSError as error:
            raise LocalError(f"{error.filename or self.path}: {error.strerror}") from error
        except (ValueError, TypeError, RecursionError):
            file = self.path / "state.json"
            file.replace(file.with_name("state.json.broken"))
            return self._rebuilt()
        if other is not None and other[0] > FORMAT:
            state = self._raised(state)
        if state.destination != self._destination:
            return State(
                self._destination,
                unsigned_mark=state.unsigned_mark,
                signed_mark=state.signed_mark,
                newest_date=state.newest_date,
                keys=state.keys,
            )
        return state

    def peek(self) -> State:
        """The entry's state for somebody who only looks: nothing is set aside or rebuilt."""
        try:
            return self._read()[0]
        except (OSError, ValueError, TypeError, RecursionError, LocalError):
            return State(self._destination)

    def _read(self) -> tuple[State, tuple[int, bytes] | None]:
        """What this version makes of the file; with the format and bytes of one that is another.

        Raises:
            LocalError: it is of a newer format, and this version has left no file of its own.
            OSError, ValueError, TypeError, RecursionError: it cannot be read, or is broken.
        """
        file = self.path / "state.json"
        data = file.read_bytes()
        document = json.loads(data)
        found = document.get("format", FORMAT) if isinstance(document, dict) else FORMAT
        newer = f"{file} was written by a newer casync-updater (format {found})"
        if found > FORMAT:
            own = self._other(FORMAT)
            try:
                document = json.loads(own.read_bytes())
                state = codec.from_json(State, document)
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise LocalError(
                    f"{newer}, and {own} cannot be read: install that version again"
                ) from error
        else:
            try:
                state = codec.from_json(State, document)
            except codec.UnknownFieldError as error:
                raise LocalError(f"{newer}, {error}: install that version again") from error
        return replace(state, format=FORMAT), None if found == FORMAT else (found, data)

    def _other(self, number: int) -> Path:
        """Where the last state of a format is kept while another one is in use."""
        return self.path / f"state.json.format-{number}"

    def _rebuilt(self) -> State:
        """A state with nothing but marks."""
        return self._raised(State(self._destination))

    def _raised(self, state: State) -> State:
        """The state with the marks of every release that is still kept."""
        from casync_updater.release import parse_release  # noqa: PLC0415 - deb822 is slow
        from casync_updater.trust import unwrap  # noqa: PLC0415

        for file in self._releases():
            with contextlib.suppress(ContentError, OSError):
                release = parse_release(unwrap(file.read_bytes()), str(file))
                state = accepted(state, release.mark, signed=_is_signed(file))
        return state

    def _releases(self) -> list[Path]:
        return sorted((self.path / "versions").glob("*.release"))

    def signed_releases(self) -> Iterator[tuple[Path, bytes]]:
        """The kept releases whose signature was verified, as published, with their files."""
        for file in self._releases():
            with contextlib.suppress(OSError):
                if _is_signed(file):
                    yield file, file.read_bytes()

    def save(self, state: State) -> None:
        """Replace the state file in one atomic, durable step.

        Raises:
            UnrecordedError: it could not be written; the old one is still there.
        """
        text = json.dumps(codec.to_json(state), indent=1)
        try:
            write_atomic(self.path / "state.json", text.encode())
        except OSError as error:
            raise UnrecordedError(
                f"{self.path}: the state cannot be saved: {error.strerror}"
            ) from error

    def keep_version(
        self,
        installed: Installed,
        index: bytes,
        release: bytes | None,
        knowledge: bytes | Record | None,
        *,
        signed: bool,
    ) -> None:
        """Write a version's companions, durably, before a state names them.

        Args:
            installed: the version.
            index: its index.
            release: its release as published; None in the old layout.
            knowledge: what is known of its tree: a record, or else a manifest (zstd), if any.
            signed: the release's signature was verified.

        Raises:
            OSError: they cannot be written.
        """
        mark = self._version(installed, ".signed")
        if not signed:
            mark.unlink(missing_ok=True)
        files: dict[Path, Iterable[bytes]] = {self.index(installed): (index,)}
        if isinstance(knowledge, bytes):
            files[self.manifest(installed)] = (knowledge,)
        elif knowledge is not None:
            files[self.record(installed)] = knowledge.packed()
        if release is not None:
            files[self.release(installed)] = (release,)
        write_together(files)
        if release is not None and signed:
            write_atomic(mark, b"")

    def keep_release(self, installed: Installed, release: bytes, *, signed: bool) -> None:
        """Write the text of a version's release, and whether its signature was verified."""
        _write_release(self.release(installed), release, signed=signed)

    def keep_accepted(self, release: bytes | None, *, signed: bool) -> None:
        """Keep the text of the highest release that was accepted, installed or not.

        The marks of a broken state file come back from it. None forgets it.
        """
        file = self.path / "versions" / f"{_ACCEPTED}.release"
        if release is None:
            file.unlink(missing_ok=True)
        else:
            _write_release(file, release, signed=signed)

    def forget_versions(self, state: State) -> None:
        """Remove the companions of versions that the state names no more."""
        named = {_ACCEPTED, *(kept.installed.index_sha256 for kept in state.previous)}
        if state.installed is not None:
            named.add(state.installed.index_sha256)
        if state.journal is not None:
            named.add(state.journal.installed.index_sha256)
            if state.journal.replaced is not None:
                named.add(state.journal.replaced.index_sha256)
        folder = self.path / "versions"
        for file in folder.iterdir():
            if file.name.split(".")[0] not in named:
                file.unlink()

    def ask(self, *words: str) -> None:
        """Leave a command to whoever holds the entry; see `asked`.

        Raises:
            LocalError: it cannot be written.
        """
        try:
            with self._queued.open("a") as file:
                file.write(json.dumps(words) + "\n")
        except OSError as error:
            raise LocalError(f"{self._queued}: {error.strerror}") from error

    def asked(self) -> tuple[tuple[str, ...], ...]:
        """The commands that were left, each once, in their order."""
        try:
            lines = self._queued.read_text().splitlines()
        except (OSError, ValueError):
            return ()
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(tuple(map(str, json.loads(line))))
        return tuple(dict.fromkeys(found))

    def answered(self) -> None:
        """The commands that `asked` gave are done, or will be without being asked again."""
        self._queued.unlink(missing_ok=True)

    @property
    def _queued(self) -> Path:
        return self.path / "queued"

    @contextlib.contextmanager
    def locked(self, reason: str, *, wait: float) -> Iterator[int]:
        """Hold the entry; the lock dies with the process that holds it.

        Args:
            reason: who holds it, for the message to others.
            wait: seconds to wait for another holder.

        Yields:
            The descriptor of the lock: a program that inherits it holds the entry as well.

        Raises:
            BusyError: another process still holds it, with its number and reason.
            LocalError: there can be no lock.
        """
        self.prepare()
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise LocalError(f"{self.path / 'lock'}: {error.strerror}") from error
        try:
            deadline = time.monotonic() + wait
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                    raise BusyError(f"{self.path.name} is held by {holder or 'another process'}")
                time.sleep(0.1)
            with contextlib.suppress(OSError):  # A full disk: the lock holds without a name.
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} ({reason})".encode(), 0)
            yield descriptor
        finally:
            os.close(descriptor)


def _write_release(file: Path, text: bytes, *, signed: bool) -> None:
    """Write a release's text, and whether its signature was verified.

    What is marked as verified counts as that when the state has to be rebuilt, so the mark is
    made after the text, and removed before it.
    """
    mark = file.with_suffix(".signed")
    if not signed:
        mark.unlink(missing_ok=True)
    write_atomic(file, text)
    if signed:
        write_atomic(mark, b"")


def _is_signed(release: Path) -> bool:
    return release.with_suffix(".signed").exists()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def accepted(state: State, mark: Mark, *, signed: bool) -> State:
    """The state after a release was accepted: its mark raised, never lowered.

    Only verified releases raise the signed mark and the newest date; nothing unsigned can lock
    out the publisher, neither with a serial nor with a date that makes every release expire.
    """
    if signed:
        newest = max(mark.date, state.newest_date or 0.0)
        highest = max(mark, state.signed_mark or mark)
        return replace(state, signed_mark=highest, newest_date=newest)
    highest = max(mark, state.unsigned_mark or mark)
    return replace(state, unsigned_mark=highest)

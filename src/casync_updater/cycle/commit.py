"""The fifth room: the new tree takes the old one's place, and the state says so.

The only step that is neither resumable nor repeatable, so it is atomic: sync, intent, one
renameat2, result. An exchange is its own inverse: recovery never repeats it because of the
journal alone, but looks which of the two trees stands where.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import zstandard

from casync_updater import syscalls
from casync_updater.cycle.staging import Site, identity, is_mount_point, make_staging, remove
from casync_updater.cycle.tree import archive_digest
from casync_updater.cycle.values import Verified
from casync_updater.errors import ContentError, LocalError
from casync_updater.files import sync_folder, write_atomic
from casync_updater.formats import index as index_format
from casync_updater.model import Apply, Entry, Identity, Installed
from casync_updater.state import (
    Intent,
    Journal,
    Kept,
    PendingAction,
    State,
    StateFolder,
    UnrecordedError,
)


class NoExchangeError(LocalError):
    """The destination cannot be exchanged: it has to be updated in place."""


def begin_in_place(state: State, folder: StateFolder, installed: Installed, before: bytes) -> State:
    """Mark a destination as being written, before the first write.

    Until `commit` records the result, every start knows that the destination is no version.
    The manifest of what was there before the first try is kept: what an interrupted try has
    changed already must still count as changed when the actions are chosen.
    """
    if state.journal is None:
        write_atomic(folder.before, zstandard.compress(before))
    state = replace(
        state, journal=Journal(Intent.IN_PLACE, installed), installed=None, last_verify=None
    )
    folder.save(state)
    return state


def commit(
    verified: Verified,
    *,
    entry: Entry,
    state: State,
    folder: StateFolder,
    installed: Installed,
    actions: tuple[PendingAction, ...],
    now: float,
) -> State:
    """Put a verified tree into the destination, durably.

    Args:
        verified: the tree; nothing else is taken.
        entry: says what is preserved and how many versions are kept.
        state: the entry's state.
        folder: where it is saved.
        installed: what the state shall say about the new version.
        actions: what is promised to run, saved together with the result.
        now: the time that counts as the verification of the destination.

    Raises:
        NoExchangeError: an exchange does not work there; nothing was changed.
        LocalError: the commit failed; the old tree is in its place.
        UnrecordedError: it was cut off; the journal says how the next start goes on.
    """
    plan = verified.staged.plan
    site = plan.site
    candidate = plan.offer.candidate
    folder.keep_version(
        installed,
        plan.offer.index_bytes,
        candidate.text,
        zstandard.compress(verified.manifest) if verified.manifest else None,
    )
    try:
        syscalls.sync_file_system(verified.staged.tree)
        if site.apply is Apply.ATOMIC:
            state = exchange(
                site,
                state,
                folder,
                Journal(
                    Intent.EXCHANGE,
                    installed,
                    old=identity(site.destination),
                    new=identity(site.new),
                    moves=moves(site, entry),
                    actions=actions,
                    trial=bool(entry.health_check),
                ),
            )
        else:
            journal = Journal(Intent.IN_PLACE, installed, actions=actions)
            state = _recorded(replace(state, journal=journal), identity(site.destination))
    except OSError as error:
        raise LocalError(f"{error.filename or site.destination}: {error.strerror}") from error
    state = replace(state, last_verify=now)
    folder.save(state)
    folder.before.unlink(missing_ok=True)
    return state


def moves(site: Site, entry: Entry) -> tuple[str, ...]:
    """The preserved paths that are in the destination now.

    Raises:
        LocalError: one cannot be moved.
    """
    found = tuple(path for path in entry.preserve if os.path.lexists(site.destination / path))
    for path in found:
        place = site.destination / path
        if is_mount_point(place):
            raise LocalError(
                f"{place} is a mount point, and preserved paths are moved from version to"
                " version: mount it outside of the destination, and link to it"
            )
        for node in (place, place.parent):
            if syscalls.is_unchangeable(node):
                raise LocalError(
                    f"{node} is immutable or append-only, and the preserved {path} has to be"
                    f" moved to the new version: chattr -ia {node}"
                )
    return found


def exchange(site: Site, state: State, folder: StateFolder, journal: Journal) -> State:
    """Exchange a staged tree with the destination, around it the journal's two writes.

    Raises:
        NoExchangeError: it cannot work here; the journal is taken back.
        OSError: it failed; the journal is taken back.
        LocalError: the same: a preserved path cannot be moved.
        UnrecordedError: it was cut off; the journal says how the next start goes on.
    """
    journal = replace(journal, token=make_staging(site))
    folder.save(replace(state, journal=journal))
    tree = site.staging / journal.tree
    try:
        if journal.old is None:
            syscalls.rename_noreplace(tree, site.destination)
        else:
            syscalls.exchange(tree, site.destination)
    except OSError as error:
        folder.save(state)
        if error.errno in syscalls.NO_EXCHANGE:
            raise NoExchangeError(f"{site.destination}: {error.strerror}") from error
        raise
    with _journalled(site):
        sync_folder(site.destination.parent)
        sync_folder(site.staging)
    try:
        move_preserved(tree, site.destination, journal.moves)
    except (OSError, LocalError):
        with _journalled(site):
            move_preserved(site.destination, tree, journal.moves)
            syscalls.exchange(tree, site.destination)
            sync_folder(site.destination.parent)
            sync_folder(site.staging)
        folder.save(state)
        raise
    with _journalled(site):
        return complete(site, replace(state, journal=journal))


@contextlib.contextmanager
def _journalled(site: Site) -> Iterator[None]:
    """What fails in here is gone on with by the next start, as the journal says."""
    try:
        yield
    except (OSError, LocalError) as error:
        raise UnrecordedError(f"{site.destination}: the exchange was cut off: {error}") from error


def complete(site: Site, state: State) -> State:
    """What follows an exchange that has happened: preserved paths, the old tree kept aside.

    Every step is done or not done by itself, so it can be repeated after a power cut. The
    result is not saved here.
    """
    journal = state.journal
    assert journal is not None
    tree = site.staging / journal.tree
    move_preserved(tree, site.destination, journal.moves)
    old = state.installed
    previous = tuple(kept for kept in state.previous if kept.folder != journal.tree)
    if journal.old is None:
        pass
    elif old is not None and old.digest != journal.installed.digest:
        kept = site.previous(old)
        if identity(tree) is not None:
            remove(kept)
            tree.rename(kept)
            sync_folder(site.staging)
        # Where the tree is gone, a start before this one has come as far as here.
        previous = (
            Kept(kept.name, old, journal.moves),
            *(other for other in previous if other.folder != kept.name),
        )
    elif not _holds_preserved(tree, journal.moves):
        # What stood there is no version to go back to: a tree that somebody put there, or
        # one that drifted from the version that was just repaired.
        remove(tree)
    return replace(_recorded(state, identity(site.destination)), previous=previous)


def _holds_preserved(tree: Path, moves: tuple[str, ...]) -> bool:
    return any(os.path.lexists(tree / path) for path in moves)


def _recorded(state: State, root: Identity | None) -> State:
    journal = state.journal
    assert journal is not None
    return replace(
        state,
        installed=replace(journal.installed, root=root),
        journal=None,
        pending=(*state.pending, *journal.actions),
        trial=0 if journal.trial else None,
        trial_boot="",
        bad=(*state.bad, *journal.bad),
        held=journal.hold,
        refused=None,
        last_error=None,
    )


def move_preserved(source: Path, target: Path, moves: tuple[str, ...]) -> None:
    """Move what belongs to the device from one tree into the other, never copying it.

    Each path is one renameat2 that does not replace; what has moved already is left alone.

    Raises:
        LocalError: a path is in both trees, which no step of this program makes.
    """
    for path in moves:
        here, there = source / path, target / path
        if not os.path.lexists(here):
            continue
        _make_parents(source, target, Path(path).parent)
        times = there.parent.stat()
        try:
            syscalls.rename_noreplace(here, there)
        except FileExistsError as error:
            raise LocalError(
                f"{there}: preserved, but it is in the new tree too; the old one is {here}"
            ) from error
        with contextlib.suppress(PermissionError):
            os.utime(there.parent, ns=(times.st_atime_ns, times.st_mtime_ns))
        sync_folder(there.parent)
        sync_folder(here.parent)


def _make_parents(source: Path, target: Path, folder: Path) -> None:
    for path in reversed((folder, *folder.parents)):
        if not (target / path).is_dir():
            status = (source / path).stat()
            (target / path).mkdir(mode=status.st_mode & 0o7777)
            os.chown(target / path, status.st_uid, status.st_gid)


def recover(site: Site, state: State, folder: StateFolder, say: Callable[[str], None]) -> State:
    """Complete or undo what a cut left, before anything else is done.

    Args:
        site: the entry's place.
        state: as it was loaded.
        folder: where it is saved.
        say: told in words what was found, if anything.

    Raises:
        LocalError: it cannot be told what stands in the destination.
    """
    journal = state.journal
    if journal is None or journal.intent is Intent.IN_PLACE:
        # An update in place is finished by the cycle: it knows the destination as no version.
        return state
    if _happened(site, journal, folder):
        say(f"the exchange to {journal.installed.version} had happened: completing it")
        state = complete(site, state)
    else:
        say(f"the exchange to {journal.installed.version} had not happened yet: undone")
        state = replace(state, journal=None)
    folder.save(state)
    return state


def _happened(site: Site, journal: Journal, folder: StateFolder) -> bool:
    """Which tree is in the destination: by token and inode, and by digest where unclear.

    Device numbers may change with a reboot, inode numbers of one file system do not; the
    token says that it is the same file system and folder.
    """
    here = identity(site.destination)
    assert journal.new is not None
    try:
        same_place = site.token_file.read_text(encoding="ascii") == journal.token
    except OSError:
        same_place = False
    if same_place:
        if here is None or (journal.old is not None and here.inode == journal.old.inode):
            return False
        if here.inode == journal.new.inode:
            return True
    file = folder.index(journal.installed)
    try:
        archive_digest(site.destination, index_format.parse(file.read_bytes(), str(file)))
    except (ContentError, OSError):
        return False
    return True

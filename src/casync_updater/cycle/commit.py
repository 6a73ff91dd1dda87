"""The fifth room: the new tree takes the old one's place, and the state says so.

The only step that is neither resumable nor repeatable, so it is atomic: sync, intent, one
renameat2, result. An exchange is its own inverse: recovery never repeats it because of the
journal alone, but looks which of the two trees stands where.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import zstandard

from casync_updater import syscalls
from casync_updater.cycle.record import version_differences
from casync_updater.cycle.staging import Site, identity, make_staging, mounts_below, remove
from casync_updater.cycle.tree import holds, obstacle
from casync_updater.cycle.values import Verified
from casync_updater.errors import ContentError, LocalError
from casync_updater.files import sync_folder
from casync_updater.formats.record import Record
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


def begin_in_place(state: State, folder: StateFolder, installed: Installed) -> State:
    """Mark a destination as being written, before the first write.

    Until `commit` records the result, every start knows that the destination is no version.
    """
    journal = Journal(Intent.IN_PLACE, installed, replaced=standing(state))
    state = replace(state, journal=journal, installed=None, last_verify=None)
    folder.save(state)
    return state


def standing(state: State) -> Installed | None:
    """The version that was the last one in the destination, whatever stands there now."""
    if state.installed is None and state.journal is not None:
        return state.journal.replaced
    return state.installed


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
        LocalError: the commit failed. Where the saved state has no journal, nothing was
            changed; where it has one, `recover` finds out.
        UnrecordedError: the journal says how the next start goes on.
    """
    plan = verified.staged.plan
    site = plan.site
    try:
        folder.keep_version(
            installed,
            plan.offer.index_bytes,
            plan.offer.candidate.text,
            _knowledge(verified),
            signed=plan.offer.candidate.signed,
        )
        if verified.staged.built is not None:
            # Nothing has touched the inodes of the new tree since they were recorded.
            state = replace(state, windows=())
        # The companions were synced with all else on their file system.
        if verified.staged.tree.stat().st_dev != folder.path.stat().st_dev:
            syscalls.sync_file_system(verified.staged.tree)
        if site.apply is Apply.ATOMIC:
            journal = Journal(
                Intent.EXCHANGE,
                installed,
                moves=entry.preserve,
                actions=actions,
                trial=bool(entry.health_check),
                hold=state.held,
            )
            return exchange(site, state, folder, journal, now=now)
        journal = Journal(Intent.IN_PLACE, installed, actions=actions, hold=state.held)
        state = _recorded(replace(state, journal=journal), identity(site.destination))
    except OSError as error:
        raise LocalError(f"{error.filename or site.destination}: {error.strerror}") from error
    state = replace(state, last_verify=now)
    folder.save(state)
    return state


def _knowledge(verified: Verified) -> Record | bytes | None:
    """What is kept of a version beside its index: a record where there is one."""
    if verified.staged.built is not None:
        return verified.staged.built.record
    return zstandard.compress(verified.manifest) if verified.manifest else None


def exchange(
    site: Site, state: State, folder: StateFolder, journal: Journal, *, now: float
) -> State:
    """Exchange a staged tree with the destination, around it the journal's two writes.

    Args:
        site: the destination.
        state: the entry's state.
        folder: where it is saved.
        journal: what happens; the identities of both trees are added here.
        now: the time that counts as the verification of the destination.

    Raises:
        NoExchangeError: it cannot work here; the journal is taken back.
        LocalError: something in the staged tree or in the destination is in the way.
        OSError: it failed, and the destination is as it was.
        UnrecordedError: it was cut off; the journal says how the next start goes on.
    """
    staged = site.staging / journal.folder
    _demand_free_way(site, staged, journal.moves)
    journal = replace(
        journal,
        token=make_staging(site),
        old=identity(site.destination),
        new=identity(staged),
    )
    announced = replace(state, journal=journal)
    folder.save(announced)
    try:
        if journal.old is None:
            syscalls.rename_noreplace(staged, site.destination)
        else:
            syscalls.exchange(staged, site.destination)
    except OSError as error:
        folder.save(state)
        if error.errno in syscalls.NO_EXCHANGE:
            raise NoExchangeError(f"{site.destination}: {error.strerror}") from error
        raise
    with _journalled(site):
        sync_folder(site.destination.parent)
        sync_folder(site.staging)
    try:
        move_preserved(staged, site.destination, journal.moves)
    except (OSError, LocalError):
        # A full disk, say: a folder of the new tree cannot take a name more. Unlike a kill that
        # is no matter of going on, so all goes back.
        with _journalled(site):
            move_preserved(site.destination, staged, journal.moves)
            syscalls.exchange(staged, site.destination)
            sync_folder(site.destination.parent)
            sync_folder(site.staging)
        folder.save(state)
        raise
    with _journalled(site):
        state = replace(complete(site, announced), last_verify=now)
    folder.save(state)
    return state


@contextlib.contextmanager
def _journalled(site: Site) -> Iterator[None]:
    """What fails in here is gone on with by the next start, as the journal says."""
    try:
        yield
    except (OSError, LocalError) as error:
        raise UnrecordedError(f"{site.destination}: the exchange was cut off: {error}") from error


def _demand_free_way(site: Site, staged: Path, moves: tuple[str, ...]) -> None:
    """What would stop the moves after the exchange has to stop it before."""
    if mounts := mounts_below(site.destination):
        raise LocalError(
            f"{mounts[0]} is a mount point in {site.destination}, and would leave with the old"
            " tree: mount it elsewhere"
        )
    for path in moves:
        for node in (site.destination / path, (site.destination / path).parent):
            if os.path.lexists(node) and syscalls.is_unchangeable(node):
                raise LocalError(
                    f"{node} is immutable or append-only, and the preserved {path} has to be moved"
                    f" to the new version: chattr -ia {node}"
                )
        if (found := obstacle(staged, path)) is not None:
            raise LocalError(
                f"{staged} contains {found}, and the entry preserves {path} for the device: take"
                " it out of preserve"
            )


def complete(site: Site, state: State) -> State:
    """What follows an exchange that has happened: preserved paths, the old tree kept aside.

    Every step is done or not done by itself, so it can be repeated after a power cut. The
    result is not saved here.
    """
    journal = state.journal
    assert journal is not None
    aside = site.staging / journal.folder
    move_preserved(aside, site.destination, journal.moves)
    previous = tuple(kept for kept in state.previous if kept.folder != journal.folder)
    # What is no version to go back to stays where it is, until the staging folder is swept: a
    # tree that somebody put there, or one that drifted from the version that was repaired.
    if (old := _version_aside(state)) is not None:
        kept = site.previous(old)
        if identity(aside) is not None:
            remove(kept)
            aside.rename(kept)
            sync_folder(site.staging)
        if _same_inode(identity(kept), journal.old):
            previous = (
                Kept(kept.name, old, journal.moves, left=bool(journal.hold or journal.bad)),
                *(other for other in previous if other.folder != kept.name),
            )
    return replace(_recorded(state, identity(site.destination)), previous=previous)


def _version_aside(state: State) -> Installed | None:
    """The version that an exchange took out of the destination, if it was one."""
    old, journal = state.installed, state.journal
    assert journal is not None
    if old is None or old.digest == journal.installed.digest:
        return None
    return old if old.root is None or _same_inode(old.root, journal.old) else None


def _same_inode(first: Identity | None, second: Identity | None) -> bool:
    """Device numbers may change with a reboot, inode numbers of one file system do not."""
    return first is not None and second is not None and first.inode == second.inode


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
        if not holds(source, path):
            continue
        _make_parents(source, target, Path(path).parent)
        with _same_times(there.parent):
            try:
                syscalls.rename_noreplace(here, there)
            except FileExistsError as error:
                raise LocalError(
                    f"{there}: preserved, but it is in the new tree too; the old one is {here}"
                ) from error
        sync_folder(there.parent)
        sync_folder(here.parent)


def _make_parents(source: Path, target: Path, folder: Path) -> None:
    for path in reversed((folder, *folder.parents)):
        there = target / path
        if there.is_dir():
            continue
        status = (source / path).stat()
        with _same_times(there.parent):
            there.mkdir(mode=0o700)
        os.chown(there, status.st_uid, status.st_gid)
        there.chmod(stat.S_IMODE(status.st_mode))


@contextlib.contextmanager
def _same_times(folder: Path) -> Iterator[None]:
    """Leave a folder of the new tree with the times that the archive gave it."""
    status = folder.stat()
    yield
    with contextlib.suppress(PermissionError):
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))


def recover(
    site: Site, state: State, entry: Entry, folder: StateFolder, say: Callable[[str], None]
) -> State:
    """Complete or undo what a cut left, before anything else is done.

    Args:
        site: the entry's place.
        entry: whose it is.
        state: as it was loaded.
        folder: where it is saved.
        say: told in words what was found, if anything.

    Raises:
        LocalError: what follows an exchange cannot be completed, or the state not be saved.
        OSError: likewise.
    """
    journal = state.journal
    if journal is None or journal.intent is Intent.IN_PLACE:
        # An update in place is finished by the cycle: it knows the destination as no version.
        return state
    name = journal.installed.version or journal.installed.digest[:12]
    if _happened(site, journal, entry, folder):
        say(f"the exchange to {name} had happened: completing it")
        state = replace(complete(site, state), last_verify=None)
    else:
        say(f"the exchange to {name} had not happened yet: undone")
        state = replace(state, journal=None)
    folder.save(state)
    return state


def _happened(site: Site, journal: Journal, entry: Entry, folder: StateFolder) -> bool:
    """Which tree is in the destination: by token and inode, and by content where unclear.

    The token says that it is the same file system and folder. A tree in the staging folder that
    holds a preserved path is the old one in any case: no new tree has one.
    """
    assert journal.new is not None
    if any(holds(site.staging / journal.folder, path) for path in journal.moves):
        return True
    here = identity(site.destination)
    try:
        same_place = site.token_file.read_text(encoding="ascii") == journal.token
    except (OSError, ValueError):
        same_place = False
    if here is None:
        return False
    if same_place:
        if _same_inode(here, journal.old):
            return False
        if _same_inode(here, journal.new):
            return True
    try:
        found = version_differences(
            site.destination, journal.installed, entry, folder, journal.moves
        )
        return next(found, None) is None
    except ContentError:
        return False

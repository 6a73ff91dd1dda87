"""The second room: what must be fetched, and how much space it takes. Nothing is written."""

import contextlib
import os
from pathlib import Path

from casync_updater import syscalls
from casync_updater.cycle.record import kept_index, kept_manifest
from casync_updater.cycle.staging import Site, identity, mounts_below
from casync_updater.cycle.values import Offer, Plan
from casync_updater.errors import ContentError, LocalError, SpaceError
from casync_updater.formats import mtree
from casync_updater.model import Apply, ChunkRef, Installed
from casync_updater.state import State, StateFolder
from casync_updater.tools import casync

_RESERVE = 4 << 20
"""Bytes that stay free on a file system that is written to: journals and folders grow."""


def plan(
    offer: Offer,
    site: Site,
    state: State,
    folder: StateFolder,
    *,
    spool: Path,
    preserve: tuple[str, ...],
) -> Plan:
    """Compare an offer with what the destination has, and make sure that it fits.

    Args:
        offer: what shall be installed.
        site: where.
        state: says which version is in the destination.
        folder: has that version's index.
        spool: where fetched chunks wait for the builder.
        preserve: paths in the destination that no archive has anything to do with.

    Raises:
        LocalError: preserved paths in a destination that cannot be exchanged, or a mount point.
        SpaceError: a file system has too little room; with the figures.
    """
    if preserve and site.apply is Apply.IN_PLACE:
        raise LocalError(
            f"{site.destination} is updated in place ({site.why}), and that would remove the"
            f" preserved {preserve[0]}: take preserve out of the entry, or move the destination"
        )
    if mounts := mounts_below(site.destination):
        raise LocalError(
            f"{mounts[0]} is a mount point in {site.destination}: what is mounted there would be"
            " deleted or leave with the old tree: mount it elsewhere"
        )
    old = _known(offer, site, state)
    have: frozenset[bytes] = frozenset()
    if old is not None:
        try:
            have = frozenset(ref.id for ref in kept_index(folder, old))
        except ContentError:
            old = None
    before = _before(offer, site, old or _cut_off(state), folder, preserve)
    fetch = lacking(offer, have)
    size = sum(ref.size for ref in fetch)
    space = offer.index.size if site.apply is Apply.ATOMIC else size
    result = Plan(offer, site, old, before, fetch, size, space)
    _demand_space(result, spool)
    return result


def lacking(offer: Offer, have: frozenset[bytes]) -> tuple[ChunkRef, ...]:
    """An offer's chunks that are not among the ids that are there, each id once."""
    fetch: dict[bytes, ChunkRef] = {}
    for ref in offer.index:
        if ref.id not in have:
            fetch.setdefault(ref.id, ref)
    return tuple(fetch.values())


def _known(offer: Offer, site: Site, state: State) -> Installed | None:
    """The version that the state vouches for in the destination, if it is untouched there."""
    installed = state.installed
    if offer.repair or installed is None or state.journal is not None:
        return None
    found = identity(site.destination)
    if found is None or installed.root is None or found.inode != installed.root.inode:
        return None
    return installed


def _cut_off(state: State) -> Installed | None:
    """The version that an unfinished update in place began to replace.

    What the cut update has written already is a change as well, whose actions have not run.
    """
    return None if state.journal is None else state.journal.replaced


def _before(
    offer: Offer, site: Site, old: Installed | None, folder: StateFolder, preserve: tuple[str, ...]
) -> bytes:
    """The manifest of what was in the destination: the kept one, or one made now."""
    if not offer.is_archive or not site.destination.exists():
        return b""
    if old is not None:
        with contextlib.suppress(ContentError):
            return kept_manifest(folder, old)
    kept = tuple(mtree.escape(os.fsencode(path)).encode() for path in preserve)
    with casync.mtree(site.destination, flags=offer.index.flags) as pieces:
        lines = b"".join(pieces).splitlines(keepends=True)
    return b"".join(line for line in lines if not _belongs(line.split(b" ")[0], kept))


def _belongs(path: bytes, kept: tuple[bytes, ...]) -> bool:
    return any(path == other or path.startswith(other + b"/") for other in kept)


def _demand_space(plan: Plan, spool: Path) -> None:
    needs: dict[int, tuple[Path, int]] = {}
    for path, size in (
        (plan.site.destination.parent, plan.space),
        (_existing(spool), plan.fetch_size),
    ):
        device = path.stat().st_dev
        known = needs.get(device, (path, 0))
        needs[device] = (known[0], known[1] + size)
    for path, size in needs.values():
        free = syscalls.free_space(path)
        if size + _RESERVE > free:
            raise SpaceError(
                f"{path}: {plan.offer.candidate.version} needs {(size + _RESERVE) / 1e6:.1f} MB"
                f" there, and {free / 1e6:.1f} MB are free: make room"
            )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path

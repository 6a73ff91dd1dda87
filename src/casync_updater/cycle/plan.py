"""The second room: what must be fetched, and how much space it takes. Nothing is written."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from casync_updater import syscalls
from casync_updater.cycle.builders.extractor import leftovers
from casync_updater.cycle.extract import plan_extract, rebuild_record, supported
from casync_updater.cycle.record import kept_index, kept_manifest
from casync_updater.cycle.staging import Site, identity, mounts_below
from casync_updater.cycle.values import Offer, Plan
from casync_updater.errors import ContentError, LocalError, SpaceError
from casync_updater.formats import index as index_format
from casync_updater.formats import mtree
from casync_updater.formats.record import Record, load
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
    stack: contextlib.ExitStack,
) -> Plan:
    """Compare an offer with what the destination has, and make sure that it fits.

    Args:
        offer: what shall be installed.
        site: where.
        state: says which version is in the destination.
        folder: has that version's index.
        spool: where fetched chunks wait for the builder.
        preserve: paths in the destination that no archive has anything to do with.
        stack: closes what the plan holds open, when the new tree is built.

    Raises:
        LocalError: preserved paths in a destination that cannot be exchanged, a mount point, or
            something that cannot be written to.
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
    _demand_writable(site)
    old = _known(offer, site, state)
    if offer.is_archive and site.apply is Apply.ATOMIC and supported(offer.index) is None:
        result = _extraction(offer, site, old, _Kept(state, folder, spool), stack)
    else:
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


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept of an entry: its state, the folder of that, and where chunks wait."""

    state: State
    folder: StateFolder
    spool: Path


def _extraction(
    offer: Offer,
    site: Site,
    old: Installed | None,
    kept: "_Kept",
    stack: contextlib.ExitStack,
) -> Plan:
    """A plan for the project's own extractor, with the record of what is in the destination."""
    root, record = -1, None
    if site.destination.exists():
        root = os.open(site.destination, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, root)
        record = _kept_record(site, old, kept.folder, root)
        if record is None and any(site.destination.iterdir()):
            record = _surveyed(offer, site, kept.spool, root)
    extract = plan_extract(
        offer.index,
        record,
        root,
        windows=kept.state.windows if old is not None else (),
        leftovers=leftovers(site, offer.index, stack),
    )
    return Plan(
        offer,
        site,
        old,
        b"",
        tuple(extract.refs()),
        extract.fetch_bytes,
        extract.write_bytes,
        extract,
    )


def _kept_record(
    site: Site, old: Installed | None, folder: StateFolder, root: int
) -> Record | None:
    """The record of the installed version; made again from the tree where it was lost."""
    if old is None:
        return None
    with contextlib.suppress(ContentError):
        record = load(folder.record(old))
        if record is not None:
            return record
        index = kept_index(folder, old)
        if supported(index) is None:
            with casync.stream_archive(site.destination, flags=index.flags) as pieces:
                return rebuild_record(index, pieces, root)
    return None


def _surveyed(offer: Offer, site: Site, spool: Path, root: int) -> Record | None:
    """The record of a tree that nothing is known of: an image brought it, or it drifted.

    casync cuts it into chunks as it would the new archive, so that what both have is taken over.
    """
    index = offer.index
    spool.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=spool.parent, prefix="seed-") as name:
        seed = Path(name) / "seed.caidx"
        casync.make(
            seed,
            site.destination,
            store=Path(name) / "seed.castr",
            flags=index.flags,
            chunk_size=index.chunk_size_option,
        )
        found = index_format.parse(seed.read_bytes(), str(seed))
    try:
        with casync.stream_archive(site.destination, flags=index.flags) as pieces:
            return rebuild_record(found, pieces, root)
    except ContentError:
        # Somebody writes to the tree at this moment: everything is fetched.
        return None


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


def _demand_writable(site: Site) -> None:
    """What would only be found out after everything has been fetched."""
    there = site.destination.exists()
    nodes = [site.destination] if there else []
    if site.apply is Apply.ATOMIC or not there:
        nodes.append(site.destination.parent)
    for node in nodes:
        if os.statvfs(node).f_flag & os.ST_RDONLY and not node.is_block_device():
            raise LocalError(f"{node} is on a file system that is mounted read-only: remount it")
        if syscalls.is_unchangeable(node):
            raise LocalError(f"{node} is immutable or append-only: chattr -ia {node}")


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

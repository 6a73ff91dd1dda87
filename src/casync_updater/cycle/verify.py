"""The fourth room: is the staged tree what was offered, and what does it change?"""

import os
from pathlib import Path

from casync_updater.cycle.tree import archive_digest, obstacle
from casync_updater.cycle.values import Staged, Verified
from casync_updater.errors import ContentError
from casync_updater.formats import mtree
from casync_updater.model import Changes
from casync_updater.tools import casync


def verify(staged: Staged, preserve: tuple[str, ...], *, full: bool) -> Verified:
    """Make sure that a staged tree is what was offered.

    Every byte that the own extractor wrote came from a checked chunk, or from a file that the
    record of the last install vouches for. What casync built is read again as a whole, and so
    is everything where nothing but a ``.cks`` says what the index should describe.

    Args:
        staged: what a builder made.
        preserve: paths that belong to the device: an archive must not contain them.
        full: read the whole tree in any case.

    Raises:
        ContentError: the tree is not what was offered, or holds a preserved path.
        LocalError: it cannot be read.
    """
    offer, built = staged.plan.offer, staged.built
    for path in preserve:
        _demand_room(staged.tree, path, offer.candidate.where)
    digest = built.digest if built is not None else None
    if digest is None and (built is None or full or offer.candidate.release is None):
        digest = archive_digest(staged.tree, offer.index)
    expected = offer.candidate.digest
    if expected is not None and digest not in (None, expected):
        raise ContentError(
            f"{offer.candidate.where} says that the archive has the digest {expected}, but its"
            f" index describes {digest}: was it published while it was fetched?"
        )
    digest = digest or expected
    assert digest is not None
    if not offer.is_archive:
        return Verified(staged, digest, b"", Changes(changed=(b".",)))
    if built is not None:
        return Verified(staged, digest, b"", without(built.changes, preserve))
    with casync.mtree(staged.tree, flags=offer.index.flags) as pieces:
        manifest = b"".join(pieces)
    features = offer.index.features
    where = str(staged.tree)
    before = mtree.parse(staged.plan.before.splitlines(), features, where)
    changes = mtree.diff(before, mtree.parse(manifest.splitlines(), features, where))
    return Verified(staged, digest, manifest, changes)


def without(changes: Changes, preserve: tuple[str, ...]) -> Changes:
    """Changes but for what belongs to the device: it moves along, and is not removed."""
    if not preserve:
        return changes
    kept = tuple(os.fsencode(path) for path in preserve)

    def others(paths: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return tuple(
            path
            for path in paths
            if not any(path == other or path.startswith(other + b"/") for other in kept)
        )

    return Changes(others(changes.added), others(changes.changed), others(changes.removed))


def _demand_room(tree: Path, preserved: str, where: str) -> None:
    """Make sure that what belongs to the device can be moved to its path in the new tree.

    Once the trees are exchanged it is too late to find out.
    """
    found = obstacle(tree, preserved)
    if found == Path(preserved):
        raise ContentError(
            f"{where}: the archive contains {preserved}, which the entry preserves"
            " for the device: take it out of the archive, or out of preserve"
        )
    if found is not None:
        raise ContentError(
            f"{where}: {found} is no folder in the archive, and {preserved} below it is"
            " preserved for the device: change the archive, or take it out of preserve"
        )

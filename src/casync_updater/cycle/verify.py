"""The fourth room: is the staged tree what was offered, and what does it change?"""

from pathlib import Path

from casync_updater.cycle.tree import archive_digest, obstacle
from casync_updater.cycle.values import Staged, Verified
from casync_updater.errors import ContentError
from casync_updater.formats import mtree
from casync_updater.model import Changes
from casync_updater.tools import casync


def verify(staged: Staged, preserve: tuple[str, ...]) -> Verified:
    """Read the whole staged tree, and compare it with the index and the release.

    Args:
        staged: what a builder made.
        preserve: paths that belong to the device: an archive must not contain them.

    Raises:
        ContentError: the tree is not what was offered, or holds a preserved path.
        LocalError: it cannot be read.
    """
    offer = staged.plan.offer
    digest = archive_digest(staged.tree, offer.index)
    expected = offer.candidate.digest
    if expected not in (None, digest):
        raise ContentError(
            f"{offer.candidate.where} says that the archive has the digest {expected}, but its"
            f" index describes {digest}: was it published while it was fetched?"
        )
    if not offer.is_archive:
        return Verified(staged, digest, b"", Changes(changed=(b".",)))
    with casync.mtree(staged.tree, flags=offer.index.flags) as pieces:
        manifest = b"".join(pieces)
    features = offer.index.features
    where = str(staged.tree)
    before = mtree.parse(staged.plan.before.splitlines(), features, where)
    changes = mtree.diff(before, mtree.parse(manifest.splitlines(), features, where))
    for path in preserve:
        _demand_room(staged.tree, path, offer.candidate.where)
    return Verified(staged, digest, manifest, changes)


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

"""Removing what no release needs any more, only where `keep` is set.

What is garbage is removed a grace period after it became garbage, since clients may be in the
middle of a download.
"""

from dataclasses import dataclass
from pathlib import Path

from casync_updater.errors import ContentError, LocalError
from casync_updater.server import record
from casync_updater.server.places import Store

GRACE = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Pruned:
    """How much was removed."""

    chunks: int
    bytes: int


def prune_store(store: Store, now: float) -> Pruned:
    """Remove chunks that nobody has needed for the grace period.

    Raises:
        LocalError: it is not known what is needed; nothing is removed.
    """
    alive = record.alive_chunks(store.path)
    garbage = {hex_id: path for hex_id, path in store.chunks() if hex_id not in alive}
    seen = record.read_garbage(store.path).seen(garbage, now)
    doomed = [garbage[hex_id] for hex_id in seen.older(now - GRACE)]
    size = sum(path.stat().st_size for path in doomed)
    store.remove(doomed)
    record.write_garbage(store.path, seen.without(seen.older(now - GRACE)))
    return Pruned(len(doomed), size)


def prune_by_hash(folder: Path, now: float) -> None:
    """Remove files below ``by-hash`` that no release has listed for the grace period.

    Raises:
        LocalError: a release cannot be read; nothing is removed.
    """
    place = folder / "by-hash" / "SHA256"
    alive = alive_files(folder)
    garbage = {path.name for path in place.iterdir() if path.name not in alive}
    seen = record.read_garbage(folder).seen(garbage, now)
    for name in seen.older(now - GRACE):
        (place / name).unlink(missing_ok=True)
    record.write_garbage(folder, seen.without(seen.older(now - GRACE)))


def alive_files(folder: Path) -> set[str]:
    """The SHA-256 of every file that a kept or current release in a folder lists.

    Raises:
        LocalError: a release cannot be read.
    """
    alive = record.read_folder(folder).files()
    for path in folder.glob("*.release"):
        try:
            alive.update(record.Kept.of(record.read_release(path)).files)
        except (OSError, ContentError) as error:
            raise LocalError(f"nothing below {folder}/by-hash is removed: {error}") from error
    return alive


def sweep(store: Store, since: int) -> None:
    """Remove what a failed publication wrote and no index needs.

    Args:
        store: its lock is held, so no other publisher is writing.
        since: the store's time (ns) when that publication began.

    Raises:
        LocalError: it is not known what is needed; no chunk is removed.
    """
    store.remove_temporaries()
    alive = record.alive_chunks(store.path)
    store.remove(
        [
            path
            for hex_id, path in store.chunks()
            if hex_id not in alive and path.stat().st_ctime_ns >= since
        ]
    )

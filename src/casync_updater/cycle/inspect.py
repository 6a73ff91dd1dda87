"""Looking at a drive without a device: is everything on it what a publisher signed?"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from casync_updater.clock import Clock
from casync_updater.cycle.check import BUILD_DATE
from casync_updater.cycle.demands import SLOTS, Demands, Vouched, read_slots
from casync_updater.errors import (
    ContentError,
    LocalError,
    MissingError,
    RemoteError,
    TrustError,
    UpdaterError,
)
from casync_updater.formats import index as index_format
from casync_updater.formats.store import LocalStore, content, file_limit, path_of
from casync_updater.model import ChunkRef, Location
from casync_updater.release import Freshness, best_clock, freshness
from casync_updater.sources.local import LocalSource

_PREFIX = re.compile(r"[0-9a-f]{4}")


@dataclass(frozen=True, slots=True)
class Inspected:
    """One release on a drive.

    Attributes:
        index: the index that it is beside.
        vouched: the release; None where there is none that counts.
        chunks: how many chunks it has.
        error: the gravest thing that is wrong with it.
    """

    index: Path
    vouched: Vouched | None
    chunks: int = 0
    error: UpdaterError | None = None


def inspect(folder: Path, keyrings: Sequence[Path], clock: Clock) -> Iterator[Inspected]:
    """Read everything that a folder publishes.

    Args:
        folder: the root of a drive or site; folders in it are looked at as well.
        keyrings: who must have signed; none demands no signatures.
        clock: judges expiry.
    """
    stores = sorted(path for path in folder.rglob("*") if _is_store(path))
    beside = {
        path.with_name(path.name.removesuffix(suffix))
        for suffix in SLOTS
        for path in folder.rglob(f"*{suffix}")
    }
    lone = {path for end in (".caidx", ".caibx") for path in folder.rglob(f"*{end}")}
    for index in sorted(beside | lone):
        if not index.name.startswith("."):
            yield _inspect(index, stores, keyrings, clock)


def _is_store(path: Path) -> bool:
    return path.is_dir() and any(
        _PREFIX.fullmatch(inner.name) and inner.is_dir() for inner in path.iterdir()
    )


def _inspect(
    index: Path, stores: Sequence[Path], keyrings: Sequence[Path], clock: Clock
) -> Inspected:
    source = LocalSource(Location(str(index), str(index.parent)), clock)
    now = best_clock(clock.time(), BUILD_DATE)
    demands = Demands(keyrings, signature=bool(keyrings), project=None, now=now.time)
    vouched: Vouched | None = None
    try:
        slots = read_slots(source, demands)
        vouched = slots.newest
        if vouched is None:
            raise slots.torn or MissingError(f"{index}: there is no release beside it")
        release = vouched.release
        if freshness(release, now) is Freshness.EXPIRED:
            raise TrustError(
                "expiry", expected="a valid release", found="an expired one", where=vouched.where
            )
        parsed = index_format.parse(source.by_hash(release.index, ""), str(index))
        if release.mtree is not None:
            source.by_hash(release.mtree, ".mtree")
        for ref in {ref.id: ref for ref in parsed}.values():
            _demand_chunk(ref, parsed, stores)
    except TrustError as error:
        return Inspected(index, vouched, error=error)
    except (ContentError, RemoteError) as error:
        return Inspected(index, vouched, error=LocalError(str(error)))
    return Inspected(index, vouched, len(parsed))


def _demand_chunk(ref: ChunkRef, index: index_format.Index, stores: Sequence[Path]) -> None:
    """Find a chunk in any of the stores.

    Raises:
        ContentError: there are only wrong bytes.
        MissingError: it is in none of them.
    """
    failure: ContentError | RemoteError = MissingError(f"chunk {ref.hex} is in no store")
    for store in stores:
        where = str(store / path_of(ref.hex))
        try:
            content(LocalStore(store).read(ref.hex, file_limit(ref.size)), ref, index, where)
        except MissingError:
            continue
        except (ContentError, RemoteError) as error:
            failure = error
            continue
        return
    raise failure

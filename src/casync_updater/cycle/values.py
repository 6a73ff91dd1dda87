"""What the rooms of the cycle hand to each other."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from casync_updater.cycle.staging import Site
from casync_updater.errors import UpdaterError
from casync_updater.formats.index import Index
from casync_updater.model import (
    Changes,
    ChunkRef,
    FileRef,
    Installed,
    Location,
    Origin,
    Release,
)


@dataclass(frozen=True, slots=True)
class UpToDate:
    """There is nothing to install.

    Attributes:
        where: who said so.
        note: what the operator should know (held, marked bad, a stale mirror), if anything.
    """

    where: str
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """A version that shall be installed, with its checked index.

    Attributes:
        origin: which of the entry's two places offers it.
        location: that place.
        release: what the publisher says; None in the old layout.
        text: the release as published, byte for byte.
        signed: a signature was verified.
        index: the parsed index.
        index_bytes: its bytes, checked against the release.
        index_sha256: their hash.
        digest: the archive digest that the tree must have; None where nobody says.
        where: the release's (or index's) address, for messages.
        repair: the installed version itself, because the destination drifted from it.
    """

    origin: Origin
    location: Location
    release: Release | None
    text: bytes | None
    signed: bool
    index: Index
    index_bytes: bytes
    index_sha256: str
    digest: str | None
    where: str
    repair: bool = False

    @property
    def version(self) -> str:
        """How messages name it."""
        return self.release.version if self.release else f"index {self.index_sha256[:12]}"

    @property
    def mtree(self) -> FileRef | None:
        """The published manifest that the release vouches for."""
        return self.release.mtree if self.release else None


@dataclass(frozen=True, slots=True)
class Checked:
    """The check's result, with what went wrong at sources that others stood in for."""

    outcome: UpToDate | Offer
    failures: tuple[UpdaterError, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What installing an offer takes. Sizes in bytes, uncompressed.

    Attributes:
        offer: what is installed.
        site: where it goes.
        old: the version in the destination, where the state vouches for it.
        fetch: the chunks that the destination does not have, in the order of the stream, each
            id once.
        fetch_size: the sum of their sizes.
        space: bytes that the destination's file system must have free.
    """

    offer: Offer
    site: Site
    old: Installed | None
    fetch: tuple[ChunkRef, ...]
    fetch_size: int
    space: int


@dataclass(frozen=True, slots=True)
class Staged:
    """The new tree, complete, beside the destination (or in it, where it is in place)."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Verified:
    """A staged tree whose bytes are those of the offer. Made by `verify` only.

    Attributes:
        staged: the tree.
        digest: the archive digest that the tree was found to have.
        manifest: its mtree lines.
        changes: what differs from the version before.
    """

    staged: Staged
    digest: str
    manifest: bytes
    changes: Changes = field(default_factory=Changes)


@dataclass(frozen=True, slots=True)
class Committed:
    """The new tree is in the destination, and the state says so."""

    verified: Verified
    installed: Installed


class Chunks(Protocol):
    """Verified chunks, from wherever they are nearest."""

    def get(self, ref: ChunkRef) -> bytes:
        """The bytes of one chunk.

        Raises:
            ContentError: no source has the right bytes.
            RemoteError: no source can be reached.
        """

    def stream(self, wanted: tuple[ChunkRef, ...]) -> Iterator[tuple[ChunkRef, bytes]]:
        """The bytes of many chunks, in the order asked for, fetched ahead side by side."""


class Builder(Protocol):
    """Makes the new tree."""

    def build(self, plan: Plan, chunks: Chunks) -> Staged:
        """Build what a plan says; resumes what an earlier try left."""

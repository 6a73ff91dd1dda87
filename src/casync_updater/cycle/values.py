"""What the rooms of the cycle hand to each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from casync_updater.cycle.demands import Demands
from casync_updater.cycle.extract import Extracted, ExtractPlan
from casync_updater.cycle.staging import Site
from casync_updater.errors import UpdaterError
from casync_updater.formats.index import Index
from casync_updater.model import Apply, Changes, ChunkRef, Installed, Origin, Release
from casync_updater.sources.base import Chunks, Source


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one source says is current, before its index is fetched.

    Attributes:
        origin: which of the entry's two places it is.
        source: that place, opened.
        release: what the publisher says; None in the old layout.
        text: the release as published, byte for byte.
        signed: a signature was verified.
        digest: the archive digest; None where the source has neither release nor ``.cks``.
        index_bytes: the index, where it had to be read to know what is current.
        where: the address of what was read, for messages.
        remark: why a signature that is there does not count, or why nobody knows whether the
            release has expired; empty where there is nothing to say.
    """

    origin: Origin
    source: Source
    release: Release | None
    text: bytes | None
    signed: bool
    digest: str | None
    index_bytes: bytes | None
    where: str
    remark: str = ""

    @property
    def version(self) -> str:
        """How messages name it."""
        if self.release:
            return self.release.version
        return f"archive {self.digest[:12]}" if self.digest else "an archive without checksum"


@dataclass(frozen=True, slots=True)
class UpToDate:
    """There is nothing to install.

    Attributes:
        candidate: what the source has; the installed version itself where note is None.
        note: why something else is not installed (held, marked bad, an older mirror).
    """

    candidate: Candidate
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Newer:
    """A version that shall be installed."""

    candidate: Candidate


@dataclass(frozen=True, slots=True)
class Checked:
    """The check's result.

    Attributes:
        outcome: what the newest valid release means for the entry.
        demands: what the entry demands of a release now, for the backup drive.
        failures: what went wrong at sources that another stood in for.
        answered: the sources that have a release which counts.
    """

    outcome: UpToDate | Newer
    demands: Demands
    failures: tuple[UpdaterError, ...] = ()
    answered: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Offer:
    """A version that shall be installed, with its checked index.

    Attributes:
        candidate: what the source says.
        index: the parsed index.
        index_bytes: its bytes, checked against the release.
        index_sha256: their hash.
        is_archive: a tree (``.caidx``), not a file or device (``.caibx``).
        repair: it is the installed version itself, since the destination drifted from it.
    """

    candidate: Candidate
    index: Index
    index_bytes: bytes
    index_sha256: str
    is_archive: bool
    repair: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What installing an offer takes. Sizes in bytes, uncompressed.

    Attributes:
        offer: what is installed.
        site: where it goes.
        old: the version in the destination, where the state vouches for it.
        before: the mtree lines of what is in the destination.
        fetch: the chunks that the destination does not have, in the order of the stream, each
            id once.
        fetch_size: the sum of their sizes.
        space: bytes that the destination's file system must have free.
        extract: what the project's own extractor decided; None where casync builds.
    """

    offer: Offer
    site: Site
    old: Installed | None
    before: bytes
    fetch: tuple[ChunkRef, ...]
    fetch_size: int
    space: int
    extract: ExtractPlan | None = None


@dataclass(frozen=True, slots=True)
class Staged:
    """The new tree, complete, beside the destination (or in it, where it is in place)."""

    plan: Plan
    built: Extracted | None = None
    """What the project's own extractor found out; None where casync built."""

    @property
    def tree(self) -> Path:
        """Where it stands."""
        site = self.plan.site
        return site.new if site.apply is Apply.ATOMIC else site.destination


@dataclass(frozen=True, slots=True)
class Verified:
    """A staged tree whose bytes are those of the offer. Made by `verify` only.

    Attributes:
        staged: the tree.
        digest: the archive digest that the tree was found to have.
        manifest: its mtree lines; empty where there is a record instead.
        changes: what differs from the version before.
    """

    staged: Staged
    digest: str
    manifest: bytes
    changes: Changes = field(default_factory=Changes)


class Builder(Protocol):
    """Makes the new tree."""

    def build(self, plan: Plan, chunks: Chunks, begin: Callable[[], None]) -> Staged:
        """Build what a plan says; resumes what an earlier try left.

        Args:
            plan: what is built, and where.
            chunks: gives what the destination does not have.
            begin: called before the first write to a destination that is updated in place.
        """

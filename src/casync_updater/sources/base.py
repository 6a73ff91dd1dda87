"""What every source of releases and chunks can do."""

from dataclasses import dataclass
from typing import Protocol

from casync_updater.model import FileRef, Location


@dataclass(frozen=True, slots=True)
class Validators:
    """What makes the next request for a document conditional; belongs to the stored body."""

    etag: str | None = None
    last_modified: str | None = None

    def __bool__(self) -> bool:
        return bool(self.etag or self.last_modified)


@dataclass(frozen=True, slots=True)
class Document:
    """A document's body, and what to ask with the next time."""

    body: bytes
    validators: Validators
    where: str
    """The URL or path it was read from, as messages name it."""


class Source(Protocol):
    """One place that holds an index, its companions and a chunk store.

    Every method raises `MissingError` where the file is not there, another `RemoteError` where
    the source cannot be reached or does not behave, and reads no more than it was told to.
    """

    location: Location

    def document(
        self, suffix: str, *, limit: int, known: Validators | None = None
    ) -> Document | None:
        """The index (suffix ``""``) or a file beside it (``".release"``, ``".cks"``...).

        Args:
            suffix: what is appended to the index's own name.
            limit: bytes after which the body is refused (`ContentError`).
            known: validators of a body that the caller has.

        Returns:
            None where the body that the caller has is still the current one.
        """

    def by_hash(self, ref: FileRef, suffix: str) -> bytes:
        """A file that a release lists, by its SHA-256; the name beside the index as fallback.

        Raises:
            ContentError: what is there has another hash or size.
        """

    def chunk(self, hex_id: str, *, limit: int) -> bytes:
        """A chunk's file as it stands in the store, compressed or not, unverified.

        Args:
            hex_id: the chunk's id.
            limit: bytes after which the body is refused (`ContentError`).
        """

    def close(self) -> None:
        """Give connections back."""

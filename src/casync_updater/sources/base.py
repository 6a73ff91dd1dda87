"""What every source of releases and chunks can do."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from casync_updater.errors import ContentError, MissingError
from casync_updater.model import ChunkRef, FileRef, Location


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
    Chunks may be asked for by several threads at once.
    """

    location: Location

    @property
    def received(self) -> int:
        """Bytes of bodies that came from this source so far, failed attempts included."""

    @property
    def round_trip(self) -> float:
        """Seconds from a request to the beginning of its answer, at best; 0 where nothing waits."""

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

    def abort(self) -> None:
        """End what other threads are asking for, with a `RemoteError`; later requests work."""

    def close(self) -> None:
        """Give connections back."""


class Chunks(Protocol):
    """Verified chunks, from wherever they are nearest."""

    def get(self, ref: ChunkRef) -> bytes:
        """The bytes of one chunk.

        Raises:
            ContentError: no source has the right bytes.
            RemoteError: no source can be reached.
        """

    def stream(self, wanted: Iterable[ChunkRef]) -> Iterator[tuple[ChunkRef, bytes]]:
        """The bytes of many chunks, in the order asked for, fetched ahead side by side."""


def shown(address: str) -> str:
    """A URL or path for messages and logs: without credentials, which a query may be too."""
    if not re.match(r"https?://", address, re.IGNORECASE):
        return address
    return re.sub(r"^([^/]*//)(?:[^/?#]*@)?([^?#]*).*", r"\1\2", address, flags=re.DOTALL)


def verified(ref: FileRef, read: Callable[[], Document | None]) -> Document:
    """A document, if it is the file that a release lists.

    Raises:
        ContentError: it is another one.
    """
    document = read()
    assert document is not None, "an unconditional request has a body"
    found = hashlib.sha256(document.body).hexdigest()
    if len(document.body) != ref.size or found != ref.sha256:
        raise ContentError(
            f"{document.where} is not the {ref.name} of the release: it has"
            f" {len(document.body)} bytes with SHA-256 {found},"
            f" expected were {ref.size} bytes with {ref.sha256}"
        )
    return document


def first_verified(
    ref: FileRef, by_hash: Callable[[], Document | None], by_name: Callable[[], Document | None]
) -> bytes:
    """What `Source.by_hash` gives back, from the two places where the file can be.

    Raises:
        ContentError: there are only other bytes.
        MissingError: it is in neither place.
    """
    try:
        return verified(ref, by_hash).body
    except (MissingError, ContentError) as first:
        try:
            return verified(ref, by_name).body
        except MissingError:
            if isinstance(first, ContentError):
                raise first from None
            raise

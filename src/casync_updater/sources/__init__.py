"""Where releases and chunks come from."""

import re

from casync_updater.clock import Clock
from casync_updater.model import FetchSettings, FileRef, Location
from casync_updater.sources.base import Document, Source, Validators


def open_source(location: Location, settings: FetchSettings, clock: Clock) -> Source:
    """The source at a location; nothing is asked for yet.

    Raises:
        ConfigError: an address that is no absolute path and no file:, http: or https: URL;
            certificates or credentials that cannot be read.
    """
    if _is_web(location.index) == _is_web(location.store):
        return _open(location, settings, clock)
    index = _open(Location(location.index, location.index), settings, clock)
    store = _open(Location(location.store, location.store), settings, clock)
    return _Split(location, index, store)


def _is_web(address: str) -> bool:
    return re.match("https?:", address, re.IGNORECASE) is not None


def _open(location: Location, settings: FetchSettings, clock: Clock) -> Source:
    # requests is half of the start-up time of a process that may only need a drive.
    if _is_web(location.index):
        from casync_updater.sources.http import HttpSource  # noqa: PLC0415

        return HttpSource(location, settings, clock)
    from casync_updater.sources.local import LocalSource  # noqa: PLC0415

    return LocalSource(location, clock)


class _Split:
    """A source whose index is on the web and whose store is a folder, or the other way round."""

    def __init__(self, location: Location, index: Source, store: Source) -> None:
        self.location = location
        self._index = index
        self._store = store

    @property
    def received(self) -> int:
        return self._index.received + self._store.received

    @property
    def round_trip(self) -> float:
        return self._store.round_trip

    def document(
        self, suffix: str, *, limit: int, known: Validators | None = None
    ) -> Document | None:
        return self._index.document(suffix, limit=limit, known=known)

    def by_hash(self, ref: FileRef, suffix: str) -> bytes:
        return self._index.by_hash(ref, suffix)

    def chunk(self, hex_id: str, *, limit: int) -> bytes:
        return self._store.chunk(hex_id, limit=limit)

    def abort(self) -> None:
        self._index.abort()
        self._store.abort()

    def close(self) -> None:
        self._index.close()
        self._store.close()

"""Sources in folders of this machine: a mounted drive, a network share, a test's folder."""

import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from casync_updater.clock import Clock
from casync_updater.errors import ConfigError, MissingError, RemoteError
from casync_updater.formats.store import LocalStore, read_regular
from casync_updater.model import FileRef, Location
from casync_updater.sources.base import Document, Validators, first_verified

_SETTLED = 2.0
"""Seconds after which a file's time tells a new version of it from the old one: FAT's unit."""


def path_from(address: str) -> Path:
    """The path that an absolute path or a ``file:`` URL means.

    Raises:
        ConfigError: a relative path, or a URL that names another host.
    """
    path = address
    if address[:5].lower() == "file:":
        url = urllib.parse.urlsplit(address)
        if url.netloc.lower() not in ("", "localhost"):
            raise ConfigError(f"{address}: a file: URL cannot name a host, write file:///path")
        if url.query or url.fragment:
            raise ConfigError(f"{address}: write ? and # as %3F and %23 in a file: URL")
        path = urllib.parse.unquote(url.path, errors="surrogateescape")
    if not path.startswith("/") or "\0" in path:
        raise ConfigError(f"{address}: neither an absolute path nor a URL")
    return Path(path)


class LocalSource:
    """See `Source`. Nothing here is followed if it is a symbolic link, or waited for."""

    round_trip = 0.0

    def __init__(self, location: Location, clock: Clock) -> None:
        self.location = location
        self._index = path_from(location.index)
        self._store = LocalStore(path_from(location.store))
        self._clock = clock
        self._received = 0
        self._lock = threading.Lock()

    @property
    def received(self) -> int:
        """See `Source.received`."""
        return self._received

    def document(
        self, suffix: str, *, limit: int, known: Validators | None = None
    ) -> Document | None:
        """See `Source.document`. Validators are made of inode, size and time of the file."""
        document = self._read(self._index.name + suffix, limit)
        if known and known.etag is not None and known == document.validators:
            return None
        self._count(document.body)
        return document

    def by_hash(self, ref: FileRef, suffix: str) -> bytes:
        """See `Source.by_hash`."""
        data = first_verified(
            ref,
            self._reader(f"by-hash/SHA256/{ref.sha256}", ref.size),
            self._reader(self._index.name + suffix, ref.size),
        )
        self._count(data)
        return data

    def chunk(self, hex_id: str, *, limit: int) -> bytes:
        """See `Source.chunk`."""
        data = self._store.read(hex_id, limit)
        self._count(data)
        return data

    def abort(self) -> None:
        """See `Source.abort`; a file system's answer cannot be cut short."""

    def close(self) -> None:
        """See `Source.close`; nothing is kept open."""

    def _count(self, data: bytes) -> None:
        with self._lock:
            self._received += len(data)

    def _reader(self, name: str, limit: int) -> Callable[[], Document]:
        return lambda: self._read(name, limit)

    def _read(self, name: str, limit: int) -> Document:
        path = self._index.parent / name
        try:
            body, state = read_regular(path, limit)
        except (FileNotFoundError, NotADirectoryError) as error:
            if not self._index.parent.is_dir():
                raise RemoteError(f"{self._index.parent} is not there") from error
            raise MissingError(f"{path} does not exist") from error
        except OSError as error:
            raise RemoteError(f"{path} cannot be read: {error.strerror}") from error
        validators = Validators()
        if abs(self._clock.time() - state.st_mtime) >= _SETTLED:
            token = f"{state.st_ino:x}-{state.st_size:x}-{state.st_mtime_ns:x}"
            validators = Validators(etag=token)
        return Document(body, validators, str(path))

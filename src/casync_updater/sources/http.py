"""Sources on web servers.

requests opens and configures: proxies from the environment, certificates, connection pools.
Every exchange then goes to its urllib3 pool directly, since what requests does around a request
costs two to three times the request itself, and an update makes thousands. Exceptions of both
are turned into this project's own here.

A server that stalls is found by the kernel's count of the bytes that a connection received: a
read from it would not return as long as one byte comes before each time-out.
"""

import base64
import contextlib
import email.utils
import netrc
import os
import random
import re
import socket
import ssl
import struct
import threading
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import requests
import requests.adapters
import urllib3

from casync_updater import __version__
from casync_updater.clock import Clock
from casync_updater.errors import (
    ConfigError,
    ContentError,
    MissingError,
    PortalError,
    RemoteError,
)
from casync_updater.formats.store import SUFFIX, path_of
from casync_updater.model import FetchSettings, FileRef, Location
from casync_updater.sources.base import Document, Validators, first_verified, shown

_REDIRECTS = 5
_FIRST_WAIT = 0.5
_DRAIN = 64 << 10
"""Bytes of an error's page that are read to keep its connection."""
_SNIFFED = 512
"""Bytes of what is too long that are looked at, to say what it is."""
_SETTLED = 2.0
"""Seconds that Last-Modified has to be older than Date: RFC 9110, 8.8.2.2, has one second, and
servers round."""
_QUOTED = "/%!$&'()*+,;=:@~"
_SAME = 304
_CHANCE = random.SystemRandom()
_AGAIN = frozenset((408, 425, 429))
_GONE = frozenset((404, 410))
_MOVED = frozenset((301, 302, 303, 307, 308))
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html)[\s>]", re.IGNORECASE)

_BYTES_RECEIVED = struct.Struct("=128xQ")
"""tcpi_bytes_received in the kernel's struct tcp_info (linux/tcp.h, since Linux 4.1)."""


@dataclass(frozen=True, slots=True)
class _Url:
    """A URL without its credentials."""

    scheme: str
    netloc: str
    path: str
    query: str
    authorization: str | None = None

    @classmethod
    def parse(cls, text: str) -> "_Url":
        """Read a URL as a configuration or a redirect has it.

        Raises:
            ValueError: it is none, or of another scheme.
        """
        parts = urllib.parse.urlsplit(text)
        scheme = parts.scheme.lower()
        if scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it is no http or https URL")
        _ = parts.port  # Raises ValueError for one that is no number.
        userinfo, _, netloc = parts.netloc.rpartition("@")
        authorization = None
        if userinfo:
            user, _, password = userinfo.partition(":")
            authorization = _basic(urllib.parse.unquote(user), urllib.parse.unquote(password))
        path = urllib.parse.quote(parts.path or "/", safe=_QUOTED)
        query = urllib.parse.quote(parts.query, safe=_QUOTED + "?[]")
        return cls(scheme, netloc, path, query, authorization)

    def plus(self, suffix: str) -> "_Url":
        """Suffix appended to the path's last name."""
        return replace(self, path=self.path + suffix)

    def beside(self, relative: str) -> "_Url":
        """Relative in the folder of the path's last name."""
        return replace(self, path=f"{self.path.rpartition('/')[0]}/{relative}")

    def below(self, relative: str) -> "_Url":
        """Relative below the path."""
        return replace(self, path=f"{self.path.rstrip('/')}/{relative}")

    @property
    def host(self) -> str:
        return urllib.parse.urlsplit(f"//{self.netloc}").hostname or ""

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.netloc}"

    @property
    def target(self) -> str:
        """As it stands on the request line."""
        return f"{self.path}?{self.query}" if self.query else self.path

    def __str__(self) -> str:
        """As messages show it: the query may be a secret too."""
        return f"{self.origin}{self.path}"


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")


@dataclass(frozen=True, slots=True)
class _Origin:
    """A scheme, host and port with everything that a request to it needs."""

    pool: Any
    """A urllib3 connection pool; what Debian 12 has is without types."""
    prefix: str
    """What stands before the path on the request line: a proxy wants to know the host."""
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Response:
    url: _Url
    status: int
    headers: Mapping[str, str]
    body: bytes


class _TryAgainError(Exception):
    """An attempt failed in a way that the next one may not.

    Attributes:
        wait: seconds that the server asked for, if it did.
    """

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _NobodyThereError(_TryAgainError):
    """There was no connection to be had."""


class _Flight:
    """A request that waits for its answer."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.handle: socket.socket | None = None
        self.since = 0.0
        self.base = 0
        self.ended: Literal["", "stalled", "aborted"] = ""

    def end(self, why: Literal["stalled", "aborted"]) -> None:
        """Make the reading thread see the end of its connection."""
        self.ended = why
        if self.handle is not None:
            with contextlib.suppress(OSError):
                self.handle.shutdown(socket.SHUT_RDWR)

    def count(self) -> int | None:
        """Bytes that the connection received since it was opened.

        None where the system does not count them: emulators of another architecture cut the
        answer off. Silence still ends a request there, a trickle does not.
        """
        assert self.handle is not None
        info = self.handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
        if len(info) < _BYTES_RECEIVED.size:
            return None
        received: int = _BYTES_RECEIVED.unpack(info)[0]
        return received


class _Watch:
    """Ends requests that stall, and every request when somebody asks for that.

    Handles are duplicates of the connections' descriptors, so that none is shut down that was
    closed in the meantime and given to something else.
    """

    def __init__(self, settings: FetchSettings, clock: Clock) -> None:
        self._window = settings.read_timeout
        self._enough = settings.min_rate * settings.read_timeout
        self._clock = clock
        self._condition = threading.Condition()
        self._flights: set[_Flight] = set()
        self._here = threading.local()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.generation = 0

    @contextlib.contextmanager
    def flight(self, generation: int) -> Iterator[_Flight]:
        """A request from this thread, from its beginning to its end."""
        flight = self._here.flight = _Flight(generation)
        try:
            yield flight
        finally:
            self._here.flight = None
            with self._condition:
                self._flights.discard(flight)
                if flight.handle is not None:
                    flight.handle.close()

    def follow(self, connection: Any) -> None:
        """This thread's request has been sent over this connection."""
        flight: _Flight = self._here.flight
        handle = socket.socket(
            socket.AF_INET, socket.SOCK_STREAM, 0, fileno=os.dup(connection.fileno())
        )
        with self._condition:
            if flight.handle is not None:
                flight.handle.close()
            flight.handle = handle
            if self._closed or flight.generation != self.generation:
                flight.end("aborted")
                return
            flight.since, flight.base = self._clock.monotonic(), flight.count() or 0
            self._flights.add(flight)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="stalls", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        with self._condition:
            while not self._closed:
                self._condition.wait(min(1.0, self._window / 4))
                now = self._clock.monotonic()
                for flight in self._flights:
                    if now - flight.since < self._window:
                        continue
                    if (received := flight.count()) is None:
                        continue
                    if received - flight.base < self._enough:
                        flight.end("stalled")
                    flight.since, flight.base = now, received

    def pause(self, seconds: float, generation: int) -> None:
        """Wait, unless the request that waits is ended."""
        with self._condition:
            self._condition.wait_for(lambda: self._closed or self.generation != generation, seconds)

    def aborted(self, generation: int) -> bool:
        """Whether a request that began in this generation was ended."""
        return self._closed or self.generation != generation

    def abort(self) -> None:
        """End every request that is under way."""
        with self._condition:
            self.generation += 1
            for flight in self._flights:
                flight.end("aborted")
            self._condition.notify_all()

    def close(self) -> None:
        """End every request, also those to come."""
        with self._condition:
            self._closed = True
        self.abort()
        if self._thread is not None:
            self._thread.join()


def _watched(kind: type[Any], watch: _Watch) -> type[Any]:
    """A pool's class of connections that tells the watch what it waits for."""

    class Watched(kind):  # type: ignore[misc]
        def getresponse(self, *args: Any, **kwargs: Any) -> Any:
            watch.follow(self.sock)
            return super().getresponse(*args, **kwargs)

    return Watched


class HttpSource:
    """See `Source`. One session; connections are kept alive and shared by all threads.

    Args:
        location: URLs of the index and of the store.
        settings: time-outs, retries, certificates; its `connections` is the size of the pool.
        clock: for the dates that servers send, and for stalls.

    Raises:
        ConfigError: a URL that is none; certificates or credentials that cannot be read.
    """

    def __init__(self, location: Location, settings: FetchSettings, clock: Clock) -> None:
        self.location = location
        self._index = _configured(location.index)
        self._store = _configured(location.store)
        self._settings = settings
        self._clock = clock
        self._watch = _Watch(settings, clock)
        self._timeout = urllib3.Timeout(
            connect=settings.connect_timeout, read=settings.read_timeout
        )
        self._session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=settings.connections)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._logins = _logins(settings)
        self._origins: dict[str, _Origin] = {}
        self._lock = threading.Lock()
        self._answered = False
        self._received = 0
        self._round_trip = 0.0
        self._layouts = (SUFFIX, "")

    @property
    def received(self) -> int:
        """See `Source.received`."""
        return self._received

    @property
    def round_trip(self) -> float:
        """See `Source.round_trip`; through a proxy it is that to the server."""
        return self._round_trip

    def document(
        self, suffix: str, *, limit: int, known: Validators | None = None
    ) -> Document | None:
        """See `Source.document`."""
        return self._document(self._index.plus(suffix), limit, known)

    def by_hash(self, ref: FileRef, suffix: str) -> bytes:
        """See `Source.by_hash`."""
        by_hash = self._index.beside(f"by-hash/SHA256/{ref.sha256}")
        by_name = self._index.plus(suffix)
        return first_verified(
            ref,
            partial(self._document, by_hash, ref.size),
            partial(self._document, by_name, ref.size),
        )

    def chunk(self, hex_id: str, *, limit: int) -> bytes:
        """See `Source.chunk`."""
        layouts = self._layouts
        try:
            return self._chunk(hex_id, layouts[0], limit)
        except MissingError as missing:
            try:
                body = self._chunk(hex_id, layouts[1], limit)
            except MissingError:
                raise missing from None
        # A store has one layout: what was found is asked for first from now on.
        self._layouts = (layouts[1], layouts[0])
        return body

    def abort(self) -> None:
        """See `Source.abort`."""
        self._watch.abort()

    def close(self) -> None:
        """See `Source.close`."""
        self._watch.close()
        self._session.close()

    def _chunk(self, hex_id: str, layout: str, limit: int) -> bytes:
        response = self._get(self._store.below(path_of(hex_id, layout)), limit, {})
        # Archives hold pages too, and a chunk of one may begin like one: the type decides.
        if _is_html(response.headers) and _PAGE.match(response.body):
            raise _portal(response.url)
        return response.body

    def _document(self, url: _Url, limit: int, known: Validators | None = None) -> Document | None:
        conditions = {}
        if known and known.etag:
            conditions["If-None-Match"] = known.etag
        if known and known.last_modified:
            conditions["If-Modified-Since"] = known.last_modified
        response = self._get(url, limit, conditions)
        if response.status == _SAME:
            return None
        if _is_html(response.headers) or _PAGE.match(response.body):
            raise _portal(response.url)
        return Document(response.body, _validators(response), str(url))

    def _get(self, url: _Url, limit: int, conditions: Mapping[str, str]) -> _Response:
        """An answer with status 200, or 304 where conditions were given.

        A server that is not there at the first request is not waited for: whoever asked goes on
        with the next source at once, and comes again when the network does. One that answered
        before is asked again, since most of an update may already be here.
        """
        generation = self._watch.generation
        attempt = 0
        while True:
            try:
                return self._attempt(url, limit, conditions, generation)
            except _TryAgainError as error:
                if self._watch.aborted(generation):
                    raise RemoteError(f"{url}: the request was ended") from error
                hopeless = isinstance(error, _NobodyThereError) and not self._answered
                if hopeless or attempt >= self._settings.retries:
                    tried = f" ({attempt + 1} attempts)" if attempt else ""
                    raise RemoteError(f"{error}{tried}") from error.__cause__
                wait = backoff(attempt, error.wait, self._settings.retry_max_wait, _CHANCE.random())
                self._watch.pause(wait, generation)
                attempt += 1

    def _attempt(
        self, url: _Url, limit: int, conditions: Mapping[str, str], generation: int
    ) -> _Response:
        asked = url
        for _ in range(_REDIRECTS + 1):
            response = self._exchange(url, limit, conditions, generation)
            if response.status not in _MOVED or "Location" not in response.headers:
                return self._judged(response, bool(conditions))
            url = _moved(url, response.headers["Location"])
        raise RemoteError(f"{asked} redirects more than {_REDIRECTS} times")

    def _exchange(
        self, url: _Url, limit: int, conditions: Mapping[str, str], generation: int
    ) -> _Response:
        """One request over the wire and its answer, whatever that is."""
        origin = self._origin(url)
        headers = {**origin.headers, **conditions}
        if url.authorization:
            headers["Authorization"] = url.authorization
        with self._watch.flight(generation) as flight:
            if self._watch.aborted(generation):
                raise _TryAgainError(f"{url}: the request was ended")
            try:
                answer = origin.pool.urlopen(
                    "GET",
                    origin.prefix + url.target,
                    headers=headers,
                    timeout=self._timeout,
                    retries=False,
                    redirect=False,
                    assert_same_host=False,
                    preload_content=False,
                    decode_content=False,
                )
                self._answered = True
                self._timed(self._clock.monotonic() - flight.since)
                with contextlib.closing(_Answer(answer)) as whole:
                    response = whole.read(url, limit, self._count)
            except _TryAgainError as error:
                if not flight.ended:
                    raise
                raise self._failure(url, flight, error) from error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise self._failure(url, flight, error) from error
            if flight.ended:
                # A body that ends with its connection looks whole when it was cut.
                raise self._failure(url, flight, None)
            return response

    def _failure(self, url: _Url, flight: _Flight, error: Exception | None) -> Exception:
        """What a broken exchange means."""
        settings = self._settings
        if flight.ended == "stalled":
            return _TryAgainError(
                f"{url}: the server stalled: less than {settings.min_rate} bytes a second"
                f" in {settings.read_timeout:g} seconds"
            )
        if flight.ended:
            return _TryAgainError(f"{url}: the request was ended")
        kinds = urllib3.exceptions
        certificate = _certificate(error)
        if certificate is not None:
            return RemoteError(
                f"{url}: the server's certificate is not accepted: {certificate.verify_message}"
                " (is this machine's clock right, is ca_bundle in [fetch] the right one, is it"
                " behind a captive portal?)"
            )
        if isinstance(error, kinds.ProxyError):
            return _NobodyThereError(f"{url}: the proxy failed: {_reason(error)}")
        if isinstance(error, kinds.NewConnectionError):
            return _NobodyThereError(f"{url}: cannot be reached: {_reason(error)}")
        if isinstance(error, kinds.ConnectTimeoutError):
            how = f"no connection within {settings.connect_timeout:g} seconds"
            return _NobodyThereError(f"{url}: {how}")
        if isinstance(error, kinds.TimeoutError | TimeoutError):
            how = f"the server sent nothing for {settings.read_timeout:g} seconds"
        else:
            how = f"the connection broke: {_reason(error)}"
        return _TryAgainError(f"{url}: {how}")

    def _judged(self, response: _Response, conditional: bool) -> _Response:
        """The response, if it is one that was asked for."""
        status, url = response.status, response.url
        if status == 200 or (status == _SAME and conditional):
            return response
        said = f"{url}: the server answered {status}"
        if status in _GONE:
            raise MissingError(f"{url} does not exist (the server answered {status})")
        if status in (401, 403):
            raise RemoteError(
                f"{said}: it does not let us in, check the credentials for {url.host}"
                " (user:password@ in the URL, or the netrc file credentials in [fetch])"
            )
        if status == 407:
            raise RemoteError(f"{said}: the proxy wants credentials, give them in its URL")
        if status == 511:
            raise PortalError(f"{said}, the network wants a login first: behind a captive portal?")
        if status in _AGAIN or status >= 500:
            raise _TryAgainError(said, _retry_after(response.headers, self._clock))
        raise RemoteError(said)

    def _origin(self, url: _Url) -> _Origin:
        """The connections for a URL, opened at its first use."""
        with self._lock:
            origin = self._origins.get(url.origin)
            if origin is None:
                origin = self._origins[url.origin] = self._open(url)
            return origin

    def _open(self, url: _Url) -> _Origin:
        settings = self._settings
        ca_bundle = str(settings.ca_bundle) if settings.ca_bundle else None
        pem = str(settings.client_cert) if settings.client_cert else None
        key = str(settings.client_key) if settings.client_key else None
        # requests takes a URL apart that has credentials; these never reach it.
        cert: str | tuple[str, str] | None = (pem, key) if pem and key else pem
        try:
            # Not prepared by the session, which would read ~/.netrc.
            prepared = requests.Request("GET", url.origin + url.target).prepare()
            assert prepared.url is not None
            env = self._session.merge_environment_settings(prepared.url, {}, True, ca_bundle, cert)
            adapter: Any = self._session.get_adapter(prepared.url)
            pool = _pool(adapter, prepared, env)
            adapter.cert_verify(pool, prepared.url, env["verify"], env["cert"])
            absolute = adapter.request_url(prepared, env["proxies"]).startswith("http")
        except requests.RequestException as error:
            raise RemoteError(f"{url} cannot be asked for: {error}") from error
        except OSError as error:
            raise ConfigError(f"[fetch] certificates for {url.host}: {error}") from error
        except urllib3.exceptions.HTTPError as error:
            raise RemoteError(f"{url}: its proxy cannot be used: {error}") from error
        pool.ConnectionCls = _watched(pool.ConnectionCls, self._watch)
        headers = {
            "User-Agent": f"casync-updater/{__version__}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
        }
        authorization = self._logins.get(url.host)
        for configured in (self._index, self._store):
            if url.origin == configured.origin and configured.authorization:
                authorization = configured.authorization
        if authorization:
            headers["Authorization"] = authorization
        return _Origin(pool, url.origin if absolute else "", headers)

    def _timed(self, seconds: float) -> None:
        if not self._round_trip or seconds < self._round_trip:
            self._round_trip = seconds

    def _count(self, received: int) -> None:
        with self._lock:
            self._received += received


class _Answer:
    """A response whose body has not been read yet."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self._whole = False

    def read(self, url: _Url, limit: int, count: Callable[[int], None]) -> _Response:
        """Read it, no further than the limit."""
        status: int = self._answer.status
        headers: Mapping[str, str] = self._answer.headers
        announced = _length(headers)
        if status != 200:
            return _Response(url, status, headers, self._read(_DRAIN, announced, count))
        if announced is not None and announced > limit:
            raise _too_long(url, headers, self._read(_SNIFFED, announced, count), limit)
        body = self._read(limit + 1, announced, count)
        if len(body) > limit:
            raise _too_long(url, headers, body, limit)
        if announced is not None and len(body) < announced:
            raise _TryAgainError(
                f"{url}: the connection broke after {len(body)} of {announced} bytes"
            )
        return _Response(url, status, headers, _unpacked(url, headers, body, limit))

    def _read(self, amount: int, announced: int | None, count: Callable[[int], None]) -> bytes:
        body = bytearray()
        try:
            while len(body) < amount and (piece := self._answer.read(amount - len(body))):
                body += piece
                if len(body) == announced:
                    break
            self._whole = len(body) < amount
        finally:
            count(len(body))
        return bytes(body)

    def close(self) -> None:
        """Give the connection back, or close it where something may still come."""
        if not self._whole:
            self._answer.close()
        self._answer.release_conn()


def _configured(address: str) -> _Url:
    try:
        return _Url.parse(address)
    except ValueError as error:
        raise ConfigError(f"{shown(address)}: {error}") from None


def _logins(settings: FetchSettings) -> dict[str, str]:
    """Authorization headers by host, from the netrc file of the settings."""
    if settings.credentials is None:
        return {}
    try:
        hosts = netrc.netrc(str(settings.credentials)).hosts
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{settings.credentials}: the credentials cannot be read: {error}"
        ) from error
    return {
        host.lower(): _basic(login, password or "") for host, (login, _, password) in hosts.items()
    }


def _pool(adapter: Any, prepared: requests.PreparedRequest, env: Mapping[str, Any]) -> Any:
    """The adapter's connections; the way that Debian 12 has is a deprecated one in Debian 13."""
    newer = getattr(adapter, "get_connection_with_tls_context", None)
    if newer is not None:
        return newer(prepared, env["verify"], proxies=env["proxies"], cert=env["cert"])
    return adapter.get_connection(prepared.url, env["proxies"])


def _moved(url: _Url, location: str) -> _Url:
    """Where a redirect leads."""
    try:
        base = f"{url.origin}{url.target}"
        moved = _Url.parse(urllib.parse.urljoin(base, location))
    except ValueError as error:
        raise RemoteError(f"{url} redirects to an address that cannot be used") from error
    if url.scheme == "https" and moved.scheme != "https":
        raise RemoteError(f"{url} redirects to {moved}, away from https: not followed")
    # What a redirect says about users is the server's, not ours.
    return replace(moved, authorization=None)


def _is_html(headers: Mapping[str, str]) -> bool:
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml")


def _portal(url: _Url) -> PortalError:
    return PortalError(
        f"{url}: an HTML page came in place of what was asked for: behind a captive portal?"
    )


def _too_long(url: _Url, headers: Mapping[str, str], begin: bytes, limit: int) -> Exception:
    """What an answer that is longer than expected means; a page of a portal mostly is."""
    if _is_html(headers) or _PAGE.match(begin):
        return _portal(url)
    return ContentError(f"{url} is longer than the {limit} bytes that are expected at most")


def _validators(response: _Response) -> Validators:
    """What can be asked with the next time.

    A file that is rewritten within the second of its answer keeps its Last-Modified, and the
    next conditional request would be told that nothing changed. nginx makes its ETag of the
    same time and the length, and inherits that.
    """
    headers = response.headers
    etag, last_modified = headers.get("ETag"), headers.get("Last-Modified")
    modified, date = _seconds(last_modified), _seconds(headers.get("Date"))
    if modified is not None and (date is None or date - modified < _SETTLED):
        last_modified = None
        if etag and etag.removeprefix("W/").startswith(f'"{int(modified):x}-'):
            etag = None
    return Validators(etag, last_modified if modified is not None else None)


def _seconds(date: str | None) -> float | None:
    """An HTTP date as seconds since 1970."""
    if date is None:
        return None
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None


def _length(headers: Mapping[str, str]) -> int | None:
    """Content-Length, where the body has one."""
    text = headers.get("Content-Length", "")
    chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
    return int(text) if re.fullmatch("[0-9]{1,18}", text) and not chunked else None


def _unpacked(url: _Url, headers: Mapping[str, str], body: bytes, limit: int) -> bytes:
    """The body without the encoding that a server used though it was asked not to."""
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise RemoteError(f"{url}: the server used the encoding {encoding!r}, unasked")
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        data = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise ContentError(f"{url}: its gzip encoding is damaged: {error}") from error
    if len(data) > limit:
        raise _too_long(url, headers, data, limit)
    if not stream.eof:
        raise ContentError(f"{url}: its gzip encoding is cut off")
    return data


def _retry_after(headers: Mapping[str, str], clock: Clock) -> float | None:
    """Seconds that the server wants us to wait, against its own clock where it tells it."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]+", text):
        return float(text)
    until = _seconds(text or None)
    if until is None:
        return None
    now = _seconds(headers.get("Date"))
    return max(0.0, until - (clock.time() if now is None else now))


def backoff(attempt: int, asked: float | None, longest: float, chance: float) -> float:
    """Seconds to wait after a failed attempt.

    Args:
        attempt: how many attempts failed before this one.
        asked: what the server asked for in Retry-After.
        longest: never more than this (`retry_max_wait`).
        chance: from 0 to 1; ten thousand devices that failed together must not return together.
    """
    if asked is not None:
        return min(asked + _FIRST_WAIT * chance, longest)
    return min(_FIRST_WAIT * 2.0 ** min(attempt, 32), longest) * (0.5 + 0.5 * chance)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it wraps, as an argument, a reason or a cause."""
    seen: list[BaseException] = []
    queue = [error]
    while queue:
        one = queue.pop(0)
        if not isinstance(one, BaseException) or one in seen:
            continue
        seen.append(one)
        yield one
        queue += [*one.args, one.__cause__, one.__context__]


def _certificate(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """The verdict about a certificate, if that is what is in an exception."""
    found = (one for one in _chain(error) if isinstance(one, ssl.SSLCertVerificationError))
    return next(found, None)


def _reason(error: BaseException | None) -> str:
    """What the operating system said, out of urllib3's wrapping, or else what urllib3 did."""
    for one in _chain(error):
        if isinstance(one, OSError):
            return one.strerror or str(one)
    return str(error)

"""A real web server on loopback that fails on purpose, and a forward proxy.

    with WebServer(tmp_path / "site") as server:
        server.fail("/x.castr/*", status=503, retry_after=1, times=3)
        server.fail("/x.caidx", cut=100, times=1)
        fetch(f"{server.url}/x.caidx")
        assert [request.status for request in server.requests] == [200, 200]

It serves the files of a folder as a plain static web server does: HTTP/1.1 with connections kept
alive, ``Content-Length``, ``Date``, ``ETag`` and ``Last-Modified`` (each can be switched off),
and conditional requests. Leaving the block closes every connection, also those that stall.
"""

import base64
import contextlib
import email.utils
import fnmatch
import http.client
import os
import selectors
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

PORTAL = (
    b"<!DOCTYPE html>\n<html><head><title>Welcome to the guest network</title></head>"
    b"<body><p>Please log in.</p></body></html>\n"
)
"""What a captive portal answers in place of everything."""


@dataclass
class Request:
    """One request as it was received, and how it was answered."""

    method: str
    target: str
    """As it stood on the request line, percent-encoded, with its query."""
    headers: Message
    connection: int
    """Which connection it came over, counted from 1 in the order they were opened."""
    status: int | None = None
    """None while there is no answer, and where the connection was closed without one."""
    sent: int = 0
    """Bytes of the body that were written to the socket."""

    @property
    def path(self) -> str:
        """The path, decoded, without its query."""
        return urllib.parse.unquote(urllib.parse.urlsplit(self.target).path)

    @property
    def query(self) -> str:
        """What follows the question mark."""
        return urllib.parse.urlsplit(self.target).query


@dataclass
class _Fault:
    """What goes wrong with the requests that a pattern matches."""

    pattern: str
    times: int | None
    skip: int
    every: int
    status: int | None
    headers: Mapping[str, str]
    body: bytes | None
    cut: int | None
    stall: int | None
    silent: bool
    drip: float | None
    delay: float
    corrupt: bool
    reset: bool
    chunked: bool
    endless: bool
    seen: int = 0

    def strikes(self, path: str) -> bool:
        """True where this request is one of those that fail. Counts it."""
        if self.times == 0 or not fnmatch.fnmatchcase(path, self.pattern):
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.seen - self.skip) % self.every:
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class _Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class _Server(ThreadingHTTPServer):
    """Remembers its connections, so that it can close them while they stall."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], owner: Any
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.owner = owner
        self.closing = threading.Event()
        self.opened = 0
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, int] = {}
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the resolver for the host's full name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self.opened += 1
            self._connections[request] = self.opened
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news, and neither is a failed TLS handshake."""

    @property
    def open_connections(self) -> int:
        with self._lock:
            return len(self._connections)

    def number_of(self, request: Any) -> int:
        with self._lock:
            return self._connections[request]

    def end(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Listening:
    """A server in a thread, as a context manager."""

    def __init__(
        self,
        handler: type[BaseHTTPRequestHandler],
        host: str,
        port: int,
        certificate: "Certificate | None" = None,
    ) -> None:
        self._server = _Server((host, port), handler, self)
        self._lock = threading.Lock()
        self._scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.cert, certificate.key)
            if certificate.clients is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(certificate.clients)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
            self._scheme = "https"
        self._host = f"[{host}]" if ":" in host else host
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self.requests: list[Request] = []

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def netloc(self) -> str:
        """Host and port, as they stand in a URL."""
        return f"{self._host}:{self.port}"

    @property
    def url(self) -> str:
        """Scheme, host and port, without a slash at the end."""
        return f"{self._scheme}://{self.netloc}"

    @property
    def connections(self) -> int:
        """How many connections were ever opened."""
        return self._server.opened

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        return self._server.open_connections

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def close(self) -> None:
        """Stop listening and close every connection: what clients see of a server that died."""
        if self._thread.is_alive():
            self._server.end()
            self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._thread.is_alive():
            self._server.server_close()
        self.close()


class WebServer(_Listening):
    """Serves the files below `root`.

    Attributes:
        requests: every request so far, in the order they arrived.
        etag: whether answers carry an ETag (and If-None-Match is honoured).
        last_modified: whether answers carry Last-Modified (and If-Modified-Since is honoured).
        on_request: called with each request before it is answered, in the connection's thread:
            a publication in the middle of a download, say.
        now: what the Date header says, seconds since 1970.
    """

    def __init__(
        self,
        root: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        etag: bool = True,
        last_modified: bool = True,
        credentials: tuple[str, str] | None = None,
        certificate: "Certificate | None" = None,
    ) -> None:
        super().__init__(_SiteHandler, host, port, certificate)
        self.root = root
        self.etag = etag
        self.last_modified = last_modified
        self.credentials = credentials
        self.on_request: Callable[[Request], None] | None = None
        self.now: Callable[[], float] = time.time
        self._faults: list[_Fault] = []

    def fail(
        self,
        pattern: str,
        *,
        times: int | None = None,
        skip: int = 0,
        every: int = 1,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        retry_after: float | str | None = None,
        redirect: str | None = None,
        html: bool = False,
        body: bytes | None = None,
        cut: int | None = None,
        stall: int | None = None,
        silent: bool = False,
        drip: float | None = None,
        delay: float = 0.0,
        corrupt: bool = False,
        reset: bool = False,
        chunked: bool = False,
        endless: bool = False,
    ) -> None:
        """Let requests whose path matches go wrong; the newest fault that matches counts.

        Args:
            pattern: shell pattern for the decoded path; ``*`` matches slashes too.
            times: how many requests it hits; None for all of them.
            skip: how many matching requests go well first.
            every: hits only every so many of the matching requests.
            status: answered in place of the file, with `body` or a short text.
            headers: sent along, in place of the usual ones of the same name.
            retry_after: value of a Retry-After header.
            redirect: a 302 to this URL.
            html: a captive portal's page with status 200 (or `status`).
            body: sent in place of the file's content (and with status 200 if there is no file).
            cut: the connection is closed after so many bytes of the body.
            stall: nothing more comes after so many bytes of the body.
            silent: the request is taken and never answered.
            drip: the body comes byte by byte, with so many seconds between them.
            delay: seconds before the answer begins.
            corrupt: the byte in the middle of the body is another one.
            reset: the connection is reset (RST) without an answer.
            chunked: the body comes with chunked transfer encoding, without Content-Length.
            endless: the same, and it begins again at its end, until the client leaves.
        """
        given = dict(headers or {})
        if retry_after is not None:
            given["Retry-After"] = str(retry_after)
        if redirect is not None:
            given["Location"] = redirect
            status = status or 302
        if html:
            given.setdefault("Content-Type", "text/html; charset=utf-8")
            status, body = status or 200, body or PORTAL
        if body is not None:
            status = status or 200
        fault = _Fault(
            pattern, times, skip, every, status, given, body, cut, stall, silent, drip, delay,
            corrupt, reset, chunked or endless, endless,
        )  # fmt: skip
        with self._lock:
            self._faults.insert(0, fault)

    def heal(self) -> None:
        """Forget every fault."""
        with self._lock:
            self._faults.clear()

    def paths(self, pattern: str = "*") -> list[str]:
        """The decoded paths of the requests so far that match."""
        with self._lock:
            return [
                request.path
                for request in self.requests
                if fnmatch.fnmatchcase(request.path, pattern)
            ]

    def fault_for(self, path: str) -> _Fault | None:
        with self._lock:
            return next((fault for fault in self._faults if fault.strikes(path)), None)

    def answer(self, request: Request) -> _Answer:
        """What a web server without faults answers."""
        if self.credentials is not None and not self._may(request):
            return _Answer(401, {"WWW-Authenticate": 'Basic realm="updates"'}, b"who are you?\n")
        path = self.root / os.path.normpath(request.path).lstrip("/")
        try:
            if not path.is_file():  # Whoever opens a FIFO waits for ever.
                raise FileNotFoundError(path)
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                body = file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return _Answer(404, {"Content-Type": "text/plain"}, b"not found\n")
        headers = {"Content-Type": "application/octet-stream"}
        if self.etag:
            headers["ETag"] = f'"{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}"'
        if self.last_modified:
            headers["Last-Modified"] = email.utils.formatdate(stat.st_mtime, usegmt=True)
        if self._current(request, headers):
            del headers["Content-Type"]
            return _Answer(304, headers)
        return _Answer(200, headers, body)

    def _may(self, request: Request) -> bool:
        assert self.credentials is not None
        expected = base64.b64encode(":".join(self.credentials).encode()).decode()
        return request.headers.get("Authorization") == f"Basic {expected}"

    @staticmethod
    def _current(request: Request, headers: Mapping[str, str]) -> bool:
        """Whether a conditional request's condition says that nothing changed (RFC 9110, 13)."""
        asked = request.headers.get("If-None-Match")
        if asked is not None:
            tags = [tag.strip().removeprefix("W/") for tag in asked.split(",")]
            return "ETag" in headers and (headers["ETag"] in tags or tags == ["*"])
        since = request.headers.get("If-Modified-Since")
        if since is None or "Last-Modified" not in headers:
            return False
        modified = email.utils.parsedate_to_datetime(headers["Last-Modified"])
        return modified <= email.utils.parsedate_to_datetime(since)


class _SiteHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    # A response is one segment where it fits; with Nagle's algorithm a keep-alive answer of two
    # small writes would wait for the client's delayed acknowledgement (40 ms).
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        self.number = self.server.number_of(self.request)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        site = cast(WebServer, self.server.owner)
        request = Request(self.command, self.path, self.headers, self.number)
        site.record(request)
        if site.on_request is not None:
            site.on_request(request)
        fault = site.fault_for(request.path)
        if fault is not None and not self._survives(fault):
            self.close_connection = True
            return
        answer = site.answer(request)
        if fault is not None:
            self._spoil(answer, fault)
        self._send(request, answer, fault)

    do_HEAD = do_GET  # noqa: N815

    def _survives(self, fault: _Fault) -> bool:
        """False where the fault leaves no answer at all."""
        if fault.delay:
            self.server.closing.wait(fault.delay)
        if fault.silent:
            self._wait_for_the_end()
            return False
        if fault.reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            # shutdown() would send an orderly FIN first: the descriptor itself has to go.
            os.close(self.connection.detach())
            return False
        return not self.server.closing.is_set()

    @staticmethod
    def _spoil(answer: _Answer, fault: _Fault) -> None:
        if fault.status is not None:
            answer.status = fault.status
            answer.headers = {"Content-Type": "application/octet-stream"}
            answer.body = f"{fault.status} on purpose\n".encode()
        if fault.body is not None:
            answer.body = fault.body
        if fault.corrupt and answer.body:
            middle = len(answer.body) // 2
            spoilt = bytearray(answer.body)
            spoilt[middle] ^= 0x55
            answer.body = bytes(spoilt)
        answer.headers.update(fault.headers)

    def _send(self, request: Request, answer: _Answer, fault: _Fault | None) -> None:
        has_body = answer.status not in (204, 304) and request.method != "HEAD"
        chunked = fault is not None and fault.chunked
        request.status = answer.status
        self.send_response_only(answer.status)
        self.send_header("Date", email.utils.formatdate(self.server.owner.now(), usegmt=True))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif answer.status not in (204, 304) and "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if has_body:
            for piece in self._pieces(answer.body, fault):
                request.sent += len(piece)
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if chunked and not self.close_connection:
                self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _pieces(self, body: bytes, fault: _Fault | None) -> Iterator[bytes]:
        end = len(body)
        if fault is not None:
            for limit in (fault.cut, fault.stall):
                end = end if limit is None else min(end, limit)
        if fault is not None and fault.drip is not None:
            for position in range(end):
                yield body[position : position + 1]
                self.wfile.flush()
                if self.server.closing.wait(fault.drip):
                    break
        elif end:
            yield body[:end]
            while fault is not None and fault.endless and not self.server.closing.is_set():
                yield body
        if fault is not None and fault.stall is not None:
            self.wfile.flush()
            self._wait_for_the_end()
        if fault is not None and (fault.cut is not None or fault.stall is not None):
            self.close_connection = True

    def _wait_for_the_end(self) -> None:
        """Until the client gives up or the server is closed."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            while not self.server.closing.is_set() and not selector.select(0.1):
                pass


class ForwardProxy(_Listening):
    """An HTTP proxy: absolute targets are fetched, CONNECT makes a tunnel. Records both."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__(_ProxyHandler, host, port)


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.number = self.server.number_of(self.request)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _record(self, status: int) -> None:
        request = Request(self.command, self.path, self.headers, self.number, status)
        self.server.owner.record(request)

    def do_GET(self) -> None:
        target = urllib.parse.urlsplit(self.path)
        upstream = http.client.HTTPConnection(target.netloc, timeout=30)
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("proxy-connection", "proxy-authorization", "connection")
        }
        try:
            path = urllib.parse.urlunsplit(("", "", target.path or "/", target.query, ""))
            upstream.request(self.command, path, headers=headers)
            response = upstream.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self._record(502)
            self.send_error(502)
            return
        finally:
            upstream.close()
        self._record(response.status)
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        if response.status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        host, _, port = self.path.rpartition(":")
        try:
            upstream = socket.create_connection((host.strip("[]"), int(port)), timeout=30)
        except OSError:
            self._record(502)
            self.send_error(502)
            return
        self._record(200)
        self.send_response_only(200, "Connection established")
        self.end_headers()
        with upstream, selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ, upstream)
            selector.register(upstream, selectors.EVENT_READ, self.connection)
            while not self.server.closing.is_set():
                for key, _ in selector.select(0.1):
                    data = cast(socket.socket, key.fileobj).recv(1 << 16)
                    if not data:
                        self.close_connection = True
                        return
                    key.data.sendall(data)
        self.close_connection = True


@dataclass(frozen=True)
class Certificate:
    """A certificate with its key; where `clients` is set, clients need one that it signed."""

    cert: Path
    key: Path
    clients: Path | None = None


def self_signed(folder: Path, name: str = "127.0.0.1") -> Certificate:
    """A certificate for an address or host name, good for a day, that vouches for itself."""
    folder.mkdir(parents=True, exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    kind = "DNS" if name[-1:].isalpha() and ":" not in name else "IP"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "1", "-subj", f"/CN={name}", "-addext", f"subjectAltName={kind}:{name}",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return Certificate(cert, key)

"""Sources on web servers, against a real one that fails on purpose."""

import gzip
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from casync_updater import __version__
from casync_updater.clock import SystemClock
from casync_updater.errors import (
    ConfigError,
    ContentError,
    MissingError,
    PortalError,
    RemoteError,
)
from casync_updater.formats.store import path_of
from casync_updater.model import FetchSettings, FileRef, Location
from casync_updater.sources import open_source
from casync_updater.sources.base import Document, Source
from casync_updater.sources.http import backoff
from support.webserver import Certificate, ForwardProxy, WebServer, self_signed

QUICK = FetchSettings(
    connect_timeout=2.0, read_timeout=0.4, min_rate=64, retries=2, retry_max_wait=0.02
)
HEX = "ab" * 32
OLD = 1_700_000_000


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    write(folder / "x.caidx", b"the index")
    write(folder / "x.castr" / path_of(HEX), b"a chunk")
    return folder


@pytest.fixture
def server(site: Path) -> Iterator[WebServer]:
    with WebServer(site) as server:
        yield server


@pytest.fixture
def source(server: WebServer) -> Iterator[Source]:
    with closing(opened(server.url)) as source:
        yield source


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (OLD, OLD))


def opened(url: str, settings: FetchSettings = QUICK, query: str = "") -> Source:
    location = Location(f"{url}/x.caidx{query}", f"{url}/x.castr{query}")
    return open_source(location, settings, SystemClock())


def document(source: Source, suffix: str = "", limit: int = 1000) -> Document:
    found = source.document(suffix, limit=limit)
    assert found is not None
    return found


def test_a_document(source: Source, server: WebServer) -> None:
    found = document(source)
    assert (found.body, found.where) == (b"the index", f"{server.url}/x.caidx")
    (request,) = server.requests
    assert request.headers["User-Agent"] == f"casync-updater/{__version__}"
    assert request.headers["Accept-Encoding"] == "identity"
    assert source.received == 9
    assert 0 < source.round_trip < 10


def test_one_connection_serves_everything(source: Source, server: WebServer) -> None:
    document(source)
    with pytest.raises(MissingError):
        source.document(".release", limit=1000)
    server.fail("*.cks", status=500, times=1)
    write(server.root / "x.caidx.cks", b"")
    assert document(source, ".cks").body == b""
    known = document(source).validators
    assert source.document("", limit=1000, known=known) is None
    assert source.chunk(HEX, limit=100) == b"a chunk"
    assert {request.connection for request in server.requests} == {1}


class TestConditional:
    @pytest.mark.parametrize("etag", [True, False])
    @pytest.mark.parametrize("last_modified", [True, False])
    def test_each_validator_is_sent_again(
        self, source: Source, server: WebServer, etag: bool, last_modified: bool
    ) -> None:
        server.etag, server.last_modified = etag, last_modified
        known = document(source).validators
        again = source.document("", limit=1000, known=known)
        assert (again is None) == (etag or last_modified)
        assert ("If-None-Match" in server.requests[-1].headers) == etag
        assert ("If-Modified-Since" in server.requests[-1].headers) == last_modified
        write(server.root / "x.caidx", b"another index")
        os.utime(server.root / "x.caidx", (OLD + 5, OLD + 5))
        changed = source.document("", limit=1000, known=known)
        assert changed is not None
        assert changed.body == b"another index"

    @pytest.mark.parametrize(("age", "kept"), [(0, False), (1, False), (2, True), (-5, False)])
    def test_a_last_modified_that_may_be_shared_by_two_files_is_none(
        self, source: Source, server: WebServer, age: int, kept: bool
    ) -> None:
        server.now = lambda: OLD + age
        validators = document(source).validators
        assert validators.etag is not None
        assert (validators.last_modified is not None) == kept

    @pytest.mark.parametrize(("age", "kept"), [(1, False), (2, True)])
    def test_nginxs_etag_is_of_that_kind_too(
        self, source: Source, server: WebServer, age: int, kept: bool
    ) -> None:
        server.now = lambda: OLD + age
        for mark in ("", "W/"):
            server.fail("*", headers={"ETag": f'{mark}"{OLD:x}-9"'})
            assert (document(source).validators.etag is not None) == kept

    def test_dates_that_are_none(self, source: Source, server: WebServer) -> None:
        server.fail("*", headers={"Last-Modified": "yesterday"})
        assert document(source).validators.last_modified is None

    def test_an_unasked_304_is_no_answer(self, source: Source, server: WebServer) -> None:
        server.fail("*", status=304, body=b"")
        with pytest.raises(RemoteError, match="answered 304"):
            document(source)


class TestRetries:
    @pytest.mark.parametrize(
        "fault",
        [
            {"status": 500}, {"status": 503, "retry_after": 3000}, {"status": 429},
            {"status": 408}, {"status": 425}, {"cut": 3}, {"cut": 3, "chunked": True},
            {"reset": True}, {"silent": True}, {"stall": 3}, {"stall": 0}, {"drip": 0.05},
            {"retry_after": "Tue, 14 Nov 2023 22:13:20 GMT", "status": 503},
            {"retry_after": "soon", "status": 503},
        ],
    )  # fmt: skip
    def test_what_may_pass_is_asked_for_again(
        self, source: Source, server: WebServer, fault: dict
    ) -> None:
        write(server.root / "x.caidx", b"the index" * 20)
        server.fail("*", times=2, **fault)
        begin = time.monotonic()
        assert document(source).body == b"the index" * 20
        assert time.monotonic() - begin < 3
        assert len(server.requests) == 3

    def test_it_ends(self, source: Source, server: WebServer) -> None:
        server.fail("*", status=502)
        with pytest.raises(RemoteError, match=r"/x\.caidx: the server answered 502 \(3 attempts\)"):
            document(source)
        assert len(server.requests) == 3

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 204, 206, 300, 302])
    def test_what_will_not_pass_is_asked_for_once(
        self, source: Source, server: WebServer, status: int
    ) -> None:
        server.fail("*", status=status)
        with pytest.raises(RemoteError) as caught:
            document(source)
        assert len(server.requests) == 1
        assert isinstance(caught.value, MissingError) == (status in (404, 410))
        assert ("credentials" in str(caught.value)) == (status in (401, 403))

    def test_nobody_listens(self, server: WebServer) -> None:
        server.close()
        begin = time.monotonic()
        patient = replace(QUICK, retry_max_wait=5.0, retries=10)
        with (
            closing(opened(server.url, patient)) as source,
            pytest.raises(RemoteError, match=r"cannot be reached: Connection refused$"),
        ):
            document(source)
        assert time.monotonic() - begin < 0.5, "whoever asked comes again, nobody waits here"

    def test_one_that_answered_before_is_waited_for(
        self, server: WebServer, source: Source
    ) -> None:
        document(source)
        server.close()
        with pytest.raises(RemoteError, match=r"Connection refused \(3 attempts\)"):
            document(source)

    def test_no_such_host(self) -> None:
        with (
            closing(opened("http://host.invalid", replace(QUICK, retries=0))) as source,
            pytest.raises(RemoteError, match=r"host\.invalid/x\.caidx: cannot be reached"),
        ):
            document(source)

    def test_a_server_that_drips_is_given_up_by_its_rate(
        self, server: WebServer, source: Source
    ) -> None:
        # Each byte comes well before the read time-out.
        write(server.root / "x.caidx", bytes(5000))
        server.fail("*", drip=0.1)
        begin = time.monotonic()
        with pytest.raises(RemoteError, match="stalled: less than 64 bytes a second"):
            document(source, limit=5000)
        assert time.monotonic() - begin < 5

    def test_a_slow_server_that_is_fast_enough_is_not(self, server: WebServer) -> None:
        write(server.root / "x.caidx", bytes(100))
        server.fail("*", drip=0.01)
        with closing(opened(server.url, replace(QUICK, min_rate=20))) as source:
            assert document(source).body == bytes(100)
        assert len(server.requests) == 1

    def test_backoff_grows_and_is_capped(self) -> None:
        waits = [backoff(attempt, None, 60, 1) for attempt in range(9)]
        assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
        assert backoff(3, None, 60, 0) == 2
        assert backoff(5000, None, 60, 1) == 60
        assert backoff(0, 7, 60, 0) == 7
        assert backoff(0, 7, 60, 1) == 7.5
        assert backoff(0, 7000, 60, 0.5) == 60

    def test_a_date_to_wait_for_is_told_by_the_servers_clock(
        self, server: WebServer, source: Source
    ) -> None:
        with closing(opened(server.url, replace(QUICK, retry_max_wait=30))) as patient:
            server.now = lambda: OLD
            server.fail("*", status=503, retry_after=formatdate(OLD, usegmt=True), times=1)
            begin = time.monotonic()
            document(patient)
            assert time.monotonic() - begin < 2


class TestLimits:
    @pytest.mark.parametrize("chunked", [True, False])
    def test_too_long(self, source: Source, server: WebServer, chunked: bool) -> None:
        server.fail("*", body=bytes(5_000_000), chunked=chunked)
        with pytest.raises(ContentError, match=r"x\.caidx is longer than the 1000 bytes"):
            document(source)
        assert source.received <= 1001
        assert len(server.requests) == 1

    @pytest.mark.parametrize("chunked", [True, False])
    def test_just_right(self, source: Source, server: WebServer, chunked: bool) -> None:
        server.fail("*", body=bytes(1000), chunked=chunked)
        assert len(document(source).body) == 1000

    def test_an_encoding_that_was_not_asked_for(self, source: Source, server: WebServer) -> None:
        encoded = {"Content-Encoding": "gzip"}
        server.fail("*", headers=encoded, body=gzip.compress(bytes(1000)))
        assert document(source).body == bytes(1000)
        server.fail("*", headers=encoded, body=gzip.compress(bytes(1001)))
        with pytest.raises(ContentError, match="longer"):
            document(source)
        for damaged in (gzip.compress(b"12345")[:-1], b"none"):
            server.fail("*", headers=encoded, body=damaged)
            with pytest.raises(ContentError, match="gzip encoding"):
                document(source)
        server.fail("*", headers={"Content-Encoding": "br"}, body=b"x")
        with pytest.raises(RemoteError, match="encoding 'br'"):
            document(source)

    def test_lengths_that_are_none(self, source: Source, server: WebServer) -> None:
        server.fail("*", headers={"Content-Length": "9" * 5000})
        with pytest.raises(RemoteError):
            document(source)


class TestPortals:
    @pytest.mark.parametrize("limit", [1000, 10])
    @pytest.mark.parametrize(
        "fault",
        [
            {"html": True},
            {"html": True, "chunked": True},
            {"html": True, "headers": {"Content-Type": "application/octet-stream"}},
            {"body": b"\xef\xbb\xbf\n <HTML lang='de'> welcome"},
            {"body": b"<meta> welcome to it", "headers": {"Content-Type": "Text/HTML; x=y"}},
            {"status": 511},
        ],
    )
    def test_a_page_in_place_of_a_document(
        self, source: Source, server: WebServer, fault: dict, limit: int
    ) -> None:
        server.fail("*", **fault)
        with pytest.raises(PortalError):
            source.document(".cks", limit=limit)
        assert len(server.requests) == 1

    def test_a_redirect_to_a_page(self, source: Source, server: WebServer, tmp_path: Path) -> None:
        with WebServer(tmp_path) as portal:
            portal.fail("/login", html=True)
            server.fail("*", redirect=f"{portal.url}/login?from=x")
            with pytest.raises(PortalError, match="/login: an HTML page"):
                document(source)
            with pytest.raises(PortalError):
                source.chunk(HEX, limit=10)

    def test_a_chunk_may_be_a_piece_of_a_page(self, source: Source, server: WebServer) -> None:
        page = b"<html><body>documentation"
        server.fail("*", body=page)
        assert source.chunk(HEX, limit=1000) == page
        server.fail("*", html=True)
        with pytest.raises(PortalError):
            source.chunk(HEX, limit=1000)


class TestRedirects:
    def test_they_are_followed(self, source: Source, server: WebServer, tmp_path: Path) -> None:
        with WebServer(server.root) as mirror:
            server.fail("/x.caidx", redirect=f"{mirror.url}/x.caidx")
            server.fail("/x.castr/*", redirect="../../y")
            server.fail("/y", redirect=f"//{mirror.netloc}/x.castr/{path_of(HEX)}")
            assert document(source).body == b"the index"
            assert source.chunk(HEX, limit=100) == b"a chunk"
        assert len(mirror.requests) == 2

    def test_but_not_for_ever(self, source: Source, server: WebServer) -> None:
        server.fail("*", redirect="/x.caidx")
        with pytest.raises(RemoteError, match="redirects more than 5 times"):
            document(source)
        assert len(server.requests) == 6

    @pytest.mark.parametrize("target", ["ftp://h/x", "file:///etc/passwd", "http://[::1/", "//:x/"])
    def test_nor_anywhere(self, source: Source, server: WebServer, target: str) -> None:
        server.fail("*", redirect=target)
        with pytest.raises(RemoteError):
            document(source)

    def test_never_away_from_https(
        self, server: WebServer, tls: WebServer, certificate: Certificate
    ) -> None:
        tls.fail("*", redirect=f"{server.url}/x.caidx")
        with (
            closing(opened(tls.url, replace(QUICK, ca_bundle=certificate.cert))) as source,
            pytest.raises(RemoteError, match="away from https: not followed"),
        ):
            document(source)
        assert not server.requests

    def test_credentials_do_not_travel(self, server: WebServer, tmp_path: Path) -> None:
        with WebServer(server.root) as other:
            server.fail("/x.caidx", redirect=f"http://a:b@{other.netloc}/x.caidx")
            with closing(opened(f"http://me:pw@{server.netloc}")) as source:
                document(source)
        assert "Authorization" in server.requests[0].headers
        assert "Authorization" not in other.requests[0].headers


class TestCredentials:
    @pytest.fixture
    def guarded(self, site: Path) -> Iterator[WebServer]:
        with WebServer(site, credentials=("me", "p@ss:word")) as server:
            yield server

    def test_in_the_url_they_work_and_are_never_shown(self, guarded: WebServer) -> None:
        url = f"http://me:p%40ss:word@{guarded.netloc}"
        with closing(opened(url, query="?token=geheim")) as source:
            assert document(source).where == f"{guarded.url}/x.caidx"
            assert source.chunk(HEX, limit=100) == b"a chunk"
            for fault in ({"status": 500}, {"status": 404}, {"reset": True}, {"status": 401}):
                guarded.fail("*", **fault)
                for ask in (lambda: document(source), lambda: source.chunk(HEX, limit=9)):
                    with pytest.raises(RemoteError) as caught:
                        ask()
                    assert not any(word in str(caught.value) for word in ("p@ss", "p%40", "geheim"))

    def test_one_address_may_have_them_and_the_other_not(self, guarded: WebServer) -> None:
        location = Location(
            f"http://me:p%40ss:word@{guarded.netloc}/x.caidx", f"{guarded.url}/x.castr"
        )
        with closing(open_source(location, QUICK, SystemClock())) as source:
            assert source.chunk(HEX, limit=100) == b"a chunk"

    def test_in_the_settings_netrc_file(self, guarded: WebServer, tmp_path: Path) -> None:
        netrc = tmp_path / "credentials"
        netrc.write_text('machine 127.0.0.1 login me password "p@ss:word"\n')
        with closing(opened(guarded.url, replace(QUICK, credentials=netrc))) as source:
            assert document(source).body == b"the index"

    def test_the_users_own_netrc_stays_out(
        self, guarded: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / ".netrc").write_text('machine 127.0.0.1 login me password "p@ss:word"\n')
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
        with (
            closing(opened(guarded.url)) as source,
            pytest.raises(RemoteError, match=r"check the credentials for 127\.0\.0\.1"),
        ):
            document(source)
        assert "Authorization" not in guarded.requests[0].headers

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        path = tmp_path / "credentials"
        for text in (None, "machine"):
            if text is not None:
                path.write_text(text)
            with pytest.raises(ConfigError, match=f"{path}: the credentials cannot be read"):
                opened("http://127.0.0.1", replace(QUICK, credentials=path))


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path / "tls")


@pytest.fixture
def tls(site: Path, certificate: Certificate) -> Iterator[WebServer]:
    with WebServer(site, certificate=certificate) as server:
        yield server


class TestCertificates:
    def test_one_that_nobody_vouches_for_is_refused_at_once(self, tls: WebServer) -> None:
        with (
            closing(opened(tls.url)) as source,
            pytest.raises(RemoteError, match=r"certificate is not accepted: self.signed"),
        ):
            document(source)
        assert tls.connections == 1

    def test_the_settings_can_vouch(self, tls: WebServer, certificate: Certificate) -> None:
        with closing(opened(tls.url, replace(QUICK, ca_bundle=certificate.cert))) as source:
            assert document(source).body == b"the index"
            assert source.chunk(HEX, limit=100) == b"a chunk"
        assert tls.connections == 1

    def test_tls_stalls_are_found_too(self, tls: WebServer, certificate: Certificate) -> None:
        write(tls.root / "x.caidx", bytes(500))
        tls.fail("*", times=2, drip=0.1)
        settings = replace(QUICK, ca_bundle=certificate.cert, min_rate=2000)
        with closing(opened(tls.url, settings)) as source:
            assert document(source).body == bytes(500)
        assert len(tls.requests) == 3

    def test_a_client_can_show_its_own(self, site: Path, certificate: Certificate) -> None:
        wanted = replace(certificate, clients=certificate.cert)
        with WebServer(site, certificate=wanted) as server:
            settings = replace(QUICK, ca_bundle=certificate.cert, retries=0)
            with closing(opened(server.url, settings)) as source, pytest.raises(RemoteError):
                document(source)
            own = replace(settings, client_cert=certificate.cert, client_key=certificate.key)
            with closing(opened(server.url, own)) as source:
                assert document(source).body == b"the index"

    def test_files_that_are_not_there(self, tls: WebServer, tmp_path: Path) -> None:
        for settings in (
            replace(QUICK, ca_bundle=tmp_path / "none"),
            replace(QUICK, client_cert=tmp_path / "none"),
        ):
            with closing(opened(tls.url, settings)) as source, pytest.raises(ConfigError):
                document(source)


class TestProxies:
    def test_http(self, server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
        with ForwardProxy() as proxy:
            monkeypatch.setenv("http_proxy", f"http://u:secret@{proxy.netloc}")
            with closing(opened(server.url)) as source:
                assert document(source).body == b"the index"
                assert source.chunk(HEX, limit=100) == b"a chunk"
                monkeypatch.setenv("no_proxy", "127.0.0.1")
            assert proxy.requests[0].target == f"{server.url}/x.caidx"
            assert "Proxy-Authorization" in proxy.requests[0].headers
            assert len(proxy.requests) == 2
            with closing(opened(server.url)) as source:
                document(source)
            assert len(proxy.requests) == 2

    def test_https(
        self, tls: WebServer, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with ForwardProxy() as proxy:
            monkeypatch.setenv("https_proxy", proxy.url)
            settings = replace(QUICK, ca_bundle=certificate.cert)
            with closing(opened(tls.url, settings)) as source:
                assert document(source).body == b"the index"
                assert source.chunk(HEX, limit=100) == b"a chunk"
            assert [request.method for request in proxy.requests] == ["CONNECT"]

    def test_one_that_is_down(self, server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
        with ForwardProxy() as proxy:
            down = proxy.netloc
        monkeypatch.setenv("http_proxy", f"http://u:secret@{down}")
        with (
            closing(opened(server.url)) as source,
            pytest.raises(RemoteError, match="the proxy failed: Connection refused") as caught,
        ):
            document(source)
        assert "secret" not in str(caught.value)


class TestAddresses:
    def test_a_query_stays_behind_the_suffix(self, server: WebServer) -> None:
        write(server.root / "x.caidx.cks", b"1")
        with closing(opened(server.url, query="?token=a%20b&c=d/e")) as source:
            document(source, ".cks")
            source.chunk(HEX, limit=100)
        assert [request.target for request in server.requests] == [
            "/x.caidx.cks?token=a%20b&c=d/e",
            f"/x.castr/{path_of(HEX)}?token=a%20b&c=d/e",
        ]

    @pytest.mark.parametrize("name", ["a b", "ü", "100%", "a#b?c", "a+b&c=d"])
    def test_names_that_need_encoding(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / name / "x.caidx", b"1")
        encoded = name.replace("%", "%25").replace("#", "%23").replace("?", "%3F")
        with WebServer(tmp_path) as server, closing(opened(f"{server.url}/{encoded}")) as source:
            assert document(source).body == b"1"

    def test_ipv6(self, site: Path) -> None:
        with WebServer(site, host="::1") as server, closing(opened(server.url)) as source:
            assert "[::1]" in server.url
            assert document(source).body == b"the index"

    def test_the_index_and_the_store_may_be_in_different_places(
        self, server: WebServer, site: Path
    ) -> None:
        for location in (
            Location(f"{server.url}/x.caidx", f"{site}/x.castr"),
            Location(f"{site}/x.caidx", f"{server.url}/x.castr"),
        ):
            with closing(open_source(location, QUICK, SystemClock())) as source:
                assert source.location == location
                assert document(source).body == b"the index"
                assert source.chunk(HEX, limit=100) == b"a chunk"
                assert source.received == 16
                ref = FileRef("x", 9, hashlib.sha256(b"the index").hexdigest())
                assert source.by_hash(ref, "") == b"the index"
                source.abort()
        assert len(server.requests) == 4


class TestByHash:
    def test_first_the_copy_then_the_name(self, source: Source, server: WebServer) -> None:
        ref = FileRef("x.caidx", 9, hashlib.sha256(b"the index").hexdigest())
        assert source.by_hash(ref, "") == b"the index"
        write(server.root / "x.caidx", b"newer than that")
        with pytest.raises(ContentError):
            source.by_hash(ref, "")
        write(server.root / "by-hash/SHA256" / ref.sha256, b"the index")
        assert source.by_hash(ref, "") == b"the index"
        assert server.paths()[:2] == [f"/by-hash/SHA256/{ref.sha256}", "/x.caidx"]
        assert server.paths()[-1] == f"/by-hash/SHA256/{ref.sha256}"

    def test_nowhere(self, source: Source) -> None:
        with pytest.raises(MissingError):
            source.by_hash(FileRef("x.mtree", 9, "0" * 64), ".mtree")


class TestChunks:
    def test_an_uncompressed_store_is_recognised_and_remembered(
        self, source: Source, server: WebServer
    ) -> None:
        ids = ["11" * 32, "22" * 32]
        for hex_id in ids:
            write(server.root / "x.castr" / path_of(hex_id, ""), b"raw")
            assert source.chunk(hex_id, limit=3) == b"raw"
        assert len(server.requests) == 3

    def test_a_missing_chunk_is_named_as_casync_names_it(self, source: Source) -> None:
        with pytest.raises(MissingError, match=r"33\.cacnk does not exist"):
            source.chunk("33" * 32, limit=3)

    def test_threads_share_the_pool(self, server: WebServer) -> None:
        server.fail("*", delay=0.05)
        with closing(opened(server.url, replace(QUICK, connections=4))) as source:
            for _ in range(3):
                threads = [
                    threading.Thread(target=source.chunk, args=[HEX], kwargs={"limit": 100})
                    for _ in range(4)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            assert source.received == 12 * 7
        assert server.connections == 4


class TestAbort:
    @pytest.mark.parametrize("fault", [{"silent": True}, {"stall": 2}, {"status": 503}])
    def test_what_waits_is_ended_and_the_source_goes_on(
        self, server: WebServer, fault: dict
    ) -> None:
        settings = FetchSettings(read_timeout=30, retry_max_wait=30)
        server.fail("*", times=1, retry_after=30, **fault)
        errors: list[Exception] = []
        with closing(opened(server.url, settings)) as source:

            def ask() -> None:
                try:
                    source.chunk(HEX, limit=100)
                except RemoteError as error:
                    errors.append(error)

            thread = threading.Thread(target=ask)
            thread.start()
            while not server.requests:
                time.sleep(0.01)
            time.sleep(0.1)
            begin = time.monotonic()
            source.abort()
            thread.join(5)
            assert time.monotonic() - begin < 0.5
            assert "was ended" in str(errors[0])
            assert source.chunk(HEX, limit=100) == b"a chunk"

    def test_a_closed_source_answers_no_more(self, server: WebServer) -> None:
        source = opened(server.url)
        source.chunk(HEX, limit=100)
        source.close()
        with pytest.raises(RemoteError, match="was ended"):
            source.chunk(HEX, limit=100)
        assert not [one for one in threading.enumerate() if one.name == "stalls"]

"""The failing web server fails as it says, and otherwise serves as a web server does."""

import http.client
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.webserver import PORTAL, ForwardProxy, WebServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "a file").write_bytes(b"0123456789")
    os.utime(tmp_path / "a file", (1_700_000_000, 1_700_000_000))
    with WebServer(tmp_path) as server:
        yield server


def get(server: WebServer, path: str = "/a%20file", **headers: str) -> tuple[int, bytes, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET", path, headers=named)
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def test_a_file_is_served_and_the_request_recorded(server: WebServer) -> None:
    status, body, headers = get(server, "/a%20file?token=x", If_Something="yes")
    assert (status, body) == (200, b"0123456789")
    assert headers["Content-Length"] == "10"
    (request,) = server.requests
    assert (request.method, request.path, request.query) == ("GET", "/a file", "token=x")
    assert (request.status, request.sent) == (200, 10)
    assert request.headers["If-Something"] == "yes"


def test_connections_are_kept_alive_and_counted(server: WebServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    for _ in range(3):
        connection.request("GET", "/a%20file")
        connection.getresponse().read()
    connection.close()
    get(server)
    assert [request.connection for request in server.requests] == [1, 1, 1, 2]
    assert server.connections == 2


def test_what_is_not_there_and_what_lies_outside_is_404(server: WebServer, tmp_path: Path) -> None:
    for path in ("/no", "/", "/../../../../etc/passwd", "/a%20file/below"):
        assert get(server, path)[0] == 404


def test_conditional_requests(server: WebServer) -> None:
    headers = get(server)[2]
    tag, modified = headers["ETag"], headers["Last-Modified"]
    assert get(server, If_None_Match=tag)[:2] == (304, b"")
    assert get(server, If_Modified_Since=modified)[:2] == (304, b"")
    assert get(server, If_None_Match='"other"', If_Modified_Since=modified)[0] == 200
    server.etag = server.last_modified = False
    assert get(server, If_None_Match=tag)[0] == 200
    assert get(server, If_Modified_Since=modified)[0] == 200


def test_the_newest_fault_counts_so_many_times(server: WebServer) -> None:
    server.fail("/a*", status=404, times=2)
    server.fail("/a*", status=503, retry_after=7, times=1)
    status, _, headers = get(server)
    assert (status, headers["Retry-After"]) == (503, "7")
    assert [get(server)[0] for _ in range(3)] == [404, 404, 200]


def test_faults_can_skip_and_repeat(server: WebServer) -> None:
    server.fail("*", status=500, skip=1, every=2)
    assert [get(server)[0] for _ in range(5)] == [200, 200, 500, 200, 500]
    server.heal()
    assert get(server)[0] == 200


def test_a_cut_body_is_shorter_than_it_says(server: WebServer) -> None:
    server.fail("*", cut=4)
    with pytest.raises(http.client.IncompleteRead) as caught:
        get(server)
    assert caught.value.partial == b"0123"
    server.fail("*", cut=4, chunked=True)
    with pytest.raises(http.client.IncompleteRead):
        get(server)


def test_a_reset_connection(server: WebServer) -> None:
    server.fail("*", reset=True)
    with pytest.raises(ConnectionResetError):
        get(server)
    assert server.requests[0].status is None


def test_bodies_in_place_of_the_file(server: WebServer) -> None:
    server.fail("*", corrupt=True, times=1)
    server.fail("*", html=True, times=1)
    server.fail("/none", body=b"made up", chunked=True)
    assert get(server)[1] == PORTAL
    assert get(server)[1] == b"01234`6789"
    assert get(server, "/none")[:2] == (200, b"made up")


@pytest.mark.parametrize("fault", [{"silent": True}, {"stall": 3}, {"drip": 30.0}])
def test_leaving_the_block_ends_what_stalls(tmp_path: Path, fault: dict) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    with WebServer(tmp_path) as server:
        server.fail("*", **fault)
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                get(server, "/f")
            except (OSError, http.client.HTTPException) as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while not server.requests:
            time.sleep(0.01)
        begin = time.monotonic()
    thread.join(5)
    assert failed
    assert time.monotonic() - begin < 2
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_credentials(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"secret")
    with WebServer(tmp_path, credentials=("me", "pw")) as server:
        assert get(server, "/f")[0] == 401
        assert get(server, "/f", Authorization="Basic bWU6cHc=")[:2] == (200, b"secret")


def test_the_proxy_fetches_and_records(server: WebServer) -> None:
    with ForwardProxy() as proxy:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": proxy.url}))
        assert opener.open(f"{server.url}/a%20file", timeout=5).read() == b"0123456789"
        with pytest.raises(urllib.error.HTTPError):
            opener.open(f"{server.url}/none", timeout=5)
    assert [request.status for request in proxy.requests] == [200, 404]
    assert proxy.requests[0].target == f"{server.url}/a%20file"

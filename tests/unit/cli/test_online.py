import argparse
import io
import json
import socket
from pathlib import Path

import pytest

from casync_updater.cli.online import add_parser, show
from casync_updater.clock import SystemClock
from casync_updater.errors import ConfigError
from casync_updater.model import Entry, Location, OnlineSettings


def command(
    index: str,
    *options: str,
    settings: OnlineSettings | None = None,
    since: dict[str, tuple[str, float]] | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    entry = Entry("www", "www", 60.0, Location(index, index), None, Path("/srv/www"))
    out = io.StringIO()
    code = show(
        parser.parse_args(["online", *options]),
        [entry],
        settings or OnlineSettings(method="tcp"),
        out,
        clock=SystemClock(),
        since=since or {},
        environment=environment or {},
    )
    return code, out.getvalue()


def test_a_host_within_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        index = f"http://127.0.0.1:{server.getsockname()[1]}/www.caidx"
        code, text = command(index)
        assert code == 0
        assert "host 127.0.0.1: online since " in text
        assert ", tcp " in text
        assert text.endswith("127.0.0.1 by lo, for www\n")
        since = {"127.0.0.1": ("online", 1000.0)}
        code, text = command(index, "--json", since=since)
    document = json.loads(text)
    assert code == 0
    assert set(document) == {"interfaces", "gateways", "hosts"}
    (host,) = document["hosts"]
    assert (host["state"], host["method"], host["since"]) == (
        "online",
        "tcp",
        "1970-01-01T00:16:40+00:00",
    )
    assert host["entries"] == ["www"]
    assert 0 < host["roundTrip"] < 1


def test_what_the_daemon_saw_in_another_state_is_older_than_now() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        index = f"http://127.0.0.1:{server.getsockname()[1]}/www.caidx"
        _, text = command(index, "--json", since={"127.0.0.1": ("offline", 1000.0)})
    assert json.loads(text)["hosts"][0]["since"] > "2020"


def test_a_host_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        index = f"http://127.0.0.1:{server.getsockname()[1]}/www.caidx"
    code, text = command(index)
    assert code == 3
    assert "refuses connections" in text


@pytest.mark.parametrize(
    ("index", "settings", "words"),
    [
        ("/media/www.caidx", OnlineSettings(), "no entry has a source on the network"),
        ("http://127.0.0.1/w.caidx", OnlineSettings(enabled=False), "switched off"),
    ],
)
def test_nothing_to_watch_is_said(index: str, settings: OnlineSettings, words: str) -> None:
    code, text = command(index, settings=settings)
    assert code == 0
    assert words in text


def test_a_bad_proxy_is_an_error() -> None:
    with pytest.raises(ConfigError):
        command("http://127.0.0.1/w.caidx", environment={"http_proxy": "http://p:port"})

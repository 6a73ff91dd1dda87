"""What the daemon learns of the network: real probes on loopback."""

import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from casync_updater.clock import SystemClock
from casync_updater.config.configuration import Configuration
from casync_updater.errors import LocalError
from casync_updater.model import Entry, Location, OnlineSettings, Settings
from casync_updater.network import Network
from casync_updater.scheduler import CameOnline

PACE = OnlineSettings(method="tcp", interval_offline=0.4, interval_online=60.0)


def configured(port: int, interval: float = 3600.0) -> Configuration:
    remote = Location(f"http://127.0.0.1:{port}/a.caidx", f"http://127.0.0.1:{port}/store")
    local = Location("/media/b.caidx", "/media/store")
    entries = (
        Entry("web", "web", interval, remote, None, Path("/srv/web")),
        Entry("drive", "drive", interval, local, None, Path("/srv/drive")),
    )
    return Configuration(entries, Settings(online=PACE))


class Loop:
    """Drives a network, and keeps when something came online."""

    def __init__(self, configuration: Configuration) -> None:
        self.network = Network(configuration, SystemClock(), {})
        self.came: list[float] = []

    def run(self, seconds: float, until: int = 1000) -> None:
        """For some seconds, or until something came online so often."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end and len(self.came) < until:
            deadline = self.network.deadline()
            wait = end if deadline is None else min(deadline, end)
            select.select([self.network], [], [], max(0.0, wait - now))
            for event in self.network.handle():
                assert event == CameOnline(("web",))
                self.came.append(time.monotonic())


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def loop(server: socket.socket) -> Iterator[Loop]:
    loop = Loop(configured(server.getsockname()[1]))
    loop.run(10, until=1)
    yield loop
    loop.network.close()


def test_a_cycle_that_failed_while_the_host_answers_is_repeated_later_and_later(loop: Loop) -> None:
    ends = []
    for _ in range(3):
        ends.append(time.monotonic())
        loop.network.cycle_ended("web", reached=False)
        loop.run(5, until=len(loop.came) + 1)
    pauses = [came - end for came, end in zip(loop.came[1:], ends, strict=True)]
    assert [round(pause / 0.4) for pause in pauses] == [1, 2, 4]
    loop.run(1)
    assert len(loop.came) == 4, "without a cycle's end there is nothing to repeat"


def test_a_cycle_that_got_through_ends_that(loop: Loop) -> None:
    loop.network.cycle_ended("web", reached=False)
    loop.network.cycle_ended("web", reached=True)
    loop.run(0.8)
    assert len(loop.came) == 1
    before = time.monotonic()
    loop.network.cycle_ended("web", reached=False)
    loop.run(5, until=2)
    assert loop.came[1] - before < 0.75, "it begins anew"


def test_the_interval_is_often_enough(server: socket.socket) -> None:
    loop = Loop(configured(server.getsockname()[1], interval=0.3))
    loop.run(10, until=1)
    loop.network.cycle_ended("web", reached=False)
    loop.run(1)
    assert len(loop.came) == 1
    loop.network.close()


def test_a_host_that_is_gone_is_found_out_at_once_and_not_retried_in_the_dark(
    loop: Loop, server: socket.socket
) -> None:
    assert not loop.network.believed_offline("web")
    server.close()
    loop.network.cycle_ended("web", reached=False)
    end = time.monotonic() + 15
    while not loop.network.believed_offline("web"):
        assert time.monotonic() < end
        loop.run(0.2)
    known = len(loop.came)
    loop.network.cycle_ended("web", reached=False)
    loop.run(2)
    assert len(loop.came) == known


def test_entries_without_a_network_are_left_alone(loop: Loop) -> None:
    assert not loop.network.believed_offline("drive")
    loop.network.cycle_ended("drive", reached=False)
    loop.network.cycle_ended("unknown", reached=False)
    loop.run(0.8)
    assert len(loop.came) == 1


def test_the_report_stays_the_same_while_nothing_happens(loop: Loop) -> None:
    loop.run(0.1)
    first = loop.network.report()
    time.sleep(0.05)
    assert loop.network.report() == first
    (host,) = json.loads(json.dumps(first))["hosts"]
    assert (host["host"], host["state"], host["entries"]) == ("127.0.0.1", "online", ["web"])


def test_a_proxy_that_makes_no_sense_is_no_error_of_the_configuration() -> None:
    with pytest.raises(LocalError, match="http_proxy"):
        Network(configured(80), SystemClock(), {"http_proxy": "http://x:y"})

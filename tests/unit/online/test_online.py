"""The whole detector on loopback: real netlink, real probes, a loop like the daemon's."""

import os
import select
import socket
import time
from collections.abc import Iterator

import pytest

from casync_updater.clock import SystemClock
from casync_updater.model import OnlineSettings
from casync_updater.online.detector import Phase
from casync_updater.online.hosts import Host
from casync_updater.online.online import CameOnline, Online, suspended
from casync_updater.online.probe import Finding, Method

TCP = OnlineSettings(method="tcp", interval_offline=0.3, interval_online=0.3)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


class Loop:
    """The detector, driven until something is true; what it said and found."""

    def __init__(self, hosts: tuple[Host, ...], settings: OnlineSettings = TCP) -> None:
        self.said: list[str] = []
        self.came: list[CameOnline] = []
        self.asleep = 0.0
        self.online = Online(
            hosts, settings, SystemClock(), self.said.append, slept=lambda: self.asleep
        )

    def until(self, finding: Finding | None, phase: Phase, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while True:
            (status,) = self.online.report()
            if status.state is phase and finding in (None, status.finding):
                return
            assert time.monotonic() < end, (status, self.said)
            deadline = self.online.deadline()
            wait = end if deadline is None else min(deadline, end)
            select.select([self.online], [], [], max(0.0, wait - time.monotonic()))
            self.came += self.online.handle()


def host(listening: socket.socket, name: str = "127.0.0.1") -> Host:
    return Host(name, (listening.getsockname()[1],), ("one", "two"))


def test_a_host_that_answers_came_online_once(server: socket.socket) -> None:
    loop = Loop((host(server),))
    before = time.monotonic()
    loop.until(Finding.ANSWERED, Phase.ONLINE)
    (came,) = loop.came
    assert (came.host, came.entries) == ("127.0.0.1", ("one", "two"))
    assert before <= came.at <= time.monotonic()
    (status,) = loop.online.report()
    assert (status.method, status.interface) == (Method.TCP, "lo")
    assert abs(status.since - time.time()) < 5
    loop.online.close()


def test_a_server_that_goes_is_offline_after_patience_and_comes_back_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = listening.getsockname()
        loop = Loop((host(listening),))
        loop.until(Finding.ANSWERED, Phase.ONLINE)
    gone = time.monotonic()
    loop.until(Finding.REFUSED, Phase.OFFLINE)
    assert time.monotonic() - gone >= 7
    with socket.create_server(place):
        loop.until(Finding.ANSWERED, Phase.ONLINE)
    assert len(loop.came) == 2
    loop.online.close()


def test_waking_from_suspension_is_a_return(server: socket.socket) -> None:
    loop = Loop((host(server),))
    loop.until(Finding.ANSWERED, Phase.ONLINE)
    time.sleep(1.1)
    loop.asleep = 3600.0
    loop.came += loop.online.handle()
    assert "the machine was suspended for 3600 s" in loop.said
    loop.until(Finding.ANSWERED, Phase.ONLINE)
    assert len(loop.came) == 2
    loop.online.close()


def test_new_settings_keep_what_is_known_and_leave_no_process(server: socket.socket) -> None:
    loop = Loop((host(server),))
    loop.until(Finding.ANSWERED, Phase.ONLINE)
    other = Host("localhost", host(server).ports, ("three",))
    loop.online.configure((host(server), other), TCP)
    first, second = loop.online.report()
    assert (first.state, second.state) == (Phase.ONLINE, Phase.PROBING)
    loop.online.configure((other,), TCP)
    loop.until(Finding.ANSWERED, Phase.ONLINE)
    assert [came.host for came in loop.came] == ["127.0.0.1", "localhost"]
    loop.online.configure((), TCP)
    assert loop.online.report() == ()
    assert loop.online.deadline() is None
    loop.online.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_closing_in_the_middle_of_a_probe_leaves_no_process(server: socket.socket) -> None:
    loop = Loop((host(server),))
    loop.online.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_this_machine_knows_how_long_it_slept() -> None:
    assert suspended() >= -0.001

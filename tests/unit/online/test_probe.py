"""Probes of loopback: real processes, real sockets."""

import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from casync_updater.online.hosts import Host
from casync_updater.online.probe import (
    Finding,
    Icmp,
    Method,
    Outcome,
    Question,
    RunningProbe,
    _outcome,
    ask,
)

BOTH = (Method.ICMP, Method.TCP)


def question(
    name: str, port: int = 9, methods: tuple[Method, ...] = BOTH, limit: float = 2.0
) -> Question:
    return Question(Host(name, (port,), ()), methods, limit, usable=True)


def outcome(asked: Question) -> Outcome:
    return ended(RunningProbe(asked, time.monotonic()), asked.limit + 1)


def ended(probe: RunningProbe, seconds: float) -> Outcome:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        select.select([probe], [], [], 0.5)
        found = probe.read()
        if found is not None:
            return found
    probe.close()
    raise AssertionError("the probe did not end")


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def test_a_ping_is_answered() -> None:
    if os.geteuid() != 0:
        pytest.skip("raw sockets need a right")
    found = outcome(question("127.0.0.1", methods=(Method.ICMP,)))
    assert found.finding is Finding.ANSWERED
    assert (found.method, found.icmp, found.address) == (Method.ICMP, Icmp.RAW, "127.0.0.1")
    assert found.addresses == ("127.0.0.1",)
    assert found.round_trip is not None
    assert 0 < found.round_trip < 1


def test_a_connection_is_accepted(port: int) -> None:
    found = outcome(question("localhost", port, methods=(Method.TCP, Method.ICMP)))
    assert (found.finding, found.method) == (Finding.ANSWERED, Method.TCP)
    assert found.address == "127.0.0.1"


def test_a_connection_is_refused(closed_port: int) -> None:
    found = outcome(question("127.0.0.1", closed_port, methods=(Method.TCP,)))
    assert found.finding is Finding.REFUSED


@pytest.mark.parametrize("name", ["a" * 64 + ".example", ".", "a..b"])
def test_a_name_that_cannot_be_one_is_unknown(name: str) -> None:
    assert ask(question(name)).finding is Finding.UNKNOWN_NAME


def test_a_probe_can_be_ended_at_any_moment_and_leaves_nothing(closed_port: int) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for pause in (0.0, 0.02, 0.05):
        probe = RunningProbe(question("127.0.0.1", closed_port, (Method.ICMP,)), time.monotonic())
        time.sleep(pause)
        probe.kill()
        assert probe.kill_at is None
        ended(probe, 5)
    probe = RunningProbe(question("127.0.0.1"), time.monotonic())
    probe.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_what_resolves_for_ever_is_told_from_what_crashed() -> None:
    assert _outcome(b"", crashed=False).finding is Finding.NO_NAME_SERVICE
    assert _outcome(b"", crashed=True).finding is Finding.FAILED


def test_a_probe_holds_none_of_our_descriptors() -> None:
    """A lock of the daemon must not live on in a probe."""
    reading, writing = os.pipe()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        asked = question("127.0.0.1", silent.getsockname()[1], (Method.TCP,))
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:  # a full backlog lets a connect wait
            filler.setblocking(False)
            filler.connect_ex(silent.getsockname())
        probe = RunningProbe(asked, time.monotonic())
        os.close(writing)
        ready, _, _ = select.select([reading], [], [], 1.0)
        assert ready, "the probe keeps a descriptor open"
        assert os.read(reading, 1) == b""
        assert probe.read() is None
        probe.close()
        for filler in fillers:
            filler.close()
    os.close(reading)

"""Two machines with a cable between them: network namespaces that a test has to itself.

::

    device ------- eth0 ======= uplink ------- far
    10.233.0.2/24                              10.233.0.1/24, 10.250.0.1 behind it
    fd00:233::2/64                             fd00:233::1/64

Pulling the cable is `far.ip("link set uplink down")`: the device keeps addresses and routes
and loses its carrier.
"""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

FAR = "10.233.0.1"
FAR6 = "fd00:233::1"
BEHIND = "10.250.0.1"

_CHILD = Path(__file__).parent / "online_child.py"
_FAR_HOST = Path(__file__).parent / "far_host.py"
_SOURCES = Path(__file__).parents[2] / "src"


@dataclass(frozen=True)
class Namespace:
    name: str

    def ip(self, *commands: str) -> None:
        """Each command is the arguments of one call of ip(8) inside."""
        for command in commands:
            subprocess.run(["ip", "-n", self.name, *command.split()], check=True)

    def argv(self, *argv: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *argv]

    def run(self, *argv: str) -> None:
        subprocess.run(self.argv(*argv), check=True, stdout=subprocess.DEVNULL)

    def service(
        self, *arguments: str
    ) -> contextlib.AbstractContextManager["subprocess.Popen[str]"]:
        """One of the services of `far_host` inside, while the block lasts."""
        path = f"PYTHONPATH={_FAR_HOST.parents[1]}"
        return self.running("env", path, "/usr/bin/python3", str(_FAR_HOST), *arguments)

    @contextlib.contextmanager
    def running(self, *argv: str) -> Iterator[subprocess.Popen[str]]:
        """A program inside that ends when the block is left; it has said a line by then."""
        with subprocess.Popen(
            self.argv(*argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline()
                yield process
            finally:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Pair:
    device: Namespace
    far: Namespace

    def plug(self) -> None:
        self.far.ip("link set uplink up")

    def unplug(self) -> None:
        self.far.ip("link set uplink down")


@contextlib.contextmanager
def pair() -> Iterator[Pair]:
    """Both namespaces with IPv4 and IPv6 on the cable; the device has default routes."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    tag = f"cu{os.getpid()}-{time.monotonic_ns() % 1_000_000}"
    device, far = Namespace(f"{tag}-device"), Namespace(f"{tag}-far")
    made: list[Namespace] = []
    try:
        for namespace in (device, far):
            subprocess.run(["ip", "netns", "add", namespace.name], check=True)
            made.append(namespace)
            namespace.ip("link set lo up")
        device.ip(f"link add eth0 type veth peer name uplink netns {far.name}")
        # A pulled cable is the far end's link set down, which is not to cost it its address.
        far.run("sysctl", "-qw", "net.ipv6.conf.uplink.keep_addr_on_down=1")
        far.ip(
            "addr add 10.233.0.1/24 dev uplink",
            "addr add fd00:233::1/64 dev uplink nodad",
            "addr add 10.250.0.1/32 dev lo",
            "link set uplink up",
        )
        device.ip(
            "addr add 10.233.0.2/24 dev eth0",
            "addr add fd00:233::2/64 dev eth0 nodad",
            "link set eth0 up",
            "route add default via 10.233.0.1",
        )
        yield Pair(device, far)
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "del", namespace.name], check=True)


class Watcher:
    """The detector in a process of its own inside a namespace, in a small select loop."""

    def __init__(
        self,
        namespace: Namespace,
        *hosts: str,
        port: int = 80,
        prelude: str = "true",
        **settings: float | str,
    ) -> None:
        """Hosts are names or addresses; prelude is shell that runs in a mount namespace."""
        task = {"hosts": hosts, "port": port, "settings": settings}
        self._process = subprocess.Popen(
            namespace.argv(
                "sh", "-c", f'{prelude} && exec "$@"', "sh",
                "/usr/bin/python3", str(_CHILD), json.dumps(task),
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(_SOURCES), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.seen: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._reader.join()
            self._process.wait()
            if error is not None:
                print(*self.seen, sep="\n", file=sys.stderr)
        assert self._process.returncode == 0

    @property
    def pid(self) -> int:
        """The detector's own process: ip and sh have become it."""
        return self._process.pid

    def returns(self) -> list[float]:
        """When the host came online, by the monotonic clock."""
        self._take()
        return [line["at"] for line in self.seen if "came" in line]

    def came_online(self, after: float, timeout: float = 5.0) -> float:
        """Waits for the first return after a time; seconds from there to the announcement."""
        line = self.wait(lambda line: "came" in line and line["at"] >= after, timeout)
        return float(line["at"] - after)

    def said(self, text: str, after: float, timeout: float = 5.0) -> float:
        """Waits for a line of the log; seconds from the given time to it."""
        line = self.wait(lambda l: text in l.get("said", "") and l["at"] >= after, timeout)  # noqa: E741
        return float(line["at"] - after)

    def report(self) -> list[dict[str, Any]]:
        """The detector's report at this moment."""
        assert self._process.stdin is not None
        self._take()
        mark = len(self.seen)
        self._process.stdin.write("report\n")
        self._process.stdin.flush()
        line = self.wait(lambda line: "report" in line, 5, start=mark)
        return list(line["report"])

    def finding(self, wanted: str, timeout: float = 8.0) -> dict[str, Any]:
        """Waits until the only host's last probe found this; its status."""
        end = time.monotonic() + timeout
        while True:
            (status,) = self.report()
            if status["finding"] == wanted:
                return dict(status)
            assert time.monotonic() < end, status
            time.sleep(0.05)

    def wait(
        self, wanted: Callable[[dict[str, Any]], bool], timeout: float, start: int = 0
    ) -> dict[str, Any]:
        """The first line like that, of those to come or already there."""
        end = time.monotonic() + timeout
        while True:
            for line in self.seen[start:]:
                if wanted(line):
                    return line
            start = len(self.seen)
            remaining = end - time.monotonic()
            assert remaining > 0, "it did not happen in time"
            with contextlib.suppress(queue.Empty):
                self.seen.append(self._lines.get(timeout=remaining))

    def _take(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.seen.append(self._lines.get_nowait())

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))

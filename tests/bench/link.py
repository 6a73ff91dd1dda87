"""A link of its own between a device and a server: two network namespaces and a slow cable.

::

    device ---- eth0 =====[ relay: 20 ms each way ]===== uplink ---- server
                10.234.0.2        50 Mbit/s by tbf       10.234.0.1

eth0 and uplink are TUN devices, and the relay between them is a process that holds every packet
for 20 ms. As packets are delayed, and not the bytes of connections, everything behaves as on a
real line: handshakes, slow start, acknowledgements, whatever the number of connections.
"""

import collections
import contextlib
import fcntl
import gc
import http.client
import json
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DELAY = 0.02
"""Seconds, in each direction."""
RATE = 50_000_000
"""Bits per second, in each direction, headers of IP included."""

SERVER = "10.234.0.1"
_DEVICE = "10.234.0.2"

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_PACKET = 2048


@dataclass(frozen=True)
class Namespace:
    name: str

    def ip(self, *commands: str) -> None:
        """Each command is the arguments of one call of ip(8) inside."""
        for command in commands:
            subprocess.run(["ip", "-n", self.name, *command.split()], check=True)

    def argv(self, *argv: str | Path) -> list[str]:
        """A command line that runs another one inside."""
        return ["ip", "netns", "exec", self.name, *map(str, argv)]


@dataclass(frozen=True)
class Link:
    device: Namespace
    server: Namespace

    def received(self) -> int:
        """Bytes that have come to the device so far, headers of IP included."""
        argv = ["ip", "-n", self.device.name, "-json", "-stats", "link", "show", "eth0"]
        (shown,) = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
        return int(shown["stats64"]["rx"]["bytes"])

    def probe(self, path: str) -> dict[str, float]:
        """What the link gives: seconds of a round trip, and bits per second for one large file."""
        argv = self.device.argv(sys.executable, __file__, "probe", path)
        found: dict[str, float] = json.loads(
            subprocess.run(argv, check=True, capture_output=True).stdout
        )
        return found


@contextlib.contextmanager
def link() -> Iterator[Link]:
    """Both namespaces and the cable, while the block lasts."""
    tag = f"cu-bench-{os.getpid()}"
    device, server = Namespace(f"{tag}-device"), Namespace(f"{tag}-server")
    with contextlib.ExitStack() as stack:
        for namespace in (device, server):
            subprocess.run(["ip", "netns", "add", namespace.name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", namespace.name], check=True)
            namespace.ip("link set lo up")
        argv = server.argv(sys.executable, __file__, "relay")
        relay = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE))
        stack.callback(relay.kill)
        assert relay.stdout is not None
        assert relay.stdout.readline()
        server.ip(f"link set eth0 netns {device.name}")
        for namespace, name, address in ((device, "eth0", _DEVICE), (server, "uplink", SERVER)):
            namespace.ip(f"addr add {address}/24 dev {name}", f"link set {name} txqueuelen 5000 up")
            shape = f"tc qdisc add dev {name} root tbf rate {RATE} burst 16kb latency 100ms"
            subprocess.run(namespace.argv(*shape.split()), check=True)
            # What one measurement found out about the link is not to help the next.
            forget = "sysctl -qw net.ipv4.tcp_no_metrics_save=1"
            subprocess.run(namespace.argv(*forget.split()), check=True)
        yield Link(device, server)


def relay() -> None:
    """Make both ends of the cable, say so, and pass packets on until killed."""
    gc.disable()
    os.nice(-10)
    ends = [_tun(name) for name in ("eth0", "uplink")]
    print("ready", flush=True)
    waiting: tuple[collections.deque[tuple[float, bytes]], ...]
    waiting = (collections.deque(), collections.deque())
    while True:
        due = min((queue[0][0] for queue in waiting if queue), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic())
        readable, _, _ = select.select(ends, (), (), timeout)
        now = time.monotonic()
        for end, queue in zip(ends, waiting, strict=True):
            if end in readable:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        queue.append((now + DELAY, os.read(end, _PACKET)))
        for queue, other in zip(waiting, reversed(ends), strict=True):
            while queue and queue[0][0] <= now:
                # An end that is not up yet takes nothing.
                with contextlib.suppress(OSError):
                    os.write(other, queue[0][1])
                queue.popleft()


def _tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    return end


def probe(path: str) -> None:
    """Measure from the device's end, and print what was found as JSON."""
    trips = []
    for _ in range(5):
        begin = time.monotonic()
        socket.create_connection((SERVER, 80), 5).close()
        trips.append(time.monotonic() - begin)
    connection = http.client.HTTPConnection(SERVER, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    # The first part is TCP's slow start.
    answer.read(4_000_000)
    begin, count = time.monotonic(), 0
    while data := answer.read1(1 << 16):
        count += len(data)
    rate = 8 * count / (time.monotonic() - begin)
    result = {"round_trip": statistics.median(trips), "rate": rate}
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "relay":
        relay()
    else:
        probe(sys.argv[2])

"""A service on the far host, which says a line when it is there::

tcp ADDRESS PORT                        takes connections
dns ADDRESS ANSWER|silent|nxdomain      a name server
web ROOT LOG                            a web server on port 80, both families; each request
                                        is a line of JSON in LOG; `portal` and `heal` on
                                        standard input make it a captive portal, or not
tun NAME LOCAL REMOTE                   one end of a VPN: an interface whose packets go
                                        through UDP port 5555 of both addresses
"""

import fcntl
import json
import os
import select
import socket
import struct
import sys
import time
from pathlib import Path

from support.webserver import Request, WebServer


def tcp(address: str, port: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, int(port)))
        listening.listen()
        print("ready", flush=True)
        while True:
            listening.accept()[0].close()


def dns(address: str, answer: str) -> None:
    """Answers every A question (RFC 1035) with one address, all others with nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind((address, 53))
        print("ready", flush=True)
        while True:
            query, asker = bound.recvfrom(512)
            end = query.index(b"\0", 12) + 5
            question, kind = query[12:end], query[end - 3]
            if answer == "silent":
                continue
            if answer == "nxdomain":
                bound.sendto(_header(query, 0x8183, 0) + question, asker)
            elif kind == 1:
                record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4" + socket.inet_aton(answer)
                bound.sendto(_header(query, 0x8180, 1) + question + record, asker)
            else:
                bound.sendto(_header(query, 0x8180, 0) + question, asker)


def _header(query: bytes, flags: int, answers: int) -> bytes:
    return query[:2] + flags.to_bytes(2, "big") + bytes([0, 1, 0, answers, 0, 0, 0, 0])


def web(root: str, log: str) -> None:
    with WebServer(Path(root), host="::", port=80) as server, Path(log).open("a") as lines:

        def note(request: Request) -> None:
            print(json.dumps([time.monotonic(), request.path]), file=lines, flush=True)

        server.on_request = note
        print("ready", flush=True)
        for command in sys.stdin:
            if command == "portal\n":
                server.fail("*", html=True)
            else:
                server.heal()
            print("ready", flush=True)


def tun(name: str, local: str, remote: str) -> None:
    set_interface, tun_without_header = 0x400454CA, 0x1001  # linux/if_tun.h
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, set_interface, struct.pack("16sH14x", name.encode(), tun_without_header))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as carrier:
        carrier.bind((local, 5555))
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([device, carrier], [], [])
            if device in ready:
                carrier.sendto(os.read(device, 1 << 16), (remote, 5555))
            if carrier in ready:
                os.write(device, carrier.recv(1 << 16))


{"tcp": tcp, "dns": dns, "web": web, "tun": tun}[sys.argv[1]](*sys.argv[2:])

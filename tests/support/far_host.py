"""A service on the far host: ``tcp ADDRESS PORT`` or ``dns ADDRESS ANSWER|silent|nxdomain``."""

import socket
import sys


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


{"tcp": tcp, "dns": dns}[sys.argv[1]](*sys.argv[2:])

"""The kernel's own word on links, addresses and routes: NETLINK_ROUTE, see rtnetlink(7).

Two uses. `Monitor` sleeps on the multicast groups and says what changed; `path_to` asks the
kernel which way a packet to an address would go. Both read no more of a message than that
takes. The numbers come from ``linux/netlink.h``, ``rtnetlink.h``, ``if_link.h``,
``if_addr.h`` and ``if.h``.
"""

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from casync_updater.errors import LocalError

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")

_REQUEST = 0x001
_DUMP = 0x300
_DUMP_INTERRUPTED = 0x10
_ERROR, _DONE = 2, 3
_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWRULE, _DELRULE = 32, 33

# Rules are watched too: a VPN may add its table first and the rule that uses it last.
_GROUPS = sum(1 << group - 1 for group in (1, 5, 7, 8, 9, 11, 19))

_IFLA_IFNAME = 3
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_TABLE, _RTA_VIA = 1, 4, 5, 7, 15, 18

_IFF_LOOPBACK, _IFF_RUNNING = 0x8, 0x40
_IFA_DADFAILED, _IFA_TENTATIVE = 0x08, 0x40
_UNICAST, _LOCAL, _REFUSING = 1, 2, {6: "blackhole", 7: "unreachable", 8: "prohibited"}
_TABLE_LOCAL = 255
_ROUTE_CLONED = 0x200

_BUFFER = 1 << 16
_ANSWER_TIMEOUT = 2.0
_DUMP_TRIES = 5


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. `running` is up with a carrier (IFF_RUNNING: what the driver knows of it)."""

    name: str
    running: bool
    loopback: bool = False


@dataclass(frozen=True, slots=True)
class Path:
    """The way a packet to some address takes: interface, own address, next hop."""

    index: int
    interface: str
    source: str
    gateway: str | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """What one wake-up brought.

    Attributes:
        said: one line per change, for the log. Empty: nothing that matters happened.
        down: indices of the interfaces that went down or away, even when they are back by now.
    """

    said: tuple[str, ...] = ()
    down: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.said)


@dataclass
class Network:
    """What is known of links and addresses, kept up to date message by message.

    It tells a change from a repetition: the kernel sends RTM_NEWLINK for every Wi-Fi scan and
    RTM_NEWADDR whenever a router renews a prefix, and neither is news.
    """

    links: dict[int, Link] = field(default_factory=dict)
    addresses: dict[tuple[int, str], bool] = field(default_factory=dict)
    """By interface and address: whether it can be used (IPv6 addresses cannot before the
    search for duplicates has ended; the kernel then sends RTM_NEWADDR once more)."""

    def usable(self) -> bool:
        """True where a running interface has an address with which one gets beyond the link."""
        return any(
            usable
            and not _is_link_local(address)
            and (link := self.links.get(index)) is not None
            and link.running
            and not link.loopback
            for (index, address), usable in self.addresses.items()
        )

    def apply(self, data: bytes) -> Changes:
        """Take in what was read from the socket; says what of it is news."""
        said: list[str] = []
        down: set[int] = set()
        for kind, _, body in messages(data):
            try:
                line = self._one(kind, body, down)
            except (struct.error, ValueError):
                continue  # a message of another shape than this kernel interface promises
            if line:
                said.append(line)
        return Changes(tuple(said), frozenset(down))

    def replaced_by(self, other: "Network") -> Changes:
        """Become what was read anew; says how that differs from what was known."""
        said: list[str] = []
        down: set[int] = set()
        for index in self.links.keys() | other.links.keys():
            said.append(_link_line(self.links.get(index), other.links.get(index)))
            if self._runs(index) and not other._runs(index):
                down.add(index)
        for index, address in self.addresses.keys() | other.addresses.keys():
            before = self.addresses.get((index, address))
            after = other.addresses.get((index, address))
            name = (other if index in other.links else self)._name(index)
            said.append(_address_line(name, address, before, after))
        self.links, self.addresses = other.links, other.addresses
        return Changes(tuple(line for line in said if line), frozenset(down))

    def _one(self, kind: int, body: bytes, down: set[int]) -> str:
        if kind in (_NEWLINK, _DELLINK):
            return self._take_link(kind, body, down)
        if kind in (_NEWADDR, _DELADDR):
            return self._take_address(kind, body)
        if kind in (_NEWROUTE, _DELROUTE):
            return self._route_line(kind, body)
        if kind in (_NEWRULE, _DELRULE):
            return f"routing rule {'added' if kind == _NEWRULE else 'removed'}"
        return ""

    def _take_link(self, kind: int, body: bytes, down: set[int]) -> str:
        family, _, index, flags, _ = _LINK.unpack_from(body)
        if family != socket.AF_UNSPEC:  # a bridge's own message about one of its ports
            return ""
        before = self.links.get(index)
        if kind == _DELLINK:
            after = None
            self.links.pop(index, None)
            for key in [key for key in self.addresses if key[0] == index]:
                del self.addresses[key]
        else:
            name = dict(_attributes(body[_LINK.size :])).get(_IFLA_IFNAME, b"")
            after = Link(
                name.rstrip(b"\0").decode(errors="replace") or f"interface {index}",
                bool(flags & _IFF_RUNNING),
                bool(flags & _IFF_LOOPBACK),
            )
            self.links[index] = after
        if before is not None and before.running and not (after is not None and after.running):
            down.add(index)
        return _link_line(before, after)

    def _take_address(self, kind: int, body: bytes) -> str:
        family, _, flags, _, index = _ADDRESS.unpack_from(body)
        found = dict(_attributes(body[_ADDRESS.size :]))
        # On a point-to-point link IFA_ADDRESS is the far end, and IFA_LOCAL ours.
        raw = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS, b""))
        if _IFA_FLAGS in found:
            (flags,) = struct.unpack_from("=I", found[_IFA_FLAGS])
        address = socket.inet_ntop(family, raw)
        before = self.addresses.pop((index, address), None)
        after = None if kind == _DELADDR else not flags & (_IFA_TENTATIVE | _IFA_DADFAILED)
        if after is not None:
            self.addresses[index, address] = after
        return _address_line(self._name(index), address, before, after)

    def _route_line(self, kind: int, body: bytes) -> str:
        family, length, _, _, table, _, _, what, flags = _ROUTE.unpack_from(body)
        found = dict(_attributes(body[_ROUTE.size :]))
        if _RTA_TABLE in found:
            (table,) = struct.unpack_from("=I", found[_RTA_TABLE])
        if table == _TABLE_LOCAL or flags & _ROUTE_CLONED:
            return ""
        if what != _UNICAST and what not in _REFUSING:
            return ""
        target = "default"
        if length:
            network = socket.inet_ntop(family, found.get(_RTA_DST, b""))
            if _is_link_local(network):
                return ""
            target = f"{network}/{length}"
        index = struct.unpack_from("=i", found[_RTA_OIF])[0] if _RTA_OIF in found else 0
        words = [f"route {target}"]
        if what in _REFUSING:
            words.append(_REFUSING[what])
        gateway = _gateway(family, found)
        if gateway:
            words.append(f"via {gateway}")
        words.append("added" if kind == _NEWROUTE else "removed")
        return (f"{self._name(index)}: " if index else "") + " ".join(words)

    def _runs(self, index: int) -> bool:
        link = self.links.get(index)
        return link is not None and link.running

    def _name(self, index: int) -> str:
        link = self.links.get(index)
        return link.name if link else f"interface {index}"


class Monitor:
    """The socket that wakes the daemon when links, addresses, routes or rules change.

    Raises:
        LocalError: the socket cannot be had (a sandbox without AF_NETLINK).
    """

    def __init__(self) -> None:
        # Subscribed first, read second: what changes in between is told twice, never missed.
        self._socket = _open(_GROUPS)
        self._socket.setblocking(False)
        self.network = read_network()

    def fileno(self) -> int:
        """What to wait on."""
        return self._socket.fileno()

    def read(self) -> Changes:
        """Everything that was reported since the last time; never waits.

        Where more was reported than the socket could hold (ENOBUFS), links and addresses are
        read anew and compared.
        """
        said: list[str] = []
        down: set[int] = set()
        while True:
            try:
                data, (sender, _) = self._socket.recvfrom(_BUFFER)
            except BlockingIOError:
                return Changes(tuple(said), frozenset(down))
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                said.append("the kernel reported more than could be read: looked at it all anew")
                changes = self.network.replaced_by(read_network())
            else:
                if sender:  # only the kernel has port 0; any process may write to ours
                    continue
                changes = self.network.apply(data)
            said += changes.said
            down |= changes.down

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def read_network() -> Network:
    """Links and addresses as they are now.

    Raises:
        LocalError: the kernel could not be asked.
    """
    network = Network()
    with _open() as asked:
        for kind, request in (
            (_GETLINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)),
            (_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)),
        ):
            for data in _dump(asked, kind, request):
                network.apply(data)
    return network


def path_to(address: str) -> Path | None:
    """The way to an IP address (with ``%interface`` where it is link-local), None for none.

    The kernel is asked for the route of one packet (RTM_GETROUTE): that answers for addresses
    in the own network, for any route, for default routes with and without gateway, for VPN
    rules and for blackholes, where netifaces knows gateways only. Two things are added that a
    route does not say: IPv4 routes stay when the cable is pulled (unless a network manager
    takes them away), so the interface must be running; and a source address that is only
    valid on the link leads nowhere beyond it.

    Raises:
        LocalError: the kernel could not be asked.
        ValueError: this is no IP address.
    """
    plain, _, scope = address.partition("%")
    ip = ipaddress.ip_address(plain)
    if ip.is_loopback:
        return Path(0, "lo", plain)
    request = _ROUTE.pack(
        socket.AF_INET if ip.version == 4 else socket.AF_INET6,
        ip.max_prefixlen,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ) + _packed(_RTA_DST, ip.packed)
    with _open() as asked:
        if scope:
            try:
                request += _packed(_RTA_OIF, struct.pack("=i", socket.if_nametoindex(scope)))
            except OSError:
                return None
        answer = _ask(asked, _GETROUTE, request, _NEWROUTE)
        route = _usable_route(answer, beyond=not ip.is_link_local) if answer else None
        if route is None:
            return None
        index, source, gateway = route
        answer = _ask(asked, _GETLINK, _LINK.pack(0, 0, index, 0, 0), _NEWLINK)
    network = Network()
    if answer is not None:
        network._take_link(_NEWLINK, answer, set())
    link = network.links.get(index)
    if link is None or not link.running:
        return None
    return Path(index, link.name, source, gateway)


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and body of each message in what one read returned; a torn end is left out."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            return
        yield kind, flags, data[offset + _HEADER.size : offset + length]
        offset += _aligned(length)


def _usable_route(body: bytes, *, beyond: bool) -> tuple[int, str, str | None] | None:
    """Interface, source and gateway of a route that leads somewhere.

    Args:
        body: the kernel's answer.
        beyond: True where the target is not on the link itself.
    """
    family, _, _, _, _, _, _, what, _ = _ROUTE.unpack_from(body)
    found = dict(_attributes(body[_ROUTE.size :]))
    if what not in (_UNICAST, _LOCAL) or _RTA_OIF not in found or _RTA_PREFSRC not in found:
        return None
    source = socket.inet_ntop(family, found[_RTA_PREFSRC])
    # Without a better one the kernel takes ::1, as it does while an address is not usable yet.
    if ipaddress.ip_address(source).is_loopback or (beyond and _is_link_local(source)):
        return None
    (index,) = struct.unpack_from("=i", found[_RTA_OIF])
    return index, source, _gateway(family, found)


def _open(groups: int = 0) -> socket.socket:
    try:
        opened = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
    except OSError as error:
        raise LocalError(
            f"the kernel cannot be asked about the network: {error.strerror}; "
            "a sandbox around this program must allow AF_NETLINK"
        ) from error
    opened.settimeout(_ANSWER_TIMEOUT)
    opened.bind((0, groups))
    return opened


def _ask(asked: socket.socket, kind: int, request: bytes, wanted: int) -> bytes | None:
    """The body of the one answer; None where the kernel says that there is none."""
    _send(asked, kind, _REQUEST, request)
    for answer, _, body in messages(_receive(asked)):
        if answer == wanted:
            return body
    return None


def _dump(asked: socket.socket, kind: int, request: bytes) -> list[bytes]:
    """Everything of a kind; asked again where it changed while it was being told."""
    parts: list[bytes] = []
    for _ in range(_DUMP_TRIES):
        parts = []
        interrupted = done = False
        _send(asked, kind, _REQUEST | _DUMP, request)
        while not done:
            parts.append(_receive(asked))
            for answer, flags, _ in messages(parts[-1]):
                interrupted = interrupted or bool(flags & _DUMP_INTERRUPTED)
                done = done or answer in (_DONE, _ERROR)
        if not interrupted:
            break
    return parts


def _send(asked: socket.socket, kind: int, flags: int, request: bytes) -> None:
    header = _HEADER.pack(_HEADER.size + len(request), kind, flags, os.getpid(), 0)
    try:
        asked.sendto(header + request, (0, 0))
    except OSError as error:
        raise LocalError(f"the kernel's network state is not available: {error}") from error


def _receive(asked: socket.socket) -> bytes:
    try:
        return asked.recv(_BUFFER)
    except OSError as error:
        raise LocalError(f"the kernel's network state is not available: {error}") from error


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size or offset + length > len(data):
            return
        yield kind & 0x3FFF, data[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)


def _packed(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value.ljust(_aligned(len(value)), b"\0")


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _gateway(family: int, found: dict[int, bytes]) -> str | None:
    if _RTA_GATEWAY in found:
        return socket.inet_ntop(family, found[_RTA_GATEWAY])
    if _RTA_VIA in found:  # IPv4 through an IPv6 router: the family stands before the address
        (family,) = struct.unpack_from("=H", found[_RTA_VIA])
        return socket.inet_ntop(family, found[_RTA_VIA][2:])
    return None


def _is_link_local(address: str) -> bool:
    return ipaddress.ip_address(address).is_link_local


def _link_line(before: Link | None, after: Link | None) -> str:
    if after is None:
        return f"{before.name}: interface removed" if before else ""
    if before is None:
        return f"{after.name}: interface added, link {'up' if after.running else 'down'}"
    if before.running != after.running:
        return f"{after.name}: link {'up' if after.running else 'down'}"
    if before.name != after.name:
        return f"{after.name}: interface renamed from {before.name}"
    return ""


def _address_line(name: str, address: str, before: bool | None, after: bool | None) -> str:
    if before is after:
        return ""
    if after is None:
        return f"{name}: address {address} removed"
    if not after:
        return f"{name}: address {address} not usable yet"
    return f"{name}: address {address} added"

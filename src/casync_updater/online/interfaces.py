"""What the machine's interfaces look like, for people: addresses and gateways.

netifaces is informative only: it knows no route without a gateway (``default dev wwan0``, a
VPN), so whether a host can be reached is never judged by it (see `netlink.path_to`).
"""

import ipaddress
import socket
from dataclasses import dataclass
from typing import cast

import netifaces

from casync_updater.online.netlink import read_network


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface, whether its link is up, and its addresses with prefix length."""

    name: str
    up: bool
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gateway:
    """A router that packets to everywhere go to."""

    address: str
    interface: str


def interfaces() -> tuple[Interface, ...]:
    """Every interface but loopback, by name.

    Raises:
        LocalError: the kernel could not be asked.
    """
    links = sorted(read_network().links.values(), key=lambda link: link.name)
    return tuple(
        Interface(link.name, link.running, _addresses(link.name))
        for link in links
        if not link.loopback
    )


def gateways() -> tuple[Gateway, ...]:
    """The default gateways of both families."""
    # Under "default", which is not used here, there is a dictionary.
    found = cast("dict[int, list[tuple[str, str]]]", netifaces.gateways())
    return tuple(
        Gateway(address, interface)
        for family in (socket.AF_INET, socket.AF_INET6)
        for address, interface, *_ in found.get(int(family), ())
    )


def _addresses(name: str) -> tuple[str, ...]:
    try:
        found = netifaces.ifaddresses(name)
    except ValueError:  # gone since it was listed
        return ()
    return tuple(
        _with_length(item)
        for family in (socket.AF_INET, socket.AF_INET6)
        for item in found.get(int(family), ())
        if "addr" in item
    )


def _with_length(item: dict[str, str]) -> str:
    address = item["addr"].partition("%")[0]
    mask = item.get("netmask", "")
    if "/" in mask:  # IPv6: ffff:ffff:ffff:ffff::/64
        return f"{address}/{mask.rpartition('/')[2]}"
    if mask:
        return f"{address}/{ipaddress.ip_network(f'0.0.0.0/{mask}').prefixlen}"
    return address

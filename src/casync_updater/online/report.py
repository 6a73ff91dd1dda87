"""What `status` and `online` show of the detector."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from casync_updater.online.detector import Phase
from casync_updater.online.probe import Finding, Icmp, Method


@dataclass(frozen=True, slots=True)
class HostStatus:
    """A host as the detector sees it.

    Attributes:
        name: what is probed.
        ports: its TCP ports.
        entries: names of the entries that wait for it.
        proxy_for: the hosts that it is the proxy for.
        state: offline, probing or online.
        since: when `state` began, in seconds since 1970.
        finding: what the last probe found, None before the first one ended.
        method: how it answered the last time that it did.
        round_trip: how long that took, in seconds.
        address: the address that answered.
        interface: the interface that packets to it leave by, None without a path.
        icmp: what ICMP this process is allowed, None while none was tried.
    """

    name: str
    ports: tuple[int, ...]
    entries: tuple[str, ...]
    proxy_for: tuple[str, ...]
    state: Phase
    since: float
    finding: Finding | None = None
    method: Method | None = None
    round_trip: float | None = None
    address: str | None = None
    interface: str | None = None
    icmp: Icmp | None = None

    def as_json(self) -> dict[str, Any]:
        """The same for `json.dumps`."""
        return {
            "host": self.name,
            "ports": self.ports,
            "entries": self.entries,
            "proxyFor": self.proxy_for,
            "state": self.state,
            "since": self.since,
            "finding": self.finding,
            "method": self.method,
            "roundTrip": self.round_trip,
            "address": self.address,
            "interface": self.interface,
            "icmp": self.icmp,
        }


def public(host: Mapping[str, Any]) -> dict[str, Any]:
    """What `HostStatus.as_json` gives, as ``--json`` prints it: times are ISO 8601."""
    since = datetime.fromtimestamp(host["since"], UTC).isoformat(timespec="seconds")
    return {**host, "since": since}


def line(host: Mapping[str, Any]) -> str:
    """A host's status for people, from the form that `HostStatus.as_json` gives."""
    name = host["host"]
    if host["proxyFor"]:
        name += f" (proxy for {', '.join(host['proxyFor'])})"
    begin = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(host["since"]))
    parts = [f"host {name}: {host['state']} since {begin}"]
    if host["state"] == Phase.ONLINE:
        parts.append(f"{host['method']} {1000 * (host['roundTrip'] or 0):.1f} ms")
        parts.append(f"{host['address']} by {host['interface']}")
    else:
        parts.append(host["finding"] or "no answer yet")
    if host["icmp"] not in (None, Icmp.RAW):
        parts.append(f"ICMP: {host['icmp']}")
    parts.append(f"for {', '.join(host['entries'])}")
    return ", ".join(parts)

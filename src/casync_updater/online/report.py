"""What `status` and `online` show of the detector."""

from dataclasses import dataclass
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
        """The same for `json.dumps`, in the words of `status --json`."""
        return {
            "name": self.name,
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

"""``casync-updater online``: interfaces, gateways and update hosts, as they are right now."""

import argparse
import dataclasses
import json
import os
import selectors
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from casync_updater.cli.context import chosen
from casync_updater.cli.places import state_dir
from casync_updater.clock import Clock, SystemClock
from casync_updater.live import read_live
from casync_updater.model import Entry, OnlineSettings
from casync_updater.online.detector import Phase
from casync_updater.online.hosts import hosts_of
from casync_updater.online.interfaces import Gateway, Interface, gateways, interfaces
from casync_updater.online.online import Online
from casync_updater.online.report import HostStatus, line, public

_PATIENCE = 6.0
"""Seconds for the hosts to answer: a little more than the longest probe takes."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "online",
        help="show interfaces, gateways and whether the update hosts are within reach",
        description="Shows interfaces, gateways and whether the update hosts are within reach: "
        "by which method they answer, how fast, and since when. Probes them itself, whether "
        "the daemon runs or not. Exits with 3 where a host is not within reach.",
    )
    parser.add_argument("--watch", action="store_true", help="go on and follow what happens")
    parser.add_argument("--json", action="store_true", help="write JSON; one line per change")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show the network as it is, with what the daemon remembers of the hosts."""
    configuration, entries = chosen(arguments, ())
    daemon = read_live(state_dir(arguments)).get("online") or {"hosts": ()}
    return show(
        arguments,
        entries,
        configuration.settings.online,
        sys.stdout,
        clock=SystemClock(),
        since={host["host"]: (host["state"], host["since"]) for host in daemon["hosts"]},
        environment=os.environ,
    )


def show(
    args: argparse.Namespace,
    entries: Iterable[Entry],
    settings: OnlineSettings,
    out: TextIO,
    *,
    clock: Clock,
    since: Mapping[str, tuple[str, float]],
    environment: Mapping[str, str],
) -> int:
    """Probe every host once and show what came of it; with `--watch` until interrupted.

    Args:
        args: what `add_parser` describes.
        entries: the configured entries.
        settings: ``[online]``.
        out: where to write to.
        clock: the time.
        since: by host, the state that the daemon sees it in and since when (seconds since
            1970): it has been looking for longer. Empty where no daemon runs.
        environment: for the proxies.

    Returns:
        0 where every host is within reach, 3 where one is not.

    Raises:
        ConfigError: a proxy cannot be understood.
        LocalError: the kernel does not tell about the network.
    """
    hosts = hosts_of(entries, settings, environment)
    show = _Output(out, clock, as_json=args.json)
    detector = Online(hosts, settings, clock, show.event if args.watch else lambda line: None)
    try:
        _drive(detector, clock, lambda: all(map(_settled, detector.report())), _PATIENCE)
        report = tuple(_with_since(status, since) for status in detector.report())
        show.snapshot(interfaces(), gateways(), report, enabled=settings.enabled)
        if args.watch:
            _drive(detector, clock, lambda: False, None)
        return 0 if all(status.state is Phase.ONLINE for status in report) else 3
    except KeyboardInterrupt:
        return 0
    finally:
        detector.close()


def _drive(
    detector: Online, clock: Clock, finished: Callable[[], bool], seconds: float | None
) -> None:
    """Let the detector work until it is finished, or for some seconds."""
    end = None if seconds is None else clock.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(detector, selectors.EVENT_READ)
        while not finished():
            now = clock.monotonic()
            if end is not None and now >= end:
                return
            times = [at for at in (detector.deadline(), end) if at is not None]
            selector.select(max(0.0, min(times) - now) if times else None)
            detector.handle()


def _settled(status: HostStatus) -> bool:
    return status.state is not Phase.PROBING


def _with_since(status: HostStatus, since: Mapping[str, tuple[str, float]]) -> HostStatus:
    state, begin = since.get(status.name, ("", 0.0))
    return dataclasses.replace(status, since=begin) if state == status.state else status


class _Output:
    """Text for people, or JSON."""

    def __init__(self, out: TextIO, clock: Clock, *, as_json: bool) -> None:
        self._out = out
        self._clock = clock
        self._as_json = as_json
        self._begun = False

    def event(self, line: str) -> None:
        """Something happened; what happens before the first picture is part of that."""
        if not self._begun:
            return
        now = self._clock.time()
        if self._as_json:
            self._write(json.dumps({"time": now, "event": line}))
        else:
            self._write(f"{_when(now)} {line}")

    def snapshot(
        self,
        links: tuple[Interface, ...],
        routers: tuple[Gateway, ...],
        hosts: tuple[HostStatus, ...],
        *,
        enabled: bool,
    ) -> None:
        """The whole picture."""
        self._begun = True
        if self._as_json:
            self._write(json.dumps(_document(links, routers, hosts)))
            return
        for link in links:
            addresses = " ".join(link.addresses) or "no address"
            self._write(f"interface {link.name}: {'up' if link.up else 'down'}, {addresses}")
        for router in routers:
            self._write(f"gateway {router.address} on {router.interface}")
        if not enabled:
            self._write("online detection is switched off ([online]: enabled)")
        elif not hosts:
            self._write("no entry has a source on the network")
        for host in hosts:
            self._write(line(host.as_json()))

    def _write(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


def _document(
    links: tuple[Interface, ...], routers: tuple[Gateway, ...], hosts: tuple[HostStatus, ...]
) -> dict[str, Any]:
    return {
        "interfaces": [
            {"name": link.name, "up": link.up, "addresses": link.addresses} for link in links
        ],
        "gateways": [
            {"address": router.address, "interface": router.interface} for router in routers
        ],
        "hosts": [public(host.as_json()) for host in hosts],
    }


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

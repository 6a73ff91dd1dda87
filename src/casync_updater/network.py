"""The network as the daemon watches it: what came online, what is out of reach, what to retry.

A ping is a hint. A host can answer while nothing can be had from it: a captive portal is in
the way, the web server is being restarted, an uplink just died. So what a cycle found counts as
well. After one that did not get to its entry's source, the host is looked at anew, and as long
as it answers, another cycle is asked for: after `interval_offline`, after twice that, and so on
until the entry's own interval is shorter. Where the host does not answer, nothing is asked for
before its return.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from casync_updater.clock import Clock
from casync_updater.config.configuration import Configuration
from casync_updater.errors import ConfigError, LocalError
from casync_updater.online.detector import Phase
from casync_updater.online.hosts import Host, hosts_of
from casync_updater.online.online import Online
from casync_updater.scheduler import CameOnline

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Retry:
    """When an entry that could not use its source is tried again; None while that is going on."""

    at: float | None
    pause: float


class Network:
    """Online detection as the daemon's `Watcher`.

    Args:
        configuration: whose hosts are watched.
        clock: the time.
        environment: the process's own, for the proxies.

    Raises:
        LocalError: there is nothing to be learned about the network, or the environment names
            a proxy that cannot be understood.
    """

    def __init__(
        self, configuration: Configuration, clock: Clock, environment: Mapping[str, str]
    ) -> None:
        self._clock = clock
        self._environment = environment
        self._configuration = configuration
        self._retries: dict[str, _Retry] = {}
        self._online = Online(self._hosts(), configuration.settings.online, clock, log.info)

    def configure(self, configuration: Configuration) -> None:
        """See `daemon.Watcher.configure`."""
        self._configuration = configuration
        names = {entry.name for entry in configuration.entries}
        self._retries = {name: retry for name, retry in self._retries.items() if name in names}
        self._online.configure(self._hosts(), configuration.settings.online)

    def fileno(self) -> int:
        """See `daemon.Watcher.fileno`."""
        return self._online.fileno()

    def deadline(self) -> float | None:
        """See `daemon.Watcher.deadline`."""
        times = [self._online.deadline(), *(retry.at for retry in self._retries.values())]
        return min((at for at in times if at is not None), default=None)

    def handle(self) -> tuple[CameOnline, ...]:
        """See `daemon.Watcher.handle`."""
        events = [CameOnline(came.entries) for came in self._online.handle()]
        now = self._clock.monotonic()
        for name, retry in self._retries.items():
            if retry.at is not None and retry.at <= now:
                self._retries[name] = _Retry(None, retry.pause)
                if Phase.ONLINE in self._phases(name):
                    events.append(CameOnline((name,)))
        return tuple(events)

    def cycle_ended(self, name: str, *, reached: bool) -> None:
        """See `daemon.Watcher.cycle_ended`."""
        last = self._retries.pop(name, None)
        phases = self._phases(name)
        entries = (entry for entry in self._configuration.entries if entry.name == name)
        entry = next(entries, None)
        if reached or entry is None or not phases:
            return
        self._online.doubt(name)
        pause = 2 * last.pause if last else self._configuration.settings.online.interval_offline
        pause = min(pause, entry.interval)
        at = self._clock.monotonic() + pause
        self._retries[name] = _Retry(at if pause < entry.interval else None, pause)

    def believed_offline(self, name: str) -> bool:
        """See `daemon.Watcher.believed_offline`."""
        return self._phases(name) == {Phase.OFFLINE}

    def report(self) -> dict[str, Any]:
        """See `daemon.Watcher.report`."""
        return {"hosts": [status.as_json() for status in self._online.report()]}

    def close(self) -> None:
        """See `daemon.Watcher.close`."""
        self._online.close()

    def _hosts(self) -> tuple[Host, ...]:
        configuration = self._configuration
        try:
            return hosts_of(configuration.entries, configuration.settings.online, self._environment)
        except ConfigError as error:
            raise LocalError(str(error)) from error

    def _phases(self, name: str) -> set[Phase]:
        """The states of the hosts that an entry waits for."""
        return {status.state for status in self._online.report() if name in status.entries}

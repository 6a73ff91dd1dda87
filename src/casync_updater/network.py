"""Online detection as the daemon's `Watcher`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from casync_updater.clock import Clock
from casync_updater.config.configuration import Configuration
from casync_updater.errors import ConfigError, LocalError
from casync_updater.online.hosts import Host, hosts_of
from casync_updater.online.online import Online
from casync_updater.scheduler import CameOnline

log = logging.getLogger(__name__)


class Network:
    """Tells the daemon which entries' hosts came online.

    Args:
        configuration: whose hosts are watched, and how.
        clock: the time.
        environment: for the proxies.

    Raises:
        LocalError: there is nothing to watch with, or a host or proxy makes no sense.
    """

    def __init__(
        self, configuration: Configuration, clock: Clock, environment: Mapping[str, str]
    ) -> None:
        self._environment = environment
        hosts = self._hosts(configuration)
        self._online = Online(hosts, configuration.settings.online, clock, self._say)

    def fileno(self) -> int:
        """See `daemon.Watcher.fileno`."""
        return self._online.fileno()

    def deadline(self) -> float | None:
        """See `daemon.Watcher.deadline`."""
        return self._online.deadline()

    def handle(self) -> Sequence[CameOnline]:
        """See `daemon.Watcher.handle`."""
        return [CameOnline(came.entries) for came in self._online.handle()]

    def configure(self, configuration: Configuration) -> None:
        """See `daemon.Watcher.configure`."""
        self._online.configure(self._hosts(configuration), configuration.settings.online)

    def report(self) -> Any:
        """See `daemon.Watcher.report`."""
        return [host.as_json() for host in self._online.report()]

    def close(self) -> None:
        """See `daemon.Watcher.close`."""
        self._online.close()

    def _hosts(self, configuration: Configuration) -> tuple[Host, ...]:
        try:
            return hosts_of(configuration.entries, configuration.settings.online, self._environment)
        except ConfigError as error:
            raise LocalError(str(error)) from error

    @staticmethod
    def _say(line: str) -> None:
        log.info("%s", line)

"""What the commands have in common: the configuration, and what surrounds a cycle."""

import argparse
import logging
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from casync_updater import logs
from casync_updater.cli.places import cache_dir, state_dir
from casync_updater.clock import SystemClock
from casync_updater.config.configuration import Configuration, load_configuration
from casync_updater.cycle.session import Surroundings
from casync_updater.cycle.stop import Stop
from casync_updater.errors import ConfigError
from casync_updater.model import Entry, Reason, Settings
from casync_updater.sources import open_source
from casync_updater.tools.actions import action_runner

LOG = logging.getLogger("casync_updater")


def configuration(arguments: argparse.Namespace) -> Configuration:
    """Read the configuration; nothing is raised, every problem is in the result."""
    return load_configuration(arguments.config, arguments.settings)


def chosen(
    arguments: argparse.Namespace, names: Sequence[str]
) -> tuple[Configuration, tuple[Entry, ...]]:
    """The configuration, and the entries of these names (all of them for none).

    Broken entries are logged and left alone.

    Raises:
        ConfigError: there is no such entry, or no entry at all because all are broken.
    """
    found = configuration(arguments)
    for problem in found.problems:
        LOG.error("%s", problem)
    by_name = {entry.name: entry for entry in found.entries}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ConfigError(
            f"{arguments.config}: no entry is named {unknown[0]};"
            f" there are: {', '.join(by_name) or 'none'}"
        )
    if not by_name and found.problems:
        raise ConfigError(f"{arguments.config}: no entry can be used")
    return found, tuple(by_name[name] for name in names) if names else found.entries


@contextmanager
def surroundings(arguments: argparse.Namespace, settings: Settings) -> Iterator[Surroundings]:
    """What a cycle needs from the outside, with signals handled while the block lasts."""
    clock = SystemClock()
    state = state_dir(arguments)
    with Stop().installed() as stop:
        yield Surroundings(
            settings=settings,
            state_dir=state,
            cache_dir=cache_dir(arguments),
            clock=clock,
            stop=stop,
            runner=action_runner(state / ".actions", clock, _action_output),
            open_source=lambda location: open_source(location, settings.fetch, clock),
        )


def _action_output(entry: str, line: str) -> None:
    LOG.info("%s: %s", entry, line)


def entry_log(entry: Entry, reason: Reason) -> logging.LoggerAdapter[logging.Logger]:
    """A log whose lines say which entry they are about."""
    return _EntryLog(LOG, {"entry": entry.name, "fields": logs.fields(entry.name, reason=reason)})


class _EntryLog(logging.LoggerAdapter[logging.Logger]):
    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[object, MutableMapping[str, Any]]:
        extra = self.extra or {}
        return f"{extra['entry']}: {msg}", {**kwargs, "extra": extra["fields"]}

"""What the commands have in common that work on one entry, named on the command line."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from casync_updater.cli.context import chosen, entry_log, surroundings
from casync_updater.cli.monitors import monitor_for
from casync_updater.cycle.operator import Operator
from casync_updater.model import Entry, Reason
from casync_updater.state import StateFolder

_PATIENCE = 60.0
"""Seconds to wait for a cycle that is running."""


def add_name_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    help_text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """A command whose argument is an entry's name."""
    parser = commands.add_parser(name, help=help_text)
    parser.add_argument("name", metavar="NAME", help="the entry")
    parser.set_defaults(run=run)
    return parser


@contextmanager
def held(arguments: argparse.Namespace) -> Iterator[tuple[Entry, Operator]]:
    """The entry and its cycle, with the entry's lock held.

    Raises:
        ConfigError: there is no such entry.
        BusyError: a cycle of it does not end.
    """
    configuration, (entry,) = chosen(arguments, [arguments.name])
    with surroundings(arguments, configuration.settings) as outside:
        folder = StateFolder(outside.state_dir, entry)
        with folder.locked("operator", wait=_PATIENCE) as lock:
            monitor = monitor_for(entry.name, quiet=False)
            log = entry_log(entry, Reason.OPERATOR)
            yield entry, Operator(entry, outside, monitor, lock, log)

"""What the commands have in common that work on one entry, named on the command line."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator

from casync_updater.cli.context import chosen, entry_log, surroundings
from casync_updater.cli.monitors import monitor_for
from casync_updater.cli.places import state_dir
from casync_updater.cycle.operator import Operator
from casync_updater.errors import BusyError
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


def left_to_the_holder(
    arguments: argparse.Namespace, words: Callable[[StateFolder], tuple[str, ...]]
) -> bool:
    """Queue a command that an action of the same entry gives while its cycle runs.

    Waiting for the lock would never end: whoever holds it waits for the action.

    Args:
        arguments: of the command line.
        words: the command, as `cli.update` takes it from the queue.

    Raises:
        ConfigError: there is no such entry.
    """
    _, (entry,) = chosen(arguments, [arguments.name])
    folder = StateFolder(state_dir(arguments), entry)
    if not called_by_holder(entry, folder):
        return False
    folder.ask(*words(folder))
    print(f"{entry.name}: queued: it follows the cycle that this action belongs to")
    return True


def called_by_holder(entry: Entry, folder: StateFolder) -> bool:
    """Whether an action of this entry calls while somebody holds the entry.

    That is the cycle that waits for the action, unless the action has left the caller running in
    the background.
    """
    if os.environ.get("CASYNC_UPDATER_ENTRY") != entry.name:
        return False
    try:
        with folder.locked("a look", wait=0.0):
            return False
    except BusyError:
        return True


@contextlib.contextmanager
def held(arguments: argparse.Namespace, *, reads: bool = False) -> Iterator[tuple[Entry, Operator]]:
    """The entry and its cycle, with the entry's lock held.

    Args:
        arguments: of the command line.
        reads: the command only reads. An action of the entry needs no lock for that, since its
            own cycle holds the entry and changes nothing meanwhile.

    Raises:
        ConfigError: there is no such entry.
        BusyError: a cycle of it does not end.
    """
    configuration, (entry,) = chosen(arguments, [arguments.name])
    with surroundings(arguments, configuration.settings) as outside:
        folder = StateFolder(outside.state_dir, entry)
        with contextlib.ExitStack() as stack:
            lock = -1
            if not (reads and called_by_holder(entry, folder)):
                lock = stack.enter_context(folder.locked("operator", wait=_PATIENCE))
            monitor = monitor_for(entry.name, quiet=False)
            log = entry_log(entry, Reason.OPERATOR)
            yield entry, Operator(entry, outside, monitor, lock, log)

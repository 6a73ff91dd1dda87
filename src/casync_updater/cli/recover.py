"""``recover``: what the daemon runs first: journals are completed or undone, nothing else."""

import argparse

from casync_updater.cli.context import chosen, entry_log, surroundings
from casync_updater.cycle.session import Session
from casync_updater.errors import UpdaterError, exit_code
from casync_updater.model import Reason, SilentMonitor
from casync_updater.state import StateFolder


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments: none, and it is not listed."""
    commands.add_parser("recover").set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Recover every entry; the failure of one is logged and holds up no other."""
    configuration, entries = chosen(arguments, ())
    errors: list[UpdaterError] = []
    with surroundings(arguments, configuration.settings) as outside:
        for entry in entries:
            log = entry_log(entry, Reason.START)
            try:
                with StateFolder(outside.state_dir, entry).locked("recovery", wait=0.0) as lock:
                    Session(entry, outside, SilentMonitor(), lock, log).load_and_recover()
            except UpdaterError as error:
                log.error("%s", error)
                errors.append(error)
    return exit_code(errors)

"""``validate``: is the configuration right, and how will each destination be updated?"""

import argparse
from pathlib import Path

from casync_updater.cli.context import configuration
from casync_updater.cli.places import state_dir
from casync_updater.cycle.staging import Site, survey, try_exchange
from casync_updater.errors import ConfigError, LocalError
from casync_updater.sources.base import shown
from casync_updater.state import StateFolder


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    parser = commands.add_parser("validate", help="check the configuration")
    parser.add_argument("path", metavar="PATH", nargs="?", type=Path, help="in place of --config")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Report every problem of every file; unknown keys fail here, and only here.

    Raises:
        ConfigError: with all problems.
    """
    if arguments.path is not None:
        arguments.config = arguments.path
    found = configuration(arguments)
    for entry in found.entries:
        try:
            state = StateFolder(state_dir(arguments), entry).peek()
            site = survey(entry, state.no_exchange)
            why = site.why or _tried(site)
        except LocalError as error:
            print(f"{entry.name}: note: {error}")
            continue
        how = f"in place, not atomic: {why}" if why else "atomically"
        print(f"{entry.name}: {shown(entry.source.index)} -> {site.destination} ({how})")
    if found.problems or found.warnings:
        raise ConfigError(*found.problems, *found.warnings)
    return 0


def _tried(site: Site) -> str | None:
    """Why an exchange does not work; None also for who may not try."""
    try:
        return try_exchange(site, site.staging.with_name(f"{site.staging.name}-try"))
    except (LocalError, OSError):
        return None

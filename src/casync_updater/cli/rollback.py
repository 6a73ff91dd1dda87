"""``rollback``: the version before goes back into the destination, and stays."""

import argparse

from casync_updater.cli.single import add_name_parser, held, left_to_the_holder
from casync_updater.state import StateFolder


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    add_name_parser(commands, "rollback", "go back to the version before, and hold it", run)


def run(arguments: argparse.Namespace) -> int:
    """Roll one entry back."""
    if left_to_the_holder(arguments, _from_what_is_installed):
        return 0
    with held(arguments) as (entry, operator):
        end = operator.rollback()
    print(f"{entry.name}: {end.message}; casync-updater resume {entry.name} lets it go on")
    return end.exit


def _from_what_is_installed(folder: StateFolder) -> tuple[str, ...]:
    installed = folder.peek().installed
    return ("rollback", installed.digest if installed is not None else "")

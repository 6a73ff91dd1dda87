"""``rollback``: the version before goes back into the destination, and stays."""

import argparse

from casync_updater.cli.single import add_name_parser, held


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    add_name_parser(commands, "rollback", "go back to the version before, and hold it", run)


def run(arguments: argparse.Namespace) -> int:
    """Roll one entry back."""
    with held(arguments) as (entry, cycle):
        end = cycle.rollback()
    print(f"{entry.name}: {end.message}; casync-updater resume {entry.name} lets it go on")
    return end.exit

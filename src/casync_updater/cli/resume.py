"""``resume``: updates go on after a rollback or a version that failed."""

import argparse

from casync_updater.cli.single import add_name_parser, held, left_to_the_holder


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    add_name_parser(commands, "resume", "let updates go on after a rollback", run)


def run(arguments: argparse.Namespace) -> int:
    """Clear an entry's hold and its bad marks."""
    if left_to_the_holder(arguments, lambda _folder: ("resume",)):
        return 0
    with held(arguments) as (entry, operator):
        was = operator.resume()
    print(f"{entry.name}: was held by {was}; the next cycle goes on")
    return 0

"""``resume``: updates go on after a rollback or a version that failed."""

import argparse
from dataclasses import replace

from casync_updater.cli.context import chosen
from casync_updater.cli.places import state_dir
from casync_updater.cli.single import add_name_parser
from casync_updater.cycle.selfupdate import SelfUpdate
from casync_updater.state import StateFolder

_PATIENCE = 60.0


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    add_name_parser(commands, "resume", "let updates go on after a rollback", run)


def run(arguments: argparse.Namespace) -> int:
    """Clear an entry's hold and its bad marks."""
    _, (entry,) = chosen(arguments, [arguments.name])
    folder = StateFolder(state_dir(arguments), entry)
    with folder.locked("resume", wait=_PATIENCE):
        state = folder.load()
        folder.save(replace(state, held=None, bad=()))
        bad = bool(state.bad)
        if entry.self_update:
            own = SelfUpdate(state_dir(arguments))
            bad = bad or bool(own.bad())
            own.forgive()
    was = state.held or ("versions that failed" if bad else "nothing")
    print(f"{entry.name}: was held by {was}; the next cycle goes on")
    return 0

"""``attach``: the beginning of a drive's visit; started by the daemon."""

import argparse
import os
import sys
from pathlib import Path

from casync_updater.cli.context import LOG, configuration, surroundings
from casync_updater.cli.drive_command import finish_command, start_command
from casync_updater.cycle.stop import StoppedError
from casync_updater.drives.order import Order, read_order
from casync_updater.errors import LocalError
from casync_updater.tools import mounting


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments: none, and it is not listed."""
    commands.add_parser("attach").set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the operator's command, and mount the drive where that is ours to do."""
    order = read_order(sys.stdin)
    settings = configuration(arguments).settings
    try:
        with surroundings(arguments, settings) as outside:
            started = start_command("start", order, settings, outside.runner)
            code = 0 if order.node is None else _mount(order, order.node)
            finish_command(started, outside.runner)
    except StoppedError:
        return 1
    return code


def _mount(order: Order, node: str) -> int:
    if os.path.ismount(order.point):
        return 0
    try:
        mounting.mount(node, Path(order.point))
    except LocalError as error:
        LOG.error(
            "drive %s (%s, %s) cannot be mounted (the journal has what mount said): %s",
            order.title,
            node,
            order.type,
            error,
        )
        return 1
    return 0

"""``startup``: an entry's startup commands; started by the daemon after the first cycle."""

import argparse
import json
import math
import sys

from casync_updater.cli.context import LOG, chosen, surroundings
from casync_updater.cycle.stop import StoppedError
from casync_updater.errors import ConfigError, LocalError
from casync_updater.logs import fields
from casync_updater.model import Entry, Reason, Settings
from casync_updater.tools.actions import Action, ActionRunner, action_id


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's argument; it is not listed."""
    parser = commands.add_parser("startup")
    parser.add_argument("name")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the commands but for those in the JSON array on standard input."""
    configuration, (entry,) = chosen(arguments, [arguments.name])
    try:
        skip = json.load(sys.stdin)
    except ValueError as error:
        raise ConfigError("standard input: a JSON array of commands is expected") from error
    try:
        with surroundings(arguments, configuration.settings) as outside:
            return start_up(entry, configuration.settings, outside.runner, skip)
    except StoppedError:
        return 0  # the service ends; what was started goes on by itself


def start_up(entry: Entry, settings: Settings, runner: ActionRunner, skip: list[str]) -> int:
    """Run an entry's startup commands in their order, each as long as it likes.

    Args:
        entry: whose commands.
        settings: for the directory that they run in.
        runner: runs them; what it still runs of an earlier service is waited for, and not
            started a second time.
        skip: commands that ran as triggers a moment ago.

    Returns:
        0 where each succeeded, else 1.
    """
    code = 0
    for command in entry.startup:
        if command in skip:
            LOG.info("%s: %r ran as a trigger and is not repeated", entry.name, command)
            continue
        try:
            how = _run(entry, command, settings, runner)
        except (LocalError, OSError) as error:
            how = str(error)
        if how is not None:
            LOG.error(
                "%s: startup command %r %s", entry.name, command, how, extra=fields(entry.name)
            )
            code = 1
    return code


def _run(entry: Entry, command: str, settings: Settings, runner: ActionRunner) -> str | None:
    """What went wrong; None where nothing did."""
    name = action_id(entry.name, "startup", command)
    handle = runner.find(name)
    if handle is not None and runner.collect(handle) is None:
        LOG.info("%s: %r still runs since an earlier start", entry.name, command)
    else:
        LOG.info("%s: running startup command %r", entry.name, command, extra=fields(entry.name))
        env = {"CASYNC_UPDATER_ENTRY": entry.name, "CASYNC_UPDATER_REASON": Reason.START.value}
        action = Action(name, entry.name, command, settings.actions.directory, None, env)
        handle = runner.start(action)
    result = runner.collect(handle, math.inf)
    runner.forget(handle.id)
    return None if result is None or result.ok else str(result)

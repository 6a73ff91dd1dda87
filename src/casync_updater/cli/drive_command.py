"""The operator's command at the beginning and the end of a drive's visit."""

import math
from typing import Literal

from casync_updater.cli.context import LOG
from casync_updater.drives.order import Order
from casync_updater.errors import LocalError
from casync_updater.model import Settings
from casync_updater.tools.actions import Action, ActionRunner, Handle, action_id

When = Literal["start", "success", "failure"]


def start_command(
    when: When, order: Order, settings: Settings, runner: ActionRunner
) -> Handle | None:
    """Start it; None where there is none, or where it cannot be started, which fails nothing."""
    command = getattr(settings.media, f"on_{when}")
    if not command:
        return None
    action = Action(
        action_id("drive", order.title, when),
        "drive",
        command,
        settings.actions.directory,
        settings.actions.timeout,
        {"CASYNC_UPDATER_DRIVE": order.title, "CASYNC_UPDATER_DRIVE_EVENT": when},
    )
    try:
        return runner.start(action)
    except LocalError as error:
        LOG.warning("on_%s of drive %s: %s", when, order.title, error)
        return None


def finish_command(handle: Handle | None, runner: ActionRunner) -> None:
    """Wait for its end, which the time-out of actions brings at the latest."""
    if handle is None:
        return
    try:
        result = runner.collect(handle, math.inf)
        runner.forget(handle.id)
    except LocalError as error:
        LOG.warning("the command of [media]: %s", error)
        return
    if result is not None and not result.ok:
        LOG.warning("the command of [media] %s", result)

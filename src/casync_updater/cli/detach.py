"""``detach``: the end of a drive's visit: report, sync, unmount; started by the daemon."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from casync_updater import syscalls
from casync_updater.cli.context import LOG, entry_log, surroundings
from casync_updater.cli.context import configuration as read_configuration
from casync_updater.cli.drive_command import finish_command, start_command
from casync_updater.config.configuration import Configuration
from casync_updater.cycle.session import Session, Surroundings
from casync_updater.cycle.stop import StoppedError
from casync_updater.drives import report
from casync_updater.drives.order import Order, read_order
from casync_updater.errors import LocalError, TrustError, UpdaterError
from casync_updater.model import Origin, Reason, SilentMonitor
from casync_updater.tools import mounting


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments: none, and it is not listed."""
    commands.add_parser("detach").set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Finish a visit; exit code 1 where the drive is still in use."""
    order = read_order(sys.stdin)
    configuration = read_configuration(arguments)
    settings = configuration.settings
    free = True
    try:
        with surroundings(arguments, settings) as outside:
            if order.node is not None:
                with outside.stop.shielded():
                    free = _release(order, order.node, configuration, outside)
            _tell(order, free)
            started = start_command(
                "success" if free and not order.failed else "failure",
                *(order, settings, outside.runner),
            )
            finish_command(started, outside.runner)
    except StoppedError:
        pass  # the service ends; the command goes on by itself
    return 0 if free else 1


def _release(order: Order, node: str, configuration: Configuration, outside: Surroundings) -> bool:
    """Write what is to be written, and let go of the drive; False where it is still in use."""
    point = Path(order.point)
    if os.path.ismount(point):
        if not order.lost:
            _report(order, point, configuration, outside)
        try:
            syscalls.sync_file_system(point)
        except OSError as error:
            LOG.error("drive %s: not all could be written: %s", order.title, error.strerror)
        try:
            mounting.unmount(point)
        except LocalError as error:
            LOG.error("drive %s cannot be unmounted: %s", order.title, error)
            return False
    return mounting.is_free(node, outside.clock)


def _report(order: Order, point: Path, configuration: Configuration, outside: Surroundings) -> None:
    """Write the report, unless nothing on the drive is ours."""
    lines, own = [], False
    for line, ours in _lines(order, configuration, outside):
        lines.append(line)
        own = own or ours
    if not own:
        LOG.warning("drive %s has nothing of ours: no report is written to it", order.title)
        return
    device, now = report.this_device(), outside.clock.time()
    written = report.Report(device, order.title, order.began, now, not order.failed, lines)
    try:
        report.write(point, written)
    except LocalError as error:
        LOG.warning("drive %s: %s", order.title, error)


def _lines(
    order: Order, configuration: Configuration, outside: Surroundings
) -> Iterator[tuple[report.Line, bool]]:
    """What is said of each entry, and whether the drive is the publisher's for it."""
    entries = {entry.name: entry for entry in configuration.entries}
    for one in order.ends:
        if one.name not in entries:
            continue
        entry, end = entries[one.name], one.end
        log = entry_log(entry, Reason.MEDIA)
        drive, ours = None, end.exit == 0 and end.source is Origin.BACKUP
        try:
            found = Session(entry, outside, SilentMonitor(), -1, log).on_drive()
            if found is not None:
                drive, ours = found.version, True
        except TrustError:
            ours = False
        except UpdaterError as error:
            drive = f"cannot be read: {error}"
        yield report.Line(one.name, end.had, end.version, drive, end.message), ours


def _tell(order: Order, free: bool) -> None:
    """What the journal says at the end; STATUS says the same."""
    if order.node is None:
        LOG.info("drive %s: %s", order.title, "failed" if order.failed else "done")
    elif not free:
        LOG.error(
            "drive %s (%s) is still in use by something else: wait before you pull it out",
            *(order.title, order.node),
        )
    elif order.lost:
        LOG.warning("drive %s is gone, or could not be used", order.title)
    else:
        LOG.info(
            "drive %s can be pulled out (%s)", order.title, "failed" if order.failed else "done"
        )

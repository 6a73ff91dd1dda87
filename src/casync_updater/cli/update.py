"""``update``: a cycle now, in this process; also what the daemon starts for each cycle."""

import argparse
import dataclasses
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from casync_updater.cli.context import chosen, entry_log, surroundings
from casync_updater.cli.export import exported
from casync_updater.cli.monitors import monitor_for
from casync_updater.cli.single import called_by_holder
from casync_updater.cycle.act import Log
from casync_updater.cycle.cycle import Cycle
from casync_updater.cycle.operator import Operator
from casync_updater.cycle.session import Surroundings
from casync_updater.cycle.stop import StoppedError
from casync_updater.errors import BusyError, UpdaterError
from casync_updater.model import Entry, Monitor, Reason, Settings
from casync_updater.reports import CycleEnd, Outcome, PipeMonitor
from casync_updater.sources.base import shown
from casync_updater.state import StateFolder
from casync_updater.syscalls import save_memory

_FOREVER = 1e9

_MEDIA_PATIENCE = 60.0
"""Seconds that a drive waits for an operator's command: it is plugged in once."""

_OFFLINE_CONNECT = 5.0
"""Seconds for the one attempt at a source that is believed to be out of reach."""

_OFFLINE_RESOLVER = "timeout:2 attempts:1"
"""resolv.conf(5): the same for its name."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    parser = commands.add_parser("update", help="run a cycle now")
    parser.add_argument("names", metavar="NAME", nargs="*", help="entries (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--accept-legacy",
        action="store_true",
        help="take a source without a release although the entry has accepted one before",
    )
    # What the daemon says to a cycle's process; nobody else has a use for it.
    parser.add_argument("--reason", type=Reason, default=Reason.OPERATOR, help=argparse.SUPPRESS)
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--report", metavar="FD", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the cycles one after the other; each is tried."""
    save_memory()
    configuration, entries = chosen(arguments, arguments.names)
    ends: dict[str, CycleEnd] = {}
    settings = configuration.settings
    if arguments.offline:
        settings = _for_one_attempt(settings)
    with surroundings(arguments, settings) as outside:
        for entry in entries:
            end = _one(arguments, entry, outside)
            ends[entry.name] = end
            if not arguments.json and arguments.report is None:
                _show(entry.name, end)
            if end.outcome is Outcome.STOPPED:
                break
    if arguments.json:
        print(json.dumps({name: dataclasses.asdict(end) for name, end in ends.items()}, indent=2))
    codes = {end.exit for end in ends.values()}
    return next((code for code in (4, 1, 3, 2) if code in codes), 0)


def _for_one_attempt(settings: Settings) -> Settings:
    os.environ["RES_OPTIONS"] = f"{os.environ.get('RES_OPTIONS', '')} {_OFFLINE_RESOLVER}".strip()
    connect_timeout = min(_OFFLINE_CONNECT, settings.fetch.connect_timeout)
    return replace(settings, fetch=replace(settings.fetch, connect_timeout=connect_timeout))


def _one(arguments: argparse.Namespace, entry: Entry, outside: Surroundings) -> CycleEnd:
    reason: Reason = arguments.reason
    reporting = arguments.report is not None
    monitor: Monitor
    if reporting:
        monitor = pipe = PipeMonitor(arguments.report, outside.clock)
    else:
        monitor = monitor_for(entry.name, quiet=arguments.json)
    folder = StateFolder(outside.state_dir, entry)
    if called_by_holder(entry, folder):
        # An action of this very entry's cycle asks: waiting for the lock would never end.
        folder.ask("update")
        return CycleEnd(Outcome.CURRENT, 0, "queued: one more cycle follows this one")
    wait = _FOREVER
    if reporting:
        wait = _MEDIA_PATIENCE if reason is Reason.MEDIA else 0.0
    try:
        with folder.locked(reason.value, wait=wait) as lock:
            while True:
                log = entry_log(entry, reason)
                _follow(folder, Operator(entry, outside, monitor, lock, log), entry, log)
                if arguments.offline:
                    log.info(
                        "%s seems to be out of reach: one attempt of %g seconds, then %s",
                        shown(entry.source.index),
                        outside.settings.fetch.connect_timeout,
                        "no other source" if entry.backup is None else shown(entry.backup.index),
                    )
                cycle = Cycle(entry, outside, monitor, lock, log)
                end = cycle.run(reason, accept_legacy=arguments.accept_legacy)
                if not folder.asked() or end.outcome is Outcome.STOPPED:
                    break
    except BusyError as error:
        end = CycleEnd(Outcome.BUSY, error.exit_code, str(error))
    except StoppedError as error:
        end = CycleEnd(Outcome.STOPPED, 1, str(error))
    if reporting:
        pipe.finish(end)
    return end


def _follow(folder: StateFolder, operator: Operator, entry: Entry, log: Log) -> None:
    """Do what actions have asked for while the entry was held; a cycle follows in any case."""
    for words in folder.asked():
        if words != ("update",):
            log.info("an action asked for: %s", " ".join(words[:1]))
        try:
            match words:
                case ["rollback", digest]:
                    operator.rollback_from(digest)
                case ["resume"]:
                    operator.resume()
                case ["export", place]:
                    operator.export(exported(entry, Path(place)))
        except StoppedError:
            raise
        except UpdaterError as error:
            log.error("%s", error)
    folder.answered()


def _show(name: str, end: CycleEnd) -> None:
    print(f"{name}: {end.message}", file=sys.stderr if end.exit else sys.stdout)

"""``check``: what would be updated; changes nothing."""

import argparse
import json

from casync_updater.cli.context import chosen, entry_log, surroundings
from casync_updater.cycle.operator import Operator, Preview
from casync_updater.errors import UpdaterError, exit_code
from casync_updater.formats.mtree import escape
from casync_updater.model import Reason, SilentMonitor


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    parser = commands.add_parser("check", help="show what would be updated, change nothing")
    parser.add_argument("names", metavar="NAME", nargs="*", help="entries (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ask every entry's sources; each is tried."""
    configuration, entries = chosen(arguments, arguments.names)
    errors: list[UpdaterError] = []
    found: dict[str, object] = {}
    with surroundings(arguments, configuration.settings) as outside:
        for entry in entries:
            log = entry_log(entry, Reason.OPERATOR)
            cycle = Operator(entry, outside, SilentMonitor(), -1, log)
            try:
                preview = cycle.preview()
            except UpdaterError as error:
                errors.append(error)
                found[entry.name] = {"error": str(error)}
                if not arguments.json:
                    print(f"{entry.name}: {error}")
            else:
                found[entry.name] = _as_json(preview)
                if not arguments.json:
                    _show(entry.name, preview)
    if arguments.json:
        print(json.dumps(found, indent=2))
    return exit_code(errors)


def _as_json(preview: Preview) -> dict[str, object]:
    changes = preview.changes
    return {
        "update": preview.update,
        "version": preview.version,
        "serial": preview.serial,
        "digest": preview.digest,
        "installed": preview.installed,
        "note": preview.note,
        "download": preview.download,
        "added": None if changes is None else [escape(path) for path in changes.added],
        "changed": None if changes is None else [escape(path) for path in changes.changed],
        "removed": None if changes is None else [escape(path) for path in changes.removed],
    }


def _show(name: str, preview: Preview) -> None:
    if not preview.update:
        print(f"{name}: {preview.note or 'up to date'} ({preview.installed or preview.version})")
        return
    print(f"{name}: {preview.installed or 'nothing'} -> {preview.version}")
    changes = preview.changes
    if changes is not None:
        print(
            f"  {len(changes.added)} added, {len(changes.changed)} changed,"
            f" {len(changes.removed)} removed"
        )
    print(f"  {preview.download / 1e6:.1f} MB of chunks to fetch (uncompressed)")
    for line in preview.announced:
        print(f"  * {line}")

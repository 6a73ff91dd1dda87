"""``verify``: does the destination still hold what was installed?"""

import argparse
import json

from casync_updater.cli.single import add_name_parser, held
from casync_updater.errors import LocalError
from casync_updater.formats.mtree import escape


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    parser = add_name_parser(
        commands, "verify", "compare the destination with what was installed", run
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Read the whole destination; exit code 1 where it differs."""
    with held(arguments, reads=True) as (entry, cycle):
        installed = cycle.installed()
        if installed is None:
            raise LocalError(f"{entry.name}: nothing was installed yet")
        found = [(escape(item.path), item.what) for item in cycle.verify()]
    if arguments.json:
        document = {
            "entry": entry.name,
            "version": installed.version,
            "digest": installed.digest,
            "differences": [{"path": path, "what": what} for path, what in found],
        }
        print(json.dumps(document, indent=2))
    else:
        for path, what in found:
            print(f"{path}: {what}")
        name = installed.version or installed.digest
        verdict = f"differs from {name} in {len(found)} places" if found else f"is {name}"
        print(f"{entry.name}: {entry.destination} {verdict}")
    return 1 if found else 0

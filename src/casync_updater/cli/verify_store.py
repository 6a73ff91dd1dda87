"""``verify-store``: check a drive or a site on any machine, without a configuration."""

import argparse
import json
from pathlib import Path
from typing import Any

from casync_updater.clock import SystemClock
from casync_updater.cycle.inspect import Inspected, inspect
from casync_updater.errors import LocalError, exit_code


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    parser = commands.add_parser(
        "verify-store", help="check everything on a drive: signatures, indexes, chunks"
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the drive's root, or a folder")
    parser.add_argument(
        "--keyring",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="who must have signed (may be given more than once; default: signatures are not"
        " demanded)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 4 where something is not the publisher's, 1 where something is damaged."""
    folder: Path = arguments.folder.absolute()
    if not folder.is_dir():
        raise LocalError(f"the folder {folder} does not exist")
    found = list(inspect(folder, [path.absolute() for path in arguments.keyring], SystemClock()))
    if not found:
        raise LocalError(f"{folder}: there is neither a release nor an index")
    if arguments.json:
        print(json.dumps({"releases": [_document(one) for one in found]}, indent=2))
    else:
        for one in found:
            print(_line(one))
    return exit_code([one.error for one in found if one.error is not None])


def _line(one: Inspected) -> str:
    if one.error is not None:
        return f"{one.index}: {one.error}"
    assert one.vouched is not None
    release = one.vouched.release
    who = "signed" if one.vouched.signed else "not signed"
    return (
        f"{one.index}: {release.project} {release.version} (serial {release.serial}), {who},"
        f" {one.chunks} chunks, complete"
    )


def _document(one: Inspected) -> dict[str, Any]:
    vouched = one.vouched
    return {
        "index": str(one.index),
        "project": vouched and vouched.release.project,
        "version": vouched and vouched.release.version,
        "serial": vouched and vouched.release.serial,
        "signed": vouched is not None and vouched.signed,
        "chunks": one.chunks,
        "complete": one.error is None,
        "error": None if one.error is None else str(one.error),
    }

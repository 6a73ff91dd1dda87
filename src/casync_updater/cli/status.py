"""``status``: what is installed, what is going on, what is wrong. Reads files only."""

import argparse
import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from casync_updater import __version__
from casync_updater.cli.context import chosen
from casync_updater.cli.places import state_dir
from casync_updater.cycle.staging import survey
from casync_updater.errors import LocalError
from casync_updater.live import read_live
from casync_updater.model import Entry, Installed
from casync_updater.online.report import line, public
from casync_updater.state import State, StateFolder


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    parser = commands.add_parser("status", help="show what is installed and what is going on")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show every entry."""
    _, entries = chosen(arguments, ())
    root = state_dir(arguments)
    live = read_live(root)
    hosts = (live.get("online") or {}).get("hosts", ())
    drives = live.get("drives", ())
    found = [
        _entry(
            entry,
            root,
            StateFolder(root, entry).peek(),
            live.get("entries", {}).get(entry.name, {}),
        )
        for entry in entries
    ]
    if arguments.json:
        online = None if live.get("online") is None else {"hosts": [*map(public, hosts)]}
        document = {"version": __version__, "online": online, "drives": drives, "entries": found}
        print(json.dumps(document, indent=2))
    else:
        for host in hosts:
            print(line(host))
        for drive in drives:
            print("drive {name} ({mountPoint}): {message}".format(**drive))
        for item in found:
            _show(item)
    return 0


def _entry(entry: Entry, root: Path, state: State, live: dict[str, Any]) -> dict[str, object]:
    try:
        why = survey(entry, state.no_exchange).why
    except LocalError as error:
        why = str(error)
    return {
        "name": entry.name,
        "project": entry.project,
        "destination": str(entry.destination),
        "atomic": why is None,
        "notAtomicBecause": why,
        "installed": None if state.installed is None else _installed(state.installed),
        "lastCheck": _time(state.last_check),
        "lastSuccess": _time(state.last_success),
        "nextCheck": _time(live.get("nextCheck")),
        "state": live.get("state", "idle"),
        "reason": live.get("reason"),
        "progress": live.get("progress"),
        "pending": [action.command for action in state.pending],
        "refused": None
        if state.refused is None
        else {**dataclasses.asdict(state.refused), "since": _time(state.refused.since)},
        "lastError": state.last_error,
        "held": state.held,
        "selfUpdate": _self_update(root) if entry.self_update else None,
    }


def _self_update(root: Path) -> str | None:
    # Loaded here, since hardly any machine needs it: it reads packages.
    from casync_updater.cycle.selfupdate import SelfUpdate  # noqa: PLC0415

    return SelfUpdate(root).words()


def _installed(installed: Installed) -> dict[str, object]:
    return {
        "version": installed.version,
        "serial": installed.serial,
        "digest": installed.digest,
        "since": _time(installed.since),
        "source": installed.source,
    }


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _show(item: dict[str, Any]) -> None:
    installed = item["installed"]
    print(f"{item['name']} ({item['destination']})")
    if installed is None:
        print("  nothing installed yet")
    else:
        name = installed["version"] or installed["digest"]
        print(f"  {name} since {installed['since']}, from {installed['source']}")
    lines = {
        "state": item["state"] if item["state"] != "idle" else None,
        "last success": item["lastSuccess"],
        "started by": item["reason"],
        "next check": item["nextCheck"],
        "held": item["held"],
        "casync-updater": item["selfUpdate"],
        "not atomic": item["notAtomicBecause"],
        "last error": item["lastError"],
        "refused": item["refused"]
        and "{check}: expected {expected}, found {found} at {source}".format(**item["refused"]),
        "pending": "; ".join(item["pending"]) or None,
    }
    for label, value in lines.items():
        if value is not None:
            print(f"  {label}: {value}")

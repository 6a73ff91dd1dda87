"""Takes over what the old installer left on a device. Run once, by the package's postinst.

The old installer put Node scripts into ``/opt/casync-updater``, a unit into
``/lib/systemd/system`` (which the package's own has replaced by the time this runs) and a
``client.json`` (``default.json`` in its first version) with a single entry, which updated
``/opt/casync-updater`` itself, beside the user's entries in ``/etc/casync-updater``. What
happens to each:

- that one entry is set aside: it would go on replacing scripts that nothing runs;
- every other entry stays as it is, in the same file;
- commands of these entries go on running in ``/opt/casync-updater``, where the old service ran
  and relative commands pointed, by a drop-in of the settings;
- a copy of the old unit in ``/etc/systemd/system``, which would hide the package's, is set
  aside;
- ``/opt/casync-updater`` stays: the user's commands may use files in it.

A second run finds nothing left to do, and a run that was cut off is completed by the next.
"""

import json
import posixpath
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from systemd import journal

from casync_updater.files import write_atomic

_OLD_FOLDER = "/opt/casync-updater"
_OLD_PROGRAM = f"{_OLD_FOLDER}/client.js"
_SELF_UPDATES = (
    "https://update.casync-updater.net/master/index.caidx",
    "https://bccsa.github.io/casync-updater/index.caidx",
)
_SELF_RESTARTS = (
    "systemctl restart casync-updater",
    "systemctl restart casync-updater.service",
)
_ASIDE = ".set-aside"
_DROP_IN = f"""\
# Written when the package took over an older installation: its service ran in this folder, and
# commands of its entries may name files relative to it. Remove this file when none does.
[actions]
directory = {_OLD_FOLDER}
"""


@dataclass(frozen=True, slots=True)
class Report:
    """What was done, and what was found and left, as sentences for the administrator."""

    done: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def take_over(root: Path = Path("/")) -> Report:
    """Take over an old installation below `root`, if there is one.

    Raises:
        OSError: a file cannot be written or renamed; another run goes on from there.
    """
    done: list[str] = []
    left: list[str] = []
    settings = root / "etc/casync-updater"
    for file in filter(Path.is_file, sorted(settings.glob("*.json"))):
        _set_self_update_aside(file, done, left)
    unit = root / "etc/systemd/system/casync-updater.service"
    if unit.is_file() and not unit.is_symlink() and _OLD_PROGRAM.encode() in unit.read_bytes():
        aside = _aside(unit)
        unit.rename(aside)
        done.append(f"{unit} started the old programs: it is now {aside.name}.")
    drop_in = settings / "casync-updater.conf.d/old-installation.conf"
    if (root / _OLD_PROGRAM.lstrip("/")).exists():
        if not drop_in.exists():
            drop_in.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(drop_in, _DROP_IN.encode(), mode=0o644)
            done.append(f"Actions go on running in {_OLD_FOLDER}, as {drop_in} says.")
        left.append(
            f"The old programs in {_OLD_FOLDER} are kept, since actions may use files there. "
            f"When none does: rm -r {_OLD_FOLDER} {drop_in}"
        )
    return Report(tuple(done), tuple(left))


def _set_self_update_aside(file: Path, done: list[str], left: list[str]) -> None:
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        left.append(f"{file} is not valid JSON ({error}): it is left as it is.")
        return
    entries = document if isinstance(document, list) else [document]
    others = [entry for entry in entries if not _is_self_update(entry)]
    if len(others) == len(entries):
        return
    aside = _aside(file)
    if others:
        shutil.copy2(file, aside)
        text = json.dumps(others, indent=4, ensure_ascii=False) + "\n"
        write_atomic(file.resolve(), text.encode(), mode=file.stat().st_mode & 0o777)
        done.append(
            f"{file}: the entry that updated {_OLD_FOLDER} itself is removed, the others stay; "
            f"the whole file as it was is now {aside.name}."
        )
    else:
        file.rename(aside)
        done.append(f"{file} only updated {_OLD_FOLDER} itself: it is now {aside.name}.")


def _is_self_update(entry: object) -> bool:
    """Whether an entry does what the old installer's own did, and nothing else."""
    if not isinstance(entry, dict):
        return False
    destination = entry.get("dstPath")
    if not isinstance(destination, str) or posixpath.normpath(destination) != _OLD_FOLDER:
        return False
    return entry.get("srcIndex") in _SELF_UPDATES and all(
        command in _SELF_RESTARTS for command in _commands(entry)
    )


def _commands(entry: dict[str, object]) -> list[object]:
    """Every command of an entry; whatever is no list of commands counts as one."""
    triggers = entry.get("triggers", [])
    commands: list[object] = []
    for trigger in triggers if isinstance(triggers, list) else [triggers]:
        actions = trigger.get("actions", []) if isinstance(trigger, dict) else trigger
        commands += actions if isinstance(actions, list) else [actions]
    startup = entry.get("startup", [])
    return commands + (startup if isinstance(startup, list) else [startup])


def _aside(file: Path) -> Path:
    """A free name beside a file that neither the client nor systemd reads."""
    number = 1
    aside = file.with_name(file.name + _ASIDE)
    while aside.exists():
        number += 1
        aside = file.with_name(f"{file.name}{_ASIDE}.{number}")
    return aside


def main() -> int:
    """Take over what there is, and say so here and in the journal."""
    report = take_over()
    for line in report.done:
        journal.send(line, SYSLOG_IDENTIFIER="casync-updater", PRIORITY=journal.LOG_NOTICE)
    for line in (*report.done, *report.left):
        print(f"casync-updater: {line}")  # noqa: T201 - apt shows it to the administrator
    return 0


if __name__ == "__main__":
    sys.exit(main())

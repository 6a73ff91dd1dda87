"""Daemon-wide settings: ``casync-updater.conf`` and its drop-ins, ConfigObj's INI.

`KEYS` declares every key once: the configspec, the commented file that is installed and the
messages are made from it, the defaults from the dataclasses of `model`.
"""

import contextlib
import ipaddress
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from casync_updater.config import document
from casync_updater.config.problems import (
    BadValueError,
    Problems,
    is_folder,
    is_readable_file,
    nearly,
    path,
    shorten,
    shown,
)
from casync_updater.model import Settings

FILE_NAME = "casync-updater.conf"

_YEAR = 366 * 86400
_HOST = re.compile(r"(?:\[(?P<address>[^\]]+)\]|(?P<name>[\w.-]+))(?::(?P<port>[0-9]{1,5}))?")
_PORT = 443
_QUOTES = 20
"""In one line; ConfigObj's time grows sevenfold with each four of them where it fails."""


@dataclass(frozen=True, slots=True)
class Key:
    """One setting.

    Attributes:
        check: its check in the configspec, without the default.
        meaning: what it does, with its unit, as it stands in the commented file.
    """

    check: str
    meaning: str


_SECONDS = f"seconds(0.01, {_YEAR})"
_SECONDS_OR_NONE = f"seconds(0, {_YEAR})"

KEYS: Mapping[str, Mapping[str, Key]] = {
    "online": {
        "enabled": Key("flag", "Probe the update hosts, and start a cycle when one comes back."),
        "hosts": Key(
            "hosts",
            "Hosts to probe beside those of the entries' srcIndex, separated by commas: name,"
            " name:port or [address]:port, with port 443 where none is named.",
        ),
        "method": Key(
            "choice(auto, icmp, tcp)",
            "How to probe: icmp (ping), tcp (connect), or auto, which takes what is answered.",
        ),
        "interval_offline": Key(_SECONDS, "Seconds between two probes while a host is offline."),
        "interval_online": Key(
            _SECONDS,
            "Seconds between two probes while a host is online; finds a dead uplink behind a"
            " live link.",
        ),
        "min_age": Key(
            _SECONDS_OR_NONE,
            "Entries checked with success less than these seconds ago are spared when a host"
            " comes back.",
        ),
        "splay": Key(
            _SECONDS_OR_NONE,
            "Wait up to so many seconds, by chance, so that many devices do not come at once.",
        ),
    },
    "fetch": {
        "connections": Key(
            "whole(1, 64)",
            "The most connections per entry that fetch chunks side by side; 8 are used, and more"
            " where the server is far.",
        ),
        "connect_timeout": Key(_SECONDS, "Seconds that setting up a connection may take."),
        "read_timeout": Key(_SECONDS, "Seconds without a byte after which a request is given up."),
        "min_rate": Key("whole(1, 1000000000)", "Bytes per second below which a request stalls."),
        "retries": Key("whole(0, 100)", "How often a request that failed is made again."),
        "retry_max_wait": Key(_SECONDS, "The longest wait between two tries, in seconds."),
        "ca_bundle": Key(
            "file", "File of certificates that servers are checked with, in place of the system's."
        ),
        "client_cert": Key("file", "Certificate (PEM) that this device shows to servers."),
        "client_key": Key("file", "Private key of client_cert, where that file does not hold it."),
        "credentials": Key("file", "User names and passwords by host, in the format of netrc."),
    },
    "trust": {
        "require": Key(
            "flag",
            "Demand a signature for every entry. A value that cannot be read counts as yes.",
        ),
        "keyrings": Key(
            "path", "Folder of keyrings (*.gpg, *.asc) for entries that have no signedBy."
        ),
    },
    "actions": {
        "directory": Key("folder", "Folder in which actions and startup commands run."),
        "timeout": Key(_SECONDS, "Seconds after which an action is ended; startup has no limit."),
    },
    "media": {
        "labels": Key(
            "labels",
            "Labels of file systems, separated by commas: a drive that has one of them is mounted"
            " at /run/media/casync-updater/LABEL, brings its updates to the entries whose"
            " backupIndex lies there, gets a report, and is unmounted. None is the default: who"
            " mounts drives is up to you, and one that is mounted is used all the same.",
        ),
        "on_start": Key(
            "command",
            "Shell command that runs when a drive was found, to blink a LED for instance.",
        ),
        "on_success": Key("command", "The same when it is done and all went well."),
        "on_failure": Key("command", "The same when it is done and something failed."),
    },
    "daemon": {
        "verify_interval": Key(
            _SECONDS, "Seconds between two checks of the installed content; damage is repaired."
        ),
        "full_digest": Key("flag", "Digest the whole tree after every update."),
        "stall_timeout": Key(
            _SECONDS, "Seconds without progress after which a cycle's process is ended."
        ),
        "self_update_trial": Key(
            _SECONDS,
            "A new version of casync-updater that an entry with selfUpdate installed, and that"
            " completes no check of that entry within these seconds, is replaced by the version"
            " before. Seconds in which the update server does not answer do not count.",
        ),
    },
}
"""Every setting, by section and name. A new one needs a field in `model`, a line here, and the
installed file made anew from `commented`."""


class LoadedSettings(NamedTuple):
    """The settings, and what was wrong with the files they are from."""

    settings: Settings
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


class SettingsFiles(NamedTuple):
    """Where settings are read from: a file, if there is one, and its drop-ins in their order."""

    file: Path | None
    dropins: tuple[Path, ...]


def settings_files(path: Path, chosen: Path | None = None) -> SettingsFiles:
    """Which files hold the settings.

    Args:
        path: where the entries are; a folder may hold ``casync-updater.conf``, a single JSON
            file stands for itself and has the defaults.
        chosen: what ``--settings`` names; counts in place of what `path` has.

    Returns:
        The file, and the drop-ins ``*.conf`` in the folder called like it with ``.d`` behind.
        A chosen file is returned whether it exists or not, so that loading it reports it.
    """
    if chosen is None and not is_folder(path):
        return SettingsFiles(None, ())
    file = chosen or path / FILE_NAME
    folder = file.with_name(f"{file.name}.d")
    try:
        dropins = tuple(document.files(folder, ".conf")) if is_folder(folder) else ()
    except BadValueError:
        dropins = (folder,)  # reading it as a file reports why that does not work
    return SettingsFiles(file if chosen or os.path.lexists(file) else None, dropins)


def load_settings(file: Path | None, dropins: Sequence[Path] = ()) -> LoadedSettings:
    """Read the settings.

    Args:
        file: ``casync-updater.conf``, or None where there is none.
        dropins: files whose values go before those of `file` and of each other, in this order.

    Returns:
        The settings, and every error and warning as ``file: [section] key: what is wrong``.
        A key that is wrong in any file has its default, except ``[trust] require``, which then
        is on: a slip of the pen must not let unsigned releases in. Nothing is raised.
    """
    problems = Problems()
    values: dict[tuple[str, str], object] = {}
    wrong: set[tuple[str, str]] = set()
    for each in (*([file] if file else []), *dropins):
        for place, value in _read(each, problems).items():
            if isinstance(value, BadValueError):
                wrong.add(place)
            values[place] = value
    for place in wrong:
        values[place] = True if place == ("trust", "require") else None
    default = Settings()
    sections = {
        section: replace(
            getattr(default, section),
            **{
                name: values[section, name]
                for name in keys
                if values.get((section, name)) is not None
            },
        )
        for section, keys in KEYS.items()
    }
    settings = replace(default, **sections)
    if settings.fetch.client_key and not settings.fetch.client_cert:
        where = str([*([file] if file else []), *dropins][-1])
        problems.error(where, "[fetch] client_key", "has no client_cert beside it; name both")
    return LoadedSettings(settings, tuple(problems.errors), tuple(problems.warnings))


def configspec() -> list[str]:
    """The lines of the configspec: each key's check and default."""
    default = Settings()
    lines = []
    for section, keys in KEYS.items():
        lines.append(f"[{section}]")
        for name, key in keys.items():
            value = _written(getattr(getattr(default, section), name))
            function, _, bounds = key.check.partition("(")
            arguments = [*filter(None, [bounds.rstrip(")")]), f'default="{value}"']
            lines.append(f"{name} = {function}({', '.join(arguments)})")
    return lines


def commented() -> str:
    """The file that is installed: every key commented out, with its default and meaning."""
    default = Settings()
    parts = [
        "# Settings of casync-updater, the client. What is updated stands in the *.json files\n"
        "# beside this one. Every key is shown with its default: remove the '#' in front to\n"
        f"# change it here, or put the change into a file *.conf in {FILE_NAME}.d/,\n"
        "# which package upgrades leave alone; its values go before the ones of this file.\n"
        "# `systemctl reload casync-updater` applies a change, and\n"
        "# `casync-updater validate` checks it. Durations are seconds, fractions are allowed.\n"
    ]
    for section, keys in KEYS.items():
        parts.append(f"\n[{section}]\n")
        for name, key in keys.items():
            value = _written(getattr(getattr(default, section), name))
            about = textwrap.fill(key.meaning, 88, initial_indent="# ", subsequent_indent="# ")
            parts.append(f"\n{about}\n#{name} = {value}".rstrip() + "\n")
    return "".join(parts)


def _read(file: Path, problems: Problems) -> dict[tuple[str, str], object]:
    """The checked values of a file; a `BadValueError` for each that was reported."""
    # Loaded here, since the idle daemon shall stay small.
    from configobj import ConfigObj, ConfigObjError, flatten_errors  # noqa: PLC0415
    from configobj.validate import ValidateError, Validator  # noqa: PLC0415

    def check(parse: Callable[..., object]) -> Callable[..., object]:
        def run(value: object, *arguments: str) -> object:
            try:
                return parse(value, *arguments)
            except BadValueError as error:
                raise ValidateError(str(error)) from None

        return run

    try:
        lines = document.content(file).splitlines()
    except BadValueError as error:
        problems.error(str(file), str(error))
        return {}
    for number, line in enumerate(lines):
        if line.count('"') + line.count("'") > _QUOTES and not line.lstrip().startswith("#"):
            what = f"{shown(line.strip())} has more than {_QUOTES} quotes, is it of another file?"
            problems.error(str(file), f"line {number + 1}", what)
            lines[number] = ""
    try:
        raw = ConfigObj(lines, interpolation=False)
    except ConfigObjError as error:
        raw = error.config
        for each in error.errors:
            problems.error(str(file), f"line {each.line_number}", _syntax(str(each), each.line))
    known: dict[str, dict[str, object]] = {}
    for section, name, value in _known(file, raw, problems):
        known.setdefault(section, {})[name] = value
    checked = ConfigObj(known, configspec=configspec(), interpolation=False, list_values=False)
    result = checked.validate(
        Validator({name: check(parse) for name, parse in CHECKS.items()}), preserve_errors=True
    )
    values: dict[tuple[str, str], object] = {
        (section, name): checked[section][name] for section in known for name in known[section]
    }
    for (section,), name, wrong in flatten_errors(checked, result):
        problems.error(str(file), f"[{section}] {name}", str(wrong))
        values[section, name] = BadValueError(str(wrong))
    return values


def _known(
    file: Path, raw: Mapping[str, object], problems: Problems
) -> Iterator[tuple[str, str, object]]:
    """The values whose section and key are known; all others are reported."""
    for section, content in raw.items():
        if not isinstance(content, Mapping):
            _report_stray(file, section, problems)
            continue
        if section not in KEYS:
            label = f"[{shorten(section)}]"
            near = nearly(section, KEYS)
            if near:
                problems.error(str(file), label, f"is no known section; did you mean [{near}]?")
            else:
                problems.warn(str(file), label, "is no known section, and has no effect")
            continue
        for name, value in content.items():
            label = f"[{section}] {shorten(name)}"
            near = nearly(name, KEYS[section])
            if isinstance(value, Mapping):
                problems.error(str(file), label, "is a section; write [NAME] with one bracket")
            elif name in KEYS[section]:
                yield section, name, value
            elif near:
                problems.error(str(file), label, f"is no known key; did you mean {near!r}?")
            elif home := next((other for other in KEYS if name in KEYS[other]), None):
                problems.error(str(file), label, f"belongs into the section [{home}]")
            else:
                problems.warn(str(file), label, "is no known key, and has no effect")


def _report_stray(file: Path, name: str, problems: Problems) -> None:
    """A key before the first section."""
    near = {section: nearly(name, keys) for section, keys in KEYS.items()}
    home = next((section for section in KEYS if near[section]), None)
    if home:
        what = f"stands before the first section; is it {near[home]!r} of [{home}]?"
        problems.error(str(file), shorten(name), what)
    elif name in KEYS:
        problems.error(str(file), name, f"is a section; write [{name}] on a line of its own")
    else:
        problems.warn(str(file), shorten(name), "stands before the first section: no effect")


def _syntax(message: str, source: str) -> str:
    if message.startswith("Duplicate"):
        return f"{shown(source.strip())} stands more than once; keep one of them"
    if message.startswith("Parse error"):
        return f"{shown(source.strip())} has a quote that is not closed"
    return f"{shown(source.strip())} is neither [section] nor key = value"


def _written(value: object) -> str:
    """A default as it stands in the file."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _single(value: object) -> str:
    if not isinstance(value, str):
        raise BadValueError("is a list; put quotes around a value that has a comma")
    return value


def _flag(value: object) -> bool:
    word = _single(value).lower()
    if word not in ("yes", "true", "on", "1", "no", "false", "off", "0"):
        raise BadValueError(f"is {shown(value)}; write yes or no")
    return word in ("yes", "true", "on", "1")


def _seconds(value: object, low: str, high: str) -> float:
    try:
        found = float(_single(value))
    except ValueError:
        found = math.nan
    if not float(low) <= found <= float(high):  # which NaN does not pass either
        raise BadValueError(f"is {shown(value)}; write a number of seconds from {low} to {high}")
    return found


def _whole(value: object, low: str, high: str) -> int:
    word = _single(value)
    if not re.fullmatch(r"[0-9]{1,18}", word) or not int(low) <= int(word) <= int(high):
        raise BadValueError(f"is {shown(value)}; write a whole number from {low} to {high}")
    return int(word)


def _choice(value: object, *choices: str) -> str:
    if value not in choices:
        raise BadValueError(f"is {shown(value)}; it can be {' or '.join(choices)}")
    return str(value)


def _hosts(value: object) -> tuple[tuple[str, int], ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list):
        raise BadValueError("is no list; write host names separated by commas")
    return tuple(_host(word) for word in words if word)


def _host(word: str) -> tuple[str, int]:
    """A host and its port, from ``name``, ``name:port``, ``address`` or ``[address]:port``."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(word)), _PORT
    found = _HOST.fullmatch(word)
    try:
        if found is None:
            raise ValueError(word)
        name = found["name"] or str(ipaddress.ip_address(found["address"]))
        port = int(found["port"] or _PORT)
        if not 0 < port < 1 << 16:
            raise ValueError(word)
    except ValueError:
        raise BadValueError(
            f"has {shown(word)}; write name, name:port or [address]:port, no URLs, between commas"
        ) from None
    return name.lower(), port


def _labels(value: object) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list):
        raise BadValueError("is no list; write labels separated by commas")
    for word in words:
        if "/" in word or word in (".", "..") or not word.isprintable():
            raise BadValueError(
                f"has {shown(word)}, which cannot be the name of a folder to mount at; give the"
                " drive a label without '/' and control characters"
            )
    return tuple(dict.fromkeys(word for word in words if word))


def _command(value: object) -> str:
    if isinstance(value, list):
        raise BadValueError("has a comma; put quotes around the whole command")
    return _single(value)


def _path(value: object) -> Path:
    found = path(_single(value))
    if not found.is_absolute():
        raise BadValueError(f"is {shown(value)}; it must be an absolute path")
    return found


def _folder(value: object) -> Path:
    found = _path(value)
    if not is_folder(found):
        raise BadValueError(f"is {shown(value)}, which is no folder")
    return found


def _file(value: object) -> Path | None:
    if value == "":
        return None
    found = _path(value)
    if not is_readable_file(found):
        raise BadValueError(f"is {shown(value)}, which is no file that can be read")
    return found


CHECKS: Mapping[str, Callable[..., object]] = {
    "flag": _flag,
    "seconds": _seconds,
    "whole": _whole,
    "choice": _choice,
    "hosts": _hosts,
    "labels": _labels,
    "command": _command,
    "path": _path,
    "folder": _folder,
    "file": _file,
}
"""The checks of the configspec, by name."""

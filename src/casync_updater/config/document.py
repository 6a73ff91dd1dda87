"""From a path to the JSON objects that stand there, one per entry."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from casync_updater.config.problems import (
    BadValueError,
    JsonObject,
    Problems,
    Reader,
    kind,
    shorten,
)

_SIZE_LIMIT = 1 << 20


def files(folder: Path, suffix: str) -> list[Path]:
    """The files of a configuration folder in the order of their names.

    Hidden files and what editors leave behind (``#x.json``, ``~x.json``; ``x.json~`` has
    another suffix) are no configuration.

    Raises:
        BadValueError: the folder cannot be read.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise BadValueError(_unreadable(error)) from None
    return [
        folder / name
        for name in names
        if name.endswith(suffix) and not name.startswith((".", "#", "~"))
    ]


def content(file: Path) -> str:
    """The text of a configuration file.

    Raises:
        BadValueError: it cannot be read, is no regular file, is too large or no UTF-8.
    """
    try:
        # A FIFO that got here by accident would hold up the daemon for ever.
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise BadValueError(
                    "is no regular file; put the configuration into a file of its own"
                )
            data = stream.read(_SIZE_LIMIT + 1)
    except OSError as error:
        raise BadValueError(_unreadable(error)) from None
    if len(data) > _SIZE_LIMIT:
        raise BadValueError(f"is larger than {_SIZE_LIMIT} bytes; is this a configuration file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = data.count(b"\n", 0, error.start) + 1
        raise BadValueError(
            f"is not UTF-8 (byte 0x{data[error.start]:02x} in line {where}); save it as UTF-8"
        ) from None


def read(file: Path, problems: Problems, label: Callable[[JsonObject], str]) -> Iterator[Reader]:
    """A reader for every entry of a file that holds an object or an array of objects.

    Args:
        file: the configuration file.
        problems: takes what is wrong with the file.
        label: what messages call an entry beside its number; may be empty.
    """
    where = str(file)
    try:
        value = _parsed(content(file))
    except BadValueError as error:
        problems.error(where, str(error))
        return
    entries = value if isinstance(value, list) else [value]
    if not entries:
        problems.warn(where, "has no entry: there is nothing to do")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, JsonObject):
            what = f"must be an object {{...}}, and is {kind(entry)}"
            problems.error(where, f"entry {number}", what)
            continue
        called = label(entry)
        title = f"entry {number} ({shorten(called)})" if called else f"entry {number}"
        yield Reader(entry, (where, title), problems)


def _parsed(source: str) -> object:
    if not source.strip():
        raise BadValueError("is empty; write an entry {...} or an array of entries [...] into it")
    try:
        return json.loads(source, object_pairs_hook=JsonObject)
    except json.JSONDecodeError as error:
        raise BadValueError(
            f"line {error.lineno}, column {error.colno}: is no JSON: {_cause(source, error)}"
        ) from None
    except RecursionError:
        raise BadValueError("is nested too deeply; is this a configuration file?") from None
    except ValueError:  # CPython's limit on the digits of a whole number
        raise BadValueError(
            "holds a number with thousands of digits; write a smaller one"
        ) from None


def _cause(source: str, error: json.JSONDecodeError) -> str:
    """What usually leads to this error, in the words of someone who edits the file."""
    rest = source[error.pos :].lstrip()
    before = source[: error.pos].rstrip()
    if not rest:
        return "it ends too early; a closing bracket, brace or quote is missing"
    # Python 3.13 places a trailing comma's error at the comma, 3.11 behind it.
    if (before.endswith(",") and rest[0] in "]}") or rest[0] == ",":
        return "remove the comma, nothing follows it"
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments; remove it"
    if rest[0] in "'\u2018\u2019\u201c\u201d":
        return 'texts and keys stand in straight double quotes ("...")'
    if rest.startswith(("True", "False", "None")):
        return "write true, false and null in small letters"
    if error.msg.startswith("Extra data"):
        return "something follows the entry; put several entries into an array [{...}, {...}]"
    if error.msg.startswith("Expecting ',' delimiter"):
        return "a comma is missing before this, or a bracket or brace is not closed"
    if error.msg.startswith("Unterminated string"):
        return "this text has no closing double quote"
    if error.msg.startswith("Invalid control character"):
        return r"a text is not closed, or holds a line break or tab; write \n or \t"
    if error.msg.startswith("Invalid \\"):
        return r"a backslash in a text is written \\"
    return error.msg


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror}"

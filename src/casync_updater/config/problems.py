"""How a configuration is read without ever giving up: values, and a line for each problem.

A parser takes what the file has and returns a checked value, or raises `BadValueError` with what is
wrong and what to do; a `Reader` knows where the value stands, writes the line and goes on.
"""

import difflib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from casync_updater.errors import masked

T = TypeVar("T")

_SHOWN = 80
_LINE_LIMIT = 200
_PATH_LIMIT = 4095
_NAME_LIMIT = 255


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """What could be read, and everything that could not.

    Attributes:
        entries: the healthy entries, in the order of the files.
        problems: errors, one line each: ``file: entry: key: what is wrong and what to do``.
        warnings: what works, and is probably not what was meant.
    """

    entries: tuple[T, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


class BadValueError(ValueError):
    """What is wrong with one value, and what to do about it."""


class Problems:
    """Collects errors and warnings as single printable lines."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def error(self, *parts: str) -> None:
        """Something that keeps an entry, a file or a value from being used."""
        self.errors.append(_printable(": ".join(parts)))

    def warn(self, *parts: str) -> None:
        """Something that is left out, or does nothing."""
        self.warnings.append(_printable(": ".join(parts)))


class JsonObject(dict[str, object]):
    """A JSON object that remembers which keys stood in it more than once."""

    def __init__(self, pairs: Iterable[tuple[str, object]]) -> None:
        self.repeated: set[str] = set()
        super().__init__()
        for key, value in pairs:
            if key in self:
                self.repeated.add(key)
            self[key] = value


class Reader:
    """One JSON object of a configuration file: hands out its keys, reports what is wrong.

    The keys that are asked for are the known ones; `finish` reports all others.
    """

    def __init__(
        self, data: JsonObject, where: tuple[str, ...], problems: Problems, prefix: str = ""
    ) -> None:
        self.where = where
        self._data = data
        self._problems = problems
        self._prefix = prefix
        self._errors_before = len(problems.errors)
        self._known: list[str] = []

    @property
    def failed(self) -> bool:
        """Whether anything was wrong since this object was begun."""
        return len(self._problems.errors) > self._errors_before

    def has(self, key: str) -> bool:
        """Whether the object has the key."""
        return key in self._data

    def error(self, key: str, what: str) -> None:
        """Report an error of a key."""
        self._problems.error(*self.where, self._prefix + key, what)

    def warn(self, key: str, what: str) -> None:
        """Report a warning about a key."""
        self._problems.warn(*self.where, self._prefix + key, what)

    def drop_blank(self, *keys: str) -> None:
        """Treat null and an empty text as absent, which they were to the old programs."""
        for key in keys:
            if self._data.get(key, key) in (None, ""):
                del self._data[key]
                self.warn(key, "is empty, and counts as not given; leave the key out")

    def required(self, key: str, parse: Callable[[object], T], why: str) -> T | None:
        """The key's value; None, and an error that says why it is needed, where it is missing."""
        if key not in self._data:
            self._known.append(key)
            self.error(key, f"is missing; {why}")
            return None
        return self.optional(key, parse)

    def optional(self, key: str, parse: Callable[[object], T]) -> T | None:
        """The key's value; None where it is missing or wrong."""
        self._known.append(key)
        return self._parsed(key, parse, self._data[key]) if key in self._data else None

    def each(
        self, key: str, parse: Callable[[object], T], *, single: bool = False
    ) -> tuple[T, ...]:
        """The values of a list; with `single`, a value that stands alone is a list of one."""
        found = (
            self._parsed(label, parse, value) for label, value in self._items(key, single=single)
        )
        return tuple(value for value in found if value is not None)

    def objects(self, key: str) -> Iterator["Reader"]:
        """A reader for every object of a list."""
        for label, value in self._items(key, single=False):
            if isinstance(value, JsonObject):
                yield Reader(value, self.where, self._problems, f"{self._prefix}{label}.")
            else:
                self.error(label, f"must be an object {{...}}, and is {kind(value)}")

    def finish(self) -> None:
        """Report keys that nobody asked for, and keys that stand more than once."""
        for key in sorted(self._data.repeated):
            self.error(shorten(key), "stands more than once in one object; keep one of them")
        for key in (key for key in self._data if key not in self._known):
            near = nearly(key, self._known)
            if near:
                self.error(shorten(key), f"is no known key; did you mean {near!r}?")
            else:
                self.warn(shorten(key), "is no known key, and has no effect")

    def _items(self, key: str, *, single: bool) -> list[tuple[str, object]]:
        self._known.append(key)
        if key not in self._data:
            return []
        value = self._data[key]
        if isinstance(value, list):
            return [(f"{key}[{number}]", item) for number, item in enumerate(value)]
        if single:
            return [(key, value)]
        self.error(key, f"must be a list [...], and is {kind(value)}")
        return []

    def _parsed(self, label: str, parse: Callable[[object], T], value: object) -> T | None:
        try:
            return parse(value)
        except BadValueError as error:
            self.error(label, str(error))
            return None


def kind(value: object) -> str:
    """How JSON names the type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, list) else "an object"


def shown(value: object) -> str:
    """A value for a message: short, on one line, without credentials."""
    if isinstance(value, str):
        return repr(shorten(masked(value)))
    if isinstance(value, (bool, int, float)) or value is None:
        return shorten(json.dumps(value))
    return kind(value)


def shorten(text: str) -> str:
    """The text, cut where it is too long for a message."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def nearly(word: str, known: Iterable[str]) -> str | None:
    """The known word that this one was probably meant to be."""
    plain = {_plain(candidate): candidate for candidate in known}
    matches = difflib.get_close_matches(_plain(word[:_LINE_LIMIT]), plain, n=1, cutoff=0.8)
    return plain[matches[0]] if matches else None


def flag(value: object) -> bool:
    """A JSON true or false."""
    if not isinstance(value, bool):
        raise BadValueError(f"must be true or false, and is {kind(value)}")
    return value


def one_of(*choices: str) -> Callable[[object], str]:
    """A parser for one of a few words."""

    def parse(value: object) -> str:
        if value not in choices:
            raise BadValueError(
                f"is {shown(value)}; it can be {' or '.join(repr(str(each)) for each in choices)}"
            )
        return str(value)

    return parse


def text(value: object) -> str:
    """A text that is not empty, of any number of lines."""
    if not isinstance(value, str):
        raise BadValueError(f"must be a text in double quotes, and is {kind(value)}")
    if not value.strip():
        raise BadValueError("is empty; write something, or leave it out")
    if "\0" in value:
        raise BadValueError("holds a NUL character, which nothing can be called by; remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadValueError(
            "holds half of a surrogate pair (\\ud800 to \\udfff); remove it"
        ) from None
    return value


def line(value: object) -> str:
    """A text of one line, as it stands in a field of a release."""
    found = text(value)
    if not found.isprintable() or found != found.strip() or len(found) > _LINE_LIMIT:
        raise BadValueError(
            f"is {shown(found)}; it must be one line of at most {_LINE_LIMIT} characters,"
            " without spaces around it"
        )
    return found


def number(value: object) -> int | float:
    """A number; ``true`` is none, and neither are NaN and Infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = ", write it without the quotes" if isinstance(value, str) else ""
        raise BadValueError(f"must be a number, and is {kind(value)}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadValueError(f"must be a number, and is {value}; JSON knows no NaN and no Infinity")
    return value


def whole(minimum: int) -> Callable[[object], int]:
    """A parser for whole numbers from a minimum on."""

    def parse(value: object) -> int:
        found = number(value)
        if not isinstance(found, int) or found < minimum:
            raise BadValueError(f"is {shown(found)}; it must be a whole number, {minimum} or more")
        return found

    return parse


def path(value: object) -> Path:
    """A path of this machine, absolute or relative."""
    found = text(value)
    encoded = found.encode()
    longest = max(map(len, encoded.split(b"/")))
    if len(encoded) > _PATH_LIMIT or longest > _NAME_LIMIT:
        raise BadValueError(
            f"is {shown(found)}; paths have at most {_PATH_LIMIT} bytes,"
            f" and {_NAME_LIMIT} between two slashes"
        )
    # POSIX gives exactly two leading slashes a meaning of their own; Linux does not.
    return Path("/" + found.lstrip("/")) if found.startswith("/") else Path(found)


def below(value: object) -> str:
    """A path relative to a destination, in its shortest form; ``.`` is the destination."""
    found = path(value)
    if found.is_absolute():
        raise BadValueError(
            f"is {shown(value)}; it must be relative to dstPath, without a '/' in front"
        )
    if ".." in found.parts:
        raise BadValueError(f"is {shown(value)}; it must stay below dstPath, write it without '..'")
    return str(PurePosixPath(found))


def resolved(found: Path) -> Path:
    """The path with its symbolic links followed as far as that is possible."""
    try:
        return found.resolve()
    except (OSError, RuntimeError):  # a loop of links, a folder that may not be searched
        return found


def is_folder(found: Path) -> bool:
    """Whether it is a folder. `Path.is_dir` raises where a parent may not be searched."""
    return stat.S_ISDIR(_mode(found))


def is_readable_file(found: Path) -> bool:
    """Whether it is a regular file that this process can read."""
    return stat.S_ISREG(_mode(found)) and os.access(found, os.R_OK)


def is_there(found: Path) -> bool:
    """Whether anything has this path, as far as this process can see."""
    return _mode(found) != 0


def _mode(found: Path) -> int:
    try:
        return found.stat().st_mode
    except (OSError, ValueError):
        return 0


def _plain(word: str) -> str:
    return word.casefold().replace("_", "").replace("-", "")


def _printable(line: str) -> str:
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in line
    )

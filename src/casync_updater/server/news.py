"""What a release says to people: its version, and what changed."""

import re
from dataclasses import dataclass

from casync_updater.errors import LocalError
from casync_updater.model import Publication

_FILE_LIMIT = 16 << 20
_LINES = 200
_LINE_LENGTH = 500
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BULLET = re.compile(r"[*+-]\s+")


@dataclass(frozen=True, slots=True)
class News:
    """The version that a changelog's top entry names, and one line per change."""

    version: str | None = None
    changes: tuple[str, ...] = ()


def read_news(publication: Publication) -> News:
    """The news of a publication's ``changes``.

    Raises:
        LocalError: the file cannot be read.
    """
    source = publication.changes
    if source is None:
        return News()
    if isinstance(source, str):
        return news_of(source)
    try:
        with source.open("rb") as file:
            data = file.read(_FILE_LIMIT)
    except OSError as error:
        raise LocalError(f"changes: {source} cannot be read: {error.strerror}") from error
    return news_of(data.decode("utf-8", "replace"))


def news_of(text: str) -> News:
    """The top entry of a Debian changelog; of any other text every line that is not empty."""
    from debian.changelog import Changelog, ChangelogParseError  # noqa: PLC0415 - loads slowly

    try:
        (top,) = Changelog(text, max_blocks=1, strict=True)
        return News(str(top.version), _tidy(top.changes()))
    except (ChangelogParseError, ValueError):
        return News(None, _tidy(text.split("\n")))


def _tidy(lines: list[str]) -> tuple[str, ...]:
    """One line per change: a bullet's further lines are joined to it."""
    changes: list[str] = []
    in_bullet = False
    for line in lines:
        words = _UNPRINTABLE.sub(" ", line)
        text = " ".join(words.split())
        bullet = _BULLET.match(text)
        if not text or text == ".":
            in_bullet = False
        elif bullet:
            changes.append(text[bullet.end() :])
            in_bullet = True
        elif in_bullet and words.startswith(" "):
            changes[-1] += f" {text}"
        else:
            changes.append(text)
            in_bullet = False
    if len(changes) > _LINES:
        changes[_LINES:] = [f"and {len(changes) - _LINES} changes more"]
    return tuple(
        line if len(line) <= _LINE_LENGTH else line[: _LINE_LENGTH - 1] + "…" for line in changes
    )

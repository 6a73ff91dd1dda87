"""The ``.release`` file: what a publisher says about one version, in deb822.

Field names are those of apt's Release files where apt has one. A release is read from places
that nobody vouches for (an unsigned drive, a captive portal), so every way in which the text
can be wrong ends in a `ContentError` that names the source and the field.

The rules of order and expiry stand here too, as functions of values; nothing in this module
reads a file or a clock.
"""

import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from casync_updater.clock import moment
from casync_updater.errors import ContentError
from casync_updater.model import FileRef, Mark, Release

RELEASE_LIMIT = 1 << 20
"""Bytes that a release may have; more is no release."""

SERIAL_LIMIT = 1 << 53
"""Serials stay exact in every JSON reader."""

SERIAL_LEAD = 2 * 86400
"""Seconds that a serial may lie beyond its release's own Date."""

_FORMAT = "1"
_INDEX_LIMIT = 256 << 20
_MTREE_LIMIT = 1 << 30
_ARCHIVE_LIMIT = (1 << 63) - 1

_NUMBER = re.compile(r"0|[1-9][0-9]{0,19}")
_HASH = re.compile(r"[0-9a-f]{64}")
_FEATURE = re.compile(r"[0-9a-z-]{1,32}")
_FIELD = re.compile(r"[!-\"$-,.-9;-~][!-9;-~]*:")
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def format_release(release: Release) -> str:
    """The text of a release; `parse_release` gives the same value back.

    Raises:
        ContentError: the value cannot be said in this format (a line break in a version, a file
            name that is not UTF-8, a serial far beyond the date, half a second in a date).
    """
    lines = [
        f"Format: {_FORMAT}",
        f"Project: {release.project}",
        f"Version: {release.version}",
        f"Serial: {release.serial}",
        f"Date: {_format_date(release.date)}",
    ]
    if release.valid_until is not None:
        lines.append(f"Valid-Until: {_format_date(release.valid_until)}")
    lines += [f"Index: {release.index.name}", f"Archive-Digest: {release.digest}"]
    if release.features:
        lines.append(f"Features: {' '.join(release.features)}")
    lines += [f"Archive-Size: {release.archive_size}", f"Store-Size: {release.store_size}"]
    if release.changes:
        lines += ["Changes:", *(f" * {change}" for change in release.changes)]
    lines.append("SHA256:")
    for file in (release.index, release.mtree):
        if file is not None:
            lines.append(f" {file.sha256} {file.size} {file.name}")
    text = "\n".join(lines) + "\n"
    if parse_release(text, "the new release") != release:
        raise ContentError("the new release: a value has spaces or fractions that would be lost")
    return text


def parse_release(text: str | bytes, where: str) -> Release:
    """Read a release, without its signature.

    Args:
        text: the whole text; where it was signed, what gpgv gave back and nothing else.
        where: how the message of an error names it.

    Raises:
        ContentError: it is no release, or one that this program must not believe.
    """
    fields = _Fields(_paragraph(text, where), where)
    if fields.text("Format") != _FORMAT:
        raise ContentError(
            f"{where}: the release has Format {fields.text('Format')!r}; it was made for a newer"
            " casync-updater, please upgrade this one"
        )
    date = fields.date("Date")
    files = fields.files("SHA256")
    name = fields.text("Index")
    if not name.endswith((".caidx", ".caibx")):
        raise fields.error("Index", f"{name!r} ends in neither .caidx nor .caibx")
    if name not in files:
        raise fields.error("SHA256", f"the index {name!r} is not listed")
    mtree = files.get(f"{name}.mtree")
    return Release(
        project=fields.text("Project"),
        version=fields.text("Version"),
        serial=_serial(fields, date),
        date=date,
        valid_until=_valid_until(fields, date),
        index=_at_most(fields, files[name], _INDEX_LIMIT),
        mtree=mtree and _at_most(fields, mtree, _MTREE_LIMIT),
        digest=fields.hash("Archive-Digest"),
        features=fields.features("Features"),
        archive_size=fields.number("Archive-Size", _ARCHIVE_LIMIT),
        store_size=fields.number("Store-Size", _ARCHIVE_LIMIT),
        changes=fields.changes("Changes"),
    )


def _format_date(seconds: float) -> str:
    try:
        return email.utils.format_datetime(moment(seconds))
    except (ValueError, OverflowError) as error:
        raise ContentError(f"the new release: {seconds!r} is no date") from error


def _serial(fields: "_Fields", date: float) -> int:
    serial = fields.number("Serial", SERIAL_LIMIT)
    if serial > date + SERIAL_LEAD:
        raise fields.error("Serial", f"{serial} is more than two days beyond the release's Date")
    return serial


def _valid_until(fields: "_Fields", date: float) -> float | None:
    if "Valid-Until" not in fields.paragraph:
        return None
    valid_until = fields.date("Valid-Until")
    if valid_until < date:
        raise fields.error("Valid-Until", "it lies before the release's own Date")
    return valid_until


def _at_most(fields: "_Fields", file: FileRef, limit: int) -> FileRef:
    if file.size > limit:
        raise fields.error("SHA256", f"{file.name} has {file.size} bytes, at most {limit} can be")
    return file


def _paragraph(text: str | bytes, where: str) -> Mapping[str, str]:
    """The fields of a text that is exactly one deb822 paragraph.

    The lines are checked before python-debian sees them: it lets the last of two fields with
    one name win, stops at an empty line, drops lines that are no fields, takes away what looks
    like an OpenPGP signature, and splits text at more characters than the line feed.
    """
    if len(text) > RELEASE_LIMIT:
        raise ContentError(f"{where}: more than {RELEASE_LIMIT} bytes, so this is no release")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ContentError(f"{where}: the release is not UTF-8 ({error.reason})") from error
    lines = text.removesuffix("\n").split("\n")
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if _UNPRINTABLE.search(line):
            raise ContentError(f"{where}: line {number} of the release has a control character")
        if line.startswith(" ") and line.strip() and seen:
            continue
        field = _FIELD.match(line)
        if field is None:
            raise ContentError(f"{where}: line {number} is no field of a release: {line[:60]!r}")
        name = field[0].removesuffix(":").lower()
        if name in seen:
            raise ContentError(f"{where}: line {number}: the field {field[0]!r} stands there twice")
        seen.add(name)

    from debian.deb822 import Deb822  # noqa: PLC0415 - costs 30 ms that a no-op does not have

    paragraph: Mapping[str, str] = Deb822(lines)
    return paragraph


class _Fields:
    """The fields of a release, each read as what it must be."""

    def __init__(self, paragraph: Mapping[str, str], where: str) -> None:
        self.paragraph = paragraph
        self.where = where

    def error(self, field: str, what: str) -> ContentError:
        return ContentError(f"{self.where}: {field} of the release: {what}")

    def raw(self, field: str) -> str:
        if field not in self.paragraph:
            raise self.error(field, "the field is missing")
        return self.paragraph[field]

    def text(self, field: str) -> str:
        value = self.raw(field)
        if not value or "\n" in value:
            raise self.error(field, "it must be one line that is not empty")
        return value

    def _number(self, field: str, value: str, limit: int) -> int:
        if not _NUMBER.fullmatch(value) or int(value) > limit:
            raise self.error(field, f"{value[:40]!r} is no whole number from 0 to {limit}")
        return int(value)

    def number(self, field: str, limit: int) -> int:
        return self._number(field, self.text(field), limit)

    def hash(self, field: str) -> str:
        value = self.text(field)
        if not _HASH.fullmatch(value):
            raise self.error(field, f"{value[:80]!r} is no hash of 64 lower-case hex digits")
        return value

    def date(self, field: str) -> float:
        value = self.text(field)
        try:
            parsed = email.utils.parsedate_to_datetime(value)
            seconds = parsed.timestamp()
            exact = email.utils.format_datetime(parsed) == value and value.endswith(" +0000")
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise self.error(field, f"{value[:60]!r} is no date") from error
        if not exact or seconds < 0:
            raise self.error(
                field, f"{value[:60]!r} is not written like 'Mon, 23 Nov 2026 15:21:06 +0000'"
            )
        return seconds

    def features(self, field: str) -> tuple[str, ...]:
        features = tuple(self.paragraph.get(field, "").split())
        if len(set(features)) != len(features) or not all(map(_FEATURE.fullmatch, features)):
            raise self.error(field, "it must be names of casync features, each once")
        return features

    def changes(self, field: str) -> tuple[str, ...]:
        lines = (
            line.strip().removeprefix("* ") for line in self.paragraph.get(field, "").split("\n")
        )
        return tuple(line for line in lines if line and line != ".")

    def files(self, field: str) -> dict[str, FileRef]:
        files: dict[str, FileRef] = {}
        for line in self.raw(field).split("\n"):
            if not line:
                continue
            parts = line.strip(" ").split(" ", 2)
            if len(parts) != 3 or not _HASH.fullmatch(parts[0]):
                raise self.error(field, f"{line.strip()[:120]!r} is not 'HASH SIZE NAME'")
            sha256, size, name = parts
            if "/" in name or name in (".", "..") or name != name.strip():
                raise self.error(field, f"{name[:60]!r} is no plain file name")
            if name in files:
                raise self.error(field, f"{name[:60]!r} stands there twice")
            files[name] = FileRef(name, self._number(field, size, _ARCHIVE_LIMIT), sha256)
        return files


class Order(StrEnum):
    """Where an offered release stands relative to the one that was accepted last."""

    NEWER = "newer"
    SAME = "same"
    OLDER = "older"
    CONFLICT = "conflict"
    """The same serial for another content: one of the two is not the publisher's."""


def order(release: Release, mark: Mark | None) -> Order:
    """Compare an offered release with the highest accepted one.

    Args:
        release: what is offered.
        mark: the highest serial accepted, None where there was none.

    Returns:
        `Order.SAME` for the serial of the mark whatever the dates say: signing again renews
        the dates of the same content.
    """
    if mark is None or release.serial > mark.serial:
        return Order.NEWER
    if release.serial < mark.serial:
        return Order.OLDER
    return Order.SAME if mark.digest in (None, release.digest) else Order.CONFLICT


@dataclass(frozen=True, slots=True)
class BestClock:
    """The latest time that it must be by now.

    Attributes:
        time: seconds since 1970.
        behind: True where the system clock shows an earlier time, and so cannot be right (a
            Raspberry Pi has no clock that runs while it is off).
    """

    time: float
    behind: bool


def best_clock(system: float, *evidence: float | None) -> BestClock:
    """The largest of the system clock and of times that have certainly passed.

    Args:
        system: what the system clock shows.
        evidence: the newest Date ever accepted, the build date of the package. For entries
            with signatures only verified Dates, or anybody could make every release expire.
    """
    latest = max(system, *(time for time in evidence if time is not None), 0.0)
    return BestClock(latest, behind=system < latest)


class Freshness(StrEnum):
    """Whether a release may still be installed."""

    FRESH = "fresh"
    EXPIRED = "expired"
    UNKNOWN = "unknown"
    """It may have expired: the system clock is known to be wrong. Reported, not refused."""


def freshness(release: Release, clock: BestClock) -> Freshness:
    """Judge Valid-Until; a release without one stays fresh."""
    if release.valid_until is None:
        return Freshness.FRESH
    if release.valid_until < clock.time:
        return Freshness.EXPIRED
    return Freshness.UNKNOWN if clock.behind else Freshness.FRESH

"""Publisher entries: which source becomes which index and chunk store.

Relative paths count from the folder the publisher is started in, as the old one had it.
"""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from casync_updater.config import document
from casync_updater.config.problems import (
    BadValueError,
    JsonObject,
    Loaded,
    Problems,
    Reader,
    is_folder,
    is_readable_file,
    is_there,
    kind,
    line,
    number,
    one_of,
    path,
    resolved,
    shown,
    text,
    whole,
)
from casync_updater.formats.index import FEATURES
from casync_updater.model import Compression, Mtimes, Publication

_GROUPS = ("best", "unix", "fat", "chattr", "fat-attrs", "privileged", "fuse", "all")
"""casync's names for several features at once."""

_HOUR = 3600.0
_UNITS = {"h": _HOUR, "d": 24 * _HOUR, "w": 168 * _HOUR}
_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?([hdw])")
_LONGEST_VALIDITY = 3660 * _UNITS["d"]

_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20}
_SIZE = re.compile(r"([0-9]{1,9})([KM]?)")
_SMALLEST_CHUNK = 64
_LARGEST_CHUNK = 128 << 20

_KEY_ID = re.compile(r"(?:0[xX])?([0-9A-Fa-f]{16}|[0-9A-Fa-f]{40}|[0-9A-Fa-f]{64})!?")


def load_publications(path: Path) -> Loaded[Publication]:
    """Read the publisher's entries.

    Args:
        path: a JSON file with one entry or an array of entries.

    Returns:
        The healthy entries, and every error and warning. Nothing is raised for what stands, or
        does not stand, in the file.
    """
    problems = Problems()
    found = [
        (reader, _publication(reader, path)) for reader in document.read(path, problems, _label)
    ]
    clashing = _check_indexes(found, problems)
    entries = tuple(
        publication
        for position, (_, publication) in enumerate(found)
        if publication is not None and position not in clashing
    )
    return Loaded(entries, tuple(problems.errors), tuple(problems.warnings))


def _label(data: JsonObject) -> str:
    index = data.get("index")
    return Path(index).name if isinstance(index, str) else ""


def _publication(reader: Reader, file: Path) -> Publication | None:
    index = reader.required("index", _index, "say where the .caidx or .caibx shall be written")
    store = reader.required("store", _local, "say which folder (.castr) the chunks go to")
    source = reader.required("source", _source, "say which folder, file or device to publish")
    project = reader.optional("project", line)
    version = reader.optional("version", line)
    features = _features(reader)
    sign_keys = reader.each("signKey", _sign_key, single=True)
    valid_for = reader.optional("validFor", _duration)
    keep = reader.optional("keep", whole(1))
    changes = reader.optional("changes", text)
    chunk_size = reader.optional("chunkSize", _chunk_size)
    compression = reader.optional("compression", one_of(*Compression))
    mtimes = reader.optional("mtimes", one_of(*Mtimes))
    reader.finish()
    if reader.has("signKey") and not sign_keys and not reader.failed:
        reader.error("signKey", "names no key; name one, or leave the key out")
    if index is not None and source is not None:
        _check_kind(reader, index, source)
    if index is not None and store is not None and source is not None:
        _check_places(reader, index, store, source)
    if reader.failed or index is None or store is None or source is None:
        return None
    return Publication(
        index=index,
        store=store,
        source=source,
        project=project or index.stem,
        version=version,
        features=features,
        sign_keys=sign_keys,
        valid_for=valid_for,
        keep=keep,
        changes=_changes(reader, changes),
        chunk_size=chunk_size,
        compression=Compression(compression or Compression.ZSTD),
        mtimes=Mtimes(mtimes or Mtimes.STABLE),
        file=file,
    )


def _local(value: object) -> Path:
    found = path(value)
    if "://" in str(value):
        raise BadValueError(f"is {shown(value)}; the publisher writes to folders, use a path")
    return found.absolute()


def _index(value: object) -> Path:
    found = _local(value)
    if found.suffix not in (".caidx", ".caibx"):
        raise BadValueError(
            f"is {shown(value)}; the name of an index ends in .caidx (for a folder)"
            " or .caibx (for a file or device)"
        )
    return found


def _source(value: object) -> Path:
    found = _local(value)
    try:
        mode = found.stat().st_mode
    except OSError as error:
        raise BadValueError(
            f"is {shown(value)}; {found} cannot be read: {error.strerror}"
        ) from None
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise BadValueError(f"is {shown(value)}; it must be a folder, a file or a block device")
    if not os.access(found, os.R_OK):
        raise BadValueError(f"is {shown(value)}; {found} cannot be read: Permission denied")
    return found


def _check_kind(reader: Reader, index: Path, source: Path) -> None:
    suffix, what = (
        (".caidx", "a folder") if is_folder(source) else (".caibx", "a file or block device")
    )
    if index.suffix != suffix:
        reader.error(
            "index", f"ends in {index.suffix}, and the source {source} is {what}: use {suffix}"
        )


def _check_places(reader: Reader, index: Path, store: Path, source: Path) -> None:
    """A source that holds its own index or store would be another one after each publication."""
    for key, place in (("index", index), ("store", store)):
        if resolved(place).is_relative_to(resolved(source)):
            reader.error(key, f"{place} lies in the source {source}; put it beside the source")
    if is_folder(index):
        reader.error("index", f"{index} is a folder; name the file in it")
    if is_there(store) and not is_folder(store):
        reader.error("store", f"{store} is no folder; choose another name")


def _check_indexes(
    found: Sequence[tuple[Reader, Publication | None]], problems: Problems
) -> set[int]:
    clashing = set()
    first: dict[Path, int] = {}
    for position, (reader, publication) in enumerate(found):
        if publication is None:
            continue
        other = first.setdefault(resolved(publication.index), position)
        if other != position:
            what = f"{publication.index} is also that of {found[other][0].where[-1]}"
            problems.error(*reader.where, "index", f"{what}; give each entry its own")
            clashing |= {position, other}
    return clashing


def _features(reader: Reader) -> tuple[str, ...] | None:
    given = reader.optional("with", _feature_names)
    if given is None:
        return None
    for name in given:
        if name in ("read-only", "fat"):
            reader.warn(
                "with", f"{name!r} makes casync remove the read permission of what is read-only"
            )
    return given


def _feature_names(value: object) -> tuple[str, ...]:
    names = value.split() if isinstance(value, str) else value
    if not isinstance(names, list):
        raise BadValueError(f"must be a list of casync's feature names, and is {kind(value)}")
    if not names:
        raise BadValueError("names no feature; name some, or leave the key out")
    unknown = [shown(name) for name in names if name not in FEATURES + _GROUPS]
    if unknown:
        raise BadValueError(
            f"has {', '.join(unknown[:5])}, which casync does not know; it knows"
            f" {' '.join(FEATURES + _GROUPS)}"
        )
    if "usec-time" in names:
        raise BadValueError(
            "has 'usec-time', with which casync cannot extract its own archive;"
            " use sec-time or nsec-time"
        )
    return tuple(dict.fromkeys(names))


def _sign_key(value: object) -> str:
    found = text(value)
    key_id = _KEY_ID.fullmatch(found.replace(" ", ""))
    if key_id:
        return key_id[1].upper()
    file = path(found).absolute()
    if not is_readable_file(file):
        raise BadValueError(
            f"is {shown(found)}, which is no file that can be read, and no fingerprint"
            " (40 hex digits) or long key id (16)"
        )
    return str(file)


def _duration(value: object) -> float:
    """``"30d"``, ``"12h"``, ``"4w"``, or a number of days; in seconds."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise BadValueError(f'is {shown(value)}; write "30d", "12h", "4w", or a number of days')
        seconds = float(match[1]) * _UNITS[match[2]]
    else:
        days = number(value)
        seconds = days * _UNITS["d"] if abs(days) <= _LONGEST_VALIDITY else _LONGEST_VALIDITY + 1
    if not 0 < seconds <= _LONGEST_VALIDITY:
        raise BadValueError(
            f"is {shown(value)}; it must be more than nothing and at most ten years"
        )
    return seconds


def _chunk_size(value: object) -> str:
    """The value of ``--chunk-size``, with the bounds that casync derives from an average alone."""
    given = str(number(value)) if not isinstance(value, str) else value
    matches = [_SIZE.fullmatch(size) for size in given.split(":")]
    sizes = [int(match[1]) * _SIZES[match[2]] for match in matches if match]
    if len(sizes) != len(matches) or len(sizes) not in (1, 3):
        raise BadValueError(
            f"is {shown(value)}; write the average, or MIN:AVG:MAX, in bytes or with K or M"
            ' behind the digits: "64K", "16K:64K:256K"'
        )
    low, average, high = (
        sizes if len(sizes) == 3 else (sizes[0] // 4, sizes[0], min(sizes[0] * 4, _LARGEST_CHUNK))
    )
    if not _SMALLEST_CHUNK <= low <= average <= high <= _LARGEST_CHUNK:
        raise BadValueError(
            f"is {shown(value)}, which makes chunks of {low} to {high} bytes; they must rise from"
            f" {_SMALLEST_CHUNK} bytes (the minimum is a quarter of an average that stands alone)"
            f" to {_LARGEST_CHUNK >> 20}M at most"
        )
    return f"{low}:{average}:{high}"


def _changes(reader: Reader, value: str | None) -> Path | str | None:
    """A value that names a file is that file; all others are the text."""
    if value is None:
        return None
    if is_readable_file(Path(value)):
        return Path(value).absolute()
    if "/" in value and not any(map(str.isspace, value)):
        reader.warn("changes", f"{shown(value)} is no file, and is published as text")
    return value

"""Client entries: what to keep equal to what, and what to do when it changed.

A file holds one entry or an array of entries, in the JSON that the old client read. An entry is
used only if nothing in it is wrong; every other entry is used whatever is wrong with this one.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from casync_updater.config import document
from casync_updater.config.problems import (
    BadValueError,
    JsonObject,
    Loaded,
    Problems,
    Reader,
    below,
    flag,
    is_folder,
    is_readable_file,
    is_there,
    line,
    number,
    one_of,
    path,
    resolved,
    shown,
    text,
    whole,
)
from casync_updater.model import Apply, Entry, Location, Trigger

_SHORTEST_INTERVAL = 1000
_LONGEST_INTERVAL = 366 * 86_400_000
_SUFFIXES = (".caidx", ".caibx")
_SUPPORTED = "use http://, https://, file:/// or an absolute path"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_STAGING = re.compile(r"\..*\.casync-updater")

_SYSTEM_FOLDERS = frozenset(
    map(
        Path,
        """
        / /bin /boot/efi /dev /etc /home /lib /lib32 /lib64 /libx32 /media /mnt /proc /root /run
        /sbin /sys /tmp /usr /usr/bin /usr/include /usr/lib /usr/lib32 /usr/lib64 /usr/libexec
        /usr/libx32 /usr/local /usr/local/bin /usr/local/lib /usr/local/sbin /usr/sbin /usr/share
        /usr/src /var /var/cache /var/lib /var/local /var/log /var/mail /var/run /var/spool
        /var/tmp /usr/lib/systemd /etc/systemd /etc/systemd/system /var/lib/dpkg /var/lib/apt
        """.split(),  # noqa: SIM905
    )
)
"""Folders that the system or several programs live in. An update removes what is not in the
archive, so none of them can be a destination; folders and files in them can. ``/opt``, ``/srv``
and ``/boot`` belong to the device's maker as a whole, and are left to the maker."""

_KERNEL_FOLDERS = (Path("/proc"), Path("/sys"))
"""Nothing below these is a file that could be updated."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """An entry as far as it could be read; `entry` is None where anything in it is wrong.

    Broken entries take part in finding names and conflicts: mending one must not give another
    entry a new name, since its state goes by the name.
    """

    where: tuple[str, ...]
    name: str | None
    destination: Path | None
    entry: Entry | None

    @property
    def title(self) -> str:
        """How messages about another entry call this one."""
        file, entry = self.where
        return f"{entry} in {file}"


def load_entries(path: Path) -> Loaded[Entry]:
    """Read the client's entries.

    Args:
        path: a JSON file, or a folder whose ``*.json`` files are read in the order of their
            names.

    Returns:
        The healthy entries, and every error and warning of every file. Nothing is raised for
        what stands, or does not stand, in the files.
    """
    problems = Problems()
    drafts = [
        _draft(reader, file)
        for file in _entry_files(path, problems)
        for reader in document.read(file, problems, _label)
    ]
    names = entry_names([(draft.name, draft.destination) for draft in drafts])
    clashing = _check_names(drafts, names, problems) | _check_destinations(drafts, problems)
    clashing |= _check_single_self_update(drafts, problems)
    entries = tuple(
        replace(draft.entry, name=name)
        for position, (draft, name) in enumerate(zip(drafts, names, strict=True))
        if draft.entry is not None and name is not None and position not in clashing
    )
    _warn_of_shared_projects(entries, problems)
    return Loaded(entries, tuple(problems.errors), tuple(problems.warnings))


def entry_names(wanted: Sequence[tuple[str | None, Path | None]]) -> list[str | None]:
    """The name of each entry.

    A given name stays as it is. The default is the destination's last component; where names
    collide, each default gets its parent folder before it (``a-www``, ``b-www``), and further
    parents as long as that does not tell them apart. Where no parent is left (``/a b`` and
    ``/a-b`` are both made to ``a-b``), a hash of the path follows the name.

    Args:
        wanted: the given name and the destination of each entry, None where there is none.

    Returns:
        The names in the same order; None where there is neither name nor destination. Equal
        names are left only where they were given, or destinations are equal.
    """
    depths = [1] * len(wanted)
    while True:
        names = [
            name or (_default_name(destination, depth) if destination else None)
            for (name, destination), depth in zip(wanted, depths, strict=True)
        ]
        places: dict[str, set[tuple[str | None, Path | None]]] = {}
        for name, place in zip(names, wanted, strict=True):
            if name is not None:
                places.setdefault(name, set()).add(place)
        colliding = [
            position
            for position, name in enumerate(names)
            if name is not None and len(places[name]) > 1 and wanted[position][0] is None
        ]
        # Those that still have a parent move away first; the hash is for who is left.
        room = {position: _levels(wanted[position][1]) - depths[position] for position in colliding}
        moving = [position for position in colliding if room[position] > 0] or [
            position for position in colliding if room[position] == 0
        ]
        if not moving:
            return names
        for position in moving:
            depths[position] += 1


def _entry_files(path: Path, problems: Problems) -> list[Path]:
    if not is_folder(path):
        return [path]
    try:
        found = document.files(path, ".json")
    except BadValueError as error:
        problems.error(str(path), str(error))
        return []
    if not found:
        problems.warn(str(path), "holds no *.json file: there is nothing to do")
    return found


def _label(data: JsonObject) -> str:
    name = data.get("name")
    if isinstance(name, str):
        return name
    destination = data.get("dstPath")
    return Path(destination).name if isinstance(destination, str) else ""


def _draft(reader: Reader, file: Path) -> _Draft:
    reader.drop_blank("backupIndex", "backupStore", "triggers", "startup")
    name = reader.optional("name", _given_name)
    interval = reader.required(
        "interval",
        _interval,
        "say after how many milliseconds to look again (3600000 is an hour);"
        " the old client left such an entry out without a word",
    )
    source = _source(reader)
    backup = _backup(reader, source)
    destination = reader.required(
        "dstPath", _destination, "say which folder or file to keep up to date"
    )
    project = reader.optional("project", line)
    triggers = tuple(_trigger(item) for item in reader.objects("triggers"))
    startup = reader.each("startup", text)
    signed_by = _keyrings(reader, file)
    preserve = reader.each("preserve", _preserved)
    keep = reader.optional("keep", whole(0))
    health_check = reader.each("healthCheck", text)
    apply = reader.optional("apply", one_of(*Apply))
    self_update = reader.optional("selfUpdate", flag)
    reader.finish()
    if self_update:
        _check_self_update(reader, source, apply)
    _check_preserved(reader, preserve, source)
    if destination is not None and source is not None:
        _check_destination(reader, destination, source, backup, preserve)
    entry = None
    if interval is not None and source is not None and destination and not reader.failed:
        entry = Entry(
            name=name or "",
            project=project or _project(source.index),
            interval=interval,
            source=source,
            backup=backup,
            destination=destination,
            triggers=triggers,
            startup=startup,
            signed_by=signed_by,
            preserve=preserve,
            keep=1 if keep is None else keep,
            health_check=health_check,
            apply=Apply(apply or Apply.ATOMIC),
            self_update=bool(self_update),
            file=file,
        )
    return _Draft(reader.where, name, destination, entry)


def _source(reader: Reader) -> Location | None:
    why = f"say where the publisher's {{}} is: {_SUPPORTED}"
    index = reader.required("srcIndex", _index, why.format("index"))
    store = reader.required("srcStore", _location, why.format("chunk store"))
    if index is None or store is None:
        return None
    source = Location(index, store)
    if source.remote == store.startswith("/"):
        reader.error("srcStore", "must be a URL where srcIndex is one, and a path where it is not")
        return None
    return source


def _backup(reader: Reader, source: Location | None) -> Location | None:
    index = reader.optional("backupIndex", _local(_index))
    store = reader.optional("backupStore", _local(_location))
    for key, other in (("backupIndex", "backupStore"), ("backupStore", "backupIndex")):
        if reader.has(key) and not reader.has(other):
            reader.error(other, f"is missing, and {key} is there; give both or none of them")
    if index is None or store is None:
        return None
    backup = Location(index, store)
    if source is not None and source.suffix != backup.suffix:
        reader.error("backupIndex", f"must end in {source.suffix}, as srcIndex does")
    if source is not None and source.index == backup.index:
        reader.error("backupIndex", "is srcIndex itself; name a place on the backup drive")
    return backup


def _trigger(reader: Reader) -> Trigger:
    needed = "a trigger has paths [...] and actions [...]"
    for key in ("paths", "actions"):
        if not reader.has(key):
            reader.error(key, f"is missing; {needed}")
    trigger = Trigger(reader.each("paths", below), reader.each("actions", text))
    if not reader.failed and not (trigger.paths and trigger.actions):
        key = "actions" if trigger.paths else "paths"
        reader.warn(key, "is an empty list: this trigger does nothing")
    reader.finish()
    return trigger


def _keyrings(reader: Reader, file: Path) -> tuple[Path, ...]:
    def keyring(value: object) -> Path:
        found = file.absolute().parent / path(value)
        if not is_readable_file(found):
            raise BadValueError(f"is {shown(value)}, and {found} is no file that can be read")
        return found

    found = reader.each("signedBy", keyring, single=True)
    if reader.has("signedBy") and not found and not reader.failed:
        reader.error("signedBy", "names no keyring; name one, or leave the key out")
    return found


def _check_self_update(reader: Reader, source: Location | None, apply: str | None) -> None:
    """What has no meaning where the content is packages that this program installs itself."""
    if source is not None and source.suffix == ".caibx":
        reader.error("selfUpdate", "is for folders (.caidx) that packages are in, and no file")
    if apply == Apply.IN_PLACE:
        reader.error("apply", "in-place would install packages that are half there; leave it out")
    if reader.has("preserve"):
        reader.error("preserve", "keeps nothing of use beside packages; leave it out")
    for key, why in (
        ("triggers", "would run before the packages are installed"),
        ("healthCheck", "would judge the version that is about to be replaced"),
    ):
        if reader.has(key):
            reader.error(
                key,
                f"{why}: with selfUpdate, the service is restarted, and a version that does not"
                " work is replaced by the one before, without it; leave it out",
            )


def _check_preserved(reader: Reader, preserve: Sequence[str], source: Location | None) -> None:
    for inner in preserve:
        for outer in preserve:
            if inner != outer and Path(inner).is_relative_to(outer):
                reader.error("preserve", f"{inner!r} lies in {outer!r}, which is enough")
    for twice in (name for name, times in Counter(preserve).items() if times > 1):
        reader.error("preserve", f"{twice!r} stands there more than once; keep one of them")
    if preserve and source is not None and source.suffix == ".caibx":
        reader.error("preserve", "is for folders (.caidx); a file (.caibx) has nothing below it")


def _check_destination(
    reader: Reader,
    destination: Path,
    source: Location,
    backup: Location | None,
    preserve: Sequence[str],
) -> None:
    if source.suffix == ".caidx" and is_there(destination) and not is_folder(destination):
        reader.error("dstPath", f"{destination} is no folder, and a .caidx index holds a folder")
    if source.suffix == ".caibx" and is_folder(destination):
        reader.error("dstPath", f"{destination} is a folder, and a .caibx index holds a file")
    safe = [resolved(destination / name) for name in preserve]
    places = {
        "srcIndex": source.index,
        "srcStore": source.store,
        "backupIndex": backup.index if backup else "",
        "backupStore": backup.store if backup else "",
    }
    for key, place in places.items():
        here = resolved(Path(place))
        if not place.startswith("/") or any(here.is_relative_to(name) for name in safe):
            continue
        if here.is_relative_to(resolved(destination)):
            reader.error(key, f"lies in dstPath {destination}, where an update would remove it")
        elif key.endswith("Store") and resolved(destination).is_relative_to(here):
            reader.error(key, f"holds dstPath {destination}; a store holds nothing but chunks")


def _check_names(
    drafts: Sequence[_Draft], names: Sequence[str | None], problems: Problems
) -> set[int]:
    """Report equal names; the numbers of the entries that cannot be used."""
    clashing: set[int] = set()
    first: dict[str, int] = {}
    for position, (draft, name) in enumerate(zip(drafts, names, strict=True)):
        if name is None:
            continue
        other = drafts[first.setdefault(name, position)]
        # Defaults are equal only for equal destinations, and that is an error of its own.
        if other is not draft and (other.name or draft.name):
            what = f"{name!r} is also the name of {other.title}; give each its own"
            problems.error(*draft.where, "name", what)
            clashing |= _stopped(drafts, position, first[name])
    return clashing


def _check_destinations(drafts: Sequence[_Draft], problems: Problems) -> set[int]:
    """Report destinations that touch each other; the numbers of the entries concerned.

    One inside another is refused even where it lies in a preserved path: that path is out of
    place for a moment whenever the outer destination is exchanged.
    """
    clashing: set[int] = set()
    owners: dict[Path, int] = {}
    spellings: dict[int, set[Path]] = {
        position: {draft.destination, resolved(draft.destination)}
        for position, draft in enumerate(drafts)
        if draft.destination is not None
    }
    for position, paths in spellings.items():
        same = {owners[place] for place in paths if place in owners}
        for other in sorted(same)[:1]:
            problems.error(
                *drafts[position].where,
                "dstPath",
                f"{drafts[position].destination} is also the destination of {drafts[other].title};"
                " each destination belongs to one entry",
            )
            clashing |= _stopped(drafts, position, other)
        for place in paths:
            owners.setdefault(place, position)
    for position, paths in spellings.items():
        outer = {owners[up] for place in paths for up in place.parents if up in owners} - {position}
        for other in sorted(outer):
            problems.error(
                *drafts[position].where,
                "dstPath",
                f"{drafts[position].destination} lies inside {drafts[other].destination}, the"
                f" destination of {drafts[other].title}; choose folders apart from each other",
            )
            clashing |= _stopped(drafts, position, other)
    return clashing


def _check_single_self_update(drafts: Sequence[_Draft], problems: Problems) -> set[int]:
    """Two entries with selfUpdate would install one version over the other, in turns."""
    found = [at for at, draft in enumerate(drafts) if draft.entry and draft.entry.self_update]
    for position in found[1:]:
        problems.error(
            *drafts[position].where,
            "selfUpdate",
            f"is also in {drafts[found[0]].title}; one entry receives casync-updater's packages",
        )
    return set(found) if found[1:] else set()


def _stopped(drafts: Sequence[_Draft], one: int, other: int) -> set[int]:
    """Whom a conflict stops: both, unless one is broken anyway and must not stop the other."""
    return {one, other} if drafts[one].entry and drafts[other].entry else set()


def _warn_of_shared_projects(entries: Sequence[Entry], problems: Problems) -> None:
    """A release of one entry would be accepted for the other, if a server swapped them."""
    first: dict[tuple[str, Path], Entry] = {}
    for entry in entries:
        for keyring in entry.signed_by:
            other = first.setdefault((entry.project, keyring), entry)
            if other.source.index != entry.source.index:
                problems.warn(
                    str(entry.file),
                    entry.name,
                    "project",
                    f"{entry.project!r} and the keyring {keyring} are also those of {other.name}"
                    f" in {other.file}: a release of one is valid for the other;"
                    " give each its own project",
                )


def _interval(value: object) -> float:
    found = number(value)
    if not _SHORTEST_INTERVAL <= found <= _LONGEST_INTERVAL:
        raise BadValueError(
            f"is {shown(found)} ms; it must be from {_SHORTEST_INTERVAL} (a second)"
            f" to {_LONGEST_INTERVAL} (a year) milliseconds, 3600000 is an hour"
        )
    return found / 1000


def _given_name(value: object) -> str:
    found = text(value)
    if not _NAME.fullmatch(found):
        raise BadValueError(
            f"is {shown(found)}; it names files, so use up to 100 letters, digits, '.', '_' and"
            " '-' of ASCII, and do not begin with '.' or '-'"
        )
    return found


def _levels(destination: Path | None) -> int:
    return len(destination.parts) - 1 if destination else 0


def _default_name(destination: Path, depth: int) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", "-".join(destination.parts[1:][-depth:]))
    name = name.lstrip(".-")[-80:].lstrip(".-")
    if name and depth <= _levels(destination):
        return name
    # Takes 3.5 MB (OpenSSL), which the idle daemon can do without.
    import hashlib  # noqa: PLC0415

    digest = hashlib.sha256(os.fsencode(destination)).hexdigest()[:8]
    return f"{name or 'entry'}-{digest}"


def _location(value: object) -> str:
    """A URL or an absolute path; ``file:`` URLs become paths."""
    found = text(value)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", found)
    if scheme is None:
        return _local_path(found, found)
    if scheme[1].lower() == "file":
        rest = found[scheme.end() :]
        if rest.startswith("//"):
            host, slash, rest = rest[2:].partition("/")
            rest = slash + rest
            if host not in ("", "localhost"):
                raise BadValueError(f"is {shown(found)}; a file URL is written with three slashes")
        return _local_path(unquote(rest, errors="surrogateescape"), found)
    if scheme[1].lower() not in ("http", "https"):
        raise BadValueError(f"is {shown(found)}; {scheme[1]}: is not supported, {_SUPPORTED}")
    return _web_url(found, scheme[1].lower() + found[scheme.end(1) :])


def _local_path(found: str, value: str) -> str:
    if not found.startswith("/"):
        raise BadValueError(f"is {shown(value)}, a relative path; {_SUPPORTED}")
    return str(path(found))


def _web_url(value: str, url: str) -> str:
    if url != url.strip() or not url.isprintable() or "#" in url:
        raise BadValueError(f"is {shown(value)}; write spaces around it and '#' as %20 and %23")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.startswith(f"{parts.scheme}://"):
        raise BadValueError(
            f"is {shown(value)}, which is no URL; write https://HOST/PATH, and special"
            " characters of a password as %XX"
        )
    return url


def _index(value: object) -> str:
    found = _location(value)
    if Location(found, "").suffix not in _SUFFIXES:
        raise BadValueError(
            f"is {shown(value)}; the name of an index ends in .caidx (a folder)"
            " or .caibx (a file or device)"
        )
    return found


def _local(parse: Callable[[object], str]) -> Callable[[object], str]:
    def local(value: object) -> str:
        found = parse(value)
        if not found.startswith("/"):
            raise BadValueError(
                f"is {shown(value)}; a backup is a folder here: use an absolute path"
            )
        return found

    return local


def _project(index: str) -> str:
    """The index's name without its suffix, as the publisher calls the project by default."""
    location = Location(index, "")
    return Path(unquote(urlsplit(index).path) if location.remote else index).stem


def _destination(value: object) -> Path:
    found = path(value)
    if not found.is_absolute():
        raise BadValueError(f"is {shown(value)}; it must be an absolute path")
    if ".." in found.parts:
        raise BadValueError(f"is {shown(value)}; write it without '..'")
    if any(_STAGING.fullmatch(part) for part in found.parts):
        raise BadValueError(
            f"is {shown(value)}; folders called .*.casync-updater are for new versions"
        )
    if len(os.fsencode(found.name)) > 200:
        raise BadValueError(f"is {shown(value)}; its last part has more than 200 bytes")
    for place in (found, resolved(found)):
        if place in _SYSTEM_FOLDERS:
            raise BadValueError(
                f"is {shown(value)}, and {place} belongs to the system: an update removes what is"
                " not in the archive; use a folder of its own, /opt/NAME for one"
            )
        if any(place.is_relative_to(folder) for folder in _KERNEL_FOLDERS):
            raise BadValueError(
                f"is {shown(value)}; {place} is the kernel's, and no file to update"
            )
    return found


def _preserved(value: object) -> str:
    found = below(value)
    if found == ".":
        raise BadValueError(
            "is the whole destination; name what is in it and belongs to the device"
        )
    return found

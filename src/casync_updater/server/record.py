"""What the publisher remembers beside an index and in a store, and what is alive by that.

Names of indexes are stored relative to the store, so that a site may be moved as a whole.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from casync_updater import codec
from casync_updater.errors import ContentError, LocalError
from casync_updater.files import write_atomic
from casync_updater.formats import index as index_format
from casync_updater.model import Release
from casync_updater.release import parse_release
from casync_updater.server.places import OWN, Site
from casync_updater.trust import unwrap

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kept:
    """A release whose files and chunks stay: its serial, its index and all files, by SHA-256."""

    serial: int
    index: str
    files: tuple[str, ...]

    @classmethod
    def of(cls, release: Release) -> "Kept":
        """What is kept of a release."""
        files = (release.index, release.mtree)
        return cls(
            release.serial,
            release.index.sha256,
            tuple(file.sha256 for file in files if file is not None),
        )


@dataclass(frozen=True, slots=True)
class History:
    """The releases of one index, oldest first."""

    name: str
    releases: tuple[Kept, ...] = ()

    def published(self, current: Release | None) -> "History":
        """Without releases that were begun and never became visible, and with the current one.

        The record is written before the files, so that a killed publisher's are known.
        """
        if current is None:
            return replace(self, releases=())
        older = [kept for kept in self.releases if kept.serial < current.serial]
        return replace(self, releases=(*older, Kept.of(current)))

    def limited(self, keep: int | None) -> "History":
        """The newest `keep` releases; all where it is None."""
        return self if keep is None else replace(self, releases=self.releases[-keep:])


@dataclass(frozen=True, slots=True)
class FolderRecord:
    """``releases.json`` of a folder."""

    indexes: tuple[History, ...] = ()

    def of(self, name: str) -> History:
        """The history of an index, empty where there is none."""
        return next((item for item in self.indexes if item.name == name), History(name))

    def having(self, history: History) -> "FolderRecord":
        """With another history of the same index."""
        others = (item for item in self.indexes if item.name != history.name)
        return FolderRecord((*others, history))

    def files(self) -> set[str]:
        """The SHA-256 of every file that a release in this folder lists."""
        return {
            file for history in self.indexes for kept in history.releases for file in kept.files
        }


@dataclass(frozen=True, slots=True)
class StoreRecord:
    """``indexes.json`` of a store: paths of the indexes that use it, relative to the store."""

    indexes: tuple[str, ...] = ()

    def having(self, store: Path, index: Path) -> "StoreRecord":
        """With one index more."""
        name = os.path.relpath(index, store)
        return self if name in self.indexes else StoreRecord((*self.indexes, name))

    def paths(self, store: Path) -> Iterator[Path]:
        """Where the indexes are."""
        for name in self.indexes:
            yield Path(os.path.normpath(store / name))


@dataclass(frozen=True, slots=True)
class Garbage:
    """``garbage.json``: since when something has not been needed, by its name."""

    since: Mapping[str, float] = field(default_factory=dict)

    def seen(self, garbage: Iterable[str], now: float) -> "Garbage":
        """What is garbage now; what was before keeps its time, unless that lies in the future."""
        return Garbage({name: min(self.since.get(name, now), now) for name in garbage})

    def older(self, limit: float) -> list[str]:
        """What became garbage at `limit` or before."""
        return [name for name, since in self.since.items() if since <= limit]

    def without(self, names: Iterable[str]) -> "Garbage":
        """What is left after these were removed."""
        gone = set(names)
        return Garbage({name: since for name, since in self.since.items() if name not in gone})


def read_release(path: Path) -> Release:
    """A release of this publisher's own, plain or signed; no signature is verified.

    Raises:
        FileNotFoundError: there is none.
        ContentError: it is none.
    """
    return parse_release(unwrap(path.read_bytes()), str(path))


def read_folder(folder: Path) -> FolderRecord:
    """The record of a folder, empty where there is none."""
    return _read(FolderRecord, folder / OWN / "releases.json")


def write_folder(folder: Path, record: FolderRecord) -> None:
    """Replace the record of a folder."""
    _write(folder / OWN / "releases.json", codec.to_json(record))


def read_store(store: Path) -> StoreRecord:
    """The record of a store, empty where there is none."""
    return _read(StoreRecord, store / OWN / "indexes.json")


def write_store(store: Path, record: StoreRecord) -> None:
    """Replace the record of a store."""
    _write(store / OWN / "indexes.json", codec.to_json(record))


def read_garbage(place: Path) -> Garbage:
    """What is garbage in a store or folder; without a readable record all grace begins anew."""
    try:
        value = json.loads((place / OWN / "garbage.json").read_bytes())
        return Garbage({str(name): float(since) for name, since in value.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return Garbage()


def write_garbage(place: Path, garbage: Garbage) -> None:
    """Replace the record of what is garbage."""
    _write(place / OWN / "garbage.json", dict(garbage.since))


def alive_chunks(store: Path) -> set[str]:
    """Every chunk that an index may need: the registered ones, and those of kept releases.

    Indexes of the old publisher are registered nowhere; those that stand beside the store or
    beside a registered index count as well.

    Raises:
        LocalError: an index or record cannot be read, so nobody knows what it needs.
    """
    registered = list(read_store(store).paths(store))
    folders = {store.parent, *(path.parent for path in registered)}
    indexes = set(registered)
    try:
        for folder in folders:
            for path in folder.iterdir():
                if path.suffix in (".caidx", ".caibx") and not path.name.startswith("."):
                    indexes.add(path)
            for history in read_folder(folder).indexes:
                site = Site(folder / history.name)
                indexes.update(site.by_hash(kept.index) for kept in history.releases)
        return {
            chunk.hex
            for path in indexes
            for chunk in index_format.parse(path.read_bytes(), str(path))
        }
    except (OSError, ContentError) as error:
        raise LocalError(
            f"no chunk of {store} is removed, since it is not known which are needed: {error};"
            f" mend it, or take its line out of {store / OWN / 'indexes.json'}"
        ) from error


def _read(kind: type[T], path: Path) -> T:
    try:
        return codec.from_json(kind, json.loads(path.read_bytes()))
    except FileNotFoundError:
        return kind()
    except ValueError as error:
        raise LocalError(
            f"{path} cannot be understood ({error}); remove it if older releases need not be kept"
        ) from error


def _write(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1).encode() + b"\n")

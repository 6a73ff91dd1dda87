"""Publishing one source: build, then let files become visible in the order that is safe.

Chunks first and synced, then the immutable copies, then index, mtree and digest for old
clients, the release last. Whoever is killed in between leaves a site that serves the old
release, whose files by hash are still there, or the new one.
"""

import errno
import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from casync_updater.clock import Clock
from casync_updater.errors import ConfigError, ContentError, LocalError, SpaceError
from casync_updater.formats import index as index_format
from casync_updater.formats.index import Index
from casync_updater.model import Compression, FileRef, Mtimes, Publication, Release
from casync_updater.release import SERIAL_LEAD, format_release, parse_release
from casync_updater.server import record
from casync_updater.server.build import (
    Built,
    Maker,
    Recipe,
    Reporter,
    build,
    read_back,
    recipe,
    survey,
)
from casync_updater.server.compress import compress_again
from casync_updater.server.news import News, read_news
from casync_updater.server.places import Site, Store, Usage, locked, make_folder
from casync_updater.server.prune import alive_files, prune_by_hash, prune_store, sweep
from casync_updater.server.signing import Standing, public_keys, sign, standing
from casync_updater.syscalls import sync_file_system
from casync_updater.tools.process import ProgramError
from casync_updater.trust import unwrap

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE_WORDS = ("No space left on device", "Disk quota exceeded")


class Status(StrEnum):
    """How a publication went."""

    PUBLISHED = "published"
    RENEWED = "renewed"
    """The same content with new dates, since `validFor` was about to run out."""
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Published:
    """A release that is visible now."""

    status: Status
    release: Release
    usage: Usage


def publish(
    publication: Publication, clock: Clock, reporter: Reporter, *, passphrase: Path | None = None
) -> Published:
    """Publish a source, or find that it is published already.

    Args:
        publication: what is published where, and which keys sign it.
        clock: gives serial and dates.
        reporter: told what happens.
        passphrase: a file whose first line unlocks the keys; None leaves asking to the agent.

    Raises:
        ConfigError: the entry asks for what cannot be.
        BusyError: another publisher does not finish.
        SpaceError: a file system is full; the site is as it was.
        LocalError: anything else is in the way; the site is consistent.
    """
    with _own_errors():
        _check(publication)
        site = Site(publication.index)
        store = Store(publication.store)
        make_folder(store.path)
        with (
            locked(site.folder, clock, reporter.say),
            locked(store.path, clock, reporter.say),
            site.staged(),
        ):
            return _Publisher(
                publication, site, store, clock, reporter, passphrase=passphrase
            ).run()


def resign(
    publication: Publication, clock: Clock, reporter: Reporter, *, passphrase: Path | None = None
) -> Published:
    """Renew date, Valid-Until and signatures of what is published; content and serial stay.

    The source is not looked at, so it need not be there.

    Args:
        publication: see `publish`.
        clock: gives the dates.
        reporter: told what happens.
        passphrase: see `publish`.

    Raises:
        ConfigError: no key of `sign_keys` can sign, or none signed what is published.
        BusyError: another publisher does not finish.
        LocalError: nothing is published yet, it is damaged, or it cannot be written.
    """
    with _own_errors():
        site = Site(publication.index)
        store = Store(publication.store)
        for place in (site.folder, store.path):
            if not place.is_dir():
                raise LocalError(f"the folder {place} does not exist: publish first")
        with locked(site.folder, clock, reporter.say), site.staged():
            return _Publisher(
                publication, site, store, clock, reporter, passphrase=passphrase
            ).resign()


def _check(publication: Publication) -> None:
    source, index, store = publication.source, publication.index, publication.store
    if not source.exists():
        raise LocalError(f"the source {source} does not exist")
    if publication.is_archive and not source.is_dir():
        raise LocalError(
            f"{index} ends in .caidx, which is for directories, but {source} is none; give the"
            " index of a file or block device a name that ends in .caibx"
        )
    if not publication.is_archive and not (source.is_file() or source.is_block_device()):
        raise LocalError(
            f"{index} ends in .caibx, which is for files and block devices, but {source} is"
            " neither; give the index of a directory a name that ends in .caidx"
        )
    for place in (index.parent, store.parent):
        if not place.is_dir():
            raise LocalError(f"the folder {place} does not exist; create it, or correct its name")
    if index.parent.resolve() == store.resolve():
        raise LocalError(f"the index {index} lies in its own store; give it a folder outside")
    tree = source.resolve()
    for place in (index.resolve(), store.resolve()):
        if tree in (place, *place.parents):
            raise LocalError(
                f"{place} lies inside of the source {source}, so every publication would contain"
                " the one before; move it out"
            )


@contextmanager
def _own_errors() -> Iterator[None]:
    """Whatever is in the way becomes an error for the operator."""
    try:
        yield
    except ProgramError as error:
        if any(words in error.stderr for words in _NO_SPACE_WORDS):
            raise SpaceError(f"no space left while casync was working ({error})") from error
        raise
    except ContentError as error:
        raise LocalError(str(error)) from error
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if error.errno in _NO_SPACE:
            raise SpaceError(f"no space left: {what}") from error
        raise LocalError(what) from error


class _Publisher:
    """One publication under way; both locks are held."""

    def __init__(
        self,
        publication: Publication,
        site: Site,
        store: Store,
        clock: Clock,
        reporter: Reporter,
        *,
        passphrase: Path | None,
    ) -> None:
        self.publication = publication
        self.site = site
        self.store = store
        self.reporter = reporter
        self.passphrase = passphrase
        self.now = float(int(clock.time()))
        self.current = _read_release(site)
        self.standing = self._standing()
        self.existing = _read_index(site, self.current)

    def _standing(self) -> Standing:
        """Whether the current release may be trusted and signed again.

        Whoever can write to the site can write an unsigned release there: only what is compared
        with the source, or was signed by one of the keys before, gets a signature.
        """
        body = b"" if self.current is None else self.site.beside(".release").read_bytes()
        if self.publication.sign_keys:
            keys = public_keys(self.publication.sign_keys, passphrase=self.passphrase)
            return standing(body, keys, now=self.now)
        if body != unwrap(body):
            raise ConfigError(
                f"{self.publication.file}: {self.site.index.name}: signKey: it is not set, and the"
                " release before was signed: devices that know it take only signed ones. Name the"
                f" key; if signing shall end, take the signature out of"
                f" {self.site.beside('.release')} by hand"
            )
        return Standing.COMPLETE

    def resign(self) -> Published:
        """Renew dates and signatures only."""
        release = self.current
        if release is None or self.existing is None:
            raise LocalError(f"{self.site.index} has no release yet: publish first")
        if self.standing is Standing.FOREIGN:
            raise ConfigError(
                f"{self.publication.file}: {self.site.index.name}: signKey: the release that is"
                " published was signed by none of these keys, so it may be anybody's: publish"
                " again, which compares it with the source"
            )
        usage = Usage(0, len({ref.id for ref in self.existing}), 0, release.store_size)
        release = replace(release, date=self.now, valid_until=self._valid_until())
        self._write_release(release, self._sealed(release))
        return Published(Status.RENEWED, release, usage)

    def run(self) -> Published:
        news = read_news(self.publication)
        how = recipe(self.publication, self.existing)
        for warning in how.warnings:
            self.reporter.say(warning)
        self._look_at_room()
        since, interrupted = self.store.begin()
        try:
            result = self._publish(how, news, since, interrupted)
            if interrupted:
                sweep(self.store, since)
        except BaseException as error:
            with suppress(LocalError, OSError), _own_errors():
                if _is_full(error):
                    sweep(self.store, since)
                    self.store.end()
            raise
        self.store.end()
        self._prune()
        return result

    def _look_at_room(self) -> None:
        if self.existing is not None:
            return
        room = shutil.disk_usage(self.store.path).free
        need = survey(self.publication.source.resolve()).size
        if room < need:
            self.reporter.say(
                f"{self.store.path} has room for {room} bytes and the source has {need}; this"
                " works only if it can be compressed well"
            )

    def _publish(self, how: Recipe, news: News, since: int, interrupted: bool) -> Published:
        maker = Maker(
            self.publication.source.resolve(),
            how,
            self.publication.compression,
            self._previous_mtree(),
        )
        staged = self.site.staging / self.site.index.name
        built = build(maker, staged, self.store, self.reporter)
        if self.publication.compression is Compression.ZSTD:
            compress_again(self.store, built.index, since, self.reporter)
        ids = built.chunk_ids()
        usage = self.store.usage(ids, since)
        current = self.current
        same = current is not None and (built.digest, built.ref.sha256) == (
            current.digest,
            current.index.sha256,
        )
        if same and current is not None and self.standing is not Standing.FOREIGN:
            mtree = current.mtree
            if interrupted or usage.chunks_new or not self._has(mtree):
                mtree = read_back(built, self.store, self.reporter)
                sync_file_system(self.store.path)
            if mtree == current.mtree:
                return self._keep(built, current, usage)
        else:
            mtree = read_back(built, self.store, self.reporter)
        sync_file_system(self.store.path)
        release = self._release(built, mtree, self.store.usage(ids, since), news)
        body = self._sealed(release)
        self._remember(release)
        self._show(built, release)
        self._write_release(release, body)
        return Published(Status.PUBLISHED, release, usage)

    def _previous_mtree(self) -> Path | None:
        """What the times are compared with, where unchanged content shall keep its time."""
        mtree = None if self.current is None else self.current.mtree
        if self.publication.mtimes is Mtimes.KEEP or mtree is None or not self._has(mtree):
            return None
        return self.site.by_hash(mtree.sha256)

    def _release(self, built: Built, mtree: FileRef | None, usage: Usage, news: News) -> Release:
        serial = int(self.now)
        if self.current is not None and serial <= self.current.serial:
            serial = self.current.serial + 1
            if self.now < self.current.date:
                self.reporter.say(
                    f"the clock is behind the release before, of {_readable(self.current.date)};"
                    f" the new one gets serial {serial}"
                )
        if serial > self.now + SERIAL_LEAD:
            raise LocalError(
                f"the clock is more than two days behind the release before, of"
                f" {_readable(self.current.date if self.current else self.now)}; clients would"
                " refuse a release with such a date, so set the clock"
            )
        return Release(
            project=self.publication.project,
            version=_version(self.publication, news, self.now),
            serial=serial,
            date=self.now,
            valid_until=self._valid_until(),
            index=built.ref,
            mtree=mtree,
            digest=built.digest,
            features=built.index.features,
            archive_size=built.index.size,
            store_size=usage.bytes_total,
            changes=news.changes,
        )

    def _valid_until(self) -> float | None:
        valid_for = self.publication.valid_for
        return None if valid_for is None else self.now + int(valid_for)

    def _keep(self, built: Built, current: Release, usage: Usage) -> Published:
        """The source did not change: mend what is not as the release says, and touch no more."""
        release, body = current, None
        if self._is_due(current) or self.standing is not Standing.COMPLETE:
            release = replace(current, date=self.now, valid_until=self._valid_until())
            body = self._sealed(release)
        self._remember(release)
        for name in self._show(built, release):
            self.reporter.say(f"{name} was missing or damaged and has been restored")
        if body is None:
            return Published(Status.UNCHANGED, release, usage)
        self._write_release(release, body)
        return Published(Status.RENEWED, release, usage)

    def _is_due(self, current: Release) -> bool:
        """True where the dates of an unchanged release should be renewed."""
        if current.valid_until is None or self.publication.valid_for is None:
            return (current.valid_until is None) != (self.publication.valid_for is None)
        return self.now > (current.date + current.valid_until) / 2

    def _remember(self, release: Release) -> None:
        """Write down what becomes visible now, before it does.

        A killed publisher's files are thereby known: the next one takes away those that its own
        release does not list.
        """
        folder = record.read_folder(self.site.folder)
        before = folder.of(self.site.index.name)
        visible = before.published(self.current)
        if visible.releases[-1:] != (record.Kept.of(release),):
            visible = replace(visible, releases=(*visible.releases, record.Kept.of(release)))
        after = visible.limited(self.publication.keep)
        unseen = {
            file
            for kept in before.releases
            if self.current is None or kept.serial > self.current.serial
            for file in kept.files
        }
        if after != before:
            record.write_folder(self.site.folder, folder.having(after))
        if unseen:
            with suppress(LocalError):
                for file in unseen - alive_files(self.site.folder):
                    self.site.by_hash(file).unlink(missing_ok=True)
        known = record.read_store(self.store.path)
        if known != (grown := known.having(self.store.path, self.site.index)):
            record.write_store(self.store.path, grown)

    def _show(self, built: Built, release: Release) -> list[str]:
        """Let the files that a release lists become visible.

        Returns:
            The names of those that were not there already.
        """
        make_folder(self.site.folder / "by-hash")
        make_folder(self.site.folder / "by-hash" / "SHA256")
        staged = [(built.path, release.index, "")]
        if release.mtree is not None:
            staged.append((built.path.with_name(release.mtree.name), release.mtree, ".mtree"))
        shown = []
        targets = [
            *((path, ref, self.site.by_hash(ref.sha256)) for path, ref, _ in staged),
            *((path, ref, self.site.beside(suffix)) for path, ref, suffix in staged),
        ]
        for path, ref, target in targets:
            if not _holds(target, ref):
                self._copy(path, ref, target)
                shown.append(str(target.relative_to(self.site.folder)))
        digest, target = release.digest.encode(), self.site.beside(".cks")
        if _content(target) != digest:
            self.site.write(digest, target)
            shown.append(target.name)
        return shown

    def _sealed(self, release: Release) -> bytes:
        """The bytes that are published for a release.

        Made before any of its files is visible: a key that cannot sign leaves the site alone.
        """
        text = format_release(release).encode()
        keys = self.publication.sign_keys
        return sign(text, keys, passphrase=self.passphrase, now=self.now) if keys else text

    def _write_release(self, release: Release, body: bytes) -> None:
        assert parse_release(unwrap(body), "the new release") == release
        self.site.write(body, self.site.beside(".release"))

    def _copy(self, staged: Path, ref: FileRef, target: Path) -> None:
        """Install a copy; where nothing was staged, the immutable one is the original."""
        original = staged if staged.exists() else self.site.by_hash(ref.sha256)
        data = self.site.staging / "data"
        shutil.copyfile(original, data)
        self.site.install(data, target)

    def _has(self, ref: FileRef | None) -> bool:
        return ref is None or _holds(self.site.by_hash(ref.sha256), ref)

    def _prune(self) -> None:
        if self.publication.keep is None:
            return
        try:
            pruned = prune_store(self.store, self.now)
            prune_by_hash(self.site.folder, self.now)
        except LocalError as error:
            self.reporter.say(str(error))
            return
        if pruned.chunks:
            self.reporter.say(
                f"removed {pruned.chunks} chunks ({pruned.bytes} bytes) that no kept release needs"
            )


def _version(publication: Publication, news: News, now: float) -> str:
    if publication.version is not None:
        return publication.version
    return news.version or time.strftime("%Y%m%d.%H%M%S", time.gmtime(now))


def _readable(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _is_full(error: BaseException) -> bool:
    if isinstance(error, ProgramError):
        return any(words in error.stderr for words in _NO_SPACE_WORDS)
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def _read_index(site: Site, current: Release | None) -> Index | None:
    """The index whose features and chunk sizes are kept; where it is damaged, its copy's."""
    if current is not None and _holds(copy := site.by_hash(current.index.sha256), current.index):
        return index_format.parse(copy.read_bytes(), str(copy))
    try:
        return index_format.parse(site.index.read_bytes(), str(site.index))
    except FileNotFoundError:
        return None
    except ContentError as error:
        raise LocalError(
            f"{error}; if it is not needed any more, move it away to start a new one"
        ) from error


def _read_release(site: Site) -> Release | None:
    path = site.beside(".release")
    try:
        return record.read_release(path)
    except FileNotFoundError:
        return None
    except ContentError as error:
        raise LocalError(
            f"{error}. The next serial depends on it: restore it from a backup; if there is none,"
            " remove it, and the new release gets the current time as serial"
        ) from error


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _holds(path: Path, ref: FileRef) -> bool:
    try:
        if path.stat().st_size != ref.size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == ref.sha256
    except FileNotFoundError:
        return False

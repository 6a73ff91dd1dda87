"""What one entry's work has in common, whoever started it: the state, the sources, the way back.

A cycle (`cycle.Cycle`) and the commands of an operator (`operator.Operator`) are sessions.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from casync_updater.clock import Clock
from casync_updater.cycle import act, commit
from casync_updater.cycle.act import Actor
from casync_updater.cycle.check import Checker, by_hash
from casync_updater.cycle.demands import read_slots
from casync_updater.cycle.marks import judged_again
from casync_updater.cycle.mirror import Mirror, Mirrored, present
from casync_updater.cycle.record import kept_index, kept_nodes, version_differences
from casync_updater.cycle.staging import Site, survey
from casync_updater.cycle.stop import Stop
from casync_updater.cycle.tree import Difference
from casync_updater.cycle.values import Checked, Offer
from casync_updater.errors import (
    BusyError,
    ContentError,
    LocalError,
    MissingError,
    RemoteError,
    TrustError,
    UpdaterError,
    exit_code,
)
from casync_updater.formats import index as index_format
from casync_updater.formats import mtree
from casync_updater.model import (
    Changes,
    Entry,
    Installed,
    Location,
    Monitor,
    Origin,
    Progress,
    Reason,
    Release,
    Settings,
    Step,
)
from casync_updater.reports import CycleEnd, Outcome
from casync_updater.sources.base import Source, shown
from casync_updater.sources.chunks import Chunks
from casync_updater.state import (
    Bad,
    Intent,
    Journal,
    Kept,
    Refusal,
    State,
    StateFolder,
)
from casync_updater.tools.actions import ActionRunner


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a cycle needs from the outside, so that tests can bring their own.

    Attributes:
        settings: the daemon-wide settings.
        state_dir: holds a folder per entry.
        cache_dir: holds chunks on their way.
        clock: the time.
        stop: tells when to end.
        runner: runs actions.
        open_source: opens one of an entry's two places.
    """

    settings: Settings
    state_dir: Path
    cache_dir: Path
    clock: Clock
    stop: Stop
    runner: ActionRunner
    open_source: Callable[[Location], Source]


class Session:
    """Work on one entry. The caller holds the entry's lock, but for looking."""

    def __init__(
        self, entry: Entry, outside: Surroundings, monitor: Monitor, lock: int, log: act.Log
    ) -> None:
        """Nothing is read yet.

        Args:
            entry: what is kept up to date.
            outside: everything that is not the entry's own.
            monitor: told what is going on.
            lock: the descriptor of the entry's lock, inherited by programs that write; -1 where
                this only looks.
            log: takes what happens.
        """
        self._entry = entry
        self._outside = outside
        self._settings = outside.settings
        self._monitor = monitor
        self._lock = lock
        self._log = log
        self._folder = StateFolder(outside.state_dir, entry)
        self._spool = outside.cache_dir / entry.name / "chunks.castr"
        self._sources: dict[Origin, Source] = {}
        self._state = State(str(entry.destination))
        self._refused_before: Refusal | None = None
        self._failures: list[UpdaterError] = []

    def recover(self) -> Site:
        """Complete or undo what an earlier end left; the state is loaded first."""
        self._monitor.step(Step.RECOVER)
        site = survey(self._entry, self._state.no_exchange)
        with self._outside.stop.shielded():
            self._state = commit.recover(
                site, self._state, self._entry, self._folder, self._log.warning
            )
        return site

    def load_and_recover(self) -> None:
        """What every start does first, without network and actions."""
        self._state = self._folder.load()
        self.recover()

    def installed(self) -> Installed | None:
        """The version that the state says is in the destination."""
        return (self._folder.peek() if self._lock < 0 else self._folder.load()).installed

    def _checker(self, *, accept_legacy: bool = False) -> Checker:
        return Checker(
            self._entry,
            self._state,
            settings=self._settings.trust,
            clock=self._outside.clock,
            accept_legacy=accept_legacy,
        )

    def check(self, *, accept_legacy: bool = False) -> Checked:
        """Ask the sources; the state in memory takes their answers."""
        self._judge_marks()
        checker = self._checker(accept_legacy=accept_legacy)
        openers = {Origin.SOURCE: lambda: self._source(Origin.SOURCE)}
        if self._entry.backup is not None and present(self._entry.backup):
            openers[Origin.BACKUP] = lambda: self._source(Origin.BACKUP)
        try:
            return checker.check(openers)
        finally:
            self._state = checker.state

    def _judge_marks(self) -> None:
        """Lower the signed mark where the keyring was changed, and who raised it is not in it."""
        keyrings = self._checker().demands().keyrings
        before = self._state.signed_mark
        self._state = judged_again(self._state, self._folder.signed_releases(), keyrings)
        after = self._state.signed_mark
        if before is not None and after is not None and after < before:
            self._log.warning(
                "%s: no key of the changed keyring vouches for serial %d, which was accepted"
                " before: what is newer than serial %d counts again",
                self._entry.name,
                before.serial,
                after.serial,
            )

    def on_drive(self) -> Release | None:
        """What the backup drive holds for this entry; nothing of it is read but the release.

        Raises:
            TrustError: the drive is foreign.
            UpdaterError: it cannot be read.
        """
        self._state = self._folder.peek()
        try:
            newest = read_slots(self._source(Origin.BACKUP), self._checker().demands()).newest
        finally:
            self._close()
        return None if newest is None else newest.release

    def differences(self, site: Site, installed: Installed) -> Iterator[Difference]:
        """How the destination differs from the installed version, contents included."""
        return self._tree_differences(site.destination, installed, self._entry.preserve)

    def _tree_differences(
        self, tree: Path, installed: Installed, preserve: tuple[str, ...]
    ) -> Iterator[Difference]:
        return version_differences(tree, installed, self._entry, self._folder, preserve)

    def _published_manifest(self, offer: Offer) -> bytes | None:
        """The release's manifest, where it says all that the archive carries."""
        release = offer.candidate.release
        if (
            release is None
            or release.mtree is None
            or not _MTREE_CARRIES.issuperset(offer.index.features)
        ):
            return None
        try:
            return offer.candidate.source.by_hash(release.mtree, ".mtree")
        except MissingError:
            return None

    def _act(self, version: str | None = None) -> tuple[str, ...]:
        """Run what is pending."""
        if not self._state.pending:
            return ()
        self._monitor.step(Step.ACT, version)
        actor = self._actor()
        try:
            acted, self._state = actor.act(self._state)
        except BaseException:
            self._state = actor.saved or self._state
            raise
        self._failures += map(LocalError, acted.failures)
        return acted.commands

    def _actor(self) -> Actor:
        return Actor(
            self._entry,
            self._folder,
            runner=self._outside.runner,
            settings=self._settings.actions,
            stop=self._outside.stop,
            waiting=lambda: self._monitor.progress(Progress(0)),
            log=self._log,
        )

    def _older_versions(self) -> list[Kept]:
        """The versions to go back to, latest first; what was left by going back is none."""
        bad = {version.digest for version in self._state.bad}
        return [
            kept
            for kept in self._state.previous
            if not kept.left and kept.installed.digest not in bad
        ]

    def _go_back(
        self, site: Site, kept: Kept, *, hold: str | None, bad: tuple[Bad, ...]
    ) -> CycleEnd:
        """Exchange the destination with a kept version, after looking at every byte of it.

        Hard links may have been written through, and a disk may have lost something.
        """
        current = self._state.installed
        tree = site.staging / kept.folder
        preserved = (*self._entry.preserve, *kept.preserved)
        first = next(iter(self._tree_differences(tree, kept.installed, kept.preserved)), None)
        if first is not None:
            raise ContentError(
                f"{tree}: the kept version is not what was installed:"
                f" {mtree.escape(first.path)} ({first.what})"
            )
        changes = self._changes_back(current, kept.installed)
        with self._outside.stop.shielded():
            installed = replace(kept.installed, since=self._outside.clock.time())
            journal = Journal(
                Intent.EXCHANGE,
                installed,
                folder=kept.folder,
                moves=_outermost(preserved),
                actions=act.promise(
                    self._entry,
                    act.triggered(self._entry, changes),
                    changes=changes,
                    old=current,
                    new=installed,
                    reason=Reason.OPERATOR,
                    folder=self._folder,
                    settings=self._settings.actions,
                ),
                hold=hold,
                bad=bad,
            )
            self._state = commit.exchange(
                site, self._state, self._folder, journal, now=installed.since
            )
        commands = self._act(installed.version)
        problems = "; ".join(map(str, self._failures))
        self._state = replace(self._state, last_error=problems or None)
        self._folder.save(self._state)
        self._folder.forget_versions(self._state)
        return CycleEnd(
            Outcome.UPDATED,
            exit_code(self._failures),
            "; ".join(filter(None, (hold, problems))),
            serial=installed.serial,
            version=installed.version,
            actions=commands,
        )

    def _changes_back(self, current: Installed | None, older: Installed) -> Changes:
        if not self._entry.is_archive:
            return Changes(changed=(b".",))
        before = kept_nodes(self._folder, current) if current else ()
        return mtree.diff(before, kept_nodes(self._folder, older))

    def _refresh(
        self, mirror: Mirror, site: Site, installed: Installed, sources: Sequence[Source]
    ) -> Mirrored:
        """Bring a drive up to date; what the device does not have itself comes from sources."""
        with self._chunk_chain(kept_index(self._folder, installed), list(sources)) as chunks:
            return mirror.refresh(
                installed,
                site.destination,
                chunks=chunks,
                published=lambda ref: by_hash(ref, ".mtree", sources),
                monitor=self._monitor,
            )

    @contextlib.contextmanager
    def _chunks(self, offer: Offer, checked: Checked) -> Iterator[Chunks]:
        """The chain of sources for an offer: the backup drive is nearer than the network."""
        sources = [source for source in checked.answered if source.location != self._entry.backup]
        backup = self._entry.backup
        if backup is not None and present(backup):
            sources.insert(0, self._source(Origin.BACKUP))
        with self._chunk_chain(offer.index, sources) as chunks:
            yield chunks

    @contextlib.contextmanager
    def _chunk_chain(self, index: index_format.Index, sources: list[Source]) -> Iterator[Chunks]:
        with Chunks(sources, index, connections=self._settings.fetch.connections) as chunks:
            yield chunks

    def _source(self, origin: Origin) -> Source:
        if origin not in self._sources:
            location = self._entry.source if origin is Origin.SOURCE else self._entry.backup
            assert location is not None
            self._sources[origin] = self._outside.open_source(location)
        return self._sources[origin]

    @property
    def received(self) -> int:
        """Bytes that came over a network so far: releases, indexes, chunks, what failed too."""
        return sum(source.received for source in self._sources.values() if source.location.remote)

    def _close(self) -> None:
        for source in self._sources.values():
            source.close()

    def _installed(self, offer: Offer, digest: str) -> Installed:
        release = offer.candidate.release
        return Installed(
            digest=digest,
            index_sha256=offer.index_sha256,
            since=self._outside.clock.time(),
            source=offer.candidate.where,
            origin=offer.candidate.origin,
            version=release.version if release else None,
            serial=release.serial if release else None,
            date=release.date if release else None,
        )

    def _failed(self, error: UpdaterError) -> CycleEnd:
        now = self._outside.clock.time()
        with contextlib.suppress(LocalError):
            saved = self._folder.load()
            if saved.journal is not None:
                # What a commit announced stays announced, until recovery has looked.
                self._state = saved
            self._state = replace(self._state, last_check=now, last_error=str(error))
            if isinstance(error, TrustError | ContentError):
                self._state = replace(self._state, refused=self._refusal(error, now))
            if not isinstance(error, LocalError):
                # What led here may be a release that was damaged on its way, and is kept.
                self._state = replace(self._state, answers=())
            self._folder.save(self._state)
        return CycleEnd(_outcome(error), error.exit_code, str(error))

    def _refusal(self, error: TrustError | ContentError, now: float) -> Refusal:
        """What `status` shows; what was refused for the same reason before keeps its time."""
        if isinstance(error, TrustError):
            refused = Refusal(error.check, error.expected, error.found, error.where, now)
        else:
            source = shown(self._entry.source.index)
            refused = Refusal("content", "what the publisher made", str(error), source, now)
        before = self._refused_before
        if before is not None and before.check == refused.check:
            refused = replace(refused, since=before.since)
        return refused


_MTREE_CARRIES = frozenset(
    {
        "16bit-uids",
        "32bit-uids",
        "sec-time",
        "usec-time",
        "nsec-time",
        "2sec-time",
        "permissions",
        "symlinks",
        "device-nodes",
        "fifos",
        "sockets",
    }
)


def _outermost(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Each path once, without those that lie in another one."""
    return tuple(
        path
        for path in dict.fromkeys(paths)
        if not any(Path(other) in Path(path).parents for other in paths)
    )


def _outcome(error: UpdaterError) -> Outcome:
    match error:
        case BusyError():
            return Outcome.BUSY
        case TrustError() | ContentError():
            return Outcome.REFUSED
        case RemoteError():
            return Outcome.UNREACHABLE
    return Outcome.FAILED

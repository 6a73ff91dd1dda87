"""The cycle: the one place where the order of the rooms stands.

recover, check, plan, build, verify, commit, act, mirror. Resumable are check, plan, build,
verify and mirror: they may be left anywhere and start again. Atomic is commit. Durable is act.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import zstandard

from casync_updater import trust
from casync_updater.clock import Clock
from casync_updater.cycle import act, commit
from casync_updater.cycle.act import Actor
from casync_updater.cycle.builders.casync import CasyncBuilder
from casync_updater.cycle.builders.extractor import ExtractBuilder
from casync_updater.cycle.check import Checker, by_hash, load
from casync_updater.cycle.extract import supported
from casync_updater.cycle.mirror import Condition, Mirror, Mirrored, present
from casync_updater.cycle.plan import lacking, plan
from casync_updater.cycle.record import kept_index, kept_nodes, version_differences
from casync_updater.cycle.staging import Site, garbage, identity, remove, survey
from casync_updater.cycle.stop import Stop, StoppedError
from casync_updater.cycle.tree import Difference, archive_digest, differences
from casync_updater.cycle.values import Builder, Candidate, Checked, Newer, Offer, Plan, UpToDate
from casync_updater.cycle.verify import verify
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
from casync_updater.formats.record import Window, file_system_time
from casync_updater.model import (
    Apply,
    Changes,
    Entry,
    Installed,
    Location,
    Monitor,
    Origin,
    Progress,
    Reason,
    Settings,
    Step,
)
from casync_updater.release import parse_release
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
    UnrecordedError,
)
from casync_updater.tools import casync
from casync_updater.tools.actions import ActionRunner
from casync_updater.tools.inhibitor import shutdown_inhibited
from casync_updater.trust import unwrap


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


@dataclass(frozen=True, slots=True)
class Preview:
    """What a cycle would do now.

    Attributes:
        update: something would be installed.
        version: what the source has.
        serial: its place in the order; None without a release.
        digest: its archive digest, where somebody says it.
        installed: the version in the destination, in words; None for none.
        note: why nothing is installed although the source has something else.
        download: bytes of chunks to fetch, uncompressed.
        changes: what would differ; None where no manifest is published.
        announced: what the publisher says about the version.
    """

    update: bool
    version: str
    serial: int | None
    digest: str | None
    installed: str | None
    note: str | None = None
    download: int = 0
    changes: Changes | None = None
    announced: tuple[str, ...] = ()


class Cycle:
    """One entry's cycle. The caller holds the entry's lock."""

    def __init__(
        self, entry: Entry, outside: Surroundings, monitor: Monitor, lock: int, log: act.Log
    ) -> None:
        """Nothing is read yet.

        Args:
            entry: what is kept up to date.
            outside: everything that is not the entry's own.
            monitor: told what is going on.
            lock: the descriptor of the entry's lock, inherited by programs that write.
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

    def run(self, reason: Reason, *, accept_legacy: bool = False) -> CycleEnd:
        """Go through the rooms, and save what came of it.

        Args:
            reason: who started the cycle; actions and the log are told.
            accept_legacy: take a source without a release this once.
        """
        try:
            with contextlib.ExitStack() as stack:
                self._state = self._folder.load()
                self._refused_before = self._state.refused
                stack.callback(self._close)
                site = self.recover()
                self._act()
                self._prove(site)
                end = self._cycle(site, reason, accept_legacy)
                self._prune(site)
                self._folder.save(self._state)
        except StoppedError as error:
            return CycleEnd(Outcome.STOPPED, 1, str(error))
        except UnrecordedError as error:
            return CycleEnd(Outcome.FAILED, error.exit_code, str(error))
        except UpdaterError as error:
            return self._failed(error)
        except OSError as error:
            return self._failed(
                LocalError(f"{error.filename or self._entry.name}: {error.strerror}")
            )
        return end

    def recover(self) -> Site:
        """Complete or undo what an earlier end left; the state is loaded first."""
        self._monitor.step(Step.RECOVER)
        site = survey(self._entry, self._state.no_exchange)
        with self._outside.stop.shielded():
            self._state = commit.recover(
                site, self._state, self._entry, self._folder, self._log.warning
            )
        return site

    def preview(self) -> Preview:
        """What a cycle would do now; nothing is written, not even the state.

        Raises:
            UpdaterError: no source answers, or what it offers is refused.
        """
        self._state = self._folder.load()
        try:
            outcome = self.check().outcome
            candidate = outcome.candidate
            release, current = candidate.release, self._state.installed
            preview = Preview(
                isinstance(outcome, Newer),
                candidate.version,
                release.serial if release else None,
                candidate.digest,
                (current.version or current.digest) if current else None,
                note=outcome.note if isinstance(outcome, UpToDate) else None,
                announced=release.changes if release else (),
            )
            if isinstance(outcome, UpToDate):
                return preview
            offer = load(candidate)
            fetch = lacking(offer, self._known_ids())
            return replace(
                preview,
                download=sum(ref.size for ref in fetch),
                changes=self._announced_changes(offer),
            )
        finally:
            self._close()

    def _known_ids(self) -> frozenset[bytes]:
        current = self._state.installed
        if current is None:
            return frozenset()
        try:
            return frozenset(ref.id for ref in kept_index(self._folder, current))
        except ContentError:
            return frozenset()

    def _announced_changes(self, offer: Offer) -> Changes | None:
        """What the published manifest says that differs from the installed version."""
        manifest = self._published_manifest(offer)
        if manifest is None:
            return None
        current = self._state.installed
        try:
            before = kept_nodes(self._folder, current) if current else iter(())
        except ContentError:
            return None
        where = offer.candidate.where
        return mtree.diff(before, mtree.parse(manifest.splitlines(), offer.index.features, where))

    def installed(self) -> Installed | None:
        """The version that the state says is in the destination."""
        return self._folder.load().installed

    def verify(self) -> tuple[Difference, ...]:
        """How the destination differs from what was installed; empty where it does not."""
        self._state = self._folder.load()
        site = self.recover()
        if self._state.installed is None:
            return ()
        return tuple(self.differences(site, self._state.installed))

    def rollback(self) -> CycleEnd:
        """Put the version before into the destination, and hold the entry there.

        The mark is not lowered: `resume` goes on with what the publisher offers.

        Raises:
            UpdaterError: there is none, it was changed, or it cannot be exchanged.
        """
        self._state = self._folder.load()
        site = self.recover()
        self._act()
        older = self._older_versions()
        if not older or site.apply is Apply.IN_PLACE:
            raise LocalError(
                f"{self._entry.name}: no previous version is kept"
                + (f": {site.destination} is updated in place ({site.why})" if site.why else "")
            )
        name = older[0].installed.version or older[0].installed.digest[:12]
        return self._go_back(site, older[0], hold=f"rolled back to {name}", bad=())

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

    def load_and_recover(self) -> None:
        """What every start does first, without network and actions."""
        self._state = self._folder.load()
        self.recover()

    def _cycle(self, site: Site, reason: Reason, accept_legacy: bool) -> CycleEnd:
        self._monitor.step(Step.CHECK)
        checked = self.check(accept_legacy=accept_legacy)
        for failure in checked.failures:
            self._log.warning("%s", failure)
        outcome = checked.outcome
        if outcome.candidate.remark:
            self._log.warning("%s: %s", outcome.candidate.where, outcome.candidate.remark)
        with _blamed(outcome.candidate.origin):
            offer = self._offer(site, checked, reason)
        if offer is None:
            assert isinstance(outcome, UpToDate)
            self._renew(outcome.candidate)
            self._note(checked)
            self._mirror(site, checked)
            return self._end(Outcome.CURRENT, outcome.note or "up to date", outcome.candidate)
        if self._adopt(site, offer):
            self._note(checked)
            self._mirror(site, checked)
            return self._end(Outcome.ADOPTED, "adopted as it is", offer.candidate)
        with _blamed(offer.candidate.origin):
            commands = self._installed_somehow(site, offer, checked, reason)
        self._note(checked)
        self._prove(site)
        self._mirror(site, checked)
        return self._end(
            Outcome.UPDATED,
            f"repaired {offer.candidate.version}"
            if offer.repair
            else f"updated to {offer.candidate.version}",
            offer.candidate,
            commands,
        )

    def _installed_somehow(
        self, site: Site, offer: Offer, checked: Checked, reason: Reason
    ) -> tuple[str, ...]:
        """Install with one exchange, or in place where that is found not to work."""
        try:
            return self._install(site, offer, checked, reason)
        except commit.NoExchangeError as error:
            self._state = replace(self._state, no_exchange=str(error))
            self._folder.save(self._state)
            site = survey(self._entry, self._state.no_exchange)
            self._log.warning("%s: updating in place, which is not atomic", error)
            return self._install(site, offer, checked, reason)

    def _renew(self, candidate: Candidate) -> None:
        """Keep the text of a release that was signed again: the backup drive gets it as well."""
        installed, release = self._state.installed, candidate.release
        if installed is None or release is None or candidate.text is None:
            return
        if (installed.digest, installed.index_sha256) != (release.digest, release.index.sha256):
            return
        kept = self._folder.release(installed)
        if kept.exists():
            before = kept.read_bytes()
            if before == candidate.text:
                return
            with contextlib.suppress(ContentError):
                if parse_release(unwrap(before), str(kept)).mark > release.mark:
                    return
        self._folder.keep_release(installed, candidate.text, signed=candidate.signed)

    def export(self, location: Location) -> Mirrored:
        """Make a drive of the installed version, or bring one up to date.

        Raises:
            LocalError: nothing is installed, it has something newer, or it cannot be written.
            TrustError: it is foreign.
        """
        self._state = self._folder.load()
        site = self.recover()
        installed = self._state.installed
        if installed is None:
            raise LocalError(f"{self._entry.name}: nothing was installed yet")
        mirror = Mirror(location, self._folder)
        drive, web = self._outside.open_source(location), self._source(Origin.SOURCE)
        try:
            found = mirror.survey(
                installed, drive, self._checker().demands(), seen=None, monitor=self._monitor
            )
            if found.condition is Condition.NEWER:
                raise LocalError(f"{location.index} is newer: {found.what}")
            return self._refresh(mirror, site, installed, [web])
        finally:
            drive.close()
            self._close()

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
        checker = self._checker(accept_legacy=accept_legacy)
        openers = {Origin.SOURCE: lambda: self._source(Origin.SOURCE)}
        if self._entry.backup is not None and present(self._entry.backup):
            openers[Origin.BACKUP] = lambda: self._source(Origin.BACKUP)
        try:
            return checker.check(openers)
        finally:
            self._state = checker.state

    def _offer(self, site: Site, checked: Checked, reason: Reason) -> Offer | None:
        """What is to be installed: a newer version, or the installed one where it drifted."""
        outcome = checked.outcome
        if isinstance(outcome, Newer):
            return load(outcome.candidate, checked.answered)
        installed = self._state.installed
        if installed is None:
            return None
        drift = self._drift(site, installed, reason)
        if drift is None:
            return None
        self._log.warning("%s %s: repairing it", site.destination, drift)
        if outcome.note is None:
            return load(outcome.candidate, checked.answered, repair=True)
        return self._offer_again(installed, outcome.candidate)

    def _offer_again(self, installed: Installed, current: Candidate) -> Offer:
        """The installed version as it was offered once, while the source has another one."""
        index = kept_index(self._folder, installed)
        kept = self._folder.release(installed)
        text = kept.read_bytes() if kept.exists() else None
        candidate = replace(
            current,
            release=parse_release(trust.unwrap(text), str(kept)) if text else None,
            text=text,
            digest=installed.digest,
            index_bytes=None,
            where=installed.source,
        )
        return Offer(
            candidate,
            index,
            self._folder.index(installed).read_bytes(),
            installed.index_sha256,
            self._entry.is_archive,
            repair=True,
        )

    def _drift(self, site: Site, installed: Installed, reason: Reason) -> str | None:
        """What is wrong with the destination, in words; a look at its root, usually."""
        found = identity(site.destination)
        if found is None:
            return "is gone"
        if installed.root is not None and found.inode != installed.root.inode:
            return "was replaced"
        if self._emptied(site, installed):
            return "is empty"
        now = self._outside.clock.time()
        last = self._state.last_verify
        due = last is None or not 0 <= now - last < self._settings.daemon.verify_interval
        if not due and reason is not Reason.START:
            return None
        try:
            first = next(iter(self.differences(site, installed)), None)
        except ContentError as error:
            return f"cannot be compared ({error})"
        if first is not None:
            return f"differs from what was installed: {mtree.escape(first.path)} ({first.what})"
        self._state = replace(self._state, last_verify=now)
        return None

    def _emptied(self, site: Site, installed: Installed) -> bool:
        """Whether nothing is left of a tree that had something in it. Looks at its root only."""
        if not self._entry.is_archive or any(site.destination.iterdir()):
            return False
        try:
            return len(list(itertools.islice(kept_nodes(self._folder, installed), 2))) > 1
        except ContentError:
            return True

    def differences(self, site: Site, installed: Installed) -> Iterator[Difference]:
        """How the destination differs from the installed version, contents included."""
        return self._tree_differences(site.destination, installed, self._entry.preserve)

    def _tree_differences(
        self, tree: Path, installed: Installed, preserve: tuple[str, ...]
    ) -> Iterator[Difference]:
        return version_differences(tree, installed, self._entry, self._folder, preserve)

    def _adopt(self, site: Site, offer: Offer) -> bool:
        """Take a destination that already is what is offered, without writing to it.

        An image brought it along, or the state was lost. What an update in place left
        unfinished is never taken: casync may have stopped between two files.
        """
        journal = self._state.journal
        if offer.repair or self._state.installed is not None or journal is not None:
            return False
        if not site.destination.exists():
            return False
        if self._entry.is_archive and not any(site.destination.iterdir()):
            return False
        manifest = self._published_manifest(offer)
        if manifest is not None:
            nodes = mtree.parse(manifest.splitlines(), offer.index.features, offer.candidate.where)
            found = differences(
                site.destination,
                nodes,
                features=offer.index.features,
                hash_name=offer.index.hash_name,
                preserve=self._entry.preserve,
            )
            if next(found, None) is not None:
                return False
            digest = offer.candidate.digest
            assert digest is not None
        else:
            try:
                digest = archive_digest(site.destination, offer.index)
            except ContentError:
                return False
            if offer.candidate.digest not in (None, digest):
                return False
            manifest = b""
            if self._entry.is_archive:
                with casync.mtree(site.destination, flags=offer.index.flags) as pieces:
                    manifest = b"".join(pieces)
        installed = replace(self._installed(offer, digest), root=identity(site.destination))
        self._folder.keep_version(
            installed,
            offer.index_bytes,
            offer.candidate.text,
            zstandard.compress(manifest),
            signed=offer.candidate.signed,
        )
        now = self._outside.clock.time()
        self._state = replace(self._state, installed=installed, last_verify=now)
        self._folder.save(self._state)
        self._log.info("%s already is %s: adopted", site.destination, offer.candidate.version)
        return True

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

    def _install(
        self, site: Site, offer: Offer, checked: Checked, reason: Reason
    ) -> tuple[str, ...]:
        """plan, build, verify, commit, act: the commands that ran."""
        version = offer.candidate.version
        self._monitor.step(Step.PLAN, version)
        with contextlib.ExitStack() as shield, contextlib.ExitStack() as stack:
            planned = plan(
                offer,
                site,
                self._state,
                self._folder,
                spool=self._spool,
                preserve=self._entry.preserve,
                stack=stack,
            )
            if site.why is not None:
                self._log.warning(
                    "%s is updated in place, which is not atomic: %s", site.destination, site.why
                )
            self._monitor.step(Step.BUILD, version)

            def begin() -> None:
                shield.enter_context(self._outside.stop.shielded())
                shield.enter_context(shutdown_inhibited(f"{site.destination} is being updated"))
                self._state = commit.begin_in_place(
                    self._state, self._folder, self._installed(offer, "")
                )

            with self._chunks(offer, checked) as chunks:
                staged = self._builder(planned).build(planned, chunks, begin)
            self._monitor.step(Step.VERIFY, version)
            full = self._settings.daemon.full_digest
            verified = verify(staged, self._entry.preserve, full=full)
            self._monitor.step(Step.COMMIT, version)
            with self._outside.stop.shielded():
                installed = self._installed(offer, verified.digest)
                actions = act.promise(
                    self._entry,
                    act.triggered(self._entry, verified.changes),
                    changes=verified.changes,
                    old=commit.standing(self._state),
                    new=installed,
                    reason=reason,
                    folder=self._folder,
                    settings=self._settings.actions,
                )
                self._state = commit.commit(
                    verified,
                    entry=self._entry,
                    state=self._state,
                    folder=self._folder,
                    installed=installed,
                    actions=actions,
                    now=self._outside.clock.time(),
                )
        self._log.info(
            "installed %s: %d added, %d changed, %d removed",
            version,
            len(verified.changes.added),
            len(verified.changes.changed),
            len(verified.changes.removed),
        )
        return self._act(version)

    def _builder(self, planned: Plan) -> Builder:
        """The own extractor wherever it can; who else is never chosen silently."""
        if planned.extract is not None:
            return ExtractBuilder(self._monitor)
        reason = supported(planned.offer.index) if planned.offer.is_archive else None
        if reason is not None:
            self._log.info("%s", reason)
        return CasyncBuilder(self._spool, self._monitor, self._lock)

    def _act(self, version: str | None = None) -> tuple[str, ...]:
        """Run what is pending."""
        if not self._state.pending:
            return ()
        self._monitor.step(Step.ACT, version)
        acted, self._state = self._actor().act(self._state)
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

    def _prove(self, site: Site) -> None:
        """Let the health check decide whether a new version stays.

        Raises:
            LocalError: it failed; the version before is back where there is one.
        """
        trial, installed = self._state.trial, self._state.installed
        if trial is None or installed is None:
            return
        before, boot = self._state, self._outside.clock.boot_id()
        if trial < _TRIALS or before.trial_boot == boot:
            if before.trial_boot != boot:
                self._state = replace(before, trial=trial + 1, trial_boot=boot)
                self._folder.save(self._state)
            try:
                failure = self._actor().examine(
                    self._entry.health_check, f"{installed.index_sha256} {installed.since}"
                )
            except StoppedError:
                # An orderly stop is not the version's fault.
                self._state = before
                self._folder.save(self._state)
                raise
        else:
            failure = f"its health check was cut off {trial} times"
        if failure is None:
            self._state = replace(self._state, trial=None, trial_boot="")
            self._folder.save(self._state)
            return
        name = installed.version or installed.digest[:12]
        self._log.error("%s: %s", name, failure)
        bad = Bad(installed.digest, installed.serial, installed.index_sha256)
        older = self._older_versions()
        try:
            if not older:
                raise ContentError("there is no version to go back to")
            end = self._go_back(site, older[0], hold=None, bad=(bad,))
        except ContentError as error:
            self._state = replace(
                self._state, trial=None, trial_boot="", bad=(*self._state.bad, bad)
            )
            self._folder.save(self._state)
            raise LocalError(f"{name}: {failure}; {error}") from error
        raise LocalError(f"{name}: {failure}; back to {end.version or older[0].installed.digest}")

    def _mirror(self, site: Site, checked: Checked) -> None:
        """Refresh the backup drive; a failure there does not fail the update.

        It is in the cycle's end: exit code 4 for a foreign drive, 1 for one that was damaged
        (and is mended now) or cannot be written.
        """
        location, installed = self._entry.backup, self._state.installed
        if location is None or installed is None or self._state.held is not None:
            return
        if not present(location):
            if not self._state.backup_absent:
                self._log.info("the backup folder of %s is not there", shown(location.index))
            self._state = replace(self._state, backup_absent=True)
            return
        self._state = replace(self._state, backup_absent=False)
        mirror = Mirror(location, self._folder)
        try:
            found = mirror.survey(
                installed,
                self._source(Origin.BACKUP),
                checked.demands,
                seen=self._state.backup_seen,
                monitor=self._monitor,
            )
            if found.condition is Condition.CURRENT:
                self._state = replace(self._state, backup_seen=found.seen)
                return
            if found.condition is Condition.DAMAGED:
                what = f"the backup {location.index} was damaged: {found.what}"
                self._log.error("%s", what)
                self._failures.append(LocalError(what))
            if found.condition is not Condition.NEWER and not self._is_behind(installed):
                done = self._refresh(mirror, site, installed, checked.answered)
                self._state = replace(self._state, backup_seen=done.seen)
                self._log.info(
                    "refreshed the backup %s: %d chunks, %.1f MB",
                    shown(location.index),
                    done.chunks,
                    done.size / 1e6,
                )
        except StoppedError:
            raise
        except UpdaterError as error:
            self._log.error("the backup was not refreshed: %s", error)
            self._failures.append(error)
            if isinstance(error, TrustError):
                now = self._outside.clock.time()
                self._state = replace(self._state, refused=self._refusal(error, now))

    def _is_behind(self, installed: Installed) -> bool:
        """Whether the device itself knows of something newer: it went back, or cannot install."""
        mark = self._state.signed_mark or self._state.unsigned_mark
        return mark is not None and installed.serial is not None and installed.serial < mark.serial

    def _refresh(
        self, mirror: Mirror, site: Site, installed: Installed, sources: Sequence[Source]
    ) -> Mirrored:
        """Bring a drive up to date; what the device does not have itself comes from sources."""
        self._monitor.step(Step.MIRROR, installed.version)
        with self._chunk_chain(kept_index(self._folder, installed), list(sources)) as chunks:
            return mirror.refresh(
                installed,
                site.destination,
                chunks=chunks,
                published=lambda ref: by_hash(ref, ".mtree", sources),
                monitor=self._monitor,
            )

    def _prune(self, site: Site) -> None:
        """Remove what no state names any longer: it forgets first, so that it names no ruin.

        Also what a kill has left of earlier cycles, hence after every cycle.
        """
        stay = self._state.previous[: self._entry.keep]
        if stay != self._state.previous:
            self._state = replace(self._state, previous=stay)
            self._folder.save(self._state)
        remove(self._spool.parent)
        self._folder.forget_versions(self._state)
        named = {kept.folder for kept in self._state.previous}
        if found := garbage(site, named, self._entry.preserve):
            with self._own_touch(site):
                for path in found:
                    remove(path)

    @contextlib.contextmanager
    def _own_touch(self, site: Site) -> Iterator[None]:
        """Remember when trees were removed that share inodes with the installed one.

        Their ctimes change with that; see `formats.record`, "When a file of the tree is trusted".
        """
        if site.apply is Apply.IN_PLACE or not site.destination.is_dir():
            yield
            return
        root = os.open(site.destination, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            begin = file_system_time(root)
            yield
            window = Window(begin, file_system_time(root))
            self._state = replace(self._state, windows=(*self._state.windows, window))
        finally:
            os.close(root)

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

    def _note(self, checked: Checked) -> None:
        """Record that a source answered; what another one was refused for stays visible."""
        now = self._outside.clock.time()
        refused = next((e for e in checked.failures if isinstance(e, TrustError)), None)
        self._state = replace(
            self._state,
            last_check=now,
            last_success=now,
            last_error=str(refused) if refused else checked.outcome.candidate.remark or None,
            refused=None if refused is None else self._refusal(refused, now),
        )

    def _failed(self, error: UpdaterError) -> CycleEnd:
        now = self._outside.clock.time()
        with contextlib.suppress(LocalError):
            saved = self._folder.load()
            if saved.journal is not None:
                # What a commit announced stays announced, until recovery has looked.
                self._state = saved
            self._state = replace(self._state, last_check=now, last_error=str(error))
            if isinstance(error, TrustError):
                self._state = replace(self._state, refused=self._refusal(error, now))
            self._folder.save(self._state)
        return CycleEnd(_outcome(error), error.exit_code, str(error))

    def _refusal(self, error: TrustError, now: float) -> Refusal:
        """What `status` shows; what was refused for the same reason before keeps its time."""
        before = self._refused_before
        since = before.since if before is not None and before.check == error.check else now
        return Refusal(error.check, error.expected, error.found, error.where, since)

    def _end(
        self,
        outcome: Outcome,
        message: str,
        candidate: Candidate,
        commands: tuple[str, ...] = (),
    ) -> CycleEnd:
        """The end of a cycle that did its work; what failed beside that is in it as well."""
        installed = self._state.installed
        problems = "; ".join(map(str, self._failures))
        if problems:
            self._state = replace(self._state, last_error=problems)
            message = f"{message}; {problems}"
        return CycleEnd(
            outcome,
            exit_code(self._failures),
            message,
            serial=installed.serial if installed else None,
            version=installed.version if installed else None,
            actions=commands,
            source=candidate.origin,
        )


_TRIALS = 2
"""How often a health check may be cut off by a reboot before that counts as failed."""

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


@contextlib.contextmanager
def _blamed(origin: Origin) -> Iterator[None]:
    """Wrong bytes on a drive are damage, not a refusal: it is mended, and nobody lied."""
    try:
        yield
    except (ContentError, MissingError) as error:
        if origin is not Origin.BACKUP:
            raise
        raise LocalError(f"the backup drive is damaged: {error}") from error


def _outcome(error: UpdaterError) -> Outcome:
    match error:
        case BusyError():
            return Outcome.BUSY
        case TrustError() | ContentError():
            return Outcome.REFUSED
        case RemoteError():
            return Outcome.UNREACHABLE
    return Outcome.FAILED

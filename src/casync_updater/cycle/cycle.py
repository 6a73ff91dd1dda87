"""The cycle: the one place where the order of the rooms stands.

recover, check, plan, build, verify, commit, act, mirror, and where the entry receives this
program's own packages, their upgrade. Resumable are check, plan, build, verify and mirror: they
may be left anywhere and start again. Atomic is commit. Durable are act and the upgrade.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import zstandard

from casync_updater import trust
from casync_updater.cycle import act, commit
from casync_updater.cycle.builders.casync import CasyncBuilder
from casync_updater.cycle.builders.extractor import ExtractBuilder, leftover_files
from casync_updater.cycle.check import load
from casync_updater.cycle.demands import Demands
from casync_updater.cycle.extract import supported
from casync_updater.cycle.mirror import Condition, Mirror, is_read_only, present
from casync_updater.cycle.plan import plan
from casync_updater.cycle.record import kept_index, kept_nodes
from casync_updater.cycle.selfupdate import SelfUpdate
from casync_updater.cycle.session import Session
from casync_updater.cycle.staging import (
    Site,
    garbage,
    identity,
    make_staging,
    remove,
    survey,
    try_exchange,
)
from casync_updater.cycle.stop import StoppedError
from casync_updater.cycle.tree import archive_digest, differences
from casync_updater.cycle.values import Builder, Candidate, Checked, Newer, Offer, Plan, UpToDate
from casync_updater.cycle.verify import verify
from casync_updater.errors import (
    ContentError,
    LocalError,
    MissingError,
    SpaceError,
    TrustError,
    UpdaterError,
    exit_code,
)
from casync_updater.formats import mtree
from casync_updater.formats.record import Window, file_system_time
from casync_updater.model import (
    Apply,
    Installed,
    Origin,
    Reason,
    Step,
)
from casync_updater.release import parse_release
from casync_updater.reports import CycleEnd, Outcome
from casync_updater.sources.base import Source, shown
from casync_updater.state import Bad, State, UnrecordedError
from casync_updater.tools import casync
from casync_updater.tools.inhibitor import shutdown_inhibited
from casync_updater.trust import unwrap


class Cycle(Session):
    """One entry's cycle. The caller holds the entry's lock."""

    def run(self, reason: Reason, *, accept_legacy: bool = False) -> CycleEnd:
        """Go through the rooms, and save what came of it.

        Args:
            reason: who started the cycle; actions and the log are told.
            accept_legacy: take a source without a release this once.
        """
        had: Installed | None = None
        try:
            with contextlib.ExitStack() as stack:
                self._state = self._folder.load()
                had = self._state.installed
                self._refused_before = self._state.refused
                stack.callback(self._close)
                site = self.recover()
                self._act()
                self._prove(site)
                end = self._cycle(site, reason, accept_legacy)
                self._prune(site)
                self._folder.save(self._state)
                # The very last step: what is started here stops the service that this is part of.
                if self._entry.self_update:
                    self._own_upgrade.start()
        except StoppedError as error:
            end = CycleEnd(Outcome.STOPPED, 1, str(error))
        except UnrecordedError as error:
            end = CycleEnd(Outcome.FAILED, error.exit_code, str(error))
        except UpdaterError as error:
            end = self._failed(error)
        except OSError as error:
            end = self._failed(
                LocalError(f"{error.filename or self._entry.name}: {error.strerror}")
            )
        return replace(
            end,
            had=_called(had),
            version=end.version or _called(self._state.installed),
            received=self.received,
        )

    def _cycle(self, site: Site, reason: Reason, accept_legacy: bool) -> CycleEnd:
        self._monitor.step(Step.CHECK)
        before = self._state
        try:
            checked = self.check(accept_legacy=accept_legacy)
        except UpdaterError:
            # A drive that is empty or damaged can be mended here all the same.
            self._mirror(site, self._checker().demands(), ())
            raise
        self._keep_accepted(before, checked.outcome.candidate)
        if self._entry.self_update:
            self._own_upgrade.checked(self._outside.clock.boot_id())
        for failure in checked.failures:
            self._log.warning("%s", failure)
        outcome = checked.outcome
        if outcome.candidate.remark not in ("", self._state.last_error):
            self._log.warning("%s: %s", outcome.candidate.where, outcome.candidate.remark)
        with _blamed(outcome.candidate.origin):
            offer = self._offer(site, checked, reason)
        commands: tuple[str, ...] = ()
        if offer is None:
            assert isinstance(outcome, UpToDate)
            self._renew(outcome.candidate)
            result, message = Outcome.CURRENT, outcome.note or "up to date"
        elif self._adopt(site, offer):
            result, message = Outcome.ADOPTED, "adopted as it is"
        else:
            with _blamed(offer.candidate.origin):
                commands = self._installed_somehow(offer, checked, reason)
            site = survey(self._entry, self._state.no_exchange)
            verb = "repaired" if offer.repair else "updated to"
            result, message = Outcome.UPDATED, f"{verb} {offer.candidate.version}"
        self._note(checked)
        self._prove(site)
        self._mirror(site, checked.demands, checked.answered)
        self._prepare_own_upgrade(site)
        candidate = outcome.candidate if offer is None else offer.candidate
        return self._end(result, message, candidate, commands)

    def _installed_somehow(self, offer: Offer, checked: Checked, reason: Reason) -> tuple[str, ...]:
        """Install with one exchange, or in place where that is found not to work.

        That is tried before anything is fetched; the answer may have changed since the last time.
        """
        site = self._tried()
        try:
            return self._install(site, offer, checked, reason)
        except commit.NoExchangeError as error:
            self._log.warning("%s: updating in place, which is not atomic", error)
            return self._install(self._without_exchange(str(error)), offer, checked, reason)

    def _tried(self) -> Site:
        """The destination's place, after trying whether an exchange can work there."""
        site = survey(self._entry, None)
        if site.apply is Apply.IN_PLACE or not site.destination.is_dir():
            return survey(self._entry, self._state.no_exchange)
        make_staging(site)
        return self._without_exchange(try_exchange(site, site.staging / "try"))

    def _without_exchange(self, why: str | None) -> Site:
        """Remember why an exchange does not work, for `status` and the next start."""
        if why != self._state.no_exchange:
            self._state = replace(self._state, no_exchange=why)
            self._folder.save(self._state)
        return survey(self._entry, why)

    def _keep_accepted(self, before: State, candidate: Candidate) -> None:
        """Keep what raised a mark, so that no broken state file lets anything older in."""
        marks = (self._state.signed_mark, self._state.unsigned_mark)
        if marks != (before.signed_mark, before.unsigned_mark):
            self._folder.keep_accepted(candidate.text, signed=candidate.signed)

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

    def _install(
        self, site: Site, offer: Offer, checked: Checked, reason: Reason
    ) -> tuple[str, ...]:
        """plan, build, verify, commit, act: the commands that ran."""
        version = offer.candidate.version
        self._monitor.step(Step.PLAN, version)
        with contextlib.ExitStack() as shield, contextlib.ExitStack() as stack:
            planned = self._planned(site, offer, stack)
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
                fetched = [str(part) for part in chunks.fetched if part.chunks]
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
            "installed %s (%s): %d added, %d changed, %d removed",
            version,
            ", ".join(fetched) or "nothing had to be fetched",
            len(verified.changes.added),
            len(verified.changes.changed),
            len(verified.changes.removed),
        )
        return self._act(version)

    def _planned(self, site: Site, offer: Offer, stack: contextlib.ExitStack) -> Plan:
        """Plan; where there is too little room, again without what can be done without.

        First what earlier cycles left and nobody needs; then what tries that were cut off have
        fetched already.
        """

        def planned() -> Plan:
            attempt = contextlib.ExitStack()
            stack.push(attempt)
            try:
                return plan(
                    offer,
                    site,
                    self._state,
                    self._folder,
                    spool=self._spool,
                    preserve=self._entry.preserve,
                    stack=attempt,
                )
            except SpaceError:
                attempt.close()
                raise

        for keep_leftovers in (True, False):
            try:
                return planned()
            except SpaceError as error:
                self._log.info(
                    "%s; removing what %s",
                    error,
                    "nobody needs" if keep_leftovers else "tries that were cut off have fetched",
                )
                self._sweep(site, keep_leftovers=keep_leftovers)
        return planned()

    def _builder(self, planned: Plan) -> Builder:
        """The own extractor wherever it can; who else is never chosen silently."""
        if planned.extract is not None:
            return ExtractBuilder(self._monitor)
        reason = supported(planned.offer.index) if planned.offer.is_archive else None
        if reason is not None:
            self._log.info("%s", reason)
        return CasyncBuilder(self._spool, self._monitor, self._lock)

    def _prove(self, site: Site) -> None:
        """Let the health check decide whether a new version stays.

        Raises:
            LocalError: it failed; the version before is back where there is one.
        """
        trial, installed = self._state.trial, self._state.installed
        if trial is None or installed is None:
            return
        before, boot = self._state, self._outside.clock.boot_id()
        actor, about = self._actor(), f"{installed.index_sha256} {installed.since}"
        # A container that starts again may have the boot id of its host: then what the start
        # cut off tells. After a power cut, that may be lost itself.
        again = actor.forget_cut_off(self._entry.health_check, about) or before.trial_boot != boot
        if trial < _TRIALS or not again:
            if again:
                self._state = replace(before, trial=trial + 1, trial_boot=boot)
                self._folder.save(self._state)
            try:
                failure = actor.examine(self._entry.health_check, about)
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

    def _mirror(self, site: Site, demands: Demands, answered: Sequence[Source]) -> None:
        """Refresh the backup drive; a failure there does not fail the update.

        It is in the cycle's end: exit code 4 for a foreign drive, 1 for one that was damaged
        (and is mended now, unless it is read-only) or cannot be written. One that has a release
        and is read-only from the start is a source and nothing else.
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
        self._monitor.step(Step.MIRROR, _called(installed))
        mirror = Mirror(location, self._folder)
        with self._beside("the backup was not refreshed"):
            found = mirror.survey(
                installed,
                self._source(Origin.BACKUP),
                demands,
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
            if found.condition is Condition.NEWER or self._is_behind(installed):
                return
            if found.usable and is_read_only(location):
                where = shown(location.index)
                self._log.info("the backup %s is read-only: it stays as it is", where)
            else:
                done = self._refresh(mirror, site, installed, answered)
                self._state = replace(self._state, backup_seen=done.seen)
                self._log.info(
                    "refreshed the backup %s: %d chunks, %.1f MB",
                    shown(location.index),
                    done.chunks,
                    done.size / 1e6,
                )

    def _prepare_own_upgrade(self, site: Site) -> None:
        """Prepare the installation of packages of this program, if that is what the entry has."""
        if not self._entry.self_update or self._state.held is not None:
            return
        with self._beside("casync-updater stays as it is"):
            upgrade = self._own_upgrade.prepare(
                site.destination, self._entry, self._settings, os.environ
            )
            if upgrade is not None:
                self._log.info("%s", upgrade)

    @contextlib.contextmanager
    def _beside(self, what: str) -> Iterator[None]:
        """What fails in here does not fail the update; it is in the cycle's end and in `status`."""
        try:
            yield
        except StoppedError:
            raise
        except UpdaterError as error:
            self._log.error("%s: %s", what, error)
            self._failures.append(error)
            if isinstance(error, TrustError):
                now = self._outside.clock.time()
                self._state = replace(self._state, refused=self._refusal(error, now))

    @property
    def _own_upgrade(self) -> SelfUpdate:
        return SelfUpdate(self._outside.state_dir)

    def _is_behind(self, installed: Installed) -> bool:
        """Whether the device itself knows of something newer: it went back, or cannot install."""
        mark = self._state.signed_mark or self._state.unsigned_mark
        return mark is not None and installed.serial is not None and installed.serial < mark.serial

    def _prune(self, site: Site) -> None:
        """Remove what no state names any longer: it forgets first, so that it names no ruin.

        Also what a kill has left of earlier cycles, hence after every cycle. A version that was
        left by going back is none to go back to, and takes no place of those that are.
        """
        stay = tuple(self._older_versions()[: self._entry.keep])
        if stay != self._state.previous:
            self._state = replace(self._state, previous=stay)
            self._folder.save(self._state)
        self._folder.forget_versions(self._state)
        self._sweep(site)

    def _sweep(self, site: Site, *, keep_leftovers: bool = False) -> None:
        """Remove what is in the staging folder and in the cache, and nobody needs.

        Args:
            site: the destination.
            keep_leftovers: what the next try would take from there instead of fetching it stays.
        """
        named = {kept.folder for kept in self._state.previous}
        if keep_leftovers:
            named |= {path.name for path in leftover_files(site)}
        else:
            remove(self._spool.parent)
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

    def _note(self, checked: Checked) -> None:
        """Record that a source answered; what another one was refused for stays visible."""
        now = self._outside.clock.time()
        refusals = (e for e in checked.failures if isinstance(e, TrustError | ContentError))
        refused = next(refusals, None)
        self._state = replace(
            self._state,
            last_check=now,
            last_success=now,
            last_error=str(refused) if refused else checked.outcome.candidate.remark or None,
            refused=None if refused is None else self._refusal(refused, now),
        )

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


def _called(installed: Installed | None) -> str | None:
    """A version in words."""
    return None if installed is None else installed.version or installed.digest[:12]


_TRIALS = 2
"""How often a health check may be cut off by a reboot before that counts as failed."""


@contextlib.contextmanager
def _blamed(origin: Origin) -> Iterator[None]:
    """Wrong bytes on a drive are damage, not a refusal: it is mended, and nobody lied."""
    try:
        yield
    except (ContentError, MissingError) as error:
        if origin is not Origin.BACKUP:
            raise
        raise LocalError(f"the backup drive is damaged: {error}") from error

"""What an operator does with an entry by hand: look ahead, verify, go back, make a drive."""

from dataclasses import dataclass, replace

from casync_updater.cycle.check import load
from casync_updater.cycle.mirror import Condition, Mirror, Mirrored
from casync_updater.cycle.plan import lacking
from casync_updater.cycle.record import kept_index, kept_nodes
from casync_updater.cycle.selfupdate import SelfUpdate
from casync_updater.cycle.session import Session
from casync_updater.cycle.staging import survey
from casync_updater.cycle.tree import Difference
from casync_updater.cycle.values import Newer, Offer, UpToDate
from casync_updater.errors import (
    BusyError,
    ContentError,
    LocalError,
)
from casync_updater.formats import mtree
from casync_updater.model import (
    Apply,
    Changes,
    Location,
    Origin,
    Step,
)
from casync_updater.reports import CycleEnd


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


class Operator(Session):
    """The commands on one entry that are no cycle."""

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

    def verify(self) -> tuple[Difference, ...]:
        """How the destination differs from what was installed; empty where it does not.

        Raises:
            BusyError: without the lock, and a cycle is changing it.
        """
        if self._lock < 0:
            # The cycle that holds the entry has recovered what there was, and waits.
            self._state = self._folder.peek()
            if self._state.journal is not None:
                # It is another one: an action has left the caller running in the background.
                raise BusyError(f"{self._entry.name} is being changed")
            site = survey(self._entry, self._state.no_exchange)
        else:
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

    def rollback_from(self, digest: str) -> None:
        """Go back by hand, unless another version than the one that was meant is there now.

        Raises:
            UpdaterError: as for `rollback`.
        """
        installed = self.installed()
        if installed is not None and installed.digest == digest:
            self.rollback()

    def resume(self) -> str:
        """Clear a hold and the marks of versions that failed; gives what was in the way."""
        state = self._folder.load()
        self._folder.save(replace(state, held=None, bad=()))
        bad = bool(state.bad)
        if self._entry.self_update:
            own = SelfUpdate(self._outside.state_dir)
            bad = bad or bool(own.bad())
            own.forgive()
        return state.held or ("versions that failed" if bad else "nothing")

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
        self._monitor.step(Step.MIRROR, installed.version)
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

"""The first room: is there something to install? One small conditional request, usually.

A source is asked for its ``.release``; where it has none and the entry never accepted one, for
``.cks``; where it has neither, for the index itself. The stored body is judged again when the
source answers that it did not change.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from casync_updater.clock import Clock, moment
from casync_updater.cycle.demands import Demands, Vouched, read_slots
from casync_updater.cycle.values import Candidate, Checked, Newer, Offer, UpToDate
from casync_updater.errors import (
    ContentError,
    MissingError,
    RemoteError,
    TrustError,
    UpdaterError,
)
from casync_updater.formats import index as index_format
from casync_updater.model import Entry, FileRef, Mark, Origin, Release, TrustSettings
from casync_updater.release import (
    RELEASE_LIMIT,
    BestClock,
    Freshness,
    Order,
    best_clock,
    freshness,
    order,
)
from casync_updater.sources.base import Source, Validators, shown
from casync_updater.state import Answer, State, accepted

INDEX_LIMIT = 256 << 20
"""Bytes that an index may have where no release says its size: 6.7 million chunks."""

BUILD_DATE = 1795392000.0
"""2026-11-23: no clock that shows less is right."""

_CKS = re.compile(rb"[0-9a-f]{64}")


class Checker:
    """Asks an entry's sources, and judges what they say.

    Attributes:
        state: the entry's state, with the answers and marks of this check.
    """

    def __init__(
        self,
        entry: Entry,
        state: State,
        *,
        settings: TrustSettings,
        clock: Clock,
        accept_legacy: bool = False,
    ) -> None:
        """Nothing is asked yet.

        Args:
            entry: whose sources are asked.
            state: what was accepted before.
            settings: keyrings for all entries, and whether a signature is demanded.
            clock: tells what has expired.
            accept_legacy: the operator allows a source without a release this once.
        """
        self.state = state
        self._entry = entry
        self._settings = settings
        self._clock = clock
        self._accept_legacy = accept_legacy

    def check(self, sources: Mapping[Origin, Callable[[], Source]]) -> Checked:
        """Ask the source, and the backup where it counts; the newest valid release wins.

        A backup counts where the source cannot answer or is refused, and beside a source that
        answers where both are signed: nobody but the publisher can have made what is on it.

        Raises:
            UpdaterError: no source gave a usable answer; the gravest of the reasons.
        """
        failures: list[UpdaterError] = []
        candidates: list[Candidate] = []
        for origin in Origin:
            if origin not in sources or (candidates and not candidates[0].signed):
                continue
            try:
                candidates += self._asked(origin, sources[origin](), candidates)
            except RemoteError as error:
                failures.append(error)
            except (ContentError, TrustError) as error:
                self._distrust_answers()
                failures.append(error)
        # The sort is stable: of two with the same release, the source itself comes first.
        for candidate in sorted(candidates, key=_place, reverse=True):
            try:
                outcome = self._judge(candidate)
            except TrustError as error:
                self._distrust_answers()
                failures.append(error)
                continue
            answered = tuple(one.source for one in candidates)
            return Checked(outcome, self.demands(), tuple(failures), answered)
        raise min(failures, key=lambda error: (4, 1, 3).index(error.exit_code))

    def _asked(
        self, origin: Origin, source: Source, others: Sequence[Candidate]
    ) -> Iterable[Candidate]:
        """What a source has to offer beside what others have."""
        if not others:
            return (self._ask(origin, source),)
        newest = read_slots(source, self.demands()).newest
        if newest is None or not newest.signed:
            return ()
        return (_candidate(origin, source, newest),)

    def _ask(self, origin: Origin, source: Source) -> Candidate:
        try:
            return _candidate(origin, source, self._release(origin, source))
        except MissingError as error:
            if self.state.accepted_release and not self._accept_legacy:
                raise RemoteError(
                    f"{self._entry.name}: {error}. This entry has accepted a release before, so"
                    " a source without one is not taken; if that is meant, say: casync-updater"
                    f" update --accept-legacy {self._entry.name}"
                ) from error
        if self.demands().signature:
            raise TrustError(
                "signature",
                expected="a signed release",
                found="a source without a release",
                where=shown(source.location.index),
            )
        return self._ask_legacy(origin, source)

    def _release(self, origin: Origin, source: Source) -> Vouched:
        """The release of a source.

        Raises:
            MissingError: it has none.
        """
        if origin is Origin.SOURCE:
            body, where = self._document(source, ".release", RELEASE_LIMIT)
            return self.demands().read(body, where)
        slots = read_slots(source, self.demands())
        if slots.newest is not None:
            return slots.newest
        if slots.torn is not None:
            raise TrustError(
                "signature" if self.demands().signature else "release",
                expected="a whole release",
                found=f"one that is damaged: {slots.torn}",
                where=source.location.index,
            )
        raise MissingError(f"{source.location.index}.release does not exist")

    def demands(self) -> Demands:
        """What the entry demands of a release, whoever offers it.

        Once it accepted a signature, it needs one: an attacker could take it off, and no option
        of the command line lifts that.
        """
        signature = (
            self._entry.signed_by or self._settings.require or self.state.signed_mark is not None
        )
        return Demands(
            keyrings=self._entry.signed_by or (self._settings.keyrings,),
            signature=bool(signature),
            project=self._entry.project,
            now=self._now().time,
        )

    def _ask_legacy(self, origin: Origin, source: Source) -> Candidate:
        try:
            body, where = self._document(source, ".cks", 1024)
        except MissingError:
            body, where = self._document(source, "", INDEX_LIMIT)
            return Candidate(origin, source, None, None, False, None, body, where)
        if not _CKS.fullmatch(body.strip()):
            raise ContentError(f"{where} is no archive checksum (64 hex digits)")
        return Candidate(
            origin, source, None, None, False, body.strip().decode("ascii"), None, where
        )

    def _document(self, source: Source, suffix: str, limit: int) -> tuple[bytes, str]:
        """A document's body, the stored one where the source says that it did not change."""
        key = hashlib.sha256(source.location.index.encode()).hexdigest()[:16] + suffix
        known = self.state.answer(key)
        validators = Validators(known.etag, known.last_modified) if known else None
        document = source.document(suffix, limit=limit, known=validators)
        if document is None:
            assert known is not None
            return known.body.encode("latin-1"), known.where
        if document.validators and len(document.body) <= RELEASE_LIMIT:
            self.state = self.state.with_answer(
                Answer(
                    key,
                    document.where,
                    document.body.decode("latin-1"),
                    document.validators.etag,
                    document.validators.last_modified,
                )
            )
        return document.body, document.where

    def _distrust_answers(self) -> None:
        """Forget the stored bodies: one may have been damaged on its way, and not be the source's.

        Otherwise the source would say for ever that what is refused here did not change.
        """
        self.state = replace(self.state, answers=())

    def _now(self) -> BestClock:
        """The best clock; nothing unsigned is evidence of the time (see `accepted`)."""
        return best_clock(self._clock.time(), self.state.newest_date, BUILD_DATE)

    def _judge(self, candidate: Candidate) -> UpToDate | Newer:
        if candidate.release is None:
            return self._judge_legacy(candidate)
        release = candidate.release
        mark = self.state.signed_mark if candidate.signed else self.state.unsigned_mark
        installed = self.state.installed
        if mark is not None and mark.digest is None:
            mark = replace(mark, digest=self._digest_of(mark.serial))
        match order(release, mark):
            case Order.OLDER:
                return self._older(candidate, release, mark)
            case Order.CONFLICT:
                assert mark is not None
                raise TrustError(
                    "serial",
                    expected=f"archive {mark.digest} for serial {release.serial}",
                    found=f"archive {release.digest}",
                    where=candidate.where,
                )
        same = installed is not None and installed.digest == release.digest
        bad = any(release.digest == one.digest for one in self.state.bad)
        now = self._now()
        fresh = freshness(release, now)
        if fresh is Freshness.UNKNOWN:
            candidate = _doubted(candidate, release, now)
        if not same and not bad and fresh is Freshness.EXPIRED:
            raise TrustError(
                "expiry",
                expected=f"a release that is still valid on {_date(now.time)}",
                found=f"Valid-Until {_date(release.valid_until)}",
                where=candidate.where,
            )
        self.state = accepted(self.state, release.mark, signed=candidate.signed)
        if same and installed is not None:
            self.state = replace(
                self.state,
                installed=replace(
                    installed,
                    serial=release.serial,
                    version=release.version,
                    date=release.date,
                ),
            )
            return UpToDate(candidate)
        if bad:
            return self._stays_away(candidate)
        return self._unless_held(candidate)

    def _digest_of(self, serial: int) -> str | None:
        """The digest that was seen here under a serial, for a mark that does not say it."""
        seen = {bad.serial: bad.digest for bad in self.state.bad}
        seen |= {kept.installed.serial: kept.installed.digest for kept in self.state.previous}
        if self.state.installed is not None:
            seen[self.state.installed.serial] = self.state.installed.digest
        return seen.get(serial)

    def _judge_legacy(self, candidate: Candidate) -> UpToDate | Newer:
        if self._accept_legacy:
            self.state = replace(self.state, unsigned_mark=None)
        installed = self.state.installed
        if installed is not None:
            if candidate.digest is not None:
                same = candidate.digest == installed.digest
            else:
                assert candidate.index_bytes is not None
                same = _sha256(candidate.index_bytes) == installed.index_sha256
            if same:
                return UpToDate(candidate)
        if any(
            candidate.digest == bad.digest
            if candidate.index_bytes is None
            else _sha256(candidate.index_bytes) == bad.index_sha256
            for bad in self.state.bad
        ):
            return self._stays_away(candidate)
        return self._unless_held(candidate)

    def _stays_away(self, candidate: Candidate) -> UpToDate:
        return UpToDate(candidate, f"{candidate.version} failed here before: it stays away")

    def _unless_held(self, candidate: Candidate) -> UpToDate | Newer:
        if self.state.held is not None:
            return UpToDate(
                candidate,
                f"{candidate.version} is there, but the entry is held ({self.state.held}):"
                f" casync-updater resume {self._entry.name}",
            )
        return Newer(candidate)

    def _older(self, candidate: Candidate, release: Release, mark: Mark | None) -> UpToDate:
        assert mark is not None
        return UpToDate(
            candidate,
            f"{candidate.where} is stale: it has serial {release.serial} of {release.version},"
            f" and serial {mark.serial} was accepted before",
        )


def _candidate(origin: Origin, source: Source, vouched: Vouched) -> Candidate:
    release = vouched.release
    return Candidate(
        origin,
        source,
        release,
        vouched.body,
        vouched.signed,
        release.digest,
        None,
        vouched.where,
        vouched.remark,
    )


def _doubted(candidate: Candidate, release: Release, now: BestClock) -> Candidate:
    """A candidate that may have expired, with a word on why nobody knows."""
    doubt = (
        f"whether it is still valid (Valid-Until {_date(release.valid_until)}) is not known, since"
        f" the system clock shows a time before {_date(now.time)}"
    )
    return replace(candidate, remark="; ".join(filter(None, (candidate.remark, doubt))))


def _place(candidate: Candidate) -> tuple[int, float]:
    """A candidate's place in the order of releases; the old layout is before all of them."""
    release = candidate.release
    return (release.serial, release.date) if release else (-1, 0.0)


def load(candidate: Candidate, others: Sequence[Source] = (), *, repair: bool = False) -> Offer:
    """Fetch a candidate's index, and check it against the release.

    Args:
        candidate: what shall be installed.
        others: sources that may have the index as well, where the candidate's own is damaged.
        repair: it is the installed version.

    Raises:
        ContentError: it has another hash than the release says, or is no index.
        RemoteError: it cannot be had.
    """
    source, release = candidate.source, candidate.release
    if release is not None:
        data = by_hash(release.index, "", (source, *others))
    elif candidate.index_bytes is not None:
        data = candidate.index_bytes
    else:
        document = source.document("", limit=INDEX_LIMIT)
        assert document is not None
        data = document.body
    index = index_format.parse(data, shown(source.location.index))
    if release is not None and index.size != release.archive_size:
        raise ContentError(
            f"{candidate.where}: Archive-Size is {release.archive_size}, but the index describes"
            f" {index.size} bytes"
        )
    is_archive = source.location.index.partition("?")[0].endswith(".caidx")
    return Offer(candidate, index, data, _sha256(data), is_archive, repair)


def by_hash(ref: FileRef, suffix: str, sources: Sequence[Source]) -> bytes:
    """A file that a release lists, from the first source that has it.

    Raises:
        ContentError: the first source has other bytes, and no other has the right ones.
        RemoteError: the first source cannot give it, and no other has it.
    """
    failures: list[UpdaterError] = []
    for source in sources:
        try:
            return source.by_hash(ref, suffix)
        except (ContentError, RemoteError) as error:
            failures.append(error)
    raise failures[0]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _date(seconds: float | None) -> str:
    return moment(seconds or 0).isoformat(timespec="seconds")

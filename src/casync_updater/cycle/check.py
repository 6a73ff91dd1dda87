"""The first room: is there something to install? One small conditional request, usually.

A source is asked for its ``.release``; where it has none and the entry never accepted one, for
``.cks``; where it has neither, for the index itself. The stored body is judged again when the
source answers that it did not change.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from casync_updater import trust
from casync_updater.clock import Clock
from casync_updater.cycle.values import Candidate, Checked, Newer, Offer, UpToDate
from casync_updater.errors import (
    ContentError,
    MissingError,
    RemoteError,
    TrustError,
    UpdaterError,
)
from casync_updater.formats import index as index_format
from casync_updater.model import Entry, Mark, Origin, Release, TrustSettings
from casync_updater.release import (
    RELEASE_LIMIT,
    BestClock,
    Freshness,
    Order,
    best_clock,
    freshness,
    order,
    parse_release,
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
        """Ask the source, and the backup where the source cannot answer or is refused.

        Raises:
            UpdaterError: no source gave a usable answer; the gravest of the reasons.
        """
        failures: list[UpdaterError] = []
        for origin in Origin:
            if origin not in sources:
                continue
            try:
                outcome = self._judge(self._ask(origin, sources[origin]()))
            except (RemoteError, ContentError, TrustError) as error:
                failures.append(error)
                continue
            return Checked(outcome, tuple(failures))
        raise min(failures, key=lambda error: (4, 1, 3).index(error.exit_code))

    def _ask(self, origin: Origin, source: Source) -> Candidate:
        try:
            return self._ask_release(origin, source)
        except MissingError as error:
            if self.state.accepted_release and not self._accept_legacy:
                raise RemoteError(
                    f"{self._entry.name}: {error}. This entry has accepted a release before, so"
                    " a source without one is not taken; if that is meant, say: casync-updater"
                    f" update --accept-legacy {self._entry.name}"
                ) from error
        if self._signature_needed(but_for_the_mark=self._accept_legacy):
            raise TrustError(
                "signature",
                expected="a signed release",
                found="a source without a release",
                where=shown(source.location.index),
            )
        return self._ask_legacy(origin, source)

    def _ask_release(self, origin: Origin, source: Source) -> Candidate:
        body, where = self._document(source, ".release", RELEASE_LIMIT)
        statement = trust.authenticate(
            body,
            keyrings=self._entry.signed_by or (self._settings.keyrings,),
            required=self._signature_needed(),
            where=where,
            now=self._now().time,
        )
        release = parse_release(statement.text, where)
        return Candidate(
            origin, source, release, body, statement.signed, release.digest, None, where
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

    def _signature_needed(self, *, but_for_the_mark: bool = False) -> bool:
        return bool(
            self._entry.signed_by
            or self._settings.require
            or (self.state.signed_mark and not but_for_the_mark)
        )

    def _now(self) -> BestClock:
        return best_clock(self._clock.time(), self.state.newest_date, BUILD_DATE)

    def _judge(self, candidate: Candidate) -> UpToDate | Newer:
        if candidate.release is None:
            return self._judge_legacy(candidate)
        release = candidate.release
        self._demand_project(release, candidate.where)
        mark = self.state.signed_mark if candidate.signed else self.state.unsigned_mark
        installed = self.state.installed
        known_digest = None if mark is None else self._digest_of(mark.serial)
        match order(release, mark, known_digest):
            case Order.OLDER:
                return self._older(candidate, release, mark)
            case Order.CONFLICT:
                raise TrustError(
                    "serial",
                    expected=f"archive {known_digest} for serial {release.serial}",
                    found=f"archive {release.digest}",
                    where=candidate.where,
                )
        self.state = accepted(self.state, release.mark, signed=candidate.signed)
        if installed and installed.digest == release.digest:
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
        if any(release.digest == bad.digest for bad in self.state.bad):
            return self._stays_away(candidate)
        if freshness(release, self._now()) is Freshness.EXPIRED:
            raise TrustError(
                "expiry",
                expected="a release that is still valid",
                found=f"Valid-Until {_date(release.valid_until)}",
                where=candidate.where,
            )
        return self._unless_held(candidate)

    def _digest_of(self, serial: int) -> str | None:
        """The digest that was seen here under a serial, installed now or before."""
        seen = {bad.serial: bad.digest for bad in self.state.bad}
        seen |= {kept.installed.serial: kept.installed.digest for kept in self.state.previous}
        if self.state.installed is not None:
            seen[self.state.installed.serial] = self.state.installed.digest
        return seen.get(serial)

    def _judge_legacy(self, candidate: Candidate) -> UpToDate | Newer:
        if self._accept_legacy:
            self.state = replace(self.state, signed_mark=None, unsigned_mark=None)
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

    def _demand_project(self, release: Release, where: str) -> None:
        if release.project != self._entry.project:
            raise TrustError(
                "project", expected=self._entry.project, found=release.project, where=where
            )


def load(candidate: Candidate, *, repair: bool = False) -> Offer:
    """Fetch a candidate's index, and check it against the release.

    Raises:
        ContentError: it has another hash than the release says, or is no index.
        RemoteError: it cannot be had.
    """
    source, release = candidate.source, candidate.release
    if release is not None:
        data = source.by_hash(release.index, "")
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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _date(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds or 0, UTC).isoformat()

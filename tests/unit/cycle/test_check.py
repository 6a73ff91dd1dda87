"""What a source says, judged."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from casync_updater.cycle.check import BUILD_DATE, Checker, load
from casync_updater.cycle.values import Checked, Newer, UpToDate
from casync_updater.errors import (
    ContentError,
    MissingError,
    RemoteError,
    TrustError,
    UpdaterError,
)
from casync_updater.model import (
    Entry,
    FileRef,
    Installed,
    Location,
    Mark,
    Origin,
    Release,
    TrustSettings,
)
from casync_updater.release import format_release
from casync_updater.state import Bad, Kept, State, accepted
from support.fakes import FakeClock, FakeSource
from support.keys import KeyMaker, key_maker
from support.versions import index_bytes

NOW = BUILD_DATE + 86400.0 * 30
DAY = 86400.0


def digest(number: int) -> str:
    return hashlib.sha256(b"digest %d" % number).hexdigest()


def release(number: int, **changes: object) -> Release:
    data = index_bytes(number)
    plain = Release(
        project="x",
        version=f"v{number}",
        serial=number,
        date=BUILD_DATE,
        valid_until=None,
        index=FileRef("x.caidx", len(data), hashlib.sha256(data).hexdigest()),
        mtree=None,
        digest=digest(number),
        features=(),
        archive_size=0,
        store_size=0,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def installed(number: int, **changes: object) -> Installed:
    data = index_bytes(number)
    index_sha256 = hashlib.sha256(data).hexdigest()
    plain = Installed(
        digest(number), index_sha256, 1.0, "here", Origin.SOURCE, f"v{number}", number, BUILD_DATE
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


class Desk:
    """An entry with a source and a backup, and what is remembered of it."""

    def __init__(self, state: State | None = None, **entry: object) -> None:
        place = Location("http://web/x.caidx", "http://web/x.castr")
        drive = Location("/drive/x.caidx", "/drive/x.castr")
        plain = Entry("x", "x", 60.0, place, drive, Path("/srv/x"))
        self.entry = replace(plain, **entry)  # type: ignore[arg-type]
        self.source = FakeSource(place)
        self.backup: FakeSource | None = None
        self.state = state or State("/srv/x")
        self.settings = TrustSettings(keyrings=Path("/nonexistent"))
        self.clock = FakeClock(NOW)

    def publish(self, value: Release | bytes, *, where: FakeSource | None = None) -> None:
        text = value if isinstance(value, bytes) else format_release(value).encode()
        (where or self.source).documents[".release"] = text

    def check(self, *, accept_legacy: bool = False) -> Checked:
        checker = Checker(
            self.entry,
            self.state,
            settings=self.settings,
            clock=self.clock,
            accept_legacy=accept_legacy,
        )
        sources = {Origin.SOURCE: lambda: self.source}
        if (backup := self.backup) is not None:
            sources[Origin.BACKUP] = lambda: backup
        try:
            return checker.check(sources)
        finally:
            self.state = checker.state

    def newer(self) -> str:
        outcome = self.check().outcome
        assert isinstance(outcome, Newer)
        return outcome.candidate.version

    def note(self) -> str | None:
        outcome = self.check().outcome
        assert isinstance(outcome, UpToDate)
        return outcome.note

    def refused(self) -> str:
        with pytest.raises(TrustError) as caught:
            self.check()
        return caught.value.check


# Order.


def test_a_first_release_is_new() -> None:
    desk = Desk()
    desk.publish(release(5))
    assert desk.newer() == "v5"
    assert desk.state.unsigned_mark == Mark(5, BUILD_DATE)
    assert desk.state.signed_mark is None
    assert [suffix for suffix, _ in desk.source.asked] == [".release"]


def test_the_installed_one_is_up_to_date() -> None:
    desk = Desk(State("/srv/x", installed=installed(5), unsigned_mark=Mark(5, BUILD_DATE)))
    desk.publish(release(5))
    assert desk.note() is None


def test_the_same_tree_under_a_new_release_is_up_to_date() -> None:
    desk = Desk(State("/srv/x", installed=installed(5), unsigned_mark=Mark(5, BUILD_DATE)))
    desk.publish(release(9, digest=digest(5), date=BUILD_DATE + 5))
    assert desk.note() is None
    assert desk.state.installed == installed(5, serial=9, version="v9", date=BUILD_DATE + 5)
    assert desk.state.unsigned_mark == Mark(9, BUILD_DATE + 5)


@pytest.mark.parametrize("now", [True, False])
def test_an_older_one_is_a_stale_mirror(now: bool) -> None:
    current = installed(5) if now else None
    desk = Desk(State("/srv/x", installed=current, unsigned_mark=Mark(5, BUILD_DATE)))
    desk.publish(release(4))
    assert "is stale: it has serial 4 of v4, and serial 5 was accepted" in (desk.note() or "")
    assert desk.state.unsigned_mark == Mark(5, BUILD_DATE)


def test_a_serial_that_was_accepted_and_not_yet_installed_is_taken_again() -> None:
    desk = Desk(State("/srv/x", installed=installed(4), unsigned_mark=Mark(5, BUILD_DATE)))
    desk.publish(release(5))
    assert desk.newer() == "v5"


@pytest.mark.parametrize(
    "state",
    [
        State("/srv/x", installed=installed(5)),
        State("/srv/x", installed=installed(4), previous=(Kept("p", installed(5)),)),
        State("/srv/x", installed=installed(4), bad=(Bad(digest(5), 5),)),
    ],
)
def test_another_tree_under_the_same_serial_is_refused(state: State) -> None:
    desk = Desk(replace(state, unsigned_mark=Mark(5, BUILD_DATE)))
    desk.publish(release(5, digest=digest(6)))
    assert desk.refused() == "serial"


def test_signing_again_keeps_the_serial() -> None:
    desk = Desk(State("/srv/x", installed=installed(5), unsigned_mark=Mark(5, BUILD_DATE)))
    desk.publish(release(5, date=BUILD_DATE + DAY))
    assert desk.note() is None
    assert desk.state.unsigned_mark == Mark(5, BUILD_DATE + DAY)


def test_the_release_of_another_project_is_refused() -> None:
    desk = Desk()
    desk.publish(release(5, project="y"))
    assert desk.refused() == "project"
    assert desk.state.unsigned_mark is None


def test_a_version_that_failed_stays_away() -> None:
    desk = Desk(State("/srv/x", installed=installed(4), bad=(Bad(digest(5), 5),)))
    desk.publish(release(5))
    assert desk.note() == "v5 failed here before: it stays away"
    desk.publish(release(6))
    assert desk.newer() == "v6"


def test_a_held_entry_reports_only() -> None:
    desk = Desk(State("/srv/x", installed=installed(4), held="rolled back to v4"))
    desk.publish(release(5))
    note = desk.note() or ""
    assert "v5 is there, but the entry is held (rolled back to v4)" in note
    assert "resume x" in note


# Freshness.


@pytest.mark.parametrize(
    ("clock", "until", "newest", "fresh"),
    [
        (NOW, NOW + 1, None, True),
        (NOW, NOW - 1, None, False),
        # 1970: nothing is known about the time but that the package is built.
        (0.0, BUILD_DATE + 1, None, True),
        (0.0, BUILD_DATE - 1, None, False),
        (0.0, BUILD_DATE + DAY, BUILD_DATE + 2 * DAY, False),
        (0.0, BUILD_DATE + 3 * DAY, BUILD_DATE + 2 * DAY, True),
        # 2040.
        (2_208_988_800.0, NOW + 1, None, False),
    ],
)
def test_expiry_is_judged_by_the_best_clock(
    clock: float, until: float, newest: float | None, fresh: bool
) -> None:
    desk = Desk(State("/srv/x", installed=installed(4), newest_date=newest))
    desk.clock.now = clock
    desk.publish(release(5, date=BUILD_DATE - 9 * DAY, valid_until=until))
    if fresh:
        assert desk.newer() == "v5"
    else:
        assert desk.refused() == "expiry"


def test_a_clock_that_is_behind_is_reported_until_it_is_set() -> None:
    desk = Desk(State("/srv/x", installed=installed(5), unsigned_mark=Mark(5, BUILD_DATE)))
    desk.clock.now = 0.0
    desk.publish(release(5, valid_until=BUILD_DATE + DAY))
    remark = desk.check().outcome.candidate.remark
    assert "the system clock shows a time before 2026-11-23" in remark
    desk.clock.now = BUILD_DATE + DAY - 1
    assert desk.check().outcome.candidate.remark == ""


def test_expiry_stops_installing_and_nothing_else() -> None:
    desk = Desk(State("/srv/x", installed=installed(5), unsigned_mark=Mark(5, BUILD_DATE)))
    desk.publish(release(5, valid_until=NOW - 1))
    assert desk.note() is None


# The old layout.


def test_a_checksum_file_says_what_is_current() -> None:
    desk = Desk(State("/srv/x", installed=installed(5)))
    desk.source.documents[".cks"] = digest(5).encode()
    assert desk.note() is None
    desk.source.documents[".cks"] = digest(6).encode() + b"\n"
    assert desk.newer() == f"archive {digest(6)[:12]}"
    assert desk.state.unsigned_mark is None


@pytest.mark.parametrize("body", [b"", b"<html>", b"a" * 63, b"A" * 64, b"a" * 65])
def test_no_checksum_is_an_error(body: bytes) -> None:
    desk = Desk()
    desk.source.documents[".cks"] = body
    with pytest.raises(ContentError, match=r"x.caidx.cks is no archive checksum"):
        desk.check()


def test_without_any_checksum_the_index_itself_says_it() -> None:
    desk = Desk(State("/srv/x", installed=installed(5)))
    desk.source.documents[""] = index_bytes(5)
    assert desk.note() is None
    desk.source.documents[""] = index_bytes(6)
    assert desk.newer() == "an archive without checksum"
    assert [suffix for suffix, _ in desk.source.asked[:3]] == [".release", ".cks", ""]


def test_a_version_that_failed_stays_away_in_the_old_layout_too() -> None:
    bad = Bad(digest(6), None, installed(6).index_sha256)
    desk = Desk(State("/srv/x", installed=installed(5), bad=(bad,)))
    desk.source.documents[".cks"] = digest(6).encode()
    assert "failed here before" in (desk.note() or "")
    del desk.source.documents[".cks"]
    desk.source.documents[""] = index_bytes(6)
    assert "failed here before" in (desk.note() or "")


def test_only_a_missing_release_leads_to_the_old_layout() -> None:
    desk = Desk()
    desk.source.documents = {".release": RemoteError("timeout"), ".cks": digest(6).encode()}
    with pytest.raises(RemoteError, match="timeout"):
        desk.check()


def test_an_entry_that_accepted_a_release_needs_one() -> None:
    desk = Desk(State("/srv/x", unsigned_mark=Mark(5, 5.0)))
    desk.source.documents[".cks"] = digest(6).encode()
    with pytest.raises(RemoteError, match="--accept-legacy x") as caught:
        desk.check()
    assert not isinstance(caught.value, MissingError)
    outcome = desk.check(accept_legacy=True).outcome
    assert isinstance(outcome, Newer)
    assert not desk.state.accepted_release
    assert isinstance(desk.check().outcome, Newer)


# Signatures.


@pytest.fixture(scope="module")
def maker() -> Iterator[KeyMaker]:
    with key_maker() as made:
        made.key("publisher")
        yield made


@pytest.fixture
def keyring(tmp_path: Path, maker: KeyMaker) -> Path:
    file = tmp_path / "keyring.gpg"
    file.write_bytes(maker.public("publisher"))
    return file


def signed(maker: KeyMaker, value: Release) -> bytes:
    return maker.sign(format_release(value).encode(), "publisher")


def test_only_the_signed_mark_judges_signed_releases(maker: KeyMaker, keyring: Path) -> None:
    state = accepted(State("/srv/x"), Mark(99, BUILD_DATE), signed=False)
    desk = Desk(state, signed_by=(keyring,))
    desk.publish(signed(maker, release(5)))
    assert desk.newer() == "v5"
    assert desk.state.signed_mark == Mark(5, BUILD_DATE)
    assert desk.state.unsigned_mark == Mark(99, BUILD_DATE)
    desk.publish(release(7))
    assert desk.refused() == "signature"


def test_an_entry_that_accepted_a_signature_needs_one(maker: KeyMaker, keyring: Path) -> None:
    desk = Desk()
    desk.settings = TrustSettings(keyrings=keyring)
    desk.publish(release(4))
    assert desk.newer() == "v4"
    desk.publish(signed(maker, release(5)))
    assert desk.newer() == "v5"
    desk.publish(release(6))
    assert desk.refused() == "signature"
    # Not even an operator who allows the old layout allows this.
    with pytest.raises(TrustError):
        desk.check(accept_legacy=True)
    assert desk.state.signed_mark == Mark(5, BUILD_DATE)
    desk.source.documents = {".cks": digest(6).encode()}
    with pytest.raises(RemoteError):
        desk.check()
    with pytest.raises(TrustError):
        desk.check(accept_legacy=True)


@pytest.mark.parametrize("how", ["entry", "settings"])
def test_a_demanded_signature_is_demanded_of_the_old_layout(keyring: Path, how: str) -> None:
    desk = Desk(signed_by=(keyring,) if how == "entry" else ())
    desk.settings = TrustSettings(require=how == "settings", keyrings=keyring)
    desk.source.documents[".cks"] = digest(6).encode()
    with pytest.raises(TrustError, match="a source without a release"):
        desk.check(accept_legacy=True)


def test_no_unsigned_date_makes_a_signed_release_expire(maker: KeyMaker, keyring: Path) -> None:
    desk = Desk()
    desk.publish(release(5, date=BUILD_DATE * 2))
    assert desk.newer() == "v5"
    desk.entry = replace(desk.entry, signed_by=(keyring,))
    desk.publish(signed(maker, release(6, valid_until=NOW + 5)))
    assert desk.newer() == "v6"


# Caching.


def test_an_unchanged_answer_is_judged_again() -> None:
    desk = Desk(State("/srv/x", installed=installed(4)))
    desk.publish(release(5, valid_until=NOW + 5))
    desk.source.etags[".release"] = "one"
    assert desk.newer() == "v5"
    assert desk.newer() == "v5"
    assert desk.source.asked == [(".release", None), (".release", "one")]
    desk.state = replace(desk.state, bad=(Bad(digest(5), 5),))
    assert "failed here before" in (desk.note() or "")
    desk.state = replace(desk.state, bad=())
    desk.clock.now = NOW + 10
    assert desk.refused() == "expiry"


def test_answers_of_two_places_are_two_answers() -> None:
    desk = Desk()
    desk.publish(release(5))
    desk.source.etags[".release"] = "same"
    assert desk.newer() == "v5"
    desk.source.documents = {".release": RemoteError("down")}
    desk.backup = FakeSource(Location("/drive/x.caidx", "/drive/x.castr"))
    desk.backup.etags[".release"] = "same"
    desk.publish(release(6), where=desk.backup)
    assert desk.newer() == "v6"
    assert (".release", "same") not in desk.backup.asked


def test_any_bytes_are_stored_as_they_are(maker: KeyMaker, keyring: Path) -> None:
    desk = Desk(signed_by=(keyring,))
    desk.publish(signed(maker, release(5, version="vë5", changes=("ünïcode €",))))
    desk.source.etags[".release"] = "one"
    assert desk.newer() == "vë5"
    assert desk.newer() == "vë5"


# Two places.


def drive(desk: Desk) -> FakeSource:
    desk.backup = FakeSource(Location("/drive/x.caidx", "/drive/x.castr"))
    return desk.backup


def test_the_backup_stands_in_for_a_source_that_fails() -> None:
    for failure in (RemoteError("down"), ContentError("a portal"), b"<html>not a release"):
        desk = Desk()
        desk.source.documents[".release"] = failure
        desk.publish(release(5), where=drive(desk))
        checked = desk.check()
        assert isinstance(checked.outcome, Newer)
        assert checked.outcome.candidate.origin is Origin.BACKUP
        assert len(checked.failures) == 1


def test_the_backup_is_not_asked_where_the_source_answers() -> None:
    desk = Desk()
    desk.publish(release(5))
    desk.publish(release(6), where=drive(desk))
    assert desk.newer() == "v5"
    assert desk.backup is not None
    assert desk.backup.asked == []


@pytest.mark.parametrize(
    ("first", "second", "wins"),
    [
        (RemoteError("one"), RemoteError("two"), "one"),
        (RemoteError("one"), ContentError("two"), "two"),
        (ContentError("one"), RemoteError("two"), "one"),
        (MissingError("one"), TrustError("c", expected="a", found="b", where="two"), "two"),
    ],
)
def test_the_gravest_error_wins(first: UpdaterError, second: UpdaterError, wins: str) -> None:
    desk = Desk()
    desk.source.documents[".release"] = first
    drive(desk).documents[".release"] = second
    with pytest.raises(UpdaterError, match=wins):
        desk.check()


def test_a_stale_drive_is_no_update() -> None:
    desk = Desk(State("/srv/x", installed=installed(5), unsigned_mark=Mark(5, BUILD_DATE)))
    desk.source.documents[".release"] = RemoteError("down")
    desk.publish(release(4), where=drive(desk))
    assert "is stale" in (desk.note() or "")


# The index.


def offered(desk: Desk) -> Newer:
    outcome = desk.check().outcome
    assert isinstance(outcome, Newer)
    return outcome


def test_the_index_is_the_release_s() -> None:
    desk = Desk()
    data = index_bytes(5)
    desk.publish(release(5))
    desk.source.hashed[hashlib.sha256(data).hexdigest()] = data
    offer = load(offered(desk).candidate)
    assert (offer.index_bytes, offer.is_archive, offer.repair) == (data, True, False)
    assert offer.index_sha256 == hashlib.sha256(data).hexdigest()
    desk.publish(release(6, archive_size=5, index=release(5).index))
    with pytest.raises(ContentError, match="Archive-Size is 5, but the index describes 0 bytes"):
        load(offered(desk).candidate)


def test_the_index_of_the_old_layout() -> None:
    desk = Desk()
    desk.source.documents = {".cks": digest(5).encode(), "": index_bytes(5)}
    assert load(offered(desk).candidate).index_bytes == index_bytes(5)
    del desk.source.documents[".cks"]
    assert load(offered(desk).candidate).index_bytes == index_bytes(5)
    desk.source.documents = {".cks": digest(6).encode(), "": b"<html>"}
    with pytest.raises(ContentError, match="is no casync index"):
        load(offered(desk).candidate)

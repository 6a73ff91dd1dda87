"""A release is read strictly, whoever wrote it."""

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from casync_updater.errors import ContentError
from casync_updater.model import FileRef, Mark, Release
from casync_updater.release import (
    RELEASE_LIMIT,
    BestClock,
    Freshness,
    Order,
    best_clock,
    format_release,
    freshness,
    order,
    parse_release,
)

HASH = "9430bf85873d90733ff0de2aeabfd4fc65c44314a723777484de6a77dd6f6bcc"

TEXT = f"""\
Format: 1
Project: myproject
Version: 1.4.2-1
Serial: 1795447266
Date: Mon, 23 Nov 2026 15:21:06 +0000
Valid-Until: Wed, 23 Dec 2026 15:21:06 +0000
Index: fancyName.caidx
Archive-Digest: {HASH}
Features: permissions symlinks sec-time
Archive-Size: 264503808
Store-Size: 116391936
Changes:
 * A first change
 * a second, with ümlaut
SHA256:
 {"a" * 64} 161544 fancyName.caidx
 {"b" * 64} 888 fancyName.caidx.mtree
"""

RELEASE = Release(
    project="myproject",
    version="1.4.2-1",
    serial=1795447266,
    date=1795447266.0,
    valid_until=1795447266.0 + 30 * 86400,
    index=FileRef("fancyName.caidx", 161544, "a" * 64),
    mtree=FileRef("fancyName.caidx.mtree", 888, "b" * 64),
    digest=HASH,
    features=("permissions", "symlinks", "sec-time"),
    archive_size=264503808,
    store_size=116391936,
    changes=("A first change", "a second, with ümlaut"),
)


def test_the_form_is_the_one_that_the_design_shows() -> None:
    assert format_release(RELEASE) == TEXT


@pytest.mark.parametrize("text", [TEXT, TEXT.encode(), TEXT.removesuffix("\n")])
def test_text_and_bytes_are_read(text: str | bytes) -> None:
    assert parse_release(text, "here") == RELEASE


def test_optional_fields_may_be_missing() -> None:
    bare = dataclasses.replace(RELEASE, valid_until=None, mtree=None, features=(), changes=())
    text = format_release(bare)
    assert "Valid-Until" not in text
    assert "Changes" not in text
    assert parse_release(text, "here") == bare


def test_unknown_fields_and_files_of_a_later_version_are_passed_over() -> None:
    text = TEXT.replace("Features:", "Colour: green\nFeatures:") + f" {HASH} 5 README\n"
    assert parse_release(text, "here") == RELEASE


def test_file_names_may_have_spaces() -> None:
    spaced = dataclasses.replace(
        RELEASE, index=FileRef("a  b.caidx", 5, HASH), mtree=FileRef("a  b.caidx.mtree", 5, HASH)
    )
    assert parse_release(format_release(spaced), "here") == spaced


def swap(old: str, new: str) -> Callable[[str], str | bytes]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"", "line 1"),
        (lambda _: b"<html>\n<body>", "line 1"),
        (lambda text: text.encode("latin-1"), "UTF-8"),
        (lambda text: text.encode("utf-16"), "UTF-8"),
        (lambda text: text + "X-Pad: " + "x" * RELEASE_LIMIT, "bytes"),
        (lambda text: text + "\n" + text, "is no field"),
        (lambda text: "\n" + text, "line 1"),
        (lambda text: text.replace("\n", "\r\n"), "control character"),
        (lambda text: text + "-----BEGIN PGP SIGNATURE-----\n", "is no field"),
        (lambda text: text + "# comment: here\n", "is no field"),
        (lambda text: text + " \n", "is no field"),
        (lambda text: text + "serial: 5\n", "twice"),
        (swap("Format: 1", "Format: 2"), "made for a newer casync-updater"),
        (swap("Format: 1\n", ""), "Format of the release: the field is missing"),
        (swap("1.4.2-1", "1.4\x00"), "control character"),
        (swap("1.4.2-1", "1.4\u2028Serial: 7"), "control character"),
        (swap("1.4.2-1", "\x1b[31m"), "control character"),
        (swap("1.4.2-1", "1\n 2"), "Version of the release: it must be one line"),
        (swap("myproject", ""), "Project"),
        (swap("1795447266", "+1795447266"), "Serial"),
        (swap("1795447266", "1_795_447_266"), "Serial"),
        (swap("1795447266", "-1"), "Serial"),
        (swap("1795447266", "01795447266"), "Serial"),
        (swap("1795447266", "١٧٩"), "Serial"),
        (swap("1795447266", "9" * 5000), "Serial"),
        (swap("1795447266", str(2**53 + 1)), "Serial"),
        (swap("1795447266", str(1795447266 + 2 * 86400 + 1)), "two days beyond"),
        (swap("15:21:06 +0000\nValid", "15:21:06 +0100\nValid"), "Date"),
        (swap("15:21:06 +0000\nValid", "15:21:06 GMT\nValid"), "Date"),
        (swap("15:21:06 +0000\nValid", "15:21:06 -0000\nValid"), "Date"),
        (swap("15:21:06 +0000\nValid", "25:21:06 +0000\nValid"), "Date"),
        (swap("Mon, 23 Nov", "Tue, 23 Nov"), "Date"),
        (swap("Mon, 23 Nov 2026", "Mon, 23 Nov 99999999999"), "Date"),
        (swap("Mon, 23 Nov 2026 15:21:06", "Wed, 23 Dec 1903 15:21:06"), "Date"),
        (swap("Mon, 23 Nov 2026 15:21:06 +0000", "tomorrow"), "Date"),
        (swap("23 Dec 2026", "23 Dec 2020"), "Valid-Until"),
        (swap("Wed, 23 Dec 2026", "Sat, 21 Nov 2026"), "Valid-Until of the release: it lies"),
        (swap("Index: fancyName.caidx", "Index: fancyName"), "Index"),
        (swap("Index: fancyName.caidx", "Index: other.caidx"), "SHA256"),
        (swap(f"Digest: {HASH}", f"Digest: {HASH.upper()}"), "Archive-Digest"),
        (swap(f"Digest: {HASH}", f"Digest: {HASH[1:]}"), "Archive-Digest"),
        (swap("permissions symlinks", "permissions permissions"), "Features"),
        (swap("permissions symlinks", "--store=/etc"), "Features"),
        (swap("264503808", "264503808.0"), "Archive-Size"),
        (swap("264503808", str(2**63)), "Archive-Size"),
        (swap("116391936", ""), "Store-Size"),
        (swap(" fancyName.caidx\n", " ../fancyName.caidx\n"), "plain file name"),
        (swap("fancyName.caidx", "a/b.caidx"), "plain file name"),
        (swap(" 888 ", " 888\n "), "SHA256"),
        (swap(" 888 ", " 1e3 "), "SHA256"),
        (swap(" 888 ", f" {2**40} "), "SHA256"),
        (swap(" 161544 ", f" {2**40} "), "SHA256"),
        (swap("a" * 64, "a" * 63), "SHA256"),
        (lambda text: text + f" {HASH} 5 fancyName.caidx\n", "twice"),
        (lambda text: text + f" {HASH} 5 ..\n", "plain file name"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    change: Callable[[str], str | bytes], message: str
) -> None:
    with pytest.raises(ContentError, match=r"^the drive") as caught:
        parse_release(change(TEXT), "the drive")
    assert message in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_a_content_error_or_a_release(data: st.DataObject) -> None:
    raw = bytearray(TEXT.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(begin, min(len(raw), begin + 40)))
        raw[begin:end] = data.draw(st.binary(max_size=12))
    try:
        release = parse_release(bytes(raw), "here")
    except ContentError:
        return
    assert parse_release(format_release(release), "here") == release


@settings(max_examples=200, deadline=None)
@given(st.text() | st.binary())
@example("Format:")
@example("Format: 1\n Project: 2")
def test_anything_at_all_is_a_content_error(text: str | bytes) -> None:
    with pytest.raises(ContentError):
        parse_release(text, "here")


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1\n2"},
        {"version": ""},
        {"version": " 1"},
        {"project": "a\nSerial: 1"},
        {"serial": 2**53 + 1, "date": 2.0**54},
        {"serial": 1795447266 + 3 * 86400},
        {"date": 1795447266.5},
        {"changes": ("a\n b",)},
        {"changes": ("",)},
        {"index": FileRef("\udcff.caidx", 5, HASH), "mtree": None},
    ],
)
def test_what_cannot_be_said_is_not_published(change: dict[str, object]) -> None:
    with pytest.raises(ContentError):
        format_release(dataclasses.replace(RELEASE, **change))  # type: ignore[arg-type]


def test_order() -> None:
    mark = RELEASE.mark
    assert order(RELEASE, None) is Order.NEWER
    assert order(RELEASE, Mark(mark.serial - 1, mark.date + 9, HASH)) is Order.NEWER
    assert order(RELEASE, Mark(mark.serial + 1, mark.date - 9, HASH)) is Order.OLDER
    assert order(RELEASE, Mark(mark.serial, mark.date - 9, HASH)) is Order.SAME
    assert order(RELEASE, Mark(mark.serial, mark.date + 9, HASH)) is Order.SAME
    assert order(RELEASE, Mark(mark.serial, mark.date)) is Order.SAME
    assert order(RELEASE, mark) is Order.SAME
    assert order(RELEASE, Mark(mark.serial, mark.date, "0" * 64)) is Order.CONFLICT


def test_a_clock_behind_what_is_known_to_have_passed_cannot_judge() -> None:
    until = RELEASE.valid_until
    assert until is not None
    assert best_clock(100.0, None, 50.0) == BestClock(100.0, behind=False)
    assert best_clock(0.0, RELEASE.date, 50.0) == BestClock(RELEASE.date, behind=True)
    assert freshness(RELEASE, best_clock(0.0, RELEASE.date)) is Freshness.UNKNOWN
    assert freshness(RELEASE, best_clock(0.0, until + 1)) is Freshness.EXPIRED
    assert freshness(RELEASE, best_clock(until)) is Freshness.FRESH
    assert freshness(RELEASE, best_clock(until + 1)) is Freshness.EXPIRED
    forever = dataclasses.replace(RELEASE, valid_until=None)
    assert freshness(forever, best_clock(until + 1)) is Freshness.FRESH

"""Marks after a change of keys, with real keys and gpgv."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from casync_updater.cycle.marks import judged_again
from casync_updater.model import FileRef, Mark, Release
from casync_updater.release import format_release
from casync_updater.state import State
from support.keys import KeyMaker, key_maker

RELEASE = Release(
    project="tree",
    version="1",
    serial=1_790_000_000,
    date=1_790_000_000.0,
    valid_until=None,
    index=FileRef("tree.caidx", 1, "0" * 64),
    mtree=None,
    digest="0" * 64,
    features=(),
    archive_size=1,
    store_size=1,
)
FAR = replace(RELEASE, serial=4_102_444_800, date=4_102_444_800.0, digest="1" * 64)
STATE = State("/srv/tree")


@pytest.fixture(scope="module")
def keys() -> Iterator[KeyMaker]:
    with key_maker() as maker:
        maker.key("stolen")
        maker.key("spare")
        yield maker


def signed(keys: KeyMaker, release: Release, *names: str) -> tuple[Path, bytes]:
    return Path("kept.release"), keys.sign(format_release(release).encode(), *names)


@pytest.fixture
def spare(keys: KeyMaker, tmp_path: Path) -> Path:
    path = tmp_path / "spare.gpg"
    path.write_bytes(keys.public("spare"))
    return path


def marked(release: Release) -> State:
    return replace(STATE, signed_mark=release.mark, newest_date=release.date)


def test_a_mark_falls_with_its_key_to_what_others_signed(keys: KeyMaker, spare: Path) -> None:
    kept = [signed(keys, FAR, "stolen"), signed(keys, RELEASE, "stolen", "spare")]
    state = judged_again(marked(FAR), kept, [spare])
    assert state.signed_mark == RELEASE.mark
    assert state.signed_mark is not None
    assert state.signed_mark.digest == RELEASE.digest
    assert state.newest_date == RELEASE.date
    assert judged_again(state, kept, [spare]) is state


def test_without_anything_else_a_signature_is_needed_all_the_same(
    keys: KeyMaker, spare: Path
) -> None:
    state = judged_again(marked(FAR), [signed(keys, FAR, "stolen")], [spare])
    assert state.signed_mark == Mark(0, 0.0)
    assert state.newest_date is None


def test_a_wrong_keyring_does_no_harm_that_lasts(keys: KeyMaker, spare: Path) -> None:
    right = spare.with_name("right.gpg")
    right.write_bytes(keys.public("stolen"))
    kept = [signed(keys, FAR, "stolen")]
    wrong = judged_again(marked(FAR), kept, [spare])
    assert wrong.signed_mark == Mark(0, 0.0)
    back = judged_again(wrong, kept, [right])
    assert (back.signed_mark, back.newest_date) == (FAR.mark, FAR.date)


def test_a_mark_stands_with_any_of_its_keys(keys: KeyMaker, spare: Path) -> None:
    state = judged_again(marked(FAR), [signed(keys, FAR, "stolen", "spare")], [spare])
    assert (state.signed_mark, state.newest_date) == (FAR.mark, FAR.date)


def test_a_mark_of_which_nothing_is_kept_stands(keys: KeyMaker, spare: Path) -> None:
    other = signed(keys, RELEASE, "stolen")
    broken = Path("broken.release"), b"\0"
    for kept in ([], [other], [broken]):
        assert judged_again(marked(FAR), kept, [spare]).signed_mark == FAR.mark


def test_a_keyring_that_is_away_changes_nothing(keys: KeyMaker, tmp_path: Path) -> None:
    kept = [signed(keys, FAR, "stolen")]
    state = marked(FAR)
    assert judged_again(state, kept, [tmp_path / "away.gpg"]) is state
    (tmp_path / "torn.gpg").write_bytes(keys.public("spare")[:50])
    assert judged_again(state, kept, [tmp_path / "torn.gpg"]).signed_mark == FAR.mark


def test_what_was_never_signed_is_not_judged(spare: Path) -> None:
    state = replace(STATE, unsigned_mark=FAR.mark)
    assert judged_again(state, [], [spare]) is state

"""Version and changes, from whatever text there is."""

from pathlib import Path

import pytest

from casync_updater.errors import LocalError
from casync_updater.model import Publication
from casync_updater.server.news import News, news_of, read_news

CHANGELOG = """\
app (2:1.0~rc1-3) unstable; urgency=medium

  [ A. Author ]
  * First change
    goes on here.
    - with a detail
  * Zweite Änderung

 -- A. Author <a@example.org>  Mon, 23 Nov 2026 15:21:06 +0000
"""


def entry(changes: Path | str | None) -> Publication:
    here = Path("/x")
    return Publication(index=here, store=here, source=here, project="x", changes=changes)


def test_a_changelog_gives_version_and_changes() -> None:
    assert news_of(CHANGELOG) == News(
        "2:1.0~rc1-3",
        ("[ A. Author ]", "First change goes on here.", "with a detail", "Zweite Änderung"),
    )


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("", ()),
        ("\n \n.\n", ()),
        ("one\ntwo", ("one", "two")),
        ("- one\n  more\n\n* two\n", ("one more", "two")),
        ("a\tb\x1b[31m\r\nc\x00", ("a b [31m", "c")),
        ("app (1.0) broken", ("app (1.0) broken",)),
        ("*", ("*",)),
    ],
)
def test_any_other_text_gives_its_lines(text: str, changes: tuple[str, ...]) -> None:
    assert news_of(text) == News(None, changes)


def test_endless_news_are_cut() -> None:
    changes = news_of("x" * 9999 + "\n" + "line\n" * 9999).changes
    assert len(changes) == 201
    assert changes[-1] == "and 9800 changes more"
    assert changes[0].endswith("…")
    assert max(map(len, changes)) == 500


def test_where_the_news_come_from(tmp_path: Path) -> None:
    file = tmp_path / "changelog"
    file.write_bytes(b"one \xff")
    assert read_news(entry(file)).changes == ("one \ufffd",)
    assert read_news(entry("text")).changes == ("text",)
    assert read_news(entry(None)) == News()
    with pytest.raises(LocalError, match="gone cannot be read"):
        read_news(entry(tmp_path / "gone"))

"""One version: the module's and the package's are the same."""

from pathlib import Path

from debian.changelog import Changelog

import casync_updater

CHANGELOG = Path(__file__).parents[2] / "debian/changelog"


def test_changelog_and_module_agree() -> None:
    with CHANGELOG.open(encoding="utf-8") as file:
        assert str(Changelog(file).version) == casync_updater.__version__

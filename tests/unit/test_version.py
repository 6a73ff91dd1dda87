"""One version: the module's, the package's and what the programs say are the same."""

import subprocess
import sys
from pathlib import Path

import pytest
from debian.changelog import Changelog

import casync_updater

ROOT = Path(__file__).parents[2]


def test_changelog_and_module_agree() -> None:
    with (ROOT / "debian/changelog").open(encoding="utf-8") as file:
        assert str(Changelog(file).version) == casync_updater.__version__


@pytest.mark.parametrize(
    ("module", "program"),
    [
        ("casync_updater", "casync-updater"),
        ("casync_updater.server", "casync-updater-server"),
    ],
)
def test_programs_say_the_same(module: str, program: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", module, "--version"],
        env={"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == f"{program} {casync_updater.__version__}\n"

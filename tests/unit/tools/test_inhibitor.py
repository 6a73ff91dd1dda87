"""The lock is there while the block lasts, and never in the way."""

import os
import time
from pathlib import Path

import pytest

from casync_updater.tools.inhibitor import shutdown_inhibited


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def install(folder: Path, script: str) -> None:
    program = folder / "systemd-inhibit"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_it_is_held_while_the_block_lasts(programs: Path, tmp_path: Path) -> None:
    held, words = tmp_path / "held", tmp_path / "words"
    install(programs, f'echo "$@" >{words}; touch {held}; cat; rm {held}')
    with shutdown_inhibited("writing /srv/web"):
        assert held.exists()
        assert "--what=shutdown --mode=block" in words.read_text()
        assert "--why=writing /srv/web cat" in words.read_text()
    assert not held.exists()


def test_it_ends_with_an_error_in_the_block(programs: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    install(programs, f"touch {held}; cat; rm {held}")
    with pytest.raises(OSError, match="on purpose"), shutdown_inhibited("x"):
        raise OSError("on purpose")
    assert not held.exists()


def test_without_logind_the_work_goes_on(programs: Path) -> None:
    install(programs, "echo Failed to inhibit >&2; exit 1")
    begin = time.monotonic()
    with shutdown_inhibited("x"):
        pass
    assert time.monotonic() - begin < 3


def test_without_the_program_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with shutdown_inhibited("x"):
        pass

"""Writing to the disk beside the build."""

import os
from pathlib import Path

import pytest

from casync_updater.cycle.extract.writeback import Writeback


def test_large_amounts_are_synced_beside_the_build(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        with Writeback(root) as writeback:
            for _ in range(64):
                writeback.wrote(1 << 20)
    finally:
        os.close(root)


def test_what_did_not_reach_the_disk_ends_the_build() -> None:
    """The kernel tells such an error once to each descriptor: a later sync would succeed."""
    reading, writing = os.pipe()
    os.close(writing)
    os.close(reading)
    with pytest.raises(OSError, match="Bad file descriptor"), Writeback(reading) as writeback:
        writeback.wrote(1 << 30)


def test_an_error_of_the_build_itself_goes_before() -> None:
    writeback = Writeback(-1)

    def build() -> None:
        with writeback:
            writeback.wrote(1 << 30)
            raise KeyError

    with pytest.raises(KeyError):
        build()

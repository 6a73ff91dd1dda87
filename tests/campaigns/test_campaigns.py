"""The short forms of the campaigns: seeded, the same each time, under two minutes together."""

import os
import random
import shutil
from pathlib import Path

import pytest

from campaigns import carry, errors, kill, power, server, space
from campaigns.world import BrokenPromiseError

mounting = [
    pytest.mark.system,
    # Root in a container mostly has no loop devices.
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.access("/dev/loop-control", os.W_OK),
        reason="mounts file systems by loop devices",
    ),
]
recording = [
    *mounting,
    pytest.mark.skipif(
        shutil.which("qemu-storage-daemon") is None, reason="qemu-system-common is not installed"
    ),
]


@pytest.mark.parametrize("scenario", kill.SCENARIOS)
def test_killed_at_named_steps(tmp_path: Path, scenario: str) -> None:
    survived = list(kill.by_name(tmp_path / "world", random.Random(3), scenario, share=0.02))
    assert any("not reached" not in line for line in survived)


def test_killed_at_random_instants(tmp_path: Path) -> None:
    assert kill.randomly(tmp_path / "world", random.Random(4), 8)


def test_a_server_that_fails(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    assert server.campaign(tmp_path / "world", random.Random(5), 2)


def test_a_drive_that_is_carried_around(tmp_path: Path) -> None:
    lines = carry.campaign(tmp_path / "world", random.Random(2), 12)
    assert sum("updated to" in line for line in lines) >= 2


@pytest.mark.parametrize("marks", [pytest.param(None, marks=mounting)])
def test_full_disks(tmp_path: Path, marks: None) -> None:
    outcomes = space.campaign(tmp_path, random.Random(6), 6)
    assert any("waited" in outcome for outcome in outcomes)


@pytest.mark.parametrize("marks", [pytest.param(None, marks=mounting)])
def test_disks_that_fail(tmp_path: Path, marks: None) -> None:
    pytest.importorskip("pyfuse3")
    outcomes = errors.campaign(tmp_path, random.Random(8), 15)
    assert any("waited" in outcome for outcome in outcomes)


@pytest.mark.parametrize("syncs", [pytest.param(True, marks=recording)])
def test_power_cuts(tmp_path: Path, syncs: bool) -> None:
    assert sum(power.campaign(tmp_path, random.Random(7), 12, syncs=syncs).values()) == 12


@pytest.mark.parametrize("syncs", [pytest.param(False, marks=recording)])
def test_the_power_cuts_bite(tmp_path: Path, syncs: bool) -> None:
    """Without the client's syncs the same campaign fails."""
    with pytest.raises(BrokenPromiseError):
        power.campaign(tmp_path, random.Random(7), 12, syncs=syncs)

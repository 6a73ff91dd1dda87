"""Power cuts of a virtual machine; the short form of ``make campaign-vm``."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from campaigns.vm import VirtualCampaign
from campaigns.world import BrokenPromiseError
from system.vm import System

pytestmark = [pytest.mark.system, pytest.mark.long]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not in memory, and at a path that the machine does not clear at its start."""
    folder = Path("/var/tmp/casync-updater-test-cuts")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_power_cuts(appliance: System, folder: Path) -> None:
    campaign = VirtualCampaign(appliance, folder, random.Random(7), syncs=True)
    assert sum(campaign.run(12).values()) == 12


def test_the_power_cuts_bite(appliance: System, folder: Path) -> None:
    """Without the client's syncs the same campaign fails."""
    campaign = VirtualCampaign(appliance, folder, random.Random(7), syncs=False)
    with pytest.raises(BrokenPromiseError):
        campaign.run(24)

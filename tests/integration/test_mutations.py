"""The short form of the mutation campaign; `campaigns.mutations` tells what is promised."""

from pathlib import Path

from campaigns.mutations import Campaign


def test_mutated_sites_and_drives(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    findings = [campaign.run(number) for number in range(100)]
    assert [finding for finding in findings if finding is not None] == []
    assert set(campaign.counts) >= {0, 1, 4}, "the mutations reach nothing that decides"

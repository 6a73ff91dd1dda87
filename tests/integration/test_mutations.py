"""The short form of the mutation campaign; `campaigns.mutations` tells what is promised."""

from pathlib import Path

from campaigns.mutations import Campaign


def test_mutated_sites_and_drives(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    results = [campaign.run(number) for number in range(100)]
    assert [result for result in results if result.finding] == []
    assert {result.code for result in results} >= {0, 1, 4}, "they reach nothing that decides"

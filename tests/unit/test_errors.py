"""Errors: what a message may show of a URL."""

import pytest

from casync_updater.errors import masked


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host:8080/a@b/x.caidx", "https://host:8080/a@b/x.caidx"),
        ("https://[::1]:80/x", "https://[::1]:80/x"),
        ("https://user:pw@host/x", "https://***@host/x"),
        ("https://user:p/w@host/x", "https://***@host/x"),
        ("https://user:p?w@host/x", "https://***@host/x"),
        ("https://user@host/x?token=1", "https://***@host/x?***"),
        ("user:pw@host:/x", "***@host:/x"),
        ("/srv/a@b/x?y", "/srv/a@b/x?y"),
        ("file:///srv/a@b", "file:///srv/a@b"),
    ],
)
def test_a_masked_url_shows_no_credentials(url: str, shown: str) -> None:
    assert masked(url) == shown

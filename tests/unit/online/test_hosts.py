from pathlib import Path

import pytest

from casync_updater.errors import ConfigError
from casync_updater.model import Entry, Location, OnlineSettings
from casync_updater.online.hosts import Host, hosts_of


def entry(name: str, index: str) -> Entry:
    return Entry(name, name, 60.0, Location(index, index), None, Path("/srv") / name)


ONE = entry("one", "https://Updates.Example.org/one.caidx")
TWO = entry("two", "http://updates.example.org:8080/two.caidx")
SIX = entry("six", "http://[fd00::1]/six.caidx")
LOCAL = entry("local", "/media/local.caidx")


def test_each_host_stands_once_with_all_its_ports_and_entries() -> None:
    assert hosts_of([ONE, TWO, SIX, LOCAL], OnlineSettings(), {}) == (
        Host("updates.example.org", (443, 8080), ("one", "two")),
        Host("fd00::1", (80,), ("six",)),
    )


def test_a_host_of_the_settings_stands_for_every_remote_entry() -> None:
    settings = OnlineSettings(hosts=(("10.0.0.1", 443), ("cdn.example", 8443), ("fd00::2", 80)))
    assert hosts_of([TWO, LOCAL], settings, {})[1:] == (
        Host("10.0.0.1", (443,), ("two",)),
        Host("cdn.example", (8443,), ("two",)),
        Host("fd00::2", (80,), ("two",)),
    )


def test_nothing_is_watched_where_that_is_switched_off() -> None:
    assert hosts_of([ONE], OnlineSettings(enabled=False, hosts=(("a", 443),)), {}) == ()


def test_the_proxy_is_probed_in_place_of_the_host() -> None:
    environment = {"https_proxy": "http://me:secret@Proxy.example:3128", "HTTP_PROXY": "old:80"}
    assert hosts_of([ONE, TWO], OnlineSettings(), environment) == (
        Host("proxy.example", (3128,), ("one",), ("updates.example.org",)),
        Host("old", (80,), ("two",), ("updates.example.org",)),
    )
    both = {"ALL_PROXY": "socks5h://p"}
    assert hosts_of([ONE, TWO], OnlineSettings(), both) == (
        Host("p", (1080,), ("one", "two"), ("updates.example.org",)),
    )


@pytest.mark.parametrize(
    ("no_proxy", "excepted"),
    [
        ("*", True),
        ("example.org", True),
        (" a.example , .example.org", True),
        ("updates.example.org:443", True),
        ("updates.example.org:80", False),
        ("dates.example.org", False),
        ("10.0.0.0/8", False),
        (",", False),
    ],
)
def test_exceptions_from_the_proxy(no_proxy: str, excepted: bool) -> None:
    (host,) = hosts_of([ONE], OnlineSettings(), {"https_proxy": "p:1", "no_proxy": no_proxy})
    assert (not host.proxy_for) is excepted


def test_an_address_is_excepted_by_its_network() -> None:
    environment = {"http_proxy": "p:1", "no_proxy": "fd00::/8"}
    assert hosts_of([SIX], OnlineSettings(), environment)[0].name == "fd00::1"


def test_a_bad_proxy_is_named_without_its_password() -> None:
    with pytest.raises(ConfigError, match="https_proxy") as caught:
        hosts_of([ONE], OnlineSettings(), {"https_proxy": "http://me:secret@p:port"})
    assert "secret" not in str(caught.value)


def test_addresses_are_told_from_names() -> None:
    assert Host("fe80::1%eth0", (1,), ()).is_address
    assert not Host("fe80.example", (1,), ()).is_address

"""The detector on real interfaces: two network namespaces with a cable between them."""

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.netns import BEHIND, FAR, FAR6, Pair, Watcher, pair

pytestmark = pytest.mark.system

FLAPS = int(os.environ.get("ONLINE_FLAPS", "10"))
"""Each takes a second. The table in the documentation is of 30."""


@pytest.fixture
def world() -> Iterator[Pair]:
    with pair() as made:
        yield made


def came_first(watcher: Watcher) -> None:
    watcher.came_online(0)


@pytest.mark.parametrize(
    ("host", "away", "back"),
    [
        (FAR, "far link set uplink down", "far link set uplink up"),
        (FAR, "device link set eth0 down", "device link set eth0 up"),
        (FAR, "device addr del 10.233.0.2/24 dev eth0", "device addr add 10.233.0.2/24 dev eth0"),
        (BEHIND, "device route del default", "device route add default via 10.233.0.1"),
        (BEHIND, "device route add blackhole 10.250.0.1", "device route del blackhole 10.250.0.1"),
        (FAR6, "far link set uplink down", "far link set uplink up"),
    ],
)
def test_what_the_kernel_knows_is_believed_at_once_and_a_return_is_one_return(
    world: Pair, host: str, away: str, back: str
) -> None:
    def do(command: str) -> float:
        who, _, arguments = command.partition(" ")
        now = time.monotonic()
        getattr(world, who).ip(arguments)
        return now

    with Watcher(world.device, host) as watcher:
        came_first(watcher)
        # The kernel may tell of a pulled cable a second late (its linkwatch is that lazy).
        assert watcher.said(f"{host}: offline (no path)", do(away)) < 1.5
        assert watcher.report()[0]["interface"] is None
        assert watcher.came_online(do(back)) < 2.0
        time.sleep(0.5)
        assert len(watcher.returns()) == 2
        assert watcher.report()[0]["state"] == "online"


def test_where_icmp_is_filtered_a_tcp_connect_answers_and_is_remembered(world: Pair) -> None:
    world.far.run("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1")
    with world.far.service("tcp", FAR, "80"), Watcher(world.device, FAR) as watcher:
        came_first(watcher)
        assert watcher.report()[0]["method"] == "tcp"
        world.unplug()
        watcher.said("offline", watcher.returns()[-1])
        # The method that worked goes first: no time is lost with a ping that nobody answers.
        now = time.monotonic()
        world.plug()
        assert watcher.came_online(now) < 1.0


NOBODY = "--reuid 65534 --regid 65534 --clear-groups"


@pytest.mark.parametrize(
    ("rights", "groups", "method", "icmp"),
    [
        ("--bounding-set -all,+net_raw --inh-caps -all,+net_raw --ambient-caps +net_raw",
         "1 0", "icmp", "raw"),
        ("--bounding-set -all --inh-caps -all", "0 2147483647", "icmp", "unprivileged"),
        ("--bounding-set -all --inh-caps -all", "1 0", "tcp", "not permitted"),
    ],
)  # fmt: skip
def test_it_works_with_the_rights_it_has_and_says_which(
    world: Pair, rights: str, groups: str, method: str, icmp: str
) -> None:
    world.device.run("sysctl", "-qw", f"net.ipv4.ping_group_range={groups}")
    prelude = f'set -- setpriv {rights} {NOBODY} "$@"'
    with (
        world.far.service("tcp", FAR, "80"),
        Watcher(world.device, FAR, prelude=prelude) as watcher,
    ):
        came_first(watcher)
        (status,) = watcher.report()
        assert (status["method"], status["icmp"]) == (method, icmp)


def test_a_host_whose_method_changes_is_not_declared_dead(world: Pair) -> None:
    with (
        world.far.service("tcp", FAR, "80"),
        Watcher(world.device, FAR, interval_online=0.3) as watcher,
    ):
        came_first(watcher)
        assert watcher.report()[0]["method"] == "icmp"
        world.far.run("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1")
        watcher.wait(lambda _: watcher.report()[0]["method"] == "tcp", 5)
        assert len(watcher.returns()) == 1


def test_a_host_that_drops_everything_is_offline_until_it_answers(world: Pair) -> None:
    world.far.ip("route add blackhole 10.233.0.2")
    with Watcher(world.device, FAR, interval_offline=0.5) as watcher:
        watcher.finding("does not answer")
        assert watcher.returns() == []
        now = time.monotonic()
        world.far.ip("route del blackhole 10.233.0.2")
        # Nothing on this side tells: the next probe has to find out.
        assert watcher.came_online(now, timeout=8) < 8


def test_a_dead_uplink_behind_a_live_link_is_noticed_by_patience(world: Pair) -> None:
    with Watcher(world.device, FAR, interval_online=0.3, method="tcp") as watcher:
        with world.far.service("tcp", FAR, "80"):
            came_first(watcher)
            now = time.monotonic()
        assert watcher.said("offline (refuses connections)", now, timeout=15) > 5


@pytest.mark.parametrize(
    ("answer", "finding"),
    [("silent", "name service does not answer"), ("nxdomain", "unknown name")],
)
def test_a_name_service_that_fails_is_a_state_of_its_own(
    world: Pair, tmp_path: Path, answer: str, finding: str
) -> None:
    resolver = tmp_path / "resolv.conf"
    resolver.write_text(f"nameserver {FAR}\n")
    plain = tmp_path / "nsswitch.conf"
    plain.write_text("hosts: files dns\n")
    prelude = f"mount --bind {resolver} /etc/resolv.conf && mount --bind {plain} /etc/nsswitch.conf"
    with Watcher(world.device, "updates.example", prelude=prelude, interval_offline=0.5) as watcher:
        with world.far.service("dns", FAR, answer):
            watcher.finding(finding)
            children = Path(f"/proc/{watcher.pid}/task/{watcher.pid}/children")
            for _ in range(20):
                assert len(children.read_text().split()) <= 1
                time.sleep(0.05)
        with world.far.service("dns", FAR, FAR):
            watcher.came_online(0, timeout=10)
            (status,) = watcher.report()
            assert status["address"] == FAR
            now = time.monotonic()
            world.unplug()
            watcher.said("offline (no path)", now)
            now = time.monotonic()
            world.plug()
            assert watcher.came_online(now) < 2.0


def test_ipv6_alone_survives_the_search_for_duplicate_addresses(world: Pair) -> None:
    world.device.ip("addr flush dev eth0", "addr add fd00:233::2/64 dev eth0")
    with Watcher(world.device, FAR6) as watcher:
        came_first(watcher)
        world.device.ip("link set eth0 down")
        watcher.said("offline (no path)", watcher.returns()[-1])
        world.device.ip("link set eth0 up", "addr replace fd00:233::2/64 dev eth0")
        came = watcher.came_online(watcher.returns()[-1] + 0.001, timeout=6)
        usable = watcher.said("address fd00:233::2 added", watcher.returns()[0])
        assert came + 0.001 - usable < 0.5


def test_a_path_by_another_interface_is_used_and_no_return(world: Pair) -> None:
    world.device.ip(f"link add wlan0 type veth peer name backup netns {world.far.name}")
    world.far.ip("addr add 10.234.0.1/24 dev backup", "link set backup up")
    world.device.ip("addr add 10.234.0.2/24 dev wlan0", "link set wlan0 up")
    with Watcher(world.device, BEHIND) as watcher:
        came_first(watcher)
        assert watcher.report()[0]["interface"] == "eth0"
        world.device.ip("route replace default via 10.234.0.1")
        watcher.wait(lambda _: watcher.report()[0]["interface"] == "wlan0", 3)
        world.device.ip("link set eth0 down", "link set eth0 name eth7")
        watcher.said("eth7: interface renamed from eth0", 0)
        assert watcher.report()[0]["state"] == "online"
        assert len(watcher.returns()) == 1
        world.device.ip("link del wlan0")
        watcher.said("offline (no path)", 0)


def test_a_route_without_gateway_is_a_path(world: Pair) -> None:
    world.device.ip("route replace default dev eth0")
    world.far.ip("addr add 10.99.0.1/32 dev lo")
    with Watcher(world.device, "10.99.0.1") as watcher:
        came_first(watcher)


def test_flapping_is_no_storm_and_loses_no_return(world: Pair) -> None:
    with Watcher(world.device, FAR) as watcher:
        came_first(watcher)
        begin = time.monotonic()
        for number in range(20):
            world.device.ip("link set eth0 down")
            time.sleep(max(0.0, begin + 0.5 * number + 0.25 - time.monotonic()))
            last = time.monotonic()
            world.device.ip("link set eth0 up")
            time.sleep(max(0.0, begin + 0.5 * number + 0.5 - time.monotonic()))
        assert watcher.came_online(last) < 2.0
        time.sleep(1.0)
        returns = watcher.returns()
        assert len([at for at in returns if at >= last]) == 1
        assert len(returns) <= 1 + 3
        assert watcher.report()[0]["state"] == "online"


def test_from_a_usable_interface_to_the_announcement(world: Pair) -> None:
    took = []
    with Watcher(world.device, FAR) as watcher:
        came_first(watcher)
        for _ in range(FLAPS):
            time.sleep(0.55)  # slower than flapping
            now = time.monotonic()
            world.device.ip("link set eth0 down")
            watcher.said("offline (no path)", now)
            time.sleep(0.5)
            now = time.monotonic()
            world.device.ip("link set eth0 up")
            took.append(watcher.came_online(now))
        assert len(watcher.returns()) == 1 + FLAPS
    took.sort()
    median, late = statistics.median(took), took[int(0.95 * FLAPS)]
    print(f"\n{FLAPS} flaps: median {median:.3f} s, p95 {late:.3f} s, max {took[-1]:.3f} s")
    assert median < 0.5
    assert took[-1] < 2.0

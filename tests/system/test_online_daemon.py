"""The daemon with an update waiting behind a network that comes and goes."""

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.netns import BEHIND, FAR, FAR6
from support.online_lab import Daemon, Lab, lab, until

pytestmark = pytest.mark.system

FLAPS = int(os.environ.get("ONLINE_FLAPS", "2"))
"""Of each kind in the table; `make online-table` has more."""

IDLE_SECONDS = float(os.environ.get("ONLINE_IDLE_SECONDS", "10"))


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Lab]:
    with lab(tmp_path) as made:
        yield made


def nothing_starts(daemon: Daemon, since: float, seconds: float = 0.7) -> None:
    time.sleep(seconds)
    assert daemon.reasons(since) == [], "a cycle without connectivity"


def one_return(daemon: Daemon, version: str, since: float, timeout: float = 10.0) -> None:
    """The update arrives by exactly one cycle, for the reason that the host is back."""
    daemon.wait_for(version, timeout)
    daemon.quiet()
    time.sleep(1.0)
    assert daemon.reasons(since) == ["online"]
    assert len(daemon.lab.requests(since)) == 1
    assert any("tree: updated to" in line.text and line.text.endswith("(online)")
               for line in daemon.ends(since))  # fmt: skip
    assert daemon.host()["state"] == "online"
    (entry,) = daemon.live()["entries"].values()
    assert (entry["state"], entry["reason"]) == ("idle", "online")


WAYS = {
    "cable": (FAR, "far link set uplink down", "far link set uplink up"),
    "link": (FAR, "device link set eth0 down", "device link set eth0 up"),
    "address": (
        FAR,
        "device addr del 10.233.0.2/24 dev eth0",
        "device addr add 10.233.0.2/24 dev eth0",
    ),
    "route": (BEHIND, "device route del default", "device route add default via 10.233.0.1"),
    "unreachable": (
        BEHIND,
        "device route add unreachable 10.250.0.1",
        "device route del unreachable 10.250.0.1",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_update_arrives_with_the_network(here: Lab, way: str) -> None:
    host, away, back = WAYS[way]
    with here.daemon(host) as daemon:
        daemon.settled("1")
        here.do(away)
        daemon.is_("offline")
        gone = time.monotonic()
        here.publish("2")
        nothing_starts(daemon, gone)
        one_return(daemon, "2", here.do(back))
        shown = daemon.command("status").stdout
        assert f"host {host}: online since " in shown
        assert "started by: online" in shown


def test_ipv6_alone(here: Lab) -> None:
    here.world.device.ip("addr flush dev eth0", "addr add fd00:233::2/64 dev eth0 nodad")
    with here.daemon(FAR6) as daemon:
        daemon.settled("1")
        here.do("device link set eth0 down")
        daemon.is_("offline")
        here.publish("2")
        here.do("device link set eth0 up")
        # This time the kernel looks for duplicates, which takes a second or two.
        back = here.do("device addr replace fd00:233::2/64 dev eth0")
        one_return(daemon, "2", back)


def firewall(here: Lab, rule: str) -> None:
    here.world.far.run("nft", "add table inet wall")
    here.world.far.run("nft", "add chain inet wall in { type filter hook input priority 0; }")
    here.world.far.run("nft", f"add rule inet wall in {rule}")


def open_up(here: Lab) -> None:
    here.world.far.run("nft", "delete table inet wall")


@pytest.fixture
def nft() -> None:
    if shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
        pytest.skip("needs nftables")


@pytest.mark.usefixtures("nft")
def test_icmp_alone_is_filtered(here: Lab) -> None:
    firewall(here, "meta l4proto icmp drop")
    with here.daemon(FAR) as daemon:
        daemon.settled("1")
        assert daemon.host()["method"] == "tcp"
        here.world.unplug()
        daemon.is_("offline")
        here.publish("2")
        back = time.monotonic()
        here.world.plug()
        one_return(daemon, "2", back)


@pytest.mark.usefixtures("nft")
def test_everything_is_filtered_behind_a_live_link(here: Lab) -> None:
    with here.daemon(FAR, interval_online=0.3, interval_offline=0.5) as daemon:
        daemon.settled("1")
        firewall(here, "drop")
        # Four probes of five seconds: silence is believed later than the kernel's word.
        daemon.is_("offline", timeout=30)
        gone = time.monotonic()
        here.publish("2")
        nothing_starts(daemon, gone)
        back = time.monotonic()
        open_up(here)
        one_return(daemon, "2", back)


def test_a_dead_name_service(here: Lab, tmp_path: Path) -> None:
    resolver, switch = tmp_path / "resolv.conf", tmp_path / "nsswitch.conf"
    resolver.write_text(f"nameserver {FAR}\n")
    switch.write_text("hosts: files dns\n")
    prelude = (
        f"mount --bind {resolver} /etc/resolv.conf && mount --bind {switch} /etc/nsswitch.conf"
    )
    world = here.world
    with here.daemon("updates.example", prelude=prelude, interval_offline=0.5) as daemon:
        with world.far.service("dns", FAR, FAR):
            daemon.settled("1")
            world.unplug()
            daemon.is_("offline")
        here.publish("2")
        with world.far.service("dns", FAR, "silent"):
            plugged = time.monotonic()
            world.plug()
            until(lambda: daemon.host()["finding"] == "name service does not answer", "the finding")
            nothing_starts(daemon, plugged)
        with world.far.service("dns", FAR, FAR):
            one_return(daemon, "2", plugged)


def test_flapping_is_no_storm_and_loses_nothing(here: Lab) -> None:
    with here.daemon(FAR) as daemon:
        daemon.settled("1")
        begin = time.monotonic()
        ups = []
        here.do("device link set eth0 down")
        here.publish("2")
        begin = time.monotonic()
        for number in range(20):
            here.do("device link set eth0 down")
            down = time.monotonic()
            time.sleep(max(0.0, begin + 0.5 * number + 0.25 - time.monotonic()))
            up = here.do("device link set eth0 up")
            ups.append((up, down))
            time.sleep(max(0.0, begin + 0.5 * number + 0.5 - time.monotonic()))
        daemon.wait_for("2", timeout=5)
        daemon.quiet(40)
        time.sleep(1.0)
        assert daemon.installed() == "2"
        starts = daemon.cycles(begin)
        assert {reason for _, reason in starts} == {"online"}
        assert len(starts) <= 4
        for at, _ in starts:
            last_up = max(up for up, _ in ups if up <= at + 0.05)
            downs = [down for _, down in ups if down <= at - 0.05]
            assert last_up > max(downs, default=0.0), "a cycle without connectivity"
        assert daemon.host()["state"] == "online"


def test_an_interface_goes_and_another_one_appears_and_is_renamed(here: Lab) -> None:
    device, far = here.world.device, here.world.far
    with here.daemon(FAR) as daemon:
        daemon.settled("1")
        device.ip("link del eth0")
        daemon.is_("offline")
        gone = time.monotonic()
        here.publish("2")
        nothing_starts(daemon, gone)
        device.ip(f"link add usb0 type veth peer name uplink netns {far.name}")
        far.ip("addr add 10.233.0.1/24 dev uplink", "link set uplink up")
        device.ip("link set usb0 name lan0", "addr add 10.233.0.2/24 dev lan0")
        nothing_starts(daemon, gone)
        one_return(daemon, "2", here.do("device link set lan0 up"))
        assert daemon.host()["interface"] == "lan0"
        assert "lan0: interface renamed from usb0" in daemon.log


def test_a_route_by_another_interface_is_no_return(here: Lab) -> None:
    device, far = here.world.device, here.world.far
    device.ip(f"link add wlan0 type veth peer name backup netns {far.name}")
    far.ip("addr add 10.234.0.1/24 dev backup", "link set backup up")
    device.ip("addr add 10.234.0.2/24 dev wlan0", "link set wlan0 up")
    with here.daemon(BEHIND) as daemon:
        daemon.settled("1")
        assert daemon.host()["interface"] == "eth0"
        moved = here.do("device route replace default via 10.234.0.1")
        until(lambda: daemon.host()["interface"] == "wlan0", "the other interface")
        here.do("device link set eth0 down")
        nothing_starts(daemon, moved, 1.5)
        assert daemon.host()["state"] == "online"
        here.do("device link set wlan0 down")
        daemon.is_("offline")
        here.publish("2")
        back = here.do("device link set eth0 up")
        here.do("device route add default via 10.233.0.1")
        one_return(daemon, "2", back)
        assert daemon.host()["interface"] == "eth0"


@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="needs /dev/net/tun")
def test_a_vpn_comes_up(here: Lab) -> None:
    """A tunnel has no carrier, no neighbours, and a default route without a gateway."""
    device, far, inside = here.world.device, here.world.far, "10.9.0.1"
    device.ip("route del default")
    far.ip(f"addr add {inside}/32 dev lo")

    @contextlib.contextmanager
    def vpn() -> Iterator[float]:
        with device.service("tun", "vpn0", "10.233.0.2", FAR):
            device.ip("addr add 10.8.0.2/32 dev vpn0", "link set vpn0 up")
            yield here.do("device route add default dev vpn0")

    with far.service("tun", "vpn0", FAR, "10.233.0.2"), here.daemon(inside) as daemon:
        far.ip("addr add 10.8.0.1/32 dev vpn0", "link set vpn0 up", "route add 10.8.0.2 dev vpn0")
        until(daemon.ends, "the first cycle")
        daemon.is_("offline")
        with vpn() as up:
            one_return(daemon, "1", up)
            assert daemon.host()["interface"] == "vpn0"
        daemon.is_("offline")
        gone = time.monotonic()
        here.publish("2")
        nothing_starts(daemon, gone)
        with vpn() as up:
            one_return(daemon, "2", up)


def test_an_interval_cycle_tries_once_and_takes_the_drive(here: Lab, tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    entry = {
        "interval": 7000,
        "backupIndex": str(drive / "tree.caidx"),
        "backupStore": str(drive / "store.castr"),
    }
    with here.daemon(FAR, entry=entry) as daemon:
        daemon.settled("1")
        here.world.unplug()
        daemon.is_("offline")
        gone = time.monotonic()
        here.publish("2")
        shutil.copytree(here.site.root, drive)
        daemon.wait_for("2", timeout=20)
        daemon.quiet()
        start, reason = daemon.cycles(gone)[0]
        assert reason == "interval"
        assert daemon.ends(start)[0].at - start < 8
        assert f"seems to be out of reach: one attempt of 5 seconds, then {drive}" in daemon.log
        (status,) = daemon.appliance.run("status", "--json").json["entries"]
        assert status["installed"]["source"].startswith(str(drive))
        here.publish("3")
        here.world.plug()
        daemon.wait_for("3", timeout=5)


def test_a_captive_portal_is_named_and_waited_out(here: Lab) -> None:
    with here.daemon(FAR, interval_offline=1.0) as daemon:
        daemon.settled("1")
        here.publish("2")
        here.portal(on=True)
        here.do("device link set eth0 down")
        daemon.is_("offline")
        back = here.do("device link set eth0 up")
        until(lambda: daemon.ends(back), "a cycle that meets the portal")
        (line,) = (end.text for end in daemon.ends(back)[:1])
        assert line.startswith("warning: tree: ")
        assert "behind a captive portal?" in line
        (entry,) = daemon.appliance.run("status", "--json").json["entries"]
        assert "behind a captive portal?" in entry["lastError"]
        assert entry["refused"] is None
        done = daemon.command("update")
        assert done.returncode == 3
        assert "behind a captive portal?" in done.stderr
        until(lambda: len(daemon.ends(back)) >= 3, "two more cycles, later and later")
        assert daemon.host()["state"] == "online"
        here.portal(on=False)
        daemon.wait_for("2", timeout=15)
        assert set(daemon.reasons(back)) == {"online"}


def test_reload_takes_the_settings(here: Lab) -> None:
    with here.daemon(FAR) as daemon:
        daemon.settled("1")
        daemon.appliance.settings("[online]\nenabled = no\n")
        daemon.process.send_signal(1)
        until(lambda: daemon.live().get("online", 1) is None, "the end of watching")
        off = time.monotonic()
        here.do("device link set eth0 down")
        here.do("device link set eth0 up")
        here.publish("2")
        nothing_starts(daemon, off, 1.5)
        daemon.appliance.settings("[online]\nmin_age = 0\nsplay = 0\n")
        daemon.process.send_signal(1)
        daemon.wait_for("2")
        assert daemon.reasons(off) == ["online"]


def test_table_of_times_from_a_usable_interface_to_the_first_request(here: Lab) -> None:
    version = 1
    rows = {}
    # Measured is this program, not what else runs on the machine: it goes first, where allowed.
    first = 'chrt --rr 10 true 2>&- && set -- chrt --rr 10 "$@"; true'
    with here.daemon(BEHIND, prelude=first) as daemon:
        daemon.settled("1")
        for way in ("cable", "link", "address", "route"):
            _, away, back = WAYS[way]
            rows[way] = took = []
            for _ in range(FLAPS):
                begin = time.monotonic()
                here.do(away)
                version += 1
                here.publish(str(version))
                daemon.is_("offline")
                time.sleep(max(0.0, begin + 0.9 - time.monotonic()))
                if way in ("link", "address"):  # the kernel drops the route with them
                    here.do(back)
                    now = here.do("device route replace default via 10.233.0.1")
                else:
                    now = here.do(back)
                daemon.wait_for(str(version))
                took.append(here.requests(now)[0] - now)
                daemon.quiet()
        flaps = [time for took in rows.values() for time in took]
        reasons = daemon.reasons()
    rows["all"] = flaps
    print("\n\nseconds from a usable interface to the first request at the server")
    print(f"{'':10}{'flaps':>6}{'median':>8}{'p95':>8}{'max':>8}")
    for name, took in rows.items():
        late = sorted(took)[min(len(took) - 1, int(0.95 * len(took)))]
        print(f"{name:10}{len(took):6}{statistics.median(took):8.3f}{late:8.3f}{max(took):8.3f}")
    assert reasons == ["start"] + ["online"] * (1 + len(flaps))
    assert statistics.median(flaps) < 0.5
    assert max(flaps) < 2.0


def test_idle_cost(here: Lab) -> None:
    """Wake-ups of the daemon's process, by the kernel's count, and its resident memory."""

    def status(daemon: Daemon, name: str) -> int:
        text = Path(f"/proc/{daemon.process.pid}/status").read_text()
        return int(text.partition(f"{name}:")[2].split()[0])

    with here.daemon(FAR) as daemon:
        daemon.settled("1")
        time.sleep(1.5)
        before = status(daemon, "voluntary_ctxt_switches")
        time.sleep(IDLE_SECONDS)
        between = status(daemon, "voluntary_ctxt_switches") - before
        resident = status(daemon, "VmRSS")
    with here.daemon(FAR, interval_online=1.0) as daemon:
        time.sleep(3.0)
        before = status(daemon, "voluntary_ctxt_switches")
        time.sleep(IDLE_SECONDS)
        often = (status(daemon, "voluntary_ctxt_switches") - before) / IDLE_SECONDS
    print(f"\n\nidle daemon: {between} wake-ups in {IDLE_SECONDS:.0f} s between probes,")
    print(
        f"{often:.1f} for each probe: {12 * often:.0f} an hour at 300 s, {resident / 1024:.1f} MB"
    )
    assert between == 0
    assert often < 8
    assert resident < 24_000

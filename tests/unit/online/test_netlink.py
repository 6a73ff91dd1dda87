"""Messages as the kernel writes them, and as it never should."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casync_updater.online.netlink import (
    Link,
    Monitor,
    Network,
    messages,
    path_to,
    read_network,
)

UP, RUNNING, LOOPBACK = 0x1, 0x40, 0x8


def attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + b"\0" * (-length % 4)


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def link(index: int, name: str, flags: int, *, kind: int = 16, family: int = 0) -> bytes:
    body = struct.pack("=BxHiII", family, 1, index, flags, 0)
    return message(kind, body + attribute(3, name.encode() + b"\0"))


def address(index: int, text: str, *, kind: int = 20, flags: int = 0, peer: str = "") -> bytes:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    raw = socket.inet_pton(family, text)
    body = struct.pack("=BBBBI", family, 24, 0, 0, index)
    far = socket.inet_pton(family, peer) if peer else raw
    body += attribute(1, far) + attribute(8, struct.pack("=I", flags))
    if peer or family == socket.AF_INET:
        body += attribute(2, raw)
    return message(kind, body)


def route(
    kind: int, index: int, *, to: str = "", via: str = "", table: int = 254, what: int = 1
) -> bytes:
    family = socket.AF_INET6 if ":" in to + via else socket.AF_INET
    body = struct.pack("=BBBBBBBBI", family, 24 if to else 0, 0, 0, table, 3, 0, what, 0)
    body += attribute(15, struct.pack("=I", table)) + attribute(4, struct.pack("=i", index))
    if to:
        body += attribute(1, socket.inet_pton(family, to))
    if via:
        body += attribute(5, socket.inet_pton(family, via))
    return message(kind, body)


def known() -> Network:
    network = Network()
    network.apply(link(1, "lo", UP | RUNNING | LOOPBACK) + link(2, "eth0", UP | RUNNING))
    network.apply(address(1, "127.0.0.1"))
    return network


def test_a_cable_is_pulled_and_plugged() -> None:
    network = known()
    changes = network.apply(link(2, "eth0", UP))
    assert changes.said == ("eth0: link down",)
    assert changes.down == {2}
    assert network.apply(link(2, "eth0", UP)).said == ()
    back = network.apply(link(2, "eth0", UP | RUNNING))
    assert (back.said, back.down) == (("eth0: link up",), frozenset())


def test_down_and_up_within_one_read_is_still_a_loss() -> None:
    changes = known().apply(link(2, "eth0", UP) + link(2, "eth0", UP | RUNNING))
    assert changes.said == ("eth0: link down", "eth0: link up")
    assert changes.down == {2}


def test_interfaces_come_and_go_and_are_renamed() -> None:
    network = known()
    assert network.apply(link(3, "usb0", UP)).said == ("usb0: interface added, link down",)
    assert network.apply(link(3, "wwan0", UP)).said == ("wwan0: interface renamed from usb0",)
    network.apply(address(2, "10.0.0.5"))
    gone = network.apply(link(2, "eth0", UP, kind=17))
    assert gone.said == ("eth0: interface removed",)
    assert gone.down == {2}
    assert not network.usable()


def test_a_bridge_telling_of_its_port_is_no_link_message() -> None:
    network = known()
    removed = link(2, "eth0", 0, kind=17, family=socket.AF_BRIDGE)
    assert not network.apply(removed)
    assert network.links[2].running


def test_addresses_are_news_once() -> None:
    network = known()
    assert not network.usable()
    assert network.apply(address(2, "10.0.0.5")).said == ("eth0: address 10.0.0.5 added",)
    assert network.usable()
    assert not network.apply(address(2, "10.0.0.5"))
    removed = network.apply(address(2, "10.0.0.5", kind=21))
    assert removed.said == ("eth0: address 10.0.0.5 removed",)
    assert not network.apply(address(2, "10.0.0.5", kind=21))


def test_an_ipv6_address_counts_when_no_duplicate_was_found() -> None:
    network = known()
    tentative = network.apply(address(2, "fd00::5", flags=0x40))
    assert tentative.said == ("eth0: address fd00::5 not usable yet",)
    assert not network.usable()
    assert network.apply(address(2, "fd00::5")).said == ("eth0: address fd00::5 added",)
    assert network.usable()


@pytest.mark.parametrize("text", ["fe80::1", "169.254.3.4"])
def test_link_local_addresses_lead_nowhere(text: str) -> None:
    network = known()
    network.apply(address(2, text))
    assert not network.usable()


def test_on_a_point_to_point_link_the_own_address_counts() -> None:
    said = known().apply(address(2, "10.0.0.5", peer="10.0.0.6")).said
    assert said == ("eth0: address 10.0.0.5 added",)


def test_routes_are_told_as_people_write_them() -> None:
    network = known()
    assert network.apply(route(24, 2, via="10.0.0.1")).said == (
        "eth0: route default via 10.0.0.1 added",
    )
    assert network.apply(route(25, 2, to="10.1.0.0")).said == ("eth0: route 10.1.0.0/24 removed",)
    assert network.apply(route(24, 1, to="10.2.0.0", what=6)).said == (
        "lo: route 10.2.0.0/24 blackhole added",
    )
    assert not network.apply(route(24, 2, to="10.0.0.5", table=255))
    assert not network.apply(route(24, 2, to="fe80::"))
    assert network.apply(message(32, b"")).said == ("routing rule added",)


def test_a_new_look_tells_what_was_missed() -> None:
    network = known()
    network.apply(address(2, "10.0.0.5"))
    now = Network({1: network.links[1], 2: Link("eth0", False), 7: Link("wg0", True)})
    now.addresses[7, "10.7.0.1"] = True
    changes = network.replaced_by(now)
    assert set(changes.said) == {
        "eth0: link down",
        "wg0: interface added, link up",
        "eth0: address 10.0.0.5 removed",
        "lo: address 127.0.0.1 removed",
        "wg0: address 10.7.0.1 added",
    }
    assert changes.down == {2}
    assert network == now


@given(st.binary(max_size=200))
def test_any_bytes_are_survived(data: bytes) -> None:
    Network().apply(data)


@given(st.sampled_from([16, 17, 20, 21, 24, 25]), st.binary(max_size=80))
def test_any_body_is_survived(kind: int, body: bytes) -> None:
    known().apply(message(kind, body))


def test_a_torn_message_is_left_out() -> None:
    whole = link(2, "eth0", UP)
    assert len(list(messages(whole + whole[:-1]))) == 1
    assert list(messages(struct.pack("=IHHII", 0, 16, 0, 0, 0))) == []


def test_the_kernel_of_this_machine_answers() -> None:
    network = read_network()
    assert any(link.loopback for link in network.links.values())
    monitor = Monitor()
    assert monitor.network == network
    assert not monitor.read()
    monitor.close()


@pytest.mark.parametrize("text", ["127.0.0.1", "127.8.8.8", "::1"])
def test_loopback_always_has_a_path(text: str) -> None:
    path = path_to(text)
    assert path is not None
    assert path.interface == "lo"


def test_what_nobody_routes_has_no_path() -> None:
    assert path_to("fe80::1%nosuch0") is None
    with pytest.raises(ValueError, match=r"name\.example"):
        path_to("name.example")


def test_messages_that_the_kernel_did_not_send_are_ignored() -> None:
    monitor = Monitor()
    before = dict(monitor.network.links)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as liar:
        liar.bind((0, 0))
        try:
            liar.sendto(link(1, "evil", 0), (monitor._socket.getsockname()[0], 0))
        except PermissionError:
            pytest.skip("this kernel does not even deliver it")
    assert not monitor.read()
    assert monitor.network.links == before
    monitor.close()

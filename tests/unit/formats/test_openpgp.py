"""The shell of OpenPGP, without a program: armor, keyrings, joined messages."""

import base64
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casync_updater.errors import ContentError
from casync_updater.formats.openpgp import (
    dearmor,
    join_clearsigned,
    key_expiry,
    split_clearsigned,
)

KIND = "PUBLIC KEY BLOCK"
BEGIN = b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n"
END = b"-----END PGP PUBLIC KEY BLOCK-----\n"
DAY = 86400


def packet(tag: int, body: bytes) -> bytes:
    return bytes([0xC0 | tag, 255]) + len(body).to_bytes(4, "big") + body


def public_key(created: int, tag: int = 6) -> bytes:
    return packet(tag, b"\x04" + created.to_bytes(4, "big") + b"\x16" + bytes(40))


def fingerprint(key: bytes) -> str:
    (name,) = key_expiry(key)
    return name


def sub(kind: int, value: bytes) -> bytes:
    return bytes([len(value) + 1, kind]) + value


def self_signature(kind: int, created: int, lifetime: int | None, issuer: str) -> bytes:
    hashed = sub(2, created.to_bytes(4, "big")) + sub(33, b"\x04" + bytes.fromhex(issuer))
    if lifetime is not None:
        hashed += sub(9, lifetime.to_bytes(4, "big"))
    areas = len(hashed).to_bytes(2, "big") + hashed + b"\0\0"
    return packet(2, bytes([4, kind, 22, 8]) + areas + b"\0\0")


@pytest.mark.parametrize(
    "blocks",
    [
        BEGIN + b"\naGVsbG8=\n=R/WK\n" + END,  # as `gpg --enarmor` writes it
        BEGIN + b"\naGVsbG8=\n" + END,
        BEGIN + b"Comment: x\n\naGVs\nbG8=\n" + END,
        b"\n" + BEGIN + b"\naGVs\n" + END + b"\n" + BEGIN + b"\nbG8=\n" + END,
    ],
)
def test_armor(blocks: bytes) -> None:
    assert dearmor(blocks, KIND) == b"hello"


@pytest.mark.parametrize(
    "text",
    [
        b"junk\n" + BEGIN + b"\naGVs\n" + END,
        BEGIN + b"\naGVs\n" + END + b"junk",
        BEGIN + b"\naGVs\n",
        BEGIN + b"aGVs\n" + END,
        BEGIN + b"\n" + END,
        BEGIN + b"\naGV\n" + END,
        BEGIN + b"\naG=s\n" + END,
        BEGIN + b"\naGVs \n" + END,
        BEGIN + b"\naGVs\n=AAAA\n" + END,
        BEGIN + b"\naGVs\n=AAAA\naGVs\n" + END,
        BEGIN + b"\naGVs\n\n" + END,
        BEGIN + b"Serial: 9\n\naGVs\n" + END,
        BEGIN + BEGIN + b"\naGVs\n" + END,
        BEGIN.replace(b"PUBLIC", b"PRIVATE") + b"\naGVs\n" + END.replace(b"PUBLIC", b"PRIVATE"),
    ],
)
def test_armor_that_is_odd(text: bytes) -> None:
    with pytest.raises(ContentError):
        dearmor(text, KIND)


def test_the_newest_signature_of_its_own_says_when_a_key_expires() -> None:
    key = public_key(1000)
    name = fingerprint(key)
    other = fingerprint(public_key(2000))
    user = packet(13, b"somebody")
    old = self_signature(0x13, 1000, 5 * DAY, name)
    new = self_signature(0x13, 2000, 9 * DAY, name)
    never = self_signature(0x13, 3000, None, name)
    foreign = self_signature(0x10, 4000, None, other)
    assert key_expiry(key) == {name: None}
    assert key_expiry(key + user + old + foreign) == {name: 1000 + 5 * DAY}
    for order in (old + new, new + old):
        assert key_expiry(key + user + order) == {name: 1000 + 9 * DAY}
    assert key_expiry(key + user + old + never + new) == {name: None}


def test_subkeys_have_their_own_expiry() -> None:
    key, subkey = public_key(1000), public_key(3000, tag=14)
    name = fingerprint(key)
    binding = self_signature(0x18, 3000, DAY, name)
    expiry = key_expiry(key + self_signature(0x1F, 1000, None, name) + subkey + binding)
    assert sorted(expiry.values(), key=str) == [3000 + DAY, None]
    assert expiry[name] is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Format: 1",
        public_key(1)[:-1],
        packet(13, b"somebody"),
        packet(5, b"\x04" + bytes(50)),
        packet(6, b"\x03" + bytes(50)),
        packet(6, b""),
        public_key(1) + packet(2, b"\x04"),
        public_key(1) + packet(2, b"\x04\x13\x16\x08\x00\x05\x09" + bytes(9)),
        bytes([0xC6, 0xE0]) + bytes(600),
        bytes([0x9B]) + bytes(600),
    ],
)
def test_what_is_no_keyring(data: bytes) -> None:
    with pytest.raises(ContentError):
        key_expiry(data)


def message(text: bytes, signature: bytes) -> bytes:
    encoded = base64.b64encode(packet(2, signature))
    return (
        b"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n"
        + text
        + b"-----BEGIN PGP SIGNATURE-----\n\n"
        + encoded
        + b"\n-----END PGP SIGNATURE-----\n"
    )


def test_joined_messages_have_all_signatures() -> None:
    first, second = message(b"a\n- - b\n", b"1"), message(b"a\n- - b\n", b"2" * 100)
    joined = split_clearsigned(join_clearsigned([first, second]))
    assert joined is not None
    assert joined.text == b"a\n- b\n"
    assert joined.signature == packet(2, b"1") + packet(2, b"2" * 100)
    for others in ([], [first, message(b"a\n", b"2")], [b"plain\n"]):
        with pytest.raises(ContentError):
            join_clearsigned(others)


@settings(deadline=None)
@given(st.data())
def test_nothing_but_content_errors(data: st.DataObject) -> None:
    name = fingerprint(public_key(7))
    ring = public_key(7) + packet(13, b"x") + self_signature(0x13, 1, 5, name)
    for parse, whole in (
        (key_expiry, ring),
        (split_clearsigned, message(b"a\n", b"1")),
        (lambda raw: dearmor(raw, KIND), BEGIN + b"\naGVs\n" + END),
    ):
        raw = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            begin = data.draw(st.integers(0, len(raw)))
            end = data.draw(st.integers(begin, min(len(raw), begin + 8)))
            raw[begin:end] = data.draw(st.binary(max_size=6))
        with contextlib.suppress(ContentError):
            parse(bytes(raw))

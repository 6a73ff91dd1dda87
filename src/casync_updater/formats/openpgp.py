"""The outer shell of OpenPGP (RFC 4880): armor, clear-signed texts, the dates of keys.

Nothing here verifies anything: that is gpgv's part. What stands here is what gpgv leaves to its
caller or is too lenient about: it reads no armored keyrings, passes over text around a
signature, and knows no clock but the system's.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from casync_updater.errors import ContentError

_LINE_LIMIT = 16 << 10
"""GnuPG silently drops what a line has beyond 19,995 bytes."""

_SIGNATURE_LIMIT = 64 << 10
"""Bytes of armor; eight signatures with RSA 4096 are about 7,000."""

_SIGNED = b"-----BEGIN PGP SIGNED MESSAGE-----"
_BEGIN = b"-----BEGIN PGP SIGNATURE-----"
_END = b"-----END PGP SIGNATURE-----"
_MARKER = re.compile(rb"^[ \t]*-----(BEGIN|END) PGP ", re.MULTILINE)
_HASH_HEADER = re.compile(rb"Hash: [A-Za-z0-9,-]+")
_ARMOR_HEADER = re.compile(rb"(Version|Comment|MessageID|Hash|Charset): [^\x00-\x1f\x7f]*")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
_CRC = re.compile(rb"=[A-Za-z0-9+/]{4}")

_SIGNATURE, _SECRET, _PUBLIC, _SECRET_SUB, _USER, _PUBLIC_SUB = 2, 5, 6, 7, 13, 14
_CREATED, _KEY_LIFETIME, _ISSUER, _ISSUER_FINGERPRINT = 2, 9, 16, 33
_OVER_THE_KEY = frozenset({0x10, 0x11, 0x12, 0x13, 0x1F})
_OVER_A_SUBKEY = 0x18


@dataclass(frozen=True, slots=True)
class ClearSigned:
    """A clear-signed message, taken apart and not verified.

    Attributes:
        text: the signed text as GnuPG gives it back: without dash escapes and without spaces
            and tabs at the ends of lines; every line ends in a line feed.
        signature: the signature packets, without their armor.
    """

    text: bytes
    signature: bytes


def split_clearsigned(body: bytes) -> ClearSigned | None:
    """Take a clear-signed message apart; None for a text without any OpenPGP in it.

    Raises:
        ContentError: there is OpenPGP in it, but not exactly one clear-signed message from the
            first byte to the last. The message says what is odd, and is to be put behind the
            name of the source.
    """
    if not _MARKER.search(body):
        return None
    if not body.startswith(_SIGNED):
        raise ContentError("there is something before the signed text")
    if b"\r" in body:
        raise ContentError("its lines end in CR LF; it has to be copied without changing them")
    lines = body.split(b"\n")
    if lines[0] != _SIGNED:
        raise ContentError("its first line goes on after the marker")
    try:
        blank, begin = lines.index(b"", 1), lines.index(_BEGIN, 1)
    except ValueError:
        raise ContentError("its signature is cut off") from None
    if blank > begin or not all(map(_HASH_HEADER.fullmatch, lines[1:blank])):
        raise ContentError("there is something other than Hash before its empty line")
    signature = b"\n".join(lines[begin:])
    if len(signature) > _SIGNATURE_LIMIT:
        raise ContentError(f"its signature has {len(signature)} bytes, or text after it")
    packets = dearmor(signature, "SIGNATURE")
    if any(packet.tag != _SIGNATURE for packet in _packets(packets)):
        raise ContentError("its signature holds something else than signatures")
    text = b"".join(_unescaped(line) + b"\n" for line in lines[blank + 1 : begin])
    return ClearSigned(text, packets)


def join_clearsigned(messages: Sequence[bytes]) -> bytes:
    """Make one message with all signatures of several messages that have the same text.

    Raises:
        ContentError: one of them is no clear-signed message, or they differ in more than their
            signatures.
    """
    parts = [split_clearsigned(message) for message in messages]
    signatures = b"".join(part.signature for part in parts if part is not None)
    heads = {message.partition(b"\n" + _BEGIN)[0] for message in messages}
    if None in parts or len(heads) != 1:
        raise ContentError("the signatures are not all for one text")
    encoded = base64.b64encode(signatures)
    lines = [encoded[at : at + 64] for at in range(0, len(encoded), 64)]
    checksum = b"=" + base64.b64encode(_crc24(signatures))
    return b"\n".join([heads.pop(), _BEGIN, b"", *lines, checksum, _END, b""])


def dearmor(text: bytes, kind: str) -> bytes:
    """The bytes of one or several armored blocks of one kind, such as ``PUBLIC KEY BLOCK``.

    Empty lines may stand between the blocks, and nothing else. The checksum may be missing.

    Raises:
        ContentError: see `split_clearsigned`.
    """
    begin, end = (b"-----%s PGP %s-----" % (word, kind.encode()) for word in (b"BEGIN", b"END"))
    result = bytearray()
    lines = iter(text.split(b"\n"))
    for line in lines:
        if line == begin:
            result += _block(lines, end)
        elif line:
            raise ContentError(f"{_shown(line)} is not where {begin.decode()} is expected")
    return bytes(result)


def _block(lines: Iterator[bytes], end: bytes) -> bytes:
    for line in lines:
        if not line:
            break
        if not _ARMOR_HEADER.fullmatch(line):
            raise ContentError(f"{_shown(line)} is no header of OpenPGP armor")
    encoded = bytearray()
    checksum = b""
    for line in lines:
        if line == end:
            break
        if checksum or not (_BASE64.fullmatch(line) or _CRC.fullmatch(line)):
            raise ContentError(f"{_shown(line)} is no line of OpenPGP armor")
        if _CRC.fullmatch(line):
            checksum = line[1:]
        else:
            encoded += line
    else:
        raise ContentError("its OpenPGP armor is cut off")
    try:
        data = base64.b64decode(bytes(encoded), validate=True)
    except binascii.Error as error:
        raise ContentError(f"its OpenPGP armor is damaged: {error}") from error
    if not data:
        raise ContentError("its OpenPGP armor is empty")
    if checksum and base64.b64decode(checksum) != _crc24(data):
        raise ContentError("its OpenPGP armor is damaged: the checksum is another")
    return data


def key_expiry(keyring: bytes) -> dict[str, float | None]:
    """When the keys of a binary keyring expire, by fingerprint; None for never.

    Of every key the newest signature of its own counts, as GnuPG has it. These signatures are
    not verified here: the answer may only be used to refuse a key that gpgv accepts, where the
    system clock that gpgv goes by is known to be wrong.

    Raises:
        ContentError: it is no keyring of public keys.
    """
    newest: dict[str, tuple[int, float]] = {}
    keys: dict[str, int] = {}
    primary = current = ""
    for packet in _packets(keyring):
        if packet.tag in (_SECRET, _SECRET_SUB):
            raise ContentError("it holds a secret key, which must never leave the publisher")
        if packet.tag in (_PUBLIC, _PUBLIC_SUB):
            current = _fingerprint(packet.body)
            primary = current if packet.tag == _PUBLIC else primary
            keys.setdefault(current, int.from_bytes(packet.body[1:5], "big"))
        elif packet.tag == _SIGNATURE and packet.body[:1] == b"\x04":
            created, lifetime = _own_signature(packet.body, primary, current)
            if created is not None:
                expiry = keys[current] + lifetime if lifetime else float("inf")
                newest[current] = max(newest.get(current, (0, 0.0)), (created, expiry))
        elif not keys:
            raise ContentError("it is no keyring of OpenPGP")
    if not keys:
        raise ContentError("it holds no key")
    expiries = {key: newest.get(key, (0, float("inf")))[1] for key in keys}
    return {key: None if expiry == float("inf") else expiry for key, expiry in expiries.items()}


def _own_signature(body: bytes, primary: str, current: str) -> tuple[int | None, int]:
    """Creation time and key lifetime of a signature that a key made about itself or its subkey."""
    if len(body) < 10:
        raise ContentError("an OpenPGP signature in it is damaged")
    over_current = body[1] in _OVER_THE_KEY if current == primary else body[1] == _OVER_A_SUBKEY
    hashed, end = _subpackets(body, 4)
    unhashed, _ = _subpackets(body, end)
    by_fingerprint = hashed.get(_ISSUER_FINGERPRINT, b"")[1:].hex().upper()
    by_id = hashed.get(_ISSUER, unhashed.get(_ISSUER, b"")).hex().upper()
    own = by_fingerprint == primary or (not by_fingerprint and by_id and primary.endswith(by_id))
    if not over_current or not own or len(hashed.get(_CREATED, b"")) != 4:
        return None, 0
    lifetime = int.from_bytes(hashed.get(_KEY_LIFETIME, b"\0\0\0\0"), "big")
    return int.from_bytes(hashed[_CREATED], "big"), lifetime


def _fingerprint(body: bytes) -> str:
    if body[:1] != b"\x04":
        raise ContentError(f"it holds a key of version {body[0] if body else '?'}, not 4")
    digest = hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body, usedforsecurity=False)
    return digest.hexdigest().upper()


@dataclass(frozen=True, slots=True)
class _Packet:
    tag: int
    body: bytes


def _packets(data: bytes) -> Iterator[_Packet]:
    """The packets of a keyring or of a signature; none of them may have an open length."""
    at = 0
    while at < len(data):
        head = data[at]
        at += 1
        if not head & 0x80:
            raise ContentError("it is no OpenPGP")
        if head & 0x40:
            tag = head & 0x3F
            size, at = _length(data, at, partial=True)
        else:
            tag = (head >> 2) & 0x0F
            width = 1 << (head & 3)
            if width == 8:
                raise ContentError("an OpenPGP packet in it has no length")
            size, at = int.from_bytes(data[at : at + width], "big"), at + width
        if at + size > len(data):
            raise ContentError("it is cut off, or no OpenPGP")
        yield _Packet(tag, data[at : at + size])
        at += size


def _length(data: bytes, at: int, *, partial: bool) -> tuple[int, int]:
    """A length as new packets and subpackets have it (RFC 4880, 4.2.2 and 5.2.3.1); its end.

    Only with packets the first bytes 224 to 254 mean that more parts follow.
    """
    first = data[at] if at < len(data) else 255
    if first < 192:
        return first, at + 1
    if first == 255:
        return int.from_bytes(data[at + 1 : at + 5], "big"), at + 5
    if partial and first >= 224:
        raise ContentError("an OpenPGP packet in it has no length")
    return ((first - 192) << 8) + int.from_bytes(data[at + 1 : at + 2], "big") + 192, at + 2


def _subpackets(body: bytes, start: int) -> tuple[dict[int, bytes], int]:
    """An area of subpackets behind its length of two bytes, and where it ends."""
    at = start + 2
    end = at + int.from_bytes(body[start:at], "big")
    found: dict[int, bytes] = {}
    while at < end:
        size, at = _length(body, at, partial=False)
        if size == 0 or at + size > min(end, len(body)):
            raise ContentError("an OpenPGP signature in it is damaged")
        found[body[at] & 0x7F] = body[at + 1 : at + size]
        at += size
    return found, end


def _unescaped(line: bytes) -> bytes:
    if len(line) > _LINE_LIMIT:
        raise ContentError(f"a line of its text has {len(line)} bytes")
    if line.startswith(b"-"):
        if not line.startswith(b"- "):
            raise ContentError(f"{_shown(line)} does not belong into the signed text")
        line = line[2:]
    return line.rstrip(b" \t")


def _crc24(data: bytes) -> bytes:
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc <<= 1
            if crc & 0x1000000:
                crc ^= 0x1864CFB
    return crc.to_bytes(3, "big")


def _shown(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))

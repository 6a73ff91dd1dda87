"""Who vouches for a release: the signature room.

In goes the published ``.release`` as it came from a source, out comes the text that may be
parsed, and whether a counting signature stands behind it. gpgv verifies; what counts is decided
here, from its status output alone.
"""

import hashlib
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from casync_updater.errors import ConfigError, ContentError, TrustError
from casync_updater.formats.openpgp import ClearSigned, dearmor, key_expiry, split_clearsigned
from casync_updater.tools import gpgv
from casync_updater.tools.gpgv import Verdict

_KEYRING_LIMIT = 1 << 20
_SUFFIXES = frozenset({".gpg", ".asc"})
_KEYBOX_MAGIC = b"KBXf"
_CHECK = "signature"


@dataclass(frozen=True, slots=True)
class Statement:
    """What may be believed of a published release.

    Attributes:
        text: what may be parsed: the cleartext without any OpenPGP around it.
        signed: a counting signature by a key of one of the keyrings was verified.
        signers: fingerprints of the primary keys whose signatures counted, sorted.
        remark: why a signature that is there does not count; empty where none is there or
            one counted. For the log and `status`.
    """

    text: bytes
    signed: bool
    signers: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Keyring:
    """A file with public keys.

    Attributes:
        path: where it was read.
        data: its keys, binary.
        expiry: when each key and subkey expires, by fingerprint; None for never.
    """

    path: Path
    data: bytes
    expiry: dict[str, float | None]


def authenticate(
    body: bytes, *, keyrings: Sequence[Path], required: bool, where: str, now: float
) -> Statement:
    """Find out who vouches for a published release.

    ==============================================  ==============  ==============
    body                                            required        not required
    ==============================================  ==============  ==============
    plain                                           refused         unsigned
    signed, with anything before, between, after    refused         refused
    it, cut off, CR LF, several messages
    signed, one signature counts                    signed          signed
    signed, altered under a known key               refused         refused
    signed by unknown keys only                     refused         unsigned
    signed by a known key: expired, revoked, weak   refused         unsigned
    digest, expired signature
    signed, there is no keyring                     refused         unsigned
    signed, none counts, and a keyring is unusable  `ConfigError`   unsigned
    ==============================================  ==============  ==============

    One counting signature suffices, whatever the others are: that is how keys are changed, and
    a text with a good signature was not altered. Where none is required, a signature that does
    not count is worth as much as none, since whoever sends the text could have left it away;
    only a text that was certainly altered on its way is refused even so.

    Each keyring judges by itself, so that a renewed copy of a key counts beside an old one; a
    key that any of them shows as revoked counts in none.

    Args:
        body: the ``.release`` as it was published: deb822, plain or clear-signed.
        keyrings: files with public keys, binary or armored, and directories of ``*.gpg`` and
            ``*.asc``. Where no signature is required, one that does not exist is none.
        required: refuse what has no counting signature.
        where: the source, for the message of an error.
        now: the best clock, in seconds since 1970. gpgv goes by the system clock; a key or
            signature that expired by either of the two does not count.

    Raises:
        TrustError: refused, see the table.
        ConfigError: a keyring is unusable, and that may be why the required signature is missing.
        LocalError: gpgv cannot do its work.
    """
    try:
        message = split_clearsigned(body)
    except ContentError as error:
        raise TrustError(
            _CHECK,
            expected="one clear-signed text with nothing around it",
            found=f"something else: {error}",
            where=where,
        ) from error
    if message is None:
        if required:
            raise _missing(keyrings, "an unsigned release", where)
        return Statement(body, signed=False)
    rings, problems = _usable(keyrings, required=required)
    verdicts = [_judge(body, message, ring, where, now) for ring in rings]
    signers = _signers(verdicts, {Verdict.GOOD})
    if signers:
        return Statement(message.text, signed=True, signers=tuple(sorted(signers)))
    found = _summary(verdicts)
    if any(s.verdict is Verdict.BAD for ring in verdicts for s in ring):
        raise TrustError(
            _CHECK, expected="the text as it was signed", found=f"a {found}", where=where
        )
    if not required:
        remark = "; ".join([f"its signature does not count: {found}", *problems])
        return Statement(message.text, signed=False, remark=remark)
    if problems:
        raise ConfigError(*problems)
    raise _missing(keyrings, found, where)


def unwrap(body: bytes) -> bytes:
    """The text of a release that this machine itself kept, without verifying its signature.

    Raises:
        ContentError: it is neither plain nor exactly one clear-signed text.
    """
    message = split_clearsigned(body)
    return body if message is None else message.text


def still_vouched(body: bytes, *, keyrings: Sequence[Path]) -> bool:
    """Whether a release that was accepted before has a signature by a key that is still believed.

    Expired keys and signatures count, revoked keys do not. Where a keyring cannot be used, it
    may be the one that has the key: then the answer is yes.

    Raises:
        LocalError: gpgv cannot do its work.
    """
    rings, problems = _usable(keyrings, required=True)
    if problems:
        return True
    try:
        message = split_clearsigned(body)
        if message is None:
            return False
        verdicts = [_judge(body, message, ring, "a kept release", 0.0) for ring in rings]
    except (ContentError, TrustError):
        return False
    return bool(_signers(verdicts, {Verdict.GOOD, Verdict.EXPIRED, Verdict.EXPIRED_KEY}))


def digest_of(keyrings: Sequence[Path]) -> str | None:
    """SHA-256 over these keyrings, which tells them from others; None where one is unreadable."""
    digest = hashlib.sha256()
    try:
        for path in keyrings:
            for file in keyring_files(path):
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    except (ConfigError, OSError):
        return None
    return digest.hexdigest()


def read_keyring(path: Path) -> Keyring:
    """Read a file with public keys, binary or armored.

    Raises:
        ConfigError: it cannot be read, or is no such file.
    """
    try:
        if path.stat().st_size > _KEYRING_LIMIT:
            raise ConfigError(f"{path}: keyring: it is too large to be one")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: keyring: it cannot be read: {error.strerror}") from error
    if data[8:12] == _KEYBOX_MAGIC:
        raise ConfigError(
            f"{path}: keyring: it is a keybox, which gpgv does not take everywhere; make a keyring"
            f" of it with 'gpg --no-default-keyring --keyring {path} --export --output NEW.gpg'"
        )
    try:
        if data.lstrip().startswith(b"-----BEGIN PGP"):
            data = dearmor(b"\n".join(data.splitlines()), "PUBLIC KEY BLOCK")
        return Keyring(path, data, key_expiry(data))
    except ContentError as error:
        raise ConfigError(f"{path}: keyring: {error}") from error


def keyring_files(path: Path) -> tuple[Path, ...]:
    """The keyring that a path names: itself, or what is in the directory, sorted.

    Raises:
        ConfigError: it is there and cannot be read.
        FileNotFoundError: it is not there.
    """
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return (path,)
        return tuple(
            sorted(
                file
                for file in path.iterdir()
                if file.suffix in _SUFFIXES and not file.name.startswith(".")
            )
        )
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: keyring: it cannot be read: {error.strerror}") from error


def _usable(paths: Sequence[Path], *, required: bool) -> tuple[list[Keyring], list[str]]:
    """The keyrings that can be read, and what is wrong with the others."""
    rings: list[Keyring] = []
    problems: list[str] = []
    for path in paths:
        try:
            for file in keyring_files(path):
                try:
                    rings.append(read_keyring(file))
                except ConfigError as error:
                    problems += error.problems
        except ConfigError as error:
            problems += error.problems
        except FileNotFoundError:
            if required:
                problems.append(f"{path}: keyring: there is no such file or directory")
    return rings, problems


def _judge(
    body: bytes, message: ClearSigned, ring: Keyring, where: str, now: float
) -> tuple[gpgv.Signature, ...]:
    """What gpgv and the best clock say about each signature, by one keyring."""
    try:
        verified = gpgv.verify(body, ring.data)
    except gpgv.StatusError as error:
        raise TrustError(
            _CHECK, expected="a signature that gpgv reads", found=str(error), where=where
        ) from error
    if verified.text != message.text:
        raise TrustError(
            _CHECK,
            expected="one clear-signed text",
            found="one of which gpgv gives another text back",
            where=where,
        )
    return tuple(_aged(signature, ring, now) for signature in verified.signatures)


def _signers(verdicts: Sequence[Sequence[gpgv.Signature]], counting: set[Verdict]) -> set[str]:
    """The keys whose signatures count; one that any keyring shows as revoked counts in none."""
    revoked = {s.key for ring in verdicts for s in ring if s.verdict is Verdict.REVOKED_KEY}
    return {s.key for ring in verdicts for s in ring if s.verdict in counting} - revoked


def _aged(signature: gpgv.Signature, ring: Keyring, now: float) -> gpgv.Signature:
    """The verdict by the best clock, where the system clock was behind and saw a good one."""
    if signature.verdict is not Verdict.GOOD:
        return signature
    if signature.expires is not None and signature.expires <= now:
        return replace(signature, verdict=Verdict.EXPIRED)
    expiries = (ring.expiry.get(key) for key in (signature.key, signature.signing_key))
    if any(expiry is not None and expiry <= now for expiry in expiries):
        return replace(signature, verdict=Verdict.EXPIRED_KEY)
    return signature


def _summary(verdicts: Sequence[Sequence[gpgv.Signature]]) -> str:
    """Each signature with the most telling verdict of all keyrings."""
    if not verdicts:
        return "no keyring to check it with"
    order = list(Verdict)
    worst = [
        min(same, key=lambda s: order.index(s.verdict)) for same in zip(*verdicts, strict=True)
    ]
    shown = [f"{s.verdict} {s.key}" for s in worst[:4]]
    return ", ".join(shown) + (f" and {len(worst) - 4} more" if len(worst) > 4 else "")


def _missing(keyrings: Sequence[Path], found: str, where: str) -> TrustError:
    names = ", ".join(map(str, keyrings)) or "a keyring (signedBy, or keyrings in [trust])"
    return TrustError(_CHECK, expected=f"a signature by a key of {names}", found=found, where=where)

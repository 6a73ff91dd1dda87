"""The publisher signs: one clear-signed text with a signature by each of its keys.

A key is named by its fingerprint or long key id, and then lies with the agent of the user who
publishes (or on a token behind it), or by the path of a file with one secret key, which is taken
into a home that exists only meanwhile. Where nobody can be asked for a passphrase, the variable
`PASSPHRASE_VARIABLE` names a file that holds it: in the environment and not in the
configuration, since the place of a secret belongs to the machine (a CI job's mounted secret, a
systemd credential) and the configuration is in version control.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from casync_updater.errors import ConfigError, ContentError, LocalError, TrustError
from casync_updater.formats.openpgp import join_clearsigned
from casync_updater.tools import gpgv
from casync_updater.tools.gpg import Gpg, Key, temporary_gpg
from casync_updater.tools.process import ProgramError
from casync_updater.trust import authenticate

PASSPHRASE_VARIABLE = "CASYNC_UPDATER_PASSPHRASE_FILE"  # noqa: S105 - a name
"""Names the file whose first line unlocks the secret keys."""


def passphrase_file(environment: Mapping[str, str]) -> Path | None:
    """The passphrase file that the environment names, if any.

    Raises:
        ConfigError: it names one that cannot be read, or whose first line is empty.
    """
    value = environment.get(PASSPHRASE_VARIABLE)
    if not value:
        return None
    path = Path(value).absolute()
    try:
        with path.open("rb") as file:
            empty = not file.readline().strip()
    except OSError as error:
        raise ConfigError(
            f"{PASSPHRASE_VARIABLE}: {path} cannot be read: {error.strerror}"
        ) from error
    if empty:
        raise ConfigError(f"{PASSPHRASE_VARIABLE}: the first line of {path} is empty")
    return path


class Standing(StrEnum):
    """What a published release's signatures are worth to its own publisher."""

    FOREIGN = "foreign"
    """Unsigned, or signed by none of the keys: nobody knows who wrote it."""
    OTHER = "other"
    """By one of the keys at least, and not by exactly all of them."""
    COMPLETE = "complete"


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """The public halves of the keys that sign.

    Attributes:
        fingerprints: of the primary keys, in the order of the configuration.
        keyring: all of them, binary.
    """

    fingerprints: tuple[str, ...]
    keyring: bytes


def public_keys(keys: Sequence[str], *, passphrase: Path | None) -> PublicKeys:
    """Find the keys, before anything is made that they shall sign.

    Raises:
        ConfigError: a key is not there, weak, expired or revoked, or stands there twice.
    """
    fingerprints: list[str] = []
    keyring = b""
    for key in keys:
        with _holder(key, passphrase) as gpg:
            fingerprints.append(_usable(gpg, key, fingerprints))
            keyring += gpg.export(fingerprints[-1])
    return PublicKeys(tuple(fingerprints), keyring)


def standing(body: bytes, keys: PublicKeys, *, now: float) -> Standing:
    """Judge the signatures of a published release by the keys that would sign it now.

    Args:
        body: the release as it was published.
        keys: the keys that sign.
        now: seconds since 1970.
    """
    with tempfile.TemporaryDirectory(prefix="cu-sign-") as name:
        ring = Path(name) / "keyring.gpg"
        ring.write_bytes(keys.keyring)
        try:
            statement = authenticate(
                body, keyrings=[ring], required=True, where="the published release", now=now
            )
        except TrustError:
            return Standing.FOREIGN
    signatures = gpgv.verify(body, keys.keyring).signatures
    exactly = len(signatures) == len(keys.fingerprints) == len(statement.signers)
    return Standing.COMPLETE if exactly else Standing.OTHER


def sign(text: bytes, keys: Sequence[str], *, passphrase: Path | None, now: float) -> bytes:
    """Clear-sign a release with every key, and verify the result as a client will.

    Args:
        text: the release; each line ends in a line feed and not in spaces.
        keys: fingerprints or long key ids of keys in the user's keyring, and absolute paths of
            files with one secret key each. With several, the message has several signatures:
            devices that know any one of the keys accept it.
        passphrase: a file whose first line unlocks them; None leaves asking to the agent.
        now: seconds since 1970.

    Raises:
        ConfigError: a key is not there, weak, expired or revoked, or stands there twice.
        LocalError: gpg cannot sign: the passphrase is wrong or nobody can be asked for it.
    """
    signed: list[bytes] = []
    keyring = bytearray()
    signers: list[str] = []
    with tempfile.TemporaryDirectory(prefix="cu-sign-") as name:
        folder = Path(name)
        source = folder / "text"
        source.write_bytes(text)
        for key in keys:
            with _holder(key, passphrase) as gpg:
                primary = _usable(gpg, key, signers)
                signed.append(_signed(gpg, source, primary, key))
                keyring += gpg.export(primary)
                signers.append(primary)
        message = join_clearsigned(signed)
        ring = folder / "keyring.gpg"
        ring.write_bytes(keyring)
        _verify(message, text, ring, signers, now)
    return message


@contextlib.contextmanager
def _holder(key: str, passphrase: Path | None) -> Iterator[Gpg]:
    """The gpg whose home has a key."""
    if "/" not in key:
        yield Gpg(None, passphrase)
        return
    with temporary_gpg(passphrase) as gpg:
        try:
            gpg.import_keys(Path(key))
        except ProgramError as error:
            raise ConfigError(
                f"signKey: {key}: gpg takes no key from it: {error.stderr.strip()}"
            ) from error
        yield gpg


def _usable(gpg: Gpg, key: str, others: Sequence[str]) -> str:
    """The fingerprint of the one primary key that is meant.

    Raises:
        ConfigError: there is none, more than one, it is one of the others, or it must not sign
            any more.
    """
    in_file = "/" in key
    try:
        found = gpg.secret_keys(None if in_file else key)
    except ProgramError as error:
        raise ConfigError(
            f"signKey: {key}: the user who publishes has no such secret key ('gpg"
            f" --list-secret-keys' lists them): {error.stderr.strip()}"
        ) from error
    primaries = [one for one in found if one.primary]
    if len(primaries) != 1:
        raise ConfigError(
            f"signKey: {key}: {len(primaries)} secret keys instead of one"
            + ("; export it with 'gpg --armor --export-secret-keys'" if in_file else "")
        )
    for one in found:
        _check(one, key)
    fingerprint = primaries[0].fingerprint
    if fingerprint in others:
        raise ConfigError(f"signKey: {key}: the key {fingerprint} is named twice")
    return fingerprint


def _check(one: Key, key: str) -> None:
    if one.primary and one.expired:
        raise ConfigError(
            f"signKey: {key}: the key expired; renew it with 'gpg --quick-set-expire"
            f" {one.fingerprint} 2y' and ship the keyring again, or sign with another key"
        )
    if one.primary and one.revoked:
        raise ConfigError(f"signKey: {key}: the key is revoked; sign with another key")
    if one.weak and (one.primary or (one.signs and not one.expired and not one.revoked)):
        raise ConfigError(
            f"signKey: {key}: {one.fingerprint} is too weak ({one.bits} bits, algorithm"
            f" {one.algorithm}); make a new key with 'casync-updater-server keygen'"
        )


def _signed(gpg: Gpg, source: Path, fingerprint: str, key: str) -> bytes:
    try:
        return gpg.clear_sign(source, fingerprint)
    except ProgramError as error:
        raise LocalError(
            f"signKey: {key}: gpg could not sign: {error.stderr.strip()}. If it wants a passphrase"
            f" and nobody can type it, let {PASSPHRASE_VARIABLE} name a file that holds it"
        ) from error


def _verify(message: bytes, text: bytes, ring: Path, signers: Sequence[str], now: float) -> None:
    """Let the client's own room judge what is about to be published."""
    try:
        statement = authenticate(
            message, keyrings=[ring], required=True, where="the new release", now=now
        )
    except TrustError as error:
        raise ConfigError(f"signKey: devices would refuse the signature: {error.found}") from error
    if missing := sorted(set(signers) - set(statement.signers)):
        raise ConfigError(f"signKey: devices would not count the signature by {', '.join(missing)}")
    if statement.text != text:
        raise ContentError("the release has lines that end in spaces, which signing takes away")

"""gpgv: which signatures of a clear-signed text are good, and what the text is."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from casync_updater.errors import LocalError
from casync_updater.tools.process import ProgramError, run

_TIMEOUT = 60.0


class Verdict(StrEnum):
    """What gpgv says about one signature; the worst for the text first."""

    BAD = "bad signature"
    REVOKED_KEY = "revoked key"
    EXPIRED_KEY = "expired key"
    EXPIRED = "expired signature"
    WEAK = "weak digest"
    UNUSABLE = "signature that gpgv cannot check"
    UNKNOWN_KEY = "unknown key"
    GOOD = "good signature"


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature of a text.

    Attributes:
        verdict: what gpgv says, by the system clock.
        key: fingerprint of the primary key; key id or fingerprint of whatever made the
            signature where it did not verify.
        signing_key: fingerprint of the key that signed: a subkey, or the same.
        expires: when the signature itself expires; None for never.
    """

    verdict: Verdict
    key: str
    signing_key: str
    expires: float | None


@dataclass(frozen=True, slots=True)
class Verified:
    """What gpgv gave back.

    Attributes:
        text: the signed text; worth something only with a good signature.
        signatures: in the order in which they stand in the message.
    """

    text: bytes
    signatures: tuple[Signature, ...]


class StatusError(Exception):
    """gpgv's status output is not what it writes about one clear-signed text."""


def verify(body: bytes, keyring: bytes) -> Verified:
    """Let gpgv judge a clear-signed message.

    A system clock that is behind keeps no signature from verifying
    (``--ignore-time-conflict``): a Raspberry Pi starts in the past, where each key is from the
    future. The user's own keyrings and options are never read.

    Args:
        body: the whole message.
        keyring: public keys, binary.

    Raises:
        StatusError: gpgv found more than one text, no signature, or wrote what it never writes.
        LocalError: gpgv is not installed, or there is no room for its temporary files.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="casync-updater-") as name:
            folder = Path(name)
            (folder / "home").mkdir(mode=0o700)
            (folder / "keyring.gpg").write_bytes(keyring)
            (folder / "message").write_bytes(body)
            result = run(
                _arguments(folder), ok=(0, 1, 2), timeout=_TIMEOUT, env=_environment(folder)
            )
            output = folder / "text"
            text = output.read_bytes() if output.exists() else None
    except OSError as error:
        raise LocalError(f"a signature cannot be verified here: {error}") from error
    signatures = parse_status(result.stdout)
    if text is None:
        raise ProgramError("gpgv", "gave no text back", result.stderr)
    return Verified(text, signatures)


def _arguments(folder: Path) -> Sequence[str]:
    return [
        "gpgv",
        "--homedir",
        str(folder / "home"),
        "--keyring",
        str(folder / "keyring.gpg"),
        "--ignore-time-conflict",
        "--status-fd",
        "1",
        "--output",
        str(folder / "text"),
        "--",
        str(folder / "message"),
    ]


def _environment(folder: Path) -> Mapping[str, str]:
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(folder / "home"),
        "LC_ALL": "C.UTF-8",
    }


_VERDICTS = {
    "GOODSIG": Verdict.GOOD,
    "EXPSIG": Verdict.EXPIRED,
    "EXPKEYSIG": Verdict.EXPIRED_KEY,
    "REVKEYSIG": Verdict.REVOKED_KEY,
    "BADSIG": Verdict.BAD,
    "ERRSIG": Verdict.UNUSABLE,
}
_NO_MESSAGE = frozenset({"NODATA", "UNEXPECTED", "BADARMOR"})
_NO_PUBLIC_KEY = "9"
_STRONG_DIGESTS = frozenset({"8", "9", "10"})
"""SHA-256, SHA-384 and SHA-512 by their numbers in RFC 4880, 9.4."""

_TEXT_CLASSES = frozenset({"00", "01"})


def parse_status(status: bytes) -> tuple[Signature, ...]:
    """Read what gpgv wrote to its status descriptor (GnuPG, doc/DETAILS).

    Each ``NEWSIG`` opens a block about one signature; a verdict outside of a block, two in one,
    or ``GOODSIG`` without ``VALIDSIG`` is no verdict.

    Raises:
        StatusError: see `verify`.
    """
    texts = 0
    blocks: list[_Block] = []
    for line in status.decode("utf-8", errors="replace").split("\n"):
        words = line.split(" ")
        if words[0] != "[GNUPG:]" or len(words) < 2:
            if line:
                raise StatusError(f"gpgv wrote {line[:80]!r}")
            continue
        keyword, values = words[1], words[2:]
        if keyword in _NO_MESSAGE:
            raise StatusError("gpgv finds no signed text in it")
        if keyword == "PLAINTEXT":
            texts += 1
        elif keyword == "NEWSIG":
            blocks.append(_Block())
        elif keyword in _VERDICTS or keyword == "VALIDSIG":
            if not blocks:
                raise StatusError(f"gpgv wrote {keyword} before any signature")
            blocks[-1].lines.append((keyword, values))
    if texts != 1:
        raise StatusError(f"gpgv finds {texts} texts in it")
    if not blocks:
        raise StatusError("gpgv finds no signature in it")
    return tuple(block.signature() for block in blocks)


@dataclass(slots=True)
class _Block:
    """The status lines about one signature that matter."""

    lines: list[tuple[str, list[str]]] = field(default_factory=list)

    def signature(self) -> Signature:
        verdicts = [(word, values) for word, values in self.lines if word != "VALIDSIG"]
        valid = [values for word, values in self.lines if word == "VALIDSIG"]
        if len(verdicts) != 1 or len(valid) > 1:
            raise StatusError(f"gpgv gives {len(verdicts)} verdicts on one signature")
        word, values = verdicts[0]
        if len(values) < (6 if word == "ERRSIG" else 1):
            raise StatusError(f"gpgv's {word} has not the fields it should have")
        verdict, key = _VERDICTS[word], values[0]
        if word == "ERRSIG":
            key = values[6] if len(values) > 6 else key
            verdict = Verdict.UNKNOWN_KEY if values[5] == _NO_PUBLIC_KEY else verdict
        if not valid:
            if verdict is Verdict.GOOD:
                raise StatusError("gpgv's GOODSIG has no VALIDSIG")
            return Signature(verdict, key, key, None)
        return _with_details(verdict, valid[0])


def _with_details(verdict: Verdict, valid: Sequence[str]) -> Signature:
    """A signature with what ``VALIDSIG`` says about it."""
    if len(valid) < 10 or not valid[3].isdecimal():
        raise StatusError("gpgv's VALIDSIG has not the fields it should have")
    signing_key, expires, digest, kind, primary = valid[0], valid[3], valid[7], valid[8], valid[9]
    if verdict is Verdict.GOOD and digest not in _STRONG_DIGESTS:
        verdict = Verdict.WEAK
    if verdict is Verdict.GOOD and kind not in _TEXT_CLASSES:
        verdict = Verdict.UNUSABLE
    return Signature(verdict, primary, signing_key, float(expires) or None)

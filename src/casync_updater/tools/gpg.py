"""gpg: making keys and signatures. Only the publisher uses it; clients have gpgv."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from casync_updater.tools.process import ProgramError, run

_TIMEOUT = 300.0
"""Seconds; somebody may have to type a passphrase or to touch a token."""

_RSA, _ECDSA, _EDDSA = 1, 19, 22
_SMALLEST = {_RSA: 2048, _ECDSA: 256, _EDDSA: 255}
"""Bits that a key must have; every other algorithm (DSA, mostly) is too weak or cannot sign."""


@dataclass(frozen=True, slots=True)
class Key:
    """A primary key or subkey, as ``--with-colons`` lists it (GnuPG, doc/DETAILS).

    Attributes:
        fingerprint: its own, in capitals.
        algorithm: its number in RFC 4880, 9.1.
        bits: its size.
        expired: by this machine's clock.
        revoked: by its owner.
        signs: it may sign texts.
        primary: True for the primary key, False for a subkey of the one before.
    """

    fingerprint: str
    algorithm: int
    bits: int
    expired: bool
    revoked: bool
    signs: bool
    primary: bool

    @property
    def weak(self) -> bool:
        """True where nobody should believe a signature by it."""
        return self.bits < _SMALLEST.get(self.algorithm, self.bits + 1)


@dataclass(frozen=True, slots=True)
class Gpg:
    """gpg with one home.

    Attributes:
        home: the folder of the keys; None for the user's own, with the agent that serves it.
        passphrase_file: a file whose first line unlocks secret keys; None leaves asking to the
            agent.
    """

    home: Path | None
    passphrase_file: Path | None

    def secret_keys(self, name: str | None = None) -> list[Key]:
        """The secret keys, all or those that a fingerprint or key id names.

        Raises:
            ProgramError: there is none.
        """
        names = () if name is None else (name,)
        return _listed(self._run("--with-colons", "--list-secret-keys", *names).decode("utf-8"))

    def import_keys(self, file: Path) -> None:
        """Take the keys of a file in."""
        self._run("--import", str(file))

    def clear_sign(self, file: Path, fingerprint: str) -> bytes:
        """Clear-sign a file, with SHA-512."""
        signed = ("--digest-algo", "SHA512", "--local-user", fingerprint, "--output", "-")
        return self._run(*signed, "--clear-sign", str(file))

    def make_key(self, user: str) -> None:
        """Make an Ed25519 key that signs and never expires."""
        self._run("--quick-generate-key", user, "ed25519", "sign", "never")

    def export(self, fingerprint: str) -> bytes:
        """A public key, binary."""
        return self._run("--export", fingerprint)

    def export_secret(self, fingerprint: str) -> bytes:
        """A secret key, armored, locked with its passphrase where it has one."""
        return self._run("--armor", "--export-secret-keys", fingerprint)

    def _run(self, *arguments: str) -> bytes:
        home = () if self.home is None else ("--homedir", str(self.home))
        unlock: tuple[str, ...] = ()
        if self.passphrase_file is not None:
            unlock = ("--pinentry-mode", "loopback", "--passphrase-file", str(self.passphrase_file))
        # The user's gpg.conf may add comments, expiry dates or other keys to each signature.
        options = ("--no-options", "--batch", "--yes", "--quiet")
        argv = ["gpg", *home, *options, *unlock, *arguments]
        return run(argv, timeout=_TIMEOUT, env=_environment()).stdout


@contextlib.contextmanager
def temporary_gpg(passphrase_file: Path | None) -> Iterator[Gpg]:
    """A gpg with an empty home, which is gone afterwards, with the agent that gpg starts in it."""
    with tempfile.TemporaryDirectory(prefix="cu-gpg-", ignore_cleanup_errors=True) as name:
        try:
            yield Gpg(Path(name), passphrase_file)
        finally:
            with contextlib.suppress(ProgramError):
                run(["gpgconf", "--homedir", name, "--kill", "all"], timeout=30.0)


def _environment() -> Mapping[str, str]:
    """This process's own, in English, with the terminal on which a passphrase can be asked."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    if "GPG_TTY" not in environment and sys.stdin is not None and sys.stdin.isatty():
        environment["GPG_TTY"] = os.ttyname(sys.stdin.fileno())
    return environment


def _listed(listing: str) -> list[Key]:
    keys: list[Key] = []
    pending: Sequence[str] = ()
    for fields in (line.split(":") for line in listing.splitlines()):
        if fields[0] in ("sec", "ssb"):
            pending = fields
        elif fields[0] == "fpr" and pending:
            keys.append(
                Key(
                    fingerprint=fields[9],
                    algorithm=int(pending[3]),
                    bits=int(pending[2]),
                    expired=pending[1] == "e",
                    revoked=pending[1] == "r",
                    signs="s" in pending[11],
                    primary=pending[0] == "sec",
                )
            )
            pending = ()
    return keys

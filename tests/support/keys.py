"""Real OpenPGP keys for tests, made by gpg in a home of their own."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path


class KeyMaker:
    """Makes keys and signatures, at any time of the calendar.

    Dates are written ``20260101``. gpg takes them for the present; gpgv cannot be told the time,
    so a machine whose clock is behind is one where keys come from far in the future.
    """

    def __init__(self, home: Path, passphrase: str) -> None:
        self.home = home
        self.passphrase = passphrase

    def gpg(self, *arguments: str | Path, at: str | None = None, stdin: bytes = b"") -> bytes:
        clock = () if at is None else ("--faked-system-time", f"{at}T000000!")
        argv = [
            *("gpg", "--homedir", str(self.home), "--batch", "--quiet", "--yes"),
            *("--pinentry-mode", "loopback", "--passphrase", self.passphrase),
            *("--trust-model", "always", "--ignore-time-conflict", "--ignore-valid-from"),
            *clock,
            *map(str, arguments),
        ]
        result = subprocess.run(argv, check=False, input=stdin, capture_output=True, timeout=60)
        assert result.returncode == 0, result.stderr.decode(errors="replace")
        return result.stdout

    def key(
        self, name: str, *, algorithm: str = "ed25519", expires: str = "never", at: str = "20250101"
    ) -> str:
        """Make a key and give its fingerprint; ``expires`` is a date or a span as gpg has it."""
        self.gpg("--quick-generate-key", name, algorithm, "sign", expires, at=at)
        return self.fingerprint(name)

    def fingerprint(self, name: str) -> str:
        listing = self.gpg("--with-colons", "--list-keys", f"={name}").decode()
        return next(line.split(":")[9] for line in listing.splitlines() if line[:4] == "fpr:")

    def subkey(self, name: str, *, expires: str, at: str) -> None:
        self.gpg("--quick-add-key", self.fingerprint(name), "ed25519", "sign", expires, at=at)

    def prolong(self, name: str, expires: str, *, at: str) -> None:
        self.gpg("--quick-set-expire", self.fingerprint(name), expires, at=at)

    def revoke(self, name: str, *, at: str) -> None:
        certificate = self.home / "openpgp-revocs.d" / f"{self.fingerprint(name)}.rev"
        text = certificate.read_bytes().replace(b"\n:-----BEGIN", b"\n-----BEGIN")
        self.gpg("--import", stdin=text, at=at)

    def public(self, *names: str, armor: bool = False) -> bytes:
        options = ("--armor",) if armor else ()
        return self.gpg(*options, "--export", *(f"={name}" for name in names))

    def secret(self, name: str) -> bytes:
        return self.gpg("--armor", "--export-secret-keys", f"={name}")

    def sign(
        self,
        text: bytes,
        *names: str,
        at: str = "20260601",
        digest: str = "SHA512",
        expires: str | None = None,
        mode: Sequence[str] = ("--clear-sign",),
    ) -> bytes:
        users = [option for name in names for option in ("--local-user", f"={name}")]
        span = () if expires is None else ("--default-sig-expire", expires)
        return self.gpg(*users, "--digest-algo", digest, *span, *mode, stdin=text, at=at)


@contextlib.contextmanager
def key_maker(*, passphrase: str = "") -> Iterator[KeyMaker]:
    """A key maker, whose agent ends with the block.

    Its home is directly below the system's temporary folder: the path of the agent's socket
    must not have more than 107 bytes, and pytest's folders are deep.
    """
    home = Path(tempfile.mkdtemp(prefix="cu-keys-"))
    try:
        yield KeyMaker(home, passphrase)
    finally:
        subprocess.run(
            ["gpgconf", "--homedir", str(home), "--kill", "all"], check=False, timeout=30
        )
        shutil.rmtree(home, ignore_errors=True)

"""``casync-updater-server keygen``: the keys of a publisher, and the keyring for its devices.

Two keys are made. The working key signs every release. The spare is put away where no network
reaches it; devices know it from the first day, so that on the day when the working key is lost
or stolen, a release signed by the spare is accepted everywhere, and brings the new keyring.

The keys never expire: a device that was switched off for years must still be able to follow. A
release's own Valid-Until (``validFor``) limits how long an old one can be passed off as current.
"""

import argparse
import os
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from casync_updater.errors import ConfigError, LocalError
from casync_updater.files import sync_folder, write_atomic
from casync_updater.server.signing import PASSPHRASE_VARIABLE, passphrase_file
from casync_updater.tools.gpg import temporary_gpg

_SECRET_MODE = 0o600
_KEYRING = "keyring.gpg"
_USER_LIMIT = 200


@dataclass(frozen=True, slots=True)
class KeySet:
    """What was made.

    Attributes:
        folder: only its owner may enter it.
        working: the file with the secret key that signs releases.
        spare: the file with the secret key that is put away.
        keyring: the file with both public keys, for the devices.
        working_fingerprint: of the working key.
        spare_fingerprint: of the spare.
        locked: the secret keys have a passphrase.
    """

    folder: Path
    working: Path
    spare: Path
    keyring: Path
    working_fingerprint: str
    spare_fingerprint: str
    locked: bool


def keygen(folder: Path, owner: str, *, passphrase: Path | None) -> KeySet:
    """Make a working key, a spare and their keyring in a new folder.

    Args:
        folder: where they go; it must not exist, or be empty.
        owner: who signs, such as ``Example Ltd <updates@example.com>``; it stands in the keys.
        passphrase: a file whose first line locks both secret keys; None locks neither.

    Raises:
        ConfigError: the folder has something in it, or the owner cannot stand in a key.
        LocalError: gpg failed, or the folder cannot be written. Nothing is left.
    """
    _check_owner(owner)
    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder}: it is not empty; keys are made in a folder of their own")
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise LocalError(f"{folder} cannot be made: {error.strerror}") from error
    try:
        fingerprints = _make(staging, owner, passphrase)
        staging.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise LocalError(f"{folder} cannot be made: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    working, spare = fingerprints
    return KeySet(
        folder=folder,
        working=folder / _secret_name("working"),
        spare=folder / _secret_name("spare"),
        keyring=folder / _KEYRING,
        working_fingerprint=working,
        spare_fingerprint=spare,
        locked=passphrase is not None,
    )


def instructions(keys: KeySet) -> str:
    """What to do with each file, for the terminal."""
    lock = (
        "Both secret keys are locked with the passphrase."
        if keys.locked
        else "Neither secret key has a passphrase: whoever reads the file can sign. To have one,"
        f" let {PASSPHRASE_VARIABLE} name a file with it and make the keys again."
    )
    return f"""\
Made in {keys.folder}:

{keys.working.name}: the working key {keys.working_fingerprint}
    It signs every release. Either name the file in the publisher's configuration,
        "signKey": "{keys.working}"
    or give it to the agent of the user who publishes, and name the key:
        gpg --import {keys.working}
        "signKey": "{keys.working_fingerprint}"

{keys.spare.name}: the spare {keys.spare_fingerprint}
    Move it now to two places without a network (a USB drive in a safe, say), and
    delete it here. You need it on the day when the working key is lost or stolen.

{keys.keyring.name}: the public keys of both, for the devices
    Put it into the image as /etc/casync-updater/keyrings/NAME.gpg, and name it in
    the entry: "signedBy": "/etc/casync-updater/keyrings/NAME.gpg"

{lock}

When the working key is lost or stolen: make new keys with this command, sign the next
release with the spare and the new working key ("signKey": [SPARE, NEW]), let it bring the
new keyring to the devices, and leave the spare out once they all have it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder for the keys")
    parser.add_argument(
        "--owner", required=True, help="who signs: 'Example Ltd <updates@example.com>'"
    )


def main(arguments: argparse.Namespace, say: Callable[[str], object] = sys.stdout.write) -> int:
    """Run the command; errors go to the caller, which has the exit codes."""
    keys = keygen(arguments.folder, arguments.owner, passphrase=passphrase_file(os.environ))
    say(instructions(keys))
    return 0


def _check_owner(owner: str) -> None:
    odd = any(unicodedata.category(letter).startswith("C") for letter in owner)
    if odd or owner != owner.strip() or not 5 <= len(owner) <= _USER_LIMIT:
        raise ConfigError(
            f"{owner[:60]!r} cannot stand in a key: it must be 5 to {_USER_LIMIT} letters in one"
            " line, such as 'Example Ltd <updates@example.com>'"
        )


def _make(folder: Path, owner: str, passphrase: Path | None) -> tuple[str, str]:
    """Fill a folder; gives the fingerprints of the working key and of the spare."""
    fingerprints = []
    keyring = bytearray()
    unlock = passphrase or Path(os.devnull)  # asked for nothing, gpg takes an empty passphrase
    for part in ("working", "spare"):
        with temporary_gpg(unlock) as gpg:
            gpg.make_key(_user(owner, part))
            fingerprint = gpg.secret_keys()[0].fingerprint
            secret = gpg.export_secret(fingerprint)
            write_atomic(folder / _secret_name(part), secret, mode=_SECRET_MODE)
            keyring += gpg.export(fingerprint)
        fingerprints.append(fingerprint)
    write_atomic(folder / _KEYRING, bytes(keyring))
    return fingerprints[0], fingerprints[1]


def _secret_name(part: str) -> str:
    return f"{part}-secret.asc"


def _user(owner: str, part: str) -> str:
    """A user id with its comment where OpenPGP has it, before the address."""
    name, bracket, address = owner.partition(" <")
    return f"{name} ({part} key){bracket}{address}"

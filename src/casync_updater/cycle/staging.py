"""The staging folder beside a destination, and whether an exchange can work there.

::

    PARENT/.NAME.casync-updater/          root-owned, 0700: kept setuid files stay out of reach
        token                             random; tells this folder apart from every other one
        new                               the tree that is being built, the old one after a commit
        previous-SERIAL-HEX               versions kept for a rollback
"""

import os
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from casync_updater import syscalls
from casync_updater.errors import LocalError
from casync_updater.files import write_atomic
from casync_updater.model import Apply, Entry, Identity, Installed


@dataclass(frozen=True, slots=True)
class Site:
    """Where an entry's tree goes, resolved once per cycle."""

    destination: Path
    """The real path: the configured one may be a symbolic link."""
    staging: Path
    apply: Apply
    why: str | None
    """Why the destination is not updated atomically; None where it is."""

    @property
    def new(self) -> Path:
        """Where the new tree is built."""
        return self.staging / "new"

    @property
    def token_file(self) -> Path:
        """Holds the random token of this staging folder."""
        return self.staging / "token"

    def previous(self, installed: Installed) -> Path:
        """Where a version is kept for a rollback."""
        return self.staging / f"previous-{installed.serial or 0}-{installed.digest[:16]}"


def survey(entry: Entry, no_exchange: str | None) -> Site:
    """Look at the place of a destination, without writing.

    Args:
        entry: whose destination it is.
        no_exchange: why an earlier exchange did not work there, if so.

    Raises:
        LocalError: neither the destination nor its parent is there, or a directory archive
            meets a file.
    """
    destination = Path(os.path.realpath(entry.destination))
    parent = destination.parent
    if not parent.is_dir():
        raise LocalError(
            f"{entry.name}: the folder {parent} of the destination is not there: make it, or"
            " correct dstPath"
        )
    if destination.exists() and entry.is_archive and not destination.is_dir():
        raise LocalError(
            f"{entry.name}: {destination} is a file, and the index is that of a directory: move"
            " the file away, or correct dstPath"
        )
    if destination.is_dir() and not entry.is_archive:
        raise LocalError(
            f"{entry.name}: {destination} is a directory, and the index is that of a file"
            " (.caibx): move the directory away, or correct dstPath"
        )
    staging = parent / f".{destination.name}.casync-updater"
    why = _why_in_place(entry, destination, parent) or no_exchange
    return Site(destination, staging, Apply.IN_PLACE if why else Apply.ATOMIC, why)


def _why_in_place(entry: Entry, destination: Path, parent: Path) -> str | None:
    if entry.apply is Apply.IN_PLACE:
        return "the configuration says so"
    if not destination.exists():
        return None
    if stat.S_ISBLK(destination.stat().st_mode):
        return "it is a block device"
    if is_mount_point(destination):
        return "it is a mount point"
    if not os.access(parent, os.W_OK):
        return f"{parent} cannot be written to"
    return None


def is_mount_point(path: Path) -> bool:
    """True for every mount point, bind mounts of the same file system included."""
    if path.stat().st_dev != path.parent.stat().st_dev:
        return True
    escaped = os.fsencode(path)
    for plain, escape in _MOUNTINFO_ESCAPES:
        escaped = escaped.replace(plain, escape)
    mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    return any(line.split()[4] == escaped for line in mounts)


_MOUNTINFO_ESCAPES = ((b"\\", b"\\134"), (b" ", b"\\040"), (b"\t", b"\\011"), (b"\n", b"\\012"))


def make_staging(site: Site) -> str:
    """Make the staging folder, and give its token.

    Raises:
        LocalError: it cannot be made, or something else stands in its place.
    """
    try:
        site.staging.mkdir(mode=0o700, exist_ok=True)
        status = site.staging.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise LocalError(f"{site.staging} is not a folder of this user: move it away")
        site.staging.chmod(0o700)
        if not site.token_file.exists():
            write_atomic(site.token_file, secrets.token_hex(16).encode(), mode=0o600)
        return site.token_file.read_text(encoding="ascii")
    except OSError as error:
        raise LocalError(f"{site.staging} cannot be used: {error.strerror}") from error


def identity(path: Path) -> Identity | None:
    """Device and inode of what stands at a path (not of what it links to); None for nothing."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return Identity(status.st_dev, status.st_ino)


def remove(path: Path) -> None:
    """Remove a tree or a file; nothing there is fine. Never follows symbolic links.

    What is immutable or append-only (chattr +i, +a) is made removable first.

    Raises:
        LocalError: something in it cannot be removed; it is named.
    """

    def again(function: Callable[[str], object], name: str, error: BaseException) -> None:
        try:
            if not isinstance(error, PermissionError):
                raise error
            syscalls.make_changeable(Path(name).parent)
            syscalls.make_changeable(Path(name))
            function(name)
        except OSError as failure:
            raise LocalError(f"{name} cannot be removed: {failure.strerror}") from failure

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=lambda function, name, info: again(function, name, info[1]))
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            again(os.unlink, str(path), error)

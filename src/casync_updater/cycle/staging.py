"""The staging folder beside a destination, and whether an exchange can work there.

::

    PARENT/.NAME.casync-updater/          root-owned, 0700: kept setuid files stay out of reach
        token                             random; tells this folder apart from every other one
        new                               the tree that is being built, the old one after a commit
        previous-SERIAL-HEX               versions kept for a rollback
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection
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
        LocalError: neither the destination nor its parent is there, or something stands there
            that the archive cannot take the place of.
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
    if destination.exists() and not (
        destination.is_dir() or destination.is_file() or destination.is_block_device()
    ):
        raise LocalError(
            f"{entry.name}: {destination} is neither a file, a folder nor a block device: correct"
            " dstPath"
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
    return path.stat().st_dev != path.parent.stat().st_dev or path in _mount_points()


def mounts_below(path: Path) -> tuple[Path, ...]:
    """The mount points inside of a tree.

    Neither an exchange nor a removal may take them along: what is mounted there would move with
    the old tree, or be deleted with it.
    """
    return tuple(mount for mount in _mount_points() if path in mount.parents)


def _mount_points() -> list[Path]:
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    return [Path(os.fsdecode(_MOUNTINFO_ESCAPE.sub(_plain, line.split()[4]))) for line in lines]


def _plain(escape: re.Match[bytes]) -> bytes:
    return bytes([int(escape[1], 8)])


_MOUNTINFO_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")


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


def try_exchange(site: Site, place: Path) -> str | None:
    """Find out whether the destination can be exchanged, without doing it.

    Two folders of our own are exchanged, which shows what the file system can do. And the
    destination itself is renamed onto a folder that is not empty. That never happens, but what
    cannot be renamed at all fails with another error, and first: a folder of a lower layer of
    overlayfs with EXDEV, since it would have to be copied up.

    Args:
        site: the destination.
        place: a folder on the same file system, made for this and removed again.

    Returns:
        Why an exchange cannot work there; None where it can.

    Raises:
        LocalError: `place` cannot be removed.
        OSError: something else is in the way.
    """
    if site.apply is Apply.IN_PLACE or not site.destination.is_dir():
        return None
    remove(place)
    try:
        for name in ("one", "two"):
            (place / name).mkdir(parents=True)
        (place / "full" / "inner").mkdir(parents=True)
        syscalls.exchange(place / "one", place / "two")
        site.destination.rename(place / "full")
    except PermissionError:
        return None  # an immutable folder, say: the plan names it
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return None
        if error.errno in syscalls.NO_EXCHANGE:
            return f"an exchange does not work there ({error.strerror})"
        raise
    finally:
        remove(place)
    raise AssertionError(f"{site.destination} was renamed onto a folder that is not empty")


def identity(path: Path) -> Identity | None:
    """Device and inode of what stands at a path (not of what it links to); None for nothing."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return Identity(status.st_dev, status.st_ino)


def garbage(site: Site, stay: Collection[str], preserve: Collection[str]) -> tuple[Path, ...]:
    """What nobody needs any more in the staging folder: all trees but the named ones.

    A tree that still holds something of the device stays as well: a power cut, and a state that
    was lost with it, must not cost the only copy.
    """
    if not site.staging.is_dir():
        return ()
    return tuple(
        path
        for path in site.staging.iterdir()
        if path != site.token_file
        and path.name not in stay
        and not any(os.path.lexists(path / kept) for kept in preserve)
    )


def remove(path: Path) -> None:
    """Remove a tree or a file; nothing there is fine. Never follows symbolic links.

    Not recursive: an archive may be deeper than Python's stack and than a path may be long. What
    is immutable or append-only (chattr +i, +a) is made removable first.

    Raises:
        LocalError: something in it cannot be removed, or is mounted there; it is named.
    """
    if mounts := mounts_below(path):
        raise LocalError(f"{mounts[0]} is a mount point in {path}, which is to go: unmount it")
    try:
        if path.is_dir() and not path.is_symlink():
            _remove_tree(path)
        else:
            _remove_file(path)
    except OSError as error:
        raise LocalError(f"{path} cannot be removed: {error.strerror}") from error


def _remove_file(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        folder = os.open(path.parent, _FOLDER)
        try:
            _gone(os.unlink, os.fsencode(path.name), folder)
        finally:
            os.close(folder)


def _remove_tree(path: Path) -> None:
    branch = [os.fsencode(path.name)]
    folder = os.open(path.parent, _FOLDER)
    try:
        folder = _entered(folder, branch[0])
        while True:
            inner = _without_files(folder)
            if inner is not None:
                branch.append(inner)
                folder = _entered(folder, inner)
                continue
            folder = _entered(folder, b"..")
            _gone(os.rmdir, branch.pop(), folder)
            if not branch:
                return
    finally:
        os.close(folder)


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _entered(folder: int, name: bytes) -> int:
    """The folder of a name, in exchange for the one that it is in."""
    if name != b".." and os.geteuid() != 0:
        os.chmod(name, 0o700, dir_fd=folder)
    inner = os.open(name, _FOLDER, dir_fd=folder)
    os.close(folder)
    return inner


def _without_files(folder: int) -> bytes | None:
    """Unlink files until a folder is found; None where nothing is left."""
    found = True
    while found:
        found = False  # A file system may pass over names while others are removed.
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    return os.fsencode(entry.name)
                _gone(os.unlink, os.fsencode(entry.name), folder)
                found = True
    return None


def _gone(removal: Callable[..., None], name: bytes, folder: int) -> None:
    try:
        removal(name, dir_fd=folder)
    except PermissionError:
        for node in (name, b"."):
            syscalls.make_changeable(node, folder)
        removal(name, dir_fd=folder)

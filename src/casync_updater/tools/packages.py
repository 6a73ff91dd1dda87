"""This program's own Debian packages: what dpkg has of them, and what apt makes of newer ones."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from casync_updater.errors import LocalError
from casync_updater.tools import process

OWN = ("casync-updater", "casync-updater-server", "python3-casync-updater")
CLIENT = OWN[0]

_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Installed:
    """What this machine has.

    Attributes:
        names: those of this program's packages that are installed, sorted.
        version: which all of them have.
        architecture: what the machine's packages are made for.
    """

    names: tuple[str, ...]
    version: str
    architecture: str


def installed() -> Installed:
    """Which of this program's packages are installed.

    Raises:
        LocalError: dpkg is not there, the client is not installed by it, or one of the packages
            is on hold, only half installed, or of another version than the others.
    """
    wanted = "${Package} ${Version} ${db:Status-Want} ${db:Status-Status}\n"
    shown = process.run(
        ["dpkg-query", "--show", f"--showformat={wanted}", *OWN], ok=(0, 1), timeout=_TIMEOUT
    )
    versions = {}
    for row in shown.stdout.decode(errors="replace").splitlines():
        name, version, want, status = row.split(" ")
        if status in ("not-installed", "config-files"):
            continue
        if status != "installed":
            raise LocalError(f"{name} {version} is {status}: dpkg --configure -a, and see why")
        if want == "hold":
            raise LocalError(f"{name} is on hold, and stays what it is until apt-mark unhold")
        versions[name] = version
    if CLIENT not in versions:
        raise LocalError(f"{CLIENT} is not installed as a Debian package here: nothing to replace")
    if len(different := sorted(set(versions.values()))) > 1:
        raise LocalError(
            f"the installed packages are of different versions ({', '.join(different)}):"
            " apt-get --fix-broken install"
        )
    result = process.run(["dpkg", "--print-architecture"], timeout=_TIMEOUT)
    return Installed(tuple(sorted(versions)), different[0], result.stdout.decode().strip())


def read_through(package: Path) -> None:
    """Unpack a package into nothing.

    Raises:
        process.ProgramError: it is cut off, or no package.
    """
    argv = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with process.stream(argv, stall=_TIMEOUT) as pieces:
        for _ in pieces:
            pass


def simulate(packages: Sequence[Path], names: Iterable[str]) -> None:
    """Ask apt whether these packages can be installed with what is there.

    Raises:
        LocalError: they need something that is not installed, or that something be removed.
    """
    options = ("--no-download", "--no-install-recommends", "--no-remove")
    done = process.run(
        ["apt-get", "--simulate", *options, "install", *map(str, packages)],
        ok=range(256),
        timeout=_TIMEOUT,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines()]
    if done.code:
        # What is unmet stands on standard output, and that there is something on the other.
        unmet = [line for line in lines if "epends:" in line or "Breaks:" in line]
        raise LocalError(f"apt would not install it: {'; '.join(unmet) or done.stderr.strip()}")
    touched = {line.split()[1] for line in lines if line.startswith("Inst ")}
    if more := touched - set(names):
        raise LocalError(
            f"it needs {', '.join(sorted(more))}, which would have to be downloaded: install that"
            " first"
        )
    if less := set(names) - touched:
        raise LocalError(
            f"apt would leave {', '.join(sorted(less))} as it is: see apt-mark and pins"
        )


def repack(name: str, folder: Path) -> Path:
    """Make a package of what is installed of one, so that it can be installed again.

    Who installed it, an image, apt or this program, does not matter, and nothing has to be
    downloaded. A configuration file that was changed on this machine stays out of it: dpkg
    leaves such a file alone then, and goes on knowing that it was changed.

    Args:
        name: the package.
        folder: an empty folder of root's, on a file system that takes owners and modes.

    Returns:
        The package, in that folder.

    Raises:
        LocalError: a program failed, or a file cannot be read or written.
    """
    from debian.deb822 import Deb822  # noqa: PLC0415 - for one entry of many only

    tree = folder / name
    shown = _query("--status", name)
    stanza = Deb822(shown)
    changed = _changed(stanza.get("Conffiles", ""))
    for field in ("Status", "Conffiles", "Config-Version"):
        if field in stanza:
            del stanza[field]
    try:
        control = tree / "DEBIAN"
        control.mkdir(mode=0o755, parents=True)
        for part in _query("--control-list", name).decode().split():
            content = _query("--control-show", name, part)
            if part == "conffiles":
                kept = [line for line in content.splitlines(True) if line.strip() not in changed]
                content = b"".join(kept)
            (control / part).write_bytes(content)
            (control / part).chmod(0o644 if part in _DATA else 0o755)
        (control / "control").write_text(str(stanza))
        for line in _query("--listfiles", name).splitlines():
            if line.startswith(b"/") and line not in (b"/.", *changed):
                _copy(Path(os.fsdecode(line)), tree)
        package = folder / f"{name}.deb"
        process.run(["dpkg-deb", "-Znone", "--build", str(tree), str(package)], timeout=_TIMEOUT)
        shutil.rmtree(tree)
    except OSError as error:
        raise LocalError(
            f"{name} cannot be kept for going back: {error.filename}: {error.strerror}"
        ) from error
    return package


_DATA = frozenset({"conffiles", "md5sums", "triggers", "templates", "shlibs", "symbols"})


def _query(*arguments: str) -> bytes:
    return process.run(["dpkg-query", *arguments], timeout=_TIMEOUT).stdout


def _changed(field: str) -> frozenset[bytes]:
    """The configuration files that are not as the package had them: ``PATH MD5`` each."""
    changed = set()
    for line in field.splitlines():
        if not line.strip():
            continue
        path, digest = line.split()[:2]
        try:
            found = hashlib.md5(Path(path).read_bytes(), usedforsecurity=False).hexdigest()
        except OSError:
            found = ""
        if found != digest:
            changed.add(os.fsencode(path))
    return frozenset(changed)


def _copy(path: Path, tree: Path) -> None:
    """A file as it is; what the machine does without (documentation, say) is left out."""
    target = tree / path.relative_to("/")
    # /lib is a symbolic link on today's systems, and a folder in a package.
    if path.is_dir() and (len(path.parts) == 2 or not path.is_symlink()):
        target.mkdir(mode=0o755, exist_ok=True)
    elif os.path.lexists(path):
        shutil.copy2(path, target, follow_symlinks=False)
    else:
        return
    status = path.stat() if target.is_dir() else path.lstat()
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    if not target.is_symlink():
        target.chmod(status.st_mode & 0o7777)

"""The last room, for the one entry that receives this program's own packages.

A cycle only looks, and prepares: it belongs to what is replaced. What it hands over is a folder
that holds everything the upgrade and the way back from it take, see `tools.guard`::

    STATE/.self-update/upgrade/     from the preparation to the guard's verdict
    STATE/.self-update/bad/VERSION  why a version failed here

Refused is what must not be installed: what is older, foreign, broken, made for another
architecture, or no complete set. What this machine lacks (room, a package that the new version
depends on) fails, and is tried again by the next cycle.
"""

import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from casync_updater import syscalls
from casync_updater.errors import LocalError, SpaceError, TrustError, UpdaterError
from casync_updater.model import Entry, OnlineSettings, Settings
from casync_updater.online.hosts import hosts_of
from casync_updater.tools import guard, packages

_CONTROL_LIMIT = 64 << 10
_MEMBER_LIMIT = 100
_VERSION_LIMIT = 100
_RESERVE = 8 << 20


@dataclass(frozen=True, slots=True)
class Package:
    """What a package file says of itself; `size` is what it takes when installed, in bytes."""

    name: str
    version: str
    architecture: str
    size: int
    file: Path


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A complete set of newer packages, for all of this program's that are installed."""

    version: str
    before: str
    packages: tuple[Package, ...]


def examine(tree: Path, has: packages.Installed) -> Upgrade | None:
    """What the packages in a tree mean for this machine.

    Args:
        tree: has them as ``*.deb``, without folders.
        has: what is installed.

    Returns:
        None where the tree has what is installed.

    Raises:
        TrustError: they must not be installed; which and why.
    """
    from debian.debian_support import Version  # noqa: PLC0415 - for one entry of many only

    found: dict[str, Package] = {}
    for file in sorted(tree.glob("*.deb")):
        package = read(file)
        if package.architecture not in ("all", has.architecture):
            raise _refused("architecture", f"all or {has.architecture}", package.architecture, file)
        if package.name in found:
            raise _refused(
                "packages",
                f"{package.name} once",
                f"{found[package.name].version} and {package.version}",
                tree,
            )
        found[package.name] = package
    needed = [found[name] for name in has.names if name in found]
    versions = {package.version for package in needed}
    if len(needed) < len(has.names) or len(versions) != 1:
        raise _refused(
            "packages",
            f"{', '.join(has.names)} in one version, as they are installed",
            ", ".join(f"{one.name} {one.version}" for one in needed) or "none of them",
            tree,
        )
    (version,) = versions
    if Version(version) < Version(has.version):
        raise _refused("downgrade", f"{has.version} or newer, as is installed", version, tree)
    if version == has.version:
        return None
    return Upgrade(version, has.version, tuple(needed))


def read(file: Path) -> Package:
    """What a package file says of itself; who wrote it is not believed anything else.

    Raises:
        TrustError: it is no package, or none of this program's.
    """
    from debian.debian_support import Version  # noqa: PLC0415

    if not stat.S_ISREG(file.lstat().st_mode):
        raise _refused("package", "a file", "something else", file)
    try:
        fields = _control(file)
        name, version = str(fields["Package"]), str(fields["Version"])
        architecture = str(fields["Architecture"])
        size = int(fields.get("Installed-Size", "0")) * 1024
        Version(version)
    except UpdaterError:
        raise
    except Exception as error:  # whatever a hostile archive makes its parsers do
        raise _refused("package", "a Debian package", str(error) or repr(error), file) from error
    if name not in packages.OWN:
        raise _refused("package", f"one of {', '.join(packages.OWN)}", name, file)
    if len(version) > _VERSION_LIMIT or size < 0:
        raise _refused("package", "a version and a size", f"{version}, {size}", file)
    return Package(name, version, architecture, size, file)


def _control(file: Path) -> Mapping[str, str]:
    """The control file, without unpacking one that is no such thing."""
    from debian.deb822 import Deb822  # noqa: PLC0415
    from debian.debfile import DebFile  # noqa: PLC0415

    with DebFile(filename=str(file)) as package:
        for number, member in enumerate(package.control.tgz()):
            if member.name in ("control", "./control"):
                if not member.isfile() or member.size > _CONTROL_LIMIT:
                    raise ValueError("its control file is none")
                content = package.control.tgz().extractfile(member)
                fields: Mapping[str, str] = Deb822(content.read())
                return fields
            if number > _MEMBER_LIMIT or member.size > _CONTROL_LIMIT * _MEMBER_LIMIT:
                break
    raise ValueError("it has no control file")


def _refused(check: str, expected: str, found: str, where: Path) -> TrustError:
    return TrustError(check, expected=expected, found=found, where=str(where))


class SelfUpdate:
    """What a cycle has to do with the upgrade of its own program."""

    def __init__(self, state_dir: Path) -> None:
        """Nothing is read yet."""
        self._root = state_dir.absolute() / ".self-update"
        self._folder = self._root / "upgrade"

    def checked(self, boot: str) -> None:
        """A check was completed: the version that this process runs is no longer on trial.

        Raises:
            LocalError: that cannot be written.
        """
        try:
            guard.alive(self._folder, boot)
        except OSError as error:
            raise LocalError(f"{error.filename}: {error.strerror}") from error

    def prepare(
        self, tree: Path, entry: Entry, settings: Settings, environment: Mapping[str, str]
    ) -> str | None:
        """Look at a tree, and prepare the upgrade that it offers; `start` starts it.

        Args:
            tree: as a cycle has installed and verified it.
            entry: whose source the new version has to reach.
            settings: say how long it may try.
            environment: names the proxies, where there are any.

        Returns:
            What is to come, in words; None where there is nothing to do.

        Raises:
            TrustError: refused; also a version that has failed here.
            LocalError: it cannot be installed now.
        """
        if guard.read_plan(self._folder) is not None:
            return f"casync-updater {self.words()}"
        if not Path("/run/systemd/system").is_dir():
            raise LocalError("selfUpdate needs systemd, which does not run here")
        if os.geteuid() != 0:
            raise LocalError("selfUpdate installs packages, which takes root")
        has = packages.installed()
        _demand_roots_own(tree)
        upgrade = examine(tree, has)
        if upgrade is None:
            self.forget_older(has.version)
            return None
        if (why := self.bad().get(upgrade.version)) is not None:
            raise _refused("version", f"one that did not fail here ({why})", upgrade.version, tree)
        for package in upgrade.packages:
            try:
                packages.read_through(package.file)
            except LocalError as error:
                raise _refused("package", "a whole package", str(error), package.file) from error
        packages.simulate(
            [package.file for package in upgrade.packages],
            [package.name for package in upgrade.packages],
        )
        try:
            self._fill(upgrade, _plan(upgrade, entry, settings, environment))
        except OSError as error:
            raise LocalError(f"{error.filename}: {error.strerror}") from error
        return f"casync-updater {upgrade.version} is being installed"

    def start(self) -> None:
        """Hand over what is prepared, if anything.

        Raises:
            LocalError: systemd does not take it; the next cycle tries again.
        """
        try:
            guard.arm(self._folder)
        except OSError as error:
            raise LocalError(f"the upgrade of casync-updater cannot be started: {error}") from error

    def _fill(self, upgrade: Upgrade, plan: guard.Plan) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in ("new", "old"):
            (self._folder / name).mkdir(parents=True)
        size = sum(package.size for package in upgrade.packages)
        files = sum(package.file.stat().st_size for package in upgrade.packages)
        _demand_space(Path("/usr"), size + _RESERVE)
        _demand_space(self._folder, size + files + _RESERVE)
        for package in upgrade.packages:
            shutil.copyfile(package.file, self._folder / "new" / f"{package.name}.deb")
            packages.repack(package.name, self._folder / "old")
        shutil.copyfile(guard.__file__, self._folder / "guard.py")
        syscalls.sync_file_system(self._folder)
        guard.write(self._folder / "plan.json", json.dumps(asdict(plan), indent=1))

    def words(self) -> str | None:
        """What `status` says."""
        plan = guard.read_plan(self._folder)
        if plan is None:
            failed = [f"{version} failed: {why}" for version, why in sorted(self.bad().items())]
            return "; ".join(failed) or None
        progress = guard.read_progress(self._folder)
        match progress.phase:
            case guard.INSTALL:
                return f"{plan.version} is being installed"
            case guard.BACK:
                return f"going back to {plan.before}: {progress.reason}"
        return (
            f"{plan.version} is on trial: it has to complete a check within"
            f" {plan.trial - progress.counted:.0f} seconds of connectivity"
        )

    def bad(self) -> dict[str, str]:
        """The versions that failed here, each with the reason."""
        folder = self._root / "bad"
        if not folder.is_dir():
            return {}
        return {file.name: file.read_text(errors="replace") for file in folder.glob("[!.]*")}

    def forget_older(self, version: str) -> None:
        """Forget what failed before a version that works."""
        from debian.debian_support import Version  # noqa: PLC0415

        for failed in self.bad():
            if Version(failed) < Version(version):
                (self._root / "bad" / failed).unlink()

    def forgive(self) -> None:
        """Let versions that failed be tried again."""
        shutil.rmtree(self._root / "bad", ignore_errors=True)


def _plan(
    upgrade: Upgrade, entry: Entry, settings: Settings, environment: Mapping[str, str]
) -> guard.Plan:
    places = (entry.source, entry.backup)
    hosts = hosts_of([entry], OnlineSettings(), environment)
    proxies = [host for host in hosts if host.proxy_for]
    return guard.Plan(
        version=upgrade.version,
        before=upgrade.before,
        packages=tuple(package.name for package in upgrade.packages),
        active=guard.Machine().service() not in ("inactive", "failed"),
        trial=settings.daemon.self_update_trial,
        urls=(_asked(entry.source.index),) if entry.source.remote and not proxies else (),
        proxies=tuple((proxy.name, proxy.ports) for proxy in proxies),
        paths=tuple(place.index for place in places if place and not place.remote),
    )


def _asked(index: str) -> str:
    """What a check asks a web server for, without what gives access there.

    Everybody may read the plan, and a server that denies access has answered.
    """
    url = urlsplit(index)
    host = url.netloc.rpartition("@")[2]
    return urlunsplit(url._replace(netloc=host, path=f"{url.path}.release", query=""))


def _demand_roots_own(tree: Path) -> None:
    """Whoever can write to the packages, or move them, could have anything installed as root.

    Raises:
        LocalError: somebody can who is not root; with the path.
    """
    real = Path(os.path.realpath(tree))
    for path in (*real.parents, real, *real.glob("*.deb")):
        status = path.lstat()
        writers = stat.S_IWOTH if status.st_gid == 0 else stat.S_IWOTH | stat.S_IWGRP
        # Where everybody may write, /tmp say, the sticky bit keeps them from moving others' files.
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_uid != 0 or (status.st_mode & writers and not sticky):
            raise LocalError(
                f"{path} can be written by others than root, who could put packages of their own"
                " there: choose a dstPath that belongs to root alone"
            )


def _demand_space(place: Path, size: int) -> None:
    free = shutil.disk_usage(place).free
    if free < size:
        raise SpaceError(
            f"{place}: the upgrade of casync-updater takes {size / 1e6:.1f} MB, and"
            f" {free / 1e6:.1f} MB are free"
        )

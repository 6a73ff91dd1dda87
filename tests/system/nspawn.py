"""Debian systems that boot with systemd, in containers, for the system tests.

What comes in is a release's name; what comes out is a running system with one network link to
this machine, which can be unplugged, switched off, cut off hard and booted again:

    with Machine("bookworm", tmp_path / "root") as machine:
        machine.boot()
        machine.run("systemctl", "is-active", "dbus")
        machine.link(up=False)
        machine.kill()
        machine.boot()

Measured on 2 cores, otherwise idle: base system 20 to 35 s (once a week), unpacking it 1 to
2 s, boot 1 s, power-off 0.5 s. Nothing of a machine outlives the block, nor the process.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

RELEASES = ("bookworm", "trixie")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "casync-updater-tests"
_MAX_AGE = 7 * 86400
PACKAGES = ("systemd", "systemd-sysv", "dbus", "iproute2", "iputils-ping", "ca-certificates")
ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "TERM": "dumb",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}


@dataclass(frozen=True)
class Archive:
    """Where this machine gets Debian from, taken from its own apt sources."""

    main: str
    security: str | None

    @classmethod
    def of_this_machine(cls) -> Self:
        codename = _os_release()["VERSION_CODENAME"]
        wanted = "$(RELEASE) $(REPO_URI)"
        listing = subprocess.run(
            ["apt-get", "indextargets", f"--format={wanted}", "Created-By: Packages"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        places = dict(line.split(" ", 1) for line in reversed(listing.splitlines()))
        return cls(places[codename], places.get(f"{codename}-security"))

    def sources(self, release: str) -> list[str]:
        """The lines of a sources.list for a release."""
        lines = [f"deb {self.main} {release} main", f"deb {self.main} {release}-updates main"]
        if self.security is not None:
            lines.append(f"deb {self.security} {release}-security main")
        return lines


def base(release: str) -> Path:
    """The tar file of a minimal system, made anew when it is older than a week."""
    with cached(f"{release}.tar") as new:
        if new is not None:
            bootstrap(release, new, "--variant=apt", include=PACKAGES)
    return CACHE / f"{release}.tar"


def bootstrap(release: str, target: Path, *options: str, include: Sequence[str]) -> None:
    """Let mmdebstrap make a system, from where this machine gets its own packages."""
    sources = Archive.of_this_machine().sources(release)
    subprocess.run(
        [
            *("mmdebstrap", "--quiet", f"--include={','.join(include)}", *options),
            *(release, str(target), *sources),
        ],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def cached(name: str) -> Iterator[Path | None]:
    """Something in the cache, which is made anew when it is older than a week.

    Yields:
        where to make it now; nothing when what is there is fresh. What is made takes the name
        when the block ends well. Other processes wait meanwhile.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    place, new = CACHE / name, CACHE / f"new-{name}"
    with locked(CACHE / f"{name}.lock"):
        if place.exists() and time.time() - place.stat().st_mtime <= _MAX_AGE:
            yield None
            return
        _remove(new)
        yield new
        _remove(place)
        new.replace(place)


class Machine:
    """One system: its root folder while it is off, and its processes while it runs.

    Attributes:
        release: Debian's name for what it runs.
        root: its root file system, to be read and written from outside.
        host: this machine's address on the link between the two.
        address: the system's own address on it.
    """

    def __init__(
        self,
        release: str,
        root: Path,
        *,
        tar: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """Describe a machine; entering it as a context unpacks it.

        Args:
            release: one of `RELEASES`.
            root: a folder that does not exist yet; it is removed at the end.
            tar: what is unpacked; `base` of the release if not given.
            options: more options for systemd-nspawn, ``--volatile=overlay`` say.
        """
        self.release = release
        self.root = root
        self._tar = tar or base(release)
        self._options = tuple(options)
        self._name = f"cu{secrets.token_hex(3)}"
        self._cleanup = contextlib.ExitStack()
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            number = stack.enter_context(network_number())
            self.host, self.address = f"10.211.{number}.1", f"10.211.{number}.2"
            self._cgroups = stack.enter_context(_cgroups(self._name))
            stack.callback(shutil.rmtree, self.root)
            stack.callback(self.kill)
            self.root.mkdir(parents=True)
            subprocess.run(
                [
                    "tar",
                    "-xpf",
                    self._tar,
                    "-C",
                    self.root,
                    "--numeric-owner",
                    "--xattrs-include=*",
                ],
                check=True,
            )
            self._configure_network()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    @property
    def console(self) -> str:
        """What the system wrote to its console since it was last booted."""
        return self._console_file.read_text(errors="replace")

    def boot(self) -> None:
        """Start the system and wait until systemd is done starting units (a minute at most)."""
        assert self._nspawn is None, "it runs already"
        with self._console_file.open("wb") as console:
            self._nspawn = subprocess.Popen(
                [
                    # A control group of its own: without it nspawn puts every container into the
                    # same one, and each systemd ends the services of the others.
                    *("sh", "-c", 'for g in $0; do echo $$ >"$g/cgroup.procs"; done; exec "$@"'),
                    " ".join(map(str, self._cgroups)),
                    # However the test process ends, all of the machine ends with it. nspawn
                    # alone would leave the container running when it is killed.
                    *("setpriv", "--pdeathsig", "KILL", "--"),
                    *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"),
                    *(f"--directory={self.root}", f"--machine={self._name}", "--network-veth"),
                    *("--kill-signal=SIGRTMIN+3", "--resolv-conf=off", "--timezone=off"),
                    *self._options,
                ],
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
        self.wait(self._find_leader, "the container's first process")
        self.wait(lambda: Path(f"/sys/class/net/{self._link}").exists(), "the link to it")
        ip("addr", "add", f"{self.host}/24", "dev", self._link)
        ip("link", "set", self._link, "up")
        self.wait(self._is_up, "systemd to finish starting", timeout=60)

    def run(
        self, *argv: str, check: bool = True, timeout: float = 180, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the system, as root, and take what it wrote.

        Raises:
            AssertionError: its exit code is not 0, and `check` is set.
        """
        done = subprocess.run(
            self._enter(*argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        return completed(argv, done.returncode, done.stdout, done.stderr, check=check)

    def chroot(self, *argv: str, options: Sequence[str] = (), timeout: float = 300) -> str:
        """Run a program in the system while it is off, as the builder of an image does.

        There is no systemd then, and the network is this machine's.

        Raises:
            AssertionError: its exit code is not 0.
        """
        assert self._nspawn is None, "it runs"
        variables = [f"--setenv={name}={value}" for name, value in ENVIRONMENT.items()]
        done = subprocess.run(
            [
                *("systemd-nspawn", "--quiet", "--as-pid2", "--register=no", "--keep-unit"),
                *(f"--directory={self.root}", f"--machine={self._name}", "--timezone=off"),
                *("--resolv-conf=off", "--console=pipe", *variables, *options, "--", *argv),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(argv)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def output(self, *argv: str) -> str:
        """What a program writes to standard output, whatever its exit code."""
        return self.run(*argv, check=False).stdout.strip()

    def write(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        """Write a file below the root; folders are made as needed."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        file.chmod(mode)

    def link(self, *, up: bool) -> None:
        """Plug the cable in, or pull it out, at this machine's end."""
        ip("link", "set", self._link, "up" if up else "down")

    def add_interface(self, name: str, peer: str) -> None:
        """Put a network card into the system; its other end is `peer` on this machine."""
        ip("link", "add", peer, "type", "veth", "peer", "name", name, "netns", str(self._leader))

    def poweroff(self, timeout: float = 60) -> None:
        """Shut the system down in order.

        Raises:
            AssertionError: it was not off in time.
        """
        assert self._nspawn is not None, "it does not run"
        with contextlib.suppress(ProcessLookupError):  # it is off by its own doing already
            os.kill(self._leader, signal.SIGRTMIN + 3)
        try:
            self._nspawn.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not off after {timeout} s:\n{self.console[-4000:]}") from None
        self._nspawn = None

    def reboot(self) -> None:
        """Shut down in order, and boot again (with another boot id)."""
        self.poweroff()
        self.boot()

    def kill(self) -> None:
        """Cut the power: no process gets to do anything any more."""
        if self._nspawn is None:
            return
        self._nspawn.kill()
        self._nspawn.wait()
        self._nspawn = None
        self.wait(lambda: not Path(f"/sys/class/net/{self._link}").exists(), "the link's end")

    def wait(
        self, condition: Callable[[], object], what: str, *, timeout: float = 30, step: float = 0.1
    ) -> None:
        """Wait until a condition holds.

        Raises:
            AssertionError: it does not after `timeout` seconds, or the container ended.
        """
        wait_for(condition, what, self._nspawn, self._console_file, timeout=timeout, step=step)

    @property
    def _link(self) -> str:
        return f"ve-{self._name}"

    @property
    def _console_file(self) -> Path:
        return self.root.with_name(f"{self.root.name}.console")

    def _enter(self, *argv: str) -> list[str]:
        variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        inside = ["nsenter", "--target", str(self._leader), "--all", "--"]
        return [*inside, "env", "--ignore-environment", *variables, *argv]

    def _find_leader(self) -> bool:
        """Look for the container's process 1; nspawn has other children before it has that."""
        assert self._nspawn is not None
        (nspawn,) = _children(self._nspawn.pid) or [0]
        self._leader = next(filter(_is_first, _children(nspawn)), 0)
        return self._leader != 0

    def _is_up(self) -> bool:
        return self.output("systemctl", "is-system-running") in ("running", "degraded")

    def _configure_network(self) -> None:
        self.write(
            "etc/systemd/network/10-host0.network",
            "[Match]\nName=host0\n\n[Network]\nLinkLocalAddressing=no\n"
            f"Address={self.address}/24\nGateway={self.host}\n",
        )
        wanted = self.root / "etc/systemd/system/multi-user.target.wants/systemd-networkd.service"
        wanted.parent.mkdir(parents=True, exist_ok=True)
        wanted.symlink_to("/lib/systemd/system/systemd-networkd.service")
        (self.root / "etc/hostname").write_text("appliance\n")
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost appliance\n")
        resolv = self.root / "etc/resolv.conf"
        resolv.unlink(missing_ok=True)
        resolv.touch()


def wait_for(
    condition: Callable[[], object],
    what: str,
    process: subprocess.Popen[bytes] | None,
    console: Path,
    *,
    timeout: float,
    step: float,
) -> None:
    """Wait until a condition holds while a machine's process runs.

    Raises:
        AssertionError: it does not after `timeout` seconds, or the process ended.
    """
    end = time.monotonic() + timeout
    while not condition():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > end:
            why = "the machine ended" if ended else f"{timeout} s passed"
            tail = console.read_text(errors="replace")[-4000:]
            raise AssertionError(f"waiting for {what}: {why}; console:\n{tail}")
        time.sleep(step)


def completed(
    argv: Sequence[str], code: int, stdout: str, stderr: str, *, check: bool
) -> subprocess.CompletedProcess[str]:
    """What a program did; an AssertionError if that is not exit code 0, and `check` is set."""
    if check and code:
        raise AssertionError(f"{' '.join(argv)}: exit code {code}\n{stdout}{stderr}")
    return subprocess.CompletedProcess(argv, code, stdout, stderr)


def _children(pid: int) -> list[int]:
    argv = ["pgrep", "--parent", str(pid)]
    found = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    return [int(child) for child in found.split()]


def _is_first(pid: int) -> bool:
    """Whether a process is number 1 of the container's namespace (the third, with unshare's)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    numbers = next(line for line in lines if line.startswith("NSpid:")).split()[1:]
    return len(numbers) > 2 and numbers[-1] == "1"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _os_release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key: value.strip('"') for key, value in pairs}


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _cgroups(name: str) -> Iterator[list[Path]]:
    """Control groups below this process's own, in the hierarchies that systemd uses."""
    groups = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or controllers == "name=systemd":
            kind = "cgroup2" if number == "0" else controllers
            groups.append(_cgroup_mount(kind) / path.lstrip("/") / f"casync-updater-test-{name}")
    for group in groups:
        group.mkdir()
    try:
        yield groups
    finally:
        for group in groups:
            for folder, _, _ in os.walk(group, topdown=False):
                Path(folder).rmdir()


def _cgroup_mount(kind: str) -> Path:
    """Where the hierarchy of a kind, ``cgroup2`` or a name of version 1, is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, filesystem, options, *_ = line.split()
        if filesystem == kind or (filesystem == "cgroup" and kind in options.split(",")):
            return Path(place)
    raise AssertionError(f"no control groups of the kind {kind} are mounted")


@contextlib.contextmanager
def network_number() -> Iterator[int]:
    """A number from 1 to 254 that no other test process uses; given back when this one ends."""
    folder = Path("/run/casync-updater-tests")
    folder.mkdir(exist_ok=True)
    for number in range(1, 255):
        with (folder / f"network-{number}").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield number
            return
    raise AssertionError("254 test machines are running already")

"""Installs a new version of casync-updater, watches it, and goes back where it fails.

This file stands alone: the standard library and nothing of this project. The version that is
replaced copies it beside the packages, and a unit of its own runs the copy, so nothing that the
new version brings, or lacks, can keep it from working. The unit is a file below /etc, enabled
for as long as the upgrade lasts: a transient one of systemd-run would not come back after a
power cut in the middle of dpkg. What the folder holds::

    plan.json      a `Plan`; written last, and removed first: with it, there is an upgrade
    guard.py       the copy
    new/, old/     packages of the new version, and of the one before
    progress.json  a `Progress`, written by the guard only
    alive.json     ``{"boot": ID, "started": SECONDS}``: a process that began so long after the
                   boot has completed a check. Every version writes that, see `alive`.
    ../bad/VERSION why a version failed here; it is not installed again

The order: install (again after a power cut, three times at most), trial, and back to the version
before where dpkg fails, where the service fails, or where no check was completed within the
seconds that the trial lasts. Those seconds count only while the version before could have
completed one: the web server answers, and not with one of its own failures (or the proxy before
it accepts a TCP connection), or a local source or drive is there. A gateway that answers while
the line behind it is dead, or a web server that is out of order for an evening, says nothing
about the new version.
"""

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

UNIT = "casync-updater-guard.service"
SERVICE = "casync-updater.service"

INSTALL, TRIAL, BACK = "install", "trial", "back"
_DONE, _STUCK = "done", "stuck"
_UNITS = Path("/etc/systemd/system")
_TRIES = 3
_LOOK = 10.0
_CONNECT = 5.0
_LOCK_LIMIT = 1800.0
_DPKG_LIMIT = 1800.0
_STOP_LIMIT = 3600.0
_REASON_LIMIT = 600

_TEXT = """\
# Written for one upgrade of casync-updater, and removed at its end.
[Unit]
Description=Upgrade of casync-updater to {version}
ConditionPathExists={condition}
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart=/usr/bin/python3 -I {script} {folder}
Environment=DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 LC_ALL=C.UTF-8
SyslogIdentifier=casync-updater
Restart=on-failure
RestartSec=5min
# A shutdown waits for a running dpkg: only the guard itself is told, and it waits.
KillMode=mixed
TimeoutStopSec=10min

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done; written by the version that is replaced.

    Attributes:
        version, before: Debian versions.
        packages: names of the packages.
        active: the service was running, and shall be running afterwards.
        trial: seconds of connectivity within which a check has to be completed.
        urls: what a check asks for, where it asks without a proxy.
        proxies: names or addresses of the proxies otherwise, each with its TCP ports.
        paths: files that stand for a source that needs no network.
    """

    version: str
    before: str
    packages: tuple[str, ...]
    active: bool
    trial: float
    urls: tuple[str, ...] = ()
    proxies: tuple[tuple[str, tuple[int, ...]], ...] = ()
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is; `began` is in seconds since the boot with the id `boot`."""

    phase: str = INSTALL
    tries: int = 0
    boot: str = ""
    began: float = 0.0
    counted: float = 0.0
    """Seconds of connectivity without a completed check."""
    reason: str = ""
    """Why it goes back."""


def read_plan(folder: Path) -> Plan | None:
    """The upgrade that is under way in a folder; None for none.

    The version on trial reads what the one before has written, hence only what it knows of it.
    """
    try:
        data = _known(Plan, folder / "plan.json")
        data |= {name: tuple(data[name]) for name in ("packages", "urls", "paths") if name in data}
        data["proxies"] = tuple((name, tuple(ports)) for name, ports in data.get("proxies", ()))
        return Plan(**data)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def read_progress(folder: Path) -> Progress:
    """How far the upgrade is; the beginning where nothing is written yet."""
    try:
        return Progress(**_known(Progress, folder / "progress.json"))
    except (OSError, ValueError, TypeError, AttributeError):
        return Progress()


def _known(kind: type[Plan | Progress], file: Path) -> dict[str, Any]:
    """What a file says of the fields that this version knows."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in json.loads(file.read_bytes()).items() if name in names}


def alive(folder: Path, boot: str) -> None:
    """Say that this process has completed a check; nothing where no upgrade is under way."""
    if (folder / "plan.json").exists():
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        write(folder / "alive.json", json.dumps({"boot": boot, "started": started}))


def write(path: Path, text: str) -> None:
    """Replace a file, durably."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def arm(folder: Path, units: Path = _UNITS) -> None:
    """Make the unit, and start it without waiting; also where that was done before.

    Where no upgrade is under way, what a power cut has left of a unit goes.

    Raises:
        OSError: the unit cannot be written, or systemd does not take it.
    """
    plan = read_plan(folder)
    if plan is None:
        disarm(units)
        return
    text = _TEXT.format(
        version=plan.version.replace("%", "%%"),
        condition=_escaped(folder / "plan.json"),
        script=_quoted(folder / "guard.py"),
        folder=_quoted(folder),
    )
    unit, link = _paths(units)
    if not unit.exists() or unit.read_text() != text or not link.is_symlink():
        write(unit, text)
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(unit)
        _sync(link.parent)
        _tell_systemd("daemon-reload")
    if read_plan(folder) is None:  # the guard has ended meanwhile
        disarm(units)
    else:
        _tell_systemd("start", "--no-block", UNIT)


def disarm(units: Path = _UNITS) -> None:
    """Remove the unit; where it runs, it runs on to its end.

    Raises:
        OSError: it cannot be removed, or systemd does not take it.
    """
    found = [path for path in _paths(units) if path.exists() or path.is_symlink()]
    for path in found:
        path.unlink(missing_ok=True)
    if found:
        _tell_systemd("daemon-reload")


def _paths(units: Path) -> tuple[Path, Path]:
    """The unit, and what enables it."""
    return units / UNIT, units / "multi-user.target.wants" / UNIT


def _tell_systemd(*arguments: str) -> None:
    try:
        subprocess.run(
            ["systemctl", *arguments], check=True, capture_output=True, text=True, timeout=60
        )
    except subprocess.CalledProcessError as error:
        raise OSError(f"systemctl {arguments[0]}: {error.stderr.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"systemctl {arguments[0]} does not end") from error


def _escaped(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace("%", "%%")


def _quoted(path: Path) -> str:
    """A path as one word of a unit's command line."""
    return '"{}"'.format(_escaped(path).replace('"', '\\"').replace("$", "$$"))


class LockedError(Exception):
    """Somebody else used dpkg for too long."""


class System(Protocol):
    """What the guard does to the machine."""

    def boot_id(self) -> str:
        """Tells this boot apart from every other one."""

    def uptime(self) -> float:
        """Seconds since the boot, those in suspend included."""

    def sleep(self, seconds: float) -> None:
        """Wait."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep dpkg for oneself, as apt does.

        Raises:
            LockedError: somebody else uses it, for longer than anybody should.
        """

    def dpkg(self, *arguments: str) -> tuple[int, str]:
        """Run dpkg, which is locked; its exit code, and what it says went wrong."""

    def versions(self, packages: Sequence[str]) -> Mapping[str, str]:
        """The versions of the packages that are completely installed."""

    def service(self) -> str:
        """The ActiveState of the service, as systemd names it."""

    def systemctl(self, *arguments: str) -> None:
        """Run systemctl, whatever comes of it."""

    def accepts(self, name: str, ports: Iterable[int]) -> bool:
        """Whether a host accepts a connection on any of the ports."""

    def answers(self, url: str) -> bool:
        """Whether a web server answers, with anything but a failure of its own."""

    def disarm(self) -> None:
        """Remove the unit that `arm` made; it runs on to its end."""


class Guard:
    """One upgrade, from wherever it is to its end."""

    def __init__(self, folder: Path, plan: Plan, system: System) -> None:
        self._folder = folder
        self._plan = plan
        self._system = system
        self._progress = read_progress(folder)

    def run(self) -> bool:
        """Go on to the end; False where the version before could not be installed yet."""
        steps = {INSTALL: self._install, TRIAL: self._watch, BACK: self._go_back}
        try:
            while (step := steps.get(self._progress.phase)) is not None:
                step()
        except LockedError:
            if self._progress.phase == INSTALL and self._progress.tries == 0:
                say("dpkg is in use by somebody else: the upgrade is left for the next cycle")
                self._end()
                return True
            return False
        if self._progress.phase == _STUCK:
            return False
        self._end()
        return True

    def _install(self) -> None:
        plan, tries = self._plan, self._progress.tries
        if tries >= _TRIES:
            self._fail(f"its installation was cut off {tries} times")
            return
        with self._system.locked():
            # Whoever begins after this, begins with the new version: see `alive`.
            self._system.systemctl("stop", SERVICE)
            (self._folder / "alive.json").unlink(missing_ok=True)
            if tries:
                say("the installation was cut off: going on with it")
                self._system.dpkg("--configure", "--pending", "--force-confold")
            self._save(tries=tries + 1, boot=self._system.boot_id(), began=self._system.uptime())
            say(f"installing {plan.version}")
            code, said = self._system.dpkg(*self._installation("new"))
        if code or not self._stands(plan.version):
            self._fail(f"dpkg failed with exit code {code}: {said}")
        else:
            self._save(phase=TRIAL)

    def _installation(self, which: str) -> list[str]:
        files = sorted(map(str, (self._folder / which).glob("*.deb")))
        return ["--force-confold", "--auto-deconfigure", "--install", *files]

    def _stands(self, version: str) -> bool:
        found = self._system.versions(self._plan.packages)
        return all(found.get(name) == version for name in self._plan.packages)

    def _watch(self) -> None:
        plan, system = self._plan, self._system
        pause = min(_LOOK, plan.trial / 20)
        if plan.active and system.service() == "inactive":
            system.systemctl("start", "--no-block", SERVICE)
        say(f"{plan.version} is on trial until it completes a check")
        counted = self._progress.counted
        saved = counted
        while not self._checked():
            before = system.uptime()
            system.sleep(pause)
            state = system.service()
            if state == "failed":
                self._fail("its service failed")
                return
            if (plan.active or state == "active") and self._connected():
                # A process that was stopped for a while has seen nothing of it.
                counted += min(system.uptime() - before, 2 * pause + _CONNECT)
            if counted >= plan.trial:
                self._fail(f"it completed no check within {counted:.0f} seconds of connectivity")
                return
            if counted - saved >= min(60.0, plan.trial / 10):
                self._save(counted=counted)
                saved = counted
        say(f"{plan.version} completed a check, and stays")
        self._save(phase=_DONE)

    def _checked(self) -> bool:
        try:
            found = json.loads((self._folder / "alive.json").read_bytes())
            boot, started = found["boot"], float(found["started"])
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return bool(boot != self._progress.boot or started >= self._progress.began)

    def _connected(self) -> bool:
        plan, system = self._plan, self._system
        return (
            any(Path(path).exists() for path in plan.paths)
            or any(system.answers(url) for url in plan.urls)
            or any(system.accepts(name, ports) for name, ports in plan.proxies)
        )

    def _fail(self, reason: str) -> None:
        if self._progress.phase == TRIAL and not self._stands(self._plan.version):
            say("somebody else has installed another version: this is no longer on trial")
            self._save(phase=_DONE)
            return
        self._save(phase=BACK, reason=reason)

    def _go_back(self) -> None:
        plan, system = self._plan, self._system
        say(f"{plan.version}: {self._progress.reason}: back to {plan.before}")
        self._mark_bad()
        with system.locked():
            system.systemctl("stop", SERVICE)
            code, said = system.dpkg("--force-downgrade", *self._installation("old"))
        if code or not self._stands(plan.before):
            say(f"{plan.before} cannot be installed: dpkg failed with exit code {code}: {said}")
            # Whatever is there is better than nothing, until the next try.
            self._progress = replace(self._progress, phase=_STUCK)
        else:
            say(f"{plan.before} is back")
            self._mark_bad()  # there may be room for it only now
            self._save(phase=_DONE)
        system.systemctl("reset-failed", SERVICE)
        if plan.active:
            system.systemctl("start", "--no-block", SERVICE)

    def _mark_bad(self) -> None:
        bad = self._folder.parent / "bad"
        with _without_room():
            bad.mkdir(exist_ok=True)
            write(bad / self._plan.version, self._progress.reason)

    def _save(self, **changes: Any) -> None:
        self._progress = replace(self._progress, **changes)
        with _without_room():
            write(self._folder / "progress.json", json.dumps(asdict(self._progress)))

    def _end(self) -> None:
        # In this order: nobody prepares another upgrade while files of this one go, and no cycle
        # makes the unit again; see `arm`.
        over = self._folder.with_name("over")
        shutil.rmtree(over, ignore_errors=True)
        with _without_room():
            self._folder.rename(over)
            _sync(over.parent)
        with _without_room():
            self._system.disarm()
        shutil.rmtree(over, ignore_errors=True)


@contextlib.contextmanager
def _without_room() -> Iterator[None]:
    """What cannot be written must not keep the guard from going on, or back."""
    try:
        yield
    except OSError as error:
        say(f"{error}")


def say(text: str) -> None:
    """One line for the journal."""
    print(f"self-update: {text}", flush=True)  # noqa: T201 - the unit's output is the journal


class Machine:
    """The machine that this runs on."""

    def __init__(self) -> None:
        self._busy = self._told = False

    def boot_id(self) -> str:
        """See `System.boot_id`."""
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def uptime(self) -> float:
        """See `System.uptime`."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def sleep(self, seconds: float) -> None:
        """See `System.sleep`."""
        time.sleep(seconds)

    def dpkg(self, *arguments: str) -> tuple[int, str]:
        """See `System.dpkg`."""
        with self._undisturbed():
            return _run("dpkg", *arguments, limit=_DPKG_LIMIT, DPKG_FRONTEND_LOCKED="true")

    def versions(self, packages: Sequence[str]) -> Mapping[str, str]:
        """See `System.versions`."""
        wanted = "${Package} ${Version} ${db:Status-Status}\n"
        done = subprocess.run(
            ["dpkg-query", "--show", f"--showformat={wanted}", *packages],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        rows = [line.split() for line in done.stdout.splitlines()]
        return {row[0]: row[1] for row in rows if row[2:] == ["installed"]}

    def service(self) -> str:
        """See `System.service`."""
        return subprocess.run(
            ["systemctl", "show", "--value", "--property=ActiveState", SERVICE],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        ).stdout.strip()

    def systemctl(self, *arguments: str) -> None:
        """See `System.systemctl`."""
        _run("systemctl", *arguments, limit=_STOP_LIMIT)

    def accepts(self, name: str, ports: Iterable[int]) -> bool:
        """See `System.accepts`."""
        for port in ports:
            with contextlib.suppress(OSError, UnicodeError):
                socket.create_connection((name, port), _CONNECT).close()
                return True
        return False

    def answers(self, url: str) -> bool:
        """See `System.answers`."""
        # Nothing that comes back is believed, hence any certificate will do.
        lenient = ssl.create_default_context()
        lenient.check_hostname, lenient.verify_mode = False, ssl.CERT_NONE
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=lenient)
        )
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - an entry's, http(s)
        try:
            opener.open(request, timeout=_CONNECT).close()
        except urllib.error.HTTPError as error:
            return error.code < 500
        except (OSError, http.client.HTTPException, ValueError):
            return False
        return True

    def disarm(self) -> None:
        """See `System.disarm`."""
        disarm()

    def handle_stop(self) -> None:
        """End at SIGTERM, but not in the middle of dpkg."""
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._told = True
        if not self._busy:
            sys.exit(0)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self._told:
            # The next start finds out what dpkg has done, as after a power cut.
            sys.exit(0)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """See `System.locked`."""
        with Path("/var/lib/dpkg/lock-frontend").open("w") as lock:
            end = time.monotonic() + _LOCK_LIMIT
            while True:
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise LockedError from None
                    time.sleep(1.0)
            yield


def _run(*argv: str, limit: float, **environment: str) -> tuple[int, str]:
    """Run a program to its end, its output in the journal; its exit code and what went wrong."""
    # A file and no pipe: what a maintainer script leaves in the background holds that open.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            argv,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.write(f"it was ended after {limit:g} seconds".encode())
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if text:
        print(text, flush=True)  # noqa: T201
    return process.returncode, _reason(text)


def _reason(output: str) -> str:
    """What went wrong, in one line: all from the first error on, or else the last line."""
    lines = [line.strip() for line in output.splitlines()]
    first = next((at for at, line in enumerate(lines) if " error" in f" {line.lower()}"), -1)
    return " ".join(lines[first:])[:_REASON_LIMIT]


def main(folder: Path) -> int:
    """What the unit runs."""
    plan = read_plan(folder)
    if plan is None:
        return 0
    machine = Machine()
    machine.handle_stop()
    return 0 if Guard(folder, plan, machine).run() else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

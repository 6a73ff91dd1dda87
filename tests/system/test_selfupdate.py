"""A machine that receives its own packages: as a tree, from the real publisher, over HTTP.

The newer versions are this tree's packages with another number and, for the broken ones, a line
that breaks them, so nothing has to be built again.
"""

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import casync_updater
from casync_updater.server.keygen import keygen
from support.webserver import WebServer
from system.conftest import NEWER, RELEASE_MARKS
from system.nspawn import Machine
from system.repository import Repository, configure_apt, publish, serve_packages

pytestmark = pytest.mark.system

UNIT = "casync-updater.service"
GUARD = "casync-updater-guard.service"
TREE = "/var/lib/casync-updater-packages"
NOW = casync_updater.__version__
OLDER = "0.9.0"
MODULES = "usr/lib/python3/dist-packages/casync_updater"

Change = Callable[[str, Path], None]
"""Changes an unpacked package, which it gets with its name."""


def remade(package: Path, target: Path, version: str, change: Change | None = None) -> Path:
    """A package with another version, and with what `change` does to it."""
    tree = target / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    text = control.read_text()
    (before,) = [line for line in text.splitlines() if line.startswith("Version: ")]
    control.write_text(text.replace(before.removeprefix("Version: "), version))
    name = package.name.partition("_")[0]
    if change is not None:
        change(name, tree)
    new = target / f"{name}_{version}_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, new],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    shutil.rmtree(tree)
    return new


class Publisher:
    """Publishes trees of packages, and one other project.

    Attributes:
        www: what is served.
    """

    def __init__(self, folder: Path, packages: list[Path]) -> None:
        self.folder = folder
        self.www = folder / "www"
        self.www.mkdir(parents=True)
        self._packages = {package.name.partition("_")[0]: package for package in packages}
        self.keys: dict[str, object] = {}

    def sign(self) -> Path:
        """Sign from now on; gives the keyring."""
        keys = keygen(self.folder / "keys", "Test <t@example.org>", passphrase=None)
        self.keys["signKey"] = str(keys.working)
        return self.folder / "keys/keyring.gpg"

    def packages(
        self,
        version: str,
        change: Change | None = None,
        names: tuple[str, ...] = ("casync-updater", "python3-casync-updater"),
    ) -> None:
        """Publish a version of the packages."""
        source = self.folder / "own"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        for name in names:
            if version == NOW and change is None:
                shutil.copy(self._packages[name], source)
            else:
                remade(self._packages[name], source, version, change)
        self.tree("own", source)

    def tree(self, name: str, source: Path) -> None:
        """Publish any tree."""
        entry = {
            "index": str(self.www / f"{name}.caidx"),
            "store": str(self.www / f"{name}.castr"),
            "source": str(source),
            **self.keys,
        }
        settings = self.folder / "publish.json"
        settings.write_text(json.dumps(entry))
        publish(settings)


@dataclass
class Device:
    """A booted machine with this tree's packages, a self-update entry and another one."""

    machine: Machine
    server: WebServer

    def configure(self, *, trial: float = 60, interval: int = 2000, **keys: object) -> None:
        entry = {
            "name": "own",
            "interval": interval,
            "srcIndex": f"{self.server.url}/own.caidx",
            "srcStore": f"{self.server.url}/own.castr",
            "dstPath": TREE,
            "selfUpdate": True,
            **keys,
        }
        self.machine.write("etc/casync-updater/own.json", json.dumps(entry))
        conf = f"[daemon]\nself_update_trial = {trial}\n"
        self.machine.write("etc/casync-updater/casync-updater.conf.d/trial.conf", conf)

    def add_other(self) -> None:
        entry = {
            "name": "demo",
            "interval": 2000,
            "srcIndex": f"{self.server.url}/demo.caidx",
            "srcStore": f"{self.server.url}/demo.castr",
            "dstPath": "/srv/demo",
        }
        self.machine.write("etc/casync-updater/demo.json", json.dumps(entry))

    def reload(self) -> None:
        def done() -> bool:
            # While a version is installed, there is no service to reload.
            return self.machine.run("systemctl", "reload", UNIT, check=False).returncode == 0

        self.wait(done, "the service to read its configuration")

    def version(self) -> str:
        """What is completely installed, where both packages agree."""
        shown = self.machine.output(
            *("dpkg-query", "--show", "--showformat=${Version} ${db:Status-Status}\n"),
            *("casync-updater", "python3-casync-updater"),
        )
        rows = set(shown.splitlines())
        version, _, status = min(rows, default="").partition(" ")
        return version if len(rows) == 1 and status == "installed" else f"{rows}"

    def active(self) -> bool:
        return self.machine.output("systemctl", "is-active", UNIT) == "active"

    def status(self, name: str = "own") -> dict[str, Any]:
        document = json.loads(self.machine.output("casync-updater", "status", "--json"))
        (entry,) = [entry for entry in document["entries"] if entry["name"] == name]
        return dict(entry)

    def over(self) -> bool:
        """The guard has come to its end, and nothing of it is left."""
        return not any(
            (self.machine.root / path).exists()
            for path in (
                "var/lib/casync-updater/.self-update/upgrade",
                f"etc/systemd/system/{GUARD}",
                f"etc/systemd/system/multi-user.target.wants/{GUARD}",
            )
        )

    def journal(self) -> str:
        return self.machine.output("journalctl", "--no-pager", "--identifier=casync-updater")

    def wait_for_version(self, version: str, timeout: float = 120) -> None:
        self.wait(lambda: self.version() == version, f"version {version}", timeout)

    def wait(self, condition: Callable[[], object], what: str, timeout: float = 120) -> None:
        try:
            self.machine.wait(condition, what, timeout=timeout, step=0.3)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.journal()[-6000:]}") from error

    def bad(self) -> dict[str, str]:
        folder = self.machine.root / "var/lib/casync-updater/.self-update/bad"
        if not folder.is_dir():
            return {}
        return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.fixture
def publisher(tmp_path: Path, packages: list[Path]) -> Publisher:
    return Publisher(tmp_path / "publisher", packages)


@pytest.fixture
def device(
    request: pytest.FixtureRequest, repository: Repository, publisher: Publisher, tmp_path: Path
) -> Iterator[Device]:
    """A machine with the packages, installed from a repository that is gone then."""
    with Machine(getattr(request, "param", "bookworm"), tmp_path / "root") as machine:
        machine.boot()
        with serve_packages(machine.host, repository) as server:
            configure_apt(machine, server, repository)
            machine.run("apt-get", "-qq", "update")
            machine.run("apt-get", "install", "-y", "--no-install-recommends", "casync-updater")
        with WebServer(publisher.www, host=machine.host) as web:
            yield Device(machine, web)


@pytest.mark.parametrize("device", RELEASE_MARKS, indirect=True)
def test_becomes_the_newer_version(device: Device, publisher: Publisher, tmp_path: Path) -> None:
    """Unsigned; while another entry fetches from a slow server, which goes on afterwards."""
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "large").write_bytes(random.Random(5).randbytes(6_000_000))
    publisher.tree("demo", demo)
    publisher.packages(NOW)
    device.configure(keep=1)
    machine = device.machine
    (machine.root / "etc/casync-updater/casync-updater.conf").open("a").write("# mine\n")
    device.reload()
    device.wait(lambda: device.status()["installed"], "the packages that run already")
    assert device.status()["selfUpdate"] is None
    serial = device.status()["installed"]["serial"]

    device.server.fail("*/demo.castr/*", skip=10, delay=15)
    device.add_other()
    device.reload()
    fetched = [0]

    def fetching() -> bool:
        paths = [r.path for r in device.server.requests if r.status == 200]
        fetched[0] = sum("/demo.castr/" in path for path in paths)
        return fetched[0] >= 10

    device.wait(fetching, "the middle of the other entry's fetch")
    device.wait(lambda: device.status("demo")["state"] == "build", "its state")
    publisher.packages(NEWER)
    device.wait_for_version(NEWER)
    assert not (machine.root / "srv/demo/large").exists(), "too late to show anything"
    device.server.heal()
    device.wait(device.over, "the end of the trial")
    assert device.active(), device.journal()
    assert device.version() == NEWER
    assert device.bad() == {}
    status = device.status()
    assert status["refused"] is None
    assert status["selfUpdate"] is None
    assert status["installed"]["serial"] > serial
    assert "# mine" in machine.output("cat", "/etc/casync-updater/casync-updater.conf")

    large = machine.root / "srv/demo/large"
    device.wait(large.exists, "the other entry's update")
    assert large.read_bytes() == (demo / "large").read_bytes()
    fetching()
    chunks = len(list((publisher.www / "demo.castr").glob("*/*.cacnk")))
    assert fetched[0] <= chunks + 32, f"{fetched[0]} requests for {chunks} chunks"


def breaks(name: str, file: str, text: str) -> Change:
    """Writes a line at the beginning of a file of one package: behind the ``#!`` of a script."""

    def change(package: str, tree: Path) -> None:
        if package != name:
            return
        path = tree / file
        head, found, rest = path.read_text().partition("\n") if path.exists() else ("", "", "")
        if head.startswith("#!") or not path.exists():
            text_before = head or "#!/bin/sh"
            path.write_text(f"{text_before}\n{text}\n{rest}")
            path.chmod(0o755)
        else:
            path.write_text(f"{text}\n{head}{found}{rest}")

    return change


def replaces(file: str, *pairs: tuple[str, str]) -> Change:
    """Replaces texts in a module."""

    def change(package: str, tree: Path) -> None:
        if package == "python3-casync-updater":
            path = tree / MODULES / file
            text = path.read_text()
            for before, after in pairs:
                assert text.count(before) == 1, before
                text = text.replace(before, after)
            path.write_text(text)

    return change


NEVER_CHECKS = replaces(
    "cli/run.py",
    (
        '    """Run the daemon to its end."""\n',
        "    import time\n\n    Notifier.of(os.environ).ready()\n    time.sleep(1e6)\n",
    ),
)


def never_says_so_with_another_format(package: str, tree: Path) -> None:
    """A version that works, with states of its own, but never completes a check of packages."""
    replaces(
        "state.py",
        ("FORMAT = 1\n", "FORMAT = 2\n"),
        ("    format: int = FORMAT\n", "    format: int = FORMAT\n    novelty: str = 'new'\n"),
    )(package, tree)
    replaces("cycle/selfupdate.py", ("guard.alive(self._folder, boot)", "pass"))(package, tree)


def needs_more(package: str, tree: Path) -> None:
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace("Depends: ", "Depends: not-there (>= 5), ", 1))


@pytest.mark.long
def test_what_must_not_be_installed_is_refused(device: Device, publisher: Publisher) -> None:
    machine = device.machine
    publisher.packages(OLDER)
    device.configure(interval=3_600_000)
    device.reload()
    device.wait(lambda: device.status()["refused"], "the refusal")

    def update(code: int) -> str:
        done = machine.run("casync-updater", "update", "own", check=False)
        assert done.returncode == code, f"{done.returncode} {done.stdout} {done.stderr}"
        assert device.version() == NOW
        assert device.over()
        return done.stdout + done.stderr

    assert device.status()["refused"]["check"] == "downgrade"
    assert "refused (downgrade)" in update(4)

    publisher.packages(NEWER, names=("python3-casync-updater",))
    assert "refused (packages)" in update(4)

    own = publisher.folder / "own"
    publisher.packages(NEWER)
    foreign = own / "foreign.deb"
    shutil.copy(next(own.glob("casync*.deb")), foreign)
    unpacked = publisher.folder / "foreign"
    subprocess.run(["dpkg-deb", "--raw-extract", foreign, unpacked], check=True)
    control = unpacked / "DEBIAN/control"
    control.write_text(control.read_text().replace("Package: casync-updater", "Package: sudo"))
    subprocess.run(["dpkg-deb", "--build", unpacked, foreign], check=True)
    publisher.tree("own", own)
    said = update(4)
    assert "refused (package)" in said
    assert "found sudo" in said
    foreign.unlink()

    package = next(own.glob("casync*.deb"))
    package.write_bytes(package.read_bytes()[:-3000])
    publisher.tree("own", own)
    assert "a whole package" in update(4)
    package.write_bytes(b"garbage")
    publisher.tree("own", own)
    assert "a Debian package" in update(4)

    publisher.packages(NEWER, needs_more)
    said = update(1)
    assert "not-there" in said
    assert device.status()["refused"] is None
    assert "not-there" in device.status()["lastError"]

    machine.run("apt-mark", "hold", "casync-updater")
    publisher.packages("1.0.2")
    assert "on hold" in update(1)
    machine.run("apt-mark", "unhold", "casync-updater")
    machine.run("chown", "backup", f"{TREE}/casync-updater_1.0.2_all.deb")
    assert "belongs to root alone" in update(1)
    machine.run("chown", "root", f"{TREE}/casync-updater_1.0.2_all.deb")
    machine.run("casync-updater", "update", "own")
    device.wait_for_version("1.0.2")
    device.wait(device.over, "the end of the trial")
    assert device.active()


@pytest.mark.long
def test_what_does_not_work_is_replaced(
    device: Device, publisher: Publisher, tmp_path: Path
) -> None:
    """Each of these ends with this version in service, and is not tried again."""
    machine = device.machine
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "version").write_text("one")
    publisher.tree("demo", demo)
    device.add_other()
    publisher.packages(NOW)
    device.configure(trial=20)
    conf = machine.root / "etc/casync-updater/casync-updater.conf"
    conf.open("a").write("# mine\n")
    device.reload()
    device.wait(lambda: device.status("demo")["installed"], "the other entry's update")
    device.wait(lambda: device.status()["installed"], "the packages that run already")
    installed = device.status("demo")["installed"]

    broken: list[tuple[str, Change, str]] = [
        (
            "1.0.1",
            breaks("casync-updater", "DEBIAN/postinst", "echo cannot configure; exit 7"),
            "dpkg failed",
        ),
        ("1.0.2", breaks("casync-updater", "DEBIAN/preinst", "exit 1"), "dpkg failed"),
        (
            "1.0.3",
            breaks("python3-casync-updater", f"{MODULES}/__main__.py", "raise SystemExit(9)"),
            "",
        ),
        ("1.0.4", NEVER_CHECKS, "completed no check within 2"),
        ("1.0.5", never_says_so_with_another_format, "completed no check within 9"),
    ]
    for version, change, why in broken:
        if change is never_says_so_with_another_format:
            # Long enough for a cycle of the other entry, which writes the new state.
            device.configure(trial=90)
            device.reload()
        publisher.packages(version, change)
        if change is never_says_so_with_another_format:
            state = machine.root / "var/lib/casync-updater/demo/state.json"
            device.wait(lambda: '"novelty"' in state.read_text(), "the new state", 240)  # noqa: B023
        device.wait(lambda: version in device.bad(), f"the end of {version}", 400)  # noqa: B023
        device.wait(device.over, f"the way back from {version}")
        assert device.version() == NOW, device.journal()
        assert why in device.bad()[version]
        device.wait(device.active, "the service")
        device.wait(
            lambda: (device.status()["refused"] or {}).get("found") == version,  # noqa: B023
            f"a cycle that says why {version} is not installed",
        )
        assert device.status()["refused"]["check"] == "version"
        assert device.journal().count(f"self-update: installing {version}") == 1
        # What was installed, and when, is as it was.
        assert device.status("demo")["installed"] == installed
        assert conf.read_text().endswith("# mine\n")
    states = {file.name for file in (machine.root / "var/lib/casync-updater/demo").glob("state*")}
    assert states == {"state.json", "state.json.format-1", "state.json.format-2"}
    (demo / "version").write_text("two")
    publisher.tree("demo", demo)
    two = machine.root / "srv/demo/version"
    device.wait(lambda: two.read_text() == "two", "an update by the version that is back")
    machine.run("casync-updater", "resume", "own")
    again = "self-update: installing 1.0.5"
    device.wait(lambda: device.journal().count(again) == 2, "what failed, once more")
    keyring = publisher.sign()
    shutil.copy(keyring, machine.root / "etc/casync-updater/keyrings/own.gpg")
    device.configure(trial=20, signedBy="/etc/casync-updater/keyrings/own.gpg")
    device.reload()
    publisher.packages("1.0.6")
    # The trial of 1.0.5 has to end first.
    device.wait_for_version("1.0.6", timeout=400)
    device.wait(device.over, "the end of the trial")
    assert device.active()
    device.wait(lambda: device.bad() == {}, "a cycle of the version that works")
    assert conf.read_text().endswith("# mine\n")
    release = publisher.www / "own.caidx.release"
    assert "BEGIN PGP SIGNED MESSAGE" in release.read_text()
    # dpkg still tells what the administrator changed from what it brought itself.
    verified = machine.output("dpkg", "--verify", "casync-updater", "python3-casync-updater")
    assert [line.split()[-1] for line in verified.splitlines()] == [
        "/etc/casync-updater/casync-updater.conf"
    ]


@pytest.mark.long
def test_power_cuts_in_the_middle_of_dpkg(device: Device, publisher: Publisher) -> None:
    machine = device.machine
    publisher.packages(NOW)
    device.configure()
    device.reload()
    device.wait(lambda: device.status()["installed"], "the packages that run already")
    wait_once = "[ -e /root/cut ] || { touch /root/cut; sync; sleep 600; }"
    places = [
        ("1.0.1", "python3-casync-updater", "DEBIAN/preinst"),
        ("1.0.2", "casync-updater", "DEBIAN/postinst"),
        ("1.0.3", "python3-casync-updater", "DEBIAN/prerm"),
    ]
    for version, package, script in places:
        publisher.packages(version, breaks(package, script, wait_once))
        if script.endswith("prerm"):
            # The script of the version that is left runs: it comes with the next one.
            device.wait_for_version(version)
            device.wait(device.over, "the end of the trial")
            version = "1.0.4"  # noqa: PLW2901
            publisher.packages(version)
        cut = machine.root / "root/cut"
        device.wait(cut.exists, f"dpkg being in {script}")
        machine.kill()
        machine.boot()
        device.wait_for_version(version)
        device.wait(device.over, "the end of the trial")
        assert device.active(), device.journal()
        assert device.bad() == {}
        assert device.status()["installed"]["version"]
        cut.unlink()
    assert machine.output("dpkg", "--audit") == ""

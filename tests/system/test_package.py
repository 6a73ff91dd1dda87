"""The packages on real systems: installed, used, upgraded, removed, and over an old installation.

Measured on 2 cores that others used too, Debian's packages in the cache: building the packages
5 s each; a life 24 to 40 s, an old installation 28 to 44 s, an image 20 to 32 s, a read-only
root 28 s, the packages' own tests 35 s, lintian 4 s.
"""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import casync_updater
from support.webserver import WebServer
from system.conftest import NEWER, RELEASE_MARKS
from system.nspawn import RELEASES, Machine
from system.repository import (
    SOURCE,
    Repository,
    build,
    configure_apt,
    publish,
    serve,
    serve_packages,
)

pytestmark = pytest.mark.system

UNIT = "casync-updater.service"


@dataclass(frozen=True)
class Device:
    """A booted machine that can install packages."""

    machine: Machine

    def install(self, *packages: str) -> str:
        """What apt printed."""
        self.machine.run("apt-get", "-qq", "update")
        return self.machine.run("apt-get", "install", "-y", *packages, timeout=300).stdout

    def property(self, name: str) -> str:
        return self.machine.output("systemctl", "show", "--value", "--property", name, UNIT)

    def active(self) -> bool:
        return self.machine.output("systemctl", "is-active", UNIT) == "active"

    def version(self) -> str:
        return self.machine.output("casync-updater", "--version").split()[-1]

    def exists(self, path: str) -> bool:
        return (self.machine.root / path.lstrip("/")).exists()

    def journal(self) -> str:
        return self.machine.output("journalctl", "--no-pager", "--unit", UNIT)


@contextmanager
def booted(release: str, repository: Repository, folder: Path) -> Iterator[Device]:
    with Machine(release, folder / "root") as machine:
        machine.boot()
        with serve_packages(machine.host, repository) as server:
            configure_apt(machine, server, repository)
            yield Device(machine)


class Project:
    """Something that is published outside of the machine."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        self.source.mkdir(parents=True)
        self.www = folder / "www"
        self.www.mkdir()
        self._settings = folder / "publish.json"
        self._settings.write_text(
            json.dumps(
                {
                    "index": str(self.www / "demo.caidx"),
                    "store": str(self.www / "demo.castr"),
                    "source": str(self.source),
                }
            )
        )

    def publish(self, text: str) -> None:
        """Publish a version whose file `version` has this text."""
        (self.source / "version").write_text(text)
        publish(self._settings)


@pytest.mark.parametrize("release", RELEASE_MARKS)
def test_life_of_the_package(
    release: str, repository: Repository, newer_packages: list[Path], tmp_path: Path
) -> None:
    """Installed, pointed at a web server, reloaded, restarted, upgraded, removed, purged."""
    project = Project(tmp_path / "project")
    project.publish("one")
    with booted(release, repository, tmp_path) as device:
        machine = device.machine
        device.install("casync-updater")
        assert device.active(), device.journal()
        assert device.property("NRestarts") == "0"
        exposure = machine.output("systemd-analyze", "security", "--no-pager", UNIT)
        assert "Overall exposure level for casync-updater.service: 4.0 OK" in exposure
        assert device.version() == casync_updater.__version__
        assert machine.run("man", "-w", "casync-updater", check=False).returncode in (0, 127)

        with serve(machine.host, {"web": project.www}) as server:
            machine.write(
                "etc/casync-updater/demo.json",
                json.dumps(
                    {
                        "interval": 1000,
                        "srcIndex": f"{server}/web/demo.caidx",
                        "srcStore": f"{server}/web/demo.castr",
                        "dstPath": "/srv/demo",
                        "triggers": [
                            {"paths": ["version"], "actions": ["cat version >>/root/acted"]}
                        ],
                    }
                ),
            )

            def installed(text: str) -> bool:
                file = machine.root / "srv/demo/version"
                return file.exists() and file.read_text() == text

            machine.run("systemctl", "reload", UNIT)
            machine.wait(lambda: installed("one"), "the first version")
            main_pid = device.property("MainPID")
            project.publish("two")
            machine.wait(lambda: installed("two"), "the second version")
            assert device.property("MainPID") == main_pid
            assert device.property("StatusText") != ""

            machine.run("systemctl", "restart", UNIT)
            assert device.active(), device.journal()
            assert device.property("MainPID") != main_pid

            (machine.root / "etc/casync-updater/casync-updater.conf").open("a").write("# mine\n")
            repository.publish(newer_packages)
            device.install("casync-updater")
            assert device.version() == NEWER
            assert device.active(), device.journal()
            assert "# mine" in machine.output("cat", "/etc/casync-updater/casync-updater.conf")
            project.publish("three")
            machine.wait(lambda: installed("three"), "an update by the newer package")

        machine.run("apt-get", "-y", "remove", "casync-updater")
        assert not device.active()
        assert device.exists("/etc/casync-updater/casync-updater.conf")
        assert device.exists("/var/lib/casync-updater")
        machine.run("apt-get", "-y", "purge", "casync-updater", "python3-casync-updater")
        for path in ("/etc/casync-updater/casync-updater.conf", "/var/lib/casync-updater"):
            assert not device.exists(path)
        assert not device.exists("/var/cache/casync-updater")
        assert device.exists("/etc/casync-updater/demo.json"), "it is the administrator's"
        assert installed("three")
        assert machine.output("systemctl", "list-unit-files", UNIT, "--no-legend") == ""
        assert machine.output("find", "/etc/systemd", "-name", "*casync*") == ""


@pytest.mark.long
@pytest.mark.parametrize("release", RELEASES)
def test_an_upgrade_in_the_middle_of_a_fetch(
    release: str, repository: Repository, newer_packages: list[Path], tmp_path: Path
) -> None:
    """What was fetched is kept: the newer version goes on where the older one was stopped."""
    project = Project(tmp_path / "project")
    (project.source / "large").write_bytes(random.Random(5).randbytes(12_000_000))
    project.publish("one")
    chunks = {file.name for file in (project.www / "demo.castr").glob("*/*")}
    with booted(release, repository, tmp_path) as device:
        machine = device.machine
        with WebServer(project.www, host=machine.host) as server:
            server.fail("*.cacnk", delay=0.8)
            device.install("casync-updater")
            entry = {
                "interval": 2000,
                "srcIndex": f"{server.url}/demo.caidx",
                "srcStore": f"{server.url}/demo.castr",
                "dstPath": "/srv/demo",
            }
            machine.write("etc/casync-updater/demo.json", json.dumps(entry))
            machine.run("systemctl", "reload", UNIT)

            def fetched() -> list[str]:
                paths = [request.path for request in server.requests if request.status == 200]
                return [path for path in paths if path.endswith(".cacnk")]

            machine.wait(lambda: len(fetched()) >= 30, "the middle of the fetch")
            repository.publish(newer_packages)
            device.install("casync-updater")
            assert device.version() == NEWER
            assert len(fetched()) < len(chunks), "the upgrade came too late to show anything"
            file = machine.root / "srv/demo/version"
            machine.wait(
                lambda: file.exists() and file.read_text() == "one", "the whole update", timeout=120
            )
            assert device.active(), device.journal()
            again = len(fetched()) - len(chunks)
            assert again <= 32, f"{again} of {len(chunks)} chunks were fetched twice"


OLD_UNIT = """\
[Unit]
Description=casync updater service
After=network.target

[Service]
WorkingDirectory=/opt/casync-updater/
ExecStart=nodejs /opt/casync-updater/client.js /etc/casync-updater
Restart=always

[Install]
WantedBy=multi-user.target
"""
OLD_SELF_UPDATE = {
    "interval": 1800000,
    "srcIndex": "https://update.casync-updater.net/master/index.caidx",
    "srcStore": "https://update.casync-updater.net/master/store.castr",
    "dstPath": "/opt/casync-updater",
    "triggers": [{"paths": ["."], "actions": ["systemctl restart casync-updater.service"]}],
}
# The old client's place in this story is a Node process that works for ever.
OLD_CLIENT = 'setInterval(() => require("fs").appendFileSync("/root/old-works", "."), 200);\n'


def install_old(device: Device, entry: dict[str, object]) -> None:
    """What the old installer left, with an entry of the user's own beside its own."""
    machine = device.machine
    device.install("--no-install-recommends", "nodejs")
    machine.write("opt/casync-updater/client.js", OLD_CLIENT)
    machine.write("opt/casync-updater/act.sh", "#!/bin/sh\npwd >/root/acted\n", mode=0o755)
    machine.write("lib/systemd/system/casync-updater.service", OLD_UNIT)
    machine.write("etc/casync-updater/client.json", json.dumps([OLD_SELF_UPDATE]))
    machine.write("etc/casync-updater/demo.json", json.dumps([entry]))
    machine.run("systemctl", "enable", "--now", UNIT)
    machine.wait(lambda: device.exists("/root/old-works"), "the old service's work")


@pytest.mark.long
@pytest.mark.parametrize("release", RELEASES)
def test_an_old_installation_is_taken_over(
    release: str, repository: Repository, newer_packages: list[Path], tmp_path: Path
) -> None:
    """The old service runs; then: installed, upgraded, removed, purged, installed again."""
    project = Project(tmp_path / "project")
    project.publish("one")
    with (
        booted(release, repository, tmp_path) as device,
        serve(device.machine.host, {"web": project.www}) as server,
    ):
        machine = device.machine
        entry: dict[str, object] = {
            "interval": 1000,
            "srcIndex": f"{server}/web/demo.caidx",
            "srcStore": f"{server}/web/demo.castr",
            "dstPath": "/srv/demo",
            "triggers": [{"paths": ["."], "actions": ["./act.sh"]}],
        }
        install_old(device, entry)
        before = (machine.root / "etc/casync-updater/demo.json").read_bytes()

        said = device.install("casync-updater")

        assert "stopping the service of the old installation" in said
        assert "client.json.set-aside" in said
        assert "rm -r /opt/casync-updater" in said
        assert "client.json.set-aside" in machine.output("journalctl", "-t", "casync-updater")
        assert machine.output("pgrep", "-x", "node|nodejs") == ""
        assert_new_service_runs(device)
        assert not device.exists("/etc/casync-updater/client.json")
        assert device.exists("/etc/casync-updater/client.json.set-aside")
        assert (machine.root / "etc/casync-updater/demo.json").read_bytes() == before
        machine.wait(lambda: device.exists("/srv/demo/version"), "the user's entry")
        machine.wait(lambda: device.exists("/root/acted"), "the user's relative action")
        assert machine.output("cat", "/root/acted") == "/opt/casync-updater"

        drop_in = "/etc/casync-updater/casync-updater.conf.d/old-installation.conf"
        machine.run("rm", drop_in)
        repository.publish(newer_packages)
        device.install("casync-updater")
        assert_new_service_runs(device)
        assert not device.exists(drop_in), "what the administrator removed came back"

        machine.run("apt-get", "-y", "remove", "casync-updater")
        assert not device.active()
        purged = machine.run("apt-get", "-y", "purge", "casync-updater").stdout
        assert "rm -r /opt/casync-updater" in purged
        assert device.exists("/opt/casync-updater/act.sh")
        assert not device.exists("/lib/systemd/system/casync-updater.service")
        assert device.exists("/srv/demo/version")

        device.install("casync-updater")
        assert_new_service_runs(device)
        assert device.exists(drop_in)
        machine.reboot()
        assert_new_service_runs(device)


def assert_new_service_runs(device: Device) -> None:
    assert device.active(), device.journal()
    assert "/usr/bin/casync-updater" in device.property("ExecStart")
    assert device.machine.output("systemctl", "is-enabled", UNIT) == "enabled"


@pytest.mark.parametrize("release", RELEASE_MARKS)
def test_installed_into_an_image(release: str, repository: Repository, tmp_path: Path) -> None:
    """No systemd runs, policy-rc.d forbids services, resolv.conf is read-only; then it boots."""
    with Machine(release, tmp_path / "root") as machine:
        machine.write("usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", mode=0o755)
        read_only = ["--bind-ro=/etc/resolv.conf"]
        with serve_packages("127.0.0.1", repository) as server:
            configure_apt(machine, server, repository)
            machine.chroot("apt-get", "-qq", "update", options=read_only)
            machine.chroot("apt-get", "install", "-y", "casync-updater", options=read_only)
        machine.boot()
        assert Device(machine).active()
        assert machine.output("systemctl", "--failed", "--no-legend") == ""


@pytest.mark.long
@pytest.mark.parametrize(
    ("volatile", "destination", "atomic"),
    [
        pytest.param("overlay", "/srv/demo", False, id="all in an overlay"),
        pytest.param("state", "/var/demo", True, id="writable var only"),
    ],
)
def test_read_only_root(
    volatile: str, destination: str, atomic: bool, repository: Repository, tmp_path: Path
) -> None:
    """Updates work where there is room to write; what is lost at a power-off comes again."""
    project = Project(tmp_path / "project")
    project.publish("one")
    options = [f"--volatile={volatile}"]
    with Machine("bookworm", tmp_path / "root", options=options) as machine:
        with serve_packages("127.0.0.1", repository) as server:
            configure_apt(machine, server, repository)
            machine.chroot("apt-get", "-qq", "update")
            machine.chroot("apt-get", "install", "-y", "casync-updater")
        # What the image was delivered with: in the overlay's lower layer, out of an exchange's
        # reach; below /var it is hidden.
        machine.write(f"{destination}/version", "delivered")
        machine.boot()
        device = Device(machine)
        assert device.active(), device.journal()
        with serve(machine.host, {"web": project.www}) as server:
            entry = {
                "interval": 1000,
                "srcIndex": f"{server}/web/demo.caidx",
                "srcStore": f"{server}/web/demo.castr",
                "dstPath": destination,
            }
            # On such a system the entries are part of the image.
            machine.poweroff()
            machine.write("etc/casync-updater/demo.json", json.dumps(entry))
            for _ in range(2):
                machine.boot()
                version = ("cat", f"{destination}/version")
                machine.wait(lambda: machine.output(*version) == "one", "an update")  # noqa: B023
                (status,) = json.loads(machine.output("casync-updater", "status", "--json"))[
                    "entries"
                ]
                assert status["atomic"] is atomic
                machine.poweroff()


# What autopkgtest's own does: it kills the test that runs, and has the system rebooted from
# outside. (Not from within: when a shutdown stops and continues all processes, nsenter stops with
# the one that it waits for, and is never continued.)
REBOOT = "#!/bin/sh\nkill -KILL $PPID\n"


@pytest.mark.long
def test_autopkgtest_itself(repository: Repository, tmp_path: Path) -> None:
    """The null server runs debian/tests in this booted system; it cannot reboot it."""
    with booted("bookworm", repository, tmp_path) as device:
        machine = device.machine
        device.install("autopkgtest", "casync-updater", "casync-updater-server")
        shutil.copytree(SOURCE / "debian", machine.root / "root/source/debian")
        done = machine.run(
            *("autopkgtest", "--no-built-binaries", "--test-name=publish-and-update"),
            *("/root/source", "--", "null"),
            check=False,
            timeout=300,
        )
        assert "publish-and-update   PASS" in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.long
def test_the_packages_own_tests(repository: Repository, tmp_path: Path) -> None:
    """debian/tests, run as autopkgtest runs them, with a true reboot in the middle of a cycle."""
    with booted("bookworm", repository, tmp_path) as device:
        machine = device.machine
        device.install("casync-updater", "casync-updater-server")
        shutil.copytree(SOURCE / "debian/tests", machine.root / "root/tests")
        script = 'mkdir -p "$AUTOPKGTEST_TMP"; exec /root/tests/publish-and-update'
        machine.run("env", "AUTOPKGTEST_TMP=/root/work", "sh", "-ec", script)
        machine.run("rm", "/etc/casync-updater/autopkgtest.json")

        machine.run("sh", "-ec", "cat >/tmp/autopkgtest-reboot", stdin=REBOOT)
        machine.run("chmod", "755", "/tmp/autopkgtest-reboot")
        reboot_asked_for = machine.run("/root/tests/reboot-during-update", check=False)
        assert reboot_asked_for.returncode == -signal.SIGKILL, reboot_asked_for.stderr
        machine.reboot()
        script = "exec /root/tests/reboot-during-update"
        machine.run("env", "AUTOPKGTEST_REBOOT_MARK=rebooted", "sh", "-ec", script)


def test_the_build_is_reproducible(packages: list[Path], tmp_path: Path) -> None:
    """Another folder, another time and another umask give the same bytes."""
    time.sleep(1.1)
    again = build(tmp_path / "elsewhere" / "again", umask=0o002)
    assert [file.name for file in again] == [file.name for file in packages]
    for one, two in zip(packages, again, strict=True):
        assert digest(one) == digest(two), one.name


@pytest.mark.long
@pytest.mark.parametrize("release", RELEASES)
def test_make_deb_on_a_fresh_machine(
    release: str, repository: Repository, newer_packages: list[Path], tmp_path: Path
) -> None:
    """With apt alone; that release's lintian is content, and so is its dpkg with an upgrade."""
    with booted(release, repository, tmp_path) as device:
        machine = device.machine
        device.install("--no-install-recommends", "make")
        ignored = shutil.ignore_patterns("build", ".git", ".*_cache", "__pycache__", "*.egg-info")
        shutil.copytree(SOURCE, machine.root / "root/tree", ignore=ignored, symlinks=True)
        make = "cd /root/tree && DEB_BUILD_OPTIONS=nocheck make deb"
        machine.run("sh", "-ec", make, timeout=900)
        built = sorted((machine.root / "root/tree/build/deb").glob("*.deb"))
        assert len(built) == 3
        lintian = (
            "lintian --pedantic --allow-root --tag-display-limit=0 /root/tree/build/deb/*.changes"
        )
        said = machine.run("sh", "-ec", lintian, check=False, timeout=300)
        assert (said.returncode, said.stdout) == (0, ""), said.stdout + said.stderr
        # From a package built here to one built on this machine, perhaps of another release.
        machine.run("sh", "-ec", "apt-get install -y /root/tree/build/deb/*.deb", timeout=300)
        assert device.active(), device.journal()
        repository.publish(newer_packages)
        device.install("casync-updater")
        assert device.version() == NEWER
        assert device.active(), device.journal()


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_lintian_has_nothing_to_say(packages: list[Path]) -> None:
    """Not even pedantically; overrides have their reasons beside them."""
    done = subprocess.run(
        [
            *("lintian", "--pedantic", "--display-info", "--allow-root", "--tag-display-limit=0"),
            *map(str, packages),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_sandbox_has_no_new_holes() -> None:
    """The exposure that systemd finds without running it is what the unit's comment quotes."""
    unit = SOURCE / "debian/casync-updater.service"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=42", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout.splitlines()[-1]

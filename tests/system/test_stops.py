"""Stops, reboots and cuts of the installed service, in the middle of each of its steps."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.client import Site
from support.webserver import WebServer
from system.nspawn import Machine
from system.repository import Repository, configure_apt, serve_packages

pytestmark = pytest.mark.system

UNIT = "casync-updater"


class Lab:
    """A booted device with the package, and what its tests publish."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self._folder = folder

    def entry(self, name: str, server: WebServer, **keys: Any) -> dict[str, Any]:
        """Configure an entry, and let the daemon take it."""
        entry = {
            "interval": 3_600_000,
            "srcIndex": f"{server.url}/tree.caidx",
            "srcStore": f"{server.url}/store.castr",
            "dstPath": f"/srv/{name}",
            **keys,
        }
        self.machine.write(f"etc/casync-updater/{name}.json", json.dumps(entry))
        self.machine.run("systemctl", "reload-or-restart", UNIT)
        return entry

    def forget(self, name: str) -> None:
        (self.machine.root / f"etc/casync-updater/{name}.json").unlink()
        self.machine.run("systemctl", "restart", UNIT)

    def site(self, name: str) -> Site:
        return Site(self._folder / name)

    def log(self, name: str) -> list[str]:
        file = self.machine.root / f"root/{name}.log"
        return file.read_text().splitlines() if file.exists() else []

    def text(self, name: str, file: str = "version") -> str | None:
        path = self.machine.root / f"srv/{name}/{file}"
        return path.read_text() if path.exists() else None

    def state(self, name: str) -> dict[str, Any]:
        file = self.machine.root / f"var/lib/casync-updater/{name}/state.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def idle(self, name: str, version: str) -> bool:
        """The version is installed, and nothing is left to do."""
        state = self.state(name)
        return (
            (state.get("installed") or {}).get("version") == version
            and not state["pending"]
            and state["journal"] is None
            and state["trial"] is None
        )

    def wait(self, condition: Any, what: str) -> None:
        try:
            self.machine.wait(condition, what, timeout=120)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.journal()[-4000:]}") from None

    def journal(self) -> str:
        return self.machine.output("journalctl", "--output=cat", "--boot=all", "--unit", UNIT)

    def trigger(self) -> None:
        """Let the daemon look for updates now."""
        self.machine.run("systemctl", "restart", UNIT)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, packages: list[Path]) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("stops")
    repository = Repository(folder / "repository")
    repository.publish(packages)
    with Machine("bookworm", folder / "root") as machine:
        machine.boot()
        with serve_packages(machine.host, repository) as server:
            configure_apt(machine, server, repository)
            machine.run("apt-get", "-qq", "update")
            install = ("apt-get", "install", "-y", "--no-install-recommends", "casync-updater")
            machine.run(*install, timeout=600)
        yield Lab(machine, folder)


def published(site: Site, version: str, size: int = 0) -> None:
    site.write("version", version)
    if size:
        site.write("large", random.Random(version).randbytes(size))
    site.publish(version=version)


@pytest.mark.parametrize("verb", ["stop", "restart"])
def test_stopped_while_it_builds(lab: Lab, verb: str) -> None:
    """It ends at once, and goes on where it was: nothing but what was in flight comes twice."""
    name = f"building-{verb}"
    site = lab.site(name)
    published(site, "1.0", 12_000_000)
    with WebServer(site.root, host=lab.machine.host) as server:
        server.fail("*.cacnk", delay=0.4)
        lab.entry(name, server)
        lab.wait(lambda: len(server.paths("*.cacnk")) >= 25, "the middle of the fetch")
        lab.machine.run("systemctl", verb, UNIT)
        if verb == "stop":
            assert lab.text(name) is None
            assert "stopping" in lab.journal()
            lab.machine.run("systemctl", "start", UNIT)
        server.heal()
        lab.wait(lambda: lab.idle(name, "1.0"), "the update")
        fetched = server.paths("*.cacnk")
        assert len(fetched) - len(set(fetched)) <= 32
    lab.forget(name)


@pytest.mark.long
def test_stopped_at_any_moment(lab: Lab) -> None:
    """Whatever is cut short, a commit included: one version, and each action once."""
    name = "any-moment"
    site = lab.site(name)
    published(site, "1.0", 1_000_000)
    chance = random.Random(3)
    with WebServer(site.root, host=lab.machine.host) as server:
        note = 'echo "$CASYNC_UPDATER_NEW_VERSION" >> /root/any-moment.log'
        lab.entry(name, server, triggers=[{"paths": ["version"], "actions": [note]}])
        lab.wait(lambda: lab.idle(name, "1.0"), "the first version")
        expected = ["1.0"]
        for number in range(2, 7):
            version = f"{number}.0"
            published(site, version, 1_000_000)
            expected.append(version)
            lab.trigger()
            time.sleep(chance.uniform(0.1, 1.5))
            lab.machine.run("systemctl", "stop", UNIT)
            assert lab.text(name) in expected[-2:]
            lab.machine.run("systemctl", "start", UNIT)
            lab.wait(lambda wanted=version: lab.idle(name, wanted), version)
            assert lab.log(name) == expected
    lab.forget(name)


def test_stopped_while_an_action_runs(lab: Lab) -> None:
    """It goes on in a unit of its own, is collected afterwards, and the next one follows it."""
    name = "acting"
    site = lab.site(name)
    published(site, "1.0")
    with WebServer(site.root, host=lab.machine.host) as server:
        slow = f"echo begin >> /root/{name}.log; sleep 8; echo end >> /root/{name}.log"
        after = f"echo after >> /root/{name}.log"
        lab.entry(name, server, triggers=[{"paths": ["."], "actions": [slow, after]}])
        lab.wait(lambda: lab.log(name) == ["begin"], "the action")
        lab.machine.run("systemctl", "stop", UNIT)
        assert lab.log(name) == ["begin"]
        assert len(lab.state(name)["pending"]) == 2
        lab.machine.run("systemctl", "start", UNIT)
        lab.wait(lambda: lab.idle(name, "1.0"), "the end of the actions")
        assert lab.log(name) == ["begin", "end", "after"]
    lab.forget(name)


def test_an_action_that_restarts_the_updater(lab: Lab) -> None:
    name = "restarting"
    site = lab.site(name)
    published(site, "1.0")
    with WebServer(site.root, host=lab.machine.host) as server:
        restart = f"echo restart >> /root/{name}.log; systemctl restart casync-updater"
        after = f"echo after >> /root/{name}.log"
        before = lab.machine.output("systemctl", "show", "--value", "--property=MainPID", UNIT)
        lab.entry(name, server, triggers=[{"paths": ["."], "actions": [restart, after]}])
        lab.wait(lambda: lab.idle(name, "1.0"), "the end of the actions")
        now = lab.machine.output("systemctl", "show", "--value", "--property=MainPID", UNIT)
        assert now not in (before, "0")
        assert lab.log(name) == ["restart", "after"]
    lab.forget(name)


def test_stopped_while_a_health_check_runs(lab: Lab) -> None:
    """An orderly stop is not the version's fault; the check is collected, not begun again."""
    name = "examined"
    site = lab.site(name)
    published(site, "1.0")
    with WebServer(site.root, host=lab.machine.host) as server:
        check = f"echo begin >> /root/{name}.log; sleep 8; echo end >> /root/{name}.log"
        lab.entry(name, server, healthCheck=[check])
        lab.wait(lambda: lab.log(name) == ["begin"], "the health check")
        lab.machine.run("systemctl", "stop", UNIT)
        assert lab.log(name) == ["begin"]
        lab.machine.run("systemctl", "start", UNIT)
        lab.wait(lambda: lab.idle(name, "1.0"), "the end of the health check")
        assert lab.log(name) == ["begin", "end"]
    lab.forget(name)


def inhibitors(lab: Lab) -> str:
    return lab.machine.output("systemd-inhibit", "--list", "--no-legend", "--no-pager")


def test_stopped_while_it_updates_in_place(lab: Lab) -> None:
    """It comes to its end first, longer than the unit has for a stop, and holds off a shutdown."""
    name = "in-place"
    site = lab.site(name)
    published(site, "1.0", 150_000_000)
    drop_in = f"etc/systemd/system/{UNIT}.service.d/impatient.conf"
    lab.machine.write(drop_in, "[Service]\nTimeoutStopSec=1s\n")
    lab.machine.run("systemctl", "daemon-reload")
    try:
        with WebServer(site.root, host=lab.machine.host) as server:
            lab.entry(name, server, apply="in-place")
            lab.machine.wait(
                lambda: "/srv/in-place is being updated" in inhibitors(lab),
                "the inhibitor",
                timeout=180,
                step=0.02,
            )
            assert "block" in inhibitors(lab)
            lab.machine.run("systemctl", "stop", UNIT)
            assert lab.idle(name, "1.0")
            assert inhibitors(lab) == ""
            large = lab.machine.root / "srv/in-place/large"
            assert large.read_bytes() == (site.source / "large").read_bytes()
            assert "ended by signal" not in lab.journal()
    finally:
        (lab.machine.root / drop_in).unlink()
        lab.machine.run("systemctl", "daemon-reload")
    lab.forget(name)


@pytest.mark.long
@pytest.mark.parametrize("how", ["reboot", "poweroff"])
def test_an_orderly_end_while_an_action_runs(lab: Lab, how: str) -> None:
    """It is done, whether it came to its own end or not; what follows it is not forgotten."""
    name = f"ended-by-{how}"
    site = lab.site(name)
    published(site, "1.0")
    with WebServer(site.root, host=lab.machine.host) as server:
        slow = f"echo begin >> /root/{name}.log; sleep 600; echo end >> /root/{name}.log"
        after = f"echo after >> /root/{name}.log"
        lab.entry(name, server, triggers=[{"paths": ["."], "actions": [slow, after]}])
        lab.wait(lambda: lab.log(name) == ["begin"], "the action")
        if how == "reboot":
            lab.machine.reboot()
        else:
            lab.machine.poweroff()
            lab.machine.boot()
        lab.wait(lambda: lab.idle(name, "1.0"), "the end of the actions")
        assert lab.log(name) == ["begin", "after"]
    lab.forget(name)


@pytest.mark.long
def test_an_action_that_powers_the_device_off(lab: Lab) -> None:
    name = "switched-off"
    site = lab.site(name)
    published(site, "1.0")
    with WebServer(site.root, host=lab.machine.host) as server:
        off = f"echo off >> /root/{name}.log; systemctl poweroff; sleep 600"
        after = f"echo after >> /root/{name}.log"
        lab.entry(name, server, triggers=[{"paths": ["."], "actions": [off, after]}])
        lab.wait(lambda: lab.log(name) == ["off"], "the action")
        lab.machine.poweroff()  # it does so itself
        lab.machine.boot()
        lab.wait(lambda: lab.idle(name, "1.0"), "the end of the actions")
        assert lab.log(name) == ["off", "after"]
    lab.forget(name)


@pytest.mark.long
def test_cut_off_while_an_action_runs(lab: Lab) -> None:
    """Nobody was told to stop, so nobody knows how far it came: it runs again."""
    name = "cut-off"
    site = lab.site(name)
    published(site, "1.0")
    with WebServer(site.root, host=lab.machine.host) as server:
        slow = f"echo begin >> /root/{name}.log; sleep 8; echo end >> /root/{name}.log"
        after = f"echo after >> /root/{name}.log"
        lab.entry(name, server, triggers=[{"paths": ["."], "actions": [slow, after]}])
        lab.wait(lambda: lab.log(name) == ["begin"], "the action")
        lab.machine.kill()
        lab.machine.boot()
        lab.wait(lambda: lab.idle(name, "1.0"), "the end of the actions")
        assert lab.log(name) == ["begin", "begin", "end", "after"]
        assert "was cut off: it runs again" in lab.journal()
    lab.forget(name)


@pytest.mark.long
def test_a_version_that_hangs_the_device_goes_back(lab: Lab) -> None:
    """The second health check that a cut ends counts as failed."""
    name = "hanging"
    site = lab.site(name)
    published(site, "1.0")
    with WebServer(site.root, host=lab.machine.host) as server:
        check = f"echo check >> /root/{name}.log; ! grep 2.0 /srv/{name}/version || sleep 600"
        lab.entry(name, server, healthCheck=[check])
        lab.wait(lambda: lab.idle(name, "1.0"), "the first version")
        published(site, "2.0")
        lab.trigger()
        for checks in (2, 3):
            lab.wait(lambda wanted=checks: len(lab.log(name)) == wanted, "the health check")
            assert lab.text(name) == "2.0"
            lab.machine.kill()
            lab.machine.boot()
        lab.wait(lambda: lab.idle(name, "1.0"), "the version before")
        assert len(lab.log(name)) == 3
        assert lab.text(name) == "1.0"
        assert "its health check was cut off 2 times" in lab.journal()
    lab.forget(name)

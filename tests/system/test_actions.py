"""Actions as transient units, under a real systemd, from within the service's sandbox."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from system.nspawn import Machine
from system.repository import Repository, configure_apt, serve_packages

pytestmark = pytest.mark.system

DRIVER = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from casync_updater.clock import SystemClock
from casync_updater.tools.actions import Action, Handle, UnitRunner, action_runner

runner = action_runner(Path("/var/lib/casync-updater/$x %n/actions"), SystemClock(), print)
assert isinstance(runner, UnitRunner)
what, name, *rest = sys.argv[1:]
if what == "start":
    command, timeout = rest
    limit = float(timeout) if timeout else None
    env = {"CASYNC_UPDATER_ENTRY": "it's $HOME %n\\nagain"}
    runner.start(Action(name, "web", command, Path("/srv"), limit, env))
handle = runner.find(name)
if what == "forget":
    runner.forget(handle.id)
    result = None
else:
    result = runner.collect(handle, float(rest[-1]) if what == "collect" else 30.0)
print(json.dumps(None if result is None else asdict(result)))
"""


class Bench:
    """A machine on which actions are run, each call in a process of its own."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.write("opt/driver.py", DRIVER)
        text = machine.output("cat", "/usr/lib/systemd/system/casync-updater.service")
        hardening = ("Capability", "NoNew", "Protect", "Restrict", "SystemCall", "Memory", "Lock")
        lines = [line for line in text.splitlines() if line.startswith(hardening)]
        assert len(lines) > 10
        self.sandbox = [f"--property={line}" for line in lines]

    def call(self, *arguments: str) -> dict[str, Any] | None:
        output = self.machine.output(
            *("systemd-run", "--quiet", "--pipe", "--wait", "--unit=updater", "--collect"),
            *self.sandbox,
            *("python3", "/opt/driver.py", *arguments),
        )
        found: dict[str, Any] | None = json.loads(output.splitlines()[-1])
        return found

    def run(self, name: str, command: str, timeout: str = "") -> dict[str, Any]:
        result = self.call("start", name, command, timeout)
        assert result is not None
        return result

    def units(self) -> str:
        pattern = "casync-updater-action-*"
        return self.machine.output(
            "systemctl", "list-units", "--all", "--plain", "--no-legend", pattern
        )

    def alive(self, mark: str) -> bool:
        """True while a process has this word on its command line."""
        script = f"cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c '[s]leep {mark}'"
        return self.machine.run("sh", "-c", script, check=False).stdout.strip() != "0"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, packages: list[Path]) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("actions")
    repository = Repository(folder / "repository")
    repository.publish(packages)
    with Machine("bookworm", folder / "root") as machine:
        machine.boot()
        with serve_packages(machine.host, repository) as server:
            configure_apt(machine, server, repository)
            machine.run("apt-get", "-qq", "update")
            machine.run("apt-get", "install", "-y", "--no-install-recommends", "casync-updater")
        machine.run("systemctl", "stop", "casync-updater")
        yield Bench(machine)


def test_results_and_the_journal(bench: Bench) -> None:
    result = bench.run("plain", '[[ $PWD == /srv ]] && printf "%s\\n" "$CASYNC_UPDATER_ENTRY"')
    assert result["code"] == 0
    assert bench.run("fails", "exit 3")["code"] == 3
    assert bench.run("killed", "kill -9 $PPID")["signal"] == 9
    journal = bench.machine.output("journalctl", "--output=cat", "CASYNC_UPDATER_ENTRY=web")
    assert "it's $HOME %n\nagain" in journal
    for name in ("plain", "fails", "killed"):
        bench.call("forget", name)
    assert bench.units() == ""


def test_a_time_out_ends_the_whole_control_group(bench: Bench) -> None:
    command = "(trap '' TERM; setsid sleep 7001) & sleep 7001"
    assert bench.run("slow", command, "1")["timed_out"]
    assert not bench.alive("7001")
    bench.call("forget", "slow")
    assert bench.units() == ""


def test_what_is_left_in_the_background_lives_on(bench: Bench) -> None:
    result = bench.run("leaves", "sleep 7002 & setsid sleep 7002 & echo up; exit 1", "5")
    assert result["code"] == 1
    bench.call("forget", "leaves")
    bench.machine.run("sleep", "6")
    assert bench.alive("7002")
    assert "casync-updater-action-leaves" in bench.units()
    bench.machine.run("systemctl", "kill", "casync-updater-action-leaves-*")
    bench.machine.wait(lambda: not bench.alive("7002"), "the end of it")
    bench.run("next", "true")
    bench.call("forget", "next")
    assert bench.units() == ""


def test_an_action_may_stop_its_updater_and_is_collected_later(bench: Bench) -> None:
    command = "systemctl stop updater; sleep 1; touch /srv/survived; exit 5"
    with pytest.raises((AssertionError, IndexError)):
        bench.call("start", "stopper", command, "")
    assert bench.call("collect", "stopper", "0") is None
    result = bench.call("collect", "stopper", "20")
    assert result is not None
    assert result["code"] == 5
    assert bench.machine.output("ls", "/srv") == "survived"
    again = bench.call("collect", "stopper", "0")
    assert again is not None
    assert again["code"] == 5
    bench.call("forget", "stopper")
    assert bench.units() == ""

"""Actions that end the system that runs them, on a machine with a kernel of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.client import Site
from support.webserver import WebServer
from system.vm import System, VirtualMachine

pytestmark = [pytest.mark.system, pytest.mark.long]

UNIT = "casync-updater.service"


def test_an_action_that_reboots(appliance: System, tmp_path: Path) -> None:
    """As after a new kernel: it ran once, what follows it runs after the boot, and so on."""
    site = Site(tmp_path / "site")
    with VirtualMachine(appliance, tmp_path / "vm") as machine:
        machine.boot()
        with WebServer(site.root, host=machine.host) as server:

            def log() -> list[str]:
                return machine.output("cat", "/root/log").splitlines()

            note = "echo {} $CASYNC_UPDATER_NEW_VERSION >> /root/log"
            for number, command in enumerate(("reboot", "systemctl reboot; sleep 600"), 1):
                version = f"{number}.0"
                site.write("version", version)
                site.publish(version=version)
                entry = {
                    "interval": 3_600_000,
                    "srcIndex": f"{server.url}/tree.caidx",
                    "srcStore": f"{server.url}/store.castr",
                    "dstPath": "/srv/tree",
                    "triggers": [
                        {
                            "paths": ["."],
                            "actions": [
                                f"{note.format('before')}; {command}",
                                note.format("after"),
                            ],
                        }
                    ],
                }
                machine.write("/etc/casync-updater/tree.json", json.dumps(entry))
                machine.run("systemctl", "restart", UNIT)
                machine.went_off(timeout=600)
                machine.boot()
                expected = [
                    f"{word} {one}.0"
                    for one in range(1, number + 1)
                    for word in ("before", "after")
                ]
                machine.wait(lambda: log()[-1] == expected[-1], "the other action", timeout=600)  # noqa: B023
                assert log() == expected
                assert machine.output("cat", "/srv/tree/version") == version
                machine.wait(lambda: not state(machine)["pending"], "the end", timeout=600)
                assert state(machine)["installed"]["version"] == version
                said = machine.output("journalctl", "--output=cat", "--boot=all", "--unit", UNIT)
                assert "was cut off" not in said


def state(machine: VirtualMachine) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(machine.read("/var/lib/casync-updater/tree/state.json"))
    return found

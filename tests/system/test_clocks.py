"""A device whose clock is wrong, as a Raspberry Pi's is after each power cut.

systemd never shows less than the date of its own build, or of what it noted at the last shutdown:
that is the past all the same, for a release that was made today.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.signed import Publisher, location
from support.world import make_small_tree
from system.repository import serve
from system.vm import System, VirtualMachine

pytestmark = [pytest.mark.system, pytest.mark.long]

UNIT = "casync-updater.service"
MONTH = 30 * 86400.0


def test_the_service_with_a_clock_that_is_behind_ahead_and_set_at_last(
    appliance: System, tmp_path: Path
) -> None:
    publisher, site = Publisher(tmp_path / "publisher"), tmp_path / "site"

    def publish(version: int) -> None:
        tree = make_small_tree(tmp_path / f"tree-{version}", version)
        publisher.publish(site, tree, valid_for=MONTH)

    publish(1)
    with VirtualMachine(appliance, tmp_path / "vm", clock="1970-01-01T00:00:00") as machine:

        def status() -> dict[str, Any]:
            (entry,) = json.loads(machine.run("casync-updater", "status", "--json").stdout)[
                "entries"
            ]
            return dict(entry)

        def wait(condition: Callable[[], object], what: str) -> None:
            machine.wait(condition, what, timeout=900, step=1)

        def installed(version: int) -> bool:
            return machine.output("cat", "/srv/demo/version") == str(version)

        def set_clock() -> None:
            machine.run("date", "--set", f"@{int(time.time())}")

        machine.boot(timeout=900)
        assert int(machine.output("date", "+%s")) < time.time() - MONTH
        with serve(machine.host, {"web": site}) as server:
            place = location(f"{server}/web")
            entry = {
                "interval": 2000,
                "srcIndex": place.index,
                "srcStore": place.store,
                "dstPath": "/srv/demo",
                "project": "tree",
                "signedBy": "/etc/casync-updater/publisher.gpg",
            }
            keyring = publisher.keys.keyring.read_bytes()
            machine.write("etc/casync-updater/publisher.gpg", keyring)
            machine.write("etc/casync-updater/demo.json", json.dumps(entry))
            machine.run("systemctl", "reload", UNIT)
            wait(lambda: installed(1), "an update although the clock is behind")
            wait(lambda: "Valid-Until" in (status()["lastError"] or ""), "a word on the clock")

            set_clock()
            wait(lambda: status()["lastError"] is None, "the clock to be believed")
            publish(2)
            wait(lambda: installed(2), "an update after the clock was set")
            assert machine.output("systemctl", "show", "--value", "-p", "NRestarts", UNIT) == "0"

            machine.poweroff()
            machine.clock = "2040-01-01T00:00:00"
            publish(3)
            machine.boot(timeout=900)
            wait(lambda: (status()["refused"] or {}).get("check") == "expiry", "the refusal")
            assert machine.run("casync-updater", "update", check=False).returncode == 4
            assert installed(2)

            set_clock()
            wait(lambda: installed(3), "an update after the clock was set back")
            wait(lambda: status()["refused"] is None, "the refusal's end")
            assert machine.output("systemctl", "is-active", UNIT) == "active"

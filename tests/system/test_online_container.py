"""The installed package in a booted system: its cable is pulled, and plugged in again."""

import json
import time
from pathlib import Path

import pytest

from system.repository import Repository, serve
from system.test_package import RELEASE_MARKS, UNIT, Project, booted

pytestmark = pytest.mark.system


@pytest.mark.parametrize("release", RELEASE_MARKS)
def test_an_update_arrives_with_the_cable(
    release: str, repository: Repository, tmp_path: Path
) -> None:
    """systemd-networkd takes the address away with the carrier, and sets it again."""
    project = Project(tmp_path / "project")
    project.publish("one")
    with booted(release, repository, tmp_path) as device:
        machine = device.machine
        machine.write(
            "etc/casync-updater/casync-updater.conf.d/test.conf",
            "[online]\nmin_age = 0\nsplay = 0\n",
        )
        device.install("casync-updater")
        with serve(machine.host, {"web": project.www}) as server:
            entry = {
                "interval": 3600000,
                "srcIndex": f"{server}/web/demo.caidx",
                "srcStore": f"{server}/web/demo.castr",
                "dstPath": "/srv/demo",
            }
            machine.write("etc/casync-updater/demo.json", json.dumps(entry))
            machine.run("systemctl", "reload", UNIT)
            file = machine.root / "srv/demo/version"
            machine.wait(lambda: file.exists() and file.read_text() == "one", "the first version")

            def online() -> tuple[str, str, str]:
                found = json.loads(machine.output("casync-updater", "status", "--json"))
                if not (found["online"] or {}).get("hosts"):
                    return "", "", ""  # the daemon says so at most once a second
                (host,), (entry,) = found["online"]["hosts"], found["entries"]
                return host["state"], entry["state"], entry["reason"]

            machine.wait(lambda: online() == ("online", "idle", "online"), "the start to be over")
            machine.link(up=False)
            machine.wait(lambda: online()[0] == "offline", "the daemon to notice")
            project.publish("two")
            time.sleep(1)
            assert file.read_text() == "one"
            plugged = time.monotonic()
            machine.link(up=True)
            machine.wait(lambda: file.read_text() == "two", "the update", timeout=10, step=0.02)
            print(f"\n{release}: installed {time.monotonic() - plugged:.2f} s after the cable")
            machine.wait(lambda: online() == ("online", "idle", "online"), "the cycle's end")
            reason = machine.output(
                *("journalctl", "--no-pager", "--output=cat", f"--unit={UNIT}"),
                "CASYNC_UPDATER_REASON=online",
            )
            assert reason.splitlines()[-1] == "demo: updated to " + version(project) + " (online)"
            assert f"host {machine.host}: online" in machine.output("casync-updater", "online")


def version(project: Project) -> str:
    """What the newest release calls itself."""
    lines = (project.www / "demo.caidx.release").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith("Version: "))
    return found.removeprefix("Version: ")

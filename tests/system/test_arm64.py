"""The packages on arm64, the architecture of a Raspberry Pi, whose programs are emulated here.

What takes long is the base system, once a week: many minutes.
"""

import json
from pathlib import Path

import pytest

from support.signed import Publisher, location
from support.trees import snapshot
from support.world import make_small_tree
from system.emulation import emulated
from system.nspawn import Machine
from system.repository import serve
from system.vm import VirtualMachine, make_system, virtual_base

# One after the other: emulation is set for the whole machine.
pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.xdist_group("arm64")]

ARCHITECTURE, MACHINE = "arm64", "aarch64"
UNIT = "casync-updater.service"
# Emulated package scripts take their time, so Debian's own packages are part of the base system.
# Were one missing here, dpkg would not configure the packages of this tree.
DEPENDENCIES = (
    *("ca-certificates", "casync", "gpg", "gpg-agent", "gpgv", "python3", "python3-configobj"),
    *("python3-debian", "python3-icmplib", "python3-netifaces", "python3-requests"),
    *("python3-systemd", "python3-tqdm", "python3-zstandard"),
)
SLOW = 1800


@pytest.fixture
def tar() -> Path:
    return virtual_base("bookworm", ARCHITECTURE, packages=DEPENDENCIES)


def test_a_publication_and_an_update(tar: Path, packages: list[Path], tmp_path: Path) -> None:
    """Publisher and client in a root file system: installed, used, used for a second version."""
    with emulated(ARCHITECTURE), Machine("bookworm", tmp_path / "root", tar=tar) as machine:
        assert machine.chroot("uname", "-m").startswith(f"{MACHINE}\n")
        for package in packages:
            machine.write(f"root/{package.name}", package.read_bytes())
        machine.chroot("sh", "-c", "dpkg --install /root/*.deb", timeout=SLOW)

        published = location("/srv/www")
        publication = {
            "index": published.index,
            "store": published.store,
            "source": "/srv/source",
        }
        machine.write("root/publication.json", json.dumps(publication))
        (machine.root / "srv/www").mkdir()
        with serve("127.0.0.1", {"web": machine.root / "srv/www"}) as server:
            place = location(f"{server}/web")
            entry = {
                "interval": 60_000,
                "srcIndex": place.index,
                "srcStore": place.store,
                "dstPath": "/srv/demo",
                "triggers": [{"paths": ["version"], "actions": ["cat /srv/demo/version >>/acted"]}],
            }
            machine.write("etc/casync-updater/demo.json", json.dumps(entry))
            for version in (1, 2):
                source = make_small_tree(tmp_path / f"tree-{version}", version)
                source.rename(machine.root / "srv/source")
                machine.chroot("casync-updater-server", "/root/publication.json", timeout=SLOW)
                machine.chroot("casync-updater", "update", timeout=SLOW)
                source = (machine.root / "srv/source").rename(tmp_path / f"tree-{version}")
                assert snapshot(machine.root / "srv/demo") == snapshot(source)
        assert (machine.root / "acted").read_text() == "12"
        machine.chroot("casync-updater", "verify", "demo", timeout=SLOW)


def test_an_appliance(tar: Path, packages: list[Path], tmp_path: Path) -> None:
    """The package is installed in a booted system; its service updates an entry, and again."""
    with Machine("bookworm", tmp_path / "root", tar=tar) as tree:
        for package in packages:
            if "-server_" not in package.name:
                tree.write(f"root/{package.name}", package.read_bytes())
        system = make_system(tree.root, tmp_path / "disk", "bookworm", ARCHITECTURE)
    publisher = Publisher(tmp_path / "publisher")
    site = tmp_path / "site"
    with VirtualMachine(system, tmp_path / "vm", memory=1024) as machine:
        machine.boot(timeout=SLOW)
        assert machine.output("uname", "-m") == MACHINE
        machine.run("sh", "-c", "dpkg --install /root/*.deb", timeout=SLOW)
        assert machine.output("systemctl", "is-active", UNIT) == "active"

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
            for version in (1, 2):
                publisher.publish(site, make_small_tree(tmp_path / f"tree-{version}", version))
                if version == 1:
                    machine.run("systemctl", "reload", UNIT)
                machine.wait(
                    lambda: machine.output("cat", "/srv/demo/version") == str(version),  # noqa: B023
                    f"version {version}",
                    timeout=SLOW,
                    step=2,
                )
        machine.run("casync-updater", "verify", "demo", timeout=SLOW)
        assert machine.output("readlink", "/srv/demo/link") == "file-2"
        assert machine.output("systemctl", "show", "--value", "-p", "NRestarts", UNIT) == "0"
        machine.poweroff(timeout=SLOW)

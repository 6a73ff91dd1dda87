"""The packages on arm64, the architecture of a Raspberry Pi, whose programs are emulated here.

Measured on 2 cores that many others used: XXX.
"""

import json
from pathlib import Path

import pytest

from support.signed import Publisher, location
from support.trees import snapshot
from support.world import make_small_tree
from system.emulation import emulated
from system.nspawn import Machine
from system.repository import Repository, configure_apt, serve, serve_packages
from system.vm import VirtualMachine, make_system, virtual_base

# One after the other: emulation is set for the whole machine.
pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.xdist_group("arm64")]

UNIT = "casync-updater.service"


def test_a_publication_and_an_update(repository: Repository, tmp_path: Path) -> None:
    """Both packages and all that they need are installed, used, and used for a second version."""
    tar = virtual_base("bookworm", "arm64")
    with emulated("arm64"), Machine("bookworm", tmp_path / "root", tar=tar) as machine:
        with serve_packages("127.0.0.1", repository) as server:
            configure_apt(machine, server, repository)
            machine.chroot("apt-get", "-qq", "update", timeout=900)
            names = ("casync-updater", "casync-updater-server")
            machine.chroot("apt-get", "install", "-y", *names, timeout=1800)
        assert machine.chroot("uname", "-m") == "aarch64\n"

        published = location("/srv/www")
        publication = {
            "index": published.index,
            "store": published.store,
            "source": "/srv/source",
        }
        machine.write("root/publication.json", json.dumps(publication))
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
                machine.chroot("casync-updater-server", "/root/publication.json")
                machine.chroot("casync-updater", "update")
                source = (machine.root / "srv/source").rename(tmp_path / f"tree-{version}")
                assert snapshot(machine.root / "srv/demo") == snapshot(source)
        assert (machine.root / "acted").read_text() == "12"
        machine.chroot("casync-updater", "verify", "demo")


def test_an_appliance(repository: Repository, tmp_path: Path) -> None:
    """The package is installed in a booted system; its service updates an entry, and again."""
    tar = virtual_base("bookworm", "arm64")
    with Machine("bookworm", tmp_path / "root", tar=tar) as tree:
        system = make_system(tree.root, tmp_path / "disk", "bookworm", "arm64")
    publisher = Publisher(tmp_path / "publisher")
    trees = {version: make_small_tree(tmp_path / f"tree-{version}", version) for version in (1, 2)}
    site = tmp_path / "site"
    publisher.publish(site, trees[1])
    with VirtualMachine(system, tmp_path / "vm", memory=1024) as machine:
        machine.boot(timeout=900)
        with serve_packages(machine.host, repository) as server:
            configure_apt(machine, server, repository)
            machine.run("apt-get", "-qq", "update", timeout=1800)
            machine.run("apt-get", "install", "-y", "casync-updater", timeout=3600)
        assert machine.output("uname", "-m") == "aarch64"
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
            machine.run("systemctl", "reload", UNIT)
            for version in (1, 2):
                expected = str(version)
                file = ("cat", "/srv/demo/version")
                machine.wait(
                    lambda: machine.output(*file) == expected,  # noqa: B023
                    f"version {version}",
                    timeout=600,
                    step=2,
                )
                if version == 1:
                    publisher.publish(site, trees[2])
        machine.run("casync-updater", "verify", "demo")
        assert machine.output("readlink", "/srv/demo/link") == "file-2"
        assert machine.output("systemctl", "show", "--value", "-p", "NRestarts", UNIT) == "0"
        machine.poweroff()

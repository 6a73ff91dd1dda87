"""The examples for authors of images: built as they stand, and booted for the first time."""

import json
import os
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path, PurePosixPath
from random import Random

import pytest

from casync_updater.model import Publication
from casync_updater.server.keygen import keygen
from casync_updater.server.publish import publish
from support.signed import OWNER, PublisherClock, Silent
from support.webserver import WebServer
from system.nspawn import Archive, Machine
from system.repository import SOURCE, Repository, serve_packages
from system.test_package import RELEASE_MARKS, UNIT, Device

pytestmark = pytest.mark.system

SITE = "updates.example"
PAYLOAD = 3_000_000
DIFFERENCE = 300_000
"""More than a changed file costs: the chunks around it, index and release."""


class Author:
    """Somebody who makes an image: their project, their site, and the examples made theirs."""

    def __init__(self, folder: Path) -> None:
        self.examples = folder / "images"
        shutil.copytree(SOURCE / "conf/examples/images", self.examples)
        self.site = folder / "site"
        self.site.mkdir()
        self._source = folder / "project"
        self._source.mkdir()
        (self._source / "payload").write_bytes(Random(9).randbytes(PAYLOAD))
        self._keys = keygen(folder / "keys", OWNER, passphrase=None)
        self._clock = PublisherClock()

    def publish(self, version: str) -> None:
        """Publish a version whose file `version` says so; the payload is always the same."""
        (self._source / "version").write_text(version)
        self._clock.added += 10
        publication = Publication(
            index=self.site / "myproject.caidx",
            store=self.site / "myproject.castr",
            source=self._source,
            project="myproject",
            version=version,
            sign_keys=(str(self._keys.working),),
        )
        publish(publication, self._clock, Silent())

    def personalise(self, site: WebServer, packages: str, repository: Repository) -> None:
        """What the examples ask an author for: two addresses, a key and a keyring."""
        etc = self.examples / "files/etc"
        sources = etc / "apt/sources.list.d/casync-updater.sources"
        text, _, _ = sources.read_text().partition(" -----BEGIN PGP")
        text = _replaced(text, "https://packages.updates.example", f"{packages}/local")
        text = _replaced(text, "Suites: stable", "Suites: local")
        key = (line or "." for line in repository.armored.splitlines())
        sources.write_text(text + "".join(f" {line}\n" for line in key))
        entry = etc / "casync-updater/myproject.json"
        text = _replaced(
            entry.read_text(), "https://updates.example/myproject", f"http://{SITE}:{site.port}"
        )
        text = _replaced(text, "systemctl try-restart myproject", "cat version >/root/acted")
        entry.write_text(_replaced(text, '"paths": ["."]', '"paths": ["version"]'))
        (etc / "casync-updater/keyrings").mkdir()
        shutil.copy(self._keys.keyring, etc / "casync-updater/keyrings/myproject.gpg")
        # The build finds the site here, and the device, by and by, elsewhere.
        (etc / "hosts").write_text(f"127.0.0.1 localhost {SITE}\n")


def _replaced(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize("release", RELEASE_MARKS)
def test_a_plain_mmdebstrap_line(release: str, repository: Repository, tmp_path: Path) -> None:
    author = Author(tmp_path)
    author.publish("1")
    image = tmp_path / "image.tar"
    with WebServer(author.site) as site, serve_packages("127.0.0.1", repository) as packages:
        author.personalise(site, packages, repository)
        mirrors = Archive(f"{packages}/debian", f"{packages}/security").sources(release)
        if Archive.of_this_machine().security is None:
            mirrors = [line for line in mirrors if "/security" not in line]
        _run(author.examples / "mmdebstrap.sh", release, image, *mirrors)
        assert _bytes_sent(site) > PAYLOAD
    assert_nothing_of_the_build_is_in(image, tmp_path)
    assert_first_boot(author, image, release, site.port, tmp_path)


@pytest.mark.long
def test_debos(repository: Repository, tmp_path: Path) -> None:
    author = Author(tmp_path)
    author.publish("1")
    with WebServer(author.site) as site, serve_packages("127.0.0.1", repository) as packages:
        author.personalise(site, packages, repository)
        _run(
            *("debos", "--disable-fakemachine", f"--artifactdir={tmp_path}"),
            *("-t", "suite:bookworm", "-t", "architecture:amd64"),
            *("-t", f"mirror:{packages}/debian", author.examples / "debos.yaml"),
            cwd=tmp_path,  # debos works in a hidden folder where it is called
        )
    image = tmp_path / "myproject-bookworm-amd64.tar.gz"
    assert_nothing_of_the_build_is_in(image, tmp_path)
    assert_first_boot(author, image, "bookworm", site.port, tmp_path)


def assert_nothing_of_the_build_is_in(image: Path, work: Path) -> None:
    """Neither an identity, nor a state, nor a key, nor a name of the machine that built it."""
    known = [
        os.fsencode(work),
        b"PRIVATE KEY-----",
        b"PRIVATE KEY BLOCK-----",
        Path("/etc/machine-id").read_bytes().strip(),
    ]
    if len(socket.gethostname()) > 3:
        known.append(socket.gethostname().encode())
    found: dict[str, bytes] = {}
    with tarfile.open(image) as tar:
        for member in tar:
            path = str(PurePosixPath("/", member.name))
            found[path] = b""
            if member.isreg() and path.startswith(("/etc/", "/root/", "/var/", "/opt/", "/home/")):
                content = tar.extractfile(member)
                assert content is not None
                found[path] = content.read()
                for text in filter(None, known):
                    assert text not in found[path], (path, text)
    assert found["/opt/myproject/version"] == b"1"
    assert found["/etc/machine-id"] in (b"", b"uninitialized\n")
    for path in found:
        assert not path.startswith(("/var/lib/casync-updater/", "/var/cache/casync-updater/"))
        assert "/.myproject.casync-updater" not in path
        assert not path.startswith(("/tmp/", "/var/tmp/", "/root/.gnupg")), path
    for path in ("/etc/hostname", "/var/lib/dbus/machine-id", "/var/lib/systemd/random-seed"):
        assert path not in found


def assert_first_boot(author: Author, image: Path, release: str, port: int, folder: Path) -> None:
    """Two devices of one image: what is in it is current, or a newer version is out."""
    identities = set()
    for name, newest in (("current", "1"), ("behind", "2")):
        if newest != "1":
            author.publish(newest)
        with Machine(release, folder / name, tar=image) as machine:
            machine.write("etc/hosts", f"127.0.0.1 localhost\n{machine.host} {SITE}\n")
            machine.boot()
            device = Device(machine)
            assert device.active(), device.journal()
            with WebServer(author.site, host=machine.host, port=port) as site:
                machine.run("systemctl", "reload", UNIT)
                assert_installed(machine, newest)
                assert _bytes_sent(site) < (DIFFERENCE if newest != "1" else 20_000)
            acted = machine.root / "root/acted"
            assert acted.exists() == (newest != "1"), device.journal()
            assert ("adopted" in device.journal()) == (newest == "1")
            assert machine.output("casync-updater", "verify", "myproject").endswith(f"is {newest}")
            identities.add(machine.output("cat", "/etc/machine-id"))
    assert len(identities) == 2
    assert all(len(identity) == 32 for identity in identities)


def assert_installed(machine: Machine, version: str) -> None:
    def installed() -> bool:
        status = json.loads(machine.output("casync-updater", "status", "--json") or "{}")
        return any(
            entry["installed"]
            and entry["installed"]["version"] == version
            and entry["state"] == "idle"
            for entry in status.get("entries", [])
        )

    machine.wait(installed, f"version {version}", timeout=90)


def _bytes_sent(site: WebServer) -> int:
    return sum(request.sent for request in site.requests)


def _run(*argv: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={"HOME": "/root", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout

"""Drives that are mounted under a running daemon, in a mount namespace of its own."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.client import environment
from support.signed import Publisher, copy
from support.trees import snapshot
from support.webserver import WebServer
from support.world import make_small_tree

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems"),
]
PATIENCE = 120.0


class Lab:
    """A publisher with two projects, and a device whose daemon runs in a mount namespace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.publisher = Publisher(folder / "publisher")
        self.state = folder / "state"
        self.config = folder / "etc"
        self.config.mkdir()
        (self.config / "casync-updater.conf").write_text(
            "[online]\nenabled = no\n[fetch]\nretries = 0\nconnect_timeout = 1\n"
        )
        self.entries: list[dict[str, Any]] = []
        self.process: subprocess.Popen[bytes] | None = None

    def publish(self, project: str, number: int) -> Path:
        """A version of a project; gives the tree."""
        tree = self.folder / "trees" / f"{project}-{number}"
        make_small_tree(tree, number)
        site = self.folder / "site" / project
        self.publisher.publish(site, tree, project=project, version=f"{number}.0")
        return tree

    def drive(self, name: str, *projects: str) -> Path:
        """A folder with what a drive holds."""
        for project in projects:
            copy(self.folder / "site" / project, self.folder / name / project)
        return self.folder / name

    def entry(self, project: str, drive: Path, source: str = "http://127.0.0.1:1") -> Path:
        """Add an entry whose backup is on a drive; gives its destination."""
        destination = self.folder / "device" / project
        destination.parent.mkdir(exist_ok=True)
        self.entries.append(
            {
                "name": project,
                "project": project,
                "interval": 3_600_000,
                "srcIndex": f"{source}/tree.caidx",
                "srcStore": f"{source}/store.castr",
                "backupIndex": f"{drive}/{project}/tree.caidx",
                "backupStore": f"{drive}/{project}/store.castr",
                "dstPath": str(destination),
                "signedBy": str(self.publisher.keys.keyring),
            }
        )
        return destination

    @contextlib.contextmanager
    def daemon(self, *, first_cycle: bool = True) -> Iterator[None]:
        (self.config / "entries.json").write_text(json.dumps(self.entries))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *("unshare", "--mount", "--propagation=private", "--"),
                    *(sys.executable, *self.command("run")),
                ],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            try:
                if first_cycle:
                    until(lambda: self.log.count("(start)") == len(self.entries), "first cycles")
                yield
            finally:
                self.process.terminate()
                try:
                    self.process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()

    def command(self, *arguments: str) -> list[str]:
        places = ("--config", str(self.config), "--state-dir", str(self.state))
        return ["-m", "casync_updater", *places, *arguments]

    def inside(self, *argv: str | Path) -> None:
        """Run a program where the daemon sees what it does."""
        assert self.process is not None
        subprocess.run(
            ["nsenter", f"--target={self.process.pid}", "--mount", "--", *argv],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd="/",
        )

    def status(self) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, *self.command("status", "--json")],
            check=True,
            capture_output=True,
            env=environment(),
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @property
    def idle(self) -> bool:
        return all(entry["state"] == "idle" for entry in self.status()["entries"])

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def begun(self, drive: str) -> int:
        """How often a drive was found."""
        return self.log.count(f"drive {drive} (")


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.1)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    print(lab.log)


def test_a_mount_brings_an_update(lab: Lab, tmp_path: Path) -> None:
    trees = {n: lab.publish("one", n) for n in (1,)}
    place = tmp_path / "media" / "my drive"
    place.mkdir(parents=True)
    (place / "something else").write_text("was here before")
    other = tmp_path / "media" / "other"
    other.mkdir()
    link = tmp_path / "link"
    link.symlink_to("media/my drive")
    one = lab.entry("one", link)
    first = lab.drive("first", "one")
    with lab.daemon():
        assert not one.exists()
        lab.inside("mount", "--bind", first, place)
        until(lambda: one.exists() and snapshot(one) == snapshot(trees[1]), "version 1")
        until(lambda: lab.idle, "the end")
        (entry,) = lab.status()["entries"]
        assert (entry["reason"], entry["installed"]["version"]) == ("media", "1.0")
        (drive,) = lab.status()["drives"]
        assert (drive["name"], drive["state"], drive["message"]) == ("my drive", "done", "done")

        # An ext4 file system over the one that is there, with something newer.
        trees[2] = lab.publish("one", 2)
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(32 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-d", lab.drive("second", "one"), image], check=True)
        lab.inside("mount", "-o", "loop", image, place)
        until(lambda: snapshot(one) == snapshot(trees[2]), "version 2")
        until(lambda: lab.begun("my drive") == 2 and lab.idle, "the second visit")

        # What is uncovered by an unmounting has not appeared, and neither has anything elsewhere.
        lab.inside("umount", place)
        lab.inside(
            "sh",
            "-c",
            'for i in $(seq 100); do mount -t tmpfs none "$0"; done; mount -t tmpfs none "$1"',
            other,
            tmp_path / "device",
        )
        lab.inside("umount", tmp_path / "device")
        time.sleep(1)
        assert lab.begun("my drive") == 2

        # An empty one is filled with what the device has.
        lab.inside("umount", place)
        until(lambda: not lab.status()["drives"], "the drive to be gone")
        lab.inside("sh", "-c", 'mount -t tmpfs none "$0" && mkdir "$0/one"', place)
        until(lambda: lab.begun("my drive") == 3, "the third visit")
        until(lambda: lab.idle, "the end")
        assert "refreshed the backup" in lab.log
    assert "Traceback" not in lab.log


def test_a_drive_with_two_projects_and_one_that_is_foreign(lab: Lab, tmp_path: Path) -> None:
    lab.publish("one", 1)
    lab.publish("two", 1)
    place = tmp_path / "media"
    place.mkdir()
    one, two = lab.entry("one", place), lab.entry("two", place)
    content = lab.drive("content", "one", "two")
    foreign = tmp_path / "foreign"
    lab.publisher.publish(
        foreign / "one", tmp_path / "trees" / "one-1", project="one", keys=lab.publisher.strangers
    )
    before = snapshot(foreign)
    (lab.config / "casync-updater.conf").open("a").write(
        f"[media]\non_start = echo start $CASYNC_UPDATER_DRIVE >> {tmp_path}/led\n"
        f"on_success = echo success >> {tmp_path}/led; exit 3\n"
        f"on_failure = echo failure >> {tmp_path}/led\n"
    )
    led = tmp_path / "led"
    with lab.daemon():
        lab.inside("mount", "--bind", foreign, place)
        until(lambda: led.exists() and "failure" in led.read_text(), "the refusal")
        assert led.read_text().split() == ["start", "media", "failure"]
        assert not one.exists()
        assert snapshot(foreign) == before
        assert "refused (signature)" in lab.log
        lab.inside("umount", place)
        led.unlink()
        lab.inside("mount", "-o", "ro", "--bind", content, place)
        until(lambda: led.exists() and "success" in led.read_text(), "the update")
        assert led.read_text().split() == ["start", "media", "success"]
        assert one.exists()
        assert two.exists()
        until(lambda: "failed with exit code 3" in lab.log, "what is said of a command that fails")
        assert "drive media: done" in lab.log
        assert "read-only: it stays as it is" in lab.log


def test_a_drive_in_the_middle_of_a_slow_download(lab: Lab, tmp_path: Path) -> None:
    tree = lab.publish("one", 1)
    place = tmp_path / "media"
    place.mkdir()
    content = lab.drive("content", "one")
    settings = "[online]\nenabled = no\n[fetch]\nconnections = 1\n"
    (lab.config / "casync-updater.conf").write_text(settings)
    with WebServer(tmp_path / "site" / "one") as server:
        server.fail("*.cacnk", delay=5.0)
        one = lab.entry("one", place, server.url)
        with lab.daemon(first_cycle=False):
            until(lambda: lab.status()["entries"][0]["state"] == "build", "the download")
            lab.inside("mount", "--bind", content, place)
            until(one.exists, "the update from the drive")
            assert snapshot(one) == snapshot(tree)
            until(lambda: lab.idle, "the end")
            (entry,) = lab.status()["entries"]
            assert entry["reason"] == "media"
    asked = [request for request in server.requests if request.path.endswith(".cacnk")]
    assert len(asked) <= 4
    assert "the fetching begins anew" in lab.log
    assert "drive media: one: reading 1.0" in lab.log

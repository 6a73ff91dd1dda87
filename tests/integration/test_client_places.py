"""What a destination can be: links, mount points, files, block devices; updates in place."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.client import Appliance, Site, casync, digest_of, fill
from support.trees import mutate_tree, snapshot
from support.webserver import WebServer

root_only = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode,
    reason="only root mounts",
)


@pytest.fixture
def appliance(tmp_path: Path, site: Site) -> Appliance:
    return Appliance(tmp_path, site.root)


@contextlib.contextmanager
def mounted(point: Path, *arguments: str) -> Iterator[None]:
    """Something mounted on a folder; unmounted lazily, whatever happens."""
    subprocess.run(["mount", *arguments, str(point)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


class TestInPlace:
    def test_because_it_is_configured(self, site: Site, appliance: Appliance) -> None:
        appliance.entry["apply"] = "in-place"
        appliance.trigger("bin")
        appliance.trigger("secret")
        appliance.update()
        inode = appliance.destination.stat().st_ino
        mutate_tree(site.source, 2)
        site.publish()
        end = appliance.update()
        assert end["outcome"] == "updated"
        assert "in place, which is not atomic: the configuration says so" in end["stderr"]
        assert appliance.destination.stat().st_ino == inode
        assert digest_of(appliance.destination, site) == site.release().digest
        assert appliance.log() == ["bin", "secret", "bin"]
        assert appliance.verify() == {}
        assert appliance.update()["outcome"] == "current"
        status = appliance.status()
        assert (status["atomic"], status["notAtomicBecause"]) == (
            False,
            "the configuration says so",
        )
        assert "in place, not atomic" in appliance.run("validate").stdout
        done = appliance.run("rollback", "tree", code=1)
        assert "updated in place" in done.stderr

    def test_drift(self, site: Site, appliance: Appliance) -> None:
        appliance.entry["apply"] = "in-place"
        appliance.update()
        (appliance.destination / "chunks").write_text("changed by hand")
        assert appliance.update("--reason", "start")["message"].startswith("repaired ")
        assert digest_of(appliance.destination, site) == site.release().digest

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_killed_in_the_middle(
        self, site: Site, appliance: Appliance, number: signal.Signals
    ) -> None:
        appliance.entry["apply"] = "in-place"
        appliance.trigger("bin")
        appliance.update()
        mutate_tree(site.source, 2)
        site.write("more", random.Random(3).randbytes(20_000_000))
        site.publish(version="2.0")
        state = appliance.state_dir / "tree" / "state.json"
        with appliance.start("update") as process:
            deadline = time.monotonic() + 20
            while '"in-place"' not in state.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(number)
            process.wait(30)
        if number == signal.SIGKILL:
            status = appliance.status()
            assert status["installed"] is None
            with WebServer(site.root) as server:
                appliance.entry["srcIndex"] = f"{server.url}/tree.caidx"
                appliance.entry["srcStore"] = f"{server.url}/store.castr"
                assert appliance.update("--reason", "start")["outcome"] == "updated"
        else:
            assert appliance.status()["installed"]["version"] == "2.0"
            appliance.update()
        assert digest_of(appliance.destination, site) == site.release().digest
        assert appliance.log() == ["bin", "bin"]
        assert appliance.status()["installed"]["version"] == "2.0"

    @root_only
    @pytest.mark.parametrize("how", ["tmpfs", "bind"])
    def test_a_mount_point(self, site: Site, appliance: Appliance, how: str) -> None:
        appliance.destination.mkdir()
        elsewhere = appliance.folder / "elsewhere"
        elsewhere.mkdir()
        options = ["--bind", str(elsewhere)]
        if how == "tmpfs":
            options = ["-t", "tmpfs", "-o", "size=64M", "none"]
        with mounted(appliance.destination, *options):
            end = appliance.update()
            assert end["outcome"] == "updated"
            assert "it is a mount point" in end["stderr"]
            mutate_tree(site.source, 2)
            site.publish()
            appliance.update()
            assert digest_of(appliance.destination, site) == site.release().digest
            assert appliance.status()["notAtomicBecause"] == "it is a mount point"
            assert appliance.verify() == {}
        assert not appliance.staging.exists()


def test_a_symbolic_link_as_destination(site: Site, appliance: Appliance) -> None:
    real = appliance.folder / "real" / "place"
    real.parent.mkdir()
    appliance.destination.symlink_to(real)
    appliance.update()
    assert appliance.destination.is_symlink()
    assert snapshot(real) == snapshot(site.source)
    mutate_tree(site.source, 2)
    site.publish()
    appliance.update()
    assert appliance.destination.is_symlink()
    assert digest_of(real, site) == site.release().digest
    appliance.run("rollback", "tree")
    assert appliance.verify() == {}


def test_a_file_in_place_of_the_folder(site: Site, appliance: Appliance) -> None:
    appliance.destination.write_text("somebody's file")
    done = appliance.run("update", code=2)
    assert "is no folder, and a .caidx index holds a folder" in done.stderr
    assert appliance.destination.read_text() == "somebody's file"


class TestFile:
    """A destination of a .caibx."""

    @pytest.fixture
    def site(self, tmp_path: Path) -> Site:
        site = Site(tmp_path / "publisher", "image.caibx")
        site.source.write_bytes(random.Random(1).randbytes(2_000_000))
        site.publish(version="1.0")
        return site

    @pytest.fixture
    def appliance(self, tmp_path: Path, site: Site) -> Appliance:
        return Appliance(tmp_path, site.root, site.name)

    def change(self, site: Site, version: str = "2.0") -> None:
        data = bytearray(site.source.read_bytes())
        data[1_000_000:1_000_010] = version.encode().ljust(10)
        site.source.write_bytes(data)
        site.publish(version=version)

    def test_update_drift_and_rollback(self, site: Site, appliance: Appliance) -> None:
        appliance.trigger(".")
        appliance.update()
        first = site.source.read_bytes()
        assert appliance.destination.read_bytes() == first
        appliance.destination.chmod(0o640)
        os.chown(appliance.destination, 0, 4)
        self.change(site)
        with WebServer(site.root) as server:
            place = {"srcIndex": f"{server.url}/{site.name}"}
            place["srcStore"] = f"{server.url}/store.castr"
            local = {key: appliance.entry[key] for key in place}
            appliance.entry |= place
            assert appliance.update()["outcome"] == "updated"
            assert len(server.paths("*.cacnk")) <= 2
        appliance.entry |= local
        assert appliance.destination.read_bytes() == site.source.read_bytes()
        assert appliance.destination.stat().st_mode & 0o777 == 0o640
        assert appliance.destination.stat().st_gid == 4
        assert appliance.log() == [".", "."]
        with appliance.destination.open("r+b") as file:
            file.write(b"damage")
        assert appliance.verify(code=1) == {".": "content"}
        assert appliance.update("--reason", "start")["message"].startswith("repaired ")
        assert appliance.destination.read_bytes() == site.source.read_bytes()
        appliance.run("rollback", "tree")
        assert appliance.destination.read_bytes() == first
        assert appliance.status()["installed"]["version"] == "1.0"

    def test_adoption(self, site: Site, appliance: Appliance) -> None:
        appliance.destination.write_bytes(site.source.read_bytes())
        before = appliance.destination.stat()
        assert appliance.update()["outcome"] == "adopted"
        assert appliance.destination.stat().st_ctime_ns == before.st_ctime_ns

    def test_a_folder_is_in_the_way(self, site: Site, appliance: Appliance) -> None:
        appliance.destination.mkdir()
        (appliance.destination / "x").write_text("x")
        done = appliance.run("update", code=2)
        assert "is a folder, and a .caibx index holds a file" in done.stderr
        assert (appliance.destination / "x").exists()

    def test_drift_in_place(self, site: Site, appliance: Appliance) -> None:
        appliance.entry["apply"] = "in-place"
        appliance.update()
        with appliance.destination.open("r+b") as file:
            file.write(b"damage")
        assert appliance.update("--reason", "start")["message"].startswith("repaired ")
        assert appliance.destination.read_bytes() == site.source.read_bytes()
        with appliance.destination.open("r+b") as file:
            file.write(b"damage")
        self.change(site)
        assert appliance.update()["outcome"] == "updated"
        assert appliance.destination.read_bytes() == site.source.read_bytes()

    def test_content_that_moves_in_place(self, site: Site, appliance: Appliance) -> None:
        appliance.entry["apply"] = "in-place"
        appliance.update()
        before = site.chunks()
        for data in (b"inserted" + site.source.read_bytes(), site.source.read_bytes()[300_000:]):
            site.source.write_bytes(data)
            site.publish()
            with WebServer(site.root) as server:
                appliance.entry["srcIndex"] = f"{server.url}/{site.name}"
                appliance.entry["srcStore"] = f"{server.url}/store.castr"
                assert appliance.update()["outcome"] == "updated"
                fetched = {path.rpartition("/")[2][:64] for path in server.paths("*.cacnk")}
            assert fetched == site.chunks() - before
            assert appliance.destination.read_bytes() == data
            before = site.chunks()

    @root_only
    def test_a_block_device(self, site: Site, appliance: Appliance) -> None:
        disk = appliance.folder / "disk"
        disk.write_bytes(b"\xff" * 4_000_000)
        losetup = ["losetup", "--find", "--show", str(disk)]
        try:
            loop = subprocess.run(losetup, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError:
            pytest.skip("no loop devices here")
        device = Path(loop.stdout.strip())
        try:
            size = site.source.stat().st_size
            appliance.entry["dstPath"] = str(device)
            appliance.trigger(".")
            end = appliance.update()
            assert "it is a block device" in end["stderr"]
            assert device.read_bytes()[:size] == site.source.read_bytes()
            assert set(device.read_bytes()[size:]) == {255}
            assert appliance.update("--reason", "start")["outcome"] == "current"
            self.change(site)
            assert appliance.update()["outcome"] == "updated"
            assert device.read_bytes()[:size] == site.source.read_bytes()
            assert appliance.update("--reason", "start")["outcome"] == "current"
            assert appliance.log() == [".", "."]
        finally:
            subprocess.run(["losetup", "--detach", str(device)], check=True)


@root_only
class TestSpace:
    @pytest.fixture
    def small(self, appliance: Appliance) -> Iterator[Path]:
        place = appliance.destination.parent
        with mounted(place, "-t", "tmpfs", "-o", "size=8M", "none"):
            yield place

    def test_too_little_is_found_before_anything_is_written(
        self, site: Site, appliance: Appliance, small: Path
    ) -> None:
        fill(small, leave=3_000_000)
        before = sorted(small.iterdir())
        end = appliance.update(code=1)
        assert "make room" in end["message"]
        assert "3.0 MB are free" in end["message"]
        assert sorted(small.iterdir()) == before
        assert not list((appliance.state_dir / "cache").rglob("*.cacnk"))
        (small / "filler").unlink()
        assert appliance.update()["outcome"] == "updated"

    def test_an_update_that_does_not_fit(
        self, site: Site, appliance: Appliance, small: Path
    ) -> None:
        appliance.update()
        fill(small, leave=2_000_000)
        mutate_tree(site.source, 2)
        site.publish()
        before = snapshot(appliance.destination)
        assert "make room" in appliance.update(code=1)["message"]
        assert snapshot(appliance.destination) == before
        assert appliance.verify() == {}

    def test_what_is_not_needed_goes_before_it_gives_up(
        self, site: Site, appliance: Appliance, small: Path
    ) -> None:
        """What a kill has left of earlier cycles, and what was fetched for tries cut off."""
        appliance.update()
        for name in ("previous-1-of-another-life", "left-0"):
            (appliance.staging / name).mkdir()
            (appliance.staging / name / "large").write_bytes(bytes(1_500_000))
        fill(small, leave=4_500_000)
        site.write("more", random.Random(5).randbytes(1_000_000))
        site.publish()
        end = appliance.update()
        assert end["outcome"] == "updated"
        assert "removing what nobody needs" in end["stderr"]


OLD = ("--with=2sec-time",)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
class TestTwoSecondArchives:
    """Owners and modes that an archive does not carry stay as they were."""

    def test_beside_what_the_old_client_left(self, site: Site, tmp_path: Path) -> None:
        """The same contents and folders; files keep what they had, which casync resets."""
        site.publish_legacy()
        for name in (".release", ".mtree"):
            site.beside(name).unlink()
        appliance = Appliance(tmp_path, site.root)
        old = tmp_path / "device" / "as-the-old-client"
        for tree in (appliance.destination, old):
            casync("extract", *OLD, f"--store={site.store}", site.index, tree)
            (tree / "bin").chmod(0o755)
            (tree / "names").chmod(0o2750)
            (tree / "bin" / "tool").chmod(0o755)
            (tree / "chunks").chmod(0o600)
            (tree / "read-only").chmod(0o444)
            os.chown(tree / "chunks", 1000, 1000)
            os.chown(tree / "bin", 33, 33)
        assert appliance.update()["outcome"] == "adopted"
        with (site.source / "chunks").open("r+b") as file:
            file.write(b"another beginning")
        site.write("bin/tool", "another tool")
        site.write("new folder/new file", "new")
        (site.source / "bin" / "setuid").unlink()
        site.publish_legacy()
        casync("extract", *OLD, f"--store={site.store}", site.index, old)
        assert appliance.update()["outcome"] == "updated"
        digests = {casync("digest", *OLD, tree) for tree in (appliance.destination, old)}
        assert digests == {site.beside(".cks").read_text()}
        ours, theirs = (_owned(tree) for tree in (appliance.destination, old))
        assert ours.keys() == theirs.keys()
        kept = {b"bin/tool": (0o755, 0, 0), b"chunks": (0o600, 1000, 1000)}
        kept |= {b"read-only": (0o444, 0, 0), b"new folder": (0o755, 0, 0)}
        for path, owned in ours.items():
            assert owned == kept.get(path, theirs[path]), path
        assert ours[b"bin"] == (0o755, 33, 33)
        assert ours[b"names"] == (0o2750, 0, 0)
        assert ours[b"new folder/new file"] == (0o644, 0, 0)

    def test_a_first_install(self, site: Site, tmp_path: Path) -> None:
        """Folders that others can enter, and the owner of the folder that it is put into."""
        site.publish_legacy()
        site.beside(".release").unlink()
        appliance = Appliance(tmp_path, site.root)
        os.chown(appliance.destination.parent, 33, 33)
        appliance.update()
        for path, (mode, uid, gid) in _owned(appliance.destination).items():
            folder = (appliance.destination / os.fsdecode(path)).is_dir()
            assert (mode, uid, gid) == (0o755 if folder else 0o644, 33, 33), path


def _owned(tree: Path) -> dict[bytes, tuple[int, int, int]]:
    found = {}
    for path in (tree, *tree.rglob("*")):
        status = path.lstat()
        name = os.fsencode(path.relative_to(tree))
        found[name] = (status.st_mode & 0o7777, status.st_uid, status.st_gid)
    return found


class TestLegacy:
    """The layout of the old publisher, made with casync's own commands."""

    @pytest.fixture(autouse=True)
    def legacy(self, site: Site) -> None:
        for suffix in (".release", ".cks", ".mtree", ""):
            site.beside(suffix).unlink()

    @pytest.mark.parametrize("cks", [True, False])
    def test_install_update_and_nothing_to_do(self, site: Site, tmp_path: Path, cks: bool) -> None:
        digest = site.publish_legacy(cks=cks, manifest=cks)
        with WebServer(site.root) as server:
            appliance = Appliance(tmp_path, server.url)
            appliance.trigger("bin")
            appliance.trigger("secret")
            assert appliance.update()["outcome"] == "updated"
            assert casync("digest", *OLD, appliance.destination) == digest
            assert appliance.status()["installed"]["digest"] == digest
            server.requests.clear()
            assert appliance.update()["outcome"] == "current"
            names = [".release", ".cks"] if cks else [".release", ".cks", ""]
            assert server.paths() == [f"/tree.caidx{name}" for name in names]
            assert server.requests[-1].status == 304
            mutate_tree(site.source, 2)
            digest = site.publish_legacy(cks=cks, manifest=cks)
            assert appliance.check()["update"] is True
            assert appliance.update()["outcome"] == "updated"
            assert casync("digest", *OLD, appliance.destination) == digest
            assert appliance.log() == ["bin", "secret"]
            assert appliance.verify() == {}

    def test_a_checksum_that_is_not_the_indexs(self, site: Site, appliance: Appliance) -> None:
        site.publish_legacy()
        site.beside(".cks").write_text("0" * 64)
        end = appliance.update(code=4)
        assert "was it published while it was fetched?" in end["message"]
        assert not appliance.destination.exists()
        site.publish_legacy()
        assert appliance.update()["outcome"] == "updated"

    def test_a_checksum_that_is_none(self, site: Site, appliance: Appliance) -> None:
        site.publish_legacy()
        site.beside(".cks").write_text("oops")
        assert "tree.caidx.cks is no archive checksum" in appliance.update(code=4)["message"]

    def test_moving_to_the_new_publisher(self, site: Site, appliance: Appliance) -> None:
        digest = site.publish_legacy()
        appliance.update()
        before = appliance.destination.stat().st_ino
        assert site.publish()["digest"] == digest
        assert site.release().features == ("2sec-time",)
        assert appliance.update()["outcome"] == "current"
        assert appliance.destination.stat().st_ino == before
        assert appliance.status()["installed"]["serial"] == site.release().serial
        mutate_tree(site.source, 2)
        digest = site.publish()["digest"]
        # An old client reads the same site as ever.
        old = appliance.folder / "old"
        casync("extract", *OLD, f"--store={site.store}", site.index, old)
        assert casync("digest", *OLD, old) == site.beside(".cks").read_text() == digest
        assert appliance.update()["outcome"] == "updated"
        assert casync("digest", *OLD, appliance.destination) == digest
        site.beside(".release").unlink()
        end = appliance.update(code=3)
        assert "update --accept-legacy tree" in end["message"]
        mutate_tree(site.source, 3)
        digest = site.publish_legacy()
        assert "accept-legacy" in appliance.check(code=3)["error"]
        assert appliance.update("--accept-legacy")["outcome"] == "updated"
        assert casync("digest", *OLD, appliance.destination) == digest
        assert appliance.update()["outcome"] == "current"

    def test_the_examples_of_the_old_documentation(self, site: Site, appliance: Appliance) -> None:
        """One entry as an object, one in an array with everything, both with strange keys."""
        site.publish_legacy()
        other = appliance.destination.with_name("other")
        backup = appliance.folder / "drive"
        backup.mkdir()
        full = {
            **appliance.entry,
            "comment": "of the operator",
            "dstPath": str(other),
            "backupIndex": str(backup / "tree.caidx"),
            "backupStore": str(backup / "store.castr"),
            "triggers": [{"paths": ["."], "actions": [appliance.note("all")]}],
            "startup": [appliance.note("startup")],
        }
        folder = appliance.folder / "etc"
        folder.mkdir()
        (folder / "plain.json").write_text(json.dumps(appliance.entry))
        (folder / "full.json").write_text(json.dumps([full]))
        done = appliance.run("--config", folder, "update", "--json")
        assert {end["outcome"] for end in done.json.values()} == {"updated"}
        assert appliance.log() == ["all"]
        assert (backup / "tree.caidx.cks").read_text() == site.beside(".cks").read_text()
        casync(
            "extract", *OLD, f"--store={backup}/store.castr", backup / "tree.caidx", folder / "x"
        )

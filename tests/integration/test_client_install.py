"""The client as a process: install, update, do nothing, adopt, repair, preserve."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from support.client import Appliance, Site, casync, digest_of, empty_path
from support.trees import make_tree, mutate_tree, snapshot
from support.watch import watch
from support.webserver import WebServer


@pytest.fixture
def appliance(tmp_path: Path, server: WebServer) -> Appliance:
    return Appliance(tmp_path, server.url)


def marks(tree: Path) -> dict[str, tuple[int, int]]:
    """Inode number and ctime of every node: any write to it changes one of them."""
    return {
        str(path): (path.lstat().st_ino, path.lstat().st_ctime_ns)
        for path in (tree, *tree.rglob("*"))
    }


def chunk_requests(server: WebServer) -> list[str]:
    return [path.rpartition("/")[2].partition(".")[0] for path in server.paths("*.cacnk")]


def test_install_and_update(site: Site, appliance: Appliance) -> None:
    end = appliance.update()
    assert (end["outcome"], end["version"], end["source"]) == ("updated", "1.0", "source")
    assert snapshot(appliance.destination, mtimes=True) == snapshot(site.source, mtimes=True)
    assert digest_of(appliance.destination, site) == site.release().digest
    for seed in (2, 3):
        mutate_tree(site.source, seed)
        outcome = site.publish(version=f"{seed}.0")
        end = appliance.update()
        assert (end["outcome"], end["version"]) == ("updated", f"{seed}.0")
        assert end["serial"] == site.release().serial
        assert snapshot(appliance.destination) == snapshot(site.source)
        assert digest_of(appliance.destination, site) == outcome["digest"]


def test_an_update_fetches_the_difference_only(
    site: Site, server: WebServer, appliance: Appliance
) -> None:
    before = site.chunks()
    appliance.update()
    assert sorted(chunk_requests(server)) == sorted(before)
    mutate_tree(site.source, 2)
    site.publish()
    server.requests.clear()
    end = appliance.update()
    fetched = chunk_requests(server)
    assert len(fetched) == len(set(fetched))
    new = site.chunks() - before
    assert set(fetched) == new
    size = sum(path.stat().st_size for path in site.store.rglob("*.cacnk") if path.stem in new)
    assert (
        f"{size / 1e6:.1f} MB in {len(new)} chunks from {server.url}/store.castr" in end["stderr"]
    )
    documents = sum(site.beside(suffix).stat().st_size for suffix in ("", ".release"))
    assert end["received"] == size + documents


def test_a_cycle_without_news_makes_one_request_and_touches_nothing(
    site: Site, server: WebServer, appliance: Appliance, tmp_path: Path
) -> None:
    appliance.trigger(".")
    appliance.update()
    server.requests.clear()
    noted = appliance.log()
    mark = tmp_path / "started"
    appliance.environment["PATH"] = empty_path(tmp_path / "path", mark)
    before = marks(appliance.destination)
    with watch(appliance.destination) as watching:
        end = appliance.update()
        opened = watching.opened()
    assert end["outcome"] == "current"
    assert server.paths() == ["/tree.caidx.release"]
    assert [request.status for request in server.requests] == [304]
    assert not mark.exists()
    assert opened <= {"."}
    assert marks(appliance.destination) == before
    assert appliance.log() == noted


def test_the_marks_of_the_last_test_can_be_made(appliance: Appliance, tmp_path: Path) -> None:
    """The counter-test: an install does start programs, and a verification opens files."""
    mark = tmp_path / "started"
    appliance.environment["PATH"] = empty_path(tmp_path / "path", mark)
    appliance.entry["apply"] = "in-place"
    assert appliance.update(code=1)["outcome"] == "failed"
    assert "casync" in mark.read_text()
    appliance.environment.clear()
    del appliance.entry["apply"]
    appliance.update()
    with watch(appliance.destination) as watching:
        appliance.verify()
        assert "bin/tool" in watching.opened()


def test_sites_without_a_release_cost_two_requests(
    site: Site, server: WebServer, appliance: Appliance
) -> None:
    site.beside(".release").unlink()
    appliance.update()
    server.requests.clear()
    assert appliance.update()["outcome"] == "current"
    assert server.paths() == ["/tree.caidx.release", "/tree.caidx.cks"]


def test_a_large_file_and_thousands_of_small_ones(tmp_path: Path) -> None:
    site = Site(tmp_path / "publisher")
    make_tree(site.source, 5, count=2_000, big=105 << 20)
    site.publish(chunkSize="256K")
    with WebServer(site.root) as server:
        appliance = Appliance(tmp_path, server.url)
        appliance.update()
        assert digest_of(appliance.destination, site) == site.release().digest
        assert (appliance.destination / "big").stat().st_size == 105 << 20
        mutate_tree(site.source, 6)
        with (site.source / "big").open("r+b") as file:
            file.seek(50 << 20)
            file.write(random.Random(1).randbytes(1000))
        site.publish()
        server.requests.clear()
        appliance.update()
        assert digest_of(appliance.destination, site) == site.release().digest
        assert len(chunk_requests(server)) < 12


@pytest.mark.parametrize("features", [["unix"], ["nsec-time", "permissions", "symlinks"], []])
def test_other_features(tmp_path: Path, features: list[str]) -> None:
    site = Site(tmp_path / "publisher")
    make_tree(site.source, 1, count=10)
    site.publish(**({"with": features} if features else {}))
    with WebServer(site.root) as server:
        appliance = Appliance(tmp_path, server.url)
        appliance.update()
        assert digest_of(appliance.destination, site) == site.release().digest
        mutate_tree(site.source, 2)
        site.publish()
        appliance.update()
        assert digest_of(appliance.destination, site) == site.release().digest
        assert appliance.verify() == {}


def test_an_empty_tree(tmp_path: Path) -> None:
    site = Site(tmp_path / "publisher")
    site.source.mkdir()
    site.publish()
    appliance = Appliance(tmp_path, site.root)
    assert appliance.update()["outcome"] == "updated"
    assert list(appliance.destination.iterdir()) == []
    assert appliance.update()["outcome"] == "current"
    site.write("now", "something")
    site.publish()
    appliance.update()
    assert snapshot(appliance.destination) == snapshot(site.source)


def test_a_missing_destination_with_a_missing_parent(site: Site, tmp_path: Path) -> None:
    appliance = Appliance(tmp_path, site.root)
    appliance.entry["dstPath"] = str(tmp_path / "nowhere" / "tree")
    end = appliance.update(code=1)
    assert f"the folder {tmp_path}/nowhere of the destination is not there" in end["message"]
    assert not (tmp_path / "nowhere").exists()


def test_an_index_beside_a_relative_file_url(site: Site, tmp_path: Path) -> None:
    appliance = Appliance(tmp_path, f"file://{site.root}")
    assert appliance.update()["outcome"] == "updated"
    assert snapshot(appliance.destination) == snapshot(site.source)


class TestAdoption:
    def test_a_destination_that_came_with_the_image(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        appliance.trigger(".")
        casync("extract", f"--store={site.store}", site.index, appliance.destination)
        before = marks(appliance.destination)
        end = appliance.update()
        assert (end["outcome"], end["version"]) == ("adopted", "1.0")
        assert marks(appliance.destination) == before
        assert chunk_requests(server) == []
        assert appliance.log() == []
        assert not appliance.staging.exists()
        assert appliance.update()["outcome"] == "current"
        assert appliance.verify() == {}
        mutate_tree(site.source, 2)
        site.publish()
        assert appliance.update()["outcome"] == "updated"
        assert appliance.log() == ["."]
        appliance.run("rollback", "tree")
        assert appliance.verify() == {}

    def test_the_state_was_lost(self, site: Site, appliance: Appliance) -> None:
        appliance.update()
        shutil.rmtree(appliance.state_dir)
        before = marks(appliance.destination)
        assert appliance.update()["outcome"] == "adopted"
        assert marks(appliance.destination) == before

    def test_a_state_file_that_cannot_be_read(self, appliance: Appliance) -> None:
        appliance.update()
        file = appliance.state_dir / "tree" / "state.json"
        file.write_text(file.read_text()[:200])
        before = marks(appliance.destination)
        assert appliance.update()["outcome"] == "adopted"
        assert marks(appliance.destination) == before
        assert file.with_name("state.json.broken").exists()

    def test_an_older_version_came_with_the_image(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        appliance.trigger("bin")
        appliance.trigger("secret")
        casync("extract", f"--store={site.store}", site.index, appliance.destination)
        before = site.chunks()
        mutate_tree(site.source, 2)
        site.publish()
        assert appliance.update()["outcome"] == "updated"
        assert set(chunk_requests(server)) <= site.chunks() - before
        assert digest_of(appliance.destination, site) == site.release().digest
        assert appliance.log() == ["bin"]

    def test_a_legacy_destination(self, site: Site, appliance: Appliance) -> None:
        site.beside(".release").unlink()
        casync("extract", f"--store={site.store}", site.index, appliance.destination)
        before = marks(appliance.destination)
        assert appliance.update()["outcome"] == "adopted"
        assert marks(appliance.destination) == before

    def test_with_a_preserved_path_in_it(self, site: Site, appliance: Appliance) -> None:
        appliance.entry["preserve"] = ["device.id"]
        casync("extract", f"--store={site.store}", site.index, appliance.destination)
        (appliance.destination / "device.id").write_text("7")
        assert appliance.update()["outcome"] == "adopted"
        assert appliance.verify() == {}


class TestDrift:
    @pytest.fixture(autouse=True)
    def installed(self, appliance: Appliance) -> None:
        appliance.update()

    def check(self, site: Site, appliance: Appliance, *, reason: str = "operator") -> None:
        end = appliance.update("--reason", reason)
        assert (end["outcome"], end["message"]) == ("updated", "repaired 1.0")
        assert digest_of(appliance.destination, site) == site.release().digest
        assert appliance.verify() == {}
        assert appliance.update("--reason", "start")["outcome"] == "current"

    def test_gone(self, site: Site, appliance: Appliance) -> None:
        shutil.rmtree(appliance.destination)
        self.check(site, appliance)

    def test_emptied(self, site: Site, appliance: Appliance) -> None:
        for path in appliance.destination.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.check(site, appliance)

    def test_replaced(self, site: Site, appliance: Appliance) -> None:
        appliance.destination.rename(appliance.destination.with_name("old"))
        appliance.destination.mkdir()
        (appliance.destination / "other").write_text("not ours")
        self.check(site, appliance)

    @pytest.mark.parametrize(
        ("command", "path", "what"),
        [
            ("echo more >> bin/tool", "bin/tool", "content"),
            ("rm bin/tool", "bin/tool", "missing"),
            ("chmod 600 bin/tool", "bin/tool", "mode"),
            ("touch extra", "extra", "extra"),
            ("ln -sfn elsewhere links/to-file", "links/to-file", "link target"),
            ("rm bin/tool && mkdir bin/tool", "bin/tool", "type"),
            ("mkdir -p 'new folder/sub'", "new\\040folder", "extra"),
        ],
    )
    def test_changed(
        self, site: Site, appliance: Appliance, command: str, path: str, what: str
    ) -> None:
        subprocess.run(["bash", "-c", command], cwd=appliance.destination, check=True)
        assert appliance.verify(code=1)[path] == what
        assert appliance.update()["outcome"] == "current"
        self.check(site, appliance, reason="start")

    def test_a_repair_runs_the_actions_of_what_it_changes(
        self, site: Site, appliance: Appliance
    ) -> None:
        appliance.trigger("bin")
        appliance.trigger("secret")
        (appliance.destination / "bin/tool").write_text("changed by hand")
        self.check(site, appliance, reason="start")
        assert appliance.log() == ["bin"]

    def test_a_repair_fetches_what_is_damaged_only(
        self, server: WebServer, site: Site, appliance: Appliance
    ) -> None:
        (appliance.destination / "bin/tool").write_text("changed by hand")
        server.requests.clear()
        self.check(site, appliance, reason="start")
        assert 1 <= len(chunk_requests(server)) <= 6

    def test_an_update_over_a_changed_tree(self, site: Site, appliance: Appliance) -> None:
        (appliance.destination / "chunks").write_text("changed by hand")
        (appliance.destination / "extra").write_text("changed by hand")
        mutate_tree(site.source, 2)
        site.publish()
        assert appliance.update()["outcome"] == "updated"
        assert digest_of(appliance.destination, site) == site.release().digest


class TestPreserve:
    """Paths of the device stay, the same inodes, through everything."""

    @pytest.fixture
    def appliance(self, tmp_path: Path, site: Site) -> Appliance:
        appliance = Appliance(tmp_path, site.root)
        appliance.entry["preserve"] = ["device.id", "data", "deep/only/here"]
        appliance.update()
        device = appliance.destination
        (device / "device.id").write_text("7")
        (device / "data").mkdir()
        (device / "data" / "base").write_text("precious")
        (device / "deep" / "only").mkdir()
        (device / "deep" / "only").chmod(0o750)
        (device / "deep" / "only" / "here").write_text("deep")
        return appliance

    def inodes(self, appliance: Appliance) -> list[tuple[int, str]]:
        paths = ("device.id", "data/base", "deep/only/here")
        files = [appliance.destination / path for path in paths]
        return [(file.stat().st_ino, file.read_text()) for file in files]

    def test_update_rollback_repair(self, site: Site, appliance: Appliance) -> None:
        before = self.inodes(appliance)
        for seed in (2, 3):
            mutate_tree(site.source, seed)
            site.publish()
            assert appliance.update()["outcome"] == "updated"
            assert self.inodes(appliance) == before
            assert appliance.verify() == {}
        assert (appliance.destination / "deep/only").stat().st_mode & 0o777 == 0o750
        (appliance.destination / "bin/tool").write_text("changed by hand")
        assert appliance.update("--reason", "start")["message"].startswith("repaired ")
        assert self.inodes(appliance) == before
        assert appliance.verify() == {}
        appliance.run("rollback", "tree")
        assert self.inodes(appliance) == before
        assert appliance.verify() == {}

    def test_a_folder_above_that_is_in_the_old_version_only(
        self, site: Site, appliance: Appliance
    ) -> None:
        before = self.inodes(appliance)
        shutil.rmtree(site.source / "deep")
        site.publish()
        appliance.update()
        assert self.inodes(appliance) == before
        assert appliance.verify() == {}
        assert [path.name for path in (appliance.destination / "deep").iterdir()] == ["only"]

    def test_an_archive_that_contains_one_is_refused(
        self, site: Site, appliance: Appliance
    ) -> None:
        before = self.inodes(appliance)
        tree = snapshot(appliance.destination)
        site.write("data/base", "of the publisher")
        site.publish()
        end = appliance.update(code=4)
        assert "the archive contains data, which the entry preserves" in end["message"]
        assert snapshot(appliance.destination) == tree
        assert self.inodes(appliance) == before

    def test_a_file_above_in_the_new_version(self, site: Site, appliance: Appliance) -> None:
        """Where the archive has a file, the device's own folder cannot be."""
        before = self.inodes(appliance)
        shutil.rmtree(site.source / "deep")
        site.write("deep", "is a file now")
        site.publish()
        end = appliance.update(code=4)
        assert "deep is no folder in the archive, and deep/only/here" in end["message"]
        assert self.inodes(appliance) == before
        assert appliance.verify() == {}
        (site.source / "deep").unlink()
        (site.source / "deep").symlink_to("/")
        site.publish()
        appliance.update(code=4)
        assert self.inodes(appliance) == before

    def test_the_only_copy_is_never_swept(self, site: Site, appliance: Appliance) -> None:
        """A power cut after the exchange, and the state is lost: the old tree still has them."""
        aside = appliance.staging / "new"
        appliance.staging.mkdir(mode=0o700, exist_ok=True)
        aside.mkdir()
        (appliance.destination / "data").rename(aside / "data")
        (appliance.staging / "leftover").mkdir()
        (appliance.state_dir / "tree" / "state.json").unlink()
        assert appliance.update()["outcome"] == "adopted"
        assert (aside / "data" / "base").read_text() == "precious"
        assert not (appliance.staging / "leftover").exists()

    def test_not_in_place(self, site: Site, appliance: Appliance) -> None:
        appliance.entry["apply"] = "in-place"
        before = self.inodes(appliance)
        mutate_tree(site.source, 2)
        site.publish()
        end = appliance.update(code=1)
        assert "take preserve out of the entry" in end["message"]
        assert self.inodes(appliance) == before


def test_a_file_written_in_place_is_written_in_the_kept_version_too(
    site: Site, appliance: Appliance
) -> None:
    """Unchanged files are one inode in both versions, so a rollback looks at each byte first."""
    appliance.update()
    mutate_tree(site.source, 2)
    site.publish()
    appliance.update()
    (kept,) = appliance.staging.glob("previous-*")
    shared = next(
        path
        for path in appliance.destination.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1
    )
    name = shared.relative_to(appliance.destination)
    assert (kept / name).stat().st_ino == shared.stat().st_ino
    shared.write_text("overwritten in place")
    refused = appliance.run("rollback", appliance.name, code=4)
    assert "the kept version is not what was installed" in refused.stderr
    assert appliance.update("--reason", "start")["message"].startswith("repaired")
    assert (appliance.destination / name).read_bytes() == (site.source / name).read_bytes()

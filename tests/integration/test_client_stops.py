"""Signals at any moment, two at once, versions that fail, versions that are kept."""

import os
import random
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from casync_updater import __version__
from support.client import SOURCES, Appliance, Site, digest_of
from support.trees import mutate_tree, snapshot
from support.webserver import WebServer


@pytest.fixture
def appliance(tmp_path: Path, server: WebServer) -> Appliance:
    return Appliance(tmp_path, server.url)


def updated(site: Site, version: str) -> None:
    site.write("version", version)
    site.publish(version=version)


def strays(appliance: Appliance) -> list[str]:
    """Everything that the client keeps beside the destination, state and cache, by name."""
    roots = (appliance.destination.parent, appliance.state_dir)
    return sorted(
        str(path.relative_to(root))
        for root in roots
        for path in root.rglob("*")
        if appliance.destination not in (path, *path.parents)
        and not any(part.startswith("previous-") for part in path.relative_to(root).parts[:-1])
    )


@pytest.mark.parametrize("seed", range(3))
def test_stopped_at_any_moment(
    site: Site, server: WebServer, appliance: Appliance, seed: int
) -> None:
    """It ends at once; the destination is one version, and the next update completes."""
    chance = random.Random(seed)
    appliance.trigger(".", appliance.note('"$CASYNC_UPDATER_NEW_VERSION"'))
    server.fail("*.cacnk", delay=0.01)
    appliance.update()
    versions = {"1.0": snapshot(appliance.destination)}
    expected = ["1.0"]
    for round_ in range(3):
        mutate_tree(site.source, 10 * seed + round_)
        version = f"2.{round_}"
        site.publish(version=version)
        versions[version] = snapshot(site.source)
        number = chance.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGKILL])
        with appliance.start("update") as process:
            time.sleep(chance.uniform(0.1, 0.8))
            process.send_signal(number)
            began = time.monotonic()
            process.wait(10)
            assert time.monotonic() - began < 2
        assert snapshot(appliance.destination) in versions.values()
        assert appliance.update()["outcome"] in ("updated", "current")
        assert snapshot(appliance.destination) == versions[version]
        assert digest_of(appliance.destination, site) == site.release().digest
        assert appliance.verify() == {}
        assert appliance.status()["pending"] == []
        expected.append(version)
        # An action that SIGKILL cut off is not known to have run: it may run twice, never not.
        assert list(dict.fromkeys(appliance.log())) == expected
        assert len(list(appliance.staging.glob("previous-*"))) == 1
        assert not (appliance.staging / "new").exists()


def test_nothing_is_left_running(site: Site, appliance: Appliance) -> None:
    """casync ends with the client, also when that is killed."""
    site.write("more", random.Random(3).randbytes(30_000_000))
    site.publish()
    appliance.entry["apply"] = "in-place"
    with appliance.start("update") as process:
        deadline = time.monotonic() + 30
        while not (found := _children(process.pid, "casync")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait(5)
        time.sleep(0.3)
        assert [pid for pid in found if _runs(pid)] == []


def _children(parent: int, name: str) -> list[int]:
    listing = subprocess.run(
        ["ps", "-o", "pid=,comm=", "--ppid", str(parent)],
        check=False,
        capture_output=True,
        text=True,
    ).stdout
    return [int(line.split()[0]) for line in listing.splitlines() if line.split()[1] == name]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_stopped_while_an_action_runs(site: Site, appliance: Appliance) -> None:
    """The action goes on by itself and is not repeated; those after it run the next time."""
    appliance.trigger(
        ".", f"{appliance.note('begin')}; sleep 1.5; {appliance.note('end')}", appliance.note("two")
    )
    with appliance.start("update") as process:
        deadline = time.monotonic() + 20
        while appliance.log() != ["begin"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        assert process.wait(2) == 1
    assert len(appliance.status()["pending"]) == 2
    assert appliance.update()["outcome"] == "current"
    assert appliance.log() == ["begin", "end", "two"]
    assert appliance.status()["pending"] == []


def test_cut_off_twice_and_nothing_is_fetched_twice(
    site: Site, server: WebServer, appliance: Appliance
) -> None:
    """The second try is ended long before it has copied what the first one left."""
    appliance.settings("[fetch]\nconnections = 1\n")
    appliance.update()
    site.write("large", random.Random(1).randbytes(12_000_000))
    site.publish(version="2.0")
    server.requests.clear()
    server.fail("*.cacnk", delay=0.01)
    for number in (60, 63, 66):
        with appliance.start("update") as process:
            deadline = time.monotonic() + 60
            while len(server.paths("*.cacnk")) < number:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.002)
            process.kill()
            process.wait()
    assert len(list(appliance.staging.glob("left-*.journal"))) == 1
    assert appliance.update()["outcome"] == "updated"
    fetched = server.paths("*.cacnk")
    in_flight = 3 * 8  # half a megabyte, in chunks of 64 kB
    assert len(fetched) - len(set(fetched)) <= in_flight


def test_two_at_once(site: Site, server: WebServer, appliance: Appliance) -> None:
    appliance.trigger(".")
    server.fail("*.cacnk", delay=0.05)
    ends: list[dict[str, object]] = []
    threads = [threading.Thread(target=lambda: ends.append(appliance.update())) for _ in range(2)]
    appliance.command("update")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [end["outcome"] for end in ends] == ["updated", "current"]
    assert appliance.log() == ["."]
    fetched = server.paths("*.cacnk")
    assert len(fetched) == len(set(fetched))


class TestRollback:
    def test_there_and_back(self, site: Site, appliance: Appliance) -> None:
        appliance.trigger("version", appliance.note('"$CASYNC_UPDATER_NEW_VERSION"'))
        done = None
        for version in ("1.1", "1.2"):
            updated(site, version)
            appliance.update()
        done = appliance.run("rollback", "tree")
        assert "casync-updater resume tree" in done.stdout
        assert (appliance.destination / "version").read_text() == "1.1"
        status = appliance.status()
        assert status["installed"]["version"] == "1.1"
        assert status["held"] == "rolled back to 1.1"
        end = appliance.update()
        assert end["outcome"] == "current"
        assert "held" in end["message"]
        assert (appliance.destination / "version").read_text() == "1.1"
        updated(site, "1.3")
        assert "held" in appliance.update()["message"]
        assert appliance.check()["update"] is False
        done = appliance.run("rollback", "tree", code=1)
        assert "no previous version is kept" in done.stderr
        appliance.run("resume", "tree")
        assert appliance.update()["version"] == "1.3"
        assert appliance.status()["held"] is None
        assert appliance.log() == ["1.1", "1.2", "1.1", "1.3"]
        assert digest_of(appliance.destination, site) == site.release().digest

    def test_resume_comes_back_to_the_version_that_was_left(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        appliance.update()
        updated(site, "2.0")
        appliance.update()
        appliance.run("rollback", "tree")
        appliance.run("resume", "tree")
        server.requests.clear()
        assert appliance.update()["version"] == "2.0"
        assert digest_of(appliance.destination, site) == site.release().digest

    def test_a_held_version_is_repaired(self, site: Site, appliance: Appliance) -> None:
        appliance.update()
        first = snapshot(appliance.destination)
        updated(site, "2.0")
        appliance.update()
        appliance.run("rollback", "tree")
        (appliance.destination / "bin" / "tool").write_text("changed by hand")
        end = appliance.update("--reason", "start")
        assert "repaired" in end["message"]
        assert snapshot(appliance.destination) == first
        assert appliance.status()["held"] == "rolled back to 1.0"
        assert appliance.status()["installed"]["version"] == "1.0"
        assert "held" in appliance.update()["message"]

    def test_a_kept_version_that_was_changed(self, site: Site, appliance: Appliance) -> None:
        appliance.update()
        updated(site, "2.0")
        appliance.update()
        (kept,) = appliance.staging.glob("previous-*")
        (kept / "bin" / "tool").unlink()
        (kept / "bin" / "tool").write_text("changed by hand")
        before = snapshot(appliance.destination)
        done = appliance.run("rollback", "tree", code=4)
        assert "bin/tool (" in done.stderr
        assert snapshot(appliance.destination) == before
        assert appliance.verify() == {}

    def test_nothing_was_installed_yet(self, appliance: Appliance) -> None:
        appliance.run("rollback", "tree", code=1)
        appliance.run("verify", "tree", code=1)
        done = appliance.run("rollback", "other", code=2)
        assert "no entry is named other; there are: tree" in done.stderr

    @pytest.mark.parametrize("keep", [0, 1, 2])
    def test_what_is_kept(self, site: Site, appliance: Appliance, keep: int) -> None:
        """After ten updates nothing has grown; so many times one can go back."""
        appliance.entry["keep"] = keep
        appliance.trigger(".")
        appliance.update()
        after_three: list[str] = []
        for number in range(1, 6 if keep != 1 else 11):
            updated(site, f"2.{number}")
            appliance.update()
            if number == 3:
                after_three = strays(appliance)
        kept = list(appliance.staging.glob("previous-*")) if appliance.staging.exists() else []
        assert len(kept) == keep
        now = strays(appliance)
        assert len(now) == len(after_three), set(now) ^ set(after_three)
        assert not [name for name in now if name.endswith((".cacnk", ".changes", "/new"))]
        state = (appliance.state_dir / "tree" / "state.json").stat().st_size
        assert state < 20_000
        for number in range(keep):
            appliance.run("rollback", "tree")
            version = 10 if keep == 1 else 5
            assert appliance.status()["installed"]["version"] == f"2.{version - number - 1}"
            assert appliance.verify() == {}
        appliance.run("rollback", "tree", code=1)


class TestHealth:
    def test_a_version_that_fails_goes_back(self, site: Site, appliance: Appliance) -> None:
        target = appliance.destination
        appliance.trigger(".", appliance.note('"$CASYNC_UPDATER_NEW_VERSION"'))
        appliance.entry["healthCheck"] = ["true", f"! grep bad {target}/version"]
        updated(site, "1.1")
        appliance.update()
        updated(site, "bad 1.2")
        end = appliance.update(code=1)
        assert "health check" in end["message"]
        assert "back to 1.1" in end["message"]
        assert (target / "version").read_text() == "1.1"
        assert appliance.verify() == {}
        assert appliance.log() == ["1.1", "bad 1.2", "1.1"]
        status = appliance.status()
        assert status["installed"]["version"] == "1.1"
        assert "health check" in status["lastError"]
        end = appliance.update()
        assert (end["outcome"], end["exit"]) == ("current", 0)
        assert "bad 1.2 failed here before" in end["message"]
        assert appliance.check()["update"] is False
        appliance.entry["healthCheck"] = ["true"]
        assert appliance.update()["outcome"] == "current"
        appliance.run("resume", "tree")
        assert appliance.update()["version"] == "bad 1.2"

    def test_the_way_further_back_is_kept(self, site: Site, appliance: Appliance) -> None:
        """A version that failed does not take the place of the one before the last."""
        appliance.entry["healthCheck"] = [f"! grep bad {appliance.destination}/version"]
        for version in ("1.1", "1.2"):
            updated(site, version)
            appliance.update()
        updated(site, "bad")
        assert "back to 1.2" in appliance.update(code=1)["message"]
        appliance.update()
        (kept,) = appliance.staging.glob("previous-*")
        assert (kept / "version").read_text() == "1.1"
        appliance.run("rollback", "tree")
        assert appliance.status()["installed"]["version"] == "1.1"
        assert appliance.verify() == {}

    def test_a_newer_version_after_a_bad_one(self, site: Site, appliance: Appliance) -> None:
        appliance.entry["healthCheck"] = [f"! grep bad {appliance.destination}/version"]
        updated(site, "1.1")
        appliance.update()
        updated(site, "bad")
        appliance.update(code=1)
        updated(site, "1.3")
        assert appliance.update()["version"] == "1.3"

    def test_a_first_version_that_fails_stays(self, site: Site, appliance: Appliance) -> None:
        appliance.entry["healthCheck"] = ["exit 3"]
        end = appliance.update(code=1)
        assert "there is no version to go back to" in end["message"]
        assert snapshot(appliance.destination) == snapshot(site.source)
        assert appliance.update()["outcome"] == "current"

    def test_verify_is_a_health_check(self, site: Site, appliance: Appliance) -> None:
        """Its own cycle holds the entry and waits for it: waiting for that would never end."""
        parts = ("env", f"PYTHONPATH={SOURCES}", *appliance.command("verify", "tree"))
        appliance.entry["healthCheck"] = [" ".join(shlex.quote(str(part)) for part in parts)]
        began = time.monotonic()
        updated(site, "1.1")
        assert appliance.update()["version"] == "1.1"
        appliance.trigger(".", f"echo vandal > {appliance.destination}/version")
        updated(site, "1.2")
        assert "health check" in appliance.update(code=1)["message"]
        assert time.monotonic() - began < 30

    def test_a_health_check_has_the_time_limit_of_actions(
        self, site: Site, appliance: Appliance
    ) -> None:
        appliance.update()
        appliance.settings("[actions]\ntimeout = 1\n")
        appliance.entry["healthCheck"] = ["sleep 60"]
        updated(site, "2.0")
        assert "ended after" in appliance.update(code=1)["message"]
        assert appliance.status()["installed"]["version"] == "1.0"


class TestCommands:
    def test_check_says_what_would_change(
        self, site: Site, server: WebServer, appliance: Appliance
    ) -> None:
        found = appliance.check()
        assert (found["update"], found["version"], found["installed"]) == (True, "1.0", None)
        assert found["download"] > 700_000
        assert "bin/tool" in found["added"]
        assert not appliance.destination.exists()
        assert not appliance.state_dir.exists() or not list(appliance.state_dir.rglob("*.json"))
        appliance.update()
        found = appliance.check()
        assert (found["update"], found["download"]) == (False, 0)
        site.write("bin/tool", "changed", 0o755)
        site.write("new\nfile", "added")
        (site.source / "read-only").unlink()
        site.publish(version="2.0", changes="one thing\nand another")
        before = {path: path.stat().st_mtime_ns for path in appliance.state_dir.rglob("*")}
        server.requests.clear()
        found = appliance.check()
        assert (found["update"], found["version"], found["installed"]) == (True, "2.0", "1.0")
        assert found["digest"] == site.release().digest
        assert found["serial"] == site.release().serial
        assert (found["added"], found["removed"]) == (["new\\012file"], ["read-only"])
        assert found["changed"] == ["bin/tool"]
        assert 0 < found["download"] < 800_000
        assert server.paths("*.cacnk") == []
        assert {path: path.stat().st_mtime_ns for path in appliance.state_dir.rglob("*")} == before
        text = appliance.run("check").stdout
        assert "tree: 1.0 -> 2.0" in text
        assert "1 added, 1 changed, 1 removed" in text
        assert "* one thing" in text
        server.close()
        appliance.impatient()
        assert "cannot be reached" in appliance.check(code=3)["error"]

    def test_status_and_verify(self, site: Site, server: WebServer, appliance: Appliance) -> None:
        document = appliance.run("status", "--json").json
        assert (document["version"], document["online"]) == (__version__, None)
        status = appliance.status()
        assert (status["name"], status["project"]) == ("tree", "tree")
        assert status["destination"] == str(appliance.destination)
        for key in ("installed", "lastCheck", "lastSuccess", "nextCheck", "refused", "lastError"):
            assert status[key] is None, key
        assert (status["held"], status["pending"], status["atomic"]) == (None, [], True)
        assert status["state"] == "idle"
        appliance.update()
        status = appliance.status()
        assert status["installed"]["version"] == "1.0"
        assert status["installed"]["serial"] == site.release().serial
        assert status["installed"]["digest"] == site.release().digest
        assert status["installed"]["source"] == f"{server.url}/tree.caidx.release"
        assert status["lastSuccess"] == status["lastCheck"] >= status["installed"]["since"]
        found = appliance.run("verify", "--json", "tree").json
        assert found == {
            "entry": "tree",
            "version": "1.0",
            "digest": site.release().digest,
            "differences": [],
        }
        success = status["lastSuccess"]
        server.close()
        appliance.impatient()
        appliance.update(code=3)
        status = appliance.status()
        assert "cannot be reached" in status["lastError"]
        assert status["lastSuccess"] == success
        assert "1.0 since" in appliance.run("status").stdout

    def test_plain_lines_where_there_is_no_terminal(self, appliance: Appliance) -> None:
        done = appliance.run("update")
        assert done.stdout == "tree: updated to 1.0\n"
        assert "tree: building 1.0\n" in done.stderr
        assert "\r" not in done.stderr
        assert "\x1b" not in done.stderr

    def test_a_reader_that_goes_away(self, appliance: Appliance) -> None:
        read, write = os.pipe()
        os.close(read)
        process = subprocess.run(
            appliance.command("status", "--json"),
            check=False,
            stdout=write,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        )
        os.close(write)
        assert process.stderr == b""

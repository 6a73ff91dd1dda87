"""Triggers: which actions run, once, with what they are told; and nothing else is a shell's."""

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.client import SOURCES, Appliance, Site


@pytest.fixture
def small(tmp_path: Path) -> Site:
    site = Site(tmp_path / "publisher")
    for name in ("etc/app.conf", "etc/sub/deep.conf", "bin/tool", "etcetera", "doc/readme"):
        site.write(name, "first")
    site.publish(version="1.0")
    return site


@pytest.fixture
def device(tmp_path: Path, small: Site) -> Appliance:
    appliance = Appliance(tmp_path, small.root)
    for path in (".", "etc", "bin", "doc/readme", "etc/sub/deep.conf", "nowhere"):
        appliance.trigger(path)
    return appliance


ALL = [".", "etc", "bin", "doc/readme", "etc/sub/deep.conf"]


def test_a_first_install_adds_everything(device: Appliance) -> None:
    assert device.update()["actions"] == [device.note(repr(path)[1:-1]) for path in ALL]
    assert device.log() == ALL


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("echo new > etc/added", [".", "etc"]),
        ("echo second > etc/sub/deep.conf", [".", "etc", "etc/sub/deep.conf"]),
        ("rm etc/sub/deep.conf", [".", "etc", "etc/sub/deep.conf"]),
        ("rm -r bin", [".", "bin"]),
        ("rm -r bin && echo file > bin", [".", "bin"]),
        ("chmod +x bin/tool", [".", "bin"]),
        ("ln -sf app.conf etc/link", [".", "etc"]),
        ("echo second > etcetera", ["."]),
        ("mkdir nowhere", [".", "nowhere"]),
        ("touch bin/tool doc/readme etc; echo x > etcetera", ["."]),
    ],
)
def test_what_changed_decides(
    small: Site, device: Appliance, command: str, expected: list[str]
) -> None:
    device.update()
    device.journal.unlink()
    subprocess.run(["bash", "-c", command], cwd=small.source, check=True)
    small.publish()
    assert device.update()["outcome"] == "updated"
    assert device.log() == expected


def test_a_new_time_alone_fires_nothing(small: Site, device: Appliance) -> None:
    device.update()
    device.journal.unlink()
    os.utime(small.source / "bin" / "tool", (1, 1))
    small.publish(mtimes="keep")
    assert device.update()["outcome"] == "updated"
    assert int((device.destination / "bin" / "tool").stat().st_mtime) == 1
    assert device.log() == []


def test_each_action_once_in_the_order_of_the_configuration(small: Site, device: Appliance) -> None:
    first, second, third = (device.note(name) for name in ("first", "second", "third"))
    device.entry["triggers"] = [
        {"paths": ["doc", "bin"], "actions": [second, first]},
        {"paths": ["nowhere"], "actions": [third]},
        {"paths": ["."], "actions": [first, third, second]},
    ]
    assert device.update()["actions"] == [second, first, third]
    assert device.log() == ["second", "first", "third"]


def test_what_an_action_is_told(small: Site, device: Appliance) -> None:
    device.entry["name"] = "the-entry"
    told = device.folder / "told"
    copy = device.folder / "changes"
    device.entry["triggers"] = []
    device.trigger(".", f'env > {told}; pwd >> {told}; cp "$CASYNC_UPDATER_CHANGES" {copy}')
    device.update()
    assert "CASYNC_UPDATER_OLD_VERSION=\n" in told.read_text()
    small.write("etc/new\nline \\ and space", "x")
    small.write("bin/tool", "second")
    (small.source / "doc" / "readme").unlink()
    small.publish(version="2.0 (test)")
    device.update("--reason", "media")
    lines = told.read_text().splitlines()
    for line in (
        "CASYNC_UPDATER_ENTRY=the-entry",
        "CASYNC_UPDATER_OLD_VERSION=1.0",
        "CASYNC_UPDATER_NEW_VERSION=2.0 (test)",
        "CASYNC_UPDATER_REASON=media",
        "/",
    ):
        assert line in lines
    assert copy.read_text().splitlines() == [
        "added etc/new\\012line\\040\\134\\040and\\040space",
        "changed bin/tool",
        "removed doc/readme",
    ]


def test_the_folder_that_actions_run_in(device: Appliance) -> None:
    folder = device.folder / "old folder"
    folder.mkdir()
    device.settings(f"[actions]\ndirectory = {folder}\n")
    device.entry["triggers"] = []
    device.trigger(".", f"pwd > {device.journal}")
    device.update()
    assert device.log() == [str(folder)]


def test_a_failing_action_is_reported_and_the_others_run(small: Site, device: Appliance) -> None:
    device.entry["triggers"] = []
    device.trigger(
        ".", device.note("one"), "echo it broke >&2; exit 7", "no-such-command", device.note("two")
    )
    end = device.update(code=1)
    assert device.log() == ["one", "two"]
    assert "it broke" in end["stderr"]
    assert "exit code 7" in end["message"]
    assert "no-such-command" in end["message"]
    status = device.status()
    assert status["installed"]["version"] == "1.0"
    assert "exit code 7" in status["lastError"]
    assert status["pending"] == []
    assert device.update()["outcome"] == "current"


@pytest.mark.skipif(
    os.access("/run/systemd/private", os.W_OK),
    reason="systemd runs the actions here, and its journal has what they print (tests/system)",
)
def test_the_output_goes_to_the_log_line_by_line(device: Appliance) -> None:
    device.entry["triggers"] = []
    device.trigger(".", "echo first line; echo second line >&2; printf 'no \\xff end'")
    stderr = device.update()["stderr"]
    assert "first line\n" in stderr
    assert "second line\n" in stderr
    assert "no " in stderr


def test_a_time_out_ends_the_whole_group(device: Appliance) -> None:
    device.settings("[actions]\ntimeout = 1\n")
    device.entry["triggers"] = []
    pids = device.folder / "pids"
    device.trigger(".", f"sleep 61 & echo $! > {pids}; sleep 62", device.note("next"))
    began = time.monotonic()
    end = device.update(code=1)
    assert time.monotonic() - began < 15
    assert "sleep 62" in end["message"]
    assert device.log() == ["next"]
    assert not _alive(int(pids.read_text()))


def test_what_an_action_leaves_running_lives_on(device: Appliance) -> None:
    device.entry["triggers"] = []
    pids = device.folder / "pids"
    device.trigger(".", f"sleep 63 & echo $! > {pids}")
    began = time.monotonic()
    device.update()
    assert time.monotonic() - began < 30
    pid = int(pids.read_text())
    try:
        assert _alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_an_action_that_asks_for_an_update_of_its_own_entry(small: Site, device: Appliance) -> None:
    answer = device.folder / "answer"
    # A unit, where systemd runs the action, has none of our environment.
    parts = ["env", f"PYTHONPATH={SOURCES}", *device.command("update")]
    command = " ".join(shlex.quote(str(part)) for part in parts)
    device.entry["triggers"] = []
    device.trigger(".", f"{command} > {answer} 2>&1; echo $? >> {answer}", device.note("after"))
    began = time.monotonic()
    assert device.update()["outcome"] == "current"
    assert time.monotonic() - began < 30
    assert "queued" in answer.read_text()
    assert answer.read_text().splitlines()[-1] == "0"
    assert device.log() == ["after"]
    assert device.status()["installed"]["version"] == "1.0"


def test_an_action_that_rolls_its_own_entry_back_and_resumes(
    small: Site, device: Appliance
) -> None:
    """What an action knows to be wrong with a version: it goes, and a later one may come."""

    def called(*words: str) -> str:
        command = " ".join(shlex.quote(str(part)) for part in device.command(*words))
        return f"if test $CASYNC_UPDATER_NEW_VERSION = 2.0; then {command}; fi >> {answer} 2>&1"

    answer = device.folder / "answer"
    device.entry["triggers"] = []
    device.trigger(".", called("rollback", "tree"), device.note("$CASYNC_UPDATER_NEW_VERSION"))
    device.update()
    small.write("etc/app.conf", "second")
    small.publish(version="2.0")
    began = time.monotonic()
    end = device.update()
    assert time.monotonic() - began < 30
    assert answer.read_text() == "tree: queued: it follows the cycle that this action belongs to\n"
    assert "held" in end["message"]
    assert device.status()["installed"]["version"] == "1.0"
    assert device.status()["held"] == "rolled back to 1.0"
    assert device.log() == ["1.0", "2.0", "1.0"]
    assert not (device.state_dir / "tree" / "queued").exists()
    device.entry["triggers"][0]["actions"][0] = "true"
    device.run("resume", "tree")
    assert device.update()["version"] == "2.0"
    drive = device.folder / "drive"
    drive.mkdir()
    device.entry["triggers"][0]["actions"][0] = " ".join(
        shlex.quote(str(part)) for part in device.command("export", "tree", drive)
    )
    small.write("etc/app.conf", "third")
    small.publish(version="3.0")
    assert device.update()["message"] == "up to date"
    device.run("verify-store", drive)


def test_a_command_left_in_the_background_does_not_ask_nobody(device: Appliance) -> None:
    """It has the action's environment, and no cycle is there any more to queue for."""
    device.update()
    device.environment["CASYNC_UPDATER_ENTRY"] = "tree"
    assert device.update()["message"] == "up to date"


def test_nothing_but_actions_reaches_a_shell(tmp_path: Path) -> None:
    flat = "$(touch trap);`touch trap`;touch trap;'\"&|>trap"
    site = Site(tmp_path / "publisher $(touch trap) `touch trap`", name="a;touch trap;$(id).caidx")
    site.write(f"{flat}/{flat}", "content")
    site.write("-rf", "x")
    site.publish(version=flat, changes=flat, project=flat)
    appliance = Appliance(tmp_path / "device; touch trap `touch trap`", site.root, site.name)
    appliance.entry |= {
        "dstPath": str(appliance.destination.parent / flat),
        "name": "evil",
        "project": flat,
        "preserve": [f"{flat} of the device"],
    }
    appliance.trigger(flat, f'printf %s "$CASYNC_UPDATER_NEW_VERSION" > {tmp_path}/version')
    folder = tmp_path / "somewhere"
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert appliance.update()["outcome"] == "updated"
        site.write("more", "x")
        site.publish(version=flat + "2", project=flat)
        assert appliance.update()["outcome"] == "updated"
        appliance.run("rollback", appliance.name)
        assert appliance.verify() == {}
        appliance.status()
        appliance.check()
        appliance.run("validate")
    finally:
        os.chdir(before)
    assert (tmp_path / "version").read_text() == flat
    assert list(folder.iterdir()) == []
    assert [str(path) for path in tmp_path.rglob("trap*")] == []
    assert not Path("/trap").exists()


def test_an_action_is_a_shell_command_as_it_stands(device: Appliance) -> None:
    """$ and quotes mean what they mean to bash: no other program reads the line before."""
    device.entry["triggers"] = []
    device.trigger(".", f"x='a b'; echo \"$x ${{x/a/%}} $((1 + 1))\" | cat > {device.journal}")
    device.update()
    assert device.log() == ["a b % b 2"]


def test_the_configuration_may_be_a_folder_with_several_entries(
    small: Site, device: Appliance
) -> None:
    folder = device.folder / "conf.d"
    folder.mkdir()
    other = {**device.entry, "dstPath": str(device.folder / "device" / "other")}
    (folder / "one.json").write_text(json.dumps([device.entry]))
    (folder / "two.json").write_text(json.dumps(other))
    (folder / "three.json").write_text("{")
    (folder / "notes.txt").write_text("left alone")
    done = device.run("--config", folder, "update", "--json")
    assert {name: end["outcome"] for name, end in done.json.items()} == {
        "tree": "updated",
        "other": "updated",
    }
    assert "three.json" in done.stderr
    done = device.run("--config", folder, "update", "--json", "other")
    assert list(done.json) == ["other"]

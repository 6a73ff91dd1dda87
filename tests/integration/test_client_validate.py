"""Bad configurations: each with its own message and exit code, and the healthy entries go on."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.client import Appliance, Site


@pytest.fixture
def appliance(tmp_path: Path, site: Site) -> Appliance:
    return Appliance(tmp_path, site.root)


def test_a_good_one(appliance: Appliance) -> None:
    done = appliance.run("validate")
    assert done.stderr == ""
    assert done.stdout.startswith("tree: ")
    assert "(atomically)" in done.stdout
    assert not appliance.state_dir.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"interval": -1}, "interval"),
        ({"interval": 0}, "interval"),
        ({"interval": "often"}, "interval"),
        ({"interval": True}, "interval"),
        ({"srcIndex": None}, "srcIndex"),
        ({"srcStore": 7}, "srcStore"),
        ({"dstPath": "relative/path"}, "dstPath"),
        ({"dstPath": ["/a"]}, "dstPath"),
        ({"srcIndex": "https://updates.example/tree.zip"}, "srcIndex"),
        ({"backupIndex": "/media/x.caidx"}, "backupStore"),
        ({"triggers": {"paths": ["."]}}, "triggers"),
        ({"triggers": [{"paths": ["."], "action": ["true"]}]}, "action"),
        ({"triggers": [{"paths": ["/etc"], "actions": ["true"]}]}, "/etc"),
        ({"triggers": [{"paths": ["../up"], "actions": ["true"]}]}, "../up"),
        ({"preserve": ["../up"]}, "preserve"),
        ({"preserve": "data"}, "preserve"),
        ({"startup": "true"}, "startup"),
        ({"keep": -1}, "keep"),
        ({"apply": "sometimes"}, "apply"),
        ({"dstpath": "/x"}, "dstpath"),
        ({"intervall": 5}, "interval"),
    ],
)
def test_bad_values(appliance: Appliance, changes: dict[str, Any], words: str) -> None:
    appliance.entry |= changes
    for command in ("validate", "update"):
        done = appliance.run(command, code=2)
        assert words in done.stderr
        assert "client.json" in done.stderr
        assert "Traceback" not in done.stderr
    assert not appliance.destination.exists()


@pytest.mark.parametrize("key", ["interval", "srcIndex", "srcStore", "dstPath"])
def test_missing_keys(appliance: Appliance, key: str) -> None:
    del appliance.entry[key]
    assert key in appliance.run("validate", code=2).stderr


def test_an_unknown_key_fails_validate_only(appliance: Appliance) -> None:
    appliance.entry["comment"] = "of the operator"
    assert "comment" in appliance.run("validate", code=2).stderr
    assert appliance.update()["exit"] == 0


def test_json_that_does_not_parse(appliance: Appliance) -> None:
    command = appliance.command("validate")
    assert command
    bad = appliance.folder / "bad.json"
    bad.write_text('[{"interval": 5,\n  "dstPath" "/x"}]')
    done = appliance.run("validate", bad, code=2)
    assert "bad.json" in done.stderr
    assert "line 2" in done.stderr
    assert "column 13" in done.stderr
    for text in ("", "7", "[7]", '{"interval": NaN}', "\x00", '{"interval": 1, "interval": 2}'):
        bad.write_text(text)
        done = appliance.run("validate", bad, code=2)
        assert "bad.json" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("below", ["", "/inside"])
def test_destinations_that_meet(appliance: Appliance, below: str) -> None:
    folder = appliance.folder / "conf"
    folder.mkdir()
    other = {**appliance.entry, "dstPath": str(appliance.destination) + below}
    (folder / "a.json").write_text(json.dumps(appliance.entry))
    (folder / "b.json").write_text(json.dumps([other]))
    done = appliance.run("validate", folder, code=2)
    assert "b.json" in done.stderr
    assert str(appliance.destination) in done.stderr


def test_every_problem_of_every_file_at_once(appliance: Appliance) -> None:
    folder = appliance.folder / "conf"
    folder.mkdir()
    bad = {**appliance.entry, "interval": 0, "keep": -1, "dstPath": "x"}
    (folder / "a.json").write_text(json.dumps([bad, appliance.entry]))
    (folder / "b.json").write_text("{")
    (folder / "casync-updater.conf").write_text("[fetch]\nretries = many\nretrys = 1\n[no]\n")
    done = appliance.run("validate", folder, code=2)
    for words in ("interval", "keep", "dstPath", "b.json", "retries", "retrys", "no"):
        assert words in done.stderr
    assert "tree: " in done.stdout
    done = appliance.run("--config", folder, "update", "--json")
    assert done.json["tree"]["outcome"] == "updated"


def test_wrong_usage(appliance: Appliance, tmp_path: Path) -> None:
    for arguments in (["updat"], ["update", "--no-such-option"], ["update", "nobody"], []):
        done = appliance.run(*arguments, code=2)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
    missing = tmp_path / "nowhere"
    done = appliance.run("validate", missing, code=2)
    assert str(missing) in done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    appliance.run("validate", empty, code=None)


def test_two_projects_with_one_name_are_warned_about(appliance: Appliance) -> None:
    other = {**appliance.entry, "dstPath": str(appliance.destination) + "2"}
    file = appliance.folder / "two.json"
    file.write_text(json.dumps([appliance.entry, other]))
    assert appliance.run("validate", file).stderr == ""
    other |= {"srcIndex": "https://updates.example/other.caidx", "project": "tree"}
    file.write_text(json.dumps([appliance.entry, other]))
    assert "project" in appliance.run("validate", file, code=2).stderr


def test_defaults_that_collide_get_their_parents(site: Site, appliance: Appliance) -> None:
    entries = []
    for parent in ("a", "b"):
        (appliance.folder / parent).mkdir()
        path = str(appliance.folder / parent / "www")
        entries.append({**appliance.entry, "dstPath": path})
    file = appliance.folder / "two.json"
    file.write_text(json.dumps(entries))
    done = appliance.run("--config", file, "update", "--json")
    assert sorted(done.json) == ["a-www", "b-www"]


def test_a_state_folder_that_cannot_be_used(appliance: Appliance) -> None:
    appliance.state_dir.write_text("a file")
    done = appliance.run("update", code=1)
    assert str(appliance.state_dir) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_destination_keeps_the_marks_only(site: Site, appliance: Appliance) -> None:
    appliance.update()
    old = site.beside(".release").read_bytes()
    site.write("more", "x")
    site.publish(version="2.0")
    appliance.update()
    moved = appliance.destination.with_name("elsewhere")
    appliance.entry |= {"dstPath": str(moved), "name": "tree"}
    assert appliance.update()["version"] == "2.0"
    assert (moved / "more").exists()
    appliance.entry["dstPath"] = str(moved) + "2"
    site.beside(".release").write_bytes(old)
    end = appliance.update()
    assert "stale" in end["message"]
    assert not Path(appliance.entry["dstPath"]).exists()

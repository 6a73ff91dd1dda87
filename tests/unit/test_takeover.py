"""An old installation, as the old installer left it, and what becomes of it."""

import json
from pathlib import Path

import pytest

from casync_updater.takeover import take_over

SELF_UPDATE = {
    "interval": 1800000,
    "srcIndex": "https://update.casync-updater.net/master/index.caidx",
    "srcStore": "https://update.casync-updater.net/master/store.castr",
    "dstPath": "/opt/casync-updater",
    "triggers": [{"paths": ["."], "actions": ["systemctl restart casync-updater.service"]}],
}
FIRST_SELF_UPDATE = {
    "interval": 1800000,
    "srcIndex": "https://bccsa.github.io/casync-updater/index.caidx",
    "srcStore": "https://bccsa.github.io/casync-updater/store.castr",
    "dstPath": "/opt/casync-updater/",
}
OWN = {
    "comment": "Kantine, Großanzeige",
    "interval": 60000,
    "srcIndex": "http://10.0.0.1/menu.caidx",
    "srcStore": "http://10.0.0.1/menu.castr",
    "dstPath": "/srv/menu",
    "triggers": [{"paths": ["."], "actions": ["./restart-menu.sh"]}],
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "opt/casync-updater").mkdir(parents=True)
    (tmp_path / "opt/casync-updater/client.js").write_text("// the old client\n")
    settings = tmp_path / "etc/casync-updater"
    settings.mkdir(parents=True)
    (settings / "client.json").write_text(json.dumps([SELF_UPDATE]))
    return tmp_path


def listing(root: Path) -> dict[str, bytes]:
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def test_the_self_update_is_set_aside_and_actions_keep_their_folder(old: Path) -> None:
    before = (old / "etc/casync-updater/client.json").read_bytes()
    (old / "etc/casync-updater/menu.json").write_text(json.dumps(OWN))

    report = take_over(old)

    assert listing(old / "etc/casync-updater") == {
        "client.json.set-aside": before,
        "menu.json": json.dumps(OWN).encode(),
        "casync-updater.conf.d/old-installation.conf": (
            old / "etc/casync-updater/casync-updater.conf.d/old-installation.conf"
        ).read_bytes(),
    }
    drop_in = (old / "etc/casync-updater/casync-updater.conf.d/old-installation.conf").read_text()
    assert drop_in.endswith("[actions]\ndirectory = /opt/casync-updater\n")
    assert (old / "opt/casync-updater/client.js").exists()
    assert "client.json.set-aside" in report.done[0]
    assert "rm -r /opt/casync-updater" in report.left[0]


def test_entries_in_the_same_file_stay_and_the_file_keeps_its_mode(old: Path) -> None:
    file = old / "etc/casync-updater/client.json"
    file.write_text(json.dumps([OWN, SELF_UPDATE]))
    file.chmod(0o640)
    before = file.read_bytes()

    take_over(old)

    assert json.loads(file.read_bytes()) == [OWN]
    assert "Großanzeige" in file.read_text("utf-8")
    assert file.stat().st_mode & 0o777 == 0o640
    assert file.with_name("client.json.set-aside").read_bytes() == before


def test_a_second_run_changes_nothing(old: Path) -> None:
    take_over(old)
    before = listing(old)
    assert take_over(old).done == ()
    assert listing(old) == before


def test_the_first_installer_s_entry_may_stand_alone(old: Path) -> None:
    file = old / "etc/casync-updater/default.json"
    file.write_text(json.dumps(FIRST_SELF_UPDATE))
    take_over(old)
    assert not file.exists()
    assert file.with_name("default.json.set-aside").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"srcIndex": "http://10.0.0.1/casync-updater.caidx"},
        {"dstPath": "/opt/casync-updater-data"},
        {"dstPath": ["/opt/casync-updater"]},
        {"startup": ["/opt/casync-updater/kiosk.sh"]},
        {"triggers": [{"paths": ["."], "actions": ["./mine.sh"]}]},
        {"triggers": {"paths": ["."], "actions": "./mine.sh"}},
        {"triggers": "./mine.sh"},
    ],
)
def test_an_entry_that_does_anything_else_is_not_touched(
    old: Path, changed: dict[str, object]
) -> None:
    file = old / "etc/casync-updater/client.json"
    file.write_text(json.dumps([{**SELF_UPDATE, **changed}]))
    before = file.read_bytes()
    take_over(old)
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "null", "[1, null]", '"x"', "\ufeff[]", "\0"])
def test_a_broken_file_is_left_for_validate(old: Path, text: str) -> None:
    broken = old / "etc/casync-updater/a.json"
    broken.write_text(text)
    take_over(old)
    assert broken.read_text() == text
    assert (old / "etc/casync-updater/client.json.set-aside").exists()


def test_what_was_set_aside_before_is_not_overwritten(old: Path) -> None:
    (old / "etc/casync-updater/client.json.set-aside").write_text("older")
    take_over(old)
    assert (old / "etc/casync-updater/client.json.set-aside").read_text() == "older"
    assert (old / "etc/casync-updater/client.json.set-aside.2").exists()


def test_a_copied_unit_that_would_hide_the_new_one_is_set_aside(old: Path) -> None:
    unit = old / "etc/systemd/system/casync-updater.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=nodejs /opt/casync-updater/client.js /etc/x\n")
    take_over(old)
    assert [file.name for file in unit.parent.iterdir()] == ["casync-updater.service.set-aside"]


def test_an_administrator_s_own_unit_stays(old: Path) -> None:
    unit = old / "etc/systemd/system/casync-updater.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/usr/bin/casync-updater run\n")
    take_over(old)
    assert unit.exists()


def test_things_that_are_no_text_files_are_no_obstacle(old: Path) -> None:
    (old / "etc/casync-updater/folder.json").mkdir()
    (old / "etc/casync-updater/gone.json").symlink_to("nowhere")
    unit = old / "etc/systemd/system/casync-updater.service"
    unit.parent.mkdir(parents=True)
    unit.write_bytes(b"\xff\xfe")
    take_over(old)
    assert (old / "etc/casync-updater/client.json.set-aside").exists()


def test_where_nothing_is_installed_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "etc/casync-updater").mkdir(parents=True)
    report = take_over(tmp_path)
    assert (report.done, report.left) == ((), ())
    assert listing(tmp_path) == {}


def test_a_file_that_is_all_brackets_is_left(old: Path) -> None:
    file = old / "etc/casync-updater/brackets.json"
    file.write_text("[" * 200_000)
    assert any("brackets.json is not valid JSON" in line for line in take_over(old).left)

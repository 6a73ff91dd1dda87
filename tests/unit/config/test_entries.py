"""Client entries: what loads, one broken fixture per error, and nothing that is ever raised."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casync_updater.config.entries import entry_names, load_entries
from casync_updater.model import Apply, Entry, Location, Trigger

ROOT = Path(__file__).parents[3]


def plain(**changes: object) -> dict[str, object]:
    """A correct entry; a change to `...` takes the key out."""
    entry: dict[str, object] = {
        "interval": 3600000,
        "srcIndex": "https://project1.example/updates/fancyName.caidx",
        "srcStore": "https://project1.example/updates/fancyName.castr",
        "dstPath": "/opt/project1",
    }
    entry |= changes
    return {key: value for key, value in entry.items() if value is not ...}


def written(folder: Path, value: object, name: str = "client.json") -> Path:
    file = folder / name
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return file


def only(path: Path) -> Entry:
    loaded = load_entries(path)
    assert loaded.problems == ()
    (entry,) = loaded.entries
    return entry


BACKUP = {
    "backupIndex": "/media/backupDrive/project1/fancyName.caidx",
    "backupStore": "/media/backupDrive/project1/fancyName.castr",
}


def test_the_old_plain_example_loads_as_it_is(tmp_path: Path) -> None:
    file = written(tmp_path, [plain(dstPath="/usr/bin/project1")])
    assert only(file) == Entry(
        name="project1",
        project="fancyName",
        interval=3600.0,
        source=Location(
            "https://project1.example/updates/fancyName.caidx",
            "https://project1.example/updates/fancyName.castr",
        ),
        backup=None,
        destination=Path("/usr/bin/project1"),
        file=file,
    )


def test_the_old_example_with_backup_triggers_and_startup_loads_as_it_is(tmp_path: Path) -> None:
    entry = plain(
        **BACKUP,
        triggers=[
            {
                "paths": ["path/to/file1", ".", "path/to/dir2"],
                "actions": ["path/to/command1", "command2"],
            }
        ],
        startup=["first/command", "second/command"],
    )
    found = only(written(tmp_path, [entry]))
    assert found.backup == Location(BACKUP["backupIndex"], BACKUP["backupStore"])
    assert found.triggers == (
        Trigger(("path/to/file1", ".", "path/to/dir2"), ("path/to/command1", "command2")),
    )
    assert found.startup == ("first/command", "second/command")


def test_the_installed_example_loads_without_a_warning() -> None:
    loaded = load_entries(ROOT / "conf" / "examples" / "client.json")
    assert (loaded.problems, loaded.warnings) == ((), ())
    assert [entry.name for entry in loaded.entries] == [
        "myproject",
        "website",
        "casync-updater-packages",
    ]


def test_every_new_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "vendor.gpg").write_bytes(b"key")
    entry = plain(
        name="front-end",
        project="shop",
        signedBy="vendor.gpg",
        preserve=["./data//local/", "log"],
        keep=0,
        healthCheck=["true"],
        apply="in-place",
    )
    found = only(written(tmp_path, entry))
    assert (found.name, found.project) == ("front-end", "shop")
    assert found.signed_by == (tmp_path / "vendor.gpg",)
    assert found.preserve == ("data/local", "log")
    assert (found.keep, found.health_check, found.apply) == (0, ("true",), Apply.IN_PLACE)


@pytest.mark.parametrize(
    ("given", "index"),
    [
        ("HTTPS://host/a/x.caidx", "https://host/a/x.caidx"),
        ("http://user:secret@host:8080/x.caidx?token=1", None),
        ("file:///srv/a%20b/x.caidx", "/srv/a b/x.caidx"),
        ("file://localhost/srv/x.caidx", "/srv/x.caidx"),
        ("file:/srv/x.caidx", "/srv/x.caidx"),
        ("//srv/./x.caidx", "/srv/x.caidx"),
    ],
)
def test_sources_that_are_supported(tmp_path: Path, given: str, index: str | None) -> None:
    store = given.replace(".caidx", ".castr")
    found = only(written(tmp_path, plain(srcIndex=given, srcStore=store)))
    assert found.source.index == (index or given)
    assert (found.project, found.is_archive) == ("x", True)


def test_trigger_paths_are_brought_into_their_shortest_form(tmp_path: Path) -> None:
    trigger = {"paths": ["./a/", "a//b", ".", "./"], "actions": ["x"]}
    found = only(written(tmp_path, plain(triggers=[trigger])))
    assert found.triggers[0].paths == ("a", "a/b", ".", ".")


def test_a_file_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert only(written(tmp_path, "\ufeff" + json.dumps(plain()))).name == "project1"


WRONG_VALUES: list[tuple[dict[str, Any], str, str]] = [
    ({"interval": ...}, "interval", "is missing.*milliseconds"),
    ({"interval": 0}, "interval", "is 0 ms"),
    ({"interval": -3600000}, "interval", "is -3600000 ms"),
    ({"interval": 60}, "interval", "is 60 ms"),
    ({"interval": 10**400}, "interval", "a year"),
    ({"interval": True}, "interval", "must be a number, and is true"),
    ({"interval": "3600000"}, "interval", "without the quotes"),
    ({"interval": None}, "interval", "and is null"),
    ({"interval": float("nan")}, "interval", "NaN"),
    ({"interval": float("inf")}, "interval", "Infinity"),
    ({"srcIndex": ...}, "srcIndex", "is missing"),
    ({"srcIndex": "ftp://host/x.caidx"}, "srcIndex", "ftp: is not supported, use http"),
    ({"srcIndex": "updates/x.caidx"}, "srcIndex", "a relative path"),
    ({"srcIndex": "https://host/x.tar"}, "srcIndex", "ends in .caidx"),
    ({"srcIndex": "https://host/x?y=.caidx"}, "srcIndex", "ends in .caidx"),
    ({"srcIndex": "https:///x.caidx"}, "srcIndex", "is no URL"),
    ({"srcIndex": "https:/host/x.caidx"}, "srcIndex", "is no URL"),
    ({"srcIndex": "https://host:0x/x.caidx"}, "srcIndex", "is no URL"),
    ({"srcIndex": "https://[::1/x.caidx"}, "srcIndex", "is no URL"),
    ({"srcIndex": "https://host/x#.caidx"}, "srcIndex", "%23"),
    ({"srcIndex": "file://host/x.caidx"}, "srcIndex", "three slashes"),
    ({"srcIndex": ["https://host/x.caidx"]}, "srcIndex", "and is a list"),
    ({"srcStore": ...}, "srcStore", "is missing"),
    ({"srcStore": ""}, "srcStore", "is empty"),
    ({"srcStore": "/srv/x.castr"}, "srcStore", "must be a URL where srcIndex is one"),
    ({"backupIndex": "/media/x.caidx"}, "backupStore", "is missing, and backupIndex is there"),
    ({"backupStore": "/media/x.castr"}, "backupIndex", "is missing, and backupStore is there"),
    (BACKUP | {"backupIndex": "/media/x.caibx"}, "backupIndex", "must end in .caidx"),
    (BACKUP | {"backupIndex": "https://h/x.caidx"}, "backupIndex", "a backup is a folder here"),
    (BACKUP | {"backupStore": "/opt/project1/x"}, "backupStore", "an update would remove it"),
    (BACKUP | {"backupStore": "/opt"}, "backupStore", "a store holds nothing but chunks"),
    ({"dstPath": ...}, "dstPath", "is missing"),
    ({"dstPath": "opt/project1"}, "dstPath", "must be an absolute path"),
    ({"dstPath": "/opt/a/../b"}, "dstPath", "without '..'"),
    ({"dstPath": "/"}, "dstPath", "belongs to the system"),
    ({"dstPath": "//usr/./bin/"}, "dstPath", "/usr/bin belongs to the system"),
    ({"dstPath": "/etc"}, "dstPath", "belongs to the system"),
    ({"dstPath": "/proc/self/cwd"}, "dstPath", "the kernel's|belongs to the system"),
    ({"dstPath": "/opt/.a.casync-updater/x"}, "dstPath", "are for new versions"),
    ({"dstPath": "/opt/" + "x" * 201}, "dstPath", "more than 200 bytes"),
    ({"dstPath": "/opt/" + "x" * 256}, "dstPath", "paths have at most"),
    ({"dstPath": "/opt/a\0b"}, "dstPath", "NUL"),
    ({"dstPath": "/opt/\ud800"}, "dstPath", "surrogate"),
    ({"dstPath": "/etc/passwd"}, "dstPath", "is no folder"),
    (
        {
            "srcIndex": "https://h/x.caibx",
            "srcStore": "https://h/x",
            "dstPath": "/usr/share/doc",
        },
        "dstPath",
        "is a folder, and",
    ),
    ({"triggers": {}}, "triggers", "must be a list"),
    ({"triggers": ["x"]}, "triggers[0]", "must be an object"),
    ({"triggers": [{"paths": ["."]}]}, "triggers[0].actions", "is missing"),
    ({"triggers": [{"paths": "a", "actions": []}]}, "triggers[0].paths", "must be a list"),
    (
        {"triggers": [{"paths": [".", "/a"], "actions": ["x"]}]},
        "triggers[0].paths[1]",
        "must be relative",
    ),
    ({"triggers": [{"paths": ["a/../.."], "actions": ["x"]}]}, "triggers[0].paths[0]", "'..'"),
    ({"triggers": [{"paths": [""], "actions": ["x"]}]}, "triggers[0].paths[0]", "is empty"),
    ({"triggers": [{"paths": ["."], "actions": [1]}]}, "triggers[0].actions[0]", "a number"),
    (
        {"triggers": [{"path": ["."], "paths": ["."], "actions": ["x"]}]},
        "triggers[0].path",
        "did you mean 'paths'",
    ),
    ({"startup": "command"}, "startup", "must be a list"),
    ({"startup": [None]}, "startup[0]", "and is null"),
    ({"name": "a/b"}, "name", "it names files"),
    ({"name": ".a"}, "name", "it names files"),
    ({"name": "-a"}, "name", "it names files"),
    ({"name": "a\n"}, "name", "it names files"),
    ({"name": ""}, "name", "is empty"),
    ({"project": "a\nb"}, "project", "one line"),
    ({"signedBy": "missing.gpg"}, "signedBy", "no file that can be read"),
    ({"signedBy": []}, "signedBy", "names no keyring"),
    ({"signedBy": None}, "signedBy", "and is null"),
    ({"preserve": ["."]}, "preserve[0]", "the whole destination"),
    ({"preserve": ["../x"]}, "preserve[0]", "'..'"),
    ({"preserve": ["/x"]}, "preserve[0]", "must be relative"),
    ({"preserve": ["a/b", "a"]}, "preserve", "'a/b' lies in 'a'"),
    ({"preserve": ["a", "./a"]}, "preserve", "more than once"),
    (
        {"preserve": ["a"], "srcIndex": "https://h/x.caibx", "srcStore": "https://h/x"},
        "preserve",
        "is for folders",
    ),
    ({"keep": -1}, "keep", "0 or more"),
    ({"keep": 1.5}, "keep", "a whole number"),
    ({"keep": False}, "keep", "and is false"),
    ({"healthCheck": "true"}, "healthCheck", "must be a list"),
    ({"apply": "inplace"}, "apply", "'atomic' or 'in-place'"),
    ({"selfUpdate": "yes"}, "selfUpdate", "must be true or false"),
    ({"selfUpdate": 1}, "selfUpdate", "must be true or false"),
    ({"selfupdate": True}, "selfupdate", "selfUpdate"),
    ({"selfUpdate": True, "apply": "in-place"}, "apply", "half there"),
    ({"selfUpdate": True, "preserve": ["x"]}, "preserve", "leave it out"),
    ({"selfUpdate": True, "healthCheck": ["true"]}, "healthCheck", "about to be replaced"),
    (
        {"selfUpdate": True, "triggers": [{"paths": ["."], "actions": ["true"]}]},
        "triggers",
        "before the packages are installed",
    ),
    (
        {"selfUpdate": True, "srcIndex": "https://project1.example/x.caibx"},
        "selfUpdate",
        "folders",
    ),
    ({"srcindex": "x"}, "srcindex", "did you mean 'srcIndex'"),
    ({"trigger": []}, "trigger", "did you mean 'triggers'"),
    ({"signed_by": "x"}, "signed_by", "did you mean 'signedBy'"),
]


@pytest.mark.parametrize(
    ("changes", "key", "message"), WRONG_VALUES, ids=lambda value: str(value)[:40]
)
def test_a_wrong_value_is_reported_by_file_entry_and_key(
    tmp_path: Path, changes: dict[str, object], key: str, message: str
) -> None:
    healthy = plain(dstPath="/opt/healthy")
    file = written(tmp_path, [plain(**changes), healthy])
    loaded = load_entries(file)
    assert [entry.name for entry in loaded.entries] == ["healthy"]
    (problem,) = loaded.problems
    assert re.fullmatch(
        rf"{re.escape(str(file))}: entry 1( \(.*\))?: {re.escape(key)}: .*({message}).*", problem
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            '{"interval": 1,\n}',
            "line 2, column 1: .*remove the comma|column 15: .*remove the comma",
        ),
        ("[\n1,\n]", "remove the comma"),
        ("{'interval': 1}", "line 1, column 2: .*double quotes"),
        ('{"a": “b”}', "double quotes"),
        ('{\n  // every hour\n  "interval": 1}', "line 2, column 3: .*no comments"),
        ('{"interval": 1 # every hour\n}', "no comments"),
        ('{"a": True}', "small letters"),
        ('{"a": 1\n "b": 2}', "line 2, column 2: .*comma is missing"),
        ('{"a": 1', "ends too early"),
        ('{"a": "b}', "no closing double quote"),
        ('{"a": "b\nc"}', "line break or tab"),
        (r'{"a": "C:\x"}', "a backslash"),
        ("{}\n{}", "into an array"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "9" * 5000 + "]", "thousands of digits"),
        (" " * (1 << 20) + "[]", "is larger than"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_json_is_reported_with_its_cause(
    tmp_path: Path, source: str, message: str
) -> None:
    broken = written(tmp_path, source, "a.json")
    written(tmp_path, plain(), "b.json")
    loaded = load_entries(tmp_path)
    assert len(loaded.entries) == 1
    (problem,) = loaded.problems
    assert problem.startswith(f"{broken}: ")
    assert re.search(message, problem)


def test_a_file_that_is_not_utf_8_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "client.json").write_bytes(b'{\n"name": "M\xfcller"}')
    (problem,) = load_entries(tmp_path).problems
    assert problem.endswith("is not UTF-8 (byte 0xfc in line 2); save it as UTF-8")


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    twice = json.dumps(plain())[:-1] + ', "dstPath": "/opt/project2"}'
    loaded = load_entries(written(tmp_path, twice))
    assert loaded.entries == ()
    assert "dstPath: stands more than once" in loaded.problems[0]


def test_all_errors_of_all_files_are_reported_at_once(tmp_path: Path) -> None:
    written(tmp_path, [plain(dstPath="/opt/x", interval=0, keep=-1), 7], "a.json")
    written(tmp_path, "nonsense", "b.json")
    written(tmp_path, plain(), "c.json")
    (tmp_path / "d.json").mkdir()
    (tmp_path / "e.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "f.json")
    loaded = load_entries(tmp_path)
    assert [entry.name for entry in loaded.entries] == ["project1"]
    places = [re.sub(r"^.*/", "", problem)[:20] for problem in loaded.problems]
    assert [place[:6] for place in places] == ["a.json"] * 3 + [f"{x}.json" for x in "bdef"]


def test_hidden_files_and_editors_copies_are_no_configuration(tmp_path: Path) -> None:
    written(tmp_path, plain(), "b.json")
    for name in (".a.json", "#a.json", "a.json~", ".#a.json", "a.json.bak", "~a.json"):
        written(tmp_path, "nonsense", name)
    assert only(tmp_path).name == "project1"


@pytest.mark.parametrize("value", [None, []])
def test_nothing_to_do_is_a_warning(tmp_path: Path, value: object) -> None:
    if value is not None:
        written(tmp_path, value)
    loaded = load_entries(tmp_path)
    assert (loaded.entries, loaded.problems) == ((), ())
    assert "nothing to do" in loaded.warnings[0]


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert load_entries(missing).problems == (
        f"{missing}: cannot be read: No such file or directory",
    )


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"comment": "ours"}, "comment: is no known key"),
        ({"triggers": [{"paths": [], "actions": ["x"]}]}, "triggers[0].paths: is an empty list"),
        ({"triggers": [{"paths": ["."], "actions": []}]}, "triggers[0].actions: is an empty"),
        ({"backupIndex": "", "backupStore": None}, "backupIndex: is empty"),
    ],
)
def test_what_has_no_effect_is_a_warning(
    tmp_path: Path, changes: dict[str, object], warning: str
) -> None:
    loaded = load_entries(written(tmp_path, plain(**changes)))
    assert (len(loaded.entries), loaded.problems) == (1, ())
    assert warning in loaded.warnings[0]


@pytest.mark.parametrize(
    "url",
    [
        "https://user:sEcret@host:0x/x.caidx",
        "https://user:sEc/ret@host/x.tar",
        "ftp://user:sEcret@host/x.caidx",
        "https://user:sEcret@host/x.tar?key=sEcret",
        "https:/user:sEcret@host/x.caidx",
        "user:sEcret@host/x.caidx",
        "https://user:a?sEcret@host/x.tar",
        "https://user:sEcret @host/x.tar",
    ],
)
def test_no_message_shows_credentials(tmp_path: Path, url: str) -> None:
    loaded = load_entries(written(tmp_path, plain(srcIndex=url, srcStore=url)))
    assert loaded.problems
    assert "sEc" not in "".join(loaded.problems + loaded.warnings)


def test_messages_are_single_printable_lines(tmp_path: Path) -> None:
    entry = plain(**{"apply": "\x1b[2J\nroot: hacked", "a\nb\ud800": 1})
    loaded = load_entries(written(tmp_path, entry))
    for message in loaded.problems + loaded.warnings:
        assert message.isprintable()


def test_equal_destinations_are_refused_with_both_places(tmp_path: Path) -> None:
    written(tmp_path, plain(name="one"), "a.json")
    written(tmp_path, [plain(dstPath="/opt/x"), plain(dstPath="/opt//project1/")], "b.json")
    loaded = load_entries(tmp_path)
    assert [entry.name for entry in loaded.entries] == ["x"]
    (problem,) = loaded.problems
    assert problem.startswith(f"{tmp_path}/b.json: entry 2 (project1): dstPath: ")
    assert f"entry 1 (one) in {tmp_path}/a.json" in problem


def test_a_broken_entry_does_not_stop_the_healthy_one_it_conflicts_with(tmp_path: Path) -> None:
    entries = [plain(keep=-1), plain(name="a"), plain(name="a", dstPath="/opt/x", keep=-1)]
    loaded = load_entries(written(tmp_path, entries))
    assert [entry.name for entry in loaded.entries] == ["a"]
    assert len(loaded.problems) == 4


def test_destinations_that_are_equal_behind_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    entries = [plain(dstPath=str(tmp_path / name)) for name in ("real", "link")]
    loaded = load_entries(written(tmp_path, entries))
    assert loaded.entries == ()
    assert "also the destination of entry 1 (real)" in loaded.problems[0]


@pytest.mark.parametrize("preserve", [[], ["data"]])
def test_a_destination_inside_another_is_refused(tmp_path: Path, preserve: list[str]) -> None:
    entries = [
        plain(dstPath="/opt/project1/data/maps"),
        plain(preserve=preserve),
        plain(dstPath="/opt/project10"),
    ]
    loaded = load_entries(written(tmp_path, entries))
    assert [entry.name for entry in loaded.entries] == ["project10"]
    (problem,) = loaded.problems
    assert "/opt/project1/data/maps lies inside /opt/project1" in problem


def test_a_destination_that_leads_to_a_system_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/usr")
    (problem,) = load_entries(written(tmp_path, plain(dstPath=str(tmp_path / "link")))).problems
    assert "/usr belongs to the system" in problem


def test_entries_that_a_server_could_swap_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "vendor.gpg").write_bytes(b"key")
    signed: dict[str, Any] = {"signedBy": "vendor.gpg", "project": "shop"}
    other = {"srcIndex": "https://h/x.caidx", "srcStore": "https://h/x.castr"}
    entries = [
        plain(**signed),
        plain(**signed, dstPath="/opt/same-index"),
        plain(**signed, **other, dstPath="/opt/b"),
    ]
    loaded = load_entries(written(tmp_path, entries))
    assert (len(loaded.entries), loaded.problems) == (3, ())
    (warning,) = loaded.warnings
    assert ": b: project: 'shop' and the keyring" in warning


def test_a_loop_of_links_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert only(written(tmp_path, plain(dstPath=str(tmp_path / "loop" / "x")))).name == "x"


def test_folders_that_may_not_be_searched_raise_nothing(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    file = written(tmp_path, plain(dstPath=f"{locked}/x/y", signedBy=f"{locked}/k"))
    code = (
        "import sys; from pathlib import Path;"
        "from casync_updater.config.entries import load_entries;"
        "from casync_updater.config.settings import load_settings, settings_files;"
        f"print(*load_entries(Path({str(file)!r})).problems, sep='\\n');"
        f"print(*load_entries(Path('{locked}/x')).problems, sep='\\n');"
        f"print(*load_settings(*settings_files(Path('{locked}/x'))).problems)"
    )
    # Root may search everything, unless it is told otherwise.
    rights = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    done = subprocess.run(
        [*(rights if os.geteuid() == 0 else []), sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    locked.chmod(0o700)
    assert done.stderr == ""
    first, second = done.stdout.splitlines()[:2]
    assert "signedBy: " in first
    assert second == f"{locked}/x: cannot be read: Permission denied"


def test_a_backup_may_lie_in_a_preserved_path(tmp_path: Path) -> None:
    places = {"backupIndex": "/opt/project1/b/x.caidx", "backupStore": "/opt/project1/b/x.castr"}
    assert only(written(tmp_path, plain(preserve=["b"], **places))).backup is not None


def test_names_that_were_given_twice_are_refused(tmp_path: Path) -> None:
    entries = [plain(name="a"), plain(name="a", dstPath="/opt/b"), plain(dstPath="/opt/c")]
    loaded = load_entries(written(tmp_path, entries))
    assert [entry.name for entry in loaded.entries] == ["c"]
    assert "entry 2 (a): name: 'a' is also the name of entry 1" in loaded.problems[0]


def test_mending_an_entry_renames_no_other(tmp_path: Path) -> None:
    def healthy(interval: int) -> list[str]:
        entries = [plain(dstPath="/srv/a/www"), plain(dstPath="/srv/b/www", interval=interval)]
        return [entry.name for entry in load_entries(written(tmp_path, entries)).entries]

    assert healthy(0) == ["a-www"]
    assert healthy(60000) == ["a-www", "b-www"]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["/srv/a/www", "/srv/b/www"], ["a-www", "b-www"]),
        (["/x/a/www", "/y/a/www", "/b/www"], ["x-a-www", "y-a-www", "b-www"]),
        (["/b-www", "/x/a/www", "/x/b/www"], ["b-www", "a-www", "x-b-www"]),
        (["/srv/.hidden", "/srv/über"], ["hidden", "ber"]),
        (["=www", "/srv/a/www"], ["www", "a-www"]),
    ],
)
def test_default_names(wanted: list[str], names: list[str]) -> None:
    assert entry_names([_wanted(each) for each in wanted]) == names


def _wanted(each: str) -> tuple[str | None, Path | None]:
    return (each[1:], Path("/given") / each[1:]) if each.startswith("=") else (None, Path(each))


def test_paths_without_a_parent_left_are_told_apart_by_a_hash() -> None:
    first, second = entry_names([(None, Path("/a b")), (None, Path("/a-b"))])
    assert first != second
    assert first is not None
    assert re.fullmatch(r"a-b-[0-9a-f]{8}", first)


PARTS = st.text(alphabet="ab- .ü", min_size=1, max_size=3).filter(
    lambda part: part not in (".", "..")
)
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: Path("/", *parts))


@hypothesis.settings(deadline=None)
@given(st.sets(PATHS, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_names_differ_are_valid_and_do_not_depend_on_the_order(
    paths: set[Path], random: Any
) -> None:
    order = sorted(paths)
    names = entry_names([(None, path) for path in order])
    assert len(set(names)) == len(paths)
    assert all(name and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) for name in names)
    mixed = list(order)
    random.shuffle(mixed)
    again = dict(zip(mixed, entry_names([(None, path) for path in mixed]), strict=True))
    assert [again[path] for path in order] == names


@hypothesis.settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, "a", "b-a"]), PATHS), max_size=6))
def test_a_given_name_stays_as_it_is(wanted: list[tuple[str | None, Path]]) -> None:
    names = entry_names(wanted)
    assert all(name in (None, found) for (name, _), found in zip(wanted, names, strict=True))


KEYS = st.sampled_from(
    "interval srcIndex srcStore backupIndex backupStore dstPath triggers startup name project"  # noqa: SIM905
    " signedBy preserve keep healthCheck apply selfUpdate paths actions comment".split()
) | st.text(max_size=5)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["/", "/opt/x", "http://h/x.caidx", "http://u:p@[/x.caidx", "file:", "a/..", "\ud800", "."]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@hypothesis.settings(deadline=None)
@given(VALUES)
def test_whatever_the_json_says_nothing_is_raised(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    file = written(tmp_path_factory.getbasetemp(), json.dumps(value))
    loaded = load_entries(file)
    for message in loaded.problems + loaded.warnings:
        assert message.startswith(f"{file}: ")
        assert message.isprintable()


@hypothesis.settings(deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.sampled_from(sorted(plain())))
def test_a_correct_entry_with_anything_added_raises_nothing(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, object], gone: str
) -> None:
    whole = plain() | extra
    file = written(tmp_path_factory.getbasetemp(), [whole, plain(dstPath="/opt/y/healthy")])
    loaded = load_entries(file)
    if extra.get("dstPath", 0) not in ("/opt/y", "/opt/y/healthy"):
        assert loaded.entries[-1].destination == Path("/opt/y/healthy")
    whole.pop(gone)
    assert load_entries(written(tmp_path_factory.getbasetemp(), whole)).problems


@hypothesis.settings(deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet="{}[]\",:1a'/\n\\", max_size=30).map(str.encode))
def test_whatever_the_bytes_are_nothing_is_raised(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.json"
    file.write_bytes(data)
    loaded = load_entries(file)
    assert loaded.entries == ()
    assert loaded.problems or loaded.warnings


def test_one_entry_receives_the_own_packages(tmp_path: Path) -> None:
    one = plain(name="one", selfUpdate=True)
    assert only(written(tmp_path, one)).self_update
    assert not only(written(tmp_path, plain(selfUpdate=False))).self_update
    two = plain(name="two", selfUpdate=True, dstPath="/opt/two")
    loaded = load_entries(written(tmp_path, [one, two, plain(name="three", dstPath="/opt/three")]))
    assert [entry.name for entry in loaded.entries] == ["three"]
    (problem,) = loaded.problems
    assert "client.json: entry 2 (two): selfUpdate: is also in entry 1 (one) in " in problem
    broken = plain(name="two", selfUpdate=True, dstPath="relative")
    assert [entry.name for entry in load_entries(written(tmp_path, [one, broken])).entries] == [
        "one"
    ]

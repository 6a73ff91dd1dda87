"""What the shell offers after Tab, asked as bash asks, and the manual: both know every option."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from casync_updater.config.settings import KEYS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "debian/completion"
STATUS = '{"entries": [\n{"name": "menu"},\n{"name": "music"}\n]}'


def completions(program: str, line: str, folder: Path) -> set[str]:
    """The words offered at the end of a command line, with a program that has two entries."""
    double = folder / "bin" / program
    double.parent.mkdir(exist_ok=True)
    double.write_text(f"#!/bin/sh\ncat <<'EOF'\n{STATUS}\nEOF\n")
    double.chmod(0o755)
    function = f"_{program.replace('-', '_')}"
    script = f"""
        compopt() {{ :; }}
        source {FOLDER / program}
        PATH={double.parent}:$PATH
        COMP_WORDS=({line.replace("^", "''")})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        {function}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("casync-updater veri", {"verify", "verify-store"}),
        ("casync-updater --sta", {"--state-dir"}),
        ("casync-updater update ^", {"menu", "music"}),
        ("casync-updater --config /x -v update mu", {"music"}),
        ("casync-updater update menu mu", {"music"}),
        ("casync-updater rollback menu ^", set()),
        ("casync-updater update --a", {"--accept-legacy"}),
        ("casync-updater status --j", {"--json"}),
        ("casync-updater online --w", {"--watch"}),
        ("casync-updater run --j", set()),
        ("casync-updater --config ^", set()),
    ],
)
def test_client(line: str, expected: set[str], tmp_path: Path) -> None:
    assert completions("casync-updater", line, tmp_path) == expected


def test_publisher_offers_commands_and_configuration_files(tmp_path: Path) -> None:
    (tmp_path / "site.json").touch()
    (tmp_path / "notes.txt").touch()
    offered = completions("casync-updater-server", "casync-updater-server ^", tmp_path)
    assert offered == {"keygen", "resign", "--json", "--version", "--help", "site.json"}
    offered = completions("casync-updater-server", "casync-updater-server resign ^", tmp_path)
    assert offered == {"site.json"}
    assert not completions("casync-updater-server", "casync-updater-server keygen ^", tmp_path)


def listed(*arguments: str) -> tuple[set[str], set[str]]:
    """The commands and the long options that the client's own help lists."""
    text = subprocess.run(
        [sys.executable, "-m", "casync_updater", *arguments, "--help"],
        env={"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(re.findall(r"^    (\w[\w-]*)  ", text, re.M)), set(re.findall(r"--\w[\w-]*", text))


def test_manual_and_completion_know_every_command_and_option(tmp_path: Path) -> None:
    manual = (FOLDER.parent / "man/casync-updater.1").read_text().replace("\\-", "-")
    commands, options = listed()
    assert "update" in commands
    assert "--config" in options
    offered = completions("casync-updater", "casync-updater ^", tmp_path)
    assert commands | options <= offered
    for command in commands:
        assert f".It Cm {command}\n" in manual or f".It Cm {command} " in manual
        _, after = listed(command)
        offered = completions("casync-updater", f"casync-updater {command} --", tmp_path)
        assert offered == after - {"--config"}, command
        options |= after
    for option in options:
        assert f"Fl {option.removeprefix('-')}" in manual or f", {option[1:]}" in manual, option


def synopsis(page: str) -> list[str]:
    """The lines of a manual page's synopsis, each whole, as people read it."""
    text = rendered(page)
    lines = text.split("\nSYNOPSIS\n")[1].split("\n\n")[0].splitlines()
    return [" ".join(line.split()) for line in lines]


def rendered(page: str) -> str:
    done = subprocess.run(
        ["man", "-l", "--warnings", str(FOLDER.parent / "man" / page)],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "200", "MANPAGER": "cat"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "", done.stderr
    return done.stdout


def test_the_synopsis_has_every_option_where_it_works() -> None:
    shown = {}
    for line in synopsis("casync-updater.1"):
        words = line.removeprefix("casync-updater [options] ").split()
        for command in [words[0], *words[2:3]] if "|" in words else words[:1]:
            shown[command] = set(re.findall(r"--\w[\w-]*", line))
    commands, _ = listed()
    assert shown == {command: listed(command)[1] - {"--help", "--config"} for command in commands}


def test_the_publishers_synopsis_is_its_usage() -> None:
    usage = subprocess.run(
        [sys.executable, "-m", "casync_updater.server", "--help"],
        env={"PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n\n")[0]
    lines = usage.removeprefix("usage: ").splitlines()
    assert synopsis("casync-updater-server.1") == [" ".join(line.split()) for line in lines]


def test_the_manual_knows_every_setting() -> None:
    text = rendered("casync-updater.conf.5").partition("\nSECTIONS\n")[2]
    sections = re.split(r"\[(\w+)\]", text)[1:]
    described = dict(zip(sections[::2], sections[1::2], strict=True))
    assert set(described) == set(KEYS)
    for section, keys in KEYS.items():
        missing = {key for key in keys if not re.search(rf"\b{key}\b", described[section])}
        assert not missing, (section, missing)


@pytest.mark.parametrize("page", sorted(path.name for path in (FOLDER.parent / "man").iterdir()))
def test_manual_pages_have_no_mistakes(page: str) -> None:
    assert "NAME" in rendered(page)

"""What the shell offers after Tab, asked as bash asks."""

import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "completion"
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
        ("casync-updater ver", {"verify", "verify-store"}),
        ("casync-updater --sta", {"--state-dir"}),
        ("casync-updater update ^", {"menu", "music"}),
        ("casync-updater --config /x -v update mu", {"music"}),
        ("casync-updater update menu mu", {"music"}),
        ("casync-updater rollback menu ^", set()),
        ("casync-updater update --a", {"--accept-legacy"}),
        ("casync-updater status --j", {"--json"}),
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
    assert offered == {"keygen", "resign", "--version", "--help", "site.json"}
    offered = completions("casync-updater-server", "casync-updater-server resign ^", tmp_path)
    assert offered == {"site.json"}
    assert not completions("casync-updater-server", "casync-updater-server keygen ^", tmp_path)

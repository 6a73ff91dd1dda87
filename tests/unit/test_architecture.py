"""The house stands as it is drawn: imports go down the floors, and other programs have one door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "casync_updater"

FLOORS = (
    ("errors", "clock", "codec", "files", "syscalls"),
    ("model",),
    ("formats", "release", "reports", "logs", "live"),
    ("tools", "config", "scheduler"),
    ("trust", "sources", "online", "children"),
    ("state", "takeover", "network", "drives"),
    ("cycle", "server", "daemon"),
    ("cli",),
    ("__main__",),
)
"""From the ground up; a room may import from its own floor and from those below."""

RANK = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def modules() -> list[Path]:
    return sorted(path for path in SRC.rglob("*.py") if path.name != "__init__.py")


def imported(path: Path) -> Iterator[str]:
    """Every module of the project that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("casync_updater"):
            if node.module == "casync_updater":
                yield from (f"casync_updater.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "casync_updater" or len(parts) < 2 or parts[1] == "__version__":
        return None
    return parts[1]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(SRC).parts[0].removesuffix(".py")
    upwards = {
        name
        for name in imported(path)
        if (other := room(name)) is not None and RANK[other] > RANK[own]
    }
    assert not upwards


def test_the_daemon_loads_neither_requests_nor_deb822() -> None:
    seen: set[str] = set()
    queue = ["casync_updater.daemon", "casync_updater.cli.run"]
    while queue:
        name = queue.pop()
        path = SRC.joinpath(*name.split(".")[1:]).with_suffix(".py")
        if name in seen or not path.exists():
            continue
        seen.add(name)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names]
                assert not {"requests", "urllib3", "debian", "tqdm"} & {
                    (found or "").split(".")[0] for found in names
                }, f"{name} loads what only a cycle's process needs"
                queue += [found for found in names if found and found.startswith("casync_updater")]
    assert "casync_updater.daemon" in seen


def test_other_programs_are_started_in_tools_only() -> None:
    """The daemon's children are this program itself, and so are the probes' processes."""
    allowed = {"children.py", "online/probe.py"}
    for path in modules():
        name = str(path.relative_to(SRC))
        if name.startswith("tools/") or name in allowed:
            continue
        assert "subprocess" not in set(imported(path)), f"{name} starts programs itself"

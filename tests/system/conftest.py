"""What the system tests share: packages are built once for all of them."""

import fcntl
from pathlib import Path

import pytest

from system.nspawn import RELEASES
from system.repository import Repository, build

NEWER = "1.0.1"
RELEASE_MARKS = [
    pytest.param(release, marks=[] if release == "bookworm" else pytest.mark.long)
    for release in RELEASES
]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of one test run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def packages(shared: Path) -> list[Path]:
    """The packages of this tree."""
    return _built_once(shared / "packages", None)


@pytest.fixture(scope="session")
def newer_packages(shared: Path) -> list[Path]:
    """The same as a newer version, for upgrades."""
    return _built_once(shared / "newer-packages", NEWER)


@pytest.fixture
def repository(tmp_path: Path, packages: list[Path]) -> Repository:
    """A signed repository with the packages of this tree."""
    repository = Repository(tmp_path / "repository")
    repository.publish(packages)
    return repository


def _built_once(target: Path, version: str | None) -> list[Path]:
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "done").exists():
            target.mkdir()
            build(target, version=version)
            (target / "done").touch()
    return sorted(target.glob("*.deb"))

"""What the system tests share: packages and disks are made once for all of them."""

import fcntl
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from system.nspawn import RELEASES, Machine
from system.repository import Repository, build, configure_apt, serve_packages
from system.vm import System, kernel, make_system, virtual_base

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
    return sorted(_once(shared / "packages", build).glob("*.deb"))


@pytest.fixture(scope="session")
def newer_packages(shared: Path) -> list[Path]:
    """The same as a newer version, for upgrades."""
    return sorted(_once(shared / "newer-packages", partial(build, version=NEWER)).glob("*.deb"))


@pytest.fixture
def repository(tmp_path: Path, packages: list[Path]) -> Repository:
    """A signed repository with the packages of this tree."""
    repository = Repository(tmp_path / "repository")
    repository.publish(packages)
    return repository


@pytest.fixture(scope="session")
def appliance(shared: Path, packages: list[Path]) -> System:
    """What virtual machines start from: bookworm with this tree's client, which has no entries."""
    folder = _once(shared / "appliance", partial(make_appliance, packages))
    return System("bookworm", "amd64", kernel("bookworm"), folder / "disk")


def make_appliance(packages: list[Path], target: Path) -> None:
    repository = Repository(target / "repository")
    repository.publish(packages)
    with (
        Machine("bookworm", target / "root", tar=virtual_base("bookworm")) as machine,
        serve_packages("127.0.0.1", repository) as server,
    ):
        configure_apt(machine, server, repository)
        machine.chroot("apt-get", "-qq", "update", timeout=1800)
        machine.chroot("apt-get", "install", "-y", "casync-updater", timeout=1800)
        machine.chroot("apt-get", "clean")
        make_system(machine.root, target / "disk", "bookworm")


def _once(target: Path, make: Callable[[Path], object]) -> Path:
    """Let the first process of a test run make a folder, and all of them use it."""
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "done").exists():
            target.mkdir()
            make(target)
            (target / "done").touch()
    return target

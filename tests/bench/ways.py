"""The ways to bring a directory up to date that are compared: ours and those of the peers.

Each has one destination on the device's disk. Where a way has no atomic step of its own, the new
tree is made beside the old one and the two are exchanged, as whoever builds an updater from it
has to do. What only clears away the tree before the last is left out of the peers' times.
"""

import json
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from lab import Cost, Lab
from link import SERVER

from casync_updater.syscalls import exchange


class Way(ABC):
    """One way, with one destination."""

    title = ""

    def __init__(self, here: Lab, name: str, place: str) -> None:
        """Nothing happens yet.

        Args:
            here: the machines.
            name: the tree that is installed.
            place: the folder on the device's disk that is this way's alone.
        """
        self.here = here
        self.name = name
        self.home = here.disk / place
        self.tree = self.home / "tree"
        self._new = self.home / "new"

    @abstractmethod
    def fresh(self, *, near: bool = False) -> Cost:
        """Install where nothing is."""

    @abstractmethod
    def update(self) -> Cost:
        """Bring what is there to the version that the server has now."""

    def remove(self) -> None:
        shutil.rmtree(self.home)

    def _clean(self) -> None:
        if self._new.exists():
            shutil.rmtree(self._new)

    def _exchange(self) -> None:
        exchange(self._new, self.tree)

    def _safely(self) -> tuple[list[str | Path] | Callable[[], None], ...]:
        """What ours does as well: no power cut leaves half a tree, and one older tree is kept."""
        older = self.home / "older"
        return (
            ["sync", "--file-system", self._new],
            self._exchange,
            ["sync", self.home],
            ["rm", "-rf", older],
            ["mv", "-T", self._new, older],
        )

    def _safely(self) -> tuple[list[str | Path] | Callable[[], None], ...]:
        """What ours does as well: no power cut leaves half a tree, one older tree is kept."""
        older = self.home / "older"
        keep: list[str | Path] = ["mv", "-T", self._new, older]
        return (
            ["sync", "--file-system", self._new],
            self._exchange,
            ["sync", self.home],
            ["rm", "-rf", older],
            keep,
        )


class Ours(Way):
    title = "casync-updater"

    def fresh(self, *, near: bool = False) -> Cost:
        self.home.mkdir()
        self.configure()
        return self.here.work(self.command("update"), near=near)

    def update(self) -> Cost:
        return self.here.work(self.command("update"))

    def configure(self, **keys: str) -> None:
        """Write the entry, with further keys."""
        entry = {
            "interval": 3_600_000,
            "srcIndex": self.here.url(f"{self.name}/tree.caidx"),
            "srcStore": self.here.url(f"{self.name}/store.castr"),
            "dstPath": str(self.tree),
            **keys,
        }
        (self.home / "entry.json").write_text(json.dumps(entry))

    def command(self, *arguments: str) -> list[str | Path]:
        options = ("--config", self.home / "entry.json", "--state-dir", self.home / "state")
        return [sys.executable, "-m", "casync_updater", *options, *arguments]


class CasyncInPlace(Way):
    title = "casync, in place"

    def fresh(self, *, near: bool = False) -> Cost:
        self.home.mkdir()
        return self.here.work(self._extract(self.tree), near=near)

    def update(self) -> Cost:
        return self.here.work(self._extract(self.tree))

    def _extract(self, target: Path, *options: str) -> list[str | Path]:
        store = f"--store={self.here.url(self.name)}/store.castr"
        index = self.here.url(f"{self.name}/tree.caidx")
        return ["casync", "extract", store, *options, index, target]


class CasyncStaged(CasyncInPlace):
    title = "casync, staged and exchanged"

    def update(self) -> Cost:
        self._clean()
        extract = self._extract(self._new, f"--seed={self.tree}", "--hardlink=yes")
        return self.here.work(extract, self._exchange)


class Rsync(Way):
    title = "rsync --link-dest, exchanged"

    def fresh(self, *, near: bool = False) -> Cost:
        self.home.mkdir()
        return self.here.work(self._rsync(self.tree, "--compress"), near=near)

    def update(self) -> Cost:
        self._clean()
        rsync = self._rsync(self._new, f"--link-dest={self.tree}")
        return self.here.work(rsync, self._exchange)

    def _rsync(self, target: Path, *options: str) -> list[str | Path]:
        source = f"rsync://{SERVER}/sources/{self.name}/"
        return ["rsync", "--archive", *options, source, f"{target}/"]


class OSTree(Way):
    title = "OSTree pull, checkout, exchanged"

    def fresh(self, *, near: bool = False) -> Cost:
        self.home.mkdir()
        self._ostree("init", "--mode=bare")
        self._ostree("remote", "add", "--no-gpg-verify", "server", self.here.url("ostree"))
        return self.here.work(*self._steps(self.tree), near=near)

    def update(self) -> Cost:
        self._clean()
        return self.here.work(*self._steps(self._new), self._exchange)

    @property
    def _repository(self) -> str:
        return f"--repo={self.home / 'repository'}"

    def _ostree(self, *arguments: str) -> None:
        subprocess.run(["ostree", self._repository, *arguments], check=True)

    def _steps(self, target: Path) -> tuple[list[str | Path], ...]:
        start: list[str | Path] = ["ostree", self._repository]
        return (
            [*start, "pull", "server", self.name],
            [*start, "checkout", "--require-hardlinks", f"server:{self.name}", target],
        )


def commit(here: Lab, name: str) -> None:
    """Publish the source tree of that name, as it is now, for OSTree."""
    repository = f"--repo={here.site / 'ostree'}"
    if not (here.site / "ostree").exists():
        subprocess.run(["ostree", repository, "init", "--mode=archive"], check=True)
    argv = ["ostree", repository, "commit", f"--branch={name}", f"--tree=dir={here.sources / name}"]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


class RsyncSynced(Rsync):
    title = "the same, synced, older tree removed"

    def update(self) -> Cost:
        rsync = self._rsync(self._new, f"--link-dest={self.tree}")
        return self.here.work(rsync, *self._safely())


class OSTreeSynced(OSTree):
    title = "the same, synced, older tree removed"

    def update(self) -> Cost:
        return self.here.work(*self._steps(self._new), *self._safely())


SYNCED: dict[type[Way], type[Way]] = {Rsync: RsyncSynced, OSTree: OSTreeSynced}


class RsyncSynced(Rsync):
    title = "the same, synced, older tree removed"

    def update(self) -> Cost:
        return self.here.work(self._rsync(self._new, f"--link-dest={self.tree}"), *self._safely())


class OSTreeSynced(OSTree):
    title = "the same, synced, older tree removed"

    def update(self) -> Cost:
        return self.here.work(*self._steps(self._new), *self._safely())


SYNCED: dict[type[Way], type[Way]] = {Rsync: RsyncSynced, OSTree: OSTreeSynced}
PEERS = (CasyncInPlace, CasyncStaged, Rsync, OSTree)

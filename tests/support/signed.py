"""A publisher who signs, in this process: sites, versions of a tree, keys, drives."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from casync_updater.model import Location, Publication, Release
from casync_updater.release import parse_release
from casync_updater.server.keygen import KeySet, keygen
from casync_updater.server.publish import publish
from casync_updater.server.signing import sign
from casync_updater.trust import unwrap

OWNER = "Example Ltd <updates@example.com>"


@dataclass
class PublisherClock:
    """Real time plus what was added: two publications never share a serial."""

    added: float = 0.0

    def time(self) -> float:
        return time.time() + self.added

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def boot_id(self) -> str:
        return "boot"


class Silent:
    """A reporter that nobody listens to."""

    def say(self, text: str) -> None:
        pass

    def progress(self, done: int, total: int) -> None:
        pass


def location(folder: Path | str, name: str = "tree.caidx") -> Location:
    """Where the index and the store of a site or drive are."""
    return Location(f"{folder}/{name}", f"{folder}/store.castr")


def copy(source: Path, target: Path) -> Path:
    """A site or drive of its own."""
    shutil.copytree(source, target, symlinks=True)
    return target


class Publisher:
    """Publishes trees into sites, signed by its working key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.keys: KeySet = keygen(folder / "keys", OWNER, passphrase=None)
        self.strangers: KeySet = keygen(folder / "strangers", "Mallory", passphrase=None)
        self.clock = PublisherClock()

    def publish(
        self,
        site: Path,
        source: Path,
        *,
        project: str = "tree",
        keys: KeySet | None = None,
        also: Sequence[KeySet] = (),
        signed: bool = True,
        valid_for: float | None = None,
        version: str | None = None,
    ) -> Release:
        site.mkdir(parents=True, exist_ok=True)
        self.clock.added += 10
        keys = keys or self.keys
        publication = Publication(
            index=site / "tree.caidx",
            store=site / "store.castr",
            source=source,
            project=project,
            version=version,
            sign_keys=tuple(str(one.working) for one in (keys, *also)) if signed else (),
            valid_for=valid_for,
            chunk_size="1024:4096:16384",
        )
        return publish(publication, self.clock, Silent()).release

    def sign(self, text: bytes, keys: KeySet | None = None) -> bytes:
        """Any text, with a right signature."""
        keys = keys or self.keys
        return sign(text, [str(keys.working)], passphrase=None, now=time.time())


def release_of(site: Path) -> Release:
    """What a site or drive says is current, whoever says it."""
    return parse_release(unwrap((site / "tree.caidx.release").read_bytes()), str(site))


def forge(release: Release, **changes: object) -> Release:
    """A release that says something else."""
    return replace(release, **changes)  # type: ignore[arg-type]

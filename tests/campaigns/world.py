"""A publisher, an appliance and a drive that live through a campaign, and what must hold of them.

Two kinds of checks. `check_instant` may be called at any moment at which no updater runs: after
a kill, after a power cut. `check_quiet` holds after a command that was not disturbed: then
everything that was promised has happened, and nothing is left over.
"""

import argparse
import contextlib
import hashlib
import json
import random
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from campaigns.nursery import Forked, Nursery
from casync_updater.cycle.demands import SLOTS
from casync_updater.errors import ContentError
from casync_updater.formats import index as index_format
from casync_updater.release import parse_release
from casync_updater.trust import unwrap
from support.client import Appliance, Site, digest_of, environment
from support.webserver import WebServer

PRESERVED = ("var/data", "local.conf")
CONNECTIONS = 2
WINDOW = 4 * CONNECTIONS
"""Chunks that may have been fetched and not yet kept when the client is killed."""

Print = dict[str, tuple[str, int, str]]
"""A tree: type, mode and content of every path."""


class BrokenPromiseError(AssertionError):
    """Something that must always hold does not."""


def demand(condition: object, what: str) -> None:
    if not condition:
        raise BrokenPromiseError(what)


def fingerprint(root: Path, leave_out: tuple[str, ...] = ()) -> Print:
    """What is in a tree; preserved paths, and folders that only hold them, are left out."""
    found: Print = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if any(
            name == kept or name.startswith(kept + "/") or kept.startswith(name + "/")
            for kept in leave_out
        ):
            continue
        status = path.lstat()
        kind = stat.filemode(status.st_mode)[0]
        content = ""
        if kind == "l":
            content = str(path.readlink())
        elif kind == "-":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        mode = 0 if kind == "l" else stat.S_IMODE(status.st_mode)
        found[name] = (kind, mode, content)
    return found


@dataclass
class Version:
    """What was published."""

    name: str
    tree: Print
    bad: bool
    tool: str
    chunks: dict[str, int]
    """Chunk ids of its index, with the sizes of their files in the store."""


@dataclass
class World:
    """Everything that a campaign plays with, below one folder."""

    folder: Path
    rng: random.Random
    drive: bool = True
    health: bool = True
    in_place: bool = False
    device: Path | None = None
    """Where the appliance lives, a mounted file system say."""
    serve: Callable[[Path], WebServer] = WebServer
    versions: dict[str, Version] = field(default_factory=dict)
    expected: list[str] = field(default_factory=list)
    """The lines that the actions must have written."""
    forgetful: bool = False
    """The results of actions may get lost."""
    kills: int = 0
    duration: float = 0.5
    """Seconds that a whole cycle takes here, about."""

    def __post_init__(self) -> None:
        self.nursery = Nursery()
        # A nursery has one program at a time, and publications come in the middle of updates.
        self._publishers = Nursery()
        self.site = _Site(self._publishers, self.folder / "publisher")
        self.server = self.serve(self.site.root)
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        home = self.device or self.folder / "appliance"
        home.mkdir(exist_ok=True)
        keys: dict[str, Any] = {}
        self.usb = home / "usb"
        if self.drive:
            self.usb.mkdir(exist_ok=True)
            keys["backupIndex"] = str(self.usb / "backup.caidx")
            keys["backupStore"] = str(self.usb / "backup.castr")
        if self.in_place:
            keys["apply"] = "in-place"
        else:
            keys["preserve"] = list(PRESERVED)
        self.appliance = Appliance(home, self.server.url, **keys)
        # Patient, since campaigns share the machine with others; nothing here stalls on purpose.
        self.settings = f"[fetch]\nconnections = {CONNECTIONS}\nretries = 0\nread_timeout = 120\n"
        self.appliance.settings(self.settings)
        self.appliance.environment["TMPDIR"] = str(self.temporary)
        log = shlex.quote(str(self.appliance.journal))
        told = '"$CASYNC_UPDATER_OLD_VERSION>$CASYNC_UPDATER_NEW_VERSION '
        if self.in_place:
            told = '">$CASYNC_UPDATER_NEW_VERSION '
        for path in (".", "etc", "bin"):
            self.appliance.trigger(
                path, f'test -s "$CASYNC_UPDATER_CHANGES" && echo {told}{path}" >> {log}'
            )
        if self.health and not self.in_place:
            bad = shlex.quote(str(self.appliance.destination / "bad"))
            self.appliance.entry["healthCheck"] = [f"echo health >> {log}; test ! -e {bad}"]

    def __enter__(self) -> "World":
        self.server.__enter__()
        self.nursery.__enter__()
        self._publishers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.nursery.__exit__(None, None, None)
        self._publishers.__exit__(None, None, None)

    # What happens

    def publish(self, *, bad: bool = False) -> Version:
        """A new version: some of it changes, most of it stays."""
        rng = self.rng
        site, number = self.site, len(self.versions) + 1
        if number == 1:
            site.write("share/constant", rng.randbytes(300_000))
            for name in range(12):
                site.write(f"share/small/{name}", rng.randbytes(rng.randrange(1, 4000)))
            (site.source / "share" / "link").symlink_to("constant")
        site.write("etc/version", f"{number}\n")
        site.write(f"share/small/{rng.randrange(12)}", rng.randbytes(rng.randrange(1, 4000)))
        site.write("share/changing", rng.randbytes(250_000))
        if number % 2:
            site.write("bin/tool", f"#!/bin/sh\necho {number}\n", 0o755)
        (site.source / "bad").unlink(missing_ok=True)
        if bad:
            site.write("bad", "this version does not work\n")
        if number % 3 == 0:
            shutil.rmtree(site.source / "extra", ignore_errors=True)
        else:
            site.write(f"extra/{number}", "x")
        name = f"{number}.0"
        site.publish(version=name)
        index = index_format.parse(site.index.read_bytes(), str(site.index))
        sizes = {}
        for ref in index:
            file = site.store / ref.hex[:4] / f"{ref.hex}.cacnk"
            sizes[ref.hex] = file.stat().st_size
        tool = (site.source / "bin" / "tool").read_text()
        version = Version(name, fingerprint(site.source), bad, tool, sizes)
        self.versions[name] = version
        return version

    def preserve(self) -> None:
        """The device's own data, written after the first install."""
        tree = self.appliance.destination
        (tree / "var" / "data").mkdir(parents=True, exist_ok=True)
        (tree / "var" / "data" / "file").write_text("the device's own")
        (tree / "local.conf").write_text("the device's own too")

    def start(self, *arguments: str, killer: tuple[str, ...] = ()) -> Forked:
        """A command of the client, which runs from now on."""
        argv = [str(argument) for argument in self.appliance.command(*arguments)]
        assert argv[1:3] == ["-m", "casync_updater"]
        return self.nursery.start(argv[3:], environment(self.appliance.environment), killer=killer)

    def run(self, *arguments: str, killer: tuple[str, ...] = ()) -> tuple[int, str]:
        """A command to its end, or until it kills itself: exit code and everything it said."""
        try:
            done = self.start(*arguments, killer=killer).wait()
        except TimeoutError:
            raise BrokenPromiseError(f"{arguments} hangs") from None
        self.kills += done.code == -signal.SIGKILL
        return done.code, done.stdout + done.stderr

    def promise(self, old: str | None, new: str) -> None:
        """An update from one version to another was published: these actions have to run."""
        before = self.versions[old] if old is not None else None
        after = self.versions[new]
        start = "" if self.in_place or old is None else old
        paths = [".", "etc"]
        if before is None or before.tool != after.tool:
            paths.append("bin")
        self.expected += [f"{start}>{new} {path}" for path in paths]

    def promise_update(self, old: str | None, new: str) -> str:
        """All that an update brings with it, health check and rollback; gives what stays."""
        self.promise(old, new)
        if not self.health or self.in_place:
            return new
        self.expected.append("health")
        if not self.versions[new].bad or old is None:
            return new
        self.promise(new, old)
        return old

    # What must hold

    @property
    def state(self) -> dict[str, Any]:
        file = self.appliance.state_dir / self.appliance.name / "state.json"
        if not file.exists():
            return {}
        try:
            state: dict[str, Any] = json.loads(file.read_bytes())
        except ValueError as error:
            raise BrokenPromiseError(f"{file} is no JSON: {error}") from error
        return state

    def version_of(self, tree: Path) -> str | None:
        """The version that a tree is, exactly."""
        leave_out = () if self.in_place else PRESERVED
        found = fingerprint(tree, leave_out)
        return next((v.name for v in self.versions.values() if v.tree == found), None)

    def check_instant(
        self, *allowed: str | None, preserved: bool = False, cut: bool = False
    ) -> str | None:
        """What holds at every moment; gives the version in the destination.

        After a power cut, chunks that were not synced may be torn on the drive, but none that a
        release on it needs.
        """
        tree = self.appliance.destination
        state = self.state
        journal = state.get("journal") or {}
        present = None
        if tree.exists() and journal.get("intent") != "in-place":
            present = self.version_of(tree)
            demand(present, f"{tree} is no version that was published")
        if not self.in_place or not journal:
            demand(present in allowed, f"{present} is in the destination, not one of {allowed}")
        if preserved and not self.in_place:
            self._check_preserved(moving=bool(journal))
        if not journal:
            for kept in state.get("previous", ()):
                folder = self.appliance.staging / kept["folder"]
                demand(folder.is_dir(), f"{folder} is in the state, and not there")
                found = self.version_of(folder)
                wanted = kept["installed"]["version"]
                demand(found == wanted, f"{folder} is {found}, not {wanted}")
        if self.drive and cut:
            self._check_drive_releases()
        elif self.drive:
            self._check_drive_chunks()
        return present

    def _check_preserved(self, *, moving: bool) -> None:
        tree, staging = self.appliance.destination, self.appliance.staging
        places = [tree, *(staging.iterdir() if staging.is_dir() else ())]
        for name, content in (
            ("var/data/file", "the device's own"),
            ("local.conf", "the device's own too"),
        ):
            holders = [place for place in places if (place / name).exists()]
            demand(len(holders) == 1, f"preserved {name} is in {holders}")
            demand((holders[0] / name).read_text() == content, f"preserved {name} was changed")
            demand(moving or holders == [tree], f"preserved {name} is not in the destination")

    def _check_drive_chunks(self) -> None:
        """Nothing under a chunk's name that is not the chunk."""
        for file in (self.usb / "backup.castr").glob("*/*.cacnk"):
            if file.name.startswith(".#"):
                continue
            good = file.stem == _chunk_id(file.read_bytes())
            demand(good, f"{file} is not the chunk that its name says")

    def check_quiet(self, version: str, *, preserved: bool = False, keep: int = 1) -> None:
        """What holds after a command that came to its end."""
        self.check_instant(version, preserved=preserved)
        if self.in_place:
            found = digest_of(self.appliance.destination, self.site)
            latest = list(self.versions)[-1] == version
            demand(not latest or found == self.site.release().digest, "casync: another digest")
        state = self.state
        installed = state["installed"]
        demand(installed["version"] == version, f"the state says {installed['version']}")
        for key in ("journal", "trial"):
            demand(state.get(key) is None, f"the state still has a {key}: {state.get(key)}")
        demand(not state.get("pending"), f"still pending: {state.get('pending')}")
        self.check_log()
        self.check_leftovers(keep)

    def check_log(self) -> None:
        """Each action once. A health check that was cut off after its end may run again.

        Where the state's disk fails, so may an action whose end could not be written down.
        """
        written = self.appliance.log()
        log = [
            line
            for number, line in enumerate(written)
            if written[number - 1 : number] != [line] or not (line == "health" or self.forgetful)
        ]
        demand(
            log == self.expected,
            f"the actions wrote\n  {log[-12:]}\nand should have written\n  {self.expected[-12:]}",
        )

    def check_leftovers(self, keep: int = 1) -> None:
        """Only what the state names, in every folder that the client writes to."""
        device, state = self.appliance, self.state
        kept = [one["folder"] for one in state.get("previous", ())]
        demand(len(kept) <= keep, f"{len(kept)} previous versions are kept")
        _demand_names(device.staging, {"token", *kept}, allow_missing=self.in_place)
        entry = device.state_dir / device.name
        _demand_names(entry, {"state.json", "lock", "versions", "actions"})
        _demand_names(entry / "actions", set())
        _demand_names(device.state_dir / ".actions", set(), allow_missing=True)
        hashes = {"accepted", state["installed"]["index_sha256"]}
        hashes |= {one["installed"]["index_sha256"] for one in state.get("previous", ())}
        found = {file.name.partition(".")[0] for file in (entry / "versions").iterdir()}
        demand(found <= hashes, f"left over in {entry / 'versions'}: {found - hashes}")
        cache = device.state_dir / "cache"
        left = list(cache.rglob("*")) if cache.exists() else []
        demand(left in ([], [cache / device.name]), f"left over in the cache: {left[:5]}")
        left = list(self.temporary.iterdir())
        demand(not left, f"left over in the folder for temporary files: {left}")

    def _check_drive_releases(self) -> None:
        """Each whole release on the drive has everything that it is made of."""
        for suffix in SLOTS:
            body = _read(self.usb / f"backup.caidx{suffix}")
            try:
                release = parse_release(unwrap(body), str(self.usb))
            except ContentError:
                continue
            index = _read(self.usb / "by-hash" / "SHA256" / release.index.sha256)
            whole = hashlib.sha256(index).hexdigest() == release.index.sha256
            demand(whole, f"the drive has the release of {release.version} without its index")
            for ref in index_format.parse(index, str(self.usb)):
                name = f"{ref.hex[:4]}/{ref.hex}.cacnk"
                whole = _chunk_id(_read(self.usb / "backup.castr" / name)) == ref.hex
                demand(whole, f"the drive has {release.version} without its chunk {ref.hex}")

    def has_drive(self) -> bool:
        """Whether there is a whole release on the drive."""
        for suffix in SLOTS:
            with contextlib.suppress(ContentError):
                parse_release(unwrap(_read(self.usb / f"backup.caidx{suffix}")), "")
                return True
        return False

    def check_drive(self, version: str) -> None:
        """The drive holds a complete version, and no half-written files."""
        self._check_drive_releases()
        index = self.usb / "backup.caidx"
        text = (self.usb / "backup.caidx.release").read_bytes()
        release = parse_release(unwrap(text), str(self.usb))
        demand(release.version == version, f"the drive has {release.version}, not {version}")
        digest = hashlib.sha256(index.read_bytes()).hexdigest()
        demand(digest == release.index.sha256, "the drive's index is not its release's")
        strays = [path for path in self.usb.rglob(".*") if path.is_file()]
        demand(not strays, f"left over on the drive: {strays}")

    def fetched(self) -> int:
        """Bytes of chunks that were fetched since the last call."""
        requests = [one for one in self.server.requests if one.path.endswith(".cacnk")]
        self.server.requests.clear()
        return sum(one.sent for one in requests)

    def check_fetched(self, old: str | None, new: str, kills: int) -> None:
        """At most what the update needs, and what was in flight at each kill.

        Where a tree holds preserved paths, the mirror cannot cut it into the archive's chunks,
        and fetches them for the drive once more.
        """
        have = self.versions[old].chunks if old is not None else {}
        wanted = self.versions[new].chunks
        need = sum(size for chunk, size in wanted.items() if chunk not in have)
        twice = 2 if self.drive and not self.in_place else 1
        limit = twice * need + kills * WINDOW * max(wanted.values())
        found = self.fetched()
        demand(found <= limit, f"{found} bytes were fetched, {need} needed, {kills} kills")


class _Site(Site):
    """A site whose publisher is forked as well."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        super().__init__(folder)
        self._nursery = nursery

    def run_publisher(self, *arguments: str) -> str:
        started = self._nursery.start(arguments, environment(), program="publisher")
        done = started.wait()
        assert done.code == 0, done.stderr
        return done.stdout


def _demand_names(folder: Path, wanted: set[str], *, allow_missing: bool = False) -> None:
    if allow_missing and not folder.exists():
        return
    found = {path.name for path in folder.iterdir()}
    demand(found <= wanted, f"left over in {folder}: {sorted(found - wanted)}")


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _chunk_id(raw: bytes) -> str:
    try:
        data = zstandard.ZstdDecompressor().decompressobj().decompress(raw)
    except zstandard.ZstdError:
        return "no chunk"
    return hashlib.new("sha512_256", data).hexdigest()


def workplace(where: str | None = None) -> Path:
    """A folder for a campaign that is run by hand; the caller removes it."""
    return Path(tempfile.mkdtemp(prefix="casync-updater-campaign-", dir=where))


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def by_hand(
    script: str | None,
    campaign: Callable[[Path, random.Random, int], Mapping[str, int]],
    *,
    count: int,
    unit: str,
    where: str | None = None,
) -> int:
    """The command line of a campaign; gives the exit code.

    Args:
        script: the script's docstring, whose first line is the description.
        campaign: takes a folder, the chance and the count; gives how often what happened.
        count: the default.
        unit: what is counted.
        where: the folder to work in, if not that for temporary files.
    """
    parser = argparse.ArgumentParser(description=(script or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=count, help=unit)
    options = parser.parse_args()
    folder = workplace(where)
    begin = time.monotonic()
    try:
        for outcome, number in campaign(folder, random.Random(options.seed), options.count).items():
            report(f"{outcome}: {number}")
    except BrokenPromiseError as error:
        report(str(error))
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(f"{time.monotonic() - begin:.0f} s, seed {options.seed}")
    return 0

"""Measure updates by casync-updater beside casync, rsync and OSTree: `make bench`.

    PYTHONPATH=src:tests /usr/bin/python3 tests/bench/bench.py [--only PART]... [--runs 3]
        [--larger 10] [--synthetic] [--quick]

Everything is measured in one run, on the same trees, as whole processes, over a link of 40 ms and
50 Mbit/s, with everything in the page cache. The tables on standard output are markdown; what is
going on stands on standard error. Needs root, for network namespaces and a file system of its own.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lab import Cost, Lab, lab, publish
from link import RATE
from trees import change, contents, debian_tree, make_tree, stretch
from ways import PEERS, SYNCED, CasyncInPlace, CasyncStaged, OSTree, Ours, Rsync, Way, commit

from casync_updater.formats import index as index_format
from casync_updater.formats.store import path_of
from system.nspawn import base

MB = 1_000_000
MIB = 1 << 20
BLOCK = 4096
GROWN = ("many", "large")
PARTS = ("fresh", "updates", "drive", "idle", *GROWN)
FILES = 86_000
"""Of the tree with many files."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        files: of the tree.
        total: its bytes.
        original: where it stands; None for one that is made up.
        changed: files that a version changes.
        more: unchanged files that the tree with many files has on top.
        larger: how many times as large the tree with the large files is.
        runs: how often each thing is measured; the median counts.
    """

    files: int
    total: int
    original: Path | None
    changed: int
    more: int
    larger: int
    runs: int


class Source:
    """A tree on the publisher's side, and its versions."""

    def __init__(self, here: Lab, name: str, plan: Plan) -> None:
        self._here = here
        self._plan = plan
        self.name = name
        self.path = here.sources / name
        self.version = 1
        self.changed_bytes = 0
        """What the files of the last change take on a disk."""
        rng = random.Random(1)
        base = self.path / "base"
        if plan.original is None:
            make_tree(base, plan.files, plan.total, rng)
        else:
            self.path.mkdir()
            subprocess.run(["cp", "-a", plan.original, base], check=True)
        self._paths = contents(base)
        if name == "large":
            stretch(self._paths, plan.larger * plan.total, rng)
        if name == "many":
            make_tree(self.path / "more", plan.more, plan.total, rng)
        self._rng = random.Random(2)
        publish(here, name, self.version)

    def next_version(self) -> None:
        """Change it and publish that; the same change for every tree."""
        changed = change(self._paths, self._plan.changed, self._rng)
        self.changed_bytes = sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in changed)
        self.version += 1
        publish(self._here, self.name, self.version)


@dataclass(frozen=True)
class Runs:
    """The same thing, measured several times."""

    costs: tuple[Cost, ...]

    def median(self, value: Callable[[Cost], float]) -> float:
        return statistics.median(value(cost) for cost in self.costs)

    @property
    def seconds(self) -> float:
        return self.median(lambda cost: cost.seconds)

    @property
    def peak(self) -> int:
        return max(cost.peak for cost in self.costs)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table in markdown."""
    head = list(head)
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def versions() -> str:
    """Of the peers, as Debian counts them."""
    argv = ["dpkg-query", "--show", "--showformat=${Package} ${Version}, "]
    argv += ["casync", "rsync", "ostree"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.rstrip(", ")


def megabytes(count: float) -> str:
    return f"{count / MB:.1f} MB"


def compare(way: Way, source: Source) -> None:
    """What is fast and wrong does not count."""
    argv = ["diff", "--recursive", "--brief", "--no-dereference", source.path, way.tree]
    if subprocess.run(argv, check=False).returncode:
        raise SystemExit(f"bench: {way.title} did not install what the server has")


def fresh_installs(here: Lab, way: type[Way], runs: int) -> tuple[Way, Runs]:
    """The way with something installed, and what that cost; without runs, it is installed near."""
    costs = []
    if not runs:
        made = way(here, "base", way.__name__)
        made.fresh(near=True)
    for number in range(runs):
        made = way(here, "base", f"{way.__name__}-{number}")
        say(f"fresh install: {made.title}")
        costs.append(made.fresh())
        if number < runs - 1:
            made.remove()
    return made, Runs(tuple(costs))


class Bench:
    """The measurements, one after the other; each leaves what the tables need."""

    def __init__(self, here: Lab, plan: Plan, parts: frozenset[str]) -> None:
        self._here = here
        self._plan = plan
        self._parts = parts
        self.fresh: dict[type[Way], Runs] = {}
        self.updates: dict[type[Way], Runs] = {}
        self.links = self.synced_links = 0.0
        """Bytes that bare hard links to a tree write, and the removal of others; synced before
        that, all inodes that both touch are written twice."""
        self.changed_bytes = 0.0
        self.noops: dict[str, Cost] = {}
        self.grown: dict[str, Runs] = {}
        self.drives: dict[int, Cost] = {}
        """Updates with a drive, by the chunks that it lacked."""
        self.documents = 0
        """Bytes of the release and index of the last of these."""
        self.daemon = 0

    def measure(self) -> None:
        say("making and publishing the tree")
        source = Source(self._here, "base", self._plan)
        commit(self._here, source.name)
        ways: list[Way] = []
        for kind in (Ours, *PEERS):
            if kind is CasyncStaged:
                # It installs as the one before it does.
                ways.append(self._copy(ways[-1]))
                continue
            if kind is not Ours and not self._parts & {"fresh", "updates"}:
                continue
            runs = self._plan.runs if kind in (Ours, Rsync) else 1
            way, cost = fresh_installs(self._here, kind, runs if "fresh" in self._parts else 0)
            ways.append(way)
            if cost.costs:
                self.fresh[kind] = cost
            if kind in SYNCED:
                ways.append(self._copy(way, SYNCED[kind]))
        self._updates(source, ways)
        (ours,) = (way for way in ways if isinstance(way, Ours))
        self._noop(ours)
        if "drive" in self._parts:
            self._with_drive(source, ours)
        if "idle" in self._parts:
            self._idle(ours)
        for way in ways:
            way.remove()
        shutil.rmtree(source.path)
        for name in GROWN:
            if name in self._parts:
                self._growth(name)

    def _copy(self, way: Way, kind: type[Way] = CasyncStaged) -> Way:
        copy = kind(self._here, "base", kind.__name__)
        subprocess.run(["cp", "-a", way.home, copy.home], check=True)
        return copy

    def _updates(self, source: Source, ways: list[Way]) -> None:
        costs: dict[type[Way], list[Cost]] = {type(way): [] for way in ways}
        links, synced, changed = [], [], []
        if "updates" not in self._parts:
            # What has to grow is compared with ours.
            ways = [way for way in ways if isinstance(way, Ours)]
        # Not of ours: a new link changes a file's ctime, by which ours sees who touched it.
        linked = next((way for way in ways if type(way) is Rsync), None)
        for number in range(self._plan.runs):
            source.next_version()
            commit(self._here, source.name)
            for way in ways:
                say(f"update {number + 1}: {way.title}")
                costs[type(way)].append(way.update())
            if linked is not None:
                sync: list[str | Path] = ["sync", "--file-system", self._here.disk]
                links.append(self._bare_links(linked, "links", number))
                synced.append(self._bare_links(linked, "synced", number, sync))
            changed.append(source.changed_bytes)
        for way in ways:
            compare(way, source)
        self.updates = {type(way): Runs(tuple(costs[type(way)])) for way in ways}
        if links:
            self.links, self.synced_links = statistics.median(links), statistics.median(synced)
        self.changed_bytes = statistics.median(changed)

    def _bare_links(self, way: Way, name: str, number: int, *between: list[str | Path]) -> int:
        """What no way with hard links can do without, which also removes older trees."""
        here = self._here
        new, old = here.disk / f"{name}-{number}", here.disk / f"{name}-{number - 1}"
        if not old.exists():
            subprocess.run(["cp", "-al", way.tree, old], check=True)
        return here.work(["cp", "-al", way.tree, new], *between, ["rm", "-rf", old]).written

    def _noop(self, ours: Ours) -> None:
        say(f"nothing new: {ours.name}")
        self.noops[ours.name] = ours.update()

    def _with_drive(self, source: Source, ours: Ours) -> None:
        drive, site = self._here.disk / "drive", self._here.site / source.name
        for every in (0, 2):
            known = self._chunks(site)
            source.next_version()
            shutil.copytree(site, drive)
            lacks = sorted(self._chunks(site) - known)[::every] if every else []
            for name in lacks:
                (drive / "store.castr" / path_of(name)).unlink()
            ours.configure(
                backupIndex=f"{drive}/tree.caidx",
                backupStore=f"{drive}/store.castr",
            )
            say(f"update with the drive present, which lacks {len(lacks)} chunks")
            self.drives[len(lacks)] = ours.update()
            compare(ours, source)
            ours.configure()
            shutil.rmtree(drive)
        self.documents = sum(
            (site / f"tree.caidx{suffix}").stat().st_size for suffix in ("", ".release")
        )

    def _chunks(self, site: Path) -> set[str]:
        """The chunks of what is published."""
        index = index_format.parse((site / "tree.caidx").read_bytes(), "the index")
        return {ref.hex for ref in index}

    def _idle(self, ours: Ours) -> None:
        say("the idle daemon")
        argv = self._here.between.device.argv(*ours.command("run"))
        with self._here.service(argv, lambda: True) as process:
            children = Path(f"/proc/{process}/task/{process}/children")
            seen, quiet = False, 0
            deadline = time.monotonic() + 60
            # Its first cycle is a process of its own, a short one; after that it only waits.
            while quiet < 100:
                if time.monotonic() > deadline:
                    raise SystemExit("bench: the daemon did not come to rest within a minute")
                time.sleep(0.02)
                busy = bool(children.read_text())
                seen = seen or busy
                quiet = quiet + 1 if seen and not busy else 0
            status = Path(f"/proc/{process}/status").read_text()
            self.daemon = int(status.partition("VmRSS:")[2].split()[0]) << 10

    def _growth(self, name: str) -> None:
        say(f"making and publishing the tree with {name} files")
        source = Source(self._here, name, self._plan)
        ours = Ours(self._here, name, name)
        ours.fresh(near=True)
        costs = []
        for number in range(self._plan.runs):
            source.next_version()
            say(f"update {number + 1}: {name} files")
            costs.append(ours.update())
        compare(ours, source)
        self.grown[name] = Runs(tuple(costs))
        self._noop(ours)
        ours.remove()
        shutil.rmtree(source.path)
        shutil.rmtree(self._here.site / name)

    def print_ways(self) -> None:
        """A line for each way."""
        head = ("", "update", "fresh", "received", "written", "processor", "peak memory")
        rows = []
        for kind, update in self.updates.items():
            fresh = self.fresh.get(kind)
            rows.append(
                (
                    kind.title,
                    f"{update.seconds:.2f} s",
                    "-" if fresh is None else f"{fresh.seconds:.1f} s",
                    megabytes(update.median(lambda cost: cost.received)),
                    megabytes(update.median(lambda cost: cost.written)),
                    f"{update.median(lambda cost: cost.processor):.2f} s",
                    f"{update.peak / MIB:.0f} MiB",
                )
            )
        table(head, rows)

    def print_targets(self) -> None:
        """The targets, what was measured, and whether that is enough."""
        rows = [
            (target, measured, "pass" if good else "**miss**")
            for target, measured, good in (
                *self._update_targets(),
                *self._fresh_targets(),
                *self._written_targets(),
                *self._growth_targets(),
                *self._noop_targets(),
                *self._memory_targets(),
                *self._drive_targets(),
            )
        ]
        table(("target", "measured", ""), rows)

    def _update_targets(self) -> Iterable[tuple[str, str, bool]]:
        ours = self.updates[Ours].seconds
        for kind, wanted in (
            (CasyncStaged, 7.0),
            (CasyncInPlace, 5.0),
            (Rsync, 1.0),
            (OSTree, 1.0),
        ):
            if kind not in self.updates:
                continue
            ratio = self.updates[kind].seconds / ours
            least = f"at least {wanted:g} times faster than" if wanted > 1 else "faster than"
            yield f"1. update {least} {kind.title}", f"{ratio:.2f} times", ratio >= wanted

    def _fresh_targets(self) -> Iterable[tuple[str, str, bool]]:
        if not self.fresh:
            return
        ours = self.fresh[Ours]
        needed = ours.median(lambda cost: cost.received) * 8 / RATE
        ratio = ours.seconds / needed
        shown = f"{ratio:.2f} times {needed:.1f} s"
        yield "2. fresh install at most 1.15 times its bytes' time", shown, ratio <= 1.15
        ratio = ours.seconds / self.fresh[Rsync].seconds
        yield "2. fresh install at most as long as rsync -z", f"{ratio:.2f} times", ratio <= 1

    def _written_targets(self) -> Iterable[tuple[str, str, bool]]:
        if not self.links:
            return
        written = self.updates[Ours].median(lambda cost: cost.written)
        shown = (
            f"{megabytes(written)}; links alone {megabytes(self.synced_links)} with a sync before"
            f" older ones are removed, {megabytes(self.links)} without; changed files"
            f" {megabytes(self.changed_bytes)}"
        )
        good = written <= self.synced_links + 1.1 * self.changed_bytes
        yield "3. written at most the changed files plus 10 %, plus links' metadata", shown, good

    def _growth_targets(self) -> Iterable[tuple[str, str, bool]]:
        plan = self._plan
        ours = self.updates[Ours].seconds
        for name, what, most in (
            ("many", f"{plan.files + plan.more:,} files", 3.0),
            ("large", f"{plan.larger} times the bytes", 1.2),
        ):
            if name not in self.grown:
                continue
            ratio = self.grown[name].seconds / ours
            shown = f"{ratio:.2f} times ({self.grown[name].seconds:.2f} s)"
            yield f"4. {what}, the same change: at most {most:g} times", shown, ratio <= most

    def _noop_targets(self) -> Iterable[tuple[str, str, bool]]:
        for name, cost in self.noops.items():
            shown = f"{len(cost.requests)}, {cost.processor:.2f} s, {megabytes(cost.received)}"
            good = len(cost.requests) == 1 and cost.processor <= 0.3
            yield f"5. nothing new ({name}): one request, at most 0.3 s of CPU", shown, good

    def _memory_targets(self) -> Iterable[tuple[str, str, bool]]:
        found = {"update": self.updates[Ours].peak}
        found |= {f"update of {name}": runs.peak for name, runs in self.grown.items()}
        if self.fresh:
            found["fresh"] = self.fresh[Ours].peak
        shown = ", ".join(f"{name} {peak / MIB:.1f}" for name, peak in found.items())
        good = max(found.values()) < 64 * MIB
        yield "6. peak memory under 64 MiB", f"{shown} MiB", good
        if not self.daemon:
            return
        shown = f"{self.daemon / MIB:.1f} MiB"
        yield "6. idle daemon under 24 MiB resident", shown, self.daemon < 24 * MIB

    def _drive_targets(self) -> Iterable[tuple[str, str, bool]]:
        for lacks, cost in self.drives.items():
            chunks = sum(path.endswith(".cacnk") for path in cost.requests)
            documents = len(cost.requests) - chunks
            shown = (
                f"{documents} requests for release and index ({self.documents:,} bytes),"
                f" {chunks} for chunks; {cost.received:,} bytes in all, {cost.seconds:.2f} s"
            )
            target = f"7. with a drive that lacks {lacks} chunks: only these over the network"
            yield target, shown, (documents, chunks) == (2, lacks)


def debian_plan(tree: Path, larger: int, runs: int) -> Plan:
    """A minimal Debian system's /usr, which is put there."""
    say("unpacking a Debian system")
    debian_tree(tree, base("bookworm"))
    paths = contents(tree)
    total = sum(path.stat().st_size for path in paths)
    return Plan(len(paths), total, tree, len(paths) // 100, FILES - len(paths), larger, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure updates beside those of the peers.")
    parser.add_argument("--quick", action="store_true", help="a small tree: a test of this script")
    parser.add_argument("--runs", type=int, default=3, help="the median of so many (default: 3)")
    parser.add_argument(
        "--larger", type=int, default=10, help="how many times as large the large tree is"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="leave out the others")
    parser.add_argument(
        "--synthetic", action="store_true", help="a tree of words and noise: 8,578 files, 252 MB"
    )
    arguments = parser.parse_args()
    if os.geteuid():
        raise SystemExit("bench: needs root, for network namespaces and a file system of its own")
    # So that what was set up is taken down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="casync-updater-bench-") as name:
        folder = Path(name)
        if arguments.quick:
            plan = Plan(500, 15 * MB, None, 5, 2000, 2, 1)
        elif arguments.synthetic:
            plan = Plan(8578, 252 * MB, None, 85, 77_422, arguments.larger, arguments.runs)
        else:
            plan = debian_plan(folder / "usr", arguments.larger, arguments.runs)
        # Everybody's trees, and twice the large one.
        size = (12 + 2 * plan.larger) * plan.total + (1 << 30)
        with lab(folder, size) as here:
            probe = here.site / "probe"
            probe.write_bytes(bytes(20 * MB))
            found = here.between.probe("/probe")
            print(
                f"Link: {1000 * found['round_trip']:.1f} ms, {found['rate'] / 1e6:.1f} Mbit/s"
                f" of payload. Tree: {plan.files:,} files, {plan.total // MB} MB,"
                f" {plan.changed} of them changed. {os.cpu_count()} processors,"
                f" median of {plan.runs}. {versions()}.\n",
                flush=True,
            )
            bench = Bench(here, plan, frozenset(arguments.only or PARTS))
            bench.measure()
        bench.print_ways()
        bench.print_targets()


if __name__ == "__main__":
    main()

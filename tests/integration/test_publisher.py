"""The publisher with the real casync: what stands on the site, whatever happens."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from casync_updater.errors import LocalError
from casync_updater.formats import index as index_format
from casync_updater.model import Compression, FileRef, Mtimes, Publication, Release
from casync_updater.release import format_release, parse_release
from casync_updater.server import record
from casync_updater.server.build import DEFAULT_CHUNK_SIZE
from casync_updater.server.places import locked
from casync_updater.server.prune import GRACE
from casync_updater.server.publish import Published, Status, publish
from support.trees import make_tree, mutate_tree, snapshot

OLD_FLAGS = ["--with=2sec-time"]
START = 1_795_447_266.0


class ManualClock:
    """Stands still until it is moved; waiting is real, so that a lock can be given back."""

    def __init__(self) -> None:
        self.now = START

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def boot_id(self) -> str:
        return "boot"


class Listener:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, done: int, total: int) -> None:
        assert 0 <= done <= total


class Bench:
    """A source, a site and a publisher of them."""

    def __init__(self, folder: Path, name: str = "tree.caidx") -> None:
        self.source = make_tree(folder / "source", 1, count=10)
        self.site = folder / "site"
        self.site.mkdir(exist_ok=True)
        self.index = self.site / name
        self.store = self.site / "store.castr"
        self.clock = ManualClock()
        self.listener = Listener()
        self.entry = Publication(
            index=self.index, store=self.store, source=self.source, project="tree"
        )

    def publish(self, **changes: object) -> Published:
        self.clock.now += 60
        self.listener.said.clear()
        entry = replace(self.entry, **changes)  # type: ignore[arg-type]
        return publish(entry, self.clock, self.listener)

    def change(self, seed: int) -> None:
        mutate_tree(self.source, seed)

    def release(self) -> Release:
        return parse_release(self.beside(".release").read_bytes(), "the site")

    def beside(self, suffix: str) -> Path:
        return self.index.with_name(self.index.name + suffix)

    def files(self) -> dict[str, tuple[int, int, bytes]]:
        """Everything that a web server sees, with inodes and times."""
        return {
            str(path.relative_to(self.site)): (
                path.stat().st_ino,
                path.stat().st_mtime_ns,
                path.read_bytes(),
            )
            for path in self.site.rglob("*")
            if path.is_file() and ".casync-updater" not in path.parts
        }

    def check(self, *, strays: bool = True) -> None:
        """The site is one consistent publication, and nothing else lies around."""
        release = self.release()
        for ref, suffix in ((release.index, ""), (release.mtree, ".mtree")):
            if ref is None:
                continue
            copy = self.site / "by-hash" / "SHA256" / ref.sha256
            assert copy.stat().st_size == ref.size
            assert copy.read_bytes() == self.beside(suffix).read_bytes()
        assert self.beside(".cks").read_text() == release.digest
        assert self.output("casync", "digest", f"--store={self.store}", self.index) == (
            release.digest
        )
        if strays:
            assert not list(self.site.glob(".#*"))
            assert not (self.site / ".casync-updater" / "staging").exists()
            assert not (self.store / ".casync-updater" / "publishing").exists()
            assert not list(self.store.rglob("*.tmp"))
            orphans = {
                path.name.removesuffix(".cacnk") for path in self.store.rglob("*.cacnk")
            } - record.alive_chunks(self.store)
            assert not orphans
            listed = record.read_folder(self.site).files()
            assert {path.name for path in (self.site / "by-hash/SHA256").iterdir()} == listed

    def output(self, *argv: str | Path) -> str:
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_first_publication(bench: Bench) -> None:
    result = bench.publish()
    assert result.status is Status.PUBLISHED
    release = bench.release()
    assert release == result.release
    assert release.serial == int(START) + 60
    assert release.version == "20261123.152206"
    assert set(release.features) == {"permissions", "symlinks", "sec-time"}
    assert release.index.name == "tree.caidx"
    index = index_format.parse(bench.index.read_bytes(), "the index")
    assert index.chunk_size_option == DEFAULT_CHUNK_SIZE == "8192:32768:131072"
    assert len(bench.beside(".cks").read_bytes()) == 64
    assert result.usage.chunks_new == result.usage.chunks_total > 1
    stored = sum(path.stat().st_size for path in bench.store.rglob("*.cacnk"))
    assert result.usage.bytes_total == release.store_size == stored
    bench.check()
    bench.output("casync", "extract", f"--store={bench.store}", bench.index, bench.site / "out")
    assert snapshot(bench.site / "out", mtimes=True) == snapshot(bench.source, mtimes=True)


def test_what_did_not_change_is_not_touched(bench: Bench) -> None:
    bench.publish()
    before = bench.files()
    result = bench.publish()
    assert result.status is Status.UNCHANGED
    assert result.usage.chunks_new == 0
    assert bench.files() == before
    assert bench.listener.said == []


def test_a_new_version(bench: Bench) -> None:
    first = bench.publish().release
    bench.change(5)
    second = bench.publish()
    assert second.release.serial == first.serial + 60
    assert second.release.digest != first.digest
    assert 0 < second.usage.chunks_new < second.usage.chunks_total
    assert (bench.site / "by-hash/SHA256" / first.index.sha256).exists()
    bench.check()


def test_chunks_are_smaller_than_those_of_casync(bench: Bench, tmp_path: Path) -> None:
    """And nobody who reads them sees a difference: `Bench.check` has casync read them."""
    words = Path("/usr/lib/python3/dist-packages/zstandard/__init__.py").read_bytes()
    (bench.source / "text").write_bytes(words * 20)
    own = tmp_path / "own.castr"
    options = ("--with=permissions", "--with=symlinks", "--with=sec-time")
    options += (f"--chunk-size={DEFAULT_CHUNK_SIZE}",)
    index = tmp_path / "own.caidx"
    bench.output("casync", "make", f"--store={own}", *options, index, bench.source)
    before = chunks(own)
    result = bench.publish()
    after = chunks(bench.store)
    assert after.keys() == before.keys()
    assert all(after[name] <= size for name, size in before.items())
    assert sum(after.values()) < sum(before.values())
    assert result.usage.bytes_total == sum(after.values())
    bench.check()


def test_only_new_chunks_are_compressed_again(bench: Bench) -> None:
    bench.publish()
    known = {path: path.stat().st_ino for path in bench.store.rglob("*.cacnk")}
    bench.change(5)
    assert bench.publish().usage.chunks_new > 0
    assert {path: path.stat().st_ino for path in known} == known


def test_another_compression_is_left_alone(bench: Bench) -> None:
    bench.publish(compression=Compression.XZ)
    magics = {path.read_bytes()[:6] for path in bench.store.rglob("*.cacnk")}
    assert magics == {b"\xfd7zXZ\0"}
    bench.check()


def chunks(store: Path) -> dict[str, int]:
    """The sizes of a store's files."""
    return {path.name: path.stat().st_size for path in store.rglob("*.cacnk")}


@pytest.mark.parametrize("mtree", [True, False])
def test_a_site_of_the_old_publisher(bench: Bench, mtree: bool) -> None:
    store = f"--store={bench.store}"
    digest = bench.output("casync", "make", *OLD_FLAGS, store, bench.index, bench.source)
    bench.beside(".cks").write_text(digest)
    manifest = subprocess.run(
        ["casync", "mtree", store, *OLD_FLAGS, bench.index], check=True, capture_output=True
    ).stdout
    if mtree:
        bench.beside(".mtree").write_bytes(manifest)
    index = bench.index.read_bytes()

    result = bench.publish()
    assert result.status is Status.PUBLISHED
    assert result.usage.chunks_new == 0
    assert bench.index.read_bytes() == index
    assert bench.beside(".mtree").read_bytes() == manifest
    assert bench.beside(".cks").read_text() == digest
    assert "executable bits" in bench.listener.said[0]
    bench.check()

    bench.change(6)
    bench.publish()
    out = bench.site / "out"
    bench.output("casync", "extract", *OLD_FLAGS, store, bench.index, out)
    assert bench.output("casync", "digest", *OLD_FLAGS, out) == bench.beside(".cks").read_text()
    assert bench.release().features == ("2sec-time",)
    bench.check()


def test_an_index_keeps_its_features_and_chunk_sizes(bench: Bench) -> None:
    bench.publish(features=("2sec-time",), chunk_size="1024:4096:16384")
    before = index_format.parse(bench.index.read_bytes(), "")
    bench.change(2)
    bench.publish(features=("unix",), chunk_size="16384:65536:262144")
    after = index_format.parse(bench.index.read_bytes(), "")
    assert (after.flags, after.chunk_size_option) == (before.flags, "1024:4096:16384")
    said = "\n".join(bench.listener.said)
    assert "with is not followed" in said
    assert "chunkSize is not followed" in said
    assert "second index" in said


def test_a_group_of_features_is_no_difference(bench: Bench) -> None:
    bench.publish(features=("unix",))
    bench.publish(features=("unix",))
    assert bench.listener.said == []


def test_a_file(bench: Bench) -> None:
    image = bench.site.parent / "image"
    image.write_bytes(random.Random(1).randbytes(500_000))
    index = bench.site / "image.caibx"
    result = bench.publish(source=image, index=index, project="image")
    assert result.release.mtree is None
    assert result.release.archive_size == 500_000
    assert not index.with_name("image.caibx.mtree").exists()
    assert index.with_name("image.caibx.cks").read_text() == result.release.digest
    assert bench.publish(source=image, index=index).status is Status.UNCHANGED


@pytest.mark.parametrize("suffix", ["", ".cks", ".mtree", "index", "mtree"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_site_is_mended(bench: Bench, suffix: str, damage: str) -> None:
    release = bench.publish().release
    assert release.mtree is not None
    by_hash = {"index": release.index.sha256, "mtree": release.mtree.sha256}
    path = bench.beside(suffix)
    if suffix in by_hash:
        path = bench.site / "by-hash" / "SHA256" / by_hash[suffix]
    before = bench.beside(".release").read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-1])
    assert bench.publish().status is Status.UNCHANGED
    assert "restored" in bench.listener.said[0]
    assert bench.beside(".release").read_bytes() == before
    bench.check()


def test_what_is_no_index_is_not_overwritten(bench: Bench) -> None:
    bench.index.write_bytes(b"a mistake")
    with pytest.raises(LocalError, match=r"is no casync index; .* move it away"):
        bench.publish()
    assert bench.index.read_bytes() == b"a mistake"


@pytest.mark.parametrize("damage", ["gone", "empty", "torn"])
def test_a_damaged_store_is_mended(bench: Bench, damage: str) -> None:
    bench.publish()
    chunk = max(bench.store.rglob("*.cacnk"), key=lambda path: path.stat().st_size)
    data = chunk.read_bytes()
    chunk.unlink()
    if damage != "gone":
        chunk.write_bytes(b"" if damage == "empty" else data[:1000] + bytes(len(data) - 1000))
    (bench.source / "new").write_text("so that the chunks are read back")
    bench.publish()
    bench.check()


def test_a_release_that_cannot_be_read_is_not_overwritten(bench: Bench) -> None:
    bench.publish()
    bench.change(3)
    bench.beside(".release").write_text("<html>")
    before = bench.files()
    with pytest.raises(LocalError, match=r"tree\.caidx\.release.*restore it from a backup"):
        bench.publish()
    assert bench.files() == before


def test_a_clock_behind_the_last_serial(bench: Bench) -> None:
    first = bench.publish().release
    bench.change(3)
    bench.clock.now -= 86_400
    second = bench.publish().release
    assert second.serial == first.serial + 1
    assert "clock is behind" in bench.listener.said[0]
    bench.change(4)
    bench.clock.now -= 2 * 86_400
    before = bench.files()
    with pytest.raises(LocalError, match="set the clock"):
        bench.publish()
    after = bench.files()
    assert {name: after[name] for name in before} == before


def test_validity_is_renewed_for_the_same_serial(bench: Bench) -> None:
    first = bench.publish(valid_for=86_400.0).release
    assert first.valid_until == first.date + 86_400
    assert bench.publish(valid_for=86_400.0).status is Status.UNCHANGED
    bench.clock.now += 50_000
    result = bench.publish(valid_for=86_400.0)
    assert result.status is Status.RENEWED
    second = bench.release()
    assert second.serial == first.serial
    assert second.digest == first.digest
    assert second.valid_until is not None
    assert second.valid_until > (first.valid_until or 0)
    assert bench.publish().release.valid_until is None


def test_unknown_fields_of_an_unchanged_release_stay(bench: Bench) -> None:
    bench.publish()
    text = bench.beside(".release").read_text().replace("Project:", "Colour: green\nProject:")
    bench.beside(".release").write_text(text)
    assert bench.publish().status is Status.UNCHANGED
    assert bench.beside(".release").read_text() == text


def test_changes_and_version(bench: Bench) -> None:
    log = bench.site.parent / "changelog"
    log.write_text(
        "myproject (1:2.3-1) unstable; urgency=medium\n\n  * One thing\n    on two lines.\n"
        "  * Another.\n\n -- A B <a@example.org>  Mon, 23 Nov 2026 15:21:06 +0000\n\n"
        "myproject (1:2.2-1) unstable; urgency=medium\n\n  * Old.\n\n"
        " -- A B <a@example.org>  Mon, 16 Nov 2026 15:21:06 +0000\n"
    )
    release = bench.publish(changes=log).release
    assert release.version == "1:2.3-1"
    assert release.changes == ("One thing on two lines.", "Another.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": "x.caibx"}, "ends in .caidx"),
        ({"source": "missing"}, "does not exist"),
        ({"store": "nowhere/x.castr"}, "nowhere does not exist"),
        ({"index": "nowhere/x.caidx"}, "nowhere does not exist"),
        ({"store": "source/x.castr"}, "inside of the source"),
    ],
)
def test_what_cannot_be_published(bench: Bench, changes: dict[str, str], message: str) -> None:
    base = bench.site.parent
    with pytest.raises(LocalError, match=message):
        bench.publish(**{key: base / value for key, value in changes.items()})
    assert [path.name for path in bench.site.iterdir() if path.name != "store.castr"] == []


def test_two_indexes_share_a_store(bench: Bench, tmp_path: Path) -> None:
    bench.publish()
    other = bench.site / "other.caidx"
    result = bench.publish(index=other)
    assert result.usage.chunks_new == 0
    bench.check()
    assert record.read_store(bench.store).indexes == ("../tree.caidx", "../other.caidx")


def test_pruning_keeps_what_any_index_needs(bench: Bench) -> None:
    """Three versions of one index with keep 2, an unregistered old index, another with all."""
    bench.publish(index=bench.site / "all.caidx")
    old = bench.site / "old.caidx"
    (bench.source / "only-old").write_bytes(random.Random(2).randbytes(400_000))
    bench.output("casync", "make", f"--store={bench.store}", old, bench.source)
    (bench.source / "only-old").unlink()
    releases = []
    for seed in range(3):
        (bench.source / "versioned").write_bytes(random.Random(10 + seed).randbytes(400_000))
        releases.append(bench.publish(keep=2).release)
    copies = bench.site / "by-hash" / "SHA256"
    everything = set(bench.store.rglob("*.cacnk"))
    bench.clock.now += GRACE - 120
    bench.publish(keep=2)
    assert set(bench.store.rglob("*.cacnk")) == everything
    assert (copies / releases[0].index.sha256).exists()

    bench.clock.now += 120
    assert bench.publish(keep=2).status is Status.UNCHANGED
    assert "removed" in bench.listener.said[0]
    gone = everything - set(bench.store.rglob("*.cacnk"))
    assert gone
    assert not (copies / releases[0].index.sha256).exists()
    for path in (bench.index, old, bench.site / "all.caidx", copies / releases[1].index.sha256):
        name = path
        if path.parent == copies:
            name = bench.site.parent / "kept.caidx"
            shutil.copy(path, name)
        bench.output("casync", "digest", f"--store={bench.store}", name)
    assert record.read_garbage(bench.store).since == {}


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_an_index_that_cannot_be_read_stops_the_pruning(bench: Bench, damage: str) -> None:
    other = bench.site / "other.caidx"
    bench.publish(index=other)
    bench.publish(keep=1)
    bench.change(7)
    bench.publish(keep=1)
    other.write_bytes(b"") if damage == "cut" else other.unlink()
    everything = set(bench.store.rglob("*.cacnk"))
    for _ in range(2):
        bench.clock.now += GRACE + 60
        assert bench.publish(keep=1).status is Status.UNCHANGED
        assert "no chunk of" in bench.listener.said[0]
    assert set(bench.store.rglob("*.cacnk")) == everything


def test_nothing_is_pruned_without_keep(bench: Bench) -> None:
    bench.publish()
    bench.change(8)
    bench.publish()
    everything = set(bench.store.rglob("*.cacnk"))
    for _ in range(2):
        bench.clock.now += 10 * GRACE
        bench.publish()
    assert set(bench.store.rglob("*.cacnk")) == everything


def test_a_full_store_leaves_the_site_as_it_was(bench: Bench) -> None:
    bench.publish()
    before = bench.files()
    (bench.source / "too-much").write_bytes(random.Random(3).randbytes(3_000_000))
    fake = bench.site.parent / "bin"
    fake.mkdir()
    casync = shutil.which("casync")
    (fake / "casync").write_text(
        f'#!/bin/sh\n{casync} "$@" >/dev/null || exit 1\n'
        "case $1 in make) echo 'Failed to run synchronizer: No space left on device' >&2; exit 1;;"
        " esac\n"
    )
    (fake / "casync").chmod(0o755)
    config = write_config(bench)
    done = run_cli(config, path=f"{fake}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "no space left" in done.stdout
    assert bench.files() == before
    bench.check()


def write_config(bench: Bench, **more: object) -> Path:
    config = bench.site.parent / "publish.json"
    entry = {
        "index": str(bench.index),
        "store": str(bench.store),
        "source": str(bench.source),
        **more,
    }
    config.write_text(json.dumps([entry]))
    return config


def command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "casync_updater.server", *options, str(config)]


def environment(path: str | None = None) -> dict[str, str]:
    source = Path(__file__).parents[2] / "src"
    return {**os.environ, "PYTHONPATH": str(source), "PATH": path or os.environ["PATH"]}


def run_cli(
    config: Path, *options: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, *options),
        capture_output=True,
        text=True,
        env=environment(path),
        timeout=120,
        check=False,
    )


def test_the_command_line(bench: Bench) -> None:
    config = write_config(bench)
    entries = json.loads(config.read_text())
    entries.append({**entries[0], "index": str(bench.site / "x.caidx"), "source": "/nonexistent"})
    config.write_text(json.dumps(entries))
    done = run_cli(config, "--json")
    assert done.returncode == 1
    outcomes = json.loads(done.stdout)["entries"]
    by_status = {outcome["status"]: outcome for outcome in outcomes}
    assert set(by_status) == {"published", "failed"}
    good = by_status["published"]
    assert good["index"] == str(bench.index)
    assert good["digest"] == bench.release().digest
    assert good["chunks"]["new"] == good["chunks"]["total"] > 0
    assert "/nonexistent" in by_status["failed"]["error"]

    again = run_cli(write_config(bench))
    assert again.returncode == 0
    assert "unchanged" in again.stdout

    config.write_text("[{]")
    assert run_cli(config).returncode == 2


def test_files_are_readable_whatever_the_umask(bench: Bench) -> None:
    config = write_config(bench)
    subprocess.run(
        ["sh", "-c", 'umask 077; exec "$@"', "sh", *command(config)],
        check=True,
        env=environment(),
        capture_output=True,
    )
    for path in bench.site.rglob("*"):
        assert path.stat().st_mode & (0o555 if path.is_dir() else 0o444) == (
            0o555 if path.is_dir() else 0o444
        ), path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_belong_to_the_owner_of_their_folder(bench: Bench) -> None:
    os.chown(bench.site, 33, 33)
    bench.publish()
    bench.change(1)
    bench.publish()
    others = {path for path in bench.site.rglob("*") if path.stat().st_uid != 33}
    assert {path.name for path in others} <= {"releases.json", "indexes.json"}


def test_the_second_publisher_waits(bench: Bench) -> None:
    config = write_config(bench)
    with locked(bench.site, bench.clock, bench.listener.say):
        waiting = subprocess.Popen(
            command(config), stderr=subprocess.PIPE, text=True, env=environment()
        )
        assert waiting.stderr is not None
        assert "waiting for another publisher" in waiting.stderr.readline()
        assert not bench.index.exists()
    assert waiting.wait(60) == 0
    waiting.stderr.close()
    bench.check()


def test_two_at_once(bench: Bench) -> None:
    config = write_config(bench)
    pair = [subprocess.Popen(command(config), env=environment()) for _ in range(2)]
    assert [process.wait(60) for process in pair] == [0, 0]
    bench.check()


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(bench: Bench, seed: int) -> None:
    """After each kill the site serves the old or the new version; the next run tidies up."""
    rng = random.Random(seed)
    bench.publish()
    bench.clock.now = START - 86_400
    config = write_config(bench)
    for round_ in range(3):
        bench.change(100 * seed + round_)
        (bench.source / "bulk").write_bytes(rng.randbytes(4_000_000))
        process = subprocess.Popen(
            command(config), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        time.sleep(rng.uniform(0.15, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
        release = bench.release()
        copy = bench.site / "by-hash" / "SHA256" / release.index.sha256
        visible = bench.site.parent / "visible.caidx"
        shutil.copy(copy, visible)
        assert bench.output("casync", "digest", f"--store={bench.store}", visible) == (
            release.digest
        )
    bench.change(100 * seed + 99)
    assert run_cli(config).returncode == 0
    bench.check()


def test_killed_between_any_two_files(bench: Bench) -> None:
    """A site that stopped in the middle of becoming visible heals with the next publication."""
    bench.publish()
    old = bench.files()
    bench.change(11)
    bench.publish()
    steps = [".mtree", ".cks", ".release"]
    for count in range(len(steps)):
        for suffix in steps[count:]:
            name = f"tree.caidx{suffix}"
            (bench.site / name).write_bytes(old[name][2])
        (bench.store / ".casync-updater" / "publishing").touch()
        bench.publish()
        bench.check()


def test_a_release_says_what_it_lists(bench: Bench) -> None:
    release = bench.publish().release
    assert isinstance(release.mtree, FileRef)
    assert format_release(release).encode() == bench.beside(".release").read_bytes()


def touch_everything(tree: Path) -> None:
    for path in (tree, *tree.rglob("*")):
        os.utime(path, (START, START), follow_symlinks=False)


@pytest.mark.parametrize("features", [None, ("2sec-time",), ("unix",), ("nsec-time", "acl")])
def test_a_build_that_only_touches_files_publishes_nothing(
    bench: Bench, features: tuple[str, ...] | None
) -> None:
    bench.publish(features=features)
    before = bench.files()
    touch_everything(bench.source)
    times = snapshot(bench.source, mtimes=True)
    assert bench.publish(features=features).status is Status.UNCHANGED
    assert bench.files() == before
    assert snapshot(bench.source, mtimes=True) == times
    kept = bench.publish(features=features, mtimes=Mtimes.KEEP)
    assert kept.status is Status.PUBLISHED


def test_only_what_did_not_change_keeps_its_time(bench: Bench) -> None:
    bench.publish()
    before = snapshot(bench.source, mtimes=True)
    bench.change(4)
    touch_everything(bench.source)
    (bench.source / "read-only").chmod(0o400)
    bench.publish()
    bench.check()
    out = bench.site / "out"
    bench.output("casync", "extract", f"--store={bench.store}", bench.index, out)
    after = snapshot(out, mtimes=True)
    assert snapshot(out) == snapshot(bench.source)
    new = int(START)
    for path, node in after.items():
        same = path in before and replace(node, mtime=None) == replace(before[path], mtime=None)
        if node.type == "dir" and node.mtime == new:
            continue
        assert node.mtime == (before[path].mtime if same else new), path
    assert after[b"small/0000/file-000000"].mtime != after[b"read-only"].mtime == new
    assert after[b"deep"].mtime == before[b"deep"].mtime
    assert after[b"small/0000"].mtime == new


def test_damaged_chunks_with_stable_times(bench: Bench) -> None:
    bench.publish()
    touch_everything(bench.source)
    (bench.source / "new").write_text("so that something is published")
    for chunk in list(bench.store.rglob("*.cacnk"))[::2]:
        chunk.chmod(0o644)
        chunk.write_bytes(b"")
    bench.publish()
    assert "damaged" in bench.listener.said[0]
    bench.check()

"""Measure an update by the project's extractor beside ``casync extract --seed --hardlink``.

    PYTHONPATH=src:tests /usr/bin/python3 tests/bench/extract.py [--files 8578] [--bytes 252000000]

Makes a tree, archives it, changes 1 % of its files, archives it again, and updates a copy of
the first to the second, several times. Everything is local: no network in the numbers.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from casync_updater.cycle.extract import extract, plan_extract
from casync_updater.cycle.extract.tree import trust
from casync_updater.formats import index as index_format
from casync_updater.formats.record import load
from support.archives import StoreChunks, casync, make_archive, open_root, tree_digest

FEATURES = ("permissions", "symlinks", "sec-time")


def make_tree(root: Path, files: int, total: int, rng: random.Random) -> list[Path]:
    """Files of very different sizes (log-normal, as in /usr), eight or so in a directory."""
    weights = [rng.lognormvariate(8.5, 2.0) for _ in range(files)]
    scale = total / sum(weights)
    block = rng.randbytes(1 << 24)
    made = []
    for number, weight in enumerate(weights):
        folder = root / f"{number // 800:03}" / f"{number // 8:05}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"file-{number:06}"
        size = int(weight * scale)
        with path.open("wb") as file:
            while size > 0:
                begin = rng.randrange(len(block) - 4096)
                piece = block[begin : begin + min(size, 1 << 20)]
                file.write(piece)
                size -= len(piece)
        made.append(path)
    return made


def change(paths: list[Path], rng: random.Random) -> None:
    """A new version of 1 % of the files, of those that are not huge."""
    small = [path for path in paths if path.stat().st_size < 200_000]
    for path in rng.sample(small, len(paths) // 100):
        path.write_bytes(rng.randbytes(path.stat().st_size + 10))


def one_update(base: Path) -> None:
    """The child: what one update costs a process, as JSON on standard output."""
    begin = time.perf_counter()
    index = index_format.parse((base / "new.caidx").read_bytes(), "new.caidx")
    record = load(base / "record")
    loaded = time.perf_counter()
    root = os.open(base / "old", os.O_RDONLY)
    plan = plan_extract(index, record, root)
    planned = time.perf_counter()
    staged = open_root(base / "staged")
    done = extract(plan, StoreChunks(base / "store.castr"), staged)
    built = time.perf_counter()
    done.record.save(base / "record.new")
    saved = time.perf_counter()
    print(
        json.dumps(
            {
                "load": loaded - begin,
                "plan": planned - loaded,
                "build": built - planned,
                "save": saved - built,
                "linked": done.files_linked,
                "written_files": done.files_written,
                "written_bytes": done.bytes_written,
                "fetched_bytes": done.bytes_fetched,
                "record_bytes": (base / "record.new").stat().st_size,
                "peak_kib": _peak(),
            }
        )
    )


def _peak() -> int:
    """This process's peak resident size in KiB (``ru_maxrss`` would be the parent's, at exec)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    """Make the trees, and print a line for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=8578)
    parser.add_argument("--bytes", type=int, default=252_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        one_update(arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        _measure(Path(folder), arguments.files, arguments.bytes, arguments.runs)


def _measure(base: Path, files: int, total: int, runs: int) -> None:
    rng = random.Random(1)
    source = base / "source"
    paths = make_tree(source, files, total, rng)
    first = make_archive(source, base / "old.caidx", FEATURES)
    change(paths, rng)
    make_archive(source, base / "new.caidx", FEATURES)
    old = open_root(base / "old")
    chunks = StoreChunks(base / "store.castr")
    begin = time.perf_counter()
    installed = extract(plan_extract(first, None, -1), chunks, old)
    print(f"fresh install: {time.perf_counter() - begin:.2f} s")
    installed.record.save(base / "record")
    runs_of_ours = [_ours(base) for _ in range(runs)]
    print(f"ours: median {statistics.median(r['total'] for r in runs_of_ours):.3f} s")
    middle = sorted(runs_of_ours, key=lambda r: r["total"])[runs // 2]
    print(json.dumps(middle, indent=1))
    theirs = statistics.median(_theirs(base) for _ in range(runs))
    print(f"casync --seed --hardlink=yes: median {theirs:.3f} s")


def _ours(base: Path) -> dict[str, float]:
    shutil.rmtree(base / "staged", ignore_errors=True)
    begin = time.perf_counter()
    run = subprocess.run(
        [sys.executable, __file__, "--child", base], check=True, capture_output=True
    )
    result: dict[str, float] = json.loads(run.stdout)
    result["total"] = time.perf_counter() - begin
    assert tree_digest(base / "staged", FEATURES) == tree_digest(base / "source", FEATURES)
    _restamp(base)
    return result


def _restamp(base: Path) -> None:
    """Links changed the ctimes of the old tree; here every run is to start from the same one."""
    record = load(base / "record")
    assert record is not None
    shutil.rmtree(base / "staged")
    root = os.open(base / "old", os.O_RDONLY)
    trust(record, root, ())
    os.close(root)
    record.save(base / "record")


def _theirs(base: Path) -> float:
    shutil.rmtree(base / "staged", ignore_errors=True)
    begin = time.perf_counter()
    casync(
        "extract",
        *(f"--with={feature}" for feature in FEATURES),
        f"--store={base / 'store.castr'}",
        f"--seed={base / 'old'}",
        "--hardlink=yes",
        base / "new.caidx",
        base / "staged",
    )
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()

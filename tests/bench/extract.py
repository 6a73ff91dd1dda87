"""Measure an update by the project's extractor beside ``casync extract --seed --hardlink``.

    PYTHONPATH=src:tests /usr/bin/python3 tests/bench/extract.py [--files 8578] [--bytes 252000000]

Makes a tree, archives it, changes 1 % of its files, archives it again, and updates a copy of
the first to the second, several times. Everything is local: no network in the numbers.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trees import change, make_tree

from casync_updater.cycle.extract import extract, plan_extract
from casync_updater.cycle.extract.tree import trust
from casync_updater.formats import index as index_format
from casync_updater.formats.record import load
from support.archives import StoreChunks, casync, make_archive, open_root, tree_digest

FEATURES = ("permissions", "symlinks", "sec-time")


def one_update(base: Path, staged: Path) -> None:
    """The child: what one update costs a process, as JSON on standard output."""
    begin = time.perf_counter()
    index = index_format.parse((base / "new.caidx").read_bytes(), "new.caidx")
    record = load(base / "record")
    loaded = time.perf_counter()
    plan = plan_extract(index, record, os.open(base / "old", os.O_RDONLY))
    planned = time.perf_counter()
    done = extract(plan, StoreChunks(base / "store.castr"), open_root(staged))
    built = time.perf_counter()
    (base / "record.new").write_bytes(b"".join(done.record.packed()))
    saved = time.perf_counter()
    result = {
        "load": loaded - begin,
        "plan": planned - loaded,
        "build": built - planned,
        "save": saved - built,
        "processor": time.process_time(),
        "linked": done.files_linked,
        "written_files": done.files_written,
        "written_bytes": done.bytes_written,
        "fetched_bytes": done.bytes_fetched,
        "record_bytes": (base / "record.new").stat().st_size,
        "peak_kib": _peak(),
    }
    print(json.dumps(result))


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
    parser.add_argument("--change", type=int, default=0, help="files; 1 %% where it is not given")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        one_update(*arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        changed = arguments.change or arguments.files // 100
        _measure(Path(folder), arguments.files, arguments.bytes, changed, arguments.runs)


def _measure(base: Path, files: int, total: int, changed: int, runs: int) -> None:
    rng = random.Random(1)
    source = base / "source"
    paths = make_tree(source, files, total, rng)
    first = make_archive(source, base / "old.caidx", FEATURES)
    change(paths, changed, rng)
    make_archive(source, base / "new.caidx", FEATURES)
    wanted = tree_digest(source, FEATURES)
    old = open_root(base / "old")
    begin = time.perf_counter()
    installed = extract(plan_extract(first, None, -1), StoreChunks(base / "store.castr"), old)
    print(f"fresh install: {time.perf_counter() - begin:.2f} s")
    (base / "record").write_bytes(b"".join(installed.record.packed()))
    ours, theirs, links = [], [], []
    # Nothing is removed in between: ext4 looks long for an inode after many were freed.
    for number in range(runs):
        ours.append(_ours(base, base / f"ours-{number}"))
        assert tree_digest(base / f"ours-{number}", FEATURES) == wanted
        theirs.append(_theirs(base, base / f"theirs-{number}"))
        begin = time.perf_counter()
        subprocess.run(["cp", "-al", base / "old", base / f"links-{number}"], check=True)
        links.append(time.perf_counter() - begin)
        _restamp(base)
    ours.sort(key=lambda run: run["total"])
    print(json.dumps(ours[runs // 2], indent=1))
    print(f"ours: median {ours[runs // 2]['total']:.3f} s")
    print(f"casync --seed --hardlink=yes: median {statistics.median(theirs):.3f} s")
    print(f"cp -al: median {statistics.median(links):.3f} s")


def _ours(base: Path, staged: Path) -> dict[str, float]:
    begin = time.perf_counter()
    run = subprocess.run(
        [sys.executable, __file__, "--child", base, staged], check=True, capture_output=True
    )
    result: dict[str, float] = json.loads(run.stdout)
    result["total"] = time.perf_counter() - begin
    return result


def _restamp(base: Path) -> None:
    """Links changed the ctimes of the old tree; every run is to start from a trusted one."""
    record = load(base / "record")
    assert record is not None
    root = os.open(base / "old", os.O_RDONLY)
    trust(record, root, ())
    os.close(root)
    (base / "record").write_bytes(b"".join(record.packed()))


def _theirs(base: Path, staged: Path) -> float:
    begin = time.perf_counter()
    casync(
        "extract",
        *(f"--with={feature}" for feature in FEATURES),
        f"--store={base / 'store.castr'}",
        f"--seed={base / 'old'}",
        "--hardlink=yes",
        base / "new.caidx",
        staged,
    )
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()

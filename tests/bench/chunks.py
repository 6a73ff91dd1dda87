"""What chunk size and zstd level do to a first install and to an update, in bytes and processor.

    PYTHONPATH=src:tests /usr/bin/python3 tests/bench/chunks.py [--sizes 16,32,64,128]
        [--levels 3,9,15,19]

On Debian's /usr, and a version of it in which 1 % of the files are other ones. The tables on
standard output are markdown. `README.md` beside this file has what was measured.
"""

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

import zstandard
from trees import change, contents, debian_tree

from casync_updater.formats import index as index_format
from casync_updater.formats.store import LocalStore, decode, file_limit
from casync_updater.server.build import DEFAULT_FEATURES
from casync_updater.tools import casync
from system.nspawn import base


def measure(folder: Path, size: int, levels: list[int]) -> None:
    """Print a row for each level."""
    store = folder / f"{size}.castr"
    indexes = []
    for number in (1, 2):
        path = folder / f"{size}-{number}.caidx"
        casync.make(
            path,
            folder / str(number),
            store=store,
            flags=casync.normalised(DEFAULT_FEATURES),
            chunk_size=f"{size // 4}:{size}:{size * 4}",
        )
        indexes.append(index_format.parse(path.read_bytes(), str(path)))
    first = {ref.id: ref for ref in indexes[0]}
    update = {ref.id: ref for ref in indexes[1] if ref.id not in first}
    files = LocalStore(store)
    for level in levels:
        compress = zstandard.ZstdCompressor(level=level).compress
        spent, sums = 0.0, []
        for refs in (first, update):
            total = 0
            for ref in refs.values():
                raw = files.read(ref.hex, file_limit(ref.size))
                data = decode(raw, ref.size, ref.hex)
                begin = time.process_time()
                total += len(compress(data))
                spent += time.process_time() - begin
            sums.append(total)
        print(
            f"| {size >> 10}K | {level} | {len(indexes[0]):,} | {len(indexes[0].table) / 1e6:.2f}"
            f" | {sums[0] / 1e6:.1f} | {len(update)} | {sums[1] / 1e6:.2f} | {spent:.1f} s |",
            flush=True,
        )
    shutil.rmtree(store)


def main() -> None:
    """Make both trees, and measure every combination."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="16,32,64,128", help="KiB, in the mean")
    parser.add_argument("--levels", default="3,9,15,19")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for version in ("1", "2"):
            debian_tree(folder / version, base("bookworm"))
        paths = contents(folder / "2")
        change(paths, len(paths) // 100, random.Random(2))
        print("| size | level | chunks | index MB | fresh MB | new | update MB | processor |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for size in map(int, arguments.sizes.split(",")):
            measure(folder, size << 10, [int(level) for level in arguments.levels.split(",")])


if __name__ == "__main__":
    main()

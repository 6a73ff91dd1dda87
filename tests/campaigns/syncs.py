"""What the syncs cost: one syncfs for a tree, against an fsync for each file, against none.

python3 tests/campaigns/syncs.py
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

from casync_updater import syscalls

_COUNT, _SIZE = 2000, 8 << 10


def made(folder: Path, *, each: bool) -> float:
    """Seconds for a tree of small files, durable at the end."""
    begin = time.monotonic()
    for number in range(_COUNT):
        with (folder / str(number)).open("wb") as file:
            file.write(os.urandom(_SIZE))
            if each:
                file.flush()
                os.fsync(file.fileno())
    if not each:
        syscalls.sync_file_system(folder)
    return time.monotonic() - begin


def main() -> None:
    for each in (False, True):
        folder = Path(tempfile.mkdtemp(dir="."))
        try:
            words = f"{_COUNT} times fsync" if each else "one syncfs"
            print(f"{_COUNT} files of {_SIZE >> 10} KiB, {words}: {made(folder, each=each):.2f} s")
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()

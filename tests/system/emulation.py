"""Programs of another architecture run on this machine as if they were its own.

The kernel hands them to QEMU (binfmt_misc). That is a setting of the whole machine, so it is made
for one architecture only, for as long as the block lasts, and by one process at a time; where
the machine's owner has made it already, nothing is changed.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from system.nspawn import CACHE, locked

_FORMATS = Path("/proc/sys/fs/binfmt_misc")
_QEMU = {"arm64": "qemu-aarch64"}


@contextlib.contextmanager
def emulated(architecture: str) -> Iterator[None]:
    """Let programs of an architecture, by Debian's name, run while the block lasts."""
    if architecture == _own():
        yield
        return
    name = _QEMU[architecture]
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / "emulation.lock"), _mounted(), contextlib.ExitStack() as stack:
        if not (_FORMATS / name).exists():
            # Debian's own line for it; with its flag F the kernel opens QEMU now, and programs
            # find it wherever their root is.
            line = Path(f"/usr/lib/binfmt.d/{name}.conf").read_text()
            (_FORMATS / "register").write_text(line)
            stack.callback((_FORMATS / name).write_text, "-1")
        yield


def _own() -> str:
    argv = ["dpkg", "--print-architecture"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _mounted() -> Iterator[None]:
    if (_FORMATS / "register").exists():
        yield
        return
    subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", _FORMATS], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", _FORMATS], check=True)

"""Stops or disturbs the client at a named step, from the outside.

    --trace FILE
    --kill NAME --at 0 --when before
    --no-sync

A step is a call that changes what is on a disk (rename, unlink, mkdir, fsync, ...) or starts a
program. It is named by the function of the client that wants it: ``commit.exchange/renameat2``.
The interpreter's own profiling hook sees these calls, so the client needs no hooks of its own.
SIGKILL comes from within the process, in the very moment: nothing is flushed or cleaned up.
"""

import argparse
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

CALLS = {
    *("rename", "replace", "unlink", "rmdir", "mkdir", "link", "symlink", "fsync", "truncate"),
    *("ftruncate", "chmod", "fchmod", "chown", "lchown", "utime", "setxattr", "fork_exec"),
}
"""Functions of the interpreter, in C."""
FUNCTIONS = {"_renameat2": "renameat2", "sync_file_system": "syncfs"}
"""Functions of the client that call into the C library."""
_HELPERS = {"files", "syscalls"}


class Watch:
    """Counts the steps by name, and acts at one of them."""

    def __init__(self, kill: str | None, at: int, when: str, trace: Path | None) -> None:
        self._kill = kill
        self._at = at
        self._when = when
        self._trace = None if trace is None else trace.open("a", buffering=1)
        self._seen: Counter[str] = Counter()

    def hook(self, frame: FrameType, event: str, what: Any) -> None:
        if event in ("c_call", "c_return"):
            call = what.__name__
            if call not in CALLS or what.__module__ not in ("posix", "_posixsubprocess"):
                return
        elif event in ("call", "return"):
            call = FUNCTIONS.get(frame.f_code.co_name, "")
            if not call or not frame.f_code.co_filename.endswith("syscalls.py"):
                return
        else:
            return
        name = f"{_wanted_by(frame)}/{call}"
        if event.endswith("call"):
            if self._trace is not None:
                self._trace.write(name + "\n")
            self._seen[name] += 1
            self._strike(name, "before")
        else:
            self._strike(name, "after")

    def _strike(self, name: str, when: str) -> None:
        if name == self._kill and when == self._when and self._seen[name] == self._at + 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _wanted_by(frame: FrameType | None) -> str:
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "casync_updater" in file.parts and file.stem not in _HELPERS:
            return f"{file.stem}.{frame.f_code.co_qualname.replace('.<locals>', '')}"
        frame = frame.f_back
    return "elsewhere"


def take_out_the_syncs() -> None:
    """Every fsync and syncfs of this process does nothing from now on."""
    from casync_updater import syscalls  # noqa: PLC0415 - after the hooks

    os.fsync = lambda _descriptor: None
    syscalls.sync_file_system = lambda _path: None


def prepare(words: Sequence[str]) -> None:
    """Make this process one that ends, or is traced, as the options say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kill", metavar="NAME")
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--when", choices=("before", "after"), default="before")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--no-sync", action="store_true")
    options = parser.parse_args(words)
    if options.no_sync:
        take_out_the_syncs()
    if options.kill or options.trace:
        watch = Watch(options.kill, options.at, options.when, options.trace)
        threading.setprofile(watch.hook)
        sys.setprofile(watch.hook)

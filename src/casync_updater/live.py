"""What the daemon is doing right now, for `status`; and the lock that makes it the only one.

``STATE/daemon.lock`` is locked (flock) as long as the daemon lives, and says who it is and where
its live file is::

    {"pid": 4711, "live": "/run/casync-updater/daemon.json"}

The live file is written anew, without fsync, at most once a second. After a power cut it means
nothing, and neither does it when nobody holds the lock.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casync_updater.errors import BusyError, LocalError
from casync_updater.model import Progress, Reason, Step

LOCK = "daemon.lock"
LIVE = "daemon.json"


@dataclass(frozen=True, slots=True)
class LiveEntry:
    """One entry at this moment. Times are seconds since 1970."""

    step: Step = Step.IDLE
    version: str | None = None
    progress: Progress | None = None
    reason: Reason | None = None
    """Who started the running cycle, or the last one."""
    since: float | None = None
    """When the running cycle started."""
    next_check: float | None = None
    """When the next one is due; None while one runs."""


@dataclass(frozen=True, slots=True)
class Live:
    """The daemon at this moment."""

    pid: int
    phase: str
    """``starting``, ``running`` or ``stopping``."""
    entries: Mapping[str, LiveEntry] = field(default_factory=dict)
    online: Any = None
    """The report of online detection, as JSON has it; None while there is none."""
    drives: Any = ()
    """The drives that are there, as JSON has them."""


def write_live(path: Path, live: Live) -> None:
    """Replace the live file.

    Raises:
        OSError: it could not be written; the old one still stands.
    """
    entries = {
        name: {
            "state": entry.step,
            "version": entry.version,
            "progress": None
            if entry.progress is None
            else {"done": entry.progress.done, "total": entry.progress.total},
            "reason": entry.reason,
            "since": entry.since,
            "nextCheck": entry.next_check,
        }
        for name, entry in live.entries.items()
    }
    document = {
        "pid": live.pid,
        "phase": live.phase,
        "entries": entries,
        "online": live.online,
        "drives": live.drives,
    }
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(document))
    new.replace(path)


def read_live(state_dir: Path) -> dict[str, Any]:
    """What the running daemon says of itself; nothing where none runs on this state directory."""
    try:
        with (state_dir / LOCK).open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = json.load(lock)
            else:
                return {}
        document = json.loads(Path(holder["live"]).read_bytes())
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return document if isinstance(document, dict) else {}


@contextlib.contextmanager
def only_daemon(state_dir: Path, live: Path) -> Iterator[None]:
    """Be the one daemon of this state directory while the block lasts.

    Raises:
        BusyError: there is one already; the message says which process.
        LocalError: the state directory cannot be used.
    """
    path = state_dir / LOCK
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LocalError(f"{path} cannot be used: {error.strerror}") from error
    try:
        _lock(descriptor, path)
        with contextlib.suppress(OSError):  # a full disk is no reason not to start
            os.ftruncate(descriptor, 0)
            os.pwrite(
                descriptor,
                json.dumps({"pid": os.getpid(), "live": str(live.absolute())}).encode(),
                0,
            )
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Lock, with a few tries: `read_live` holds it for an instant."""
    for _ in range(20):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return
    try:
        holder = f"process {json.loads(os.pread(descriptor, 4096, 0))['pid']}"
    except (ValueError, TypeError, KeyError):
        holder = "another process"
    raise BusyError(
        f"{holder} is already the daemon of {path.parent}; stop it, or give --state-dir another"
        " directory"
    )

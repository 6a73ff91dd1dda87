"""Holds off a shutdown while something is written that must not be cut.

logind's inhibitor locks, see systemd-inhibit(1). A lock delays whoever asks politely; who has
the right to may shut down all the same, and then the service's own stop takes its time, which
it asks for as it goes (EXTEND_TIMEOUT_USEC, see `daemon`).
"""

import contextlib
import select
import shutil
import subprocess
from collections.abc import Iterator

_LIMIT = 5.0
"""Seconds that logind has for an answer."""


@contextlib.contextmanager
def shutdown_inhibited(why: str) -> Iterator[None]:
    """Hold the lock while the block lasts; where there is no logind, do without.

    The lock is held by a ``cat`` that ends with its input: however this process ends, the lock
    ends with it.

    Args:
        why: what a user reads who wants to shut down.
    """
    program = shutil.which("systemd-inhibit")
    if program is None:
        yield
        return
    options = ("--what=shutdown", "--mode=block", "--who=casync-updater", f"--why={why}")
    with subprocess.Popen(
        [program, *options, "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        process_group=0,
    ) as holder:
        assert holder.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                # What comes back says that the lock is held; an end, that there is none to have.
                holder.stdin.write(b"\n")
                select.select([holder.stdout], [], [], _LIMIT)
            yield
        finally:
            holder.stdin.close()
            try:
                holder.wait(_LIMIT)
            except subprocess.TimeoutExpired:
                holder.kill()

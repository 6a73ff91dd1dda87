"""One door to other programs.

An argument list, no shell, no standard input, a time-out or a stall limit always, stderr in
the exception, and the whole process group ended when it is over.
"""

import contextlib
import functools
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from casync_updater.errors import LocalError

_TERM_GRACE = 5.0
_POLL = 0.5
_STDERR_KEPT = 64 << 10


class ProgramError(LocalError):
    """A program failed: its name, its exit code or signal, what it wrote to stderr."""

    def __init__(self, program: str, how: str, stderr: str) -> None:
        self.how = how
        self.stderr = stderr
        super().__init__(f"{program} {how}: {stderr.strip() or 'it gave no reason'}")


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended."""

    code: int
    stdout: bytes
    stderr: str


def run(
    argv: Sequence[str],
    *,
    ok: Iterable[int] = (0,),
    timeout: float | None = None,
    stall: float | None = None,
    activity: Callable[[], object] | None = None,
    env: Mapping[str, str] | None = None,
    keep_fds: Sequence[int] = (),
    stdout_limit: int = 1 << 30,
) -> Result:
    """Run a program to its end and take what it wrote.

    Args:
        argv: the program and its arguments, as they are.
        ok: exit codes that are no error.
        timeout: seconds after which it is ended; None where `stall` watches it instead.
        stall: seconds without output and without a change of `activity()` after which it is
            ended.
        activity: a value that changes while the program gets on; asked about twice a second.
            None watches what the program itself reads and writes.
        env: the whole environment; None for this process's own.
        keep_fds: descriptors that the program inherits (a lock that shall live as long).
        stdout_limit: bytes of standard output that are taken before the program is ended.

    Raises:
        ProgramError: another exit code, a signal, a time-out, a stall, or too much output.
        LocalError: the program is not installed.
    """
    out = bytearray()
    with started(argv, env=env, keep_fds=keep_fds) as child:
        for data in _watched(child, argv[0], timeout=timeout, stall=stall, activity=activity):
            out += data
            if len(out) > stdout_limit:
                raise ProgramError(argv[0], f"wrote more than {stdout_limit} bytes", "")
        code = child.process.wait()
    if code not in ok:
        raise _failure(argv[0], code, child)
    return Result(code, bytes(out), child.stderr_text())


def _failure(program: str, code: int, child: "_Child") -> ProgramError:
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return ProgramError(program, how, child.stderr_text())


@contextlib.contextmanager
def stream(
    argv: Sequence[str], *, stall: float, env: Mapping[str, str] | None = None
) -> Iterator[Iterator[bytes]]:
    """Run a program and take its standard output piece by piece.

    Leaving the block early ends the program; reading to the end checks its exit code.

    Raises:
        ProgramError: it failed, or wrote nothing for `stall` seconds.
    """

    def pieces(child: "_Child") -> Iterator[bytes]:
        yield from _watched(child, argv[0], timeout=None, stall=stall, activity=None)
        code = child.process.wait()
        if code:
            raise _failure(argv[0], code, child)

    with started(argv, env=env) as child:
        yield pieces(child)


class _Child:
    """A started program with its pipes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.stderr = bytearray()

    def stderr_text(self) -> str:
        return self.stderr.decode(errors="replace")


@contextlib.contextmanager
def started(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, keep_fds: Sequence[int] = ()
) -> Iterator[_Child]:
    """A program in a process group of its own, which is ended when the block is left.

    It also ends when this process dies, however that happens (setpriv is in util-linux, which
    is on every Debian): nothing that was started goes on behind the back of the next start.
    """
    if shutil.which(argv[0]) is None:
        raise LocalError(f"{argv[0]} is not installed")
    try:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            pass_fds=tuple(keep_fds),
            process_group=0,
        )
    except OSError as error:
        raise LocalError(f"{argv[0]} cannot be started: {error.strerror}") from error
    try:
        yield _Child(process)
    finally:
        end_group(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def end_group(process: subprocess.Popen[bytes], grace: float = _TERM_GRACE) -> None:
    """End what is left of a process group: SIGTERM, then SIGKILL for what does not listen."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _input_output(pid: int) -> bytes | None:
    """The kernel's counters of what a process read and wrote."""
    try:
        return Path(f"/proc/{pid}/io").read_bytes()
    except OSError:
        return None


def _watched(
    child: _Child,
    program: str,
    *,
    timeout: float | None,
    stall: float | None,
    activity: Callable[[], object] | None,
) -> Iterator[bytes]:
    """Standard output, piece by piece, until the program has ended; stderr is kept aside.

    A program may close its output and go on, and what it leaves running may hold it open.
    """
    process = child.process
    assert process.stdout is not None
    assert process.stderr is not None
    begin = last = time.monotonic()
    seen: object = None
    if activity is None:
        activity = functools.partial(_input_output, process.pid)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            if not ended and not selector.get_map():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
            events = selector.select(0 if ended or not selector.get_map() else _POLL)
            if ended and not events:
                return
            for key, _ in events:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    yield data
                else:
                    child.stderr += data
                    del child.stderr[:-_STDERR_KEPT]
                # After the yield: a caller that takes its time is no stall of the program.
                last = time.monotonic()
            now = time.monotonic()
            if (current := activity()) != seen:
                seen, last = current, now
            if timeout is not None and now - begin > timeout:
                raise ProgramError(
                    program, f"was ended after {timeout:g} seconds", child.stderr_text()
                )
            if stall is not None and now - last > stall:
                raise ProgramError(
                    program, f"was ended: no progress for {stall:g} seconds", child.stderr_text()
                )

"""Clients and publishers that are forked from an interpreter which has loaded them already.

A cold start takes a quarter of a second of processor time before the program itself does
anything, and a campaign starts thousands. What runs after the fork is the program's own `main`
in a process, session and environment of its own; SIGKILL ends it like any other process.

    with Nursery() as nursery:
        client = nursery.start(["update"], {"PATH": "/usr/bin:/bin"})
        client.kill()
        done = client.wait()
"""

import contextlib
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.client import Done

HERE = Path(__file__).resolve().parent
_PATIENCE = 180.0


class Nursery:
    """The interpreter that forks; one program at a time."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, _paths()))},
                stdin=subprocess.DEVNULL,
            )
        self._channel.settimeout(_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()
        self._process.wait()

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        program: str = "client",
        killer: Sequence[str] = (),
    ) -> "Forked":
        """A program that runs from now on.

        Args:
            arguments: its command line, without its name.
            environment: its environment.
            program: ``client`` or ``publisher``.
            killer: options of `killer` that stop or disturb it from the outside.
        """
        outputs = os.memfd_create("stdout"), os.memfd_create("stderr")
        order = {
            "program": program,
            "arguments": list(arguments),
            "environment": dict(environment),
            "killer": list(killer),
        }
        socket.send_fds(self._channel, [json.dumps(order).encode()], outputs)
        return Forked(self._channel, int(self._channel.recv(100)), outputs)


class Forked:
    """One program that was started."""

    def __init__(self, channel: socket.socket, pid: int, outputs: tuple[int, int]) -> None:
        self._channel = channel
        self._outputs = outputs
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd = -1

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def ended(self, within: float) -> bool:
        """Whether it comes to its end in so many seconds; True as soon as it does."""
        return self._pidfd < 0 or bool(select.select([self._pidfd], [], [], within)[0])

    def wait(self) -> Done:
        """How it ended (a negative code is the signal that ended it), and what it wrote.

        Raises:
            TimeoutError: it hangs; it is killed.
        """
        try:
            try:
                code = int(self._channel.recv(100))
            except TimeoutError:
                self.kill()
                self._channel.recv(100)
                raise
            return Done(code, *map(_text, self._outputs))
        finally:
            for descriptor in (*self._outputs, self._pidfd):
                if descriptor >= 0:
                    os.close(descriptor)


def _text(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")


def _paths() -> tuple[Path, Path]:
    return HERE.parents[1] / "src", HERE.parent


def _serve(channel: socket.socket) -> None:
    _load_everything()
    while True:
        message, outputs, _, _ = socket.recv_fds(channel, 1 << 18, 2)
        if not message:
            return
        child = os.fork()
        if child == 0:
            channel.close()
            _be(json.loads(message), outputs)
        for output in outputs:
            os.close(output)
        channel.send(str(child).encode())
        _, status = os.waitpid(child, 0)
        channel.send(str(os.waitstatus_to_exitcode(status)).encode())


def _load_everything() -> None:
    """Also what is loaded only when it is needed; then no fork has to."""
    import casync_updater  # noqa: PLC0415

    for module in pkgutil.walk_packages(casync_updater.__path__, "casync_updater."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("configobj.validate", "debian.changelog", "debian.deb822", "requests", "tqdm"):
        importlib.import_module(name)


def _be(order: Mapping[str, Any], outputs: Sequence[int]) -> None:
    """Become a program, and end as it."""
    code = 1
    try:
        os.setsid()
        for number, output in enumerate(outputs, 1):
            os.dup2(output, number)
            os.close(output)
        os.environ.clear()
        os.environ.update(order["environment"])
        code = _run(order)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(order: Mapping[str, Any]) -> int:
    from campaigns import killer  # noqa: PLC0415
    from casync_updater.cli.main import main as client  # noqa: PLC0415
    from casync_updater.server.cli import main as publisher  # noqa: PLC0415

    if order["program"] == "publisher":
        return publisher(order["arguments"])
    killer.prepare(order["killer"])
    return client(order["arguments"])


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        _serve(inherited)

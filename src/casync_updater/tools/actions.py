"""Runs the commands of triggers, startup and health checks, and finds out how they ended.

What the folder of one action holds, ``ROOT/<id>/`` (0700)::

    command   the command, as it stands in the configuration; bash reads it
    run       exports, ``cd``, ``bash command``; notes the pid first and the result last
    handle    what `find` gives back after a restart of the updater
    lock      locked (flock) from the moment that a process was made of it: by the process that
              runs ``run``, or by systemd-run until systemd knows the unit
    pid       of the process that runs ``run``
    result    a line ``exit N``, ``signal N`` or ``timeout``; blank before. It is there from the
              beginning and written in place, since an action that ended while the disk is full
              would otherwise be taken for one that was cut off, and run twice.

A command is handed over as a file and never on a unit's command line, where systemd would
expand ``$`` and ``%``. The result is a file, so that it survives whoever waited for it: an
action may restart the updater, and its next start collects what the last one began.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from casync_updater.clock import Clock
from casync_updater.errors import BusyError, LocalError
from casync_updater.tools import process

_NO_RESULT = " " * 31 + "\n"
_COMMAND_LIMIT = 1 << 20
_LINE_LIMIT = 8 << 10
_START_LIMIT = 10.0
_TERM_GRACE = 5.0
_SILENCE = 0.2
_POLL = 0.02
_DRAIN_LIMIT = 2.0

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Log = Callable[[str, str], None]
"""Takes the entry's name and one line of an action's output."""


@dataclass(frozen=True, slots=True)
class Action:
    """One command that is to run. `timeout` is in seconds, None for as long as it likes."""

    id: str
    """Names the action for good; see `action_id`."""
    entry: str
    command: str
    directory: Path
    timeout: float | None
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Handle:
    """A started action, in plain values that a state file can keep."""

    id: str
    boot_id: str
    started: float
    """Monotonic seconds of that boot."""
    timeout: float | None
    unit: str | None = None
    """The transient unit it runs in, where systemd runs."""


@dataclass(frozen=True, slots=True)
class ActionResult:
    """How an action ended; where nothing is set, nobody knows (see `lost`)."""

    code: int | None = None
    """The exit code of bash; 128 and more is a signal that ended the command within."""
    signal: int | None = None
    timed_out: bool = False
    seconds: float = 0.0
    """From the start to the moment it was collected."""

    @property
    def ok(self) -> bool:
        """True where the command succeeded."""
        return self.code == 0

    @property
    def lost(self) -> bool:
        """True where it neither runs nor left a result: a reboot or a power cut came between."""
        return self.code is None and self.signal is None and not self.timed_out

    def __str__(self) -> str:
        if self.timed_out:
            return f"was ended after {self.seconds:.0f} seconds"
        if self.signal is not None:
            return f"was ended by signal {self.signal}"
        if self.code is not None:
            return "succeeded" if self.ok else f"failed with exit code {self.code}"
        return "was cut off"


class NotStartedError(LocalError):
    """Nothing of an action has run, through no fault of its own: the disk is full, say.

    The same may work later, so whoever promised the action keeps the promise.
    """


class ActionRunner(Protocol):
    """Starts actions, and collects how they ended, also those of an earlier process."""

    def start(self, action: Action) -> Handle:
        """Start it, in a session and process group apart from the updater's.

        Raises:
            BusyError: the action with this id still runs.
            NotStartedError: nothing can be started now.
            LocalError: the command or its directory cannot be used.
        """

    def find(self, action_id: str) -> Handle | None:
        """The handle of an action that was started and not yet forgotten."""

    def collect(self, handle: Handle, wait: float = 0.0) -> ActionResult | None:
        """How it ended; None where it still runs after `wait` seconds.

        May be asked again with the same answer until `forget`, so that a caller can save the
        result first.
        """

    def forget(self, action_id: str) -> None:
        """Remove what was kept of an action that has ended; also what a kill left of that.

        Raises:
            LocalError: it cannot be removed; it can be asked for again.
        """


def action_id(entry: str, *parts: str) -> str:
    """An id for `Action`: readable, safe as a file's and a unit's name, the same every time."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", entry).strip("-")[:40] or "entry"
    digest = hashlib.sha256(json.dumps([entry, *parts]).encode()).hexdigest()
    return f"{readable}-{digest[:16]}"


def action_runner(root: Path, clock: Clock, log: Log) -> ActionRunner:
    """The runner that fits this machine.

    Args:
        root: a folder for what runs; it must outlast a restart of the updater.
        clock: the time, and the boot's id.
        log: takes the output line by line; systemd's journal does where that runs.
    """
    # /run/systemd/system is what sd_booted(3) looks at; root reaches the private socket
    # without a bus.
    if Path("/run/systemd/system").is_dir() and os.access("/run/systemd/private", os.W_OK):
        return UnitRunner(root, clock)
    return ProcessRunner(root, clock, log)


class ProcessRunner:
    """Actions as child processes, each in a session of its own.

    `grace` is how many seconds a group that ran out of time has between SIGTERM and SIGKILL.
    """

    def __init__(self, root: Path, clock: Clock, log: Log, *, grace: float = _TERM_GRACE) -> None:
        self._root = root
        self._clock = clock
        self._log = log
        self._grace = grace
        self._own: dict[str, _Own] = {}

    def start(self, action: Action) -> Handle:
        """See `ActionRunner.start`."""
        if _is_locked(self._root / action.id):
            raise BusyError(f"{_called(action)} still runs")
        handle = Handle(action.id, self._clock.boot_id(), self._clock.monotonic(), action.timeout)
        folder = _prepare(self._root, action, handle)
        try:
            with _lock(folder) as lock:
                child = subprocess.Popen(
                    ["/bin/sh", str(folder / "run")],
                    stdin=lock,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    # SIGPIPE stays ignored, as systemd has it for services: what an action leaves
                    # running in the background is not killed by its first line after we left.
                    restore_signals=False,
                )
        except OSError as error:
            raise NotStartedError(f"an action cannot be started: {error.strerror}") from error
        self._own[action.id] = _Own(child, action.entry, self._log)
        _await_start(folder, self._clock, lambda: child.poll() is not None)
        return handle

    def find(self, action_id: str) -> Handle | None:
        """See `ActionRunner.find`."""
        return _read_handle(self._root / action_id)

    def collect(self, handle: Handle, wait: float = 0.0) -> ActionResult | None:
        """See `ActionRunner.collect`."""
        folder = self._root / handle.id
        own = self._own.get(handle.id)
        end = self._clock.monotonic() + wait
        limit = math.inf
        if handle.timeout is not None and handle.boot_id == self._clock.boot_id():
            limit = handle.started + handle.timeout
        if own is None and not _await_pid(folder, self._clock, end):
            return None
        with _pidfd(folder, own) as pidfd:
            while pidfd is not None:
                now = self._clock.monotonic()
                if _wait(pidfd, min(end, limit) - now, own):
                    break
                now = self._clock.monotonic()
                if now >= limit:
                    self._end_group(folder, own)
                    _save(folder, "timeout")
                    break
                if now >= end:
                    return None
        if own is not None:
            own.close(self._clock)
        seconds = _seconds(handle, self._clock)
        saved = _saved(folder, seconds)
        if saved is None and own is not None:
            code = own.child.wait()
            _save(folder, f"signal {-code}" if code < 0 else f"exit {code}")
            saved = _saved(folder, seconds)
        return saved or ActionResult(seconds=seconds)

    def forget(self, action_id: str) -> None:
        """See `ActionRunner.forget`."""
        self._own.pop(action_id, None)
        _remove(self._root / action_id)

    def _end_group(self, folder: Path, own: "_Own | None") -> None:
        group = int((folder / "pid").read_text()) if own is None else own.child.pid
        for number, grace in ((signal.SIGTERM, self._grace), (signal.SIGKILL, 1.0)):
            end = self._clock.monotonic() + grace
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)
                while self._clock.monotonic() < end:
                    if own is not None:
                        own.child.poll()  # a zombie counts as a member of its group
                        own.read()
                    os.killpg(group, 0)
                    self._clock.sleep(0.05)


class UnitRunner:
    """Actions as transient systemd units.

    The wrapper in the unit always succeeds and ``RemainAfterExit`` holds the unit, so that its
    end kills nothing: what the action left in the background lives on in the unit's control
    group. ``RuntimeMaxSec`` counts until the main process has ended, and ends the whole group.
    A unit with processes left in it is stopped when they are gone, by a later start.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        self._root = root
        self._clock = clock
        # Another updater on this machine, with a state of its own, does not see these units.
        self._mark = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:6]

    def start(self, action: Action) -> Handle:
        """See `ActionRunner.start`."""
        known = self.find(action.id)
        if known is not None and self._shown(known).running:
            raise BusyError(f"{_called(action)} still runs")
        self._sweep()
        # The name is new each time: the last run's background may still be in its unit.
        unit = f"casync-updater-action-{action.id}-{self._mark}{os.urandom(3).hex()}.service"
        now = self._clock.monotonic()
        handle = Handle(action.id, self._clock.boot_id(), now, action.timeout, unit)
        folder = _prepare(self._root, action, handle)
        limit = "infinity" if action.timeout is None else f"{action.timeout:.3f}s"
        properties = [
            "Type=exec",
            "RemainAfterExit=yes",
            "KillMode=control-group",
            f"RuntimeMaxSec={limit}",
            f"TimeoutStopSec={_TERM_GRACE:g}s",
            "SyslogIdentifier=casync-updater",
            f"LogExtraFields=CASYNC_UPDATER_ENTRY={action.entry}",
        ]
        try:
            with _lock(folder) as lock:
                process.run(
                    [
                        "systemd-run",
                        "--quiet",
                        "--no-ask-password",
                        f"--unit={unit}",
                        f"--description=casync-updater: action of {action.entry}",
                        *(f"--property={setting}" for setting in properties),
                        "/bin/sh",
                        str(folder / "run").replace("$", "$$"),
                    ],
                    timeout=30.0,
                    keep_fds=(lock,),
                )
        except (LocalError, OSError) as error:
            raise NotStartedError(f"{_called(action)} cannot be started: {error}") from error
        return handle

    def find(self, action_id: str) -> Handle | None:
        """See `ActionRunner.find`."""
        return _read_handle(self._root / action_id)

    def collect(self, handle: Handle, wait: float = 0.0) -> ActionResult | None:
        """See `ActionRunner.collect`."""
        folder = self._root / handle.id
        saved = _saved(folder, _seconds(handle, self._clock))
        if saved is not None:
            return saved
        end = self._clock.monotonic() + wait
        while _is_locked(folder):
            # An updater that was killed has left a systemd-run that is on its way.
            if self._clock.monotonic() >= end:
                return None
            self._clock.sleep(_POLL)
        while (unit := self._shown(handle)).running:
            # Also while systemd has not noticed yet that the main process is gone, or still
            # ends the rest of a group that ran out of time.
            left = end - self._clock.monotonic()
            if left <= 0:
                return None
            if not self._wait_for(unit.main_pid, left):
                return None
        if unit.result == "timeout":
            _save(folder, "timeout")
        elif _saved(folder, 0.0) is None and unit.ending is not None:
            _save(folder, unit.ending)
        seconds = _seconds(handle, self._clock)
        return _saved(folder, seconds) or ActionResult(seconds=seconds)

    def forget(self, action_id: str) -> None:
        """See `ActionRunner.forget`."""
        _remove(self._root / action_id)
        self._sweep()

    def _wait_for(self, pid: int, seconds: float) -> bool:
        """Wait for the end of a main process, or of the time; of one that is gone, a moment."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            self._clock.sleep(min(0.1, seconds))
            return True
        try:
            return _wait(pidfd, seconds, None)
        finally:
            os.close(pidfd)

    def _sweep(self) -> None:
        """Stop the units that have ended, that nobody will ask about, and that are empty."""
        for unit in self._show(f"casync-updater-action-*-{self._mark}*.service"):
            action = unit.name.removeprefix("casync-updater-action-").rpartition("-")[0]
            known = _read_handle(self._root / action)
            if known is not None and known.unit == unit.name:
                continue
            if not unit.running and not _occupied(unit.group):
                verb = "reset-failed" if unit.failed else "stop"
                process.run(["systemctl", verb, unit.name], ok=range(256), timeout=30.0)

    def _shown(self, handle: Handle) -> "_Unit":
        return next(self._show(str(handle.unit)), _Unit({}))

    def _show(self, pattern: str) -> "Iterator[_Unit]":
        shown = process.run(
            ["systemctl", "show", "--all", f"--property={','.join(_Unit.WANTED)}", "--", pattern],
            timeout=30.0,
        )
        for block in shown.stdout.decode(errors="replace").split("\n\n"):
            if block.strip():
                yield _Unit(dict(line.split("=", 1) for line in block.splitlines() if "=" in line))


class _Unit:
    """What systemd says of a unit; nothing at all of one that is not loaded."""

    WANTED = (
        *("Id", "ActiveState", "SubState", "Result", "MainPID"),
        *("ExecMainCode", "ExecMainStatus", "ControlGroup"),
    )

    def __init__(self, properties: Mapping[str, str]) -> None:
        self.name = properties.get("Id", "")
        self.group = properties.get("ControlGroup", "")
        self.result = properties.get("Result", "")
        self.main_pid = int(properties.get("MainPID") or 0)
        state = properties.get("ActiveState")
        self.failed = state == "failed"
        busy = state in ("activating", "deactivating")
        self.running = busy or properties.get("SubState") == "running"
        status = properties.get("ExecMainStatus")
        kind = {"1": "exit", "2": "signal", "3": "signal"}.get(properties.get("ExecMainCode", ""))
        self.ending = None if kind is None else f"{kind} {status}"
        """How the main process ended, as the file ``result`` has it."""


class _Own:
    """A child process of this runner, and its output."""

    def __init__(self, child: subprocess.Popen[bytes], entry: str, log: Log) -> None:
        assert child.stdout is not None
        self.child = child
        self._pipe = child.stdout
        self._entry = entry
        self._log = log
        self._rest = b""
        os.set_blocking(self._pipe.fileno(), False)

    @property
    def fd(self) -> int | None:
        """What to wait on for output; None once there will be none."""
        return None if self._pipe.closed else self._pipe.fileno()

    def read(self) -> None:
        """Log the lines that are there."""
        while not self._pipe.closed:
            try:
                data = os.read(self._pipe.fileno(), 1 << 16)
            except BlockingIOError:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            if not data or len(self._rest) > _LINE_LIMIT:
                lines.append(self._rest)
                self._rest = b""
            for line in lines:
                if line:
                    self._log(self._entry, line.decode(errors="replace"))
            if not data:
                self._pipe.close()

    def close(self, clock: Clock) -> None:
        """Take the last output; what stays in the background may hold the pipe open for ever."""
        end = clock.monotonic() + _DRAIN_LIMIT
        self.read()
        while (fd := self.fd) is not None and clock.monotonic() < end:
            if not select.select([fd], [], [], _SILENCE)[0]:
                break
            self.read()
        if not self._pipe.closed:
            self._pipe.close()
            if self._rest:
                self._log(self._entry, self._rest.decode(errors="replace"))


def _called(action: Action) -> str:
    return f"{action.entry}: the action {action.command[:60]!r}"


def _prepare(root: Path, action: Action, handle: Handle) -> Path:
    """The action's folder, written anew."""
    if not _ID.fullmatch(action.id):
        raise ValueError(f"{action.id!r} is no action id")
    what = _called(action)
    if not action.directory.is_dir():
        raise LocalError(
            f"{what} cannot run: {action.directory} is no directory; see [actions] directory"
        )
    folder = root / action.id
    try:
        script = _script(action, folder)
        command = action.command.encode(errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise LocalError(f"{what} cannot run: it is not valid text") from error
    if b"\0" in command + script:
        raise LocalError(f"{what} cannot run: it contains a NUL character")
    if len(command) > _COMMAND_LIMIT:
        raise LocalError(f"{what} cannot run: it is longer than {_COMMAND_LIMIT} bytes")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        (folder / "command").write_bytes(command + b"\n")
        (folder / "run").write_bytes(script)
        (folder / "lock").touch()
        (folder / "result").write_text(_NO_RESULT)
        (folder / "handle").write_text(json.dumps(asdict(handle)))
    except OSError as error:
        raise NotStartedError(f"{what} cannot run: {folder}: {error.strerror}") from error
    return folder


def _script(action: Action, folder: Path) -> bytes:
    """The wrapper, for any POSIX shell."""
    for name in action.env:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a variable")
    here = shlex.quote(str(folder))
    lines = [
        f"echo $$ >{here}/pid.new && mv {here}/pid.new {here}/pid",
        *(f"export {name}={shlex.quote(value)}" for name, value in action.env.items()),
        f"cd -- {shlex.quote(str(action.directory))} && /bin/bash {here}/command </dev/null",
        "code=$?",
        # Where the result cannot be written all the same, the exit code is all there is.
        f'echo "exit $code" 1<>{here}/result && exit 0',
        "exit $code",
    ]
    return "\n".join(lines).encode(errors="surrogateescape") + b"\n"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """The lock of an action that is being started; whoever inherits it holds it from then on."""
    descriptor = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    try:
        with _lock(folder):
            return False
    except BlockingIOError:
        return True
    except OSError:  # it was never started
        return False


def _await_pid(folder: Path, clock: Clock, end: float) -> bool:
    """Whether an action has noted its pid, or has ended; False where it is still to be waited for.

    An updater that was killed may leave an action that has only just begun.
    """
    while not (folder / "pid").exists() and _is_locked(folder):
        if clock.monotonic() >= end:
            return False
        clock.sleep(_POLL)
    return True


def _await_start(folder: Path, clock: Clock, ended: Callable[[], bool]) -> None:
    """Wait until the wrapper has noted its pid, or is over already.

    Where it cannot note it (a full disk), it runs all the same.
    """
    end = clock.monotonic() + _START_LIMIT
    while not (folder / "pid").exists() and not ended() and clock.monotonic() < end:
        clock.sleep(0.005)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        # Its file name is relative to wherever rmtree was.
        raise LocalError(f"{folder} cannot be removed: {error.strerror}") from error


def _read_handle(folder: Path) -> Handle | None:
    try:
        return Handle(**json.loads((folder / "handle").read_text()))
    except (OSError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def _pidfd(folder: Path, own: "_Own | None") -> Iterator[int | None]:
    """The action's main process; None where it has ended.

    A child of this process needs no file to be found by; on a full disk, it has none. Of another
    one, the descriptor is opened before the command line is looked at, so a pid that was given to
    another process meanwhile is not taken for the action's.
    """
    if own is not None and own.child.poll() is not None:
        yield None
        return
    try:
        pid = int((folder / "pid").read_text()) if own is None else own.child.pid
        fd = os.pidfd_open(pid)
    except (OSError, ValueError):
        yield None
        return
    try:
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            arguments = []
        yield fd if own is not None or os.fsencode(folder / "run") in arguments else None
    finally:
        os.close(fd)


def _occupied(group: str) -> bool:
    """True where a process lives in a control group, or below it.

    The cgroup file systems tell, in the places that systemd mounts them at for each of its
    three hierarchies. /proc hides other processes from a service with ProtectProc=, and
    TasksCurrent needs a controller that a container may lack.
    """
    if not group:
        return False
    for mount in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"):
        for file in Path(mount + group).rglob("cgroup.procs"):
            try:
                if file.read_text().strip():
                    return True
            except FileNotFoundError:  # removed in the meantime
                continue
            except OSError:  # a threaded group, which has none without processes in it
                return True
    return False


def _wait(pidfd: int, seconds: float, own: _Own | None) -> bool:
    """Wait for the end of a process, or of the time; output is logged meanwhile."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if own is not None and own.fd is not None:
        poll.register(own.fd, select.POLLIN)
    limit = None if seconds > 1e6 else max(0, math.ceil(seconds * 1000))
    ready = {fd for fd, _ in poll.poll(limit)}
    if own is not None:
        own.read()
    return pidfd in ready


def _seconds(handle: Handle, clock: Clock) -> float:
    """Since the start; 0 where another boot's clock counted."""
    return clock.monotonic() - handle.started if handle.boot_id == clock.boot_id() else 0.0


def _save(folder: Path, text: str) -> None:
    """Note a result that the wrapper could not note itself."""
    with (
        contextlib.suppress(OSError),  # it then lasts as long as this process remembers it
        (folder / "result").open("r+") as file,
    ):
        file.write(text + "\n")


def _saved(folder: Path, seconds: float) -> ActionResult | None:
    try:
        line, _, _ = (folder / "result").read_text().partition("\n")
    except OSError:
        return None
    match line.split(" "):
        case ["timeout"]:
            return ActionResult(timed_out=True, seconds=seconds)
        case ["exit", number]:
            return ActionResult(code=int(number), seconds=seconds)
        case ["signal", number]:
            return ActionResult(signal=int(number), seconds=seconds)
    # Blank, or in the middle of being written.
    return None

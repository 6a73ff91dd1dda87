"""One probe of one host: resolve its name, ping its addresses, connect to its ports.

A probe is a forked child of the daemon that ends with its answer, for these reasons:

- getaddrinfo cannot be interrupted. In a thread, a resolver that hangs keeps asking a name
  server of the network that was left, and the next probe has to wait for it or pile up
  behind it. A process is killed.
- What it loads, it gives back: resolver plug-ins, icmplib (which, from version 3, imports
  asyncio: 10 MB), threads. The daemon keeps none of it.
- Forking the daemon's 13 MB and having an answer back takes 1.3 ms, a fresh interpreter with
  icmplib 30 ms, and on a Raspberry Pi ten times as much: too long for "at once".

Sockets of our own in the daemon's loop would still leave the resolver. Inside the child,
plain blocking calls in threads do: nobody has to end them, the process ends.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any, NoReturn, cast

from casync_updater.online.hosts import Host
from casync_updater.online.netlink import path_to

_STAGGER = 0.2
"""Seconds that the method which worked the last time is ahead of the other one."""

_FIRST_WAIT = 0.5
"""Seconds until a ping is repeated; then twice as long each time."""

_MARGIN = 0.1
"""Seconds after the limit in which what was tried may still say how it ended."""

_OVERDUE = 0.5
"""Seconds after the limit when a probe that has said nothing is ended."""

_PER_FAMILY = 3
"""Addresses that are tried: a content network names dozens, all behind the same uplink."""

_RESOLVER = "timeout:1 attempts:3"
"""resolv.conf(5): a query that got lost is repeated after one second, not after five."""

_ANSWER_LIMIT = 1 << 16


class Method(StrEnum):
    """How a host was found to be within reach."""

    ICMP = "icmp"
    TCP = "tcp"


class Finding(StrEnum):
    """What a probe found."""

    ANSWERED = "answered"
    SILENT = "does not answer"
    REFUSED = "refuses connections"
    NO_PATH = "no path"
    UNKNOWN_NAME = "unknown name"
    NO_NAME_SERVICE = "name service does not answer"
    NO_PERMISSION = "ICMP is not permitted"
    FAILED = "the probe itself failed"


class Icmp(StrEnum):
    """What ICMP this process is allowed."""

    RAW = "raw"
    UNPRIVILEGED = "unprivileged"
    NONE = "not permitted"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a probe.

    Attributes:
        finding: what it found.
        addresses: what the name stands for, where it could be resolved.
        address: the one that answered.
        method: how it answered.
        round_trip: how long that took, in seconds.
        icmp: what ICMP was allowed, None where none was tried.
    """

    finding: Finding
    addresses: tuple[str, ...] = ()
    address: str | None = None
    method: Method | None = None
    round_trip: float | None = None
    icmp: Icmp | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """What a probe is to find out.

    Attributes:
        host: whom to ask.
        methods: what to try, the one to try first in front.
        limit: seconds for everything.
        usable: True where the machine has an address that leads beyond its links; without
            one, a name that cannot be resolved is no fault of the name service.
    """

    host: Host
    methods: tuple[Method, ...]
    limit: float
    usable: bool


class RunningProbe:
    """A probe under way, as the daemon sees it: a descriptor to wait on, and an end.

    Raises:
        OSError: there is no process to be had.
    """

    def __init__(self, question: Question, now: float) -> None:
        self.kill_at: float | None = now + question.limit + _OVERDUE
        """When it has to be ended: the resolver hangs."""
        self._data = bytearray()
        self._fd, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # No signal may reach the child while it still has the daemon's handlers.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                self._pid = os.fork()
                if self._pid == 0:
                    _child(question, writing)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except OSError:
            os.close(self._fd)
            raise
        finally:
            os.close(writing)

    def fileno(self) -> int:
        """What to wait on."""
        return self._fd

    def kill(self) -> None:
        """End it; its descriptor becomes readable when it is gone, and only then it is."""
        self.kill_at = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def read(self) -> Outcome | None:
        """What came of it, None as long as it goes on. Must not be called after that."""
        try:
            while data := os.read(self._fd, _ANSWER_LIMIT):
                self._data += data
        except BlockingIOError:
            return None
        os.close(self._fd)
        # It has let go of the pipe, so it is ending: this does not wait.
        _, status = os.waitpid(self._pid, 0)
        return _outcome(bytes(self._data), crashed=os.waitstatus_to_exitcode(status) > 0)

    def close(self) -> None:
        """End it and wait until it is gone."""
        self.kill()
        os.close(self._fd)
        os.waitpid(self._pid, 0)


def ask(question: Question) -> Outcome:
    """Probe a host, here and now; returns when it answered or the limit is over.

    Only the resolver may take longer than that.
    """
    until = time.monotonic() + question.limit
    try:
        addresses = _resolve(question.host)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return Outcome(Finding.UNKNOWN_NAME)
        return Outcome(Finding.NO_NAME_SERVICE if question.usable else Finding.NO_PATH)
    except ValueError:  # a name that no name server can be asked about
        return Outcome(Finding.UNKNOWN_NAME)
    within_reach = tuple(address for address in addresses if path_to(address) is not None)
    if not within_reach:
        return Outcome(Finding.NO_PATH, addresses)
    return _Race(question, addresses, within_reach, until).run()


class _Race:
    """Every address by every method; the first answer wins."""

    def __init__(
        self,
        question: Question,
        addresses: tuple[str, ...],
        within_reach: tuple[str, ...],
        until: float,
    ) -> None:
        self._question = question
        self._addresses = addresses
        self._within_reach = within_reach
        self._until = until
        self._ends: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._pending = 0
        self._findings: set[Finding] = set()
        self._icmp: Icmp | None = None

    def run(self) -> Outcome:
        *others, last = self._question.methods
        for method in others:
            self._start(method)
            answer = self._answer(min(self._until, time.monotonic() + _STAGGER))
            if answer is not None:
                return answer
        self._start(last)
        return self._answer(self._until + _MARGIN) or self._failure()

    def _start(self, method: Method) -> None:
        for address in self._within_reach:
            if method is Method.ICMP:
                self._thread(partial(_ping, address, self._until))
            else:
                for port in self._question.host.ports:
                    self._thread(partial(_connect, address, port, self._until))

    def _thread(self, attempt: Callable[[], Outcome]) -> None:
        def run() -> None:
            try:
                self._ends.put(attempt())
            except Exception:
                self._ends.put(Outcome(Finding.FAILED))
                raise

        self._pending += 1
        threading.Thread(target=run, daemon=True).start()

    def _answer(self, until: float) -> Outcome | None:
        """The first answer, None when there is none by then, or can be none any more."""
        while self._pending:
            try:
                end = self._ends.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return None
            self._pending -= 1
            self._icmp = end.icmp or self._icmp
            if end.finding is Finding.ANSWERED:
                return Outcome(
                    end.finding,
                    self._addresses,
                    end.address,
                    end.method,
                    end.round_trip,
                    self._icmp,
                )
            self._findings.add(end.finding)
        return None

    def _failure(self) -> Outcome:
        finding = Finding.SILENT
        if not self._pending and self._findings == {Finding.NO_PERMISSION}:
            finding = Finding.NO_PERMISSION
        elif not self._pending and Finding.FAILED in self._findings:
            finding = Finding.FAILED
        elif Finding.REFUSED in self._findings:
            finding = Finding.REFUSED
        return Outcome(finding, self._addresses, icmp=self._icmp)


def _resolve(host: Host) -> tuple[str, ...]:
    """The addresses of a host, the system's preferred ones first, some of each family."""
    chosen: dict[str, socket.AddressFamily] = {}
    for family, _, _, _, where in socket.getaddrinfo(host.name, None, type=socket.SOCK_STREAM):
        # NI_NUMERICHOST keeps the interface of a link-local address: fe80::1%eth0.
        internet = cast("tuple[str, int]", where)  # or four, and never the other kinds there are
        address, _ = socket.getnameinfo(internet, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        if sum(known == family for known in chosen.values()) < _PER_FAMILY:
            chosen.setdefault(address, family)
    return tuple(chosen)


def _ping(address: str, until: float) -> Outcome:
    """Ping until there is an answer or time is up.

    icmplib's own time-outs are by the wall clock, which may be set any moment after a
    machine without a clock of its own got online; what counts here does not jump.
    """
    import icmplib  # noqa: PLC0415 - only a probe needs it

    opened = _icmp_socket(address)
    if opened is None:
        return Outcome(Finding.NO_PERMISSION, icmp=Icmp.NONE)
    with opened:
        icmp = Icmp.RAW if opened.is_privileged else Icmp.UNPRIVILEGED
        # icmplib's default is the process id, which on 64-bit machines may not fit 16 bits.
        identifier = int.from_bytes(os.urandom(2), "big")
        wait = _FIRST_WAIT
        for sequence in range(1 << 16):
            begin = time.monotonic()
            remaining = until - begin
            if remaining <= 0:
                break
            try:
                request = icmplib.ICMPRequest(address, identifier, sequence)
                opened.send(request)
                opened.receive(request, min(wait, remaining)).raise_for_status()
            except icmplib.ICMPLibError:
                # Nothing yet, or somebody on the way says that it cannot be reached. The way
                # may be found within the limit: an error that came at once is waited out.
                pause = min(begin + wait, until) - time.monotonic()
                time.sleep(max(0.0, pause))
                wait *= 2
                continue
            took = time.monotonic() - begin
            return Outcome(
                Finding.ANSWERED, address=address, method=Method.ICMP, round_trip=took, icmp=icmp
            )
        return Outcome(Finding.SILENT, icmp=icmp)


def _icmp_socket(address: str) -> Any:
    """A socket of icmplib, raw where that is allowed, else an unprivileged one, or None."""
    import icmplib  # noqa: PLC0415

    kind = icmplib.ICMPv6Socket if ":" in address else icmplib.ICMPv4Socket
    for privileged in (True, False):
        with contextlib.suppress(icmplib.ICMPSocketError):
            return kind(privileged=privileged)
    return None


def _connect(address: str, port: int, until: float) -> Outcome:
    """Connect until that succeeds or time is up; a host that refuses has said its word."""
    wait = _FIRST_WAIT
    while (remaining := until - time.monotonic()) > 0:
        begin = time.monotonic()
        try:
            socket.create_connection((address, port), timeout=remaining).close()
        except ConnectionRefusedError:
            return Outcome(Finding.REFUSED)
        except OSError:
            pause = min(begin + wait, until) - time.monotonic()
            time.sleep(max(0.0, pause))
            wait *= 2
            continue
        took = time.monotonic() - begin
        return Outcome(Finding.ANSWERED, address=address, method=Method.TCP, round_trip=took)
    return Outcome(Finding.SILENT)


def _child(question: Question, writing: int) -> NoReturn:
    """The forked process: asks, writes what it learns, and ends without looking back.

    Nothing of the daemon may be touched or held: its descriptors (locks among them) are
    closed, its signal handlers gone, its exit handlers not run. An alarm ends the child when
    the daemon is not there any more to do so.
    """
    try:
        os.closerange(3, writing)
        os.closerange(writing + 1, os.sysconf("SC_OPEN_MAX"))
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.setitimer(signal.ITIMER_REAL, question.limit + 1)
        os.set_blocking(writing, True)
        os.environ["RES_OPTIONS"] = f"{os.environ.get('RES_OPTIONS', '')} {_RESOLVER}".strip()
        os.write(writing, json.dumps(asdict(ask(question))).encode())
        os._exit(0)
    except BaseException:
        os._exit(1)


def _outcome(data: bytes, *, crashed: bool) -> Outcome:
    """What a probe wrote; one that had to be ended before it wrote was still resolving."""
    if crashed:
        return Outcome(Finding.FAILED)
    if not data:
        return Outcome(Finding.NO_NAME_SERVICE)
    found = json.loads(data)
    return Outcome(
        Finding(found["finding"]),
        tuple(found["addresses"]),
        found["address"],
        Method(found["method"]) if found["method"] else None,
        found["round_trip"],
        Icmp(found["icmp"]) if found["icmp"] else None,
    )

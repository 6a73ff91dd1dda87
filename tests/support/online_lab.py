"""A device and its update server with a cable between them: real daemon, real web server.

::

    with lab(tmp_path) as lab:
        lab.publish("1")
        with lab.daemon(FAR) as daemon:
            daemon.settled("1")
            lab.world.unplug()
"""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casync_updater.live import read_live
from support.client import Appliance, Site, environment
from support.netns import Pair, pair

PROMPT = {"min_age": 0.0, "splay": 0.0}
"""Settings for tests: nobody is spared, nothing is delayed."""

_STARTS = re.compile(r"tree: a cycle starts \((\w+)\)")
_ENDS = re.compile(r"tree: .* \((start|online|interval|operator|media)\)$")


def until(condition: Callable[[], object], what: str, timeout: float = 10.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s for {what}"
        time.sleep(0.02)


@dataclass(frozen=True)
class Line:
    """A line of the daemon's log, and when it was read."""

    at: float
    text: str


@dataclass
class Daemon:
    """``casync-updater run`` on the device."""

    lab: "Lab"
    appliance: Appliance
    process: "subprocess.Popen[str]"
    lines: list[Line] = field(default_factory=list)

    def read(self) -> None:
        """Collect the log until its end."""
        assert self.process.stderr is not None
        for text in self.process.stderr:
            self.lines.append(Line(time.monotonic(), text.rstrip()))

    @property
    def log(self) -> str:
        return "\n".join(line.text for line in self.lines)

    def cycles(self, since: float = 0.0) -> list[tuple[float, str]]:
        """When cycles started since a time, and why."""
        found = [(line.at, _STARTS.search(line.text)) for line in list(self.lines)]
        return [(at, match[1]) for at, match in found if match and at >= since]

    def reasons(self, since: float = 0.0) -> list[str]:
        return [reason for _, reason in self.cycles(since)]

    def ends(self, since: float = 0.0) -> list[Line]:
        """The results of cycles since a time."""
        lines = [line for line in list(self.lines) if line.at >= since]
        return [x for x in lines if _ENDS.search(x.text) and not _STARTS.search(x.text)]

    def live(self) -> dict[str, Any]:
        return read_live(self.appliance.state_dir)

    def host(self) -> dict[str, Any]:
        """What the daemon says of the only host."""
        hosts = (self.live().get("online") or {}).get("hosts") or [{"state": None}]
        (host,) = hosts
        return dict(host)

    def installed(self) -> str:
        file = self.appliance.destination / "version"
        return file.read_text() if file.exists() else ""

    def wait_for(self, version: str, timeout: float = 10.0) -> None:
        until(lambda: self.installed() == version, f"version {version}", timeout)

    def is_(self, state: str, timeout: float = 10.0) -> None:
        until(lambda: self.host()["state"] == state, f"the host to be {state}", timeout)

    def quiet(self, timeout: float = 10.0) -> None:
        """Wait until every cycle that began has ended."""
        until(lambda: len(self.ends()) == len(self.cycles()), "the end of cycles", timeout)

    def settled(self, version: str) -> None:
        """Wait until the start is over: its cycle, and the one of the host's first answer."""
        self.wait_for(version)
        until(lambda: self.reasons() == ["start", "online"], "the first two cycles")
        self.quiet()
        self.is_("online")

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Another command of the client on the device."""
        return subprocess.run(
            self.lab.world.device.argv(*map(str, self.appliance.command(*arguments))),
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@dataclass
class Lab:
    """Both namespaces, what is published, and the requests that came."""

    world: Pair
    folder: Path
    site: Site
    web: "subprocess.Popen[str]"

    def publish(self, version: str) -> None:
        self.site.write("version", version)
        self.site.publish()

    def requests(self, since: float = 0.0) -> list[float]:
        """When releases were asked for since a time: once in each cycle that gets through."""
        log = self.folder / "requests"
        found = [json.loads(line) for line in log.read_text().splitlines()]
        return [at for at, path in found if path.endswith(".release") and at >= since]

    def portal(self, *, on: bool) -> None:
        """Put a captive portal in place of the server."""
        assert self.web.stdin is not None
        assert self.web.stdout is not None
        self.web.stdin.write("portal\n" if on else "heal\n")
        self.web.stdin.flush()
        self.web.stdout.readline()

    def do(self, command: str) -> float:
        """``device …`` or ``far …``: arguments of ip(8) there; gives the time before."""
        who, _, arguments = command.partition(" ")
        now = time.monotonic()
        getattr(self.world, who).ip(arguments)
        return now

    @contextlib.contextmanager
    def daemon(
        self,
        host: str,
        *,
        prelude: str = "true",
        entry: dict[str, Any] | None = None,
        **settings: float | str,
    ) -> Iterator[Daemon]:
        """The daemon on the device; prelude is shell that runs in its mount namespace."""
        name = f"[{host}]" if ":" in host else host
        appliance = Appliance(self.folder / "device", f"http://{name}", **(entry or {}))
        online = {**PROMPT, **settings}
        appliance.settings("".join(["[online]\n", *(f"{k} = {v}\n" for k, v in online.items())]))
        command = [str(word) for word in appliance.command("-v", "run")]
        # Compiled once, as an installed package is: compiling takes a third of a cycle's start.
        compiled = {"PYTHONPYCACHEPREFIX": str(self.folder / "compiled")}
        compiled["PYTHONDONTWRITEBYTECODE"] = ""
        with subprocess.Popen(
            self.world.device.argv("sh", "-c", f'{prelude} && exec "$@"', "sh", *command),
            env=environment(compiled),
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            daemon = Daemon(self, appliance, process)
            reader = threading.Thread(target=daemon.read)
            reader.start()
            try:
                yield daemon
            except BaseException:
                print(*(f"{line.at:.2f} {line.text}" for line in daemon.lines), sep="\n",
                      file=sys.stderr)  # fmt: skip
                raise
            finally:
                process.terminate()
                try:
                    process.wait(20)
                finally:
                    process.kill()
                    reader.join()
            assert process.returncode == 0
            assert "Traceback" not in daemon.log


@contextlib.contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """A world with version 1 on its web server."""
    site = Site(folder / "publisher")
    log = folder / "requests"
    log.touch()
    with pair() as world, world.far.service("web", str(site.root), str(log)) as web:
        made = Lab(world, folder, site, web)
        made.publish("1")
        yield made

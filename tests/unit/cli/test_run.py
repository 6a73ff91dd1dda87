"""The real daemon with its real children, on a source that is not there."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import casync_updater
from casync_updater.live import read_live

SOURCES = Path(casync_updater.__file__).parents[1]


class Service:
    """``casync-updater run`` as a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.config = folder / "conf"
        self.config.mkdir()
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, *names: str, startup: tuple[str, ...] = ()) -> None:
        entries = [
            {
                "interval": 3600000,
                "srcIndex": f"/nonexistent/{name}.caidx",
                "srcStore": "/nonexistent/store",
                "dstPath": str(self.folder / name),
                "startup": list(startup),
            }
            for name in names
        ]
        (self.config / "entries.json").write_text(json.dumps(entries))

    def start(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "casync_updater",
                "--state-dir",
                str(self.state),
                "run",
                str(self.config),
            ],
            env={**os.environ, "PYTHONPATH": str(SOURCES)},
            stderr=self.log.open("ab"),
        )
        return self.process

    def idle(self) -> bool:
        entries = read_live(self.state).get("entries", {})
        return bool(entries) and all(
            entry["state"] == "idle" and entry["nextCheck"] for entry in entries.values()
        )


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    process = service.process
    if process is not None:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_life_of_the_service(service: Service) -> None:
    service.configure("a", startup=("echo started; exit 3",))
    process = service.start()
    until(service.idle)
    until(lambda: "failed with exit code 3" in service.log.read_text())
    status = Path(f"/proc/{process.pid}/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident is not None
    assert int(resident[1]) < 24_000

    service.configure("a", "b")
    process.send_signal(signal.SIGHUP)
    until(lambda: "b" in read_live(service.state).get("entries", {}) and service.idle())

    second = Service.start(service)
    assert second.wait(20) == 1
    service.process = process
    process.terminate()
    assert process.wait(20) == 0

    log = service.log.read_text()
    assert f"process {process.pid} is already the daemon of {service.state}" in log
    # What the command prints is in the log as well, or in the journal where systemd runs.
    assert log.count("a: running startup command") == 1
    assert "Traceback" not in log
    assert read_live(service.state) == {}


def test_children_end_with_the_daemon(service: Service) -> None:
    service.configure("a", startup=("sleep 600",))
    process = service.start()

    def children() -> list[str]:
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [pid for pid in found if b"startup" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    until(children)
    until(lambda: list(service.state.glob(".actions/*/pid")))
    (child,) = children()
    action = int(next(service.state.glob(".actions/*/pid")).read_text())
    try:
        process.kill()
        process.wait()
        until(lambda: not Path(f"/proc/{child}").exists())
        assert Path(f"/proc/{action}").exists(), "what was started lives on"

        service.start()
        until(lambda: "still runs since an earlier start" in service.log.read_text())
    finally:
        os.killpg(action, signal.SIGKILL)
    assert service.log.read_text().count("running startup command") == 1


def test_the_daemon_imports_nothing_that_only_a_cycle_needs() -> None:
    program = (
        "import sys, casync_updater.cli.run, casync_updater.cli.main;"
        "print([name for name in ('requests', 'debian', 'configobj', 'hashlib', 'ssl',"
        " 'zstandard', 'tqdm', 'casync_updater.cycle.session') if name in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert shown.stdout.strip() == "[]"

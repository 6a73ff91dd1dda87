"""What becomes of an upgrade, whatever happens to it: on a machine that keeps its own books."""

import contextlib
import http.server
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from casync_updater.tools.guard import (
    SERVICE,
    Guard,
    LockedError,
    Machine,
    Plan,
    Progress,
    _run,
    alive,
    arm,
    read_plan,
    read_progress,
)

NAMES = ("casync-updater", "python3-casync-updater")
PLAN = Plan(
    "2",
    "1",
    NAMES,
    True,
    100.0,
    ("https://updates.example/x.caidx.release",),
    (("proxy.example", (3128,)),),
    ("/media/x.caidx",),
)


class PowerCut(Exception):  # noqa: N818
    """The power is cut."""


class Bench:
    """A machine: packages, a service, a network, and a clock that only runs while somebody waits.

    Attributes:
        installs: what dpkg does with a version; nothing where it is not named.
        each: called with the seconds of uptime whenever somebody has waited.
    """

    def __init__(self) -> None:
        self.boot = "boot-1"
        self.now = 50.0
        self.installed = "1"
        self.active = "active"
        self.online = True
        self.in_use = False
        self.installs: dict[str, Callable[[], int]] = {}
        self.each: Callable[[float], None] = lambda now: None
        self.said: list[str] = []
        self.armed = True

    def boot_id(self) -> str:
        return self.boot

    def uptime(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 1e5, "it waits for ever"
        self.each(self.now)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        if self.in_use:
            raise LockedError
        yield

    def dpkg(self, *arguments: str) -> tuple[int, str]:
        self.said.append(" ".join(word for word in arguments if not word.startswith("--force")))
        folder = Path(arguments[-1]).parent
        if folder.name not in ("new", "old"):
            return 0, ""
        version = {"new": "2", "old": "1"}[folder.name]
        assert len([word for word in arguments if word.endswith(".deb")]) == len(NAMES)
        code = self.installs.get(version, lambda: 0)()
        if code == 0:
            self.installed, self.active = version, "active"
        return code, "dpkg's last words"

    def versions(self, packages: Sequence[str]) -> Mapping[str, str]:
        return dict.fromkeys(packages, self.installed)

    def service(self) -> str:
        return self.active

    def systemctl(self, *arguments: str) -> None:
        self.said.append(" ".join(arguments))
        if arguments == ("stop", SERVICE):
            self.active = "inactive"
        elif arguments[0] == "start":
            self.active = "active"

    def answers(self, url: str) -> bool:
        assert url in PLAN.urls
        return self.online

    def accepts(self, name: str, ports: Iterable[int]) -> bool:
        assert (name, ports) in PLAN.proxies
        return self.online

    def disarm(self) -> None:
        self.armed = False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepared(tmp_path / "self/upgrade", PLAN)


def prepared(folder: Path, plan: Plan) -> Path:
    for which in ("new", "old"):
        (folder / which).mkdir(parents=True)
        for name in NAMES:
            (folder / which / f"{name}.deb").touch()
    (folder / "plan.json").write_text(json.dumps(asdict(plan)))
    return folder


def guard(folder: Path, bench: Bench) -> Guard:
    plan = read_plan(folder)
    assert plan is not None
    return Guard(folder, plan, bench)


def says_it_is_alive(folder: Path, bench: Bench, after: float = 0.0) -> Callable[[float], None]:
    """A version that completes a check so many seconds after the boot."""

    def check(now: float) -> None:
        if now >= after:
            said = {"boot": bench.boot, "started": now}
            (folder / "alive.json").write_text(json.dumps(said))

    return check


def bad(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.parent.glob("bad/*")}


def assert_over(folder: Path, bench: Bench, version: str) -> None:
    assert bench.installed == version
    assert bench.active == "active"
    assert not bench.armed
    assert not folder.exists()
    assert not folder.with_name("over").exists()


def test_plans_are_read_as_they_were_written(folder: Path, tmp_path: Path) -> None:
    assert read_plan(folder) == PLAN
    for text in ("", "{", "[]", "{}", '{"version": "2"}'):
        (folder / "plan.json").write_text(text)
        assert read_plan(folder) is None
    assert read_plan(tmp_path / "nowhere") is None


def test_a_version_that_checks_stays(folder: Path) -> None:
    bench = Bench()
    bench.each = says_it_is_alive(folder, bench, 120.0)
    assert guard(folder, bench).run()
    assert_over(folder, bench, "2")
    assert bad(folder) == {}
    assert bench.said[0] == f"stop {SERVICE}", "the old version's last cycle would count"


def test_a_process_of_the_version_before_counts_for_nothing(folder: Path) -> None:
    bench = Bench()

    def still_the_old_code(now: float) -> None:
        said = {"boot": bench.boot, "started": 49.9}
        (folder / "alive.json").write_text(json.dumps(said))

    bench.each = still_the_old_code
    still_the_old_code(0.0)
    assert guard(folder, bench).run()
    assert_over(folder, bench, "1")
    assert "no check within" in bad(folder)["2"]


def test_dpkg_fails(folder: Path) -> None:
    bench = Bench()
    bench.installs["2"] = lambda: 1
    assert guard(folder, bench).run()
    assert_over(folder, bench, "1")
    assert bad(folder) == {"2": "dpkg failed with exit code 1: dpkg's last words"}


def test_dpkg_says_nothing_and_does_nothing(folder: Path) -> None:
    bench = Bench()

    def nothing() -> int:
        bench.installed = "half"
        return 0

    bench.installs["2"] = nothing
    bench.dpkg = lambda *arguments: (  # type: ignore[method-assign]
        (0, "") if "new" in arguments[-1] else Bench.dpkg(bench, *arguments)
    )
    assert guard(folder, bench).run()
    assert_over(folder, bench, "1")


def test_the_service_fails(folder: Path) -> None:
    bench = Bench()

    def crashes(now: float) -> None:
        if bench.installed == "2":
            bench.active = "failed"

    bench.each = crashes
    assert guard(folder, bench).run()
    assert_over(folder, bench, "1")
    assert bad(folder) == {"2": "its service failed"}
    assert bench.now < 70


def test_only_seconds_of_connectivity_count(folder: Path) -> None:
    bench = Bench()
    bench.online = False

    def back_after_a_day(now: float) -> None:
        bench.online = now > 86400

    bench.each = back_after_a_day
    assert guard(folder, bench).run()
    assert_over(folder, bench, "1")
    assert 86400 + 100 <= bench.now < 86400 + 120
    assert "within 100 seconds of connectivity" in bad(folder)["2"]


def test_a_drive_is_connectivity(tmp_path: Path) -> None:
    drive = tmp_path / "x.caidx"
    folder = prepared(tmp_path / "self/upgrade", replace(PLAN, paths=(str(drive),)))
    bench = Bench()
    bench.online = False
    bench.each = lambda now: drive.touch() if now > 5000 else None
    assert guard(folder, bench).run()
    assert 5100 <= bench.now < 5120
    assert_over(folder, bench, "1")


def test_what_was_counted_survives_a_reboot(folder: Path) -> None:
    bench = Bench()

    def power(now: float) -> None:
        if now > 120 and bench.boot == "boot-1":
            raise PowerCut

    bench.each = power
    with pytest.raises(PowerCut):
        guard(folder, bench).run()
    counted = read_progress(folder).counted
    assert 50 <= counted <= 80
    bench.boot, bench.now = "boot-2", 5.0
    assert guard(folder, bench).run()
    assert_over(folder, bench, "1")
    assert bench.now <= 5 + 100 - counted + 10


def test_a_check_after_a_reboot_counts(folder: Path) -> None:
    bench = Bench()

    def power(now: float) -> None:
        raise PowerCut

    bench.each = power
    with pytest.raises(PowerCut):
        guard(folder, bench).run()
    bench.boot, bench.now = "boot-2", 1.0
    bench.each = says_it_is_alive(folder, bench, 10.0)
    assert guard(folder, bench).run()
    assert_over(folder, bench, "2")


def test_power_cuts_in_the_middle_of_dpkg(folder: Path) -> None:
    bench = Bench()
    cuts = [1, 2]

    def cut() -> int:
        if cuts:
            cuts.pop()
            bench.installed = "half"
            raise PowerCut
        return 0

    bench.installs["2"] = cut
    for _ in range(2):
        with pytest.raises(PowerCut):
            guard(folder, bench).run()
    bench.each = says_it_is_alive(folder, bench)
    assert guard(folder, bench).run()
    assert_over(folder, bench, "2")
    assert bench.said.count("--configure --pending") == 2


def test_a_version_that_takes_the_machine_down_each_time(folder: Path) -> None:
    bench = Bench()

    def cut() -> int:
        raise PowerCut

    bench.installs["2"] = cut
    for _ in range(3):
        with pytest.raises(PowerCut):
            guard(folder, bench).run()
    assert guard(folder, bench).run()
    assert_over(folder, bench, "1")
    assert bad(folder) == {"2": "its installation was cut off 3 times"}


def test_power_cuts_on_the_way_back(folder: Path) -> None:
    bench = Bench()
    cuts = [1, 2, 3, 4]

    def cut() -> int:
        if cuts:
            cuts.pop()
            bench.installed = "half"
            raise PowerCut
        return 0

    bench.installs["1"] = cut
    bench.installs["2"] = lambda: 1
    for _ in range(4):
        with pytest.raises(PowerCut):
            guard(folder, bench).run()
    assert guard(folder, bench).run()
    assert_over(folder, bench, "1")
    assert list(bad(folder)) == ["2"]


def test_the_way_back_is_tried_until_it_works(folder: Path) -> None:
    bench = Bench()
    bench.installs["1"] = bench.installs["2"] = lambda: 2
    for _ in range(3):
        assert not guard(folder, bench).run()
        assert bench.armed
        assert bench.active == "active", "whatever is there is better than nothing"
    del bench.installs["1"]
    assert guard(folder, bench).run()
    assert_over(folder, bench, "1")


def test_dpkg_is_in_use_by_others(folder: Path) -> None:
    """Nothing was touched yet: no version is blamed, and the next cycle prepares it again."""
    bench = Bench()
    bench.in_use = True
    assert guard(folder, bench).run()
    assert_over(folder, bench, "1")
    assert bad(folder) == {}
    assert f"stop {SERVICE}" not in bench.said


def test_somebody_else_installs_another_version(folder: Path) -> None:
    bench = Bench()

    def apt(now: float) -> None:
        bench.installed = "3"

    bench.each = apt
    assert guard(folder, bench).run()
    assert_over(folder, bench, "3")
    assert bad(folder) == {}


def test_a_service_that_somebody_had_stopped(tmp_path: Path) -> None:
    """Where it did not run before, only the seconds in which it runs count."""
    folder = prepared(tmp_path / "self/upgrade", replace(PLAN, active=False))
    bench = Bench()

    def state(now: float) -> None:
        if bench.installed == "2":
            bench.active = "active" if now > 1000 else "inactive"

    bench.each = state
    assert guard(folder, bench).run()
    assert 1090 <= bench.now <= 1110
    assert bench.installed == "1"


def test_the_unit(folder: Path, tmp_path: Path) -> None:
    """Paths may hold whatever systemd would read something into."""
    units = tmp_path / "systemd"
    units.mkdir()
    strange = folder.rename(tmp_path / '100% "$HOME"')
    # No systemd looks there, so none can start it.
    with pytest.raises(OSError, match=r"systemctl|No such file"):
        arm(strange, units)
    unit = units / "casync-updater-guard.service"
    word = f'"{tmp_path}/100%% \\"$$HOME\\"'
    text = unit.read_text()
    assert f'ExecStart=/usr/bin/python3 -I {word}/guard.py" {word}"\n' in text
    assert f'ConditionPathExists={tmp_path}/100%% "$HOME"/plan.json\n' in text
    assert (units / "multi-user.target.wants" / unit.name).readlink() == unit
    (strange / "plan.json").unlink()
    with contextlib.suppress(OSError):  # where no systemd runs, none can be told
        arm(strange, units)
    assert [path.name for path in units.rglob("*")] == ["multi-user.target.wants"]
    arm(strange, units)


def test_a_process_says_when_it_began(folder: Path) -> None:
    alive(folder, "boot-7")
    said = json.loads((folder / "alive.json").read_text())
    assert said["boot"] == "boot-7"
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert 0 < said["started"] <= now
    (folder / "plan.json").unlink()
    (folder / "alive.json").unlink()
    alive(folder, "boot-7")
    assert not (folder / "alive.json").exists(), "there is no upgrade"


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        (
            "echo Setting up x; echo 'dpkg: error processing x:'; echo '  status 7'; exit 1",
            1,
            "dpkg: error processing x: status 7",
        ),
        ("echo one; echo two; exit 2", 2, "two"),
        ("true", 0, ""),
    ],
)
def test_what_a_program_says(script: str, code: int, reason: str) -> None:
    assert _run("sh", "-c", script, limit=60) == (code, reason)


def test_programs_that_do_not_end() -> None:
    """One that hangs is ended; what it leaves in the background keeps nobody waiting."""
    assert _run("sleep", "600", limit=0.2) == (-9, "it was ended after 0.2 seconds")
    code, process = _run("sh", "-c", "sleep 600 & echo $!; exit 3", limit=60)
    os.kill(int(process), signal.SIGKILL)
    assert code == 3


def test_a_proxy_has_to_accept_a_connection() -> None:
    machine = Machine()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert machine.accepts("127.0.0.1", (1, port))
    assert not machine.accepts("127.0.0.1", (port,))
    assert not machine.accepts("name.invalid", (1,))
    assert not machine.accepts("\0", (1,))


@pytest.mark.parametrize(
    ("status", "expected"), [(200, True), (401, True), (404, True), (500, False), (503, False)]
)
def test_a_web_server_has_to_answer_with_more_than_its_own_failure(
    status: int, expected: bool
) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert Machine().answers(f"http://127.0.0.1:{server.server_port}/x") is expected
        thread.join()


def test_what_is_no_web_server_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def nonsense() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0\r\n")

        thread = threading.Thread(target=nonsense)
        thread.start()
        assert not Machine().answers(f"http://127.0.0.1:{port}/x")
        thread.join()
    for url in (f"http://127.0.0.1:{port}/x", "http://name.invalid/", "http://a b/", "no:url"):
        assert not Machine().answers(url)


def test_a_plan_of_another_version_is_read_as_far_as_it_is_known(folder: Path) -> None:
    """The version on trial reads the plan that the one before has written."""
    document = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**document, "later": [1]}))
    assert read_plan(folder) == PLAN
    del document["urls"], document["proxies"]
    (folder / "plan.json").write_text(json.dumps(document))
    assert read_plan(folder) == replace(PLAN, urls=(), proxies=())
    (folder / "progress.json").write_text('{"phase": "trial", "counted": 5, "later": 1}')
    assert read_progress(folder).counted == 5
    (folder / "progress.json").write_text("[]")
    assert read_progress(folder) == Progress()

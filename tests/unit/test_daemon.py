import fcntl
import json
import logging
import os
import select
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from casync_updater.clock import SystemClock
from casync_updater.config.configuration import Configuration
from casync_updater.daemon import Daemon, Watcher
from casync_updater.errors import BusyError, LocalError
from casync_updater.live import read_live
from casync_updater.model import DaemonSettings, Entry, Location, OnlineSettings, Settings
from casync_updater.scheduler import CameOnline, Event, MediaAppeared
from casync_updater.tools.notify import Notifier

FAKE = Path(__file__).parent.parent / "support" / "fake_updater.sh"
PATIENCE = 15.0


def an_entry(name: str, interval: float = 3600.0, startup: tuple[str, ...] = ()) -> Entry:
    location = Location(f"http://host/{name}.caidx", "http://host/store")
    return Entry(name, name, interval, location, None, Path("/srv") / name, startup=startup)


class HandWatcher:
    """A watcher that a test speaks through."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK)
        self.events: list[Event] = []
        self.broken = False
        self.ended: list[tuple[str, bool]] = []
        self.offline: set[str] = set()
        self.configured = 0
        self.closed = False
        self.calls = 0

    def say(self, *events: Event) -> None:
        self.events += events
        os.write(self.writer, b"x")

    def fileno(self) -> int:
        return self.reader

    def deadline(self) -> float | None:
        return None

    def handle(self) -> Sequence[Event]:
        self.calls += 1
        if self.broken:
            raise LocalError("the kernel says nothing")
        while select.select([self.reader], [], [], 0)[0]:
            os.read(self.reader, 100)
        said, self.events = self.events, []
        return said

    def configure(self, configuration: Configuration) -> None:
        self.configured += 1

    def cycle_ended(self, name: str, *, reached: bool) -> None:
        self.ended.append((name, reached))

    def believed_offline(self, name: str) -> bool:
        return name in self.offline

    def report(self) -> Any:
        return [{"host": "h", "ports": (1, 2)}]

    def close(self) -> None:
        self.closed = True
        os.close(self.reader)
        os.close(self.writer)


class Service:
    """A daemon in a thread, with a fake program for its children."""

    def __init__(self, folder: Path, *entries: Entry) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.live = folder / "live.json"
        self.notes: list[str] = []
        self.settings = Settings(
            online=OnlineSettings(min_age=0.0, splay=0.0),
            daemon=DaemonSettings(stall_timeout=PATIENCE),
        )
        self.configuration = Configuration(entries, self.settings)
        self.watcher = HandWatcher()
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK)
        self.watchdog: float | None = None
        self.sightless = False
        self.result: int | BaseException | None = None
        self.loads = 0
        (folder / "calls").touch()
        self.thread = threading.Thread(target=self._run)

    def behave(self, call: str, script: str) -> None:
        (self.folder / f"{call}.sh").write_text(script)

    def stall_after(self, seconds: float) -> None:
        settings = replace(self.settings, daemon=DaemonSettings(stall_timeout=seconds))
        self.configuration = replace(self.configuration, settings=settings)

    def start(self) -> "Service":
        self.thread.start()
        return self

    def _load(self) -> Configuration:
        self.loads += 1
        return self.configuration

    def _watch(self, configuration: Configuration) -> Watcher:
        if self.sightless:
            raise LocalError("no netlink here")
        self.notes.append("WATCHING")
        return self.watcher

    def _run(self) -> None:
        daemon = Daemon(
            program=["/bin/bash", str(FAKE), str(self.folder)],
            load=self._load,
            watch=self._watch,
            state_dir=self.state,
            live=self.live,
            signals=self.reader,
            notifier=Notifier(self.notes.append, self.watchdog),
            clock=SystemClock(),
            draw=lambda limit: limit,
            grace=0.5,
        )
        try:
            self.result = daemon.run()
        except BaseException as error:
            self.result = error

    def signal(self, number: signal.Signals) -> None:
        os.write(self.writer, bytes([number]))

    def stop(self) -> None:
        if self.thread.is_alive():
            self.signal(signal.SIGTERM)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()

    def calls(self) -> list[str]:
        return [line.strip() for line in (self.folder / "calls").read_text().splitlines()]

    def called(self, call: str) -> int:
        return sum(line.startswith(call) for line in self.calls())

    def status(self) -> list[str]:
        return [note.removeprefix("STATUS=") for note in self.notes if note.startswith("STATUS=")]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@pytest.fixture
def service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Service]:
    caplog.set_level("INFO")
    service = Service(tmp_path, an_entry("a"))
    yield service
    if service.thread.ident is not None:
        service.stop()
    os.close(service.reader)
    os.close(service.writer)


def test_recovery_then_ready_then_a_cycle_of_each_entry(service: Service) -> None:
    service.configuration = Configuration((an_entry("a"), an_entry("b")), service.settings)
    service.behave("recover-", f"until test -e {service.folder}/go; do sleep 0.02; done")
    service.start()
    until(lambda: service.called("recover"))
    time.sleep(0.1)
    assert "READY=1" not in service.notes
    (service.folder / "go").touch()
    until(lambda: service.called("end update a") and service.called("end update b"))
    assert service.notes.index("READY=1") < service.notes.index("WATCHING")
    assert service.calls()[:2] == ["recover", "end recover"]
    assert service.called("update a start") == service.called("update b start") == 1
    service.stop()
    assert service.result == 0
    assert service.notes.count("READY=1") == 1
    assert "STOPPING=1" in service.notes
    assert service.watcher.closed


def test_a_failed_recovery_holds_up_nobody(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.behave("recover-", "kill -SEGV $$")
    service.start()
    until(lambda: service.called("end update a"))
    assert "recover: its process was ended by signal 11" in caplog.text


def test_cycles_come_by_their_interval(service: Service) -> None:
    service.configuration = Configuration((an_entry("a", 0.2),), service.settings)
    service.start()
    until(lambda: service.called("update a interval") >= 3)


def test_an_entry_that_hangs_or_crashes_holds_up_no_other(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    entries = (an_entry("a", 0.2), an_entry("hangs", 0.2), an_entry("crashes", 0.2))
    service.configuration = Configuration(entries, service.settings)
    service.behave("update-hangs", "sleep 60 & wait")
    service.behave("update-crashes", 'report \'{"step": "bui\'; kill -SEGV $$')
    service.start()
    until(lambda: service.called("update a") >= 4 and service.called("update crashes") >= 3)
    assert service.called("update hangs") == 1
    assert "crashes: its process was ended by signal 11 without a result" in caplog.text
    assert "1 lines that are no reports" in caplog.text


def test_a_child_that_says_nothing_is_ended(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    entries = (an_entry("mute", 3600), an_entry("deaf", 3600), an_entry("busy", 3600))
    service.configuration = Configuration(entries, service.settings)
    service.stall_after(0.4)
    service.behave("update-mute", "sleep 60 & wait")
    service.behave("update-deaf", "trap '' TERM; while :; do sleep 0.1; done")
    service.behave(
        "update-busy",
        'for i in {1..10}; do report \'{"done": 1, "total": null}\'; sleep 0.15; done;'
        " result current",
    )
    service.start()
    until(lambda: "deaf: its process does not end and is killed" in caplog.text)
    until(lambda: service.called("end update busy"))
    assert "mute: its process has said nothing" in caplog.text
    assert "mute: its process does not end" not in caplog.text
    assert "busy: its process" not in caplog.text
    until(lambda: "deaf: its process was ended by signal 9 without a result" in caplog.text)


def test_who_finishes_after_being_told_is_not_killed(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.stall_after(0.3)
    service.behave(
        "update-a",
        "trap 'told=1' TERM; until [[ ${told-} ]]; do sleep 0.05; done;"
        " for i in {1..10}; do report '{\"done\": 1}'; sleep 0.1; done; result stopped",
    )
    service.start()
    until(lambda: "a: stopped" in caplog.text)
    assert "killed" not in caplog.text


STARTUP_CASES = {
    "success": "result current",
    "failure": "result failed",
    "offline": "result unreachable",
    "no result": "exit 3",
    "crash": "kill -SEGV $$",
    "killed for saying nothing": "sleep 60 & wait",
}


@pytest.mark.parametrize("script", STARTUP_CASES.values(), ids=STARTUP_CASES.keys())
def test_startup_runs_once_after_the_first_cycle(service: Service, script: str) -> None:
    service.configuration = Configuration((an_entry("a", 0.3, ("x", "y")),), service.settings)
    service.stall_after(0.3)
    service.behave("update-a", script)
    service.start()
    until(lambda: service.called("update a") >= 3)
    assert service.called("startup a") == 1
    first, rest = service.calls().index("update a start"), service.calls()
    assert next(n for n, line in enumerate(rest) if line.startswith("startup a")) > first


def test_startup_leaves_out_what_ran_as_a_trigger(service: Service) -> None:
    both, one = an_entry("both", 3600, ("x", "y")), an_entry("one", 3600, ("x",))
    service.configuration = Configuration((both, one), service.settings)
    service.behave("startup-both", 'cat >"$folder/skipped"; echo >>"$folder/skipped"')
    for name in ("both", "one"):
        service.behave(f"update-{name}", 'result updated \'"x", "z\\u00df"\'')
    service.start()
    skipped = service.folder / "skipped"
    until(lambda: service.called("end startup both"))
    assert json.loads(skipped.read_text()) == ["x", "zß"]
    assert service.called("startup one") == 0


def test_startup_may_take_for_ever_and_ends_with_the_service(service: Service) -> None:
    service.configuration = Configuration((an_entry("a", 3600, ("x",)),), service.settings)
    service.stall_after(0.2)
    service.behave("startup-a", "sleep 60 & wait")
    service.start()
    until(lambda: service.called("startup a"))
    time.sleep(0.6)
    assert service.called("end startup a") == 0
    service.stop()
    assert service.result == 0


def test_reload_takes_up_new_entries_and_leaves_the_others(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.start()
    until(lambda: service.called("end update a"))
    service.configuration = Configuration(
        (an_entry("a"), an_entry("b")), service.settings, ("file: c: dstPath: is missing",)
    )
    service.signal(signal.SIGHUP)
    until(lambda: service.called("end update b"))
    assert service.called("update a") == 1
    assert "file: c: dstPath: is missing" in caplog.text
    reloading = next(n for n, note in enumerate(service.notes) if note.startswith("RELOADING=1"))
    assert "\nMONOTONIC_USEC=" in service.notes[reloading]
    assert "READY=1" in service.notes[reloading:]
    assert service.watcher.configured == 1


def test_no_entry_at_all_waits_for_one(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.configuration = Configuration((), service.settings)
    service.start()
    until(lambda: "READY=1" in service.notes)
    until(lambda: "no entries" in service.status())
    assert service.calls() == []
    assert caplog.text.count("there is no entry") == 1
    service.configuration = Configuration((an_entry("a"),), service.settings)
    service.signal(signal.SIGHUP)
    until(lambda: service.called("end update a"))


def test_the_end_waits_for_what_must_not_be_cut(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.behave(
        "update-a",
        'trap \'told=1\' TERM; report \'{"step": "commit", "version": "2"}\';'
        " until [[ ${told-} ]]; do sleep 0.02; done; sleep 0.6; touch $folder/done; result stopped",
    )
    service.start()
    until(lambda: service.called("update a"))
    until(lambda: "a: installing 2" in service.status())
    service.signal(signal.SIGTERM)
    service.signal(signal.SIGINT)
    service.thread.join(PATIENCE)
    assert (service.folder / "done").exists()
    assert service.result == 0
    assert "still waiting for what must not be cut off" in caplog.text
    stopping = service.notes.index("STOPPING=1")
    assert any(note.startswith("EXTEND_TIMEOUT_USEC=") for note in service.notes[stopping:])
    assert service.called("startup") == 0


def test_who_is_stopped_before_it_began_has_not_failed(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """The signal may come before Python can take it as a request."""
    service.behave("update-a", "exec sleep 60")
    service.start()
    until(lambda: service.called("update a"))
    service.stop()
    assert "stopped before it began" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_stop_during_recovery_waits_for_it(service: Service) -> None:
    service.behave("recover-", "trap 'told=1' TERM; until [[ ${told-} ]]; do sleep 0.02; done")
    service.start()
    until(lambda: service.called("recover"))
    service.stop()
    assert service.result == 0
    assert service.called("update") == 0
    assert "READY=1" not in service.notes


def test_online_and_drives_start_cycles(service: Service) -> None:
    service.start()
    until(lambda: service.called("end update a"))
    service.watcher.say(CameOnline(("a",)))
    until(lambda: service.called("update a online") and service.called("end update a") == 2)
    service.watcher.say(MediaAppeared(("a",)))
    until(lambda: service.called("update a media"))


def test_the_watcher_and_the_cycles_know_of_each_other(service: Service) -> None:
    service.watcher.offline.add("a")
    service.behave("update-a", "result unreachable")
    service.start()
    until(lambda: service.called("update a start,offline") and service.watcher.ended)
    service.behave("update-a", "result current")
    service.watcher.offline.clear()
    service.watcher.say(CameOnline(("a",)))
    until(lambda: len(service.watcher.ended) == 2)
    assert "update a online" in service.calls()
    assert service.watcher.ended == [("a", False), ("a", True)]
    until(lambda: read_live(service.state)["entries"].get("a", {}).get("reason") == "online")


def test_what_is_switched_off_is_not_watched(service: Service) -> None:
    off = replace(service.settings, online=OnlineSettings(enabled=False))
    service.configuration = replace(service.configuration, settings=off)
    service.start()
    until(lambda: service.called("end update a"))
    assert "WATCHING" not in service.notes
    assert read_live(service.state)["online"] is None
    service.configuration = replace(service.configuration, settings=service.settings)
    service.signal(signal.SIGHUP)
    until(lambda: read_live(service.state).get("online"))
    service.configuration = replace(service.configuration, settings=off)
    service.signal(signal.SIGHUP)
    until(lambda: service.watcher.closed)
    until(lambda: read_live(service.state)["online"] is None)


def test_a_watcher_that_goes_blind_is_left_out(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.configuration = Configuration((an_entry("a", 0.2),), service.settings)
    service.watcher.broken = True
    service.start()
    until(lambda: service.called("update a") >= 3)
    assert service.watcher.closed
    assert caplog.text.count("the network is not watched any longer") == 1


def test_a_reload_tries_to_watch_again(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.sightless = True
    service.start()
    until(lambda: service.called("end update a"))
    assert "no netlink here" in caplog.text
    service.sightless = False
    service.watcher = HandWatcher()
    service.signal(signal.SIGHUP)
    until(lambda: "WATCHING" in service.notes)
    service.watcher.say(CameOnline(("a",)))
    until(lambda: service.called("update a online"))


def test_two_daemons_on_one_state_directory(service: Service, tmp_path: Path) -> None:
    service.start()
    until(lambda: service.called("update a"))
    (tmp_path / "second").mkdir()
    second = Service(tmp_path / "second", an_entry("a"))
    second.state, second.live = service.state, service.live
    second.start()
    second.thread.join(PATIENCE)
    assert isinstance(second.result, BusyError)
    assert f"process {os.getpid()} is already the daemon of {service.state}" in str(second.result)
    assert service.live.exists()
    service.stop()
    assert not service.live.exists()


def test_the_live_file_says_what_goes_on(service: Service) -> None:
    service.configuration = Configuration((an_entry("a"), an_entry("b")), service.settings)
    service.behave(
        "update-a",
        'report \'{"step": "build", "version": "1.4.2"}\'; report \'{"done": 3100000, "total":'
        " 9200000}'; sleep 60 & wait",
    )
    before = time.time()
    service.start()
    words = "a: fetching 1.4.2, 33 %, 3.1 of 9.2 MB"
    until(lambda: words in service.status())
    until(lambda: read_live(service.state).get("entries", {}).get("a", {}).get("progress"))
    live = read_live(service.state)
    assert live["pid"] == os.getpid()
    assert live["phase"] == "running"
    assert live["online"] == [{"host": "h", "ports": [1, 2]}]
    a, b = live["entries"]["a"], live["entries"]["b"]
    assert (a["state"], a["version"], a["reason"]) == ("build", "1.4.2", "start")
    assert a["progress"] == {"done": 3100000, "total": 9200000}
    assert before - 1 <= a["since"] <= time.time()
    assert a["nextCheck"] is None
    assert (b["state"], b["progress"]) == ("idle", None)
    assert before + 3590 < b["nextCheck"] < time.time() + 3601
    service.stop()
    assert read_live(service.state) == {}


def test_the_live_file_is_written_at_most_once_a_second(service: Service) -> None:
    service.behave(
        "update-a",
        'for i in {1..100}; do report "{\\"done\\": $i, \\"total\\": 100}"; sleep 0.01; done;'
        " result current",
    )
    service.start()
    until(lambda: service.called("end update a"))
    assert len(service.status()) <= 4


def test_an_idle_daemon_sleeps(service: Service) -> None:
    service.start()
    until(lambda: any(words.startswith("idle; next check at") for words in service.status()))
    time.sleep(0.2)
    calls = service.watcher.calls
    time.sleep(1.5)
    assert service.watcher.calls == calls


def test_watchdog_pings_come_from_the_loop(service: Service) -> None:
    service.watchdog = 0.2
    service.start()
    until(lambda: service.notes.count("WATCHDOG=1") >= 5)


def test_a_program_that_cannot_be_started_is_tried_again_by_interval(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.configuration = Configuration((an_entry("a", 0.2),), service.settings)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", "/nonexistent")
    service.start()
    until(lambda: caplog.text.count("a: setpriv is not installed") >= 2)
    monkeypatch.setenv("PATH", path)
    until(lambda: service.called("update a"))


def test_the_same_failure_is_said_once(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.configuration = Configuration((an_entry("a", 0.1),), service.settings)
    service.behave("update-a", "result unreachable")
    service.start()
    until(lambda: service.called("update a") >= 4)
    warnings = [r for r in caplog.records if r.levelname == "WARNING" and "a: unre" in r.message]
    assert len(warnings) == 1
    assert warnings[0].__dict__["CASYNC_UPDATER_ENTRY"] == "a"
    assert warnings[0].__dict__["CASYNC_UPDATER_REASON"] == "start"


def test_children_do_not_speak_to_the_service_manager(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    target = shlex.quote(str(service.folder / "environment"))
    service.behave("update-a", f"env >{target}; result current")
    service.start()
    until(lambda: service.called("end update a"))
    assert "NOTIFY_SOCKET" not in (service.folder / "environment").read_text()


def test_a_lock_that_nobody_holds_means_no_daemon(tmp_path: Path) -> None:
    assert read_live(tmp_path) == {}
    (tmp_path / "live").write_text('{"pid": 1}')
    lock = tmp_path / "daemon.lock"
    lock.write_text(json.dumps({"pid": 1, "live": str(tmp_path / "live")}))
    assert read_live(tmp_path) == {}
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read_live(tmp_path) == {"pid": 1}
        (tmp_path / "live").write_text("half a l")
        assert read_live(tmp_path) == {}

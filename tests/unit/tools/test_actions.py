import contextlib
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from casync_updater.clock import SystemClock
from casync_updater.errors import BusyError, LocalError
from casync_updater.tools.actions import (
    Action,
    ActionResult,
    Handle,
    ProcessRunner,
    action_id,
)


class OtherBoot(SystemClock):
    def boot_id(self) -> str:
        return "another"


class Bench:
    """A runner in a folder, with what it logged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "actions $HOME %n 'x"
        self.log: list[tuple[str, str]] = []
        self.runner = self.restarted()

    def restarted(self) -> ProcessRunner:
        return ProcessRunner(
            self.root, SystemClock(), lambda entry, line: self.log.append((entry, line)), grace=0.5
        )

    def action(self, command: str, timeout: float | None = 20.0, **env: str) -> Action:
        return Action("e-1", "e", command, self.folder, timeout, env)

    def run(self, command: str, timeout: float | None = 20.0, **env: str) -> ActionResult:
        handle = self.runner.start(self.action(command, timeout, **env))
        result = self.runner.collect(handle, math.inf)
        assert result is not None
        return result

    def lines(self) -> list[str]:
        return [line for _, line in self.log]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    return wait


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Path]:
    """A file for the pid of what an action leaves behind; it is ended with the test."""
    file = tmp_path / "left"
    yield file
    if file.exists() and (text := file.read_text().strip()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(text), signal.SIGKILL)


def alive(file: Path) -> bool:
    status = Path(f"/proc/{file.read_text().strip()}/stat")
    return status.exists() and ") Z " not in status.read_text()


def test_output_goes_to_the_log_line_by_line(bench: Bench) -> None:
    assert bench.run("echo one; echo two >&2; printf three").ok
    assert bench.log == [("e", "one"), ("e", "two"), ("e", "three")]


def test_bash_runs_it_in_the_directory_with_the_environment(bench: Bench) -> None:
    result = bench.run(
        '[[ $PWD == "$D" && $E == "it\'s \\$HOME %n\n2" ]] && read x; (( $? == 1 ))',
        D=str(bench.folder),
        E="it's $HOME %n\n2",
    )
    assert result.ok, bench.lines()


@pytest.mark.parametrize(
    ("command", "code"), [("exit 3", 3), ("if", 2), ("nosuchprogram", 127), ("kill -9 $$", 137)]
)
def test_the_exit_code_is_bashs(bench: Bench, command: str, code: int) -> None:
    result = bench.run(command)
    assert result.code == code
    assert not result.ok
    assert str(result) == f"failed with exit code {code}"


def test_a_command_with_lines_quotes_and_percents_arrives_as_it_is(bench: Bench) -> None:
    bench.run("cat <<'X'\n$HOME %n \"'\\n\nX")
    assert bench.lines() == ["$HOME %n \"'\\n"]


def test_collect_does_not_wait_longer_than_told(bench: Bench) -> None:
    handle = bench.runner.start(bench.action("sleep 30", timeout=None))
    begin = time.monotonic()
    assert bench.runner.collect(handle) is None
    assert bench.runner.collect(handle, 0.2) is None
    assert 0.2 <= time.monotonic() - begin < 5
    with pytest.raises(BusyError, match="still runs"):
        bench.runner.start(bench.action("true"))
    os.killpg(int((bench.root / "e-1" / "pid").read_text()), signal.SIGKILL)
    result = bench.runner.collect(handle, math.inf)
    assert result is not None
    assert result.signal == signal.SIGKILL
    assert bench.runner.collect(handle) == replace(result, seconds=pytest.approx(0, abs=10))


def test_a_time_out_ends_the_whole_group(bench: Bench, background: Path) -> None:
    result = bench.run(f"trap '' TERM; sleep 60 & echo $! >{background}; echo in; wait", 0.3)
    assert result.timed_out
    assert not result.ok
    assert not alive(background)
    assert bench.lines()[0] == "in"
    assert result.seconds < 15


def test_what_is_left_in_the_background_lives_on_and_hangs_nobody(
    bench: Bench, background: Path, wait_for: Callable[[Callable[[], bool]], None]
) -> None:
    written = bench.folder / "written"
    begin = time.monotonic()
    result = bench.run(
        f"(while sleep 0.3; do echo tick; date >{written}; done) & echo $! >{background}; echo up"
    )
    assert result.ok
    assert time.monotonic() - begin < 5
    assert bench.lines()[0] == "up"
    written.unlink(missing_ok=True)
    wait_for(written.exists)
    written.unlink()
    wait_for(written.exists)
    assert alive(background)


def test_a_restarted_updater_collects_what_the_last_one_began(bench: Bench) -> None:
    go = bench.folder / "go"
    handle = bench.runner.start(bench.action(f"until test -e {go}; do sleep 0.05; done; exit 7"))
    again = bench.restarted()
    assert again.find("e-1") == handle
    assert again.collect(handle) is None
    go.touch()
    result = again.collect(handle, 10)
    assert result is not None
    assert result.code == 7
    assert again.collect(handle) is not None
    again.forget(handle.id)
    assert again.find("e-1") is None
    assert not (bench.root / "e-1").exists()


def test_a_restarted_updater_keeps_the_time_limit(bench: Bench) -> None:
    handle = bench.runner.start(bench.action("sleep 60", timeout=0.5))
    result = bench.restarted().collect(handle, 10)
    assert result is not None
    assert result.timed_out


def test_what_neither_runs_nor_left_a_result_is_lost(bench: Bench) -> None:
    handle = bench.runner.start(bench.action("sleep 60"))
    os.killpg(int((bench.root / "e-1" / "pid").read_text()), signal.SIGKILL)
    again = bench.restarted()
    result = again.collect(handle, 5)
    assert result is not None
    assert result.lost
    bench.runner.collect(handle, 5)


def test_an_action_that_has_only_just_begun_is_neither_lost_nor_begun_again(bench: Bench) -> None:
    """Its updater was killed before the action has noted its pid."""
    handle = bench.runner.start(bench.action("sleep 0.5; exit 5"))
    (bench.root / "e-1" / "pid").unlink()
    again = bench.restarted()
    assert again.collect(handle) is None
    with pytest.raises(BusyError, match="still runs"):
        again.start(bench.action("true"))
    result = again.collect(handle, 10)
    assert result is not None
    assert result.code == 5


def test_a_full_disk_may_keep_an_action_from_noting_its_pid(bench: Bench) -> None:
    """It is waited for, heard and ended like any other."""
    handle = bench.runner.start(bench.action("seq 100000; exit 3"))
    (bench.root / "e-1" / "pid").unlink()
    result = bench.runner.collect(handle, math.inf)
    assert result is not None
    assert result.code == 3
    assert bench.lines()[-1] == "100000"
    handle = bench.runner.start(bench.action("sleep 60", timeout=0.3))
    (bench.root / "e-1" / "pid").unlink()
    result = bench.runner.collect(handle, math.inf)
    assert result is not None
    assert result.timed_out


def test_what_an_action_leaves_running_does_not_keep_it_running(bench: Bench) -> None:
    note = bench.folder / "note"
    assert bench.run(f"sleep 60 & echo $! > {note}").ok
    background = int(note.read_text())
    try:
        assert bench.restarted().start(bench.action("true"))
    finally:
        os.kill(background, signal.SIGKILL)


def test_a_result_takes_no_room_that_it_does_not_have(bench: Bench, tmp_path: Path) -> None:
    """On a disk that is full by then, it would be lost, and the action would run again."""
    note = tmp_path / "note"
    file = shlex.quote(str(bench.root / "e-1" / "result"))
    assert bench.run(f"stat -c '%i %s' {file} > {note}; exit 3").code == 3
    status = (bench.root / "e-1" / "result").stat()
    assert note.read_text().split() == [str(status.st_ino), str(status.st_size)]


@pytest.mark.parametrize("text", ["", " " * 31 + "\n", "exit 1" + " " * 25 + "\n", "exit"])
def test_half_a_result_is_none(bench: Bench, text: str) -> None:
    handle = bench.runner.start(bench.action("exit 12"))
    bench.runner.collect(handle, 10)
    (bench.root / "e-1" / "result").write_text(text)
    result = bench.restarted().collect(handle)
    assert result is not None
    assert result.lost


def test_after_a_reboot_only_the_file_counts(bench: Bench) -> None:
    handle = bench.runner.start(bench.action("exit 4"))
    bench.runner.collect(handle, 10)
    later = ProcessRunner(bench.root, OtherBoot(), lambda entry, line: None)
    result = later.collect(handle)
    assert result is not None
    assert result.code == 4
    (bench.root / "e-1" / "result").unlink()
    result = later.collect(handle)
    assert result is not None
    assert result.lost


def test_a_pid_that_belongs_to_somebody_else_now_is_not_the_action(bench: Bench) -> None:
    handle = bench.runner.start(bench.action("true"))
    bench.runner.collect(handle, 10)
    folder = bench.root / "e-1"
    (folder / "result").unlink()
    (folder / "pid").write_text(f"{os.getpid()}\n")
    result = bench.restarted().collect(handle, 1)
    assert result is not None
    assert result.lost


def test_the_same_id_runs_anew_once_it_has_ended(bench: Bench) -> None:
    assert bench.run("exit 1").code == 1
    assert bench.run("exit 2").code == 2


@pytest.mark.parametrize("command", ["a\0b", "x" * (2 << 20), "\ud800"])
def test_a_command_that_cannot_be_handed_over_is_a_local_error(bench: Bench, command: str) -> None:
    with pytest.raises(LocalError):
        bench.runner.start(bench.action(command))
    assert not (bench.root / "e-1").exists()


def test_a_long_command_runs(bench: Bench) -> None:
    assert bench.run("true " + "x" * (1 << 19)).ok


def test_a_directory_that_is_not_there_is_a_local_error(bench: Bench) -> None:
    action = replace(bench.action("true"), directory=bench.folder / "none")
    with pytest.raises(LocalError, match=r"none is no directory"):
        bench.runner.start(action)


def test_a_folder_that_cannot_be_written_is_a_local_error(bench: Bench) -> None:
    bench.root.write_text("a file stands there")
    with pytest.raises(LocalError, match="actions"):
        bench.runner.start(bench.action("true"))


@pytest.mark.parametrize("name", ["", "..", "a/b", ".x", "a b", "x" * 101])
def test_an_id_never_leaves_the_folder(bench: Bench, name: str) -> None:
    with pytest.raises(ValueError, match="action id"):
        bench.runner.start(replace(bench.action("true"), id=name))


def test_ids_are_readable_and_apart() -> None:
    assert action_id("web", "act", "1").startswith("web-")
    assert action_id("../../x y").startswith("x-y-")
    assert action_id("") != action_id(".")
    assert action_id("a", "b") == action_id("a", "b")
    assert action_id("a", "bc") != action_id("a", "b", "c")


def test_a_flood_of_output_without_lines_is_cut(bench: Bench) -> None:
    assert bench.run("head -c 3000000 /dev/zero | tr '\\0' x").ok
    assert sum(len(line) for line in bench.lines()) == 3_000_000
    assert max(len(line) for line in bench.lines()) < 100_000


def test_a_handle_is_plain_values(bench: Bench) -> None:
    handle = bench.runner.start(bench.action("true"))
    assert Handle(**{name: getattr(handle, name) for name in Handle.__slots__}) == handle
    bench.runner.collect(handle, 10)

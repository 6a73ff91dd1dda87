"""Other programs: whatever they do, they end, and it is said how."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from casync_updater.errors import LocalError
from casync_updater.tools import process
from casync_updater.tools.process import ProgramError, end_group, run, started, stream


def bash(script: str) -> list[str]:
    return ["bash", "-c", script]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.02)


def test_a_program_runs_to_its_end() -> None:
    result = run(bash("echo out; echo err >&2; exit 3"), ok=(0, 3), timeout=30)
    assert (result.code, result.stdout, result.stderr) == (3, b"out\n", "err\n")
    assert run(["cat"], timeout=30).stdout == b""


def test_arguments_stay_as_they_are() -> None:
    words = ["a b", "$HOME", "--", "*", "new\nline", "\udcff", "-x", ""]
    result = run(["printf", "%s\\0", *words], timeout=30)
    assert result.stdout == b"".join(os.fsencode(word) + b"\0" for word in words)


def test_the_end_of_a_short_program_is_noticed_at_once() -> None:
    begin = time.monotonic()
    for _ in range(5):
        run(["true"], timeout=30)
    assert time.monotonic() - begin < 2


def test_failures_say_how() -> None:
    with pytest.raises(ProgramError, match=r"^bash failed with exit code 5: it is broken$"):
        run(bash("echo it is broken >&2; exit 5"), timeout=30)
    with pytest.raises(ProgramError, match=r"^bash was ended by signal 9: it gave no reason$"):
        run(bash("kill -9 $$"), timeout=30)
    with pytest.raises(LocalError, match=r"^no-such-program is not installed$"):
        run(["no-such-program"], timeout=30)


def test_stderr_is_kept_up_to_its_end() -> None:
    script = "head -c 200000 /dev/zero | tr '\\0' x >&2; echo the reason >&2; exit 1"
    with pytest.raises(ProgramError) as caught:
        run(bash(script), timeout=30)
    assert caught.value.stderr.endswith("the reason\n")
    assert len(caught.value.stderr) == 64 << 10


def test_an_environment_of_its_own() -> None:
    path = os.environ["PATH"]
    result = run(["env"], timeout=30, env={"PATH": path, "ONLY": "this"})
    assert sorted(result.stdout.decode().splitlines()) == ["ONLY=this", f"PATH={path}"]


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    script = f"echo $$ >{tmp_path}/pid; sleep 100 & echo $! >{tmp_path}/inner; wait"
    with pytest.raises(ProgramError, match=r"was ended after 0\.5 seconds"):
        run(bash(script), timeout=0.5)
    assert_gone(int((tmp_path / "pid").read_text()))
    assert_gone(int((tmp_path / "inner").read_text()))


def test_a_program_that_closed_its_output_is_watched_as_well() -> None:
    with pytest.raises(ProgramError, match=r"was ended after 0\.7 seconds"):
        run(bash("exec >&- 2>&-; sleep 100"), timeout=0.7)
    with pytest.raises(ProgramError, match=r"no progress for 0\.7 seconds"):
        run(bash("exec >&- 2>&-; sleep 100"), stall=0.7)
    assert run(bash("exec >&- 2>&-; sleep 0.3; exit 4"), ok=(4,), timeout=30).code == 4


def test_what_a_program_leaves_running_is_ended_and_not_waited_for(tmp_path: Path) -> None:
    begin = time.monotonic()
    result = run(bash(f"sleep 100 & echo $! >{tmp_path}/inner; echo done"), timeout=60)
    assert result.stdout == b"done\n"
    assert time.monotonic() - begin < 10
    assert_gone(int((tmp_path / "inner").read_text()))


def test_a_program_without_progress_is_ended() -> None:
    with pytest.raises(ProgramError, match=r"no progress for 0\.7 seconds: last words"):
        run(bash("echo last words >&2; sleep 100"), stall=0.7)


def test_what_a_program_reads_and_writes_is_progress(tmp_path: Path) -> None:
    script = f"for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 0.2; echo >>{tmp_path}/f; done"
    assert run(bash(script), stall=1.2).code == 0
    # Somebody who only waits makes none, however much another value changes.
    ticks = iter(range(1000))
    assert run(bash("sleep 1.5"), stall=1, activity=lambda: next(ticks)).code == 0


def test_too_much_output_is_ended(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="wrote more than 100000 bytes"):
        run(bash(f"echo $$ >{tmp_path}/pid; exec cat /dev/zero"), timeout=30, stdout_limit=100_000)
    assert_gone(int((tmp_path / "pid").read_text()))
    assert (
        len(run(["head", "-c", "1000", "/dev/zero"], timeout=9, stdout_limit=1000).stdout) == 1000
    )


def test_a_program_that_ignores_sigterm_is_killed() -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    with started(bash(script)) as child:
        assert child.process.stdout is not None
        assert child.process.stdout.readline() == b"ready\n"
        end_group(child.process, grace=0.3)
        assert child.process.returncode == -signal.SIGKILL


def test_a_stream_is_taken_piece_by_piece() -> None:
    with stream(["head", "-c", "3000000", "/dev/zero"], stall=30) as pieces:
        sizes = [len(piece) for piece in pieces]
    assert sum(sizes) == 3_000_000
    assert max(sizes) <= 1 << 16


def test_a_stream_that_fails_says_so_at_its_end() -> None:
    with (
        pytest.raises(ProgramError, match="bash failed with exit code 3: why"),
        stream(bash("echo x; echo why >&2; exit 3"), stall=30) as pieces,
    ):
        list(pieces)
    with (
        pytest.raises(ProgramError, match="was ended by signal 15"),
        stream(bash("kill $$"), stall=30) as pieces,
    ):
        list(pieces)


def test_leaving_a_stream_ends_the_program(tmp_path: Path) -> None:
    script = f"echo $$ >{tmp_path}/pid; exec cat /dev/zero"
    with stream(bash(script), stall=30) as pieces:
        next(pieces)
    assert_gone(int((tmp_path / "pid").read_text()))


def test_a_slow_reader_is_no_stall() -> None:
    with stream(bash("head -c 200000 /dev/zero; sleep 0.2; echo end"), stall=0.8) as pieces:
        got = [next(pieces)]
        time.sleep(1.2)
        got += pieces
    assert b"".join(got).endswith(b"end\n")


def test_a_program_dies_with_its_parent(tmp_path: Path) -> None:
    """Also where the parent is killed and can end nothing."""
    script = textwrap.dedent(
        f"""
        from casync_updater.tools.process import run
        run(["bash", "-c", "echo $$ >{tmp_path}/pid; exec sleep 100"], timeout=60)
        """
    )
    source = Path(process.__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(source)}
    )
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        assert alive(pid)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert_gone(pid)


def test_a_program_holds_the_descriptors_that_it_is_given(tmp_path: Path) -> None:
    read, write = os.pipe()
    try:
        run(["bash", "-c", f"echo held >&{write}"], timeout=30, keep_fds=(write,))
        assert os.read(read, 100) == b"held\n"
        with pytest.raises(ProgramError, match="Bad file descriptor"):
            run(["bash", "-c", f"echo held >&{write}"], timeout=30)
    finally:
        os.close(read)
        os.close(write)

"""Power cuts: a child process that kills itself at the n-th step that reaches the disk."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

_STEPS = frozenset(
    {
        ("syscalls.py", "_renameat2"),
        ("syscalls.py", "sync_file_system"),
        ("files.py", "write_atomic"),
        ("files.py", "sync_folder"),
        ("pathlib.py", "rename"),
        ("pathlib.py", "replace"),
        ("pathlib.py", "mkdir"),
        ("pathlib.py", "unlink"),
        ("staging.py", "_remove_tree"),
        ("fakes.py", "start"),
        ("fakes.py", "forget"),
    }
)


def killed_at(count: int, work: Callable[[], object]) -> bool:
    """Do something in a child that is killed where the count-th step begins or ends.

    Returns:
        False where the work ended before that many steps were made.
    """
    child = os.fork()
    if child == 0:
        left = count

        def watch(frame: FrameType, event: str, _argument: Any) -> None:
            nonlocal left
            if event not in ("call", "return"):
                return
            code = frame.f_code
            if (code.co_filename.rpartition("/")[2], code.co_name) not in _STEPS:
                return
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.setprofile(watch)
            work()
            sys.setprofile(None)
            status = 0
        except BaseException:
            sys.setprofile(None)
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work itself failed"
    return False

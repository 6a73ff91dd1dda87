import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from casync_updater import logs
from casync_updater.model import Reason


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(level: int, message: str, *, verbose: bool = False) -> str:
    stream = io.StringIO()
    logs.configure(stream, {}, verbose=verbose)
    logging.getLogger("casync_updater.x").log(level, "%s", message)
    return stream.getvalue()


def test_plain_lines_say_their_level_where_it_matters() -> None:
    assert logged(logging.INFO, "web: up to date") == "web: up to date\n"
    assert logged(logging.WARNING, "web: slow") == "warning: web: slow\n"
    assert logged(logging.ERROR, "web: refused") == "error: web: refused\n"
    assert logged(logging.DEBUG, "detail") == ""
    assert logged(logging.DEBUG, "detail", verbose=True) == "detail\n"


def test_one_message_is_one_line_whatever_stands_in_it() -> None:
    assert logged(logging.INFO, "a\nerror: b\x1b[2J\ud800") == "a\\nerror: b\\x1b[2J\\ud800\n"


def test_a_traceback_keeps_its_lines() -> None:
    stream = io.StringIO()
    logs.configure(stream, {})
    try:
        raise ValueError("x")
    except ValueError:
        logging.getLogger("x").exception("it broke")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "error: it broke"
    assert lines[-1] == "ValueError: x"


def test_the_journal_is_recognised_by_its_socket(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        status = os.fstat(file.fileno())
        here = f"{status.st_dev}:{status.st_ino}"
        assert logs.is_journal(file, {"JOURNAL_STREAM": here})
        assert not logs.is_journal(file, {"JOURNAL_STREAM": here + "1"})
        assert not logs.is_journal(file, {})
    assert not logs.is_journal(file, {"JOURNAL_STREAM": here})
    assert not logs.is_journal(io.StringIO(), {"JOURNAL_STREAM": here})


def test_fields_are_named_for_the_journal() -> None:
    assert logs.fields("web", serial=7, reason=Reason.ONLINE) == {
        "CASYNC_UPDATER_ENTRY": "web",
        "CASYNC_UPDATER_SERIAL": "7",
        "CASYNC_UPDATER_REASON": "online",
    }
    assert logs.fields("web") == {"CASYNC_UPDATER_ENTRY": "web"}

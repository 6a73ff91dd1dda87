import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casync_updater.model import Origin, Progress, Step
from casync_updater.reports import (
    LINE_LIMIT,
    Began,
    CycleEnd,
    LineReader,
    Outcome,
    PipeMonitor,
    Report,
    decode,
    encode,
)


class HandClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def boot_id(self) -> str:
        return "boot"


counts = st.integers(min_value=0, max_value=2**62)
texts = st.text(max_size=50)
reports: st.SearchStrategy[Report] = st.one_of(
    st.builds(Began, st.sampled_from(Step), st.none() | texts),
    st.builds(Progress, counts, st.none() | counts),
    st.builds(
        CycleEnd,
        st.sampled_from(Outcome),
        st.integers(0, 255),
        texts,
        st.none() | counts,
        st.none() | texts,
        st.lists(texts).map(tuple),
        st.none() | st.sampled_from(Origin),
    ),
)


@given(reports)
def test_what_is_encoded_is_read_back(report: Report) -> None:
    line = encode(report)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line) == report


def test_the_lines_are_the_documented_ones() -> None:
    assert json.loads(encode(Began(Step.BUILD, "1.4.2"))) == {"step": "build", "version": "1.4.2"}
    assert json.loads(encode(Progress(123, 456))) == {"done": 123, "total": 456}
    end = CycleEnd(Outcome.UPDATED, 0, "m", 7, "1", ("a", "b"), Origin.BACKUP, "0", 4_460_000)
    assert json.loads(encode(end)) == {
        "result": {
            "outcome": "updated",
            "exit": 0,
            "message": "m",
            "serial": 7,
            "version": "1",
            "actions": ["a", "b"],
            "source": "backup",
            "had": "0",
            "received": 4_460_000,
        }
    }


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"Traceback (most recent call last):",
        b'{"step": "bui',
        b'{"step": "dance"}',
        b'{"step": "build", "version": 3}',
        b'{"done": true}',
        b'{"done": -1}',
        b'{"done": 1.5}',
        b'{"done": 1, "total": "all"}',
        b'{"result": {"outcome": "updated"}}',
        b'{"result": {"outcome": "well", "exit": 0, "message": ""}}',
        b'{"result": {"outcome": "failed", "exit": 0, "message": "", "actions": [1]}}',
        b'{"result": {"outcome": "failed", "exit": 0, "message": "", "actions": 7}}',
        b'{"result": {"outcome": "failed", "exit": 0, "message": "", "source": "moon"}}',
        b'{"result": {"outcome": "failed", "exit": 0, "message": "", "received": -1}}',
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_what_is_no_report_is_none(line: bytes) -> None:
    assert decode(line) is None


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail(line: bytes) -> None:
    decode(line)


@given(st.lists(reports, max_size=5), st.integers(1, 40))
def test_pieces_of_any_size_give_the_same_reports(sent: list[Report], size: int) -> None:
    data = b"".join(encode(report) for report in sent)
    reader = LineReader()
    received = [
        report
        for start in range(0, len(data), size)
        for report in reader.feed(data[start : start + size])
    ]
    assert received == sent
    assert reader.rejected == 0


def test_a_line_without_end_is_dropped_and_the_next_one_is_read() -> None:
    reader = LineReader()
    for _ in range(5):
        assert list(reader.feed(b"x" * (LINE_LIMIT // 2))) == []
    assert list(reader.feed(b"\n" + encode(Progress(1)))) == [Progress(1)]
    assert reader.rejected == 1


def _sent(fd: int) -> list[Report]:
    return list(LineReader().feed(os.read(fd, 1 << 16)))


def test_the_monitor_writes_at_most_five_lines_a_second_and_the_last_always() -> None:
    reader, writer = os.pipe()
    clock = HandClock()
    monitor = PipeMonitor(writer, clock)
    monitor.step(Step.BUILD, "2")
    for done in range(1000):
        monitor.progress(Progress(done, 1000))
        clock.sleep(0.001)
    monitor.progress(Progress(1000, 1000))
    monitor.step(Step.VERIFY)
    end = CycleEnd(Outcome.CURRENT, 0, "up to date")
    monitor.finish(end)
    sent = _sent(reader)
    assert sent[0] == Began(Step.BUILD, "2")
    assert sent[-3:] == [Progress(1000, 1000), Began(Step.VERIFY), end]
    assert 5 <= len([report for report in sent if isinstance(report, Progress)]) <= 6
    os.close(reader)
    os.close(writer)


def test_the_same_figures_again_are_a_sign_of_life() -> None:
    reader, writer = os.pipe()
    clock = HandClock()
    monitor = PipeMonitor(writer, clock)
    for _ in range(3):
        monitor.progress(Progress(5, 9))
        clock.sleep(1)
    assert _sent(reader) == [Progress(5, 9)] * 3
    os.close(reader)
    os.close(writer)


def test_a_daemon_that_is_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monitor = PipeMonitor(writer, HandClock())
    monitor.step(Step.CHECK)
    monitor.finish(CycleEnd(Outcome.CURRENT, 0, "up to date"))
    os.close(writer)


def test_only_the_own_source_counts_as_checked() -> None:
    assert CycleEnd(Outcome.CURRENT, 0, "", source=Origin.SOURCE).checked
    assert not CycleEnd(Outcome.UPDATED, 0, "", source=Origin.BACKUP).checked
    assert not CycleEnd(Outcome.FAILED, 1, "", source=Origin.SOURCE).checked
    assert not CycleEnd(Outcome.CURRENT, 0, "").checked

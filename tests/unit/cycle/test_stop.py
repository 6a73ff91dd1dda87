"""Signals: at once where a step can be resumed, at its end where it cannot."""

import os
import signal

import pytest

from casync_updater.cycle.stop import Stop, StoppedError


def interrupt(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_step_at_once(number: int) -> None:
    before = signal.getsignal(number)
    reached = False

    def step() -> None:
        nonlocal reached
        interrupt(number)
        reached = True

    with pytest.raises(StoppedError), Stop().installed():
        step()
    assert not reached
    assert signal.getsignal(number) is before


def shielded(stop: Stop, done: list[str]) -> None:
    with stop.shielded():
        with stop.shielded():
            interrupt()
            done.append("inner")
        done.append("outer")


def test_a_shielded_block_is_finished_first() -> None:
    done: list[str] = []
    with Stop().installed() as stop:
        with pytest.raises(StoppedError):
            shielded(stop, done)
        with pytest.raises(StoppedError):
            stop.check()
    assert done == ["inner", "outer"]


def test_an_error_in_a_shielded_block_is_not_hidden() -> None:
    def fail() -> None:
        interrupt()
        raise ZeroDivisionError

    with Stop().installed() as stop, pytest.raises(ZeroDivisionError), stop.shielded():
        fail()


def test_without_a_signal_nothing_happens() -> None:
    stop = Stop()
    with stop.shielded():
        pass
    stop.check()

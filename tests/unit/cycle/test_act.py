"""Promised actions: which, in what order, and how often."""

import logging
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from casync_updater.cycle.act import Actor, promise, triggered
from casync_updater.cycle.stop import Stop, StoppedError
from casync_updater.errors import LocalError
from casync_updater.model import (
    ActionSettings,
    Changes,
    Entry,
    Installed,
    Location,
    Origin,
    Reason,
    Trigger,
)
from casync_updater.state import ActionState, PendingAction, State, StateFolder
from casync_updater.tools.actions import Action, ActionResult, Handle, NotStartedError
from support.fakes import FolderRunner

OK = ActionResult(code=0)


def entry(*triggers: Trigger) -> Entry:
    return Entry("x", "x", 60.0, Location("/i.caidx", "/s"), None, Path("/srv/x"), triggers)


class Stage:
    def __init__(self, root: Path, *commands: str) -> None:
        self.folder = StateFolder(root / "state", entry())
        self.folder.prepare()
        self.runner = FolderRunner(root / "runner")
        self.stop = Stop()
        pending = tuple(PendingAction(f"id-{command}", command) for command in commands)
        self.folder.save(State("/srv/x", pending=pending))
        self.waited = 0

    def actor(self) -> Actor:
        def waiting() -> None:
            self.waited += 1

        return Actor(
            entry(),
            self.folder,
            runner=self.runner,
            settings=ActionSettings(),
            stop=self.stop,
            waiting=waiting,
            log=logging.getLogger("test"),
        )

    def act(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        acted, state = self.actor().act(self.folder.load())
        assert state == self.folder.load()
        return acted.commands, acted.failures

    def states(self) -> list[tuple[str, ActionState]]:
        return [(action.command, action.state) for action in self.folder.load().pending]


def test_actions_fire_in_their_order_and_once() -> None:
    one = entry(
        Trigger(("b", "a/c"), ("second", "first")),
        Trigger(("a",), ("first", "third")),
        Trigger((".",), ("all",)),
        Trigger(("other",), ("never",)),
    )
    assert triggered(one, Changes(added=(b"a/c/d",))) == ("second", "first", "third", "all")
    assert triggered(one, Changes(removed=(b"a",))) == ("first", "third", "all")
    assert triggered(one, Changes(changed=(b".",))) == ("all",)
    assert triggered(one, Changes()) == ()


@pytest.mark.parametrize(
    ("path", "changed", "fires"),
    [
        ("a", b"a", True),
        ("a", b"a/b", True),
        ("a", b"ab", False),
        ("a", b"a-b", False),
        ("a", b"b/a", False),
        ("a/b", b"a", False),
        ("a b", b"a b/c", True),
        ("\udcff", b"\xff/x", True),
        (".", b"x", True),
    ],
)
def test_a_path_matches_itself_and_what_is_below(path: str, changed: bytes, fires: bool) -> None:
    one = entry(Trigger((path,), ("run",)))
    assert triggered(one, Changes(changed=(changed,))) == (("run",) if fires else ())


def promised(folder: StateFolder, *commands: str, since: float = 5.0) -> tuple[PendingAction, ...]:
    new = Installed("d" * 64, "i" * 64, since, "here", Origin.SOURCE, "2", 2)
    return promise(
        entry(),
        commands,
        changes=Changes((b"a b",), (b"c\n",), (b"\xff",)),
        old=None,
        new=new,
        reason=Reason.MEDIA,
        folder=folder,
        settings=ActionSettings(timeout=7.0),
    )


def test_what_an_action_finds_in_its_environment(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert promised(stage.folder) == ()
    assert list(stage.folder.actions.iterdir()) == []
    others = {action.id for action in promised(stage.folder, "same", since=6.0)}
    first, second = promised(stage.folder, "same", "same")
    assert first.id != second.id
    assert first.id not in others
    # What was promised for a commit that then failed leaves nothing.
    assert len(list(stage.folder.actions.iterdir())) == 1
    assert first.timeout == 7.0
    env = dict(first.env)
    listing = env.pop("CASYNC_UPDATER_CHANGES")
    assert env == {
        "CASYNC_UPDATER_ENTRY": "x",
        "CASYNC_UPDATER_OLD_VERSION": "",
        "CASYNC_UPDATER_NEW_VERSION": "2",
        "CASYNC_UPDATER_REASON": "media",
    }
    assert Path(listing).read_text() == "added a\\040b\nchanged c\\012\nremoved \\377\n"
    # The list of a promise that was never kept goes with the next one.
    (other,) = promised(stage.folder, "same", since=6.0)
    assert other.id not in (first.id, second.id)
    assert [str(path) for path in stage.folder.actions.iterdir()] == [
        dict(other.env)["CASYNC_UPDATER_CHANGES"]
    ]


def test_actions_run_one_after_the_other(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "a", "b", "c")
    stage.runner.results = {"a": [None, None, OK], "b": [ActionResult(code=3)]}
    listing = stage.folder.actions / "x.changes"
    listing.write_bytes(b"")
    assert stage.act() == (("a", "b", "c"), ("action 'b' failed with exit code 3",))
    assert stage.runner.started == ["a", "b", "c"]
    assert stage.waited == 2
    assert stage.states() == []
    assert not listing.exists()
    assert [path.name for path in stage.runner.root.iterdir()] == ["log"]


def test_what_cannot_be_started_is_no_reason_to_stop(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "a", "b")
    stage.runner.refused = {"a"}
    commands, failures = stage.act()
    assert commands == ("a", "b")
    assert failures == ("action 'a' failed with exit code 127",)


def test_an_action_that_was_left_is_collected_and_not_repeated(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "a", "b")
    stage.runner.results = {"a": [None, StoppedError("stop"), None, OK]}
    with pytest.raises(StoppedError):
        stage.act()
    assert stage.states() == [("a", ActionState.LEFT), ("b", ActionState.WAITING)]
    assert stage.act() == (("a", "b"), ())
    assert stage.runner.started == ["a", "b"]


@pytest.mark.parametrize("lost", [True, False])
def test_a_left_action_whose_result_is_lost_is_done(tmp_path: Path, lost: bool) -> None:
    """An orderly restart ended it: it is not repeated, however it ended."""
    stage = Stage(tmp_path, "a")
    stage.runner.results = {"a": [StoppedError("stop"), ActionResult()]}
    with pytest.raises(StoppedError):
        stage.act()
    if not lost:
        (stage.runner.root / "id-a").unlink()
    assert stage.act() == (("a",), ())
    assert stage.runner.started == ["a"]


def running(stage: Stage) -> None:
    state = stage.folder.load()
    first, *rest = state.pending
    state = replace(state, pending=(replace(first, state=ActionState.RUNNING), *rest))
    stage.folder.save(state)


def test_an_action_that_a_power_cut_ended_runs_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "a")
    running(stage)
    assert stage.act() == (("a",), ())
    assert stage.runner.started == ["a"]
    stage = Stage(tmp_path / "lost", "a")
    running(stage)
    stage.runner.start(Action("id-a", "x", "a", Path("/"), None, {}))
    stage.runner.results = {"a": [ActionResult(), OK]}
    assert stage.act() == (("a",), ())
    assert stage.runner.started == ["a", "a"]


def test_an_action_that_outlived_a_killed_updater_is_collected(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "a")
    running(stage)
    stage.runner.start(Action("id-a", "x", "a", Path("/"), None, {}))
    stage.runner.results = {"a": [None, ActionResult(code=1)]}
    assert stage.act() == (("a",), ("action 'a' failed with exit code 1",))
    assert stage.runner.started == ["a"]


class SignalRunner(FolderRunner):
    """SIGTERM comes while an action is handed over."""

    def start(self, action: Action) -> Handle:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().start(action)


def test_the_hand_over_is_not_cut(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "a", "b")
    stage.runner = SignalRunner(tmp_path / "signals")
    with stage.stop.installed(), pytest.raises(StoppedError):
        stage.act()
    assert stage.runner.started == ["a"]
    assert stage.states() == [("a", ActionState.LEFT), ("b", ActionState.WAITING)]


def test_a_state_that_cannot_be_saved_drops_no_action(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "a")
    actor, state = stage.actor(), stage.folder.load()
    os.rename(stage.folder.path, tmp_path / "gone")  # noqa: PTH104
    with pytest.raises(LocalError, match="state cannot be saved"):
        actor.act(state)
    assert stage.runner.started == []


def test_health_checks(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    actor = stage.actor()
    assert actor.examine(("a", "b"), "1") is None
    stage.runner.results = {"a": [None, ActionResult(timed_out=True, seconds=5)]}
    assert actor.examine(("a", "b"), "2") == "health check 'a' was ended after 5 seconds"
    assert stage.runner.started == ["a", "b", "a"]
    stage.runner.refused = {"a"}
    assert actor.examine(("a",), "3") == "a cannot be started"


def test_a_health_check_that_was_left_is_collected(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.runner.results = {
        "a": [StoppedError("stop"), None, OK, StoppedError("s"), ActionResult()]
    }
    with pytest.raises(StoppedError):
        stage.actor().examine(("a",), "1")
    assert stage.actor().examine(("a",), "1") is None
    assert stage.runner.started == ["a"]
    # The next one is ended by an orderly restart: it is begun once more.
    with pytest.raises(StoppedError):
        stage.actor().examine(("a",), "2")
    assert stage.actor().examine(("a",), "2") is None
    assert stage.runner.started == ["a", "a", "a"]


class FullDisk(FolderRunner):
    """Has no room for the first start."""

    failures = 1

    def start(self, action: Action) -> Handle:
        if self.failures:
            self.failures -= 1
            raise NotStartedError("No space left on device")
        return super().start(action)


class FailingDisk(FolderRunner):
    """Cannot remove what it kept of an action, at the first try."""

    failures = 1

    def forget(self, action_id: str) -> None:
        if self.failures:
            self.failures -= 1
            raise LocalError("it cannot be removed: Input/output error")
        super().forget(action_id)


def test_what_cannot_be_started_now_stays_promised(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "one", "two")
    stage.runner = FullDisk(tmp_path / "runner")
    with pytest.raises(NotStartedError):
        stage.act()
    assert [command for command, _ in stage.states()] == ["one", "two"]
    assert stage.runner.started == []
    assert stage.act() == (("one", "two"), ())
    assert stage.runner.started == ["one", "two"]


def test_a_disk_that_fails_afterwards_repeats_no_action(tmp_path: Path) -> None:
    """Whoever goes on after an error goes on from what was saved last."""
    stage = Stage(tmp_path, "one", "two")
    stage.runner = FailingDisk(tmp_path / "runner")
    actor = stage.actor()
    with pytest.raises(LocalError, match="Input/output"):
        actor.act(stage.folder.load())
    assert actor.saved == stage.folder.load()
    assert stage.states() == [("one", ActionState.ENDED), ("two", ActionState.WAITING)]
    stage.act()
    assert stage.runner.started == ["one", "two"]


def test_a_health_check_that_cannot_be_started_has_not_failed(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.runner = FullDisk(tmp_path / "runner")
    with pytest.raises(NotStartedError):
        stage.actor().examine(["check"], "about")
    assert stage.actor().examine(["check"], "about") is None

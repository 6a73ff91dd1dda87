"""The sixth room: what was promised to run, runs; durable, in order, each once.

A promise is saved with the commit that makes it. Before a command starts, the state says that
it is running; after its end, the promise is removed. A command that was running when the
updater was told to stop is left to itself and not repeated; one that a power cut ended (another
boot, and nobody was told to stop) runs again.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from casync_updater.cycle.stop import Stop, StoppedError
from casync_updater.errors import LocalError
from casync_updater.files import write_atomic
from casync_updater.formats.mtree import escape
from casync_updater.model import ActionSettings, Changes, Entry, Installed, Reason
from casync_updater.state import ActionState, PendingAction, State, StateFolder
from casync_updater.tools.actions import (
    Action,
    ActionResult,
    ActionRunner,
    Handle,
    NotStartedError,
    action_id,
)

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

_PATIENCE = 1.0
"""Seconds after which somebody is told that an action still runs."""


@dataclass(frozen=True, slots=True)
class Acted:
    """What ran.

    Attributes:
        commands: every command that ran, in order.
        failures: one sentence for each that failed.
    """

    commands: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


def triggered(entry: Entry, changes: Changes) -> tuple[str, ...]:
    """The actions whose paths changed, in the configuration's order, each once.

    A path matches itself and everything below it; ``.`` matches every change.
    """
    changed = frozenset(changes.paths())
    commands: dict[str, None] = {}
    for trigger in entry.triggers:
        if any(_matches(os.fsencode(path), changed) for path in trigger.paths):
            commands.update(dict.fromkeys(trigger.actions))
    return tuple(commands)


def _matches(path: bytes, changed: frozenset[bytes]) -> bool:
    if path == b".":
        return bool(changed)
    return any(other == path or other.startswith(path + b"/") for other in changed)


def promise(
    entry: Entry,
    commands: Iterable[str],
    *,
    changes: Changes,
    old: Installed | None,
    new: Installed,
    reason: Reason,
    folder: StateFolder,
    settings: ActionSettings,
) -> tuple[PendingAction, ...]:
    r"""Commands as the state keeps them, with what they find in their environment.

    ``CASYNC_UPDATER_ENTRY``, ``_OLD_VERSION`` and ``_NEW_VERSION`` (empty where unknown),
    ``_REASON``, and ``_CHANGES``: a file with one line per changed path, ``added``, ``changed``
    or ``removed``, a space, and the path with unprintable bytes as ``\ooo``.
    """
    commands = tuple(commands)
    # Of a commit that failed; nothing is pending when something is promised.
    for listing in folder.actions.iterdir():
        listing.unlink()
    if not commands:
        return ()
    stem = f"{new.index_sha256[:16]}-{new.since:.0f}"
    listing = folder.actions / f"{stem}.changes"
    lines = [
        f"{kind} {escape(path)}\n"
        for kind in ("added", "changed", "removed")
        for path in getattr(changes, kind)
    ]
    write_atomic(listing, "".join(lines).encode("ascii"))
    env = (
        ("CASYNC_UPDATER_ENTRY", entry.name),
        ("CASYNC_UPDATER_OLD_VERSION", (old.version or "") if old else ""),
        ("CASYNC_UPDATER_NEW_VERSION", new.version or ""),
        ("CASYNC_UPDATER_REASON", reason.value),
        ("CASYNC_UPDATER_CHANGES", str(listing)),
    )
    return tuple(
        PendingAction(action_id(entry.name, stem, str(number)), command, env, settings.timeout)
        for number, command in enumerate(commands)
    )


class Actor:
    """Runs what an entry's state has pending.

    Attributes:
        saved: the state as it was saved last; None where nothing was. Whoever goes on after an
            error goes on from this, so that nothing runs again.
    """

    def __init__(
        self,
        entry: Entry,
        folder: StateFolder,
        *,
        runner: ActionRunner,
        settings: ActionSettings,
        stop: Stop,
        waiting: Callable[[], None],
        log: Log,
    ) -> None:
        """Nothing runs yet.

        Args:
            entry: whose actions they are.
            folder: where the state is saved.
            runner: starts and collects.
            settings: the folder that commands run in, and how long they may take.
            stop: waits for the hand-over of an action.
            waiting: called again and again while an action runs.
            log: takes what happens.
        """
        self.saved: State | None = None
        self._entry = entry
        self._folder = folder
        self._runner = runner
        self._directory = settings.directory
        self._timeout = settings.timeout
        self._stop = stop
        self._waiting = waiting
        self._log = log

    def act(self, state: State) -> tuple[Acted, State]:
        """Run or collect every pending action.

        Raises:
            StoppedError: the updater was told to stop; the state says what is left to do.
            NotStartedError: an action cannot be started now; it stays pending.
            UnrecordedError: the state cannot be saved.
            OSError: what was kept of an action cannot be removed.
        """
        commands: list[str] = []
        failures: list[str] = []
        while state.pending:
            if state.pending[0].state is not ActionState.ENDED:
                state, result = self._finish(state)
                command = state.pending[0].command
                commands.append(command)
                if result is not None and not result.ok and not result.lost:
                    failures.append(f"action {command!r} {result}")
                    self._log.error("%s", failures[-1])
                state = self._mark(state, ActionState.ENDED)
            # Only now, and before the promise is gone: a kill in between neither repeats the
            # action nor leaves anything of it.
            self._runner.forget(state.pending[0].id)
            state = replace(state, pending=state.pending[1:])
        for listing in self._folder.actions.iterdir():
            listing.unlink()
        self._save(state)
        return Acted(tuple(commands), tuple(failures)), state

    def forget_cut_off(self, commands: Sequence[str], about: str) -> bool:
        """Whether a health check was begun and cut off; it is seen once, and then forgotten.

        Raises:
            OSError: what was kept of it cannot be removed.
        """
        found = False
        for number in range(len(commands)):
            name = self._check_id(about, number)
            handle = self._runner.find(name)
            result = None if handle is None else self._runner.collect(handle)
            if result is not None and result.lost:
                self._runner.forget(name)
                found = True
        return found

    def _check_id(self, about: str, number: int) -> str:
        return action_id(self._entry.name, "health", about, str(number))

    def examine(self, commands: Iterable[str], about: str) -> str | None:
        """Run health checks, one after the other.

        Args:
            commands: each must succeed.
            about: tells checks of this installation apart from those of others. One that was
                begun in this boot is collected, and not begun again.

        Returns:
            What failed, in words; None where all succeeded.

        Raises:
            StoppedError: the updater was told to stop.
            NotStartedError: one cannot be started now, which says nothing about the version.
        """
        failure = None
        names: list[str] = []
        for number, command in enumerate(commands):
            action = Action(
                self._check_id(about, number),
                self._entry.name,
                command,
                self._directory,
                self._timeout,
                {"CASYNC_UPDATER_ENTRY": self._entry.name},
            )
            names.append(action.id)
            failure = self._examine_one(action)
            if failure is not None:
                break
        for name in names:
            self._runner.forget(name)
        return failure

    def _examine_one(self, action: Action) -> str | None:
        handle = self._runner.find(action.id)
        result = self._await(handle) if handle is not None else ActionResult()
        if result.lost:
            self._log.info("running health check %r", action.command)
            try:
                result = self._await(self._runner.start(action))
            except NotStartedError:
                raise
            except LocalError as error:
                return str(error)
        return None if result.ok else f"health check {action.command!r} {result}"

    def _await(self, handle: Handle) -> ActionResult:
        while (result := self._runner.collect(handle, _PATIENCE)) is None:
            self._waiting()
        return result

    def _finish(self, state: State) -> tuple[State, ActionResult | None]:
        """Bring the first pending action to its end; None where it never had a result."""
        pending = state.pending[0]
        if pending.state is not ActionState.WAITING:
            handle = self._runner.find(pending.id)
            result = self._collect(state, handle) if handle is not None else None
            cut = result is None or result.lost
            if not cut or pending.state is ActionState.LEFT:
                return state, result
            self._log.warning("action %r was cut off: it runs again", pending.command)
        self._log.info("running action %r", pending.command)
        handle = None
        try:
            with self._stop.shielded():
                state = self._mark(state, ActionState.RUNNING)
                handle = self._started(pending)
        except StoppedError:
            if handle is not None:
                self._mark(state, ActionState.LEFT)
            raise
        except NotStartedError:
            self._mark(state, ActionState.WAITING)
            raise
        return state, ActionResult(code=127) if handle is None else self._collect(state, handle)

    def _started(self, pending: PendingAction) -> Handle | None:
        action = Action(
            pending.id,
            self._entry.name,
            pending.command,
            self._directory,
            pending.timeout,
            dict(pending.env),
        )
        try:
            return self._runner.start(action)
        except NotStartedError:
            raise
        except LocalError as error:
            self._log.error("action %r: %s", pending.command, error)
            return None

    def _collect(self, state: State, handle: Handle) -> ActionResult:
        """Wait for an action; when the updater is told to stop, leave it to itself."""
        try:
            return self._await(handle)
        except StoppedError:
            self._mark(state, ActionState.LEFT)
            raise

    def _mark(self, state: State, mark: ActionState) -> State:
        first, *rest = state.pending
        state = replace(state, pending=(replace(first, state=mark), *rest))
        self._save(state)
        return state

    def _save(self, state: State) -> None:
        self._folder.save(state)
        self.saved = state

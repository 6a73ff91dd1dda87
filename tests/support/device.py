"""A device in this process: real cycles on real files, without starting a program for each.

device = Device(tmp_path / "device", Location(f"{site}/tree.caidx", f"{site}/store.castr"))
end = device.cycle()
assert end.exit == 0
"""

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from casync_updater.cycle.cycle import Cycle
from casync_updater.cycle.operator import Operator
from casync_updater.cycle.session import Surroundings
from casync_updater.cycle.stop import Stop
from casync_updater.model import (
    Entry,
    FetchSettings,
    Location,
    Reason,
    Settings,
    SilentMonitor,
    TrustSettings,
)
from casync_updater.reports import CycleEnd
from casync_updater.sources import open_source
from casync_updater.state import State, StateFolder
from casync_updater.tools.actions import action_runner

IMPATIENT = FetchSettings(
    connect_timeout=2.0, read_timeout=1.0, min_rate=64, retries=0, retry_max_wait=0.1
)


@dataclass
class SetClock:
    """A clock that shows what it was set to, and goes on from there."""

    offset: float = 0.0

    def set(self, seconds: float) -> None:
        self.offset = seconds - time.time()

    def time(self) -> float:
        return time.time() + self.offset

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def boot_id(self) -> str:
        return "boot"


@dataclass
class Device:
    """One entry of a device.

    Attributes:
        folder: everything of the device is in it.
        source: where its updates come from.
        backup: its drive; None for none.
        keyring: what must have signed; None demands nothing.
        clock: its clock.
        log: lines that it logged.
    """

    folder: Path
    source: Location
    backup: Location | None = None
    keyring: Path | None = None
    clock: SetClock = field(default_factory=SetClock)
    trust: TrustSettings = field(default_factory=lambda: TrustSettings(keyrings=Path("/nowhere")))
    fetch: FetchSettings = IMPATIENT
    options: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.destination = self.folder / "device" / "tree"
        self.destination.parent.mkdir(parents=True, exist_ok=True)

    @property
    def entry(self) -> Entry:
        return replace(
            Entry(
                name="tree",
                project="tree",
                interval=3600.0,
                source=self.source,
                backup=self.backup,
                destination=self.destination,
                signed_by=() if self.keyring is None else (self.keyring,),
            ),
            **self.options,
        )

    @property
    def state(self) -> State:
        return StateFolder(self.folder / "state", self.entry).peek()

    def cycle(self, *, accept_legacy: bool = False, reason: Reason = Reason.INTERVAL) -> CycleEnd:
        """Run a cycle."""
        folder = StateFolder(self.folder / "state", self.entry)
        with folder.locked("a test", wait=0.0) as lock:
            cycle = Cycle(self.entry, self._surroundings(), SilentMonitor(), lock, self._logger())
            return cycle.run(reason, accept_legacy=accept_legacy)

    def rollback(self) -> CycleEnd:
        folder = StateFolder(self.folder / "state", self.entry)
        with folder.locked("a test", wait=0.0) as lock:
            operator = Operator(
                self.entry, self._surroundings(), SilentMonitor(), lock, self._logger()
            )
            return operator.rollback()

    def _surroundings(self) -> Surroundings:
        state = self.folder / "state"
        return Surroundings(
            settings=Settings(trust=self.trust, fetch=self.fetch),
            state_dir=state,
            cache_dir=self.folder / "cache",
            clock=self.clock,
            stop=Stop(),
            runner=action_runner(state / ".actions", self.clock, lambda _entry, _line: None),
            open_source=lambda location: open_source(location, self.fetch, self.clock),
        )

    def _logger(self) -> logging.Logger:
        logger = logging.Logger("device")
        logger.addHandler(_Lines(self.log))
        return logger


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

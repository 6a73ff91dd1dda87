"""Drives as the daemon sees them: the mount table and udev in its loop, and the visits.

The kernel says that the table changed by an exceptional condition of its file (POLLERR and
POLLPRI, proc_pid_mountinfo(5)); the file itself is readable all the time. A selector reports
errors to whoever waits for writing, and to nobody else here, since this file never is writable.
"""

import logging
import os
import selectors
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casync_updater.children import Kind, Task
from casync_updater.clock import Clock
from casync_updater.config.configuration import Configuration
from casync_updater.drives.mounts import Mount, appeared, holder, parse, resolve
from casync_updater.drives.visits import Stage, Visit, Visits
from casync_updater.errors import LocalError
from casync_updater.reports import CycleEnd
from casync_updater.scheduler import MediaAppeared

if TYPE_CHECKING:
    from casync_updater.drives.devices import Devices

log = logging.getLogger(__name__)

_MOUNTINFO = Path("/proc/self/mountinfo")


class Drives:
    """Watches drives from the moment it is made, in the caller's selector.

    Each of its descriptors is registered with a function to call as its data.

    Args:
        configuration: whose backups are looked for, and what is mounted.
        selector: waits for it.
        clock: the time.
    """

    def __init__(
        self, configuration: Configuration, selector: selectors.BaseSelector, clock: Clock
    ) -> None:
        self._selector = selector
        self._clock = clock
        self._visits = Visits()
        self._events: list[MediaAppeared] = []
        self._devices: Devices | None = None
        self._mountinfo = _MOUNTINFO.open("rb", buffering=0)
        self._watching = False
        self._table = self._read()
        self._trusted: frozenset[Mount] = frozenset()
        self._backups: dict[str, str] = {}
        self.configure(configuration)

    def configure(self, configuration: Configuration) -> None:
        """The configuration was read."""
        self._look()
        self._trusted = frozenset(self._table)
        self._backups = {
            entry.name: entry.backup.index
            for entry in configuration.entries
            if entry.backup is not None
        }
        media = configuration.settings.media
        self._visits.configure(media, self._backups)
        self._watch(wanted=bool(self._backups or media.labels))
        if media.labels:
            self._listen()
        else:
            self._deafen()

    def take_events(self) -> tuple[MediaAppeared, ...]:
        """Whose drives appeared since the last call."""
        events, self._events = tuple(self._events), []
        return events

    def take_tasks(self) -> list[Task]:
        """The children to start now."""
        return self._visits.take_tasks()

    def task_ended(self, task: Task, *, ok: bool) -> None:
        """A child that was asked for has ended."""
        self._look()
        point = task.input["point"]
        if task.kind is Kind.DETACH:
            self._visits.detached(point, ok=ok)
        elif self._visits.is_attaching(point):
            # What is there already since an earlier start does not appear in the table.
            mount = next((one for one in reversed(self._table) if one.point == point), None)
            if ok and mount is not None:
                self._begin({mount: self._held(mount)})
            else:
                self._visits.not_attached(point)

    def cycle_started(self, name: str) -> None:
        """A cycle of this entry begins."""
        self._visits.cycle_started(name)

    def cycle_ended(self, name: str, end: CycleEnd) -> None:
        """A cycle of this entry is over."""
        self._visits.cycle_ended(name, end)

    def of_entry(self, name: str) -> str | None:
        """Which drive the running cycle of an entry is about."""
        return self._visits.of_entry(name)

    def words(self) -> list[str]:
        """What people should know, but for what the cycles say themselves."""
        return [f"drive {visit.title} {visit.words}" for visit in self._visits if _silent(visit)]

    def report(self) -> list[dict[str, Any]]:
        """What is there, for `status`."""
        return [
            {
                "name": visit.title,
                "mountPoint": visit.point,
                "device": visit.device and visit.device.node,
                "state": visit.stage.value,
                "message": "an update from it is running" if visit.running else visit.words,
            }
            for visit in self._visits
        ]

    def close(self) -> None:
        """Watch no longer. What is mounted stays mounted; the next start goes on with it."""
        self._deafen()
        self._watch(wanted=False)
        self._mountinfo.close()

    def _watch(self, *, wanted: bool) -> None:
        """Be woken by mounts only where one may matter: containers mount, and unmount, a lot.

        The kernel counts changes from the opening, and tells of those in between at once.
        """
        if wanted and not self._watching:
            self._selector.register(self._mountinfo, selectors.EVENT_WRITE, self._look)
        elif self._watching and not wanted:
            self._selector.unregister(self._mountinfo)
        self._watching = wanted

    def _look(self) -> None:
        """Compare the mount table with what it was."""
        if self._mountinfo.closed:  # in the same turn of the loop
            return
        before, self._table = self._table, self._read()
        if before == self._table:
            return
        self._begin(appeared(before, self._table, self._places()))

    def _begin(self, found: Mapping[Mount, tuple[str, ...]]) -> None:
        self._visits.mounted(found, self._table, self._clock.time())
        self._events += [MediaAppeared(names) for names in found.values() if names]

    def _held(self, mount: Mount) -> tuple[str, ...]:
        """The entries whose backups a mount holds."""
        places = self._places().items()
        return tuple(name for name, path in places if holder(self._table, path) == mount)

    def _places(self) -> dict[str, str]:
        return {
            name: resolve(path, self._table, self._trusted, os.readlink)
            for name, path in self._backups.items()
        }

    def _read(self) -> tuple[Mount, ...]:
        self._mountinfo.seek(0)
        return parse(self._mountinfo.read())

    def _listen(self) -> None:
        if self._devices is None:
            # Loaded here, since it brings ctypes, and most devices mount nothing.
            from casync_updater.drives.devices import Devices  # noqa: PLC0415

            try:
                self._devices = devices = Devices()
            except LocalError as error:
                log.warning("%s; drives that somebody mounts are used all the same", error)
                return
            self._selector.register(devices, selectors.EVENT_READ, self._hear)
        for device in self._devices.there():
            self._visits.came(device, self._table, self._clock.time())

    def _hear(self) -> None:
        if self._devices is None:
            return
        for event in self._devices.heard():
            self._look()
            if event.device is not None:
                self._visits.came(event.device, self._table, self._clock.time())
            else:
                self._visits.left(event.node)

    def _deafen(self) -> None:
        devices, self._devices = self._devices, None
        if devices is not None:
            self._selector.unregister(devices)
            devices.close()


def _silent(visit: Visit) -> bool:
    """Whether no running cycle speaks for it."""
    return not (visit.stage is Stage.UPDATING and visit.running)

"""What is done with the drives that are plugged in, from their coming to their leaving.

Pure: it is told what happened, and says which children to start. The rules:

- A mount that appears and holds backups is a visit: every entry whose backup it holds has a
  cycle that starts after that. A cycle that was running does not count, it may have passed the
  point at which it looks for a drive.
- A drive with one of the configured labels is mounted first, and unmounted after its visit. Two
  with the same label have the same mount point, and come one after the other.
- A drive that is gone in the middle is a visit that failed; cycles end by themselves.
- A drive is visited once for each time that it is plugged in.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from casync_updater import codec
from casync_updater.children import Kind, Task
from casync_updater.drives.mounts import Mount, Table
from casync_updater.drives.order import EntryEnd, Order
from casync_updater.model import MediaSettings
from casync_updater.reports import CycleEnd

log = logging.getLogger(__name__)

PLACE = Path("/run/media/casync-updater")
"""Drives are mounted below it; not below /run/casync-updater, which systemd empties when the
service stops."""


@dataclass(frozen=True, slots=True)
class Device:
    """A file system on a block device."""

    node: str
    """Its device node, ``/dev/sda1``."""
    number: str
    """Major and minor, ``8:1``, as `mounts.Mount.device` has them."""
    label: str
    usage: str
    """What udev takes it for: ``filesystem``, ``crypto``, ``raid``, ``other`` (swap)."""
    type: str
    uuid: str


class Stage(StrEnum):
    """How far a visit is."""

    WAITING = "waiting"
    ATTACHING = "attaching"
    UPDATING = "updating"
    DETACHING = "detaching"
    DONE = "done"
    FAILED = "failed"


_ACTIVE = (Stage.ATTACHING, Stage.UPDATING, Stage.DETACHING)

_WORDS = {
    Stage.WAITING: "waits for its turn",
    Stage.ATTACHING: "is being mounted",
    Stage.UPDATING: "an update from it is about to begin",
    Stage.DETACHING: "is being finished: do not pull it out yet",
    Stage.FAILED: "cannot be used, or still is in use; see the journal",
}


@dataclass(slots=True)
class Visit:
    """One drive, from its coming to its leaving.

    Attributes:
        title: what it is called: its label, or the name of the folder where it is mounted.
        point: where it is mounted, or will be.
        device: what the daemon mounts and unmounts itself; None where somebody else does that.
        began: when, in seconds since 1970.
        stage: how far it is.
        mount: what is mounted; None before and after that.
        asked: entries that shall have a cycle, which did not begin yet.
        running: entries whose cycle runs.
        ends: how the cycles ended.
        lost: it was pulled out, or unmounted by somebody.
        gone: its device is not there any longer.
    """

    title: str
    point: str
    device: Device | None
    began: float
    stage: Stage
    mount: Mount | None = None
    asked: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    ends: dict[str, CycleEnd] = field(default_factory=dict)
    lost: bool = False
    gone: bool = False

    @property
    def failed(self) -> bool:
        """Whether somebody should look at what happened."""
        return self.order.failed

    @property
    def order(self) -> Order:
        """What a child is told of it."""
        return Order(
            title=self.title,
            point=self.point,
            node=None if self.device is None else self.device.node,
            type=None if self.device is None else self.device.type,
            began=self.began,
            lost=self.lost,
            ends=tuple(EntryEnd(name, end) for name, end in sorted(self.ends.items())),
        )

    @property
    def words(self) -> str:
        """What is going on, for people."""
        if self.stage is not Stage.DONE:
            return _WORDS[self.stage]
        words = "failed, see the journal" if self.failed else "done"
        if self.device is None:
            return words
        return f"can be pulled out ({words})"


class Visits:
    """All drives. Nothing here waits or looks at anything."""

    def __init__(self) -> None:
        self._visits: list[Visit] = []
        self._tasks: list[Task] = []
        self._settings = MediaSettings()

    def __iter__(self) -> Iterator[Visit]:
        return iter(self._visits)

    def configure(self, settings: MediaSettings, names: Iterable[str]) -> None:
        """The configuration was read: these are the entries."""
        self._settings = settings
        for visit in self._visits:
            visit.asked &= set(names)
        self._visits = [
            visit
            for visit in self._visits
            if visit.stage is not Stage.WAITING or visit.title in settings.labels
        ]
        self._settle()

    def came(self, device: Device, table: Table, now: float) -> None:
        """A block device is there, or its content changed."""
        known = self._of(device.node)
        # One that is in use is what it is: udev speaks of it again for many reasons.
        if known is not None and (known.stage in _ACTIVE or known.device == device):
            return
        if known is not None:
            self.left(device.node)
        if device.label not in self._settings.labels:
            return
        point = str(PLACE / device.label)
        where = f"drive {device.label} ({device.node})"
        if device.usage != "filesystem":
            log.error("%s holds no file system but %s: left alone", where, device.type or "nothing")
            return
        mounts = [m for m in table if m.source == device.node or m.device == device.number]
        if any(mount.point != point for mount in mounts):
            log.info("%s is mounted at %s: left to whoever did that", where, mounts[0].point)
            return
        self._visits.append(Visit(device.label, point, device, now, Stage.WAITING))
        self._settle()

    def left(self, node: str) -> None:
        """A block device is gone."""
        visit = self._of(node)
        if visit is None:
            return
        visit.gone = True
        unmounted = visit.stage is Stage.DETACHING and visit.mount is None
        if visit.stage in _ACTIVE and not unmounted:
            visit.lost = True
            visit.asked.clear()
            log.warning("drive %s was pulled out in the middle", visit.title)
        else:
            log.info("drive %s was pulled out", visit.title)
        self._settle()

    def mounted(self, found: Mapping[Mount, tuple[str, ...]], table: Table, now: float) -> None:
        """The mount table changed.

        Args:
            found: which mounts appeared, and for whom.
            table: all of them.
            now: seconds since 1970.
        """
        for visit in self._visits:
            if visit.mount is None or visit.mount in table:
                continue
            if visit.stage is Stage.UPDATING and not visit.lost:
                visit.lost = True
                visit.asked.clear()
                log.warning("drive %s was pulled out or unmounted in the middle", visit.title)
            visit.gone = visit.gone or visit.device is None
            visit.mount = None
        for mount, names in found.items():
            own = self._attaching(mount.point)
            if own is None:
                title = Path(mount.point).name or mount.point
                own = Visit(title, mount.point, None, now, Stage.UPDATING)
                self._visits.append(own)
                if self._settings.on_start:
                    self._tasks.append(_task(Kind.ATTACH, own))
            self._begin(own, mount, names)
        self._settle()

    def is_attaching(self, point: str) -> bool:
        """Whether a drive is being mounted there, and did not appear yet."""
        return self._attaching(point) is not None

    def not_attached(self, point: str) -> None:
        """The child that mounts a drive has failed."""
        visit = self._attaching(point)
        if visit is not None:
            visit.lost, visit.stage = True, Stage.UPDATING
        self._settle()

    def cycle_started(self, name: str) -> None:
        """A cycle begins: it finds every drive that is there by now."""
        for visit in self._visits:
            if name in visit.asked:
                visit.asked.discard(name)
                visit.running.add(name)

    def cycle_ended(self, name: str, end: CycleEnd) -> None:
        """A cycle is over."""
        for visit in self._visits:
            if name in visit.running:
                visit.running.discard(name)
                visit.ends[name] = end
        self._settle()

    def detached(self, point: str, *, ok: bool) -> None:
        """The child that finishes a visit has ended; `ok` where the drive is free."""
        for visit in self._visits:
            if visit.point == point and visit.stage is Stage.DETACHING:
                visit.stage = Stage.DONE if ok else Stage.FAILED
        self._settle()

    def of_entry(self, name: str) -> str | None:
        """Which drive a running cycle is about."""
        return next((visit.title for visit in self._visits if name in visit.running), None)

    def take_tasks(self) -> list[Task]:
        """The children to start now."""
        tasks, self._tasks = self._tasks, []
        return tasks

    def _of(self, node: str) -> Visit | None:
        for visit in self._visits:
            if visit.device is not None and visit.device.node == node and not visit.gone:
                return visit
        return None

    def _attaching(self, point: str) -> Visit | None:
        for visit in self._visits:
            if visit.point == point and visit.stage is Stage.ATTACHING:
                return visit
        return None

    def _begin(self, visit: Visit, mount: Mount, names: Iterable[str]) -> None:
        visit.mount, visit.asked, visit.stage = mount, set(names), Stage.UPDATING
        where = f"drive {visit.title} ({mount.source}, {mount.type} at {mount.point})"
        if visit.asked:
            log.info("%s: looking for updates of %s", where, ", ".join(sorted(visit.asked)))
        else:
            log.warning("%s: no entry has its backupIndex there: nothing to do", where)

    def _settle(self) -> None:
        """What follows from the rest: whose turn it is, who is through, who is gone."""
        for visit in self._visits:
            if visit.stage is Stage.UPDATING and not visit.asked and not visit.running:
                wanted = self._settings.on_failure if visit.failed else self._settings.on_success
                if visit.device is not None or wanted:
                    visit.stage = Stage.DETACHING
                    self._tasks.append(_task(Kind.DETACH, visit))
                else:
                    visit.stage = Stage.DONE
        self._visits = [v for v in self._visits if v.stage in _ACTIVE or not v.gone]
        taken = {visit.point for visit in self._visits if visit.stage in _ACTIVE}
        for visit in self._visits:
            if visit.stage is Stage.WAITING and visit.point not in taken:
                taken.add(visit.point)
                visit.stage = Stage.ATTACHING
                self._tasks.append(_task(Kind.ATTACH, visit))


def _task(kind: Kind, visit: Visit) -> Task:
    return Task(kind, input=codec.to_json(visit.order))

from dataclasses import replace
from typing import Any

import pytest

from casync_updater.children import Kind
from casync_updater.drives.mounts import Mount
from casync_updater.drives.visits import Device, Stage, Visits
from casync_updater.model import MediaSettings
from casync_updater.reports import CycleEnd, Outcome

POINT = "/run/media/casync-updater/UPDATES"
STICK = Device("/dev/sda1", "8:1", "UPDATES", "filesystem", "vfat", "1234-ABCD")
TWIN = Device("/dev/sdb1", "8:17", "UPDATES", "filesystem", "vfat", "9999-EEEE")
MOUNT = Mount(90, 1, "8:1", "/", POINT, "vfat", "/dev/sda1")
HAND = Mount(91, 1, "8:33", "/", "/media/usb", "ext4", "/dev/sdc1")
GOOD = CycleEnd(Outcome.UPDATED, 0, "updated to 2.0", had="1.0", version="2.0")
BAD = CycleEnd(Outcome.REFUSED, 4, "refused")


class Table:
    """Visits of two entries, with a mount table and everything that was asked for."""

    def __init__(self, **settings: Any) -> None:
        self.visits = Visits()
        self.table: list[Mount] = []
        self.visits.configure(MediaSettings(**({"labels": ("UPDATES",)} | settings)), ("a", "b"))

    def plug(self, device: Device = STICK) -> None:
        self.visits.came(device, self.table, 5.0)

    def mount(self, mount: Mount = MOUNT, *names: str) -> None:
        self.table.append(mount)
        self.visits.mounted({mount: names} if names else {}, self.table, 6.0)

    def unmount(self, mount: Mount = MOUNT) -> None:
        self.table.remove(mount)
        self.visits.mounted({}, self.table, 7.0)

    def cycle(self, name: str, end: CycleEnd = GOOD) -> None:
        self.visits.cycle_started(name)
        self.visits.cycle_ended(name, end)

    def tasks(self) -> list[tuple[Kind, str | None]]:
        return [(task.kind, task.input["node"]) for task in self.visits.take_tasks()]

    @property
    def stages(self) -> list[Stage]:
        return [visit.stage for visit in self.visits]

    @property
    def words(self) -> list[str]:
        return [visit.words for visit in self.visits]


def test_a_drive_comes_and_goes() -> None:
    table = Table()
    table.plug()
    assert table.tasks() == [(Kind.ATTACH, "/dev/sda1")]
    table.mount(MOUNT, "a", "b")
    assert table.tasks() == []
    table.cycle("a")
    table.visits.cycle_started("b")
    assert table.visits.of_entry("b") == "UPDATES"
    assert table.tasks() == []
    table.visits.cycle_ended("b", GOOD)
    (task,) = table.visits.take_tasks()
    assert task.kind is Kind.DETACH
    assert [one["name"] for one in task.input["ends"]] == ["a", "b"]
    assert (task.input["point"], task.input["began"], task.input["lost"]) == (POINT, 5.0, False)
    table.unmount()
    table.visits.detached(POINT, ok=True)
    assert table.words == ["can be pulled out (done)"]
    table.visits.left("/dev/sda1")
    assert table.stages == []
    table.plug()
    assert table.tasks() == [(Kind.ATTACH, "/dev/sda1")]


def test_who_sees_the_light_may_pull_it_out(caplog: pytest.LogCaptureFixture) -> None:
    """The command at the end runs when it is unmounted, and its child has not ended then."""
    table = Table()
    table.plug()
    table.mount(MOUNT, "a")
    table.cycle("a")
    table.unmount()
    table.visits.left("/dev/sda1")
    assert "in the middle" not in caplog.text
    table.visits.detached(POINT, ok=True)
    assert table.stages == []


def test_it_is_visited_once_for_each_time_it_is_plugged_in() -> None:
    table = Table()
    table.plug()
    table.plug()
    table.mount(MOUNT, "a")
    table.plug()
    table.plug(replace(STICK, label="", usage="", uuid=""))
    table.cycle("a")
    table.plug()
    table.unmount()
    table.visits.detached(POINT, ok=True)
    table.plug()
    assert table.tasks() == [(Kind.ATTACH, "/dev/sda1"), (Kind.DETACH, "/dev/sda1")]
    table.plug(replace(STICK, uuid="another card in the same reader"))
    assert table.tasks() == [(Kind.ATTACH, "/dev/sda1")]


def test_a_cycle_that_ran_before_does_not_count() -> None:
    table = Table()
    table.visits.cycle_started("a")
    table.plug()
    table.mount(MOUNT, "a")
    table.visits.cycle_ended("a", GOOD)
    assert table.stages == [Stage.UPDATING]
    assert table.visits.of_entry("a") is None
    table.cycle("a")
    assert table.stages == [Stage.DETACHING]


def test_two_of_the_same_label_come_one_after_the_other() -> None:
    table = Table()
    table.plug()
    table.plug(TWIN)
    assert table.tasks() == [(Kind.ATTACH, "/dev/sda1")]
    assert table.stages == [Stage.ATTACHING, Stage.WAITING]
    table.mount(MOUNT, "a")
    table.cycle("a")
    table.unmount()
    table.visits.detached(POINT, ok=False)
    assert table.stages == [Stage.FAILED, Stage.ATTACHING]
    assert table.tasks() == [(Kind.DETACH, "/dev/sda1"), (Kind.ATTACH, "/dev/sdb1")]
    table.visits.left("/dev/sdb1")
    table.visits.not_attached(POINT)
    table.visits.detached(POINT, ok=True)
    assert table.stages == [Stage.FAILED]


def test_one_that_waits_may_leave() -> None:
    table = Table()
    table.plug()
    table.plug(TWIN)
    table.visits.left("/dev/sdb1")
    assert table.stages == [Stage.ATTACHING]


@pytest.mark.parametrize("gone", ["device", "mount", "both"])
def test_pulled_out_in_the_middle(gone: str, caplog: pytest.LogCaptureFixture) -> None:
    table = Table()
    table.plug()
    table.mount(MOUNT, "a", "b")
    table.visits.cycle_started("a")
    if gone != "mount":
        table.visits.left("/dev/sda1")
    if gone != "device":
        table.unmount()
    assert caplog.text.count("pulled out") == 1
    assert table.stages == [Stage.UPDATING]
    table.visits.cycle_ended("a", BAD)
    task = table.visits.take_tasks()[-1]
    assert (task.kind, task.input["lost"]) == (Kind.DETACH, True)
    table.visits.detached(POINT, ok=True)
    assert table.words == (
        [] if gone != "mount" else ["can be pulled out (failed, see the journal)"]
    )


def test_plugged_in_again_before_its_cycle_has_ended() -> None:
    table = Table()
    table.plug()
    table.mount(MOUNT, "a")
    table.visits.cycle_started("a")
    table.unmount()
    table.visits.left("/dev/sda1")
    table.plug()
    assert table.stages == [Stage.UPDATING, Stage.WAITING]
    table.visits.cycle_ended("a", BAD)
    table.visits.detached(POINT, ok=True)
    assert table.stages == [Stage.ATTACHING]
    assert [task.kind for task in table.visits.take_tasks()] == [
        *(Kind.ATTACH, Kind.DETACH, Kind.ATTACH)
    ]


def test_it_cannot_be_mounted() -> None:
    table = Table()
    table.plug()
    table.tasks()
    table.visits.not_attached(POINT)
    assert table.tasks() == [(Kind.DETACH, "/dev/sda1")]
    table.visits.detached(POINT, ok=True)
    assert table.words == ["can be pulled out (failed, see the journal)"]


def test_nobody_has_a_backup_on_it(caplog: pytest.LogCaptureFixture) -> None:
    table = Table()
    table.plug()
    table.table.append(MOUNT)
    table.visits.mounted({MOUNT: ()}, table.table, 6.0)
    assert "no entry has its backupIndex there" in caplog.text
    assert table.stages == [Stage.DETACHING]


def test_whose_entry_is_taken_out_of_the_configuration() -> None:
    table = Table()
    table.plug()
    table.mount(MOUNT, "a")
    table.visits.configure(MediaSettings(labels=("UPDATES",)), ("b",))
    assert table.stages == [Stage.DETACHING]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (replace(STICK, label="HOLIDAY"), ""),
        (replace(STICK, usage="crypto", type="crypto_LUKS"), "no file system but crypto_LUKS"),
        (replace(STICK, usage="", type=""), "no file system but nothing"),
    ],
)
def test_what_is_not_mounted(device: Device, said: str, caplog: pytest.LogCaptureFixture) -> None:
    table = Table()
    table.plug(device)
    assert table.tasks() == []
    assert said in caplog.text


def test_what_somebody_else_mounted_is_his(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    table = Table()
    table.mount(replace(MOUNT, point="/media/pi/UPDATES"))
    table.plug()
    assert table.tasks() == []
    assert "is mounted at /media/pi/UPDATES" in caplog.text


def test_what_an_earlier_start_mounted_is_ours() -> None:
    table = Table()
    table.mount()
    table.plug()
    assert table.tasks() == [(Kind.ATTACH, "/dev/sda1")]
    assert table.visits.is_attaching(POINT)


def test_a_mount_by_hand_is_a_visit_too() -> None:
    table = Table(labels=())
    table.mount(HAND, "a")
    assert table.tasks() == []
    table.cycle("a")
    assert table.tasks() == []
    assert [visit.title for visit in table.visits] == ["usb"]
    assert table.words == ["done"]
    table.unmount(HAND)
    assert table.stages == []


def test_the_commands_run_for_it_too() -> None:
    table = Table(labels=(), on_start="x", on_failure="y")
    table.mount(HAND, "a")
    assert table.tasks() == [(Kind.ATTACH, None)]
    table.cycle("a")
    assert table.tasks() == []
    table.unmount(HAND)
    table.mount(HAND, "a")
    table.cycle("a", BAD)
    assert table.tasks() == [(Kind.ATTACH, None), (Kind.DETACH, None)]
    table.visits.detached("/media/usb", ok=True)
    assert table.words == ["failed, see the journal"]

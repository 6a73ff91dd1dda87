"""Block devices that come and go, as udev tells: their nodes and their file systems' labels.

libudev is asked through its C interface (libudev(3)); it is on every system with udev. Only
udev knows labels: the kernel's own messages have none.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from casync_updater.drives.visits import Device
from casync_updater.errors import LocalError

_CONTROL = Path("/run/udev/control")
_ENCODED = re.compile(rb"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Heard:
    """A device came or changed, or, where there is none, this node is gone."""

    node: str
    device: Device | None


class Devices:
    """Listens to udev, from the moment it is made."""

    def __init__(self) -> None:
        """Begin to listen.

        Raises:
            LocalError: there is no udev here.
        """
        if not _CONTROL.exists():
            raise LocalError("drives cannot be mounted by their labels: there is no udev here")
        try:
            self._lib = _library()
        except (OSError, AttributeError) as error:
            raise LocalError(f"libudev cannot be used: {error}") from error
        self._udev = self._lib.udev_new()
        self._monitor = self._lib.udev_monitor_new_from_netlink(self._udev, b"udev")
        if not self._monitor:
            raise LocalError("udev cannot be listened to")
        self._lib.udev_monitor_filter_add_match_subsystem_devtype(self._monitor, b"block", None)
        self._lib.udev_monitor_enable_receiving(self._monitor)

    def fileno(self) -> int:
        """Readable when there is something for `heard`."""
        return int(self._lib.udev_monitor_get_fd(self._monitor))

    def close(self) -> None:
        """Listen no longer."""
        self._lib.udev_monitor_unref(self._monitor)
        self._lib.udev_unref(self._udev)

    def heard(self) -> Iterator[Heard]:
        """What happened since the last call; the descriptor does not block."""
        while pointer := self._lib.udev_monitor_receive_device(self._monitor):
            with self._kept(pointer):
                node = os.fsdecode(self._lib.udev_device_get_devnode(pointer) or b"")
                action = self._lib.udev_device_get_action(pointer)
                gone = action == b"remove"
                yield Heard(node, None if gone else self._device(pointer, node))

    def there(self) -> Iterator[Device]:
        """Every block device that is there now, as far as udev has looked at it."""
        lib = self._lib
        enumerate_ = lib.udev_enumerate_new(self._udev)
        try:
            lib.udev_enumerate_add_match_subsystem(enumerate_, b"block")
            lib.udev_enumerate_add_match_is_initialized(enumerate_)
            lib.udev_enumerate_scan_devices(enumerate_)
            item = lib.udev_enumerate_get_list_entry(enumerate_)
            while item:
                path = lib.udev_list_entry_get_name(item)
                pointer = lib.udev_device_new_from_syspath(self._udev, path)
                if pointer:
                    with self._kept(pointer):
                        node = os.fsdecode(lib.udev_device_get_devnode(pointer) or b"")
                        yield self._device(pointer, node)
                item = lib.udev_list_entry_get_next(item)
        finally:
            lib.udev_enumerate_unref(enumerate_)

    @contextlib.contextmanager
    def _kept(self, pointer: int) -> Iterator[None]:
        try:
            yield
        finally:
            self._lib.udev_device_unref(pointer)

    def _device(self, pointer: int, node: str) -> Device:
        label, usage, type_, uuid = (
            self._lib.udev_device_get_property_value(pointer, name) or b""
            for name in (b"ID_FS_LABEL_ENC", b"ID_FS_USAGE", b"ID_FS_TYPE", b"ID_FS_UUID_ENC")
        )
        number = self._lib.udev_device_get_devnum(pointer)
        return Device(
            node,
            f"{os.major(number)}:{os.minor(number)}",
            decoded(label),
            *(os.fsdecode(value) for value in (usage, type_, uuid)),
        )


def decoded(label: bytes) -> str:
    r"""A label as it was given, from udev's ``ID_FS_LABEL_ENC`` (``\x20`` for a space)."""
    return os.fsdecode(_ENCODED.sub(lambda found: bytes.fromhex(found[1].decode()), label))


def _library() -> ctypes.CDLL:
    lib = ctypes.CDLL("libudev.so.1")
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    calls = {
        "udev_new": (pointer,),
        "udev_unref": (pointer, pointer),
        "udev_monitor_new_from_netlink": (pointer, pointer, text),
        "udev_monitor_filter_add_match_subsystem_devtype": (number, pointer, text, text),
        "udev_monitor_enable_receiving": (number, pointer),
        "udev_monitor_get_fd": (number, pointer),
        "udev_monitor_receive_device": (pointer, pointer),
        "udev_monitor_unref": (pointer, pointer),
        "udev_device_get_devnode": (text, pointer),
        "udev_device_get_devnum": (ctypes.c_ulong, pointer),
        "udev_device_get_action": (text, pointer),
        "udev_device_get_property_value": (text, pointer, text),
        "udev_device_new_from_syspath": (pointer, pointer, text),
        "udev_device_unref": (pointer, pointer),
        "udev_enumerate_new": (pointer, pointer),
        "udev_enumerate_add_match_subsystem": (number, pointer, text),
        "udev_enumerate_add_match_is_initialized": (number, pointer),
        "udev_enumerate_scan_devices": (number, pointer),
        "udev_enumerate_get_list_entry": (pointer, pointer),
        "udev_enumerate_unref": (pointer, pointer),
        "udev_list_entry_get_name": (text, pointer),
        "udev_list_entry_get_next": (pointer, pointer),
    }
    for name, (result, *arguments) in calls.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib

"""Mounting and unmounting drives through systemd, which lives outside of the service's sandbox.

A mount that systemd made ends with its device: who pulls a drive out leaves nothing behind.
"""

import errno
import os
import shutil
from pathlib import Path

from casync_updater.clock import Clock
from casync_updater.errors import LocalError
from casync_updater.tools import process

OPTIONS = ("nosuid", "nodev", "noexec", "x-systemd.device-bound")
"""The last one makes systemd unmount it when the device is gone, see systemd.mount(5)."""

_LIMIT = 180.0
"""Seconds. A journal that is replayed takes its time, and a drive that fails even more."""

_PATIENCE = 10.0
"""Seconds that others have to let go of an unmounted drive."""


def mount(node: str, point: Path) -> None:
    """Mount a device, read-only where it is write-protected.

    There is no check of the file system before: it could write to a drive of somebody else.

    Raises:
        LocalError: there is no systemd, or it cannot be mounted.
    """
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemd-mount") is None:
        raise LocalError("drives are mounted through systemd, which does not run here")
    process.run(
        [
            *("systemd-mount", "--no-ask-password", "--collect", "--fsck=no"),
            f"--options={','.join(OPTIONS)}",
            "--property=LazyUnmount=yes",
            f"--description=casync-updater: drive at {point}",
            *("--", node, str(point)),
        ],
        timeout=_LIMIT,
    )


def unmount(point: Path) -> None:
    """Take a mount away, whoever still looks at it.

    Raises:
        LocalError: systemd cannot do it.
    """
    process.run(["systemd-mount", "--quiet", "--umount", "--", str(point)], timeout=_LIMIT)


def is_free(node: str, clock: Clock) -> bool:
    """Whether nothing uses a device: no other mount, in no namespace, and no mapping.

    The kernel gives a block device for exclusive use only then (open(2), O_EXCL). A device that
    is gone is free.
    """
    end = clock.monotonic() + _PATIENCE
    while True:
        try:
            os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.EBUSY:
                return True
        else:
            return True
        if clock.monotonic() >= end:
            return False
        clock.sleep(0.1)

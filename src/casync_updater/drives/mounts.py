"""The mount table, ``/proc/self/mountinfo`` as proc_pid_mountinfo(5) describes it; all of it pure.

A file system has appeared for a path when another mount holds the path than before, and that
mount was not in the table before: what an unmounting only uncovers has not appeared.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

_ESCAPED = re.compile(rb"\\([0-7]{3})")
_FAR = ("autofs", "nfs", "cifs", "smb", "9p", "ceph", "fuse")
"""How the types begin of what may be out of reach, or be mounted by whoever looks at it."""
_LINKS = 40


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table.

    Two equal ones are the same mount, but for one that was taken away and made again, at the
    same place and of the same device, before the table was read: numbers are used again.
    """

    number: int
    parent: int
    device: str
    """Major and minor number of the file system, ``8:17``."""
    root: str
    """Which of its folders is mounted."""
    point: str
    type: str
    source: str
    """What was mounted: a device node, usually."""


Table = Sequence[Mount]


def parse(data: bytes) -> tuple[Mount, ...]:
    """Read the table; lines that are none are left out."""
    return tuple(mount for line in data.splitlines() if (mount := _mount(line)) is not None)


def _mount(line: bytes) -> Mount | None:
    head, separator, tail = line.partition(b" - ")
    fields, rest = head.split(b" "), tail.split(b" ")
    if not separator or len(fields) < 6:
        return None
    try:
        number, parent = int(fields[0]), int(fields[1])
    except ValueError:
        return None
    root, point = (_plain(field) for field in fields[3:5])
    type_, source = (_plain(field) for field in [*rest, b"", b""][:2])
    return Mount(number, parent, os.fsdecode(fields[2]), root, point, type_, source)


def _plain(field: bytes) -> str:
    """Space, tab, newline and backslash stand as octal numbers."""
    return os.fsdecode(_ESCAPED.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field))


def holder(table: Table, path: str) -> Mount | None:
    """The mount that holds an absolute path without symbolic links and dots.

    As the kernel walks: from the root into what is mounted on the way. What a later mount on a
    folder above hides is not met, although its point is a longer part of the path.
    """
    numbers = {mount.number for mount in table}
    inner = [mount for mount in table if is_below(path, mount.point)]
    tops = [mount for mount in inner if mount.parent not in numbers]
    current = min(tops, key=lambda mount: len(mount.point), default=None)
    while current is not None:
        here = current.number
        next_ones = [mount for mount in inner if mount.parent == here != mount.number]
        if not next_ones:
            break
        current = min(next_ones, key=lambda mount: len(mount.point))
    return current


def is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def resolve(
    path: str, table: Table, trusted: Iterable[Mount], read_link: Callable[[str], str]
) -> str:
    """Follow the symbolic links of a path, and touch no drive with that.

    Looking into a file system can take as long as it likes: a drive that fails, a server that
    is gone. So from where the way enters one that is not trusted, the path stands as it is.

    Args:
        path: absolute.
        table: the mounts.
        trusted: those that may be looked into.
        read_link: `os.readlink`.
    """
    near = {mount for mount in trusted if not mount.type.startswith(_FAR)}
    done, rest = "", [*reversed(os.path.normpath(path).split("/"))]
    links = 0
    while rest:
        name = rest.pop()
        if name in ("", "."):
            continue
        if name == "..":
            done = done.rpartition("/")[0]
            continue
        step = f"{done}/{name}"
        if holder(table, step) not in near:
            return os.path.normpath("/".join([step, *reversed(rest)]))
        try:
            target = read_link(step)
        except OSError:
            done = step
            continue
        links += 1
        if links > _LINKS:
            return os.path.normpath(path)
        rest += reversed(target.split("/"))
        done = "" if target.startswith("/") else done
    return done or "/"


def appeared(old: Table, new: Table, places: Mapping[str, str]) -> dict[Mount, tuple[str, ...]]:
    """Which file systems appeared, and for whom.

    Args:
        old: the mounts before.
        new: the mounts now.
        places: the path of each name, resolved.

    Returns:
        Each mount that holds the place of a name and is new, with these names. An automounter's
        own mount (autofs) is none: what it stands for appears when it is mounted.
    """
    before = set(old)
    found: dict[Mount, tuple[str, ...]] = {}
    for name, path in places.items():
        mount = holder(new, path)
        if mount is not None and mount not in before and mount.type != "autofs":
            found[mount] = (*found.get(mount, ()), name)
    return found

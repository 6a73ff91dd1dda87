"""What differs between two versions: what triggers and `check` go by."""

import stat
from collections.abc import Iterator

from casync_updater.formats.archive import ENTRY, HEADER, PERMISSIONS, UIDS
from casync_updater.formats.record import END, FILE, Record
from casync_updater.model import Changes


def differs(old: bytes, new: bytes, name: bytes, old_flags: int, new_flags: int) -> bool:
    """Whether two nodes of the same name differ in more than their time (and their content).

    Args:
        old: the old node's own bytes (`archive.Node.raw`).
        new: those of the new one.
        name: the name of both; empty for the root.
        old_flags: the features of the old archive.
        new_flags: those of the new one; metadata that only one of them carries is not compared.
    """
    entry = HEADER.size + len(name) + 1 if name else 0
    end = entry + ENTRY.size
    if old[end:] != new[end:]:
        return True
    old_mode, _, *old_owner = ENTRY.unpack_from(old, entry)[3:7]
    new_mode, _, *new_owner = ENTRY.unpack_from(new, entry)[3:7]
    flags = old_flags & new_flags
    if old_mode != new_mode and (
        flags & PERMISSIONS or stat.S_IFMT(old_mode) != stat.S_IFMT(new_mode)
    ):
        return True
    both_owned = bool(old_flags & UIDS) and bool(new_flags & UIDS)
    return both_owned and old_owner != new_owner


def changes(old: Record, new: Record) -> Changes:
    """Compare two records, without their trees; memory grows with the difference only."""
    found: dict[str, list[bytes]] = {"added": [], "changed": [], "removed": []}
    for what, path in _merge(old, new):
        found[what].append(path)
    return Changes(**{what: tuple(sorted(paths)) for what, paths in found.items()})


def _merge(old: Record, new: Record) -> Iterator[tuple[str, bytes]]:
    """Go through both at once; names in a directory rise in both."""
    if _changed(old, new, 0, 0, b""):
        yield "changed", b"."
    left = right = 1
    while right < len(new):
        if old.kinds[left] == END and new.kinds[right] == END:
            left, right = left + 1, right + 1
            continue
        left_name = None if old.kinds[left] == END else old.name(left)
        right_name = None if new.kinds[right] == END else new.name(right)
        if right_name is None or (left_name is not None and left_name < right_name):
            yield from _all(old, left, "removed")
            left += old.spans[left]
        elif left_name is None or right_name < left_name:
            yield from _all(new, right, "added")
            right += new.spans[right]
        elif old.kinds[left] != new.kinds[right]:
            yield "changed", new.path(right)
            yield from _all(old, left + 1, "removed", left + old.spans[left])
            yield from _all(new, right + 1, "added", right + new.spans[right])
            left, right = left + old.spans[left], right + new.spans[right]
        else:
            if _changed(old, new, left, right, right_name):
                yield "changed", new.path(right)
            left, right = left + 1, right + 1


def _changed(old: Record, new: Record, left: int, right: int, name: bytes) -> bool:
    if differs(old.raw(left), new.raw(right), name, old.index.flags, new.index.flags):
        return True
    return old.kinds[left] == FILE and old.digest(left) != new.digest(right)


def _all(
    record: Record, first: int, what: str, last: int | None = None
) -> Iterator[tuple[str, bytes]]:
    end = first + record.spans[first] if last is None else last
    for node in range(first, end):
        if record.kinds[node] != END:
            yield what, record.path(node)

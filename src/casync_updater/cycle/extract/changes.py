"""What differs between two versions: what triggers and `check` go by."""

import stat

from casync_updater.formats.archive import ENTRY, HEADER, PERMISSIONS, UIDS


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

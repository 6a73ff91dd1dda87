"""What an update takes: which chunks are in the old tree, and which have to be fetched."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from casync_updater.cycle.extract.leftover import Leftover
from casync_updater.cycle.extract.tree import UNKNOWN, trust
from casync_updater.formats.archive import unsupported
from casync_updater.formats.index import Index
from casync_updater.formats.record import FILE, Record, Window
from casync_updater.model import ChunkRef

_ITEM = 40
FETCH, LEFT_OVER = -1, -2


def supported(index: Index) -> str | None:
    """Why this project leaves an archive to casync; None where it extracts it itself."""
    names = unsupported(index.flags)
    return f"casync extracts archives with {', '.join(names)}" if names else None


@dataclass(frozen=True, slots=True)
class Old:
    """The installed tree that an update starts from."""

    record: Record
    root: int
    """An open descriptor of the tree's root; the plan's owner keeps it open."""
    trust: bytearray
    ends: array[int]
    """Where each chunk of its index ends."""

    def start(self, number: int) -> int:
        """Where a chunk begins in the old stream."""
        return self.ends[number - 1] if number else 0


@dataclass(frozen=True, slots=True)
class ExtractPlan:
    """The decision about every chunk of the new index, made before anything is fetched."""

    index: Index
    old: Old | None
    ends: array[int]
    """Where each chunk ends in the stream."""
    local: array[int]
    """Which chunk of the old index has the same bytes, for each chunk. -1: it is fetched; -2: an
    earlier try left it over."""
    leftovers: tuple[Leftover, ...]
    repeats: dict[bytes, int]
    """Ids that are fetched once and needed more often: how often after the first time."""
    fetch_bytes: int
    """Bytes of the chunks that are fetched, uncompressed."""
    write_bytes: int
    """About how many bytes of file content are written: what is fetched or copied from what was
    left over, and old files around."""

    def refs(self) -> Iterator[ChunkRef]:
        """The chunks to fetch, each once, in the order they are needed in."""
        seen = set()
        for number, local in enumerate(self.local):
            if local == FETCH:
                chunk_id = self.id(number)
                if chunk_id not in self.repeats:
                    yield self.ref(number)
                elif chunk_id not in seen:
                    seen.add(chunk_id)
                    yield self.ref(number)

    def id(self, number: int) -> bytes:
        """A chunk's id."""
        return chunk_id(self.index, number)

    def start(self, number: int) -> int:
        """Where a chunk begins in the stream."""
        return self.ends[number - 1] if number else 0

    def run_end(self, number: int) -> int:
        """The last chunk of the run that this one is in: chunks that follow in both streams."""
        local, last = self.local, len(self.local) - 1
        while number < last and local[number] >= 0 and local[number + 1] == local[number] + 1:
            number += 1
        return number

    def ref(self, number: int) -> ChunkRef:
        """A chunk, as sources are asked for it."""
        start = self.start(number)
        return ChunkRef(self.id(number), start, self.ends[number] - start)


def chunk_id(index: Index, number: int) -> bytes:
    """The id of a chunk of an index."""
    return index.table[number * _ITEM + 8 : (number + 1) * _ITEM]


def chunk_ends(index: Index) -> array[int]:
    """Where each chunk of an index ends."""
    words = array("Q", index.table)
    return words[:: _ITEM // 8]


def plan_extract(
    new: Index,
    old: Record | None,
    root: int,
    *,
    windows: tuple[Window, ...] = (),
    leftovers: tuple[Leftover, ...] = (),
) -> ExtractPlan:
    """Compare a new index with what is installed.

    Args:
        new: an index that `supported` has nothing against.
        old: the record of what is installed; None where nothing is.
        root: an open descriptor of the installed tree; it must stay open until the new tree is
            built. Not used without a record.
        windows: the times of our own operations on the installed tree, see `formats.record`.
        leftovers: what earlier tries left, for this index or another one.
    """
    ends = chunk_ends(new)
    installed = (
        None if old is None else Old(old, root, trust(old, root, windows), chunk_ends(old.index))
    )
    local = array("i", [FETCH]) * len(new)
    rewritten = 0
    if installed is not None and installed.record.index.hash_name == new.hash_name:
        rewritten = _map(new, ends, installed, local)
    fetch_bytes = left_bytes = 0
    repeats: dict[bytes, int] = {}
    seen: set[bytes] = set()
    begin = 0
    for number, end in enumerate(ends):
        if local[number] == FETCH:
            name = chunk_id(new, number)
            if any(name in leftover.chunks for leftover in leftovers):
                local[number] = LEFT_OVER
                left_bytes += end - begin
            elif name in seen:
                repeats[name] = repeats.get(name, 0) + 1
            else:
                seen.add(name)
                fetch_bytes += end - begin
        begin = end
    write_bytes = fetch_bytes + left_bytes + rewritten
    return ExtractPlan(new, installed, ends, local, leftovers, repeats, fetch_bytes, write_bytes)


def _map(new: Index, ends: array[int], old: Old, local: array[int]) -> int:
    """Find the chunks that the old tree has; bytes of old files that are probably rewritten.

    An id that occurs several times is taken where the chunk before it was taken, so that runs
    stay runs.
    """
    index = old.record.index
    old_ends = old.ends
    usable = _usable(old, old_ends)
    first: dict[bytes, int] = {}
    for number in range(len(index) - 1, -1, -1):
        if usable[number]:
            first[chunk_id(index, number)] = number
    used = bytearray(len(index))
    table, old_table = new.table, index.table
    begin = previous = 0
    for number, end in enumerate(ends):
        key = table[number * _ITEM + 8 : (number + 1) * _ITEM]
        found = previous
        if not (
            found < len(usable)
            and usable[found]
            and old_table[found * _ITEM + 8 : (found + 1) * _ITEM] == key
        ):
            found = first.get(key, FETCH)
        # Equal ids are equal bytes; an index that gives them two sizes is not believed.
        if found != FETCH and end - begin == old_ends[found] - (
            old_ends[found - 1] if found else 0
        ):
            local[number] = found
            used[found] = 1
            previous = found + 1
        begin = end
    return _half_used(old.record, old_ends, used)


def _usable(old: Old, ends: array[int]) -> bytearray:
    """The old chunks that the tree still has: those without a file that is not trusted."""
    record = old.record
    usable = bytearray(b"\1") * len(ends)
    position = old.trust.find(UNKNOWN)
    while position >= 0:
        if record.kinds[position] == FILE:
            start, end = record.content(position)
            if end > start:
                low, high = chunk_at(ends, start), chunk_at(ends, end - 1)
                usable[low : high + 1] = bytes(high + 1 - low)
        position = old.trust.find(UNKNOWN, position + 1)
    return usable


def chunk_at(ends: array[int], position: int) -> int:
    """The chunk that this offset of the stream lies in."""
    return bisect_right(ends, position)


def _half_used(record: Record, ends: array[int], used: bytearray) -> int:
    """Bytes of the old files of which the new stream has one part and lacks another."""
    total = 0
    position = used.find(0)
    last = -1
    while position >= 0:
        start = ends[position - 1] if position else 0
        for node in range(max(record.at(start), last + 1), record.at(ends[position] - 1) + 1):
            last = node
            if record.kinds[node] == FILE:
                total += record.size(node)
        position = used.find(0, position + 1)
    return total

"""Builds with casync, beside the destination or in it: what the own extractor leaves to it.

These are destinations that are updated in place, files and devices, and archives with metadata
that the own extractor does not know (`extract.supported`).

casync gets a private local store, filled through the chunks interface, and the installed tree
as seed; it never reads from the network. Chunks that an interrupted try left in the store are
not fetched again.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from casync_updater import syscalls
from casync_updater.cycle.staging import make_staging, remove
from casync_updater.cycle.tree import carry_over, cut
from casync_updater.cycle.values import Offer, Plan, Staged
from casync_updater.errors import ContentError, LocalError, RemoteError
from casync_updater.files import named
from casync_updater.formats import index as index_format
from casync_updater.formats.store import LocalStore, content, file_limit
from casync_updater.model import Apply, ChunkRef, Monitor, Progress
from casync_updater.sources.base import Chunks
from casync_updater.tools import casync
from casync_updater.tools.process import ProgramError


class CasyncBuilder:
    """Lets casync extract from chunks that this project fetched."""

    def __init__(self, spool: Path, monitor: Monitor, lock: int) -> None:
        """Nothing happens yet.

        Args:
            spool: the private store.
            monitor: told how many bytes of chunks are there.
            lock: the entry's lock, which casync holds as long as it runs.
        """
        self._spool = spool
        self._monitor = monitor
        self._lock = lock

    def build(self, plan: Plan, chunks: Chunks, begin: Callable[[], None]) -> Staged:
        """See `Builder.build`.

        Raises:
            LocalError: casync failed.
            ContentError: a chunk is damaged everywhere.
            RemoteError: a chunk cannot be had.
        """
        store = self._prepared_store(plan.offer)
        if plan.site.apply is Apply.IN_PLACE and not plan.offer.is_archive:
            return self._patch(plan, store, chunks, begin)
        wanted = plan.fetch
        if plan.old is None and plan.site.destination.exists():
            wanted = self._without_local(plan, store)
        self._fill(store, wanted, chunks)
        target = plan.site.destination
        if plan.site.apply is Apply.ATOMIC:
            make_staging(plan.site)
            target = plan.site.new
            remove(target)
        else:
            begin()
        with _explained(target):
            try:
                self._extract(plan, target)
            except ProgramError:
                # The record of the last install was wrong about the destination: a file in it was
                # changed or is unreadable. What is really there is looked up, the rest is fetched.
                everything = tuple({ref.id: ref for ref in plan.offer.index}.values())
                lacking = self._without_local(replace(plan, fetch=everything), store)
                if not lacking:
                    raise
                self._fill(store, lacking, chunks)
                self._extract(plan, target)
        if plan.site.apply is Apply.ATOMIC:
            destination = plan.site.destination
            carry_over(
                target,
                destination if destination.exists() else None,
                parent=destination.parent,
                features=plan.offer.index.features if plan.offer.is_archive else (),
            )
        return Staged(plan)

    def _patch(
        self, plan: Plan, store: LocalStore, chunks: Chunks, begin: Callable[[], None]
    ) -> Staged:
        """Write the chunks of a file or device that differ, each where it belongs.

        casync takes the very file that it writes to as a seed, and gives up ("Stale file
        handle") once it has changed something in it that it meant to read.
        """
        target, index = plan.site.destination, plan.offer.index
        differing = list(index)
        if target.exists():
            pieces = cut(target, index)
            differing = [r for r, data in pieces if r.size and index.chunk_id(data) != r.id]
        wanted = tuple({ref.id: ref for ref in differing}.values())
        if not {ref.id for ref in wanted} <= {ref.id for ref in plan.fetch}:
            # Some are elsewhere in it, or were until somebody wrote there.
            wanted = self._without_local(replace(plan, fetch=wanted), store)
        self._fill(store, wanted, chunks)
        begin()
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                for ref in differing:
                    raw = store.read(ref.hex, file_limit(ref.size))
                    file.seek(ref.start)
                    file.write(content(raw, ref, index, ref.hex))
                if target.is_file():
                    file.truncate(index.size)
                file.flush()
                # What syncs the file system that a device's node is in does not sync the device.
                os.fsync(descriptor)
        except OSError as error:
            raise LocalError(f"{target} cannot be written: {error.strerror}") from error
        return Staged(plan)

    def _prepared_store(self, offer: Offer) -> LocalStore:
        """The private store, without chunks of other versions, and without damaged ones.

        Chunks are not synced one by one: after a power cut a file may be empty.
        """
        self._spool.mkdir(parents=True, exist_ok=True)
        for left in self._spool.parent.iterdir():
            if left != self._spool:
                remove(left)
        store = LocalStore(self._spool)
        wanted = {ref.hex: ref for ref in offer.index}
        for file in self._spool.glob("*/*"):
            ref = wanted.get(file.stem)
            try:
                if ref is None:
                    raise ContentError(f"{file} is of another version")
                raw = store.read(ref.hex, file_limit(ref.size))
                content(raw, ref, offer.index, str(file))
            except (ContentError, RemoteError):
                file.unlink()
        return store

    def _fill(self, store: LocalStore, wanted: Iterable[ChunkRef], chunks: Chunks) -> None:
        missing = tuple(ref for ref in wanted if not store.has(ref.hex))
        total = sum(ref.size for ref in missing)
        done = 0
        self._monitor.progress(Progress(done, total))
        for ref, data in chunks.stream(missing):
            store.put(ref.hex, data, compressed=False)
            done += ref.size
            self._monitor.progress(Progress(done, total))

    def _without_local(self, plan: Plan, store: LocalStore) -> tuple[ChunkRef, ...]:
        """What is left to fetch after the destination itself was cut into chunks.

        Used where no record says what the destination holds (an image brought it along, or it
        was changed by hand). The chunks that are of use go into the private store.
        """
        site, index = plan.site, plan.offer.index
        with TemporaryDirectory(dir=self._spool.parent, prefix="seed-") as name:
            found = LocalStore(Path(name) / "seed.castr")
            seed = Path(name) / ("seed.caidx" if plan.offer.is_archive else "seed.caibx")
            casync.make(
                seed,
                site.destination,
                store=found.path,
                flags=index.flags,
                chunk_size=index.chunk_size_option,
            )
            have = {ref.id: ref for ref in index_format.parse(seed.read_bytes(), str(seed))}
            lacking = []
            for ref in plan.fetch:
                if ref.id in have:
                    if not store.has(ref.hex):
                        raw = found.read(ref.hex, file_limit(ref.size))
                        store.put(ref.hex, raw, compressed=True)
                else:
                    lacking.append(ref)
        return tuple(lacking)

    def _extract(self, plan: Plan, target: Path) -> None:
        site, offer = plan.site, plan.offer
        suffix = ".caidx" if offer.is_archive else ".caibx"
        index = self._spool.with_suffix(suffix)
        with named(index):
            index.write_bytes(offer.index_bytes)
        in_place = site.apply is Apply.IN_PLACE
        seed = site.new if in_place else site.destination
        seeds = (seed,) if seed.exists() else ()
        try:
            casync.extract(
                index,
                target,
                store=self._spool,
                flags=offer.index.flags,
                seeds=seeds,
                keep_fds=(self._lock,),
                temporary=self._spool.parent,
            )
        except OSError as error:
            raise LocalError(f"{target}: {error.strerror}") from error
        finally:
            index.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Say where, which casync does not; and name what is immutable, which nobody thinks of."""
    try:
        yield
    except ProgramError as error:
        message = f"{target}: {error}"
        for node in (target, *target.rglob("*")):
            if not node.is_symlink() and syscalls.is_unchangeable(node):
                message += f"; {node} is immutable or append-only: chattr -ia {node}"
                break
        raise LocalError(message) from error

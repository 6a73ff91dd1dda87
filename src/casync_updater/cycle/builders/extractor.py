"""Builds an archive's tree with the project's own extractor, beside the destination."""

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

from casync_updater.cycle.extract import Leftover, extract
from casync_updater.cycle.staging import Site, make_staging, remove
from casync_updater.cycle.values import Plan, Staged
from casync_updater.errors import LocalError
from casync_updater.formats.index import Index
from casync_updater.model import Monitor
from casync_updater.sources.base import Chunks


def _journal(tree: Path) -> Path:
    """Beside a staged tree that is not finished: what a next try needs to use it."""
    return tree.with_name(f"{tree.name}.journal")


def leftovers(site: Site, index: Index, stack: contextlib.ExitStack) -> tuple[Leftover, ...]:
    """What earlier tries left in the staging folder, put aside for the next one.

    A try that is cut off before it has copied what the one before it left must not cost that, so
    all stay that have something which the others have not. A try for the same index leaves a
    longer or a shorter beginning of the same stream: there one stays.

    Args:
        site: the destination.
        index: what is to be built.
        stack: closes what is opened, when the new tree is built.

    Raises:
        LocalError: something cannot be put aside.
    """
    try:
        _put_aside(site)
    except OSError as error:
        raise LocalError(f"{site.staging} cannot be used: {error.strerror}") from error
    sizes = {ref.id: ref.size for ref in index}
    found = []
    for tree in site.staging.glob(f"{_LEFT}*"):
        if not tree.is_dir():
            continue
        root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, root)
        leftover = Leftover(_journal(tree), root)
        stack.callback(leftover.close)
        found.append((sizes.keys() & leftover.chunks.keys(), tree, leftover))
    found.sort(key=lambda item: sum(sizes[chunk] for chunk in item[0]), reverse=True)
    known: set[bytes] = set()
    stay = []
    for chunks, tree, leftover in found:
        if chunks <= known:
            remove(tree)
            remove(_journal(tree))
        else:
            known |= chunks
            stay.append(leftover)
    return tuple(stay)


def leftover_files(site: Site) -> tuple[Path, ...]:
    """What `leftovers` looks at."""
    return (site.new, _journal(site.new), *site.staging.glob(f"{_LEFT}*"))


def _put_aside(site: Site) -> None:
    """Give the tree that was cut off, if there is one, a name of its own.

    The journal follows its tree: a kill between the two leaves it alone where the tree was, and
    the tree without one.
    """
    journal = _journal(site.new)
    if not journal.exists():
        return
    trees = [tree for tree in site.staging.glob(f"{_LEFT}*") if tree.is_dir()]
    alone = [tree for tree in trees if not _journal(tree).exists()]
    if site.new.is_dir():
        names = (site.staging / f"{_LEFT}{number}" for number in itertools.count())
        alone = [next(name for name in names if name not in trees)]
        site.new.rename(alone[0])
    if alone:
        journal.rename(_journal(alone[0]))
    else:
        remove(journal)


_LEFT = "left-"


class ExtractBuilder:
    """Takes over what did not change, and writes the rest from verified chunks."""

    def __init__(self, monitor: Monitor) -> None:
        """Nothing happens yet.

        Args:
            monitor: told how many bytes of the archive stand.
        """
        self._monitor = monitor

    def build(self, plan: Plan, chunks: Chunks, _begin: Callable[[], None]) -> Staged:
        """See `Builder.build`; the destination itself is never written to.

        Raises:
            ContentError: the archive, or a chunk of it, is not what it should be.
            LocalError: this machine is in the way.
            RemoteError: a chunk cannot be had.
        """
        assert plan.extract is not None
        site = plan.site
        make_staging(site)
        remove(site.new)
        try:
            site.new.mkdir(mode=0o700)
            # A first install has no old root to take the owner from: it is the parent's, which
            # new nodes inherit.
            parent = site.destination.parent.stat()
            with contextlib.suppress(PermissionError):
                os.chown(site.new, parent.st_uid, parent.st_gid)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            journal = os.open(_journal(site.new), flags, 0o600)
            try:
                root = os.open(site.new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    built = extract(
                        plan.extract, chunks, root, journal=journal, progress=self._monitor.progress
                    )
                finally:
                    os.close(root)
            finally:
                os.close(journal)
        except LocalError as error:
            raise type(error)(f"{site.destination}: {error}") from error
        except OSError as error:
            raise LocalError(f"{site.new} cannot be built: {error.strerror}") from error
        # A tree with a journal is one that was cut off: this one is whole.
        remove(_journal(site.new))
        return Staged(plan, built)

"""Builds an archive's tree with the project's own extractor, beside the destination."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from casync_updater.cycle.extract import Leftover, extract
from casync_updater.cycle.staging import Site, make_staging, remove
from casync_updater.cycle.values import Plan, Staged
from casync_updater.errors import LocalError
from casync_updater.model import Monitor
from casync_updater.sources.base import Chunks


def _journal(tree: Path) -> Path:
    """Beside a staged tree that is not finished: what a next try needs to use it."""
    return tree.with_name(f"{tree.name}.journal")


def leftovers(site: Site, stack: contextlib.ExitStack) -> tuple[Leftover, ...]:
    """What an earlier try left in the staging folder, put aside for the next one.

    Args:
        site: the destination.
        stack: closes what is opened, when the new tree is built.

    Raises:
        LocalError: it cannot be put aside.
    """
    left = site.staging / "left"
    if site.new.is_dir() and _journal(site.new).exists():
        remove(left)
        remove(_journal(left))
        try:
            _journal(site.new).rename(_journal(left))
            site.new.rename(left)
        except OSError as error:
            raise LocalError(f"{site.staging} cannot be used: {error.strerror}") from error
    if not left.is_dir():
        return ()
    tree = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, tree)
    found = Leftover(_journal(left), tree)
    stack.callback(found.close)
    return (found,)


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
        except OSError as error:
            raise LocalError(f"{site.new} cannot be built: {error.strerror}") from error
        # A tree with a journal is one that was cut off: this one is whole.
        remove(_journal(site.new))
        return Staged(plan, built)

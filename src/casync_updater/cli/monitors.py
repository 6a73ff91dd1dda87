"""Shows what a cycle does: a progress bar on a terminal, plain lines elsewhere."""

import sys
from typing import Any

from casync_updater.model import Monitor, Progress, Step

_WORDS = {
    Step.RECOVER: "looking at what was left",
    Step.CHECK: "checking",
    Step.PLAN: "planning",
    Step.BUILD: "building",
    Step.VERIFY: "verifying",
    Step.COMMIT: "committing",
    Step.ACT: "running actions",
    Step.MIRROR: "refreshing the backup",
}


def monitor_for(name: str, *, quiet: bool) -> Monitor:
    """The monitor that fits standard error."""
    if sys.stderr.isatty() and not quiet:
        return _Terminal(name)
    return _Plain(name, quiet=quiet)


class _Plain:
    """One line for each step that takes time."""

    def __init__(self, name: str, *, quiet: bool) -> None:
        self._name = name
        self._quiet = quiet

    def step(self, step: Step, version: str | None = None) -> None:
        if not self._quiet and version is not None:
            print(f"{self._name}: {_WORDS[step]} {version}", file=sys.stderr)

    def progress(self, progress: Progress) -> None:
        pass


class _Terminal:
    """A bar with bytes, rate and time left (tqdm)."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._label = name
        self._bar: Any = None

    def step(self, step: Step, version: str | None = None) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._label = f"{self._name}: {_WORDS[step]}" + (f" {version}" if version else "")

    def progress(self, progress: Progress) -> None:
        if not progress.total:
            return
        if self._bar is None:
            from tqdm import tqdm  # noqa: PLC0415 - only a terminal needs it

            self._bar = tqdm(
                total=progress.total,
                desc=self._label,
                unit="B",
                unit_scale=True,
                leave=False,
                file=sys.stderr,
            )
        self._bar.update(progress.done - self._bar.n)
        if progress.done >= progress.total:
            self._bar.close()
            self._bar = None

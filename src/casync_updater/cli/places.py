"""The folders that the options before a command name."""

import argparse
from pathlib import Path

_STATE = Path("/var/lib/casync-updater")
_CACHE = Path("/var/cache/casync-updater")


def state_dir(arguments: argparse.Namespace) -> Path:
    """Where the state is kept."""
    return Path(arguments.state_dir or _STATE).absolute()


def cache_dir(arguments: argparse.Namespace) -> Path:
    """Where chunks wait: below the state where only that was named."""
    if arguments.cache_dir is not None:
        return Path(arguments.cache_dir).absolute()
    return _CACHE if arguments.state_dir is None else state_dir(arguments) / "cache"

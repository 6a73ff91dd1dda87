"""``run``: the daemon, in the foreground."""

import argparse
import contextlib
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import casync_updater
from casync_updater.cli.places import state_dir
from casync_updater.clock import Clock, SystemClock
from casync_updater.config.configuration import Configuration, load_configuration
from casync_updater.daemon import Daemon, Watcher
from casync_updater.live import LIVE
from casync_updater.tools.notify import Notifier


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    parser = commands.add_parser(
        "run",
        help="run the daemon",
        description="Keeps every entry up to date until it is told to end (SIGTERM, SIGINT)."
        " SIGHUP makes it read the configuration again.",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        type=Path,
        help="a JSON file, or a directory of *.json; as --config",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the daemon to its end."""
    config: Path = arguments.path or arguments.config
    state = state_dir(arguments)
    # RUNTIME_DIRECTORY is systemd's: memory, which spares an SD card a write a second.
    live = Path(os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or state) / LIVE
    clock = SystemClock()
    with _signals() as signals:
        return Daemon(
            program=_program(arguments, config),
            load=lambda: load_configuration(config, arguments.settings),
            watch=lambda configuration: _watch(configuration, clock),
            state_dir=state,
            live=live,
            signals=signals,
            notifier=Notifier.of(os.environ),
            clock=clock,
            draw=lambda limit: random.uniform(0.0, limit),  # noqa: S311 - spreads load, no secret
        ).run()


def _watch(configuration: Configuration, clock: Clock) -> Watcher:
    # Loaded here, since a daemon that watches nothing shall not carry it.
    from casync_updater.network import Network  # noqa: PLC0415

    return Network(configuration, clock, os.environ)


def _program(arguments: argparse.Namespace, config: Path) -> list[str]:
    """The command line of a child, up to its command."""
    program = [sys.executable]
    if Path(casync_updater.__file__).parents[1] != Path.cwd():
        program.append("-P")  # -m would look for modules in the working directory first
    program += ["-m", "casync_updater", "--config", str(config)]
    for option in ("settings", "state_dir", "cache_dir"):
        value = getattr(arguments, option)
        if value is not None:
            program += [f"--{option.replace('_', '-')}", str(value)]
    return program + ["--verbose"] * arguments.verbose


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that gives the number of each signal that comes while the block lasts."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    numbers = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)

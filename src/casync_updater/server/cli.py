"""The publisher's command line: all entries are tried, and each has its line at the end."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from casync_updater import __version__
from casync_updater.clock import Clock, SystemClock
from casync_updater.config.publications import load_publications
from casync_updater.errors import ConfigError, UpdaterError
from casync_updater.model import Publication
from casync_updater.server import keygen
from casync_updater.server.build import Reporter
from casync_updater.server.publish import Published, Status, publish, resign
from casync_updater.server.signing import passphrase_file

_PROGRAM = "casync-updater-server"
_UMASK = 0o022
_MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Publish what a configuration file lists, or run one of the other commands.

    Returns:
        0 where every entry is published or unchanged, 1 where one is not, 2 where the
        configuration kept all of them from being tried.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if words[:1] == ["keygen"]:
            return keygen.main(_keygen_parser().parse_args(words[1:]))
        if words[:1] == ["resign"]:
            return _for_all(_resign_parser().parse_args(words[1:]), resign)
        return _for_all(_publish_parser().parse_args(words), publish)
    except UpdaterError as error:
        for line in str(error).splitlines():
            print(f"{_PROGRAM}: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; what was published before is as it was", file=sys.stderr)
        return 1


def _publish_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [--json] CONFIG.json\n"
        f"       {_PROGRAM} resign [--json] CONFIG.json\n"
        f"       {_PROGRAM} keygen FOLDER --owner OWNER",
        description="Publish directories, files and block devices as casync indexes and stores."
        " resign renews the dates and signatures of what is published; keygen makes keys.",
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    return _of_entries(parser)


def _resign_parser() -> argparse.ArgumentParser:
    return _of_entries(
        argparse.ArgumentParser(
            prog=f"{_PROGRAM} resign",
            description="Renew the dates and signatures of what is published; content and serial"
            " stay as they are.",
        )
    )


def _of_entries(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("config", type=Path, metavar="CONFIG.json", help="what to publish where")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def _keygen_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{_PROGRAM} keygen",
        description="Make a working key, a spare, and the keyring of both for the devices.",
    )
    keygen.add_arguments(parser)
    return parser


class Work(Protocol):
    """`publish` or `resign`."""

    def __call__(
        self, publication: Publication, clock: Clock, reporter: Reporter, *, passphrase: Path | None
    ) -> Published:
        """Do it for one entry."""


def _for_all(arguments: argparse.Namespace, work: Work) -> int:
    """Do the same for every entry of a configuration; each is tried."""
    # casync and this program create what a web server will read, also under root's umask 077.
    os.umask(_UMASK)
    outcomes = _outcomes(arguments.config, SystemClock(), work)
    if arguments.json:
        print(json.dumps({"entries": [outcome.as_json() for outcome in outcomes]}, indent=2))
    else:
        for outcome in outcomes:
            print(outcome.as_line())
    return _exit_code(outcomes)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an entry went; without an index it is a line about the configuration itself."""

    index: str | None
    messages: tuple[str, ...] = ()
    published: Published | None = None
    error: UpdaterError | None = None

    def as_line(self) -> str:
        """One line for people."""
        name = self.index or "configuration"
        if self.published is None:
            return f"{name}: failed: {self.error}"
        release, usage = self.published.release, self.published.usage
        if self.published.status is Status.UNCHANGED:
            return f"{name}: unchanged, still version {release.version} (serial {release.serial})"
        return (
            f"{name}: {self.published.status} version {release.version} (serial {release.serial}),"
            f" {usage.chunks_new} of {usage.chunks_total} chunks new,"
            f" {usage.bytes_new / _MIB:.1f} of {usage.bytes_total / _MIB:.1f} MiB"
        )

    def as_json(self) -> dict[str, Any]:
        """The entry's part of the JSON object; sizes are bytes in the store."""
        entry: dict[str, Any] = {"index": self.index, "messages": list(self.messages)}
        if self.published is None:
            return {**entry, "status": "failed", "error": str(self.error)}
        release, usage = self.published.release, self.published.usage
        return {
            **entry,
            "status": str(self.published.status),
            "project": release.project,
            "version": release.version,
            "serial": release.serial,
            "digest": release.digest,
            "chunks": {"new": usage.chunks_new, "total": usage.chunks_total},
            "bytes": {"new": usage.bytes_new, "total": usage.bytes_total},
        }


def _outcomes(config: Path, clock: Clock, work: Work) -> list[Outcome]:
    loaded = load_publications(config)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    passphrase = passphrase_file(os.environ)
    outcomes = [Outcome(None, error=ConfigError(problem)) for problem in loaded.problems]
    outcomes += [_outcome(publication, clock, work, passphrase) for publication in loaded.entries]
    return outcomes


def _outcome(
    publication: Publication, clock: Clock, work: Work, passphrase: Path | None
) -> Outcome:
    name = str(publication.index)
    reporter = Reports(name, sys.stderr, clock)
    try:
        published = work(publication, clock, reporter, passphrase=passphrase)
    except UpdaterError as error:
        return Outcome(name, tuple(reporter.messages), error=error)
    finally:
        reporter.close()
    return Outcome(name, tuple(reporter.messages), published=published)


def _exit_code(outcomes: Sequence[Outcome]) -> int:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    tried = [outcome for outcome in outcomes if not isinstance(outcome.error, ConfigError)]
    if not failed:
        return 0
    return 1 if tried else 2


class Reports:
    """Says what happens to one entry: a bar on a terminal, a line now and then elsewhere."""

    _LINE_INTERVAL = 10.0

    def __init__(self, name: str, stream: TextIO, clock: Clock) -> None:
        self.messages: list[str] = []
        self._name = name
        self._stream = stream
        self._clock = clock
        self._said = clock.monotonic()
        self._bar: Any = None

    def say(self, text: str) -> None:
        """See `build.Reporter.say`."""
        self.messages.append(text)
        self.close()
        print(f"{self._name}: {text}", file=self._stream, flush=True)

    def progress(self, done: int, total: int) -> None:
        """See `build.Reporter.progress`."""
        if self._stream.isatty():
            if self._bar is None:
                from tqdm import tqdm  # noqa: PLC0415 - only where there is a terminal

                self._bar = tqdm(
                    desc=Path(self._name).name,
                    total=total,
                    unit="B",
                    unit_scale=True,
                    leave=False,
                    file=self._stream,
                )
            self._bar.update(done - self._bar.n)
        elif self._clock.monotonic() - self._said >= self._LINE_INTERVAL:
            self._said = self._clock.monotonic()
            print(
                f"{self._name}: read {done / _MIB:.0f} of about {total / _MIB:.0f} MiB",
                file=self._stream,
                flush=True,
            )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

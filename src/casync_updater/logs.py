"""Where log messages go: to the journal with their fields, or as plain lines to stderr."""

import logging
import os
from collections.abc import Mapping
from typing import Any, TextIO

from casync_updater.model import Reason

IDENTIFIER = "casync-updater"


def fields(
    entry: str, *, serial: int | None = None, reason: Reason | None = None
) -> dict[str, str]:
    """What the journal keeps beside a message: ``log.info("...", extra=fields("web"))``.

    Plain lines do not show it, so a message names its entry itself.
    """
    found = {"ENTRY": entry, "SERIAL": serial, "REASON": reason}
    return {
        f"CASYNC_UPDATER_{name}": str(value) for name, value in found.items() if value is not None
    }


def configure(stream: TextIO, environment: Mapping[str, str], *, verbose: bool = False) -> None:
    """Send this process's log messages to where `stream` (stderr) leads.

    systemd names the journal's socket in JOURNAL_STREAM; only where stderr still is that
    socket do records go to the journal itself. Elsewhere a message is one line, with its level
    in front where it is a warning or worse.
    """
    handler: logging.Handler | None = None
    if is_journal(stream, environment):
        handler = _journal()
    if handler is None:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_Plain())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    # What libraries have to say about each connection is for those who asked for everything.
    logging.getLogger("urllib3").setLevel(logging.DEBUG if verbose else logging.ERROR)


def is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """True where the stream is the one that systemd connected to the journal."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or not a file at all
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _journal() -> logging.Handler | None:
    try:
        from systemd import journal  # noqa: PLC0415 - only where there is a journal
    except ImportError:
        return None
    handler: Any = journal.JournalHandler(SYSLOG_IDENTIFIER=IDENTIFIER)
    return handler  # type: ignore[no-any-return]


class _Plain(logging.Formatter):
    """One message is one line, whatever somebody else's text in it contains."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not record.exc_info:
            text = text.replace("\n", "\\n")
        text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"

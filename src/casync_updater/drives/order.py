"""What the daemon's children are told about a drive, as JSON on their standard input."""

import json
from dataclasses import dataclass
from typing import TextIO

from casync_updater import codec
from casync_updater.errors import ConfigError
from casync_updater.reports import CycleEnd


@dataclass(frozen=True, slots=True)
class EntryEnd:
    """How the cycle of an entry ended."""

    name: str
    end: CycleEnd


@dataclass(frozen=True, slots=True)
class Order:
    """One visit of a drive.

    Attributes:
        title: what it is called.
        point: where it is mounted, or shall be.
        node: its device node; None where somebody else mounts it.
        type: its file system, as udev calls it.
        began: when the visit began, in seconds since 1970.
        lost: it is not there any longer, or never came to be mounted.
        ends: how the cycles of the entries ended.
    """

    title: str
    point: str
    node: str | None = None
    type: str | None = None
    began: float = 0.0
    lost: bool = False
    ends: tuple[EntryEnd, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether somebody should look at what happened."""
        return self.lost or not self.ends or any(one.end.exit for one in self.ends)


def read_order(stream: TextIO) -> Order:
    """Take an order.

    Raises:
        ConfigError: it is none.
    """
    try:
        return codec.from_json(Order, json.load(stream))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"standard input: no order about a drive: {error}") from error

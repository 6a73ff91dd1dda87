"""``export``: make a backup drive by hand."""

import argparse
from pathlib import Path
from urllib.parse import urlsplit

from casync_updater.cli.single import add_name_parser, held, left_to_the_holder
from casync_updater.errors import LocalError
from casync_updater.model import Entry, Location


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    parser = add_name_parser(
        commands, "export", "write the installed version onto a drive for other devices", run
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder on the drive")


def run(arguments: argparse.Namespace) -> int:
    """Mirror one entry into a folder, under the names that its backup has."""
    folder: Path = arguments.folder.absolute()
    if not folder.is_dir():
        raise LocalError(f"the folder {folder} does not exist")
    if left_to_the_holder(arguments, lambda _folder: ("export", str(folder))):
        return 0
    with held(arguments) as (entry, cycle):
        place = exported(entry, folder)
        done = cycle.export(place)
    print(
        f"{entry.name}: {place.index} is complete,"
        f" {done.chunks} chunks with {done.size / 1e6:.1f} MB were written"
    )
    return 0


def exported(entry: Entry, folder: Path) -> Location:
    """Where an entry goes in a folder: the names of its backup, or else of its source."""
    names = entry.backup or entry.source
    return Location(
        str(folder / Path(urlsplit(names.index).path).name),
        str(folder / Path(urlsplit(names.store).path).name),
    )

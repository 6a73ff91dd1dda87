"""The whole configuration of the client: entries and settings, and what is wrong with them."""

from dataclasses import dataclass
from pathlib import Path

from casync_updater.config.entries import load_entries
from casync_updater.config.settings import load_settings, settings_files
from casync_updater.model import Entry, Settings


@dataclass(frozen=True, slots=True)
class Configuration:
    """Everything that the configuration files say."""

    entries: tuple[Entry, ...]
    settings: Settings
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def load_configuration(path: Path, settings_file: Path | None) -> Configuration:
    """Read the configuration; nothing is raised, every problem is in the result.

    Args:
        path: a JSON file, or a folder of ``*.json``.
        settings_file: what ``--settings`` names.
    """
    entries = load_entries(path)
    files = settings_files(path, settings_file)
    settings = load_settings(files.file, files.dropins)
    return Configuration(
        entries.entries,
        settings.settings,
        (*entries.problems, *settings.problems),
        (*entries.warnings, *settings.warnings),
    )

"""The client's commands, and the one place that turns errors into messages and exit codes."""

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from casync_updater import __version__, logs
from casync_updater.errors import UpdaterError

COMMANDS = (
    "run",
    "update",
    "check",
    "status",
    "validate",
    "rollback",
    "resume",
    "verify",
    "online",
    "export",
    "verify-store",
    "recover",
    "startup",
    "attach",
    "detach",
)
"""Each is the name of a module beside this one, with ``_`` for ``-``."""

EPILOG = """\
exit codes: 0 done or nothing to do; 1 something failed; 2 wrong usage or configuration;
3 no source reachable; 4 refused (signature, project, downgrade, expiry, wrong bytes)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    options = _options()
    _, rest = options.parse_known_args(argv)
    # Only the chosen command is imported: the daemon does without what a cycle needs.
    chosen = rest[:1] if rest and rest[0] in COMMANDS else COMMANDS
    arguments = _parser(options, chosen).parse_args(argv)
    logs.configure(sys.stderr, os.environ, verbose=arguments.verbose)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except UpdaterError as error:
        for line in str(error).splitlines():
            print(f"casync-updater: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:
        # The reader of the output has left. The interpreter must not find that out again when
        # it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser(options: argparse.ArgumentParser, names: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="casync-updater",
        description="Keeps directories equal to a published casync archive.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[options],
    )
    parser.add_argument("--version", action="version", version=f"casync-updater {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in names:
        module = importlib.import_module(f"casync_updater.cli.{name.replace('-', '_')}")
        module.add_parser(commands)
    return parser


def _options() -> argparse.ArgumentParser:
    """The options before the command."""
    parser = argparse.ArgumentParser(prog="casync-updater", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--config",
        metavar="PATH",
        type=Path,
        default=Path("/etc/casync-updater"),
        help="a JSON file, or a directory of *.json (default: %(default)s)",
    )
    parser.add_argument(
        "--settings", metavar="FILE", type=Path, help="settings in place of the directory's own"
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        help="what is remembered between runs (default: /var/lib/casync-updater)",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=Path,
        help="chunks on their way (default: /var/cache/casync-updater, or below --state-dir)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    return parser

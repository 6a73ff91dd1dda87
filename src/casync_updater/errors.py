"""What can go wrong, in five families.

The family decides the exit code of the programs and whether the same attempt can succeed
later without anybody doing something. Messages are complete sentences for the operator:
which file, which entry or address, what is wrong, what to do.
"""

import re

_UNTIL_AT = re.compile(r".*@", re.DOTALL)
_HOST_AND_PORT = re.compile(r"(\[[^\]@]*\]|[^:/?#@]*)(:[0-9]*)?([/?#]|$)")


class UpdaterError(Exception):
    """Root of every error that this project raises on purpose.

    Attributes:
        exit_code: what the programs exit with (1 failed, 2 configuration, 3 no source
            reachable, 4 refused).
        retryable: True where the same attempt may succeed later by itself.
    """

    exit_code = 1
    retryable = False


class RemoteError(UpdaterError):
    """A source could not be reached, or did not answer as a web server of releases does."""

    exit_code = 3
    retryable = True


class MissingError(RemoteError):
    """The source answers, and has no such file (HTTP 404 or 410, ENOENT)."""


class PortalError(RemoteError):
    """Something answered in place of the source: a captive portal's page, say.

    That is no fault of the archive, and goes away by itself when somebody logs in.
    """


class ContentError(UpdaterError):
    """Bytes that were received are not what they should be: a hash, a format, a size."""

    exit_code = 4


class TrustError(UpdaterError):
    """A release was refused: signature, project, downgrade, expiry.

    Attributes:
        check: the name of the check that refused (``signature``, ``project``, ...).
        expected: what the check wanted to see.
        found: what it saw.
        where: the source the release came from.
    """

    exit_code = 4

    def __init__(self, check: str, *, expected: str, found: str, where: str) -> None:
        self.check = check
        self.expected = expected
        self.found = found
        self.where = where
        super().__init__(f"refused ({check}): expected {expected}, found {found} at {where}")


class LocalError(UpdaterError):
    """This machine is in the way: no space, no permission, a read-only file system."""

    retryable = True


class SpaceError(LocalError):
    """A file system has less room than the update needs."""


class BusyError(LocalError):
    """Somebody else holds the entry."""


class ConfigError(UpdaterError):
    """The configuration or the command line is wrong.

    Attributes:
        problems: one line per problem, each ``file: entry: key: what is wrong``.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def exit_code(errors: list[UpdaterError]) -> int:
    """The exit code for several failures: the first of 4, 1, 3 that occurred, else 2, else 0."""
    codes = {error.exit_code for error in errors}
    return next((code for code in (4, 1, 3, 2) if code in codes), 0)


def masked(url: str) -> str:
    """A URL as a message may show it: without its user, password and query.

    A password with an unescaped ``/`` or ``?`` breaks a URL apart, so everything up to the last
    ``@`` is hidden unless what stands before the first ``/`` is plainly a host and port. Local
    paths come back as they are.
    """
    scheme, separator, rest = url.partition("://")
    if url.startswith("/") or scheme.lower() == "file":
        return url
    if not separator:
        return _UNTIL_AT.sub("***@", url)
    if not _HOST_AND_PORT.match(rest):
        rest = _UNTIL_AT.sub("***@", rest)
    head, query, _ = rest.partition("?")
    return f"{scheme}://{head}{'?***' if query else ''}"

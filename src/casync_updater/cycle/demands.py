"""What an entry demands of a release, wherever the release comes from, and a drive's slots.

A drive holds its release twice, in slots: FAT cannot replace a file safely, and a drive may be
pulled out at any moment. The second slot is written and synced first, ``.release`` itself last,
so that one of the two is always whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from casync_updater import trust
from casync_updater.errors import ContentError, MissingError, TrustError
from casync_updater.model import Release
from casync_updater.release import RELEASE_LIMIT, parse_release
from casync_updater.sources.base import Source

SLOTS = (".release-2", ".release")
"""The suffixes of a drive's slots, in the order in which they are written."""

_BEGIN, _END = b"-----BEGIN PGP SIGNED MESSAGE-----", b"-----END PGP SIGNATURE-----"


@dataclass(frozen=True, slots=True)
class Vouched:
    """A release that meets an entry's demands.

    Attributes:
        release: what it says.
        body: the release as it was published.
        signed: a counting signature was verified.
        remark: why a signature that is there does not count.
        where: the file or URL that it was read from.
    """

    release: Release
    body: bytes
    signed: bool
    remark: str
    where: str


@dataclass(frozen=True, slots=True)
class Demands:
    """What a release must be.

    Attributes:
        keyrings: files and directories with the keys that may sign.
        signature: one of them must have signed.
        project: what the release must say it is; None for anything.
        now: the best clock, for the expiry of keys. Seconds since 1970.
    """

    keyrings: Sequence[Path]
    signature: bool
    project: str | None
    now: float

    def read(self, body: bytes, where: str) -> Vouched:
        """Judge a release.

        Raises:
            TrustError: its signature or its project is not what is demanded.
            ContentError: it cannot be read as a release.
        """
        statement = trust.authenticate(
            body, keyrings=self.keyrings, required=self.signature, where=where, now=self.now
        )
        release = parse_release(statement.text, where)
        if self.project not in (None, release.project):
            raise TrustError(
                "project", expected=str(self.project), found=release.project, where=where
            )
        return Vouched(release, body, statement.signed, statement.remark, where)


@dataclass(frozen=True, slots=True)
class Slots:
    """What stands in the slots of a drive that is not foreign.

    Attributes:
        newest: the newest whole release; None where there is none.
        bodies: what each slot holds, in the order of `SLOTS`; None where it is not there.
        torn: what is wrong with a slot that was not written to its end.
    """

    newest: Vouched | None
    bodies: tuple[bytes | None, ...]
    torn: ContentError | None


def read_slots(
    source: Source, demands: Demands, known: Mapping[bytes, Vouched] | None = None
) -> Slots:
    """Read the releases of a drive.

    A slot that somebody else wrote makes the whole drive foreign, also where the other one is
    right: interrupted writing never gives a whole release of another project or by another key.

    Args:
        source: the drive.
        demands: what makes a release the publisher's.
        known: bodies that were judged before.

    Raises:
        TrustError: the drive is foreign.
        RemoteError: it cannot be read.
    """
    bodies: list[bytes | None] = []
    judged = dict(known or {})
    found: dict[bytes, Vouched] = {}
    torn: ContentError | None = None
    for suffix in SLOTS:
        try:
            document = source.document(suffix, limit=RELEASE_LIMIT)
        except MissingError:
            bodies.append(None)
            continue
        except ContentError as error:
            bodies.append(b"")
            torn = error
            continue
        assert document is not None
        bodies.append(document.body)
        try:
            if document.body not in judged:
                _demand_whole(document.body, document.where)
                judged[document.body] = demands.read(document.body, document.where)
            found[document.body] = judged[document.body]
        except ContentError as error:
            torn = error
    newest = max(found.values(), key=lambda vouched: vouched.release.mark, default=None)
    return Slots(newest, tuple(bodies), torn)


def _demand_whole(body: bytes, where: str) -> None:
    """Tell what was not written to its end from what somebody wrote.

    Raises:
        ContentError: no release can be read from it, whoever signed it.
    """
    if _BEGIN in body and _END in body:
        # The end is there: whatever is odd about it is no accident.
        return
    try:
        text = trust.unwrap(body)
    except ContentError as error:
        raise ContentError(f"{where}: {error}") from error
    parse_release(text, where)

"""Whether a mark still stands after the keys were changed.

A mark keeps a device from going back to what is older. Who stole a key can raise it for ever, with
a date in the far future; the publisher's answer is a keyring without that key. So whenever the
keyring is another one than before, the release that raised the mark is judged again by it: what
no remaining key vouches for never counted. (TUF calls this the recovery from a fast-forward
attack, and ties it to a change of keys as well.)

Where keys are changed in order, nothing is lost by it: every release that the new key signed is
newer than those that only the old one did.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from casync_updater import trust
from casync_updater.errors import ContentError
from casync_updater.model import Mark, Release
from casync_updater.release import parse_release
from casync_updater.state import State, accepted

_NOTHING = Mark(0, 0.0)
"""Below every release; an entry that has it needs signatures, as with any mark."""


def judged_again(
    state: State, kept: Iterable[tuple[Path, bytes]], keyrings: Sequence[Path]
) -> State:
    """The state with the signed mark lowered, where no key vouches any more for what raised it.

    It falls to the highest kept release that a remaining key signed, and rises again where that
    was a mistake and the right keyring comes back. How old a key or a signature is does not
    matter: what was accepted in time stays accepted.

    Args:
        state: what was accepted; as it is where the keyring is the one of the last time, or
            cannot be read, or the release that raised the mark is not kept.
        kept: the signed releases beside the state, as published, with their files.
        keyrings: what the entry believes now.

    Raises:
        LocalError: gpgv cannot do its work.
    """
    mark = state.signed_mark
    if mark is None:
        return state
    keys = trust.digest_of(keyrings)
    if keys in (None, state.keys):
        return state
    state = replace(state, keys=keys)
    releases = [(release, body) for file, body in kept if (release := _read(file, body))]
    standing = [
        release.mark for release, body in releases if trust.still_vouched(body, keyrings=keyrings)
    ]
    if all(release.mark != mark for release, _ in releases):
        standing.append(mark)
    highest = max(standing, default=_NOTHING)
    if highest >= mark:
        return accepted(state, highest, signed=True)
    newest = max((one.date for one in standing), default=None)
    return replace(state, signed_mark=highest, newest_date=newest)


def _read(file: Path, body: bytes) -> Release | None:
    try:
        return parse_release(trust.unwrap(body), str(file))
    except ContentError:
        return None

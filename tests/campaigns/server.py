"""A web server that fails: the update arrives all the same, in a bounded number of requests.

    python3 tests/campaigns/server.py --seed 1 --count 20

Each round publishes a version, and half of all requests fail in one of many ways while the
client is started again and again; in every third round the publisher publishes once more in the
middle of it. What was fetched is kept between the tries.
"""

import random
import sys
import threading
from pathlib import Path
from typing import Any

from campaigns.world import World, by_hand, demand, report
from support.webserver import Request, WebServer

_TRIES = 40
_TRIES_EACH = 8
"""Per chunk: what comes damaged, or as somebody else's page, ends a try, and each try has to get
past the release and the index first. A chunk that arrived is never fetched again."""
FAULTS: dict[str, dict[str, Any]] = {
    "refused": {"status": 503},
    "broken": {"status": 500},
    "gone": {"status": 404},
    "busy": {"status": 429, "retry_after": 0},
    "reset": {"reset": True},
    "empty": {"cut": 0},
    "cut": {"cut": 40},
    "stalled": {"stall": 40},
    "silent": {"silent": True},
    "portal": {"html": True},
    "spoilt": {"corrupt": True},
}


def play(world: World, count: int) -> int:
    """So many versions through a server that fails; gives the number of requests."""
    rng = world.rng
    world.settings += "connect_timeout = 1\nmin_rate = 1\nretry_max_wait = 0.1\n"
    world.settings = world.settings.replace("read_timeout = 120", "read_timeout = 0.5")
    world.settings = world.settings.replace("retries = 0", "retries = 2")
    world.appliance.settings(world.settings)
    total = 0
    current = None
    for number in range(count):
        fault = list(FAULTS)[number % len(FAULTS)] if count > 3 else rng.choice(list(FAULTS))
        new = world.publish().name
        needed = _needed(world, current, new)
        world.server.requests.clear()
        again = _Publisher(world, after=rng.randint(2, 6))
        if number % 3 == 2:
            world.server.on_request = again
        world.server.fail("*", **FAULTS[fault])
        tries = 0
        before = list(world.versions)
        while True:
            tries += 1
            code, said = world.run("update")
            world.check_instant(current, *before, *world.versions)
            if code == 0:
                break
            limit = _TRIES + _TRIES_EACH * needed
            demand(tries < limit, f"{fault}: nothing after {tries} tries: {said}")
        world.server.heal()
        world.server.on_request = None
        again.wait()
        requests = len(world.server.requests)
        newest = list(world.versions)[-1]
        if newest != new:
            needed += _needed(world, new, newest)
        # Each try asks for the release, the index and the manifest at most, twice again each.
        limit = 4 * needed + 12 * tries + 12
        demand(
            requests <= limit, f"{fault}: {requests} requests for {needed} chunks, {tries} tries"
        )
        code, said = world.run("update")
        demand(code == 0, f"{fault}: on a whole server: {said}")
        state = world.state["installed"]["version"]
        demand(state == newest, f"{fault}: {state} is installed, not {newest}")
        demand(world.version_of(world.appliance.destination) == newest, f"{fault}: another tree")
        total += requests
        current = newest
        report(f"{fault}: {requests} requests for {needed} chunks in {tries} tries")
    return total


class _Publisher:
    """Publishes once more, in the middle of a download."""

    def __init__(self, world: World, after: int) -> None:
        self._world = world
        self._left = after
        self._lock = threading.Lock()

    def wait(self) -> None:
        """A client that gave its request up may be done before the publication is."""
        with self._lock:
            pass

    def __call__(self, _request: Request) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._world.publish()


def _needed(world: World, old: str | None, new: str) -> int:
    have = world.versions[old].chunks if old else {}
    return len(set(world.versions[new].chunks) - set(have))


class _HalfServer(WebServer):
    """Each fault strikes every second request, on average."""

    rng: random.Random

    def fault_for(self, path: str) -> Any:
        fault = super().fault_for(path)
        return fault if self.rng.random() < 0.5 else None


def campaign(folder: Path, rng: random.Random, count: int) -> int:
    with World(folder, rng, drive=False, health=False, serve=_HalfServer) as world:
        assert isinstance(world.server, _HalfServer)
        world.server.rng = random.Random(rng.random())
        return play(world, count)


def main() -> int:
    def outcomes(folder: Path, rng: random.Random, count: int) -> dict[str, int]:
        return {"requests": campaign(folder, rng, count), "versions that arrived": count}

    return by_hand(__doc__, outcomes, count=22, unit="versions")


if __name__ == "__main__":
    sys.exit(main())

"""The detector in a loop like the daemon's; JSON lines out, "report" in, ends with its stdin."""

import json
import os
import selectors
import sys
import time
from typing import Any

from casync_updater.clock import SystemClock
from casync_updater.model import OnlineSettings
from casync_updater.online.hosts import Host
from casync_updater.online.online import Online


def write(**line: Any) -> None:
    print(json.dumps({"at": time.monotonic(), **line}), flush=True)


def main() -> None:
    task = json.loads(sys.argv[1])
    clock = SystemClock()
    hosts = tuple(Host(name, (task["port"],), ("entry",)) for name in task["hosts"])
    settings = OnlineSettings(**task["settings"])
    detector = Online(hosts, settings, clock, lambda line: write(said=line))
    with selectors.DefaultSelector() as selector:
        selector.register(detector, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            deadline = detector.deadline()
            timeout = None if deadline is None else max(0.0, deadline - clock.monotonic())
            ready = {key.fileobj for key, _ in selector.select(timeout)}
            for came in detector.handle():
                write(came=came.host, entries=came.entries)
            if sys.stdin in ready:
                if not os.read(0, 100):
                    break
                write(report=[status.as_json() for status in detector.report()])
    detector.close()


main()

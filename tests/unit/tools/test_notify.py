import socket
from pathlib import Path

import pytest

from casync_updater.tools.notify import Notifier


def test_the_notify_socket_gets_what_systemd_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "3000000"}
        notifier = Notifier.of(environment)
        assert notifier.watchdog == 3.0
        notifier.ready()
        notifier.status("two\nlines")
        notifier.extend(1.5)
        notifier.reloading(2.0)
        received = [manager.recv(4096).decode() for _ in range(4)]
    assert received == [
        "READY=1",
        "STATUS=two lines",
        "EXTEND_TIMEOUT_USEC=1500000",
        "RELOADING=1\nMONOTONIC_USEC=2000000",
    ]
    assert Notifier.of({**environment, "WATCHDOG_PID": "1"}).watchdog is None
    assert Notifier.of({}).watchdog is None
    Notifier.of({}).ready()

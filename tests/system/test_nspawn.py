"""The machines that the other system tests stand on: one is used the way all of them are."""

from pathlib import Path

import pytest

from system.nspawn import Machine

pytestmark = pytest.mark.system


def test_a_machine_boots_is_unplugged_cut_off_and_boots_again(tmp_path: Path) -> None:
    with Machine("bookworm", tmp_path / "root") as machine:
        machine.boot()
        assert machine.run("systemctl", "is-active", "dbus").stdout == "active\n"
        first_boot = machine.output("cat", "/proc/sys/kernel/random/boot_id")
        ping = ("ping", "-c1", "-W1", machine.host)
        machine.wait(lambda: machine.run(*ping, check=False).returncode == 0, "the network")

        machine.link(up=False)
        assert machine.run(*ping, check=False).returncode != 0
        machine.link(up=True)
        machine.wait(lambda: machine.run(*ping, check=False).returncode == 0, "the network")

        machine.run("touch", "/root/kept")
        machine.kill()
        machine.boot()
        assert machine.output("ls", "/root") == "kept"
        with pytest.raises(AssertionError, match="exit code 3"):
            machine.run("sh", "-c", "exit 3")
        assert machine.output("cat", "/proc/sys/kernel/random/boot_id") != first_boot
        machine.poweroff()
    assert not (tmp_path / "root").exists()

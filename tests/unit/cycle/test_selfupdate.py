"""Which packages are taken for an upgrade, and which are refused: real ones, made by dpkg-deb."""

import io
import lzma
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from casync_updater.cycle.selfupdate import SelfUpdate, _asked, _demand_roots_own, examine
from casync_updater.errors import LocalError, TrustError
from casync_updater.tools.packages import Installed, read_through

CLIENT, SERVER, MODULES = "casync-updater", "casync-updater-server", "python3-casync-updater"
HAS = Installed((CLIENT, MODULES), "1.0.0", "arm64")


def make(
    folder: Path, name: str, version: str = "1.0.1", architecture: str = "all", more: str = ""
) -> Path:
    """A package that dpkg takes."""
    tree = folder / f".{name}"
    (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\n"
        f"Maintainer: T <t@example.org>\nDescription: x\nInstalled-Size: 3\n{more}"
    )
    (tree / "opt").mkdir(exist_ok=True)
    (tree / "opt/file").write_bytes(os.urandom(100_000))
    target = folder / f"{name}_{version}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", tree, target],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return target


def archive(members: dict[str, bytes]) -> bytes:
    """An ar file."""
    out = b"!<arch>\n"
    for name, data in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


def control_tar(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def announcing(name: str, size: int) -> bytes:
    """The head of a file in a tar archive, without the file."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf()


def refusal(tree: Path, has: Installed = HAS) -> TrustError:
    with pytest.raises(TrustError) as caught:
        examine(tree, has)
    assert caught.value.exit_code == 4
    return caught.value


def test_a_newer_set_is_taken(tmp_path: Path) -> None:
    client, modules = make(tmp_path, CLIENT), make(tmp_path, MODULES, architecture="arm64")
    make(tmp_path, SERVER)
    (tmp_path / "casync-updater_1.0.1.changes").write_text("what a build leaves beside them")
    upgrade = examine(tmp_path, HAS)
    assert upgrade is not None
    assert (upgrade.version, upgrade.before) == ("1.0.1", "1.0.0")
    assert [package.file for package in upgrade.packages] == [client, modules]
    assert {package.size for package in upgrade.packages} == {3072}


def test_what_is_installed_is_left_alone(tmp_path: Path) -> None:
    for name in (CLIENT, MODULES):
        make(tmp_path, name, "1.0.0")
    assert examine(tmp_path, HAS) is None


@pytest.mark.parametrize(
    ("version", "older"),
    [
        ("0.9", True),
        ("1.0.0~rc1", True),
        ("1.0.0-1", False),
        ("1.0.10", False),
        ("1:0.1", False),
        ("1.0", True),
    ],
)
def test_debian_says_what_is_newer(version: str, older: bool, tmp_path: Path) -> None:
    for name in (CLIENT, MODULES):
        make(tmp_path, name, version)
    if older:
        error = refusal(tmp_path)
        assert (error.check, error.found) == ("downgrade", version)
        assert "1.0.0 or newer" in error.expected
    else:
        upgrade = examine(tmp_path, HAS)
        assert upgrade is not None
        assert upgrade.version == version


def test_all_that_is_installed_gets_the_same_version(tmp_path: Path) -> None:
    assert refusal(tmp_path).found == "none of them"
    make(tmp_path, CLIENT)
    assert refusal(tmp_path).check == "packages"
    other = make(tmp_path, MODULES, "1.0.2")
    assert refusal(tmp_path).found == "casync-updater 1.0.1, python3-casync-updater 1.0.2"
    other.unlink()
    make(tmp_path, MODULES)
    assert examine(tmp_path, HAS) is not None
    with_server = Installed((CLIENT, SERVER, MODULES), "1.0.0", "arm64")
    assert "casync-updater-server" in refusal(tmp_path, with_server).expected
    make(tmp_path, CLIENT, "1.0.3")
    assert "1.0.1 and 1.0.3" in refusal(tmp_path).found


def test_foreign_packages_and_architectures(tmp_path: Path) -> None:
    for name in (CLIENT, MODULES):
        make(tmp_path, name)
    foreign = make(tmp_path, "sudo")
    error = refusal(tmp_path)
    assert (error.check, error.found, error.where) == ("package", "sudo", str(foreign))
    foreign.unlink()
    make(tmp_path, MODULES, architecture="amd64")
    error = refusal(tmp_path)
    assert (error.check, error.found) == ("architecture", "amd64")
    assert error.expected == "all or arm64"


GOOD = b"Package: casync-updater\nVersion: 1.0.1\nArchitecture: all\n"
BINARY = {"debian-binary": b"2.0\n"}
DATA = {"data.tar.gz": control_tar()}

HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "text": b"<!DOCTYPE html>",
    "zeros": bytes(4096),
    "only a head": b"!<arch>\n",
    "no control": archive({**BINARY, **DATA}),
    "no control file": archive({**BINARY, "control.tar.gz": control_tar(), **DATA}),
    "control is garbage": archive({**BINARY, "control.tar.gz": b"\x1f\x8b garbage", **DATA}),
    "control is cut off": archive(
        {**BINARY, "control.tar.gz": control_tar(("control", GOOD))[:60], **DATA}
    ),
    "control is a link": archive(
        {
            **BINARY,
            "control.tar.gz": control_tar(("control", b""), kind=tarfile.SYMTYPE),
            **DATA,
        }
    ),
    "control is huge": archive(
        {**BINARY, "control.tar.gz": control_tar(("control", bytes(70_000))), **DATA}
    ),
    "control is behind thousands": archive(
        {
            **BINARY,
            "control.tar.gz": control_tar(*((f"f{n}", b"") for n in range(500)), ("control", GOOD)),
            **DATA,
        }
    ),
    "control is behind gigabytes": archive(
        {
            **BINARY,
            "control.tar.xz": lzma.compress(announcing("x", 1 << 40)),
            **DATA,
        }
    ),
    "no fields": archive({**BINARY, "control.tar.gz": control_tar(("control", b"")), **DATA}),
    "no version": archive(
        {**BINARY, "control.tar.gz": control_tar(("control", GOOD.replace(b"V", b"W"))), **DATA}
    ),
    "a version that is a path": archive(
        {
            **BINARY,
            "control.tar.gz": control_tar(("control", GOOD.replace(b"1.0.1", b"1/../../x"))),
            **DATA,
        }
    ),
    "an endless version": archive(
        {
            **BINARY,
            "control.tar.gz": control_tar(("control", GOOD.replace(b"1.0.1", b"1" * 5000))),
            **DATA,
        }
    ),
    "a negative size": archive(
        {
            **BINARY,
            "control.tar.gz": control_tar(("control", GOOD + b"Installed-Size: -1\n")),
            **DATA,
        }
    ),
    "bytes that are no text": archive(
        {**BINARY, "control.tar.gz": control_tar(("control", b"Package: \xff\xfe\n")), **DATA}
    ),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(data: bytes, tmp_path: Path) -> None:
    make(tmp_path, MODULES)
    file = tmp_path / "casync-updater.deb"
    file.write_bytes(data)
    error = refusal(tmp_path)
    assert error.check == "package"
    assert error.where == str(file)


def test_links_and_folders_are_no_packages(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    outside = make(tmp_path, CLIENT)
    (tree / "x.deb").symlink_to(outside)
    assert refusal(tree).found == "something else"
    (tree / "x.deb").unlink()
    (tree / "x.deb").mkdir()
    assert refusal(tree).found == "something else"


def test_a_package_that_is_cut_off(tmp_path: Path) -> None:
    """Its control file is whole; only reading all of it shows what dpkg would find."""
    whole = make(tmp_path, CLIENT)
    read_through(whole)
    cut = tmp_path / "cut.deb"
    cut.write_bytes(whole.read_bytes()[:-50_000])
    with pytest.raises(LocalError, match="dpkg-deb failed"):
        read_through(cut)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
def test_whose_packages_these_are() -> None:
    """Whoever may replace them could have anything installed."""
    # Not below the test's own folder: its parents may be anybody's.
    tree = Path("/var/lib") / f"casync-updater-test-{os.getpid()}"
    package = tree / "x.deb"
    changes: list[Callable[[], None]] = [
        lambda: os.chown(package, 12345, 0),
        lambda: os.chown(package, 0, 12345),
        lambda: package.chmod(0o666),
        lambda: os.chown(tree, 12345, 0),
        lambda: tree.chmod(0o777),
    ]
    tree.mkdir()
    try:
        for change in changes:
            package.touch()
            os.chown(package, 0, 0)
            package.chmod(0o664)  # as a publisher with umask 002 has it
            os.chown(tree, 0, 0)
            tree.chmod(0o775)
            _demand_roots_own(tree)
            change()
            with pytest.raises(LocalError, match="belongs to root alone"):
                _demand_roots_own(tree)
    finally:
        package.unlink()
        tree.rmdir()


def test_what_status_says(tmp_path: Path) -> None:
    own = SelfUpdate(tmp_path)
    assert own.words() is None
    folder = tmp_path / ".self-update"
    (folder / "bad").mkdir(parents=True)
    (folder / "bad/1.0.1").write_text("its service failed")
    assert own.words() == "1.0.1 failed: its service failed"
    assert own.bad() == {"1.0.1": "its service failed"}
    (folder / "upgrade").mkdir()
    plan = (
        '{"version": "1.0.2", "before": "1.0.0", "packages": [], "active": true,'
        ' "trial": 3600, "urls": [], "paths": []}'
    )
    (folder / "upgrade/plan.json").write_text(plan)
    assert own.words() == "1.0.2 is being installed"
    (folder / "upgrade/progress.json").write_text('{"phase": "trial", "counted": 600}')
    assert "within 3000 seconds" in str(own.words())
    (folder / "upgrade/progress.json").write_text('{"phase": "back", "reason": "it failed"}')
    assert own.words() == "going back to 1.0.0: it failed"
    own.forget_older("1.0.1")
    assert list(own.bad()) == ["1.0.1"]
    (folder / "bad/1.0.10").write_text("it failed")
    own.forget_older("1.0.2")
    assert list(own.bad()) == ["1.0.10"]
    own.forgive()
    assert own.bad() == {}


def test_what_the_guard_asks_for_gives_nobody_access() -> None:
    asked = _asked("https://user:secret@[::1]:8443/a/x.caidx?token=secret")
    assert asked == "https://[::1]:8443/a/x.caidx.release"

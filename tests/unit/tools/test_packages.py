"""This program's packages, as dpkg and apt see them: both are Debian's own here."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from casync_updater.errors import LocalError
from casync_updater.tools.packages import _changed, repack, simulate

# It has a file below /lib, which is a symbolic link today, and scripts of its maintainer.
PACKAGE = "casync"


def field(package: Path, name: str) -> str:
    return subprocess.run(
        ["dpkg-deb", "--field", package, name], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="owners are kept, which takes root")
def test_what_is_installed_becomes_a_package_again(tmp_path: Path) -> None:
    package = repack(PACKAGE, tmp_path)
    assert list(tmp_path.iterdir()) == [package]
    for name in ("Package", "Version", "Architecture", "Depends"):
        wanted = f"--showformat=${{{name}}}"
        installed = subprocess.run(
            ["dpkg-query", "--show", wanted, PACKAGE], check=True, capture_output=True, text=True
        ).stdout
        assert field(package, name) == installed
    assert field(package, "Status") == ""
    tree = tmp_path / "tree"
    subprocess.run(["dpkg-deb", "--extract", package, tree], check=True)
    listed = subprocess.run(
        ["dpkg-query", "--listfiles", PACKAGE], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    files = [Path(line) for line in listed if Path(line).is_file() or Path(line).is_symlink()]
    assert len(files) > 5
    for file in files:
        again = tree / file.relative_to("/")
        if len(file.parts) == 2:
            assert again.is_dir()
        elif file.is_symlink():
            assert again.readlink() == file.readlink()
        else:
            assert again.read_bytes() == file.read_bytes()
            assert again.stat().st_mode == file.stat().st_mode
            assert (again.stat().st_uid, again.stat().st_gid) == (0, 0)


def test_configuration_files_that_were_changed(tmp_path: Path) -> None:
    same, other, gone = (tmp_path / name for name in ("same", "other", "gone"))
    same.write_bytes(b"as it was")
    other.write_bytes(b"changed")
    digest = hashlib.md5(b"as it was").hexdigest()
    lines = [f" {path} {digest}" for path in (same, other, gone)]
    lines[0] += " obsolete"
    assert _changed("\n" + "\n".join(lines)) == {bytes(other), bytes(gone)}
    assert _changed("") == frozenset()


@pytest.mark.skipif(os.geteuid() != 0, reason="dpkg installs as root only")
@pytest.mark.parametrize("changed", [True, False])
def test_what_dpkg_makes_of_configuration_files_on_both_ways(tmp_path: Path, changed: bool) -> None:
    """There and back and there again: what `repack` counts on, in a database of its own."""
    root = tmp_path / "root"
    (root / "var/lib/dpkg/info").mkdir(parents=True)
    (root / "var/lib/dpkg/updates").mkdir()
    (root / "var/lib/dpkg/status").touch()
    conf = root / "etc/x.conf"

    def install(version: str, content: str | None) -> None:
        tree = tmp_path / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: x\nVersion: {version}\nArchitecture: all\n"
            "Maintainer: T <t@example.org>\nDescription: x\n"
        )
        if content is not None:
            (tree / "etc").mkdir()
            (tree / "etc/x.conf").write_text(content)
            (tree / "DEBIAN/conffiles").write_text("/etc/x.conf\n")
        package = tmp_path / "x.deb"
        for argv in (
            ["dpkg-deb", "--root-owner-group", "--build", tree, package],
            ["dpkg", f"--root={root}", "--log=/dev/null", "--force-confold", "-i", package],
        ):
            subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)

    install("1", "of version 1")
    if changed:
        conf.write_text("mine")
    install("2", "of version 2")
    assert conf.read_text() == ("mine" if changed else "of version 2")
    # The version before, as it was packed up: without a file that was changed.
    install("1", None if changed else "of version 1")
    assert conf.read_text() == ("mine" if changed else "of version 1")
    install("3", "of version 3")
    assert conf.read_text() == ("mine" if changed else "of version 3")


def test_what_apt_thinks_of_it(tmp_path: Path) -> None:
    def made(name: str, more: str) -> Path:
        tree = tmp_path / name
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 99\nArchitecture: all\nMaintainer: T <t@example.org>\n"
            f"Description: x\n{more}"
        )
        target = tmp_path / f"{name}.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "--build", tree, target],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return target

    good = made("casync-updater-test", "")
    simulate([good], ["casync-updater-test"])
    with pytest.raises(LocalError, match="apt would leave another as it is"):
        simulate([good], ["casync-updater-test", "another"])
    with pytest.raises(LocalError, match="it needs casync-updater-test, which would have to be"):
        simulate([good], [])
    bad = made("casync-updater-needs", "Depends: casync-updater-not-there (>= 5)\n")
    with pytest.raises(LocalError, match=r"Depends: casync-updater-not-there \(>= 5\)"):
        simulate([bad], ["casync-updater-needs"])

"""This program's packages, as dpkg and apt see them: both are Debian's own here."""

import hashlib
import os
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

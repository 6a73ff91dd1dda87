"""Trees with what real trees have: the names, types and sizes that break updaters."""

import hashlib
import os
import random
import stat
from dataclasses import dataclass
from pathlib import Path


def make_tree(root: Path, seed: int, *, big: int = 0, count: int = 40) -> Path:
    """Make a tree at `root`, the same one for the same arguments.

    Args:
        root: a directory that does not exist yet.
        seed: decides about all content and about the small files' modes.
        big: bytes of one large file (none where 0), half of it compressible.
        count: how many small files there are, spread over directories of fifty.
    """
    rng = random.Random(seed)
    root.mkdir(parents=True)
    for number in range(count):
        folder = root / "small" / f"{number // 50:04}"
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"file-{number:06}", rng.randbytes(rng.randrange(0, 3000)))
    _write(root / "bin" / "tool", b"#!/bin/sh\necho " + rng.randbytes(4).hex().encode(), 0o755)
    _write(root / "bin" / "setuid", b"not really", 0o4755)
    _write(root / "secret" / "key", rng.randbytes(32), 0o600)
    (root / "secret").chmod(0o700)
    _write(root / "read-only", b"read only\n", 0o444)
    _write(root / "chunks", rng.randbytes(700_000))
    _write(root / "chunk-edge", b"\0" * 262_144)
    _write(root / "empty-file", b"")
    (root / "empty-folder").mkdir()
    (root / "sticky").mkdir(mode=0o1777)
    (root / "sticky").chmod(0o1777)
    for name in (b"with space", b"-rf", b"--store=x", b"new\nline", b"\xff\xfe not utf-8"):
        _write(root / "names" / os.fsdecode(name), name)
    _write(root / "names" / "ümlaut", b"u")
    _write(root / "names" / "a:b=c%$(id)'\"\\", b"shell")
    _write(root / "names" / ("l" * 230), b"long")  # casync extracts to .#NAME<16 digits>
    deep = root.joinpath("deep", *(["level"] * 40))
    _write(deep / "bottom", b"deep")
    links = root / "links"
    links.mkdir()
    (links / "to-file").symlink_to("../read-only")
    (links / "to-folder").symlink_to("../bin")
    (links / "absolute").symlink_to("/etc/hostname")
    (links / "dangling").symlink_to("nowhere/at all")
    (links / "parent").symlink_to("..")
    (links / os.fsdecode(b"raw-\xff")).symlink_to(os.fsdecode(b"\xff"))
    _write(root / "hard" / "one", b"one inode, two names")
    (root / "hard" / "two").hardlink_to(root / "hard" / "one")
    _write(root / "same" / "a", b"equal content " * 100)
    _write(root / "same" / "b", b"equal content " * 100)
    if big:
        with (root / "big").open("wb") as file:
            for begin in range(0, big, 1 << 16):
                size = min(1 << 16, big - begin)
                half = size // 2
                file.write(rng.randbytes(half) + bytes(size - half))
    _settle_times(root, rng)
    return root


def mutate_tree(root: Path, seed: int) -> None:
    """Change a tree of `make_tree` as a new version would: in content, names, types and modes."""
    rng = random.Random(seed)
    files = sorted(path for path in (root / "small").rglob("*") if path.is_file())
    for path in rng.sample(files, min(len(files), 3)):
        _write(path, rng.randbytes(rng.randrange(1, 3000)))
    if len(files) > 5:
        files[-1].unlink()
    _write(root / "added" / f"file-{seed}", rng.randbytes(500))
    with (root / "chunks").open("r+b") as file:
        file.seek(rng.randrange(600_000))
        file.write(rng.randbytes(100))
    tool = root / "bin" / "tool"
    tool.chmod(0o644 if tool.stat().st_mode & 0o111 else 0o755)
    link = root / "links" / "to-file"
    link.unlink()
    link.symlink_to(f"../bin/tool-{seed}")
    turncoat = root / "turncoat"
    if turncoat.is_dir():
        turncoat.rmdir()
        _write(turncoat, b"now a file")
    else:
        turncoat.unlink(missing_ok=True)
        turncoat.mkdir()


@dataclass(frozen=True, slots=True)
class Node:
    """What one path of a tree is.

    Attributes:
        type: ``file``, ``dir``, ``link``, or another letter of `stat.filemode`.
        mode: permission bits, 0 for symbolic links.
        content: SHA-256 of a file, target of a symbolic link, empty for others.
        mtime: whole seconds, None where it was not asked for.
    """

    type: str
    mode: int
    content: str
    mtime: int | None


def snapshot(root: Path, *, mtimes: bool = False, modes: bool = True) -> dict[bytes, Node]:
    """Every path below `root` (and ``.``), for comparing trees with ``==``."""
    return {
        os.fsencode(path.relative_to(root)): _node(path, mtimes=mtimes, modes=modes)
        for path in (root, *root.rglob("*"))
    }


def _node(path: Path, *, mtimes: bool, modes: bool) -> Node:
    status = path.lstat()
    names = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}
    kind = names.get(stat.S_IFMT(status.st_mode), stat.filemode(status.st_mode)[0])
    content = ""
    if kind == "file":
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    elif kind == "link":
        content = repr(os.fsencode(path.readlink()))
    mode = stat.S_IMODE(status.st_mode) if modes and kind != "link" else 0
    return Node(kind, mode, content, int(status.st_mtime) if mtimes else None)


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def _settle_times(root: Path, rng: random.Random) -> None:
    """Old times that do not depend on when the tree was made; odd seconds for 2sec-time."""
    for path in sorted([root, *root.rglob("*")], reverse=True):
        seconds = 1_600_000_000 + rng.randrange(100_000_000)
        os.utime(path, (seconds, seconds), follow_symlinks=False)

"""Trees to measure on: Debian's own /usr, and what is made up to grow it."""

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

SMALL = 200_000
"""Bytes; what changes from version to version is below."""

_PIECE = 1 << 16
_FILES_PER_PACKAGE = 800
_LETTERS = bytes(97 + number * number // 2600 for number in range(256))


def make_tree(root: Path, files: int, total: int, rng: random.Random) -> list[Path]:
    """Files of very different sizes (log-normal, as in /usr), eight or so in a directory.

    Four in five hold words, each eight hundred files their own, and the fifth holds noise: zstd
    makes a third of the whole in one stream, and two fifths in chunks of 64 KB.

    Args:
        root: the folder to make it in.
        files: how many.
        total: how many bytes, about.
        rng: decides everything; the same for the same tree.
    """
    weights = [rng.lognormvariate(8.5, 2.0) for _ in range(files)]
    scale = total / sum(weights)
    sizes = [int(weight * scale) for weight in weights]
    made = []
    words: list[bytes] = []
    for number, size in enumerate(sizes):
        if number % _FILES_PER_PACKAGE == 0:
            words = _words(rng)
        folder = root / f"{number // _FILES_PER_PACKAGE:03}" / f"{number // 8:05}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"file-{number:06}"
        with path.open("wb") as file:
            file.writelines(_content(size, words if number % 5 else [], rng))
        made.append(path)
    return made


def debian_tree(root: Path, system: Path) -> None:
    """Unpack /usr of a base system's tar file."""
    root.mkdir(parents=True)
    argv = ["tar", "--extract", f"--file={system}", f"--directory={root}", "--strip-components=2"]
    subprocess.run([*argv, "./usr"], check=True)


def contents(root: Path) -> list[Path]:
    """The files of a tree that have something in them, in an order that stays."""
    return sorted(
        path
        for path in root.rglob("*")
        if not path.is_symlink() and path.is_file() and path.stat().st_size
    )


def stretch(paths: list[Path], total: int, rng: random.Random) -> None:
    """Let a tree have so many bytes, by growing the files that are not small."""
    large = [path for path in paths if path.stat().st_size >= SMALL]
    each = (total - sum(path.stat().st_size for path in paths)) // len(large)
    for number, path in enumerate(large):
        words = _words(rng) if number % 5 else []
        with path.open("ab") as file:
            file.writelines(_content(each, words, rng))


def change(paths: list[Path], count: int, rng: random.Random) -> list[Path]:
    """A new version of so many of the small files: a few bytes longer, nothing kept."""
    small = [path for path in paths if path.stat().st_size < SMALL]
    chosen = rng.sample(small, count)
    for path in chosen:
        path.write_bytes(rng.randbytes(path.stat().st_size + 10))
    return chosen


def _words(rng: random.Random) -> list[bytes]:
    return [rng.randbytes(rng.randint(4, 24)).translate(_LETTERS) for _ in range(1024)]


def _content(size: int, words: list[bytes], rng: random.Random) -> Iterator[bytes]:
    while size > 0:
        length = min(size, _PIECE)
        # A word has fourteen bytes in the mean; a piece that comes out short is no harm.
        piece = b"".join(rng.choices(words, k=length // 10 + 8)) if words else rng.randbytes(length)
        piece = piece[:length]
        yield piece
        size -= len(piece)

"""What stands somewhere, compared with an index that the real casync made."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from casync_updater.cycle.tree import archive_digest, cut
from casync_updater.errors import ContentError
from casync_updater.formats import index as index_format
from casync_updater.formats import mtree
from casync_updater.formats.index import Index
from casync_updater.tools import casync
from support.trees import make_tree

SOFTWARE = 0xB000000000000308
SMALL = "4096:16384:65536"


def published(tmp_path: Path, source: Path, suffix: str = ".caidx") -> tuple[Index, str]:
    file = tmp_path / f"x{suffix}"
    digest = casync.make(file, source, store=tmp_path / "x.castr", flags=SOFTWARE, chunk_size=SMALL)
    return index_format.parse(file.read_bytes(), str(file)), digest


def test_the_right_tree_has_the_archive_s_digest(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 1)
    index, digest = published(tmp_path, tree)
    assert len(index) > 10
    assert archive_digest(tree, index) == digest
    assert b"".join(data for _, data in cut(tree, index)).count(b"not really") == 1


def test_any_other_tree_has_none(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", 1)
    index, _ = published(tmp_path, tree)
    for change in (
        lambda: (tree / "chunk-edge").write_bytes(b"\0" * 262_143 + b"\1"),
        lambda: (tree / "zzz").write_bytes(b""),
        lambda: (tree / "zzz").unlink() or (tree / "turncoat").mkdir(),
        lambda: shutil.rmtree(tree / "turncoat") or shutil.rmtree(tree / "small"),
        lambda: shutil.rmtree(tree) or tree.mkdir(),
        lambda: tree.rmdir() or tree.write_bytes(b"a file"),
    ):
        change()
        with pytest.raises(ContentError, match="differs"):
            archive_digest(tree, index)


def test_a_file_must_be_as_long_as_the_index_says(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    data = os.urandom(200_000)
    blob.write_bytes(data)
    index, digest = published(tmp_path, blob, ".caibx")
    assert archive_digest(blob, index) == digest
    for other in (data + b"x", data[:-1], b"", data[:-1] + b"\0"):
        blob.write_bytes(other)
        with pytest.raises(ContentError, match="differs"):
            archive_digest(blob, index)


def test_an_empty_file_is_a_version_too(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"")
    index, digest = published(tmp_path, blob, ".caibx")
    assert archive_digest(blob, index) == digest
    blob.write_bytes(b"x")
    with pytest.raises(ContentError, match="differs"):
        archive_digest(blob, index)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=False, capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip("no loop device to be had")
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


def test_a_block_device_may_be_longer(tmp_path: Path, loop_device: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(os.urandom(200_000))
    index, digest = published(tmp_path, blob, ".caibx")
    with loop_device.open("r+b") as device:
        device.write(blob.read_bytes())
    assert archive_digest(loop_device, index) == digest


@pytest.mark.parametrize("features", [("permissions", "symlinks", "sec-time"), ("unix",)])
def test_manifests_are_read_in_the_order_and_words_of_casync(
    tmp_path: Path, features: tuple[str, ...]
) -> None:
    tree = make_tree(tmp_path / "tree", 1)
    for name in (b"a", b"a-b", b"a.b", b"a b", b"a\\b", b"a#b", b"#", b"=", b"\x0b\x0c\r"):
        folder = tree / "order" / os.fsdecode(name)
        (folder / "b").mkdir(parents=True)
        (folder / "b" / os.fsdecode(name)).write_bytes(name)
    for byte in set(range(1, 256)) - {0x2F, 0x2E}:
        (tree / "names" / os.fsdecode(bytes([byte]))).write_bytes(b"x")
        (tree / "links" / os.fsdecode(bytes([byte]))).symlink_to(os.fsdecode(bytes([byte])))
    flags = casync.normalised(features)
    with casync.mtree(tree, flags=flags) as pieces:
        lines = b"".join(pieces).splitlines()
    nodes = list(mtree.parse(lines, features, "test"))
    assert [node.order for node in nodes] == sorted(node.order for node in nodes)
    everything = {os.fsencode(path.relative_to(tree)) for path in (tree, *tree.rglob("*"))}
    assert {node.path for node in nodes} == everything
    assert [mtree.escape(node.path).encode() for node in nodes] == [
        line.split(b" ")[0] for line in lines
    ]
    for node in nodes:
        if node.type == "link":
            assert node.link == os.fsencode((tree / os.fsdecode(node.path)).readlink())

"""Sources and chunk stores that the real casync made and reads."""

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from casync_updater.clock import SystemClock
from casync_updater.formats import index as index_format
from casync_updater.formats.store import SUFFIX, LocalStore, decode
from casync_updater.model import FetchSettings, Location
from casync_updater.sources import open_source
from casync_updater.sources.base import Source
from casync_updater.sources.chunks import Chunks
from casync_updater.tools.process import run
from support.trees import make_tree
from support.webserver import WebServer

SETTINGS = FetchSettings(connections=8, retries=12, retry_max_wait=0.05, read_timeout=2.0)


@pytest.fixture(params=["zstd", "xz", "gzip", "uncompressed"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An index and its store; casync reads uncompressed stores and has no option to make one."""
    tree = make_tree(tmp_path / "tree", seed=1, count=200)
    folder = tmp_path / "site"
    folder.mkdir()
    compression = [] if request.param == "uncompressed" else [f"--compression={request.param}"]
    run(
        ["casync", "make", *compression, "--with=permissions", "--with=symlinks",
         "--with=sec-time", f"--store={folder}/x.castr", f"{folder}/x.caidx", str(tree)],
        timeout=60,
    )  # fmt: skip
    if request.param == "uncompressed":
        index = index_format.parse((folder / "x.caidx").read_bytes(), "x.caidx")
        for ref in {ref.id: ref for ref in index}.values():
            file = folder / "x.castr" / ref.hex[:4] / f"{ref.hex}{SUFFIX}"
            file.with_suffix("").write_bytes(decode(file.read_bytes(), ref.size, str(file)))
            file.unlink()
    return folder


@contextmanager
def reading(address: Path | str) -> Iterator[Source]:
    location = Location(f"{address}/x.caidx", f"{address}/x.castr")
    with closing(open_source(location, SETTINGS, SystemClock())) as source:
        yield source


def digest_of(sources: list[Source]) -> str:
    """The digest of the whole archive, put together from its chunks."""
    document = sources[-1].document("", limit=1 << 20)
    assert document is not None
    index = index_format.parse(document.body, document.where)
    digest = hashlib.new(index.hash_name)
    with (
        Chunks(sources, index, connections=8) as chunks,
        closing(chunks.stream(index)) as stream,
    ):
        for _, data in stream:
            digest.update(data)
    return digest.hexdigest()


def casyncs_digest(site: Path) -> str:
    argv = ["casync", "digest", f"--store={site}/x.castr", f"{site}/x.caidx"]
    return run(argv, timeout=60).stdout.decode().strip()


def test_from_a_folder(site: Path) -> None:
    with reading(site) as source:
        assert digest_of([source]) == casyncs_digest(site)


def test_from_a_web_server_that_answers_half_of_the_requests(site: Path) -> None:
    with WebServer(site) as server, reading(server.url) as source:
        server.fail("/x.castr/*", every=4, cut=10)
        server.fail("/x.castr/*", every=3, status=500)
        assert digest_of([source]) == casyncs_digest(site)
        assert server.connections < len(server.requests)


def test_from_a_damaged_drive_with_the_web_behind_it(site: Path, tmp_path: Path) -> None:
    expected = casyncs_digest(site)
    files = sorted(file for file in (site / "x.castr").glob("*/*"))
    drive = tmp_path / "drive"
    for number, file in enumerate(files):
        copy = drive / "x.castr" / file.relative_to(site / "x.castr")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if number % 3 == 0:
            copy.write_bytes(file.read_bytes())
        elif number % 3 == 1:
            copy.write_bytes(file.read_bytes()[:-1] + b"\xaa")
    with WebServer(site) as server, reading(drive) as near, reading(server.url) as far:
        assert digest_of([near, far]) == expected
        asked = len(server.paths("/x.castr/*"))
        assert asked < 2 * len(files)


def test_casync_reads_what_is_put_into_a_local_store(site: Path, tmp_path: Path) -> None:
    expected = casyncs_digest(site)
    index = index_format.parse((site / "x.caidx").read_bytes(), "x.caidx")
    private = LocalStore(tmp_path / "private")
    private.path.mkdir()
    with reading(site) as source:
        chunks = Chunks([source], index, connections=2)
        for number, (ref, data) in enumerate(chunks.stream(index)):
            # Some as they are, some as the store has them: casync takes a mixture.
            raw = source.chunk(ref.hex, limit=1 << 20)
            if number % 2 and raw != data:
                private.put(ref.hex, raw, compressed=True)
            else:
                private.put(ref.hex, data, compressed=False)
    argv = ["casync", "digest", f"--store={private.path}", f"{site}/x.caidx"]
    assert run(argv, timeout=60).stdout.decode().strip() == expected

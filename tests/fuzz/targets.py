"""Every parser that reads bytes from somewhere else, as a function of bytes.

A target gives what its parser refuses in the ways that the parser's callers expect; everything
else that leaves it is a finding. Where two ways lead to one result, the target compares them.
Seeds are made by what makes the real thing.
"""

import base64
import gzip
import hashlib
import json
import lzma
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from casync_updater import codec, reports
from casync_updater.config.entries import load_entries
from casync_updater.config.publications import load_publications
from casync_updater.config.settings import commented, load_settings
from casync_updater.cycle.extract import Leftover, extract, plan_extract, verify_tree
from casync_updater.cycle.extract.leftover import Journal
from casync_updater.errors import ContentError, UpdaterError
from casync_updater.formats import archive, mtree, openpgp, store
from casync_updater.formats import index as index_format
from casync_updater.formats import record as record_format
from casync_updater.formats.index import SHA512_256, Index
from casync_updater.formats.manifest import manifest
from casync_updater.model import (
    ChunkRef,
    FetchSettings,
    FileRef,
    Installed,
    Location,
    Mark,
    Origin,
    Progress,
    Release,
    Step,
)
from casync_updater.online import netlink
from casync_updater.online.netlink import Network
from casync_updater.release import format_release, parse_release
from casync_updater.reports import Began, CycleEnd, LineReader, Outcome
from casync_updater.server.news import news_of
from casync_updater.sources.base import Validators
from casync_updater.sources.http import HttpSource
from casync_updater.state import Intent, Kept, PendingAction, State
from casync_updater.state import Journal as CommitJournal
from casync_updater.takeover import take_over
from casync_updater.tools import gpgv
from support.catar import DEVICE, FLAGS, SYMLINK, UNIX, XATTR, entry, file, folder, record
from support.fakes import FakeClock
from support.signed import Publisher
from support.trees import snapshot
from support.world import make_index

SIZE = 1 << 16
"""No input is longer."""


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        run: parses; raises one of `refusals`, or nothing.
        seeds: inputs that are right, or nearly; takes a folder for what makes them.
        refusals: how the parser says that an input is wrong.
    """

    run: Callable[[bytes], object]
    seeds: Callable[[Path], Iterable[bytes]]
    refusals: tuple[type[Exception], ...] = (ContentError,)

    def accepts(self, data: bytes) -> bool:
        """Run it; False where the input was refused as it should be."""
        try:
            self.run(data)
        except self.refusals:
            return False
        return True


def scratch() -> Path:
    """A folder of this process, for parsers that read files. Whoever runs targets removes it."""
    path = Path(tempfile.gettempdir()) / f"fuzz-{os.getpid()}"
    path.mkdir(exist_ok=True)
    return path


# The index, the archive, chunks.


def parse_index(data: bytes) -> None:
    index = index_format.parse(data, "it")
    refs = list(index)
    assert sum(ref.size for ref in refs) == index.size
    assert all(0 < ref.size <= index.chunk_max for ref in refs)


def index_seeds(_folder: Path) -> Iterator[bytes]:
    yield make_index(b"", FLAGS | SHA512_256)
    yield make_index(bytes(100_000), FLAGS)


def archive_streams() -> Iterator[tuple[int, bytes]]:
    """Streams with everything in them that the decoder knows, with their flags."""
    deep = folder()
    for _ in range(20):
        deep = folder((b"d", deep))
    yield FLAGS, folder((b"a", file()), (b"d", folder((b"e", file()))), (b"z", file(bytes(99))))
    link = entry(0o120777) + record(SYMLINK, b"../../etc\0")
    yield FLAGS, folder((b"l", link), mode=0o41777)
    yield FLAGS, deep
    device = struct.pack("<QQQQ", 32, DEVICE, 1, 3)
    yield (
        UNIX,
        folder(
            (b"c", entry(0o020666, flags=UNIX) + device),
            (b"p", entry(0o010644, flags=UNIX)),
            (b"s", file(mode=0o104755, flags=UNIX)),
            flags=UNIX,
        ),
    )
    attributes = FLAGS | 1 << 28
    note = record(XATTR, b"user.note\0hi")
    yield (
        attributes,
        folder(
            (b"x", file(extra=note + record(XATTR, b"user.o\0"), flags=attributes)),
            flags=attributes,
        ),
    )


def parse_archive(data: bytes) -> None:
    """The flags of its index, then the stream."""
    flags = int.from_bytes(data[:8], "little")
    feed = archive.Memory(data[8:])
    decoder = archive.Decoder(feed, flags)
    node = decoder.next()
    while decoder.frames:
        if node.mode and node.name:
            again = archive.decode_node(node.raw, flags)
            assert (again.name, again.mode, again.size) == (node.name, node.mode, node.size)
        feed.peek(node.size)
        feed.position += node.size
        node = decoder.next()


def archive_seeds(_folder: Path) -> Iterator[bytes]:
    for flags, stream in archive_streams():
        yield flags.to_bytes(8, "little") + stream


CHUNK = b"a chunk's own bytes, " * 40
CHUNK_INDEX = Index(SHA512_256, 1, 1, 1 << 20, b"")
CHUNK_REF = ChunkRef(CHUNK_INDEX.chunk_id(CHUNK), 0, len(CHUNK))


def read_chunk(data: bytes) -> None:
    """The real file of a chunk, or another one in its place."""
    assert store.content(data, CHUNK_REF, CHUNK_INDEX, "it") == CHUNK


def decode_chunk(data: bytes) -> None:
    """A size, then a file that says what it is: no id stands in the way."""
    size = int.from_bytes(data[:2], "little")
    assert len(store.decode(data[2:], size, "it")) == size


def chunk_files() -> Iterator[bytes]:
    yield CHUNK
    yield zstandard.compress(CHUNK)
    yield zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(CHUNK)
    yield lzma.compress(CHUNK)
    yield gzip.compress(CHUNK)
    yield zstandard.compress(bytes(1 << 20))


class _Pieces:
    """A stream, cut into chunks of one size."""

    def __init__(self, stream: bytes, flags: int, size: int) -> None:
        table = b""
        self.data: dict[bytes, bytes] = {}
        for start in range(0, len(stream), size):
            piece = stream[start : start + size]
            name = hashlib.new("sha512_256", piece).digest()
            self.data[name] = piece
            table += struct.pack("<Q32s", start + len(piece), name)
        self.index = Index(flags | SHA512_256, 1, size, size, table)

    def stream(self, refs: Iterable[ChunkRef]) -> Iterator[tuple[ChunkRef, bytes]]:
        for ref in refs:
            yield ref, self.data[ref.id]

    def get(self, ref: ChunkRef) -> bytes:
        return self.data[ref.id]


class _Source:
    """Makes choices of bytes, as long as there are any."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece.ljust(count, b"\0")

    def byte(self) -> int:
        return self.take(1)[0]


NAMES = (b"a", b"b", b"b.", b"c", b"dd", b"e\xff", b"..", b".", b"", b"x/y", b"n" * 255, b"n" * 256)
MODES = (0o100644, 0o100755, 0o104755, 0o102711, 0o120777, 0o020666, 0o060600, 0o010644, 0o140755)


def _tree(source: _Source, flags: int, depth: int = 0) -> bytes:
    """A directory that the bytes describe: mostly right, now and then not."""
    children = []
    wild = source.byte() > 200
    for _ in range(source.byte() % 6):
        name = NAMES[source.byte() % (len(NAMES) if wild else 6)]
        mtime = source.byte() * 10**9
        mode = MODES[source.byte() % (len(MODES) if wild or flags == UNIX else 4)]
        if depth < 5 and source.byte() < 70:
            children.append((name, _tree(source, flags, depth + 1)))
        elif stat.S_ISREG(mode):
            body = source.take(source.byte() % 30) * (source.byte() % 70 + 1)
            children.append((name, file(body, mode=mode, flags=flags, mtime=mtime)))
        else:
            node = entry(mode, flags=flags, mtime=mtime)
            if stat.S_ISLNK(mode):
                node += record(SYMLINK, source.take(1 + source.byte() % 9) + b"\0")
            elif not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
                node += struct.pack("<QQQQ", 32, DEVICE, source.byte(), source.byte())
            children.append((name, node))
    if not wild:
        children = sorted(dict(children).items())
    mode = 0o41777 if source.byte() > 220 else 0o40755
    return folder(*children, mode=mode, flags=flags)


def build_trees(data: bytes) -> None:
    """Two archives that the bytes describe: built, updated from one to the other, and compared.

    A tree that was updated is the one that is built anew; what was built is what its record says;
    and whatever happens, nothing appears beside the tree.
    """
    source = _Source(data)
    flags = UNIX if source.byte() & 1 and os.geteuid() == 0 else FLAGS
    size = (16, 64, 100, 1000, 1 << 16)[source.byte() % 5]
    first, second = _tree(source, flags), _tree(source, flags)
    if source.byte() > 220:
        broken = bytearray(second)
        for _ in range(source.byte() % 4):
            broken[int.from_bytes(source.take(2), "little") % len(broken)] = source.byte()
        second = bytes(broken)
    place = Path(tempfile.mkdtemp(dir=scratch()))
    try:
        _build_both(place, _Pieces(first, flags, size), _Pieces(second, flags, size))
    finally:
        shutil.rmtree(place)


def _build_both(place: Path, first: _Pieces, second: _Pieces) -> None:
    roots = []
    try:
        for name in ("old", "fresh", "updated"):
            (place / name).mkdir()
            roots.append(os.open(place / name, os.O_RDONLY | os.O_DIRECTORY))
        old, fresh, updated = roots
        try:
            installed = extract(plan_extract(first.index, None, -1), first, old)
        except ContentError:
            return
        before = snapshot(place / "old")
        try:
            anew = extract(plan_extract(second.index, None, -1), second, fresh)
        except ContentError:
            anew = None
        try:
            done = extract(plan_extract(second.index, installed.record, old), second, updated)
        except ContentError:
            assert anew is None, "an update refuses what an installation takes"
            return
        finally:
            assert {path.name for path in place.iterdir()} == {"old", "fresh", "updated"}
            assert snapshot(place / "old") == before
        assert anew is not None, "an update takes what an installation refuses"
        assert snapshot(place / "fresh") == snapshot(place / "updated")
        assert list(verify_tree(done.record, updated, windows=None)) == []
        assert manifest(done.record) == manifest(anew.record)
    finally:
        for descriptor in roots:
            os.close(descriptor)


def build_seeds(_folder: Path) -> Iterator[bytes]:
    for seed in range(40):
        yield b"".join(
            hashlib.sha256(b"%d %d" % (seed, number)).digest() for number in range(seed % 7 + 3)
        )


# What a publisher says.


RELEASE = Release(
    "tree",
    "1.4.2-1",
    1_795_447_266,
    1_795_447_266.0,
    1_798_039_266.0,
    FileRef("tree.caidx", 2000, "a" * 64),
    FileRef("tree.caidx.mtree", 3000, "b" * 64),
    "c" * 64,
    ("permissions", "symlinks"),
    264_503_808,
    116_391_936,
    ("one", "two"),
)


def read_release(data: bytes) -> None:
    release = parse_release(data, "it")
    assert parse_release(format_release(release), "again") == release


def release_seeds(_folder: Path) -> Iterator[bytes]:
    yield format_release(RELEASE).encode()


def parse_mtree(data: bytes) -> None:
    nodes = list(mtree.parse(data.splitlines(), ("permissions",), "it"))
    list(mtree.diff(nodes, nodes[1:]).paths())
    for node in nodes:
        mtree.escape(node.path).encode("ascii")


def mtree_seeds(_folder: Path) -> Iterator[bytes]:
    for flags, stream in archive_streams():
        yield manifest(_record_of(stream, flags))


def _record_of(stream: bytes, flags: int) -> record_format.Record:
    pieces = _Pieces(stream, flags, 1 << 16)
    place = Path(tempfile.mkdtemp(dir=scratch()))
    root = os.open(place, os.O_RDONLY)
    try:
        return extract(plan_extract(pieces.index, None, -1), pieces, root).record
    finally:
        os.close(root)
        shutil.rmtree(place)


def split_signed(data: bytes) -> None:
    message = openpgp.split_clearsigned(data)
    if message is not None:
        assert message.text.endswith(b"\n") or not message.text
        assert not any(line.endswith((b" ", b"\t")) for line in message.text.split(b"\n"))
        joined = openpgp.join_clearsigned([data, data])
        again = openpgp.split_clearsigned(joined)
        assert again is not None
        assert again.text == message.text


def signed_seeds(folder: Path) -> Iterator[bytes]:
    publisher = Publisher(folder / "keys")
    yield publisher.sign(format_release(RELEASE).encode())
    yield publisher.sign(b"- dash\n-----dash\nFrom\n")


def keyring_seeds(folder: Path) -> Iterator[bytes]:
    yield Publisher(folder / "keys").keys.keyring.read_bytes()


def armored(_folder: Path) -> Iterator[bytes]:
    key = bytes(range(200))
    lines = [base64.b64encode(key)[at : at + 64] for at in range(0, 268, 64)]
    checksum = b"=" + base64.b64encode(openpgp._crc24(key))
    begin, end = (b"-----%s PGP PUBLIC KEY BLOCK-----" % word for word in (b"BEGIN", b"END"))
    block = b"\n".join([begin, b"Version: 1", b"", *lines, checksum, end, b""])
    yield block
    yield block + b"\n" + block


STATUS = b"""[GNUPG:] NEWSIG
[GNUPG:] KEY_CONSIDERED AAAA 0
[GNUPG:] SIG_ID x 2026-11-23 1795447266
[GNUPG:] GOODSIG BBBB Example Ltd <updates@example.com>
[GNUPG:] VALIDSIG CCCC 2026-11-23 1795447266 0 4 0 22 10 01 CCCC
[GNUPG:] NEWSIG
[GNUPG:] ERRSIG DDDD 22 10 01 1795447266 9 DDDD
[GNUPG:] NO_PUBKEY DDDD
[GNUPG:] PLAINTEXT 74 0
"""


# What a web server answers.


class _Answering:
    """Says the same bytes to whoever connects, in a network namespace without a way out."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                connection.settimeout(2)
                try:
                    while b"\r\n\r\n" not in connection.recv(65536):
                        pass
                    connection.sendall(self.answer)
                except OSError:
                    continue


_answering: list[_Answering] = []
_IMPATIENT = FetchSettings(connect_timeout=1, read_timeout=1, retries=0, retry_max_wait=0.01)


def ask_server(data: bytes) -> None:
    """One answer to three questions. Redirects may lead anywhere, so there is only loopback."""
    if not _answering:
        _answering.append(_Answering())
    server = _answering[0]
    server.answer = data
    place = f"http://127.0.0.1:{server.port}/tree"
    source = HttpSource(Location(f"{place}.caidx", f"{place}.castr"), _IMPATIENT, FakeClock())
    try:
        document = source.document(".release", limit=1000)
        assert document is not None
        assert len(document.body) <= 1000
        f"{document.validators} {document.where}".encode()
        source.document(".release", limit=1000, known=document.validators or Validators("x", None))
        source.chunk("ab" * 32, limit=1000)
    finally:
        source.close()


def answer_seeds(_folder: Path) -> Iterator[bytes]:
    body = b"a release"
    head = b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\nETag: "x"\r\n'
    yield head + b"Last-Modified: Mon, 23 Nov 2026 15:21:06 +0000\r\n\r\n" + body
    yield b"HTTP/1.1 304 Not Modified\r\nDate: Mon, 23 Nov 2026 15:21:06 GMT\r\n\r\n"
    yield b"HTTP/1.0 302 Found\r\nLocation: //[::1]:1/x?y#z\r\n\r\n"
    yield b"HTTP/1.1 503 Busy\r\nRetry-After: 120\r\nContent-Length: 0\r\n\r\n"
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\na release\r\n0\r\n\r\n"
    packed = gzip.compress(body)
    yield b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (
        len(packed),
        packed,
    )
    yield b"HTTP/1.1 200 OK\r\n\r\n<!DOCTYPE html>" + bytes(3000)


# What this machine keeps, and what its own processes say.


def load_record(data: bytes) -> None:
    path = scratch() / "record"
    path.write_bytes(data)
    assert record_format.load(path) is not None


def record_seeds(_folder: Path) -> Iterator[bytes]:
    for flags, stream in archive_streams():
        yield b"".join(_record_of(stream, flags).packed())


def read_leftover(data: bytes) -> None:
    """A journal after a power cut, and a tree that has one file of what it speaks of."""
    place = scratch() / "leftover"
    (place / "tree").mkdir(parents=True, exist_ok=True)
    (place / "tree" / "a").write_bytes(bytes(99))
    (place / "journal").write_bytes(data)
    root = os.open(place / "tree", os.O_RDONLY)
    left = Leftover(place / "journal", root)
    try:
        for chunk, (start, end) in left.chunks.items():
            made = left.read(chunk) if end - start < 1 << 20 else None
            assert made is None or len(made) <= end - start
    finally:
        left.close()
        os.close(root)


def leftover_seeds(folder: Path) -> Iterator[bytes]:
    for flags, stream in archive_streams():
        feed = archive.Memory(stream)
        decoder = archive.Decoder(feed, flags)
        with (folder / "journal").open("wb") as output:
            journal = Journal(output.fileno(), _Pieces(stream, flags, 64).index)
            node = decoder.next()
            while decoder.frames:
                journal.add(node, decoder.path(node.name) if node.size else b"")
                feed.position += node.size
                node = decoder.next()
            journal.flush()
        yield (folder / "journal").read_bytes()


def read_state(data: bytes) -> None:
    state = codec.from_json(State, json.loads(data))
    assert codec.from_json(State, json.loads(json.dumps(codec.to_json(state)))) == state


def state_seeds(_folder: Path) -> Iterator[bytes]:
    installed = Installed("d" * 64, "e" * 64, 1.0, "here", Origin.SOURCE, "1", 5, 1.0)
    yield json.dumps(codec.to_json(State("/x"))).encode()
    full = State(
        "/x",
        signed_mark=Mark(5, 50.0, "d" * 64),
        installed=installed,
        previous=(Kept("previous", installed, ("data",)),),
        journal=CommitJournal(Intent.EXCHANGE, installed, moves=("a", "b")),
        pending=(PendingAction("id", "command", (("a", "b"),), 5.0),),
    )
    yield json.dumps(codec.to_json(full)).encode()


def feed_reports(data: bytes) -> None:
    whole, cut = LineReader(), LineReader()
    together = list(whole.feed(data))
    half = len(data) // 2
    assert [*cut.feed(data[:half]), *cut.feed(data[half:])] == together
    for report in together:
        assert reports.decode(reports.encode(report)) == report


def report_seeds(_folder: Path) -> Iterator[bytes]:
    end = CycleEnd(Outcome.UPDATED, 0, "updated to 2", 5, "2", ("true",), Origin.SOURCE)
    lines = (Began(Step.BUILD, "2"), Progress(5, 7), Progress(5), end)
    yield b"".join(map(reports.encode, lines))


def apply_netlink(data: bytes) -> None:
    network = Network()
    changes = network.apply(data)
    "\n".join(changes.said).encode()
    network.usable()
    Network().replaced_by(network)
    for _, _, body in netlink.messages(data):
        try:
            netlink._usable_route(body, beyond=True)
        except (struct.error, ValueError):
            continue


def netlink_seeds(_folder: Path) -> Iterator[bytes]:
    with netlink._open() as asked:
        for kind, request in (
            (netlink._GETLINK, netlink._LINK.pack(0, 0, 0, 0, 0)),
            (netlink._GETADDR, netlink._ADDRESS.pack(0, 0, 0, 0, 0)),
            (netlink._GETROUTE, netlink._ROUTE.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)),
        ):
            yield from netlink._dump(asked, kind, request)


# What an administrator writes.


def load_config(data: bytes) -> None:
    """The same bytes as entries of both programs, as settings, and as an old installation's."""
    place = scratch() / "config"
    (place / "etc/casync-updater").mkdir(parents=True, exist_ok=True)
    for name in ("x.json", "x.conf", "etc/casync-updater/x.json"):
        (place / name).write_bytes(data)
    for loaded in (load_entries(place / "x.json"), load_publications(place / "x.json")):
        assert all(isinstance(line, str) and "\n" not in line for line in loaded.problems)
    load_settings(place / "x.conf")
    take_over(place)


def config_seeds(_folder: Path) -> Iterator[bytes]:
    entry = {
        "interval": 3600000,
        "srcIndex": "https://user:pw@example.com/x.caidx?a=b",
        "srcStore": "/srv/x.castr",
        "backupIndex": "file:///media/x.caidx",
        "backupStore": "/media/x.castr",
        "dstPath": "/opt/x",
        "triggers": [{"paths": ["."], "actions": ["true"]}],
        "preserve": ["data"],
        "keep": 2,
    }
    yield json.dumps([entry, {**entry, "dstPath": "/srv/y/x", "signedBy": ["/k.gpg"]}]).encode()
    publication = {
        "index": "/srv/x.caidx",
        "store": "/srv/x.castr",
        "source": "/home/x",
        "with": "permissions symlinks",
        "validFor": "30d",
        "chunkSize": "16K:64K:256K",
        "signKey": "0123456789ABCDEF",
    }
    yield json.dumps(publication).encode()
    yield b"\xef\xbb\xbf[]"
    yield commented().replace("#", "").encode()[:4000]
    yield b"[trust]\nrequire = yes\n[online]\nhosts = a, [::1]:5, b:6\n[[x]]\n"


def read_changelog(data: bytes) -> None:
    news = news_of(data.decode("utf-8", "replace"))
    assert all(line and "\n" not in line for line in news.changes)


def changelog_seeds(_folder: Path) -> Iterator[bytes]:
    yield (
        b"x (1.2-3) unstable; urgency=low\n\n  * One.\n    More.\n  [ X ]\n  - two\n\n"
        b" -- X <x@example.com>  Mon, 23 Nov 2026 15:21:06 +0000\n"
    )
    yield b"* a\n* b\n"


TARGETS = {
    "index": Target(parse_index, index_seeds),
    "archive": Target(parse_archive, archive_seeds),
    "build": Target(build_trees, build_seeds, refusals=()),
    "chunk": Target(read_chunk, lambda _folder: chunk_files()),
    "decompress": Target(
        decode_chunk, lambda _: (len(CHUNK).to_bytes(2, "little") + one for one in chunk_files())
    ),
    "release": Target(read_release, release_seeds),
    "mtree": Target(parse_mtree, mtree_seeds),
    "clearsigned": Target(split_signed, signed_seeds),
    "keyring": Target(openpgp.key_expiry, keyring_seeds),
    "armor": Target(lambda data: openpgp.dearmor(data, "PUBLIC KEY BLOCK"), armored),
    "gpgv": Target(gpgv.parse_status, lambda _: (STATUS,), (gpgv.StatusError,)),
    "http": Target(ask_server, answer_seeds, (UpdaterError,)),
    "record": Target(load_record, record_seeds),
    "leftover": Target(read_leftover, leftover_seeds, ()),
    "state": Target(read_state, state_seeds, (ValueError, TypeError, RecursionError)),
    "reports": Target(feed_reports, report_seeds, ()),
    "netlink": Target(apply_netlink, netlink_seeds, ()),
    "config": Target(load_config, config_seeds, ()),
    "changelog": Target(read_changelog, changelog_seeds, ()),
}
"""Every target by its name."""

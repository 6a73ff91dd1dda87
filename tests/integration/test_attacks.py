"""What attackers can do to a signed entry, by the names of the TUF specification (section 1.5.2).

Each attack is run against a web server and against a drive. The promise is always the same one:
the device runs exactly a tree that its publisher signed, and never an older one than it accepted;
an attack can delay an update, and `status` shows what was refused.
"""

import gzip
import lzma
import os
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from casync_updater.formats import index as index_format
from casync_updater.formats.store import path_of
from casync_updater.model import Apply, TrustSettings
from casync_updater.reports import CycleEnd
from casync_updater.server.keygen import keygen
from casync_updater.trust import unwrap
from support.catar import (
    DEVICE,
    FCAPS,
    FLAGS,
    PAYLOAD,
    SYMLINK,
    XATTR,
    entry,
    file,
    folder,
    record,
)
from support.device import Device
from support.keys import key_maker
from support.signed import OWNER, copy, location, release_of
from support.trees import snapshot
from support.webserver import WebServer
from support.world import World, archive_of, read_index, wrap_table

Tamper = Callable[[World, Path], object]
"""Changes a site, or a drive, that holds version 2; the device has version 1."""

END = b"-----END PGP SIGNATURE-----\n"
BEGIN = b"-----BEGIN PGP SIGNATURE-----\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


class Victim:
    """A device with version 1, a site and a drive with version 2 to tamper with."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.keyring = world.publisher.keys.keyring
        self.device = Device(folder / "device", location(world.sites[1]), keyring=self.keyring)
        assert self.device.cycle().exit == 0
        self.place = copy(world.sites[2], folder / "place")

    def online(self) -> CycleEnd:
        with WebServer(self.place) as server:
            self.device.source = location(server.url)
            return self.device.cycle()

    def with_drive(self) -> CycleEnd:
        self.device.source = location("/nowhere")
        self.device.backup = location(self.place)
        return self.device.cycle()

    def has(self, version: int) -> bool:
        return snapshot(self.device.destination) == self.world.snapshots[version]


@pytest.fixture
def victim(world: World, tmp_path: Path) -> Victim:
    return Victim(world, tmp_path)


def refused(victim: Victim, tamper: Tamper, where: str, code: int) -> CycleEnd:
    """The attack is refused with that exit code, and the next honest source is taken."""
    tamper(victim.world, victim.place)
    end = victim.online() if where == "online" else victim.with_drive()
    assert end.exit == code, (end, victim.device.log)
    assert victim.has(1)
    assert end.message
    if code == 4:
        found = victim.device.state.refused
        assert found is not None
        assert f"refused ({found.check})" in end.message or found.found == end.message
        assert str(victim.place) in found.source or "127.0.0.1" in found.source
    victim.device.source = location(victim.world.sites[3])
    victim.device.backup = None
    assert victim.device.cycle().exit == 0, victim.device.log
    assert victim.has(3)
    assert victim.device.state.refused is None
    return end


def body_of(place: Path) -> bytes:
    return (place / "tree.caidx.release").read_bytes()


def with_body(change: Callable[[bytes], bytes]) -> Tamper:
    def tamper(_world: World, place: Path) -> None:
        (place / "tree.caidx.release").write_bytes(change(body_of(place)))

    return tamper


def sign_by_a_stranger(world: World, place: Path) -> None:
    body = world.publisher.sign(unwrap(body_of(place)), world.publisher.strangers)
    (place / "tree.caidx.release").write_bytes(body)


def swap_index(world: World, place: Path) -> None:
    data = read_index(world.sites[3])
    (place / "tree.caidx").write_bytes(data)
    (place / "by-hash" / "SHA256" / release_of(place).index.sha256).write_bytes(data)


def new_chunks(world: World, place: Path) -> list[Path]:
    """The chunk files that version 1 does not need."""
    old = {ref.hex for ref in index_format.parse(read_index(world.sites[1]), "")}
    new = index_format.parse(read_index(place), "")
    return [place / "store.castr" / path_of(ref.hex) for ref in new if ref.hex not in old]


def with_chunks(change: Callable[[Path], object]) -> Tamper:
    def tamper(world: World, place: Path) -> None:
        for path in new_chunks(world, place):
            change(path)

    return tamper


def swap_chunks(world: World, place: Path) -> None:
    first, second, *_ = new_chunks(world, place)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_link(path: Path) -> None:
    moved = path.with_suffix(".moved")
    path.rename(moved)
    path.symlink_to(moved)


ZEROS = bytes(64 << 20)
BOMBS = {
    "zstd": zstandard.compress(ZEROS),
    "zstd that hides its size": zstandard.ZstdCompressor(write_content_size=False).compress(ZEROS),
    "xz": lzma.compress(ZEROS, preset=1),
    "gzip": gzip.compress(ZEROS, 1),
}


def enormous(path: Path) -> None:
    """A terabyte that takes no room: whoever reads it is busy for hours."""
    os.truncate(path, 1 << 40)


both = pytest.mark.parametrize("where", ["online", "drive"])


class TestArbitrarySoftware:
    """What the publisher did not sign is never installed, wherever it comes from."""

    @both
    @pytest.mark.parametrize(
        "tamper",
        [
            pytest.param(with_body(unwrap), id="unsigned"),
            pytest.param(sign_by_a_stranger, id="another key"),
            pytest.param(with_body(lambda b: b[: b.index(BEGIN)]), id="signature cut off"),
            pytest.param(with_body(lambda b: b[: b.index(END) - 40]), id="cut in the signature"),
            pytest.param(with_body(lambda b: b"Format: 1\n" + b), id="text before"),
            pytest.param(with_body(lambda b: b + b"Version: 9\n"), id="text after"),
            pytest.param(with_body(lambda b: b + b), id="twice"),
            pytest.param(
                with_body(lambda b: b.replace(BEGIN, b"X: 1\n" + BEGIN)), id="text between"
            ),
            pytest.param(
                with_body(lambda b: b.replace(b"Version: 2.0", b"Version: 9.0")), id="altered"
            ),
        ],
    )
    def test_release(self, victim: Victim, where: str, tamper: Tamper) -> None:
        end = refused(victim, tamper, where, 4)
        assert "refused (signature)" in end.message

    @both
    @pytest.mark.parametrize(
        "tamper",
        [
            pytest.param(swap_chunks, id="swapped"),
            pytest.param(with_chunks(lambda p: p.write_bytes(p.read_bytes()[:-7])), id="truncated"),
            pytest.param(with_chunks(lambda p: p.write_bytes(p.read_bytes() + b"x")), id="longer"),
            pytest.param(with_chunks(lambda p: p.write_bytes(bytes(4 << 20))), id="oversized"),
            pytest.param(with_chunks(lambda p: p.write_bytes(b"")), id="empty"),
        ],
    )
    def test_chunks(self, victim: Victim, where: str, tamper: Tamper) -> None:
        refused(victim, tamper, where, 4 if where == "online" else 1)

    @both
    @pytest.mark.parametrize("kind", BOMBS)
    def test_decompression_bombs(self, victim: Victim, where: str, kind: str) -> None:
        bomb = with_chunks(lambda path: path.write_bytes(BOMBS[kind]))
        refused(victim, bomb, where, 4 if where == "online" else 1)

    @both
    def test_missing_chunks(self, victim: Victim, where: str) -> None:
        refused(victim, with_chunks(Path.unlink), where, 3 if where == "online" else 1)

    @pytest.mark.parametrize("change", [as_fifo, as_link])
    def test_what_is_no_file_on_a_drive(
        self, victim: Victim, change: Callable[[Path], object]
    ) -> None:
        refused(victim, with_chunks(change), "drive", 1)

    @both
    def test_what_is_demanded_of_all_is_demanded_of_each(
        self, victim: Victim, world: World, where: str
    ) -> None:
        victim.device.keyring = None
        victim.device.trust = TrustSettings(require=True, keyrings=victim.keyring)
        refused(victim, with_body(unwrap), where, 4)

    def test_a_vendors_keyring_leaves_other_entries_alone(
        self, world: World, tmp_path: Path
    ) -> None:
        """Verified is what is signed; demanded is nothing of an entry that never had it."""
        folder = tmp_path / "keyrings"
        folder.mkdir()
        shutil.copy(world.publisher.strangers.keyring, folder / "vendor.gpg")
        device = Device(tmp_path / "device", location(world.unsigned[1]))
        device.trust = TrustSettings(keyrings=folder)
        assert device.cycle().exit == 0
        device.source = location(world.unsigned[2])
        end = device.cycle()
        assert (end.exit, end.version) == (0, "2.0")


class TestRollback:
    """No release older than one that was accepted is installed, whoever signed it."""

    @both
    @pytest.mark.parametrize("broken", [False, True])
    def test_replay(
        self, victim: Victim, world: World, tmp_path: Path, where: str, broken: bool
    ) -> None:
        assert victim.online().version == "2.0"
        victim.place = copy(world.sites[1], tmp_path / "old")
        if broken:
            (victim.device.folder / "state" / "tree" / "state.json").write_text("{")
        end = victim.online() if where == "online" else victim.with_drive()
        assert end.exit == 0
        assert "stale" in end.message
        assert victim.has(2)

    def test_the_drive_of_yesterday_is_refreshed_not_followed(
        self, victim: Victim, world: World, tmp_path: Path
    ) -> None:
        victim.online()
        drive = copy(world.sites[1], tmp_path / "old")
        victim.device.source = location(world.sites[2])
        victim.device.backup = location(drive)
        assert victim.device.cycle().exit == 0
        assert victim.has(2)
        assert body_of(drive) == body_of(world.sites[2])

    @both
    def test_a_serial_beyond_all(self, victim: Victim, where: str) -> None:
        """One signed release must not be able to lock the publisher out for ever."""
        refused(victim, self._far_serial, where, 4)

    def _far_serial(self, world: World, place: Path) -> None:
        release = release_of(place)
        text = unwrap(body_of(place)).replace(
            f"Serial: {release.serial}".encode(), f"Serial: {2**52}".encode()
        )
        (place / "tree.caidx.release").write_bytes(world.publisher.sign(text))


class TestFreeze:
    """A release is installed as long as its Valid-Until says; after that it is refused."""

    @both
    def test_expired(self, victim: Victim, where: str) -> None:
        end = refused(victim, self._expire, where, 4)
        assert "refused (expiry)" in end.message

    def _expire(self, world: World, place: Path) -> None:
        date = float(int(time.time()) - 90_000)
        world.replace_release(place, date=date, valid_until=date + 3600)

    @both
    @pytest.mark.parametrize(
        ("now", "valid", "code", "version"),
        [
            pytest.param(0.0, 30, 0, 2, id="1970"),
            pytest.param(2_208_988_800.0, 30, 4, 1, id="2040"),
            pytest.param(2_208_988_800.0, None, 0, 2, id="2040, without Valid-Until"),
        ],
    )
    def test_clocks(
        self, victim: Victim, where: str, now: float, valid: int | None, code: int, version: int
    ) -> None:
        """In 1970 freshness is unknown, and no reason to stay; in 2040 everything expired."""
        until = None if valid is None else release_of(victim.place).date + valid * 86400.0
        victim.world.replace_release(victim.place, valid_until=until)
        victim.device.clock.set(now)
        end = victim.online() if where == "online" else victim.with_drive()
        assert end.exit == code
        assert victim.has(version)

    def test_the_clock_is_set_an_hour_after_boot(self, victim: Victim) -> None:
        """What was expired all along is refused once the clock can be believed, and stays."""
        date = release_of(victim.place).date
        victim.world.replace_release(victim.place, valid_until=date + 60.0)
        victim.device.clock.set(0.0)
        assert victim.online().exit == 0, "the newest Date seen is before Valid-Until"
        assert victim.has(2)
        victim.device.clock.set(date + 3600.0)
        assert victim.online().exit == 0, "what is installed goes on running"
        assert victim.has(2)

    def test_a_wrong_clock_poisons_nothing(self, victim: Victim) -> None:
        date = release_of(victim.place).date
        victim.world.replace_release(victim.place, valid_until=date + 30 * 86400.0)
        victim.device.clock.set(2_208_988_800.0)
        assert victim.online().exit == 4
        victim.device.clock.set(date + 60.0)
        assert victim.online().exit == 0
        assert victim.has(2)

    def test_a_clock_behind_what_was_accepted_is_not_believed(self, victim: Victim) -> None:
        """The newest verified Date is a lower bound: turning the clock back revives nothing."""
        assert victim.online().exit == 0
        date = release_of(victim.place).date
        newer = copy(victim.world.sites[3], victim.folder / "newer")
        victim.world.replace_release(
            newer, date=date - 7200.0, valid_until=date - 3600.0, serial=int(date) + 20
        )
        victim.place = newer
        victim.device.clock.set(0.0)
        assert victim.online().exit == 4
        assert victim.has(2)


class TestMixAndMatch:
    """Parts of different releases never come together: each is bound by its hash."""

    @both
    def test_swapped_index(self, victim: Victim, where: str) -> None:
        refused(victim, swap_index, where, 4 if where == "online" else 1)

    def test_equal_serial_with_other_content(self, victim: Victim, world: World) -> None:
        assert victim.online().exit == 0
        serial = release_of(victim.place).serial
        other = copy(world.sites[3], victim.folder / "other")
        world.replace_release(other, serial=serial)
        victim.place = other
        assert victim.online().exit == 4
        assert victim.has(2)

    @both
    @pytest.mark.parametrize("broken", [False, True])
    def test_equal_serial_of_what_was_only_accepted(
        self, victim: Victim, world: World, where: str, broken: bool
    ) -> None:
        """Version 2 was accepted, could not be fetched, and is kept nowhere."""
        serial = release_of(victim.place).serial
        with_chunks(Path.unlink)(world, victim.place)
        assert victim.online().exit == 3
        if broken:
            (victim.device.folder / "state" / "tree" / "state.json").write_text("{")
        victim.place = copy(world.sites[3], victim.folder / "other")
        world.replace_release(victim.place, serial=serial)
        end = victim.online() if where == "online" else victim.with_drive()
        assert end.exit == 4
        assert "refused (serial)" in end.message
        assert victim.has(1)
        victim.device.source = location(world.sites[2])
        assert victim.device.cycle().exit == 0
        assert victim.has(2)

    def test_a_manifest_of_something_else_adopts_nothing(
        self, victim: Victim, world: World, tmp_path: Path
    ) -> None:
        mtree = release_of(victim.place).mtree
        assert mtree is not None
        for path in (
            victim.place / "tree.caidx.mtree",
            victim.place / "by-hash" / "SHA256" / mtree.sha256,
        ):
            path.write_bytes((world.sites[1] / "tree.caidx.mtree").read_bytes())
        victim.device.folder = tmp_path / "lost-its-state"
        assert victim.online().exit == 4
        assert victim.has(1)


class TestWrongSoftware:
    """A release of one project never gets to a device of another."""

    @both
    def test_another_project(self, victim: Victim, where: str) -> None:
        end = refused(
            victim, lambda world, place: world.replace_release(place, project="other"), where, 4
        )
        assert "refused (project): expected tree, found other" in end.message


class TestEndlessData:
    """No source decides how much is read, written or waited for."""

    @pytest.mark.parametrize("name", ["*.release", "*.caidx", "*.cacnk"])
    def test_an_endless_answer(self, victim: Victim, name: str) -> None:
        """Without Content-Length; it is left where it is too long."""
        with WebServer(victim.place) as server:
            server.fail(name, body=bytes(1 << 16), endless=True)
            server.fail("/by-hash/*", status=404)
            victim.device.source = location(server.url)
            end = victim.device.cycle()
            sent = max(request.sent for request in server.requests)
        assert end.exit == 4, end
        assert sent < 16 << 20, "what the sockets hold, and no more"
        assert victim.has(1)
        assert victim.device.state.refused is not None

    @pytest.mark.parametrize("name", ["*.release", "*.caidx", "*.cacnk"])
    def test_an_answer_that_unpacks_to_much(self, victim: Victim, name: str) -> None:
        with WebServer(victim.place) as server:
            server.fail(name, body=BOMBS["gzip"], headers={"Content-Encoding": "gzip"})
            server.fail("/by-hash/*", status=404)
            victim.device.source = location(server.url)
            assert victim.device.cycle().exit == 4
        assert victim.has(1)

    @pytest.mark.parametrize(
        ("name", "code"),
        [
            ("tree.caidx.release", 4),
            ("by-hash/SHA256/*", 1),
            ("store.castr/*/*", 1),
        ],
    )
    def test_endless_files_on_a_drive(self, victim: Victim, name: str, code: int) -> None:
        def tamper(_world: World, place: Path) -> None:
            for path in place.glob(name):
                enormous(path)
            if "by-hash" in name:
                enormous(place / "tree.caidx")

        refused(victim, tamper, "drive", code)

    @pytest.mark.parametrize("name", ["*.release", "*.caidx", "*.cacnk"])
    def test_a_byte_a_minute(self, victim: Victim, name: str) -> None:
        begin = time.monotonic()
        with WebServer(victim.place) as server:
            server.fail(name, drip=0.4)
            server.fail("/by-hash/*", drip=0.4)
            victim.device.source = location(server.url)
            victim.device.fetch = replace(victim.device.fetch, min_rate=1000, connections=2)
            assert victim.device.cycle().exit == 3
        assert time.monotonic() - begin < 60
        assert victim.has(1)

    @both
    @pytest.mark.parametrize(
        "table",
        [
            pytest.param([2**63, 2**63 + 100], id="absurd sizes"),
            pytest.param([4096, 2048], id="offsets go back"),
            pytest.param([0], id="empty chunk"),
            pytest.param([2**64 - 1], id="wraps around"),
        ],
    )
    def test_a_hostile_index_with_a_right_signature(
        self, victim: Victim, where: str, table: list[int]
    ) -> None:
        def tamper(world: World, place: Path) -> None:
            rows = b"".join(end.to_bytes(8, "little") + bytes(32) for end in table)
            flags = index_format.parse(read_index(place), "").flags
            world.publish_index(place, wrap_table(rows, flags, 16384), 4096, bytes(32))

        refused(victim, tamper, where, 4 if where == "online" else 1)

    def test_an_archive_larger_than_any_disk(self, victim: Victim) -> None:
        def tamper(world: World, place: Path) -> None:
            size = 128 << 20
            rows = b"".join(
                (size * (n + 1)).to_bytes(8, "little") + n.to_bytes(32, "big")
                for n in range(100_000)
            )
            flags = index_format.parse(read_index(place), "").flags
            world.publish_index(place, wrap_table(rows, flags, size), size * 100_000, bytes(32))

        end = refused(victim, tamper, "online", 1)
        assert "make room" in end.message


def _device(mode: int) -> bytes:
    return entry(mode) + struct.pack("<QQQQ", 32, DEVICE, 1, 3)


def _link(target: bytes) -> bytes:
    return entry(0o120777) + record(SYMLINK, target + b"\0")


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "a file through a link": lambda out: folder((b"cc", _link(out)), (b"cc/file", file(b"evil"))),
    "a folder in place of a link": lambda out: folder(
        (b"cc", _link(out)), (b"cc", folder((b"file", file(b"evil"))))
    ),
    "a link in place of a folder": lambda out: folder(
        (b"cc", folder((b"a", file()))), (b"cc", _link(out))
    ),
    "a name that climbs": lambda _out: folder((b"../../../outside/file", file(b"evil"))),
    "an absolute name": lambda out: folder((out + b"/file", file(b"evil"))),
    "a character device": lambda _out: folder((b"null", _device(0o020666))),
    "a block device": lambda _out: folder((b"disk", _device(0o060666))),
    "a fifo": lambda _out: folder((b"fifo", entry(0o010644))),
    "a socket": lambda _out: folder((b"socket", entry(0o140755))),
    "an owner": lambda _out: folder((b"file", file(uid=1000))),
    "capabilities": lambda _out: folder((b"file", file(extra=record(FCAPS, bytes(20))))),
    "an attribute": lambda _out: folder((b"file", file(extra=record(XATTR, b"user.a\0b")))),
    "a file of exabytes": lambda _out: folder(
        (b"file", entry(0o100644) + struct.pack("<QQ", 1 << 62, PAYLOAD))
    ),
    "a root that is no folder": lambda _out: file(),
    "something after the root": lambda _out: folder() + folder((b"file", file())),
}
"""Streams that no casync writes; each gets the path of a folder that it may try to reach."""


def hostile(world: World, place: Path, old: bytes, new: bytes) -> None:
    """An archive in which one run of bytes is another one of the same length."""
    tree = place.parent / "hostile-tree"
    tree.mkdir()
    (tree / "aa").write_text("first")
    (tree / "bb").write_text("second")
    (tree / "cc").symlink_to("/tmp")
    stream = archive_of(tree)
    assert old in stream
    world.publish_stream(place, stream.replace(old, new))


class TestHostileArchives:
    """Even what is signed stays inside of the destination, and makes what it says only."""

    @both
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            pytest.param(b"aa\0", b"..\0", id="dot dot"),
            pytest.param(b"aa\0", b"a/\0", id="slash"),
            pytest.param(b"aa\0", b".\0\0", id="dot"),
            pytest.param(b"aa\0", b"\0\0\0", id="no name"),
            pytest.param(b"bb\0", b"aa\0", id="duplicate"),
            pytest.param(b"bb\0", b"a!\0", id="unsorted"),
            pytest.param(b"/tmp\0", b"/t\0p\0", id="link target with NUL"),
        ],
    )
    def test_names(self, victim: Victim, where: str, old: bytes, new: bytes) -> None:
        victim.world.snapshots[0] = {}
        hostile(victim.world, victim.place, old, new)
        outside = snapshot(victim.folder / "device" / "device")
        end = victim.online() if where == "online" else victim.with_drive()
        assert end.exit in (1, 4), end
        assert victim.has(1)
        assert {
            name: node
            for name, node in snapshot(victim.folder / "device" / "device").items()
            if b".casync-updater" not in name
        } == {name: node for name, node in outside.items() if b".casync-updater" not in name}

    @both
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_nodes(self, victim: Victim, where: str, kind: str) -> None:
        code = 4 if where == "online" else 1
        outside, before = self._outside(victim)
        refused(victim, self._publish(kind, outside), where, code)
        assert snapshot(outside) == before

    @both
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_nodes_in_place(self, victim: Victim, where: str, kind: str) -> None:
        """casync writes while it reads, so the destination may be left unfinished, but no more."""
        victim.device.options = {"apply": Apply.IN_PLACE}
        outside, before = self._outside(victim)
        self._publish(kind, outside)(victim.world, victim.place)
        end = victim.online() if where == "online" else victim.with_drive()
        assert end.exit in (1, 4)
        assert snapshot(outside) == before
        victim.device.source, victim.device.backup = location(victim.world.sites[3]), None
        assert victim.device.cycle().exit == 0, victim.device.log
        assert victim.has(3)

    def _outside(self, victim: Victim) -> tuple[Path, object]:
        outside = victim.folder / "outside"
        outside.mkdir()
        (outside / "file").write_text("precious")
        return outside, snapshot(outside)

    def _publish(self, kind: str, outside: Path) -> Tamper:
        stream = HOSTILE[kind](os.fsencode(outside))
        return lambda world, place: world.publish_stream(place, stream)

    @both
    @pytest.mark.parametrize("apply", Apply)
    def test_setuid_that_the_features_forbid(
        self, victim: Victim, where: str, apply: Apply
    ) -> None:
        flags = FLAGS & ~(1 << index_format.FEATURES.index("permissions"))
        stream = folder((b"tool", file(mode=0o106777, flags=flags)), mode=0o42777, flags=flags)
        victim.world.publish_stream(victim.place, stream, flags)
        victim.device.options = {"apply": apply}
        end = victim.online() if where == "online" else victim.with_drive()
        tool = victim.device.destination / "tool"
        assert end.exit == 0 or not tool.exists()
        assert end.exit == 0 or victim.has(1)
        assert not victim.device.destination.stat().st_mode & 0o7022
        assert not tool.exists() or not tool.stat().st_mode & 0o7022


class TestExtraneousDependencies:
    """There are none: a release is about one archive, and what else it names is never fetched."""

    @both
    def test_more_files(self, victim: Victim, where: str) -> None:
        more = f" {'ab' * 32} 12 run-me.sh\n"
        text = unwrap(body_of(victim.place)).decode() + more
        text = text.replace("Index:", "Depends: other (>= 2)\nIndex:")
        body = victim.world.publisher.sign(text.encode())
        (victim.place / "tree.caidx.release").write_bytes(body)
        if where == "drive":
            assert victim.with_drive().exit == 0
        else:
            with WebServer(victim.place) as server:
                victim.device.source = location(server.url)
                assert victim.device.cycle().exit == 0
                assert not server.paths("*abab*")
                assert not server.paths("*run-me*")
        assert victim.has(2)


class TestKeyCompromise:
    """With two keys in the keyring, one that is lost is dropped without visiting a device."""

    @both
    def test_a_dropped_key_signs_nothing_any_more(self, victim: Victim, where: str) -> None:
        keys = victim.world.publisher
        victim.device.keyring = keys.strangers.keyring
        end = victim.online() if where == "online" else victim.with_drive()
        assert end.exit == 4
        assert victim.has(1)

    @both
    @pytest.mark.parametrize("kind", ["weak digest", "expired signature", "revoked key"])
    def test_a_known_key_is_not_enough(
        self, victim: Victim, tmp_path: Path, where: str, kind: str
    ) -> None:
        text = unwrap(body_of(victim.place))
        with key_maker() as maker:
            maker.key("known", algorithm="rsa3072")
            digest, expires = "SHA512", None
            if kind == "weak digest":
                digest = "SHA1"
            if kind == "expired signature":
                expires = "1d"
            body = maker.sign(text, "known", digest=digest, expires=expires)
            if kind == "revoked key":
                maker.revoke("known", at="20260701")
            keyring = tmp_path / "with-known.gpg"
            keyring.write_bytes(victim.keyring.read_bytes() + maker.public("known"))
        victim.device.keyring = keyring
        end = refused(victim, with_body(lambda _: body), where, 4)
        assert kind in end.message

    def test_the_spare_is_believed_from_the_first_day(self, victim: Victim) -> None:
        keys = victim.world.publisher.keys
        spare = replace(keys, working=keys.spare)
        body = victim.world.publisher.sign(unwrap(body_of(victim.place)), spare)
        (victim.place / "tree.caidx.release").write_bytes(body)
        assert victim.online().exit == 0
        assert victim.has(2)

    @both
    def test_a_thief_who_signs_the_far_future(
        self, victim: Victim, world: World, tmp_path: Path, where: str
    ) -> None:
        """It locks the publisher out until the key is dropped, and no longer."""
        date = 4_102_444_800.0
        world.replace_release(victim.place, serial=int(date), date=date, valid_until=None)
        assert (victim.online() if where == "online" else victim.with_drive()).exit == 0
        assert victim.has(2)
        mended = copy(world.sites[3], tmp_path / "mended")
        lost = copy(mended, tmp_path / "lost")
        both = world.publisher.keys
        spare = replace(both, working=both.spare, keyring=tmp_path / "spare.gpg")
        world.publisher.publish(mended, world.trees[3], version="3.1", keys=spare, valid_for=86400)

        def meets(place: Path) -> CycleEnd:
            victim.device.source = location(place if where == "online" else "/nowhere")
            victim.device.backup = None if where == "online" else location(place)
            return victim.device.cycle()

        assert "stale" in meets(lost).message
        assert victim.has(2)
        with key_maker() as maker:
            maker.gpg("--import", both.keyring)
            spare.keyring.write_bytes(maker.gpg("--export", both.spare_fingerprint))
        victim.device.keyring = spare.keyring
        assert meets(mended).exit == 0, victim.device.log
        assert victim.has(3)
        assert "no key of the changed keyring" in "\n".join(victim.device.log)
        assert meets(copy(world.sites[2], tmp_path / "old")).exit == 4, "the thief's key is none"

    @both
    def test_keys_are_changed_without_a_gap(
        self, victim: Victim, world: World, tmp_path: Path, where: str
    ) -> None:
        """Both signatures side by side, then the new keyring on devices, then one signature."""
        publisher, new = world.publisher, keygen(tmp_path / "new", OWNER, passphrase=None)
        late = Device(tmp_path / "late", location(world.sites[1]), keyring=victim.keyring)
        assert late.cycle().exit == 0

        def meets(device: Device) -> int:
            place = location(site)
            device.source = place if where == "online" else location("/nowhere")
            device.backup = None if where == "online" else place
            return device.cycle().exit

        site = copy(world.sites[2], tmp_path / "site")
        publisher.publish(site, world.trees[2], version="2.0", also=[new])
        assert meets(victim.device) == 0
        victim.device.keyring = new.keyring
        publisher.publish(site, world.trees[3], version="3.0", keys=new)
        assert meets(victim.device) == 0
        assert victim.has(3)
        assert meets(late) == 4
        late.keyring = new.keyring
        assert meets(late) == 0, "a device that missed it all needs the keyring and nothing else"
        assert snapshot(late.destination) == world.snapshots[3]

    @both
    def test_a_signature_is_needed_once_one_was_accepted(self, victim: Victim, where: str) -> None:
        """Also when the operator takes `signedBy` out of the entry."""
        victim.device.keyring = None
        victim.device.trust = replace(victim.device.trust, keyrings=victim.keyring)
        refused(victim, with_body(unwrap), where, 4)


class TestTheOtherSourceGetsItsChance:
    """A refused web server does not keep the drive from helping, and the other way round."""

    def test_web_refused(self, victim: Victim, world: World) -> None:
        with_body(unwrap)(world, victim.place)
        victim.device.backup = location(copy(world.sites[3], victim.folder / "drive"))
        end = victim.online()
        assert end.exit == 0
        assert victim.has(3)
        assert victim.device.state.refused is not None

    def test_drive_refused(self, victim: Victim, world: World) -> None:
        drive = copy(world.sites[3], victim.folder / "drive")
        with_body(unwrap)(world, drive)
        victim.device.backup = location(drive)
        end = victim.online()
        assert end.exit == 4
        assert victim.has(2)
        shutil.rmtree(drive)
        assert victim.online().exit == 0
        assert victim.device.state.refused is None

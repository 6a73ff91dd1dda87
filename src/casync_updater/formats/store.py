"""casync's chunk store, ``.castr``: one file per chunk, named by the chunk's id.

A chunk's file is ``<first 4 hex digits>/<64 hex digits>.cacnk``, compressed with zstd, xz or
gzip; a store without compression has files without the suffix (``castore.c``, ``cachunk.c`` in
systemd/casync). What stands in a store is not to be trusted: a drive is carried around, a web
server may be anybody's. A file is only read as far as the index says that its chunk goes.
"""

import contextlib
import errno
import lzma
import os
import secrets
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from casync_updater.errors import ContentError, LocalError, MissingError, RemoteError
from casync_updater.formats.index import Index
from casync_updater.model import ChunkRef

SUFFIX = ".cacnk"
"""What the names of compressed chunks end with."""

_ZSTD = b"\x28\xb5\x2f\xfd"
_XZ = b"\xfd7zXZ\x00"
_GZIP = b"\x1f\x8b"
_XZ_MEMORY = 128 << 20


def path_of(hex_id: str, suffix: str = SUFFIX) -> str:
    """A chunk's file, relative to its store; suffix is ``""`` in an uncompressed store."""
    return f"{hex_id[:4]}/{hex_id}{suffix}"


def file_limit(size: int) -> int:
    """The most bytes that a file with a chunk of so many bytes may have.

    Compression can make data longer: by 5 bytes in 16 KiB (gzip) at worst, and the headers.
    """
    return size + size // 64 + 1024


def decode(raw: bytes, size: int, where: str) -> bytes:
    """The uncompressed bytes of a chunk's file.

    An uncompressed chunk may begin with a magic by chance; it is one where its length is right
    and it cannot be decompressed. That is a guess, which only the chunk's id can settle:
    `content` does.

    Args:
        raw: the file.
        size: how many bytes the chunk has; no more is ever decompressed.
        where: how the message of an error names it.

    Raises:
        ContentError: damaged, cut off, another size, or more than one compressed stream.
    """
    try:
        if raw.startswith(_ZSTD):
            return _unzstd(raw, size)
        if raw.startswith(_XZ):
            return _unxz(raw, size)
        if raw.startswith(_GZIP):
            return _gunzip(raw, size)
    except (zstandard.ZstdError, lzma.LZMAError, zlib.error, ValueError) as error:
        if len(raw) != size:
            raise ContentError(f"{where} is damaged: {error}") from error
    if len(raw) != size:
        raise ContentError(f"{where} has {len(raw)} bytes, uncompressed, and should have {size}")
    return raw


def content(raw: bytes, ref: ChunkRef, index: Index, where: str) -> bytes:
    """The uncompressed bytes of a chunk's file, verified to be the chunk of the index.

    Raises:
        ContentError: what is there is not this chunk.
    """
    if len(raw) == ref.size and index.chunk_id(raw) == ref.id:
        return raw
    data = decode(raw, ref.size, where)
    if index.chunk_id(data) != ref.id:
        raise ContentError(f"{where} holds other bytes than its name says")
    return data


def _unzstd(raw: bytes, size: int) -> bytes:
    # decompress() allocates what the header announces, whatever its own limit says.
    announced = zstandard.get_frame_parameters(raw).content_size
    if announced not in (size, zstandard.CONTENTSIZE_UNKNOWN):
        raise ValueError(f"it announces {announced} bytes and should have {size}")
    data: bytes = zstandard.ZstdDecompressor().decompress(
        raw, max_output_size=size, allow_extra_data=False
    )
    if len(data) != size:
        raise ValueError(f"it has {len(data)} bytes and should have {size}")
    return data


def _unxz(raw: bytes, size: int) -> bytes:
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    return _whole(stream.decompress(raw, size + 1), size, stream.eof, stream.unused_data)


def _gunzip(raw: bytes, size: int) -> bytes:
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    return _whole(stream.decompress(raw, size + 1), size, stream.eof, stream.unused_data)


def _whole(data: bytes, size: int, eof: bool, trailing: bytes) -> bytes:
    if len(data) > size:
        raise ValueError(f"it has more than {size} bytes")
    if not eof:
        raise ValueError("it is cut off")
    if trailing:
        raise ValueError("something follows its end")
    if len(data) != size:
        raise ValueError(f"it has {len(data)} bytes and should have {size}")
    return data


def read_regular(
    path: str | Path, limit: int, *, dir_fd: int | None = None, where: str | None = None
) -> tuple[bytes, os.stat_result]:
    """Read a file that anybody may have put there.

    A symbolic link is not followed, and a FIFO (which would block for ever) not waited for.

    Args:
        path: absolute, or relative to `dir_fd`.
        limit: bytes after which it is refused.
        dir_fd: a descriptor of the folder that `path` is relative to.
        where: how the message of an error names it; the path where it is None.

    Returns:
        Its content, and the state it was read in.

    Raises:
        ContentError: no regular file, or too long.
        OSError: it cannot be opened or read.
    """
    where = where or str(path)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, dir_fd=dir_fd)
    except OSError as error:
        # ENXIO is what opening a socket gives.
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise ContentError(f"{where} is no regular file") from error
        raise
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise ContentError(f"{where} is no regular file")
        if state.st_size > limit:
            raise ContentError(f"{where} has {state.st_size} bytes, at most {limit} are expected")
        # It may be shorter by now; what it grew by is not wanted.
        data = bytearray()
        while left := state.st_size - len(data):
            piece = os.read(descriptor, left)
            if not piece:
                break
            data += piece
    finally:
        os.close(descriptor)
    return bytes(data), state


class LocalStore:
    """A chunk store in a folder of this machine, as casync takes it with ``--store=``.

    Attributes:
        path: the folder; it has to exist before a chunk is put there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, hex_id: str) -> bool:
        """Whether there is a file for this chunk, which says nothing about what is in it."""
        return any(self._is_file(path_of(hex_id, suffix)) for suffix in (SUFFIX, ""))

    def _is_file(self, relative: str) -> bool:
        try:
            return stat.S_ISREG((self.path / relative).lstat().st_mode)
        except OSError:
            return False

    def put(self, hex_id: str, data: bytes, *, compressed: bool) -> None:
        """Add a chunk, or replace it; whole at once for every reader, but not yet synced.

        Args:
            hex_id: the chunk's id.
            data: the chunk's own bytes, or its file as it stands in a store.
            compressed: whether `data` is the latter.

        Raises:
            LocalError: it cannot be written.
        """
        prefix, _, name = path_of(hex_id, SUFFIX if compressed else "").partition("/")
        temporary = f".#{name}.{secrets.token_hex(4)}"
        try:
            with contextlib.suppress(FileExistsError):
                (self.path / prefix).mkdir()
            with self._folder(prefix) as folder:
                try:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    descriptor = os.open(temporary, flags, 0o644, dir_fd=folder)
                    with os.fdopen(descriptor, "wb") as file:
                        file.write(data)
                    os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary, dir_fd=folder)
                    raise
        except OSError as error:
            path = self.path / prefix / name
            raise LocalError(f"{path} cannot be written: {error.strerror}") from error

    def read(self, hex_id: str, limit: int) -> bytes:
        """A chunk's file as it is, compressed or not, unverified.

        Raises:
            MissingError: the store has no such chunk.
            ContentError: it is no regular file in a folder, or longer than `limit` bytes.
            RemoteError: the store is not there, or cannot be read.
        """
        where = self.path / path_of(hex_id)
        try:
            with self._folder(hex_id[:4]) as folder:
                try:
                    return read_regular(hex_id + SUFFIX, limit, dir_fd=folder, where=str(where))[0]
                except FileNotFoundError:
                    return read_regular(
                        hex_id, limit, dir_fd=folder, where=str(where.with_suffix(""))
                    )[0]
        except (FileNotFoundError, NotADirectoryError) as error:
            if not self.path.is_dir():
                raise RemoteError(f"the chunk store {self.path} is not there") from error
            if isinstance(error, NotADirectoryError):
                raise ContentError(f"{where.parent} is no folder") from error
            raise MissingError(f"{where} does not exist") from error
        except OSError as error:
            raise RemoteError(f"{where} cannot be read: {error.strerror}") from error

    @contextlib.contextmanager
    def _folder(self, prefix: str) -> Iterator[int]:
        """A descriptor of one of the store's folders, which must not be a symbolic link.

        A link on a foreign drive could point out of it, and what is written there would be too.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path / prefix, flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

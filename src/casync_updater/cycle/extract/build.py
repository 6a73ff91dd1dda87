"""Build the new tree: go through the new archive once, and take over what did not change.

The stream is known before it is read wherever the new index has a chunk that the old one had:
there the nodes of the old record are replayed, which takes a hard link a file and no parsing.
Everything else is decoded from chunks, in the order of the archive. A file that merely shares
a chunk with a changed one is compared with the old file at its path, and linked if it is equal.

Every byte comes from a chunk whose id was checked, or from a file that the record vouches for.
"""

import contextlib
import errno
import hashlib
import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from casync_updater.clock import moment
from casync_updater.cycle.extract.changes import differs
from casync_updater.cycle.extract.leftover import Journal
from casync_updater.cycle.extract.plan import ExtractPlan, chunk_at
from casync_updater.cycle.extract.stream import Stream, write_all
from casync_updater.cycle.extract.tree import (
    LINKABLE,
    READ_SIZE,
    SAME_CONTENT,
    UNKNOWN,
    carried,
    list_attributes,
    open_directory,
    open_file,
    read_exactly,
)
from casync_updater.cycle.extract.writeback import Writeback
from casync_updater.errors import ContentError, LocalError, SpaceError
from casync_updater.formats.archive import (
    HEADER,
    PERMISSIONS,
    TIMES,
    UIDS,
    Decoder,
    Node,
)
from casync_updater.formats.record import (
    DIRECTORY,
    END,
    FILE,
    LINK,
    Record,
    RecordWriter,
    Window,
    file_system_time,
    kind_of,
)
from casync_updater.model import Changes, Progress
from casync_updater.sources.base import Chunks

_HOLE = 4096
"""Zeros of at least this many bytes, a whole chunk of them, are left out of the new file."""
_REPORT_STEP = 1 << 20
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINK = {errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOENT, errno.EOPNOTSUPP, errno.EACCES}
"""Protected hard links, too many names, another file system, gone: the node is made anew."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """A new tree that stands, not yet synced to the disk."""

    record: Record
    digest: str | None
    """The archive digest, where every byte went by (nothing was taken over unread)."""
    changes: Changes
    window: Window
    """When the build touched inodes that the old tree shares."""
    bytes_written: int
    bytes_fetched: int
    files_linked: int
    files_written: int


def extract(
    plan: ExtractPlan,
    chunks: Chunks,
    root: int,
    *,
    journal: int | None = None,
    progress: Callable[[Progress], object] = lambda progress: None,
) -> Extracted:
    """Make the new tree in an empty directory.

    Args:
        plan: what `plan_extract` decided.
        chunks: where chunks come from.
        root: an open descriptor of the directory, which becomes the root of the tree.
        journal: an open descriptor of an empty file beside the tree, for `Leftover` if the build
            is cut off; to be removed once the tree is complete.
        progress: called with every chunk of a file that is written, and about every MiB of what
            is taken over, with the bytes of the archive that stand; what it
            raises ends the build.

    Raises:
        ContentError: the archive, or a chunk of it, is not what it should be.
        LocalError: this machine is in the way (`SpaceError`: it is full).
        RemoteError: what `chunks` raises.
    """
    begin = file_system_time(root)
    log = None if journal is None else Journal(journal, plan.index)
    writeback = Writeback(root)
    builder = _Builder(plan, Stream(plan, chunks, root, log), root, progress, writeback)
    try:
        with writeback:
            builder.run()
    except OSError as error:
        where = os.fsdecode(builder.path())
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        kind = SpaceError if full else LocalError
        raise kind(f"{where!r} cannot be built: {error.strerror}") from error
    finally:
        builder.close()
    return builder.result(begin)


@dataclass(slots=True)
class _Level:
    """A directory that is being built, and the one at its path in the old tree."""

    fd: int
    like: int
    """The old directory's descriptor; -1 where there is none."""
    node: Node
    number: int
    old: int
    """Its node in the old record; -1 where there is none."""
    uid: int
    gid: int
    child: int
    """The first old node in it that the new tree has not passed."""


class _Builder:
    """One build; see the module's description."""

    def __init__(
        self,
        plan: ExtractPlan,
        stream: Stream,
        root: int,
        progress: Callable[[Progress], object],
        writeback: Writeback,
    ) -> None:
        self._plan = plan
        self._root = root
        self._writeback = writeback
        self._progress = progress
        self._reported = 0
        self._flags = plan.index.flags
        self._old = plan.old
        self._trust = plan.old.trust if plan.old else bytearray()
        self._bytes = stream
        self._replayable = plan.old is not None and plan.old.record.index.flags == self._flags
        self.decoder = Decoder(self._bytes, self._flags)
        self.name = b""
        self._writer = RecordWriter(plan.index)
        self._levels: list[_Level] = []
        self._added: list[bytes] = []
        self._changed: list[bytes] = []
        self._removed: list[bytes] = []
        self._written = self._linked = self._files = 0

    def run(self) -> None:
        """Build it all."""
        stream, size = self._bytes, self._plan.index.size
        self._node(self.decoder.next())
        while self._levels:
            if not (self._replayable and self._replay()):
                self._node(self.decoder.next())
            if stream.position - self._reported >= _REPORT_STEP:
                self._report()
        if stream.position != size:
            raise ContentError(
                f"the archive is damaged: its root ends at {stream.position}, and"
                f" {size - stream.position} bytes follow"
            )
        self._progress(Progress(size, size))

    def close(self) -> None:
        """Close what is open, after a failure too."""
        for level in self._levels:
            self._close(level)
        self._levels.clear()
        self._bytes.close()

    def path(self) -> bytes:
        """What is being built, for messages."""
        frames = self.decoder.frames
        inside = frames and frames[-1].name == self.name
        return self.decoder.path(b"" if inside else self.name)

    def result(self, begin: int) -> Extracted:
        """What was built."""
        digest = self._bytes.digest
        return Extracted(
            record=self._writer.finish(),
            digest=None if digest is None else digest.hexdigest(),
            changes=Changes(*(tuple(sorted(paths)) for paths in self._paths())),
            window=Window(begin, file_system_time(self._root)),
            bytes_written=self._written,
            bytes_fetched=self._bytes.fetched,
            files_linked=self._linked,
            files_written=self._files,
        )

    def _paths(self) -> tuple[list[bytes], list[bytes], list[bytes]]:
        return self._added, self._changed, self._removed

    # The run of unchanged chunks

    def _replay(self) -> bool:
        """Take over the whole nodes that follow here, if they stand in the old archive too.

        Returns:
            False where there are none.
        """
        level = self._levels[-1]
        stream, plan, old = self._bytes, self._plan, self._old
        if level.old < 0 or old is None:
            return False
        start = stream.position
        number = chunk_at(plan.ends, start)
        if number >= len(plan.local) or plan.local[number] < 0:
            return False
        record = old.record
        move = old.start(plan.local[number]) - plan.start(number)
        first = bisect_left(record.starts, start + move)
        # The same bytes elsewhere in the old tree are other files.
        if record.starts[first] != start + move or record.parents[first] != level.old:
            return False
        if not first:
            return False
        limit = plan.ends[plan.run_end(number)] + move
        last = bisect_right(record.starts, limit) - 1
        if last <= first:
            return False
        self._skip_old(level, first)
        self._take_over(record, first, last, start)
        return True

    def _take_over(self, record: Record, first: int, last: int, start: int) -> None:
        """Build the nodes first..last-1 of the old record, which stand at `start` now."""
        decoder, writer, trust = self.decoder, self._writer, self._trust
        levels, kinds, stream = self._levels, record.kinds, self._bytes
        name_of, link, lstat = record.name, os.link, os.stat
        move = start - record.starts[first]
        new = writer.copy(record, first, last, start) - first
        level = levels[-1]
        for old in range(first, last):
            kind = kinds[old]
            number = old + new
            if kind == END:
                writer.close(number)
                decoder.leave(record.starts[old] + move, record.raw(old))
                self._leave()
                if not levels:
                    break
                level = levels[-1]
                continue
            self.name = name = name_of(old)
            decoder.passed(name)
            if kind == DIRECTORY:
                node = record.decode(old)
                decoder.enter(name, record.starts[old] + move + HEADER.size + len(name) + 1)
                writer.open(number)
                level.child = old + record.spans[old]
                self._enter(node, number, old)
                level = levels[-1]
                continue
            writer.adopt(number)
            level.child = old + 1
            if trust[old] == LINKABLE:
                try:
                    link(
                        name,
                        name,
                        src_dir_fd=level.like,
                        dst_dir_fd=level.fd,
                        follow_symlinks=False,
                    )
                except OSError as error:
                    if error.errno not in _NO_LINK:
                        raise
                    trust[old] = SAME_CONTENT
                else:
                    found = lstat(name, dir_fd=level.fd, follow_symlinks=False)
                    # What was linked is what was checked, unless somebody was quicker.
                    if record.unchanged(old, found):
                        writer.ctimes[number] = found.st_ctime_ns
                        self._linked += 1
                        continue
                    os.unlink(name, dir_fd=level.fd)
                    trust[old] = UNKNOWN
            node = record.decode(old)
            stream.position = record.starts[old] + move + len(node.raw)
            self._create(node, number, old)
        stream.position = record.starts[last] + move

    # What has to be parsed

    def _node(self, node: Node) -> None:
        """Build one node that came out of the decoder."""
        if (journal := self._bytes.journal) is not None:
            journal.add(node, self.decoder.path(node.name) if node.size else b"")
        if not node.mode:
            level = self._levels[-1]
            self._skip_old(level, None)
            self._writer.add(node, END)
            self._leave()
            return
        self.name = node.name
        kind = kind_of(node.mode)
        number = self._writer.add(node, kind)
        old = self._counterpart(node.name)
        same = self._compare(node, kind, old)
        if kind == DIRECTORY:
            self._enter(node, number, old if same is not None else -1)
            return
        digest = self._create(node, number, old if same is not None else -1)
        if kind == FILE:
            self._writer.digest(digest)
            if same and self._old is not None and self._old.record.digest(old) != digest:
                self._changed.append(self.decoder.path(node.name))

    def _counterpart(self, name: bytes) -> int:
        """The old node at the path of a name in the directory that is open; -1: none."""
        if self._old is None:
            return -1
        if not self._levels:
            return 0
        level, record = self._levels[-1], self._old.record
        if level.old < 0:
            return -1
        child = level.child
        while record.kinds[child] != END and record.name(child) < name:
            child += record.spans[child]
        self._skip_old(level, child)
        if record.kinds[child] == END or record.name(child) != name:
            return -1
        level.child = child + record.spans[child]
        return child

    def _skip_old(self, level: _Level, until: int | None) -> None:
        """Old nodes of the directory that is open, up to one of them, are gone in the new tree."""
        if level.old < 0 or self._old is None:
            return
        record = self._old.record
        end = level.old + record.spans[level.old] - 1 if until is None else until
        for node in range(level.child, end):
            if record.kinds[node] != END:
                self._removed.append(record.path(node))
        level.child = end

    def _compare(self, node: Node, kind: int, old: int) -> bool | None:
        """Note what changed about a node, but for a file's content.

        Returns:
            Whether nothing did; None where there was no node of its kind.
        """
        path = self.decoder.path(b"" if kind == DIRECTORY else node.name)
        if old < 0 or self._old is None:
            if self._levels:
                self._added.append(path)
            return None
        record = self._old.record
        if record.kinds[old] != kind:
            self._changed.append(path)
            for inner in range(old + 1, old + record.spans[old]):
                if record.kinds[inner] != END:
                    self._removed.append(record.path(inner))
            return None
        if differs(record.raw(old), node.raw, node.name, record.index.flags, self._flags):
            self._changed.append(path)
            return False
        return True

    def _linkable(self, node: Node, old: int) -> bool:
        """Whether the old node is the new one, metadata and all, but perhaps for its content."""
        return (
            old >= 0
            and self._old is not None
            and self._trust[old] == LINKABLE
            and self._old.record.raw(old) == node.raw
        )

    def _link(self, name: bytes, old: int, number: int) -> bool:
        """Take over a node of the old tree; False where this file system does not let us.

        Raises:
            LocalError: somebody changed it since it was checked.
        """
        assert self._old is not None
        level = self._levels[-1]
        try:
            os.link(name, name, src_dir_fd=level.like, dst_dir_fd=level.fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            return False
        found = os.stat(name, dir_fd=level.fd, follow_symlinks=False)
        if not self._old.record.unchanged(old, found):
            raise self._touched(name)
        self._writer.stamp(number, found)
        self._linked += 1
        return True

    def _touched(self, name: bytes) -> LocalError:
        path = os.fsdecode(self.decoder.path(name))
        return LocalError(
            f"{path!r} was changed in the installed tree while the update was being built;"
            " the next cycle starts again"
        )

    def _create(self, node: Node, number: int, old: int) -> bytes:
        """Make a node that is no directory; the digest of a file's content."""
        level, name, kind = self._levels[-1], node.name, kind_of(node.mode)
        if kind == FILE:
            return self._file(node, number, old)
        if self._linkable(node, old) and self._link(name, old, number):
            return b""
        if kind == LINK:
            os.symlink(node.target, name, dir_fd=level.fd)
        else:
            self._special(node, level)
        self._settle_unopened(node, level)
        self._writer.stamp(number, os.stat(name, dir_fd=level.fd, follow_symlinks=False))
        return b""

    def _special(self, node: Node, level: _Level) -> None:
        try:
            os.mknod(node.name, stat.S_IFMT(node.mode) | 0o600, node.device, dir_fd=level.fd)
        except PermissionError as error:
            path = os.fsdecode(self.decoder.path(node.name))
            raise LocalError(f"{path!r} is a device node, which only root can make") from error

    def _file(self, node: Node, number: int, old: int) -> bytes:
        """Make a file, or take it over where its content is that of the old one."""
        level, name, stream = self._levels[-1], node.name, self._bytes
        start = stream.position
        end = start + node.size
        if end > self._plan.index.size:
            path = os.fsdecode(self.decoder.path(name))
            raise ContentError(f"the archive is damaged: {path!r} is longer than the archive")
        like = open_file(name, level.like)
        out = -1
        try:
            equal = 0
            if like >= 0 and self._linkable(node, old):
                equal = self._equal(like, old, start, end)
                if equal == node.size and self._link(name, old, number):
                    assert self._old is not None
                    return self._old.record.digest(old)
            out = os.open(name, _CREATE, 0o600, dir_fd=level.fd)
            digest = hashlib.new(self._plan.index.hash_name)
            if equal:
                self._copy(like, out, equal, digest.update)
                if not self._old_unchanged(old, like):
                    raise self._touched(name)
            hole = False
            while stream.position < end:
                data = stream.piece(end)
                digest.update(data)
                hole = _all_zero(data)
                if not hole:
                    self._write(out, data, stream.position - start)
                stream.position += len(data)
                # A large file over a slow line: who waits is told with every chunk of it.
                self._report()
            if hole:
                os.ftruncate(out, node.size)
            self._settle(out, node, like, level.uid, level.gid)
            self._writer.stamp(number, os.fstat(out))
        finally:
            for file in (like, out):
                if file >= 0:
                    os.close(file)
        self._files += 1
        return digest.digest()

    def _write(self, out: int, data: bytes, offset: int) -> None:
        write_all(out, data, offset)
        self._written += len(data)
        self._writeback.wrote(len(data))

    def _report(self) -> None:
        self._reported = self._bytes.position
        self._progress(Progress(self._reported, self._plan.index.size))

    def _old_unchanged(self, old: int, file: int) -> bool:
        assert self._old is not None
        return self._old.record.unchanged(old, os.fstat(file))

    def _equal(self, like: int, old: int, start: int, end: int) -> int:
        """Bytes at its beginning that a new file shares with the old one; they are passed."""
        assert self._old is not None
        stream, plan = self._bytes, self._plan
        move = self._old.record.content(old)[0] - start
        while stream.position < end:
            position = stream.position
            chunk = chunk_at(plan.ends, position)
            local = plan.local[chunk]
            if local >= 0 and self._old.start(local) - plan.start(chunk) == move:
                stream.position = min(end, plan.ends[chunk])
                continue
            data = stream.piece(end)
            if read_exactly(like, position - start, len(data)) != data:
                break
            stream.position += len(data)
        return stream.position - start

    def _copy(self, source: int, out: int, count: int, update: Callable[[bytes], object]) -> None:
        """Copy the beginning of an old file."""
        offset = 0
        while offset < count:
            data = os.pread(source, min(READ_SIZE, count - offset), offset)
            if not data:
                raise self._touched(self.name)
            update(data)
            if not _all_zero(data):
                self._write(out, data, offset)
            offset += len(data)
        os.ftruncate(out, count)

    # Directories

    def _enter(self, node: Node, number: int, old: int) -> None:
        """Make a directory and go into it."""
        installed = self._old.root if self._old is not None else -1
        if not self._levels:
            fd = os.dup(self._root)
            like = os.dup(installed) if installed >= 0 else -1
            owner = os.fstat(fd)
            uid, gid = owner.st_uid, owner.st_gid
        else:
            level = self._levels[-1]
            os.mkdir(node.name, 0o700, dir_fd=level.fd)
            fd = open_directory(node.name, level.fd)
            if fd < 0:
                raise LocalError(f"{os.fsdecode(node.name)!r} vanished while it was being built")
            like = open_directory(node.name, level.like)
            uid, gid = level.uid, level.gid
        if self._flags & UIDS:
            uid, gid = node.uid, node.gid
        elif like >= 0:
            owner = os.fstat(like)
            uid, gid = owner.st_uid, owner.st_gid
        self._levels.append(_Level(fd, like, node, number, old, uid, gid, old + 1))

    def _leave(self) -> None:
        """Give the directory that is open its metadata, now that nothing in it changes."""
        level = self._levels.pop()
        try:
            self._settle(level.fd, level.node, level.like, level.uid, level.gid)
            self._writer.stamp(level.number, os.fstat(level.fd))
        finally:
            self._close(level)

    @staticmethod
    def _close(level: _Level) -> None:
        os.close(level.fd)
        if level.like >= 0:
            os.close(level.like)

    # Metadata

    def _settle(self, file: int, node: Node, like: int, uid: int, gid: int) -> None:
        """Owner, attributes, mode and time, in the order in which none undoes another.

        What the archive does not carry comes from the old tree (`like`), else from the parent.
        """
        flags = self._flags
        mode = 0o755 if stat.S_ISDIR(node.mode) else 0o644
        if like >= 0:
            found = os.fstat(like)
            mode = stat.S_IMODE(found.st_mode)
            uid, gid = found.st_uid, found.st_gid
        if flags & UIDS:
            uid, gid = node.uid, node.gid
        if flags & PERMISSIONS:
            mode = stat.S_IMODE(node.mode)
        made = os.fstat(file)
        if (made.st_uid, made.st_gid) != (uid, gid):
            self._own(lambda: os.fchown(file, uid, gid), node.name)
        if like >= 0:
            _keep_attributes(like, file, flags)
        for key, value in node.xattrs:
            os.setxattr(file, key, value)
        os.fchmod(file, mode)
        if node.fcaps is not None:
            os.setxattr(file, b"security.capability", node.fcaps)
        if flags & TIMES:
            with self._in_time(node):
                os.utime(file, ns=(node.mtime, node.mtime))

    def _settle_unopened(self, node: Node, level: _Level) -> None:
        """Owner, mode and time of a link or special file, which cannot be opened."""
        flags, name, folder = self._flags, node.name, level.fd
        uid, gid, mode = level.uid, level.gid, 0o644
        found = _lstat(name, level.like)
        if found is not None and stat.S_IFMT(found.st_mode) == stat.S_IFMT(node.mode):
            uid, gid, mode = found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)
        if flags & UIDS:
            uid, gid = node.uid, node.gid
        made = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if (made.st_uid, made.st_gid) != (uid, gid):
            self._own(lambda: os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False), name)
        for key, value in node.xattrs:
            path = f"/proc/self/fd/{folder}/".encode() + name
            os.setxattr(path, key, value, follow_symlinks=False)
        if not stat.S_ISLNK(node.mode):
            # Nobody else gets at it: the tree is being built in a folder of our own.
            os.chmod(name, stat.S_IMODE(node.mode) if flags & PERMISSIONS else mode, dir_fd=folder)
        if flags & TIMES:
            times = (node.mtime, node.mtime)
            with self._in_time(node):
                os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)

    @contextlib.contextmanager
    def _in_time(self, node: Node) -> Iterator[None]:
        try:
            yield
        except OverflowError as error:
            path = os.fsdecode(self.decoder.path(node.name))
            year = moment(node.mtime / 1e9).year
            raise LocalError(
                f"{path!r} is of {year}, and this system has no time after 2038 (32-bit time_t)"
            ) from error

    def _own(self, change: Callable[[], object], name: bytes) -> None:
        """Change an owner. Where the archive carries none, who may not do so goes without."""
        try:
            change()
        except PermissionError as error:
            if self._flags & UIDS:
                path = os.fsdecode(self.decoder.path(name))
                raise LocalError(f"{path!r} belongs to another user, which takes root") from error


def _keep_attributes(source: int, target: int, flags: int) -> None:
    """Give a new file the extended attributes of the old one that archives do not carry."""
    for name in list_attributes(source):
        if not carried(os.fsencode(name), flags):
            # What only root may set (a security label) is the device's own business.
            with contextlib.suppress(PermissionError):
                os.setxattr(target, name, os.getxattr(source, name))


def _lstat(name: bytes, folder: int) -> os.stat_result | None:
    if folder < 0:
        return None
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None


def _all_zero(data: bytes) -> bool:
    """Whether a piece of a file is worth a hole."""
    return len(data) >= _HOLE and not data[0] and not data[-1] and not data.strip(b"\0")

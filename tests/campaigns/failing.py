"""A file system that passes everything on to a folder, and fails on purpose.

    with FailingFolder(tmp_path / "real", tmp_path / "mounted") as disk:
        disk.fail("write", errno.ENOSPC, after=3)

It is FUSE, in a process of its own, so what the client gets is the kernel's answer. Ways in which
a call fails: once (a bad sector), or from then on (a disk that is full, or that the kernel has
made read-only).
"""

import contextlib
import ctypes
import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import casync_updater
from casync_updater import syscalls

OPERATIONS = (
    *("write", "fsync", "fsyncdir", "create", "mkdir", "rename", "link", "symlink"),
    *("unlink", "rmdir", "setattr", "setxattr"),
)
"""What can fail: each call that changes something on a disk."""
_ROOT = 1


class FailingFolder:
    """The folder, mounted while the block lasts."""

    def __init__(self, real: Path, mounted: Path) -> None:
        self._real = real
        self._mounted = mounted

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), self._real, self._mounted],
            env={**os.environ, "PYTHONPATH": str(Path(casync_updater.__file__).parents[1])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        end = time.monotonic() + 60
        while not self._mounted.is_mount():
            assert self._process.poll() is None, "the failing file system ended"
            assert time.monotonic() < end, "the failing file system does not come up"
            time.sleep(0.01)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        subprocess.run(["umount", "--lazy", self._mounted], check=True)
        # Not of its own accord: a mount namespace that was made meanwhile has it still.
        self._process.terminate()
        self._process.communicate(timeout=60)

    def fail(self, operation: str, number: int, *, after: int, lasting: bool = False) -> None:
        """From now on, let a call fail.

        Args:
            operation: one of `OPERATIONS`; ``all`` for every one of them.
            number: with this errno.
            after: so many calls of it that succeed first.
            lasting: all calls after that as well.
        """
        self._order(operation=operation, number=number, after=after, lasting=lasting)

    def heal(self) -> tuple[Counter[str], int]:
        """Nothing fails any more; how often each was called since `fail`, and how many failed."""
        said = self._order(operation=None)
        return Counter(said["calls"]), said["failed"]

    def _order(self, **words: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def _serve(real: str, mounted: str) -> None:
    import pyfuse3  # noqa: PLC0415 - Debian has it only for its own Python
    import trio  # noqa: PLC0415

    class Plan:
        """What fails next."""

        def __init__(self) -> None:
            self.words: dict[str, Any] = {"operation": None}
            self.calls: Counter[str] = Counter()
            self.failed = 0

        def strike(self, operation: str) -> None:
            seen = self.calls["all"], self.calls[operation]
            self.calls.update(("all", operation))
            words = self.words
            if words["operation"] not in (operation, "all"):
                return
            position = seen[0] if words["operation"] == "all" else seen[1]
            if position == words["after"] or (words["lasting"] and position > words["after"]):
                self.failed += 1
                raise pyfuse3.FUSEError(words["number"])

    plan = Plan()

    @contextlib.contextmanager
    def passed_on() -> Any:
        try:
            yield
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error

    class PassThrough(pyfuse3.Operations):  # type: ignore[misc]
        """Inodes are those of the folder, each held by a descriptor (O_PATH)."""

        enable_writeback_cache = False

        def __init__(self) -> None:
            super().__init__()
            self._held = {_ROOT: os.open(real, os.O_PATH)}
            self._lookups: Counter[int] = Counter()

        def _path(self, inode: int) -> str:
            return f"/proc/self/fd/{self._held[inode]}"

        def _inside(self, inode: int, name: bytes) -> bytes:
            return self._path(inode).encode() + b"/" + name

        def _attributes(self, status: os.stat_result, inode: int | None = None) -> Any:
            entry = pyfuse3.EntryAttributes()
            for key in ("mode", "nlink", "uid", "gid", "rdev", "size", "blocks"):
                setattr(entry, f"st_{key}", getattr(status, f"st_{key}"))
            for key in ("atime_ns", "mtime_ns", "ctime_ns"):
                setattr(entry, f"st_{key}", getattr(status, f"st_{key}"))
            entry.st_blksize = 4096
            entry.st_ino = inode or status.st_ino
            entry.generation = 0
            entry.entry_timeout = entry.attr_timeout = 0
            return entry

        def _entry(self, parent: int, name: bytes) -> Any:
            with passed_on():
                held = os.open(self._inside(parent, name), os.O_PATH | os.O_NOFOLLOW)
            status = os.fstat(held)
            inode = status.st_ino
            if inode in self._held:
                os.close(held)
            else:
                self._held[inode] = held
            self._lookups[inode] += 1
            return self._attributes(status)

        async def lookup(self, parent: int, name: bytes, ctx: Any) -> Any:
            if name == b".." or name == b".":
                raise pyfuse3.FUSEError(errno.ENOENT)
            return self._entry(parent, name)

        async def forget(self, inodes: Any) -> None:
            for inode, count in inodes:
                self._lookups[inode] -= count
                if self._lookups[inode] <= 0 and inode != _ROOT:
                    del self._lookups[inode]
                    os.close(self._held.pop(inode))

        async def getattr(self, inode: int, ctx: Any) -> Any:
            return self._attributes(os.fstat(self._held[inode]), inode)

        async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
            plan.strike("setattr")
            path = self._path(inode)
            link = stat.S_ISLNK(os.fstat(self._held[inode]).st_mode)
            with passed_on():
                if fields.update_size:
                    os.truncate(path, attr.st_size)
                if fields.update_uid or fields.update_gid:
                    uid = attr.st_uid if fields.update_uid else -1
                    gid = attr.st_gid if fields.update_gid else -1
                    _chown(self._held[inode], uid, gid)
                if fields.update_mode and not link:
                    os.chmod(path, stat.S_IMODE(attr.st_mode))
                if (fields.update_atime or fields.update_mtime) and not link:
                    status = os.fstat(self._held[inode])
                    times = (
                        attr.st_atime_ns if fields.update_atime else status.st_atime_ns,
                        attr.st_mtime_ns if fields.update_mtime else status.st_mtime_ns,
                    )
                    os.utime(path, ns=times)
            return await self.getattr(inode, ctx)

        async def readlink(self, inode: int, ctx: Any) -> bytes:
            with passed_on():
                return os.readlink(b"", dir_fd=self._held[inode])

        async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> Any:
            plan.strike("mkdir")
            with passed_on():
                os.mkdir(self._inside(parent, name), mode & ~ctx.umask)
            return self._entry(parent, name)

        async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
            plan.strike("unlink")
            with passed_on():
                os.unlink(self._inside(parent, name))

        async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
            plan.strike("rmdir")
            with passed_on():
                os.rmdir(self._inside(parent, name))

        async def symlink(self, parent: int, name: bytes, target: bytes, ctx: Any) -> Any:
            plan.strike("symlink")
            with passed_on():
                os.symlink(target, self._inside(parent, name))
            return self._entry(parent, name)

        async def rename(
            self, old: int, old_name: bytes, new: int, new_name: bytes, flags: int, ctx: Any
        ) -> None:
            plan.strike("rename")
            source = Path(os.fsdecode(self._inside(old, old_name)))
            target = Path(os.fsdecode(self._inside(new, new_name)))
            with passed_on():
                syscalls._renameat2(source, target, flags)

        async def link(self, inode: int, parent: int, name: bytes, ctx: Any) -> Any:
            plan.strike("link")
            with passed_on():
                # link(2) would link the name in /proc; linkat(2) follows it.
                os.link(self._path(inode), name, dst_dir_fd=self._held[parent])
            return self._entry(parent, name)

        async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
            plan.strike("create")
            with passed_on():
                file = os.open(
                    self._inside(parent, name),
                    flags | os.O_CREAT | os.O_CLOEXEC,
                    mode & ~ctx.umask,
                )
            return pyfuse3.FileInfo(fh=file), self._entry(parent, name)

        async def open(self, inode: int, flags: int, ctx: Any) -> Any:
            with passed_on():
                flags &= ~(os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL)
                return pyfuse3.FileInfo(fh=os.open(self._path(inode), flags | os.O_CLOEXEC))

        async def read(self, fh: int, offset: int, length: int) -> bytes:
            with passed_on():
                return os.pread(fh, length, offset)

        async def write(self, fh: int, offset: int, data: bytes) -> int:
            plan.strike("write")
            with passed_on():
                return os.pwrite(fh, data, offset)

        async def fsync(self, fh: int, datasync: bool) -> None:
            plan.strike("fsync")

        async def flush(self, fh: int) -> None:
            pass

        async def release(self, fh: int) -> None:
            os.close(fh)

        async def opendir(self, inode: int, ctx: Any) -> int:
            return inode

        async def readdir(self, inode: int, start: int, token: Any) -> None:
            with passed_on():
                names = sorted(os.listdir(self._path(inode).encode()))
            for number, name in enumerate(names[start:], start + 1):
                try:
                    attributes = self._entry(inode, name)
                except pyfuse3.FUSEError:
                    continue
                if not pyfuse3.readdir_reply(token, name, attributes, number):
                    await self.forget([(attributes.st_ino, 1)])
                    return

        async def fsyncdir(self, inode: int, datasync: bool) -> None:
            plan.strike("fsyncdir")

        async def releasedir(self, inode: int) -> None:
            pass

        async def statfs(self, ctx: Any) -> Any:
            found = os.statvfs(real)
            data = pyfuse3.StatvfsData()
            for key in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree"):
                setattr(data, f"f_{key}", getattr(found, f"f_{key}"))
            data.f_favail, data.f_namemax = found.f_favail, found.f_namemax
            return data

        async def access(self, inode: int, mode: int, ctx: Any) -> bool:
            return True

        async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
            plan.strike("setxattr")
            with passed_on():
                os.setxattr(self._path(inode), name, value)

        async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
            with passed_on():
                return os.getxattr(self._path(inode), name)

        async def listxattr(self, inode: int, ctx: Any) -> list[bytes]:
            with passed_on():
                return [os.fsencode(name) for name in os.listxattr(self._path(inode))]

        async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
            plan.strike("setxattr")
            with passed_on():
                os.removexattr(self._path(inode), name)

    async def orders() -> None:
        stream = trio.lowlevel.FdStream(os.dup(0))
        rest = b""
        async for data in stream:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                answer = {"calls": plan.calls, "failed": plan.failed}
                plan.words, plan.calls, plan.failed = json.loads(line), Counter(), 0
                print(json.dumps(answer), flush=True)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(orders)
            nursery.start_soon(pyfuse3.main)

    os.umask(0)
    options = {*pyfuse3.default_options, "fsname=failing", "default_permissions", "allow_other"}
    pyfuse3.init(PassThrough(), mounted, options)
    try:
        trio.run(main)
    finally:
        pyfuse3.close(unmount=False)


def _chown(held: int, uid: int, gid: int) -> None:
    """An owner; also of a symbolic link, which only its descriptor stands for."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fchownat(held, b"", uid, gid, 0x1000):  # AT_EMPTY_PATH
        raise OSError(ctypes.get_errno(), "fchownat")


if __name__ == "__main__":
    _serve(*sys.argv[1:])

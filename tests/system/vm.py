"""Debian systems in virtual machines: a kernel of their own, drives, and power that can be cut.

For what a container cannot show: udev and drives that are plugged in, file systems and device
mapper targets that this machine's kernel lacks, power cuts, clocks, other architectures. A
`System` is made once; each machine starts from a copy of its disk and is used as a
`system.nspawn.Machine` is:

    with VirtualMachine(appliance, tmp_path / "vm") as machine:
        machine.boot()
        machine.run("systemctl", "is-active", "dbus")
        machine.plug("stick", drive)
        machine.kill()
        machine.boot()

Processors are emulated: KVM is not there on most machines that are virtual themselves. Nothing
of a machine outlives the block, nor the process.
"""

import base64
import contextlib
import itertools
import json
import lzma
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zstandard

from system.emulation import emulated
from system.nspawn import (
    CACHE,
    ENVIRONMENT,
    PACKAGES,
    bootstrap,
    cached,
    completed,
    ip,
    network_number,
    wait_for,
)

# udev names drives; the agent runs programs for `VirtualMachine.run`; kmod and dmsetup are for
# tests that make devices.
_PACKAGES = ("udev", "qemu-guest-agent", "kmod", "dmsetup")
# The layout as it is from the start: otherwise a package with much Perl makes it.
_MERGED_USR = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"
_MODULES_AT_BOOT = ("virtio_pci", "virtio_blk", "ext4")
# What a guest gets of Debian's kernel modules, with what each of them needs.
_MODULES = (
    *_MODULES_AT_BOOT,
    *("virtio_console", "virtio_net", "virtio_rng"),
    *("xhci_pci", "usb_storage", "uas", "sd_mod", "t10-pi"),
    *("vfat", "exfat", "nls_ascii", "nls_cp437", "nls_iso8859-1", "nls_utf8"),
    *("dm_mod", "dm_flakey", "loop", "overlay", "autofs4", "binfmt_misc"),
    *("sch_netem", "dummy", "veth"),
)
_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules/order); do
    /bin/busybox insmod /modules/$module
done
until [ -b /dev/vda ]; do
    /bin/busybox usleep 20000
done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""
# What Debian packs kernels with, by its first bytes; the four bytes that follow the packed data
# are none of these decompressors' business.
_UNPACK: dict[bytes, Callable[[bytes], bytes]] = {
    b"\xfd7zX": lambda packed: lzma.LZMADecompressor().decompress(packed),
    b"\x28\xb5\x2f\xfd": lambda packed: (
        zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    ),
}


@dataclass(frozen=True)
class Board:
    """How QEMU is told to be a computer of one of Debian's architectures."""

    program: str
    options: tuple[str, ...]
    parameters: str
    """For its kernel."""


BOARDS = {
    # On a busy machine the guest's timer may look as if it did not work, which ends the boot.
    "amd64": Board(
        "qemu-system-x86_64",
        ("-machine", "q35", "-cpu", "max"),
        "console=ttyS0 no_timer_check",
    ),
    "arm64": Board(
        "qemu-system-aarch64",
        ("-machine", "virt,gic-version=3", "-cpu", "cortex-a72"),
        "console=ttyAMA0",
    ),
}


@dataclass(frozen=True)
class Kernel:
    """Debian's kernel for a release and an architecture, ready to be booted.

    Attributes:
        image: what QEMU loads; not compressed, which halves the time until it runs.
        initrd: mounts the first disk and hands over to its systemd.
        modules: the folder to be put at ``/usr/lib/modules``; only `_MODULES` are in it.
    """

    image: Path
    initrd: Path
    modules: Path


@dataclass(frozen=True)
class System:
    """What a virtual machine starts from; its disk is copied and never written to."""

    release: str
    architecture: str
    kernel: Kernel
    disk: Path


def virtual_base(
    release: str, architecture: str = "amd64", *, packages: Sequence[str] = ()
) -> Path:
    """The tar file of a minimal system with what a virtual machine needs, of any architecture.

    It is made anew when it is older than a week: 20 to 35 s, and minutes where it is emulated.
    """
    include = (*PACKAGES, *_PACKAGES, *packages)
    name = f"{release}-{architecture}-virtual-{_mark(include)}.tar"
    with cached(name) as new:
        if new is not None:
            with emulated(architecture):
                bootstrap(
                    release,
                    new,
                    *("--variant=apt", f"--architectures={architecture}", _MERGED_USR),
                    include=include,
                )
    return CACHE / name


def kernel(release: str, architecture: str = "amd64") -> Kernel:
    """Debian's newest kernel for a release, from the cache when it is fresh."""
    name = f"{release}-{architecture}-kernel-{_mark((_MODULES, _INIT))}"
    with cached(name) as new:
        if new is not None:
            _make_kernel(release, architecture, new)
    return Kernel(CACHE / name / "image", CACHE / name / "initrd", CACHE / name / "modules")


def make_system(
    tree: Path, image: Path, release: str, architecture: str = "amd64", *, size: str = "2G"
) -> System:
    """Make a disk of a root file system, one of `virtual_base` and whatever was put into it."""
    of_system = kernel(release, architecture)
    shutil.copytree(of_system.modules, tree / "usr/lib/modules", dirs_exist_ok=True)
    units = tree / "etc/systemd/system"
    # It tells networkd of the addresses on the kernel's command line.
    wanted = units / "sysinit.target.wants/systemd-network-generator.service"
    wanted.parent.mkdir(parents=True, exist_ok=True)
    wanted.symlink_to("/lib/systemd/system/systemd-network-generator.service")
    # What is emulated on a busy machine takes its time; drives are waited for as ever.
    settings = tree / "etc/systemd/system.conf.d/emulated.conf"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text("[Manager]\nDefaultTimeoutStartSec=20min\nDefaultDeviceTimeoutSec=90s\n")
    # Boots that seem to be months after the last one would start with them.
    for timer in ("apt-daily.timer", "apt-daily-upgrade.timer"):
        (units / timer).symlink_to("/dev/null")
    options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    _run("mke2fs", "-q", "-t", "ext4", "-E", options, "-d", tree, image, size)
    return System(release, architecture, of_system, image)


def make_drive(
    image: Path,
    filesystem: str,
    *,
    label: str,
    files: Iterable[Path] = (),
    size: int = 64 << 20,
) -> None:
    """Make the image of a drive with one partition, as shops sell them, without mounting it.

    Args:
        image: a file that does not exist yet.
        filesystem: ``vfat``, ``exfat`` or ``ext4``.
        label: of the file system.
        files: files and folders for its root; exfat takes none, since no tool puts them there.
        size: of the drive, in bytes.
    """
    start = 1 << 20
    codes = {"vfat": "c", "exfat": "7", "ext4": "83"}
    with image.open("wb") as file:
        file.truncate(size)
    table = f"{start // 512},,{codes[filesystem]}\n"
    _run("sfdisk", "--quiet", image, input=table.encode())
    with tempfile.TemporaryDirectory(dir=image.parent) as folder:
        partition = Path(folder) / "partition"
        with partition.open("wb") as file:
            file.truncate(size - start)
        if filesystem == "ext4":
            tree = Path(folder) / "tree"
            tree.mkdir()
            for path in files:
                _run("cp", "-a", path, tree)
            _run("mke2fs", "-q", "-t", "ext4", "-L", label, "-d", tree, partition)
        else:
            option = {"vfat": "-n", "exfat": "-L"}[filesystem]
            _run(f"mkfs.{filesystem}", option, label, partition)
            for path in files:
                assert filesystem == "vfat", "nothing here puts files on exfat"
                _run("mcopy", "-s", "-i", partition, path, "::/")
        convert = ("bs=1M", f"seek={start >> 20}", "conv=notrunc,sparse", "status=none")
        _run("dd", f"if={partition}", f"of={image}", *convert)


class VirtualMachine:
    """One computer: its disk while it is off, and QEMU while it runs.

    Attributes:
        release: Debian's name for what it runs.
        disk: its root disk, raw.
        clock: what the hardware clock shows at the next boot, ``1970-01-01T00:00:00`` say; None
            for the right time.
        host: this machine's address on the link between the two.
        address: the system's own address on it.
    """

    def __init__(
        self,
        system: System,
        folder: Path,
        *,
        memory: int = 768,
        clock: str | None = None,
        write_log: Path | None = None,
    ) -> None:
        """Describe a machine; entering it as a context makes its disk.

        Args:
            system: what its disk is a copy of.
            folder: a folder that does not exist yet; it is removed at the end.
            memory: in MiB.
            clock: see the attribute.
            write_log: where QEMU's blklogwrites notes all that is written to the disk, anew at
                each boot.
        """
        self.release = system.release
        self.disk = folder / "disk"
        self._system = system
        self._board = BOARDS[system.architecture]
        self._folder = folder
        self._memory = memory
        self.clock = clock
        self._write_log = write_log
        self._cleanup = contextlib.ExitStack()
        self._qemu: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            number = stack.enter_context(network_number())
            self.host, self.address = f"10.211.{number}.1", f"10.211.{number}.2"
            self._link = f"vm-cu{number}"
            stack.callback(shutil.rmtree, self._folder)
            stack.callback(self.kill)
            self._folder.mkdir(parents=True)
            _run("cp", "--sparse=always", "--reflink=auto", self._system.disk, self.disk)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    @property
    def console(self) -> str:
        """What kernel and system wrote to the console since the machine was last booted."""
        return self._console_file.read_text(errors="replace")

    def boot(self, timeout: float = 300) -> None:
        """Switch it on, and wait until systemd is done starting units."""
        assert self._qemu is None, "it runs already"
        self._console_file.write_bytes(b"")
        with contextlib.ExitStack() as ends:
            sockets = {name: socket.socketpair() for name in ("monitor", "agent")}
            for _, theirs in sockets.values():
                ends.enter_context(theirs)
            self._monitor = _Channel(sockets["monitor"][0])
            self._agent = _Channel(sockets["agent"][0])
            self._qemu = subprocess.Popen(
                # However the test process ends, all of the machine ends with it.
                [
                    *("setpriv", "--pdeathsig", "KILL", "--"),
                    *self._command(*(theirs.fileno() for _, theirs in sockets.values())),
                ],
                pass_fds=[theirs.fileno() for _, theirs in sockets.values()],
                stdin=subprocess.DEVNULL,
            )
        self._monitor.greeting()
        self._monitor.command("qmp_capabilities")
        ip("addr", "add", f"{self.host}/24", "dev", self._link)
        ip("link", "set", self._link, "up")
        self.wait(self._agent_listens, "the agent in the guest", timeout=timeout)
        self.wait(self._is_up, "systemd to finish starting", timeout=timeout, step=0.5)

    def run(
        self, *argv: str, check: bool = True, timeout: float = 300, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the system, as root, and take what it wrote.

        Raises:
            AssertionError: its exit code is not 0, and `check` is set; or it did not end in time
                (it runs on then).
        """
        environment = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        order: dict[str, object] = {
            "path": "/usr/bin/env",
            "arg": ["--ignore-environment", *environment, *argv],
            "capture-output": True,
        }
        if stdin is not None:
            order["input-data"] = base64.b64encode(stdin.encode()).decode()
        pid = self._agent.command("guest-exec", order)["pid"]
        state: dict[str, Any] = {}

        def ended() -> bool:
            state.update(self._agent.command("guest-exec-status", {"pid": pid}))
            return bool(state["exited"])

        self.wait(ended, " ".join(argv), timeout=timeout, step=0.05)
        code = -state["signal"] if "signal" in state else state["exitcode"]
        out, err = (
            base64.b64decode(state.get(name, "")).decode(errors="replace")
            for name in ("out-data", "err-data")
        )
        return completed(argv, code, out, err, check=check)

    def output(self, *argv: str) -> str:
        """What a program writes to standard output, whatever its exit code."""
        return self.run(*argv, check=False).stdout.strip()

    def write(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        """Write a file in the running system; folders are made as needed. It is not synced."""
        self.run("mkdir", "-p", str(Path("/", path).parent))
        data = content.encode() if isinstance(content, str) else content
        with self._opened(path, "w") as handle:
            for start in range(0, len(data), 1 << 20):
                piece = base64.b64encode(data[start : start + (1 << 20)]).decode()
                order = {"handle": handle, "buf-b64": piece}
                written = self._agent.command("guest-file-write", order)["count"]
                assert written == len(data[start : start + (1 << 20)]), f"{path}: disk full"
        self.run("chmod", f"{mode:o}", str(Path("/", path)))

    def read(self, path: str) -> bytes:
        """What a file in the running system holds."""
        content = b""
        with self._opened(path, "r") as handle:
            while True:
                got = self._agent.command("guest-file-read", {"handle": handle, "count": 1 << 20})
                content += base64.b64decode(got["buf-b64"])
                if got["eof"]:
                    return content

    def link(self, *, up: bool) -> None:
        """Plug the network cable in, or pull it out, at this machine's end."""
        self._monitor.command("set_link", {"name": "network", "up": up})

    def plug(
        self,
        name: str,
        image: Path,
        *,
        read_only: bool = False,
        errors: Sequence[dict[str, object]] = (),
    ) -> None:
        """Put a USB drive into the running machine; what the system writes goes to the image.

        Args:
            name: for `unplug`; one that no other plugged drive has.
            image: the whole drive, of `make_drive` say.
            read_only: its switch is set so that nothing can be written.
            errors: rules by which it fails, ``inject-error`` of QEMU's blkdebug.
        """
        file: dict[str, object] = {"driver": "file", "filename": str(image)}
        if errors:
            file = {"driver": "blkdebug", "image": file, "inject-error": list(errors)}
        node = {"driver": "raw", "node-name": name, "file": file, "read-only": read_only}
        self._monitor.command("blockdev-add", node)
        device = {"driver": "usb-storage", "bus": "usb.0", "id": f"{name}-device"}
        self._monitor.command("device_add", {**device, "drive": name, "removable": True})

    def unplug(self, name: str) -> None:
        """Pull a drive out, without a word of warning to the system."""
        self._monitor.command("device_del", {"id": f"{name}-device"})

        def released() -> bool:
            nodes = self._monitor.command("query-named-block-nodes")
            if name not in {node["node-name"] for node in nodes}:
                return True
            with contextlib.suppress(AssertionError):  # it is still in use
                self._monitor.command("blockdev-del", {"node-name": name})
            return False

        self.wait(released, f"{name} to be free", step=0.02)

    def poweroff(self, timeout: float = 120) -> None:
        """Shut the system down in order.

        Raises:
            AssertionError: it was not off in time.
        """
        assert self._qemu is not None, "it does not run"
        self._agent.send("guest-shutdown", {"mode": "powerdown"})
        self.went_off(timeout)

    def went_off(self, timeout: float = 120) -> None:
        """Wait until the system has shut itself down, to boot again or not.

        Raises:
            AssertionError: it was not off in time.
        """
        assert self._qemu is not None, "it does not run"
        try:
            self._qemu.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not off after {timeout} s:\n{self.console[-4000:]}") from None
        self.kill()

    def reboot(self) -> None:
        """Shut down in order, and boot again."""
        self.poweroff()
        self.boot()

    def kill(self) -> None:
        """Cut the power: what the system had not synced is lost."""
        if self._qemu is None:
            return
        self._qemu.kill()
        self._qemu.wait()
        self._qemu = None
        self._monitor.close()
        self._agent.close()

    def wait(
        self, condition: Callable[[], object], what: str, *, timeout: float = 60, step: float = 0.2
    ) -> None:
        """Wait until a condition holds.

        Raises:
            AssertionError: it does not after `timeout` seconds, or the machine went off.
        """
        try:
            wait_for(condition, what, self._qemu, self._console_file, timeout=timeout, step=step)
        except _OffError as error:
            tail = self.console[-4000:]
            raise AssertionError(f"waiting for {what}: {error}; console:\n{tail}") from None

    @property
    def _console_file(self) -> Path:
        return self._folder / "console"

    def _command(self, monitor: int, agent: int) -> list[str]:
        kernel = self._system.kernel
        network = f"ip={self.address}::{self.host}:255.255.255.0:appliance::off"
        options = f"{self._board.parameters} panic=-1 quiet mitigations=off {network}"
        file: dict[str, object] = {"driver": "file", "filename": str(self.disk)}
        disk: dict[str, object] = {"driver": "raw", "file": file}
        if self._write_log is not None:
            self._write_log.write_bytes(b"")
            os.truncate(self._write_log, 8 << 30)
            log = {"driver": "file", "filename": str(self._write_log)}
            disk = {"driver": "blklogwrites", "file": file, "log": log}
        return [
            *(self._board.program, "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none", "-accel", "tcg,thread=multi", "-smp", "2"),
            *(*self._board.options, "-m", str(self._memory)),
            *("-kernel", str(kernel.image), "-initrd", str(kernel.initrd), "-append", options),
            *(
                "-chardev",
                f"file,id=console,path={self._console_file}",
                "-serial",
                "chardev:console",
            ),
            *(
                "-chardev",
                f"socket,id=monitor,fd={monitor}",
                "-mon",
                "chardev=monitor,mode=control",
            ),
            *("-chardev", f"socket,id=agent,fd={agent}", "-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
            *("-blockdev", json.dumps({**disk, "node-name": "root"})),
            *("-device", "virtio-blk-pci,drive=root,write-cache=on"),
            *("-netdev", f"tap,id=network,ifname={self._link},script=no,downscript=no"),
            *("-device", "virtio-net-pci,netdev=network,romfile="),
            *("-device", "virtio-rng-pci", "-device", "qemu-xhci,id=usb"),
            *(() if self.clock is None else ("-rtc", f"base={self.clock}")),
        ]

    def _agent_listens(self) -> bool:
        channels = self._monitor.command("query-chardev")
        return any(one["label"] == "agent" and one["frontend-open"] for one in channels)

    def _is_up(self) -> bool:
        return self.output("systemctl", "is-system-running") in ("running", "degraded")

    @contextlib.contextmanager
    def _opened(self, path: str, mode: str) -> Any:
        order = {"path": str(Path("/", path)), "mode": mode}
        handle = self._agent.command("guest-file-open", order)
        try:
            yield handle
        finally:
            self._agent.command("guest-file-close", {"handle": handle})


class _OffError(AssertionError):
    """QEMU is not there any more."""


class _Channel:
    """QEMU's protocol for its monitor and for its agent in the guest: JSON, a line each.

    Each order has a number that its answer repeats, so neither events nor an answer that comes
    late are taken for another's.
    """

    _TIMEOUT = 120.0

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._numbers = itertools.count()
        self._received = b""

    def close(self) -> None:
        self._connection.close()

    def greeting(self) -> None:
        """Take the line that a monitor begins with."""
        assert "QMP" in self._line(time.monotonic() + self._TIMEOUT)

    def send(self, name: str, arguments: dict[str, Any] | None = None) -> int:
        """Give an order; gives its number."""
        number = next(self._numbers)
        order = {"execute": name, "arguments": arguments or {}, "id": number}
        self._connection.settimeout(self._TIMEOUT)
        try:
            self._connection.sendall(json.dumps(order).encode() + b"\n")
        except ConnectionError:
            raise _OffError("the machine went off") from None
        return number

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Give an order and wait for its answer.

        Raises:
            AssertionError: it was refused, or there was no answer in time.
        """
        number = self.send(name, arguments)
        end = time.monotonic() + self._TIMEOUT
        while (answer := self._line(end)).get("id") != number:
            pass
        assert "error" not in answer, f"{name}: {answer['error']['desc']}"
        return answer["return"]

    def _line(self, end: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._connection.settimeout(max(end - time.monotonic(), 0.001))
            try:
                received = self._connection.recv(1 << 16)
            except TimeoutError:
                raise AssertionError(f"no answer in {self._TIMEOUT} s") from None
            except ConnectionError:
                received = b""
            if not received:
                raise _OffError("the machine went off")
            self._received += received
        line, self._received = self._received.split(b"\n", 1)
        return dict(json.loads(line))


def _mark(recipe: object) -> str:
    """Part of a name in the cache: what was made in another way is another thing."""
    return f"{zlib.crc32(repr(recipe).encode()):08x}"


def _make_kernel(release: str, architecture: str, target: Path) -> None:
    target.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        # Nothing of it is run: that works for any architecture.
        bootstrap(
            release,
            root,
            *("--variant=extract", f"--architectures={architecture}"),
            _MERGED_USR,
            include=(f"linux-image-{architecture}", "busybox-static"),
        )
        (packed,) = root.glob("boot/vmlinuz-*")
        version = packed.name.removeprefix("vmlinuz-")
        _unpack_kernel(packed, target / "image")
        _run("depmod", "-b", root, version)
        _copy_modules(root, version, target / "modules" / version)
        _make_initrd(root, version, target / "initrd")


def _unpack_kernel(packed: Path, target: Path) -> None:
    """Take the kernel out of what unpacks itself (bzImage: Linux' x86 boot protocol)."""
    content = packed.read_bytes()
    if content[0x202:0x206] == b"HdrS":
        offset, length = struct.unpack_from("<II", content, 0x248)
        start = (content[0x1F1] + 1) * 512 + offset
        content = _UNPACK[content[start : start + 4]](content[start : start + length])
    target.write_bytes(content)


def _needed(root: Path, version: str, modules: Iterable[str]) -> list[Path]:
    """The files of modules, what they need before them; what is built in has none."""
    argv = ["modprobe", "-d", root, "-S", version, "--show-depends", "-a", *modules]
    listing = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    lines = (line.split() for line in listing.splitlines())
    return list(dict.fromkeys(Path(line[1]) for line in lines if line[0] == "insmod"))


def _copy_modules(root: Path, version: str, target: Path) -> None:
    source = root / "lib/modules" / version
    for file in _needed(root, version, _MODULES):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    for file in source.glob("modules.*"):
        if file.name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            shutil.copy(file, target)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "lib/modules").mkdir(parents=True)
        (Path(name) / "lib/modules" / version).symlink_to(target)
        _run("depmod", "-b", name, version)


def _make_initrd(root: Path, version: str, target: Path) -> None:
    tree = root / "initrd"
    for name in ("bin", "dev", "modules", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy(root / "usr/bin/busybox", tree / "bin")
    (tree / "init").write_text(_INIT)
    (tree / "init").chmod(0o755)
    modules = _needed(root, version, _MODULES_AT_BOOT)
    for file in modules:
        shutil.copy(file, tree / "modules")
    (tree / "modules/order").write_text("".join(f"{file.name}\n" for file in modules))
    names = b"\0".join(bytes(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with target.open("wb") as file:
        subprocess.run(
            ["cpio", "--create", "--format=newc", "--null", "--quiet"],
            check=True,
            cwd=tree,
            input=names,
            stdout=file,
        )


def _run(*argv: str | Path, input: bytes | None = None) -> None:
    subprocess.run(
        argv,
        check=True,
        stdin=subprocess.DEVNULL if input is None else None,
        input=input,
        stdout=subprocess.DEVNULL,
    )

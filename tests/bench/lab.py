"""The machines: a device with a disk of its own, and a server behind the link."""

import compileall
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from link import SERVER, Link, link

_PACKAGE = Path(__file__).resolve().parents[2] / "src" / "casync_updater"

_SECTOR = 512
_PATIENCE = 30.0


@dataclass(frozen=True)
class Cost:
    """What one piece of work took.

    Attributes:
        seconds: from start to end, by the clock.
        processor: seconds of all its processes.
        peak: bytes that the largest of its processes had resident.
        received: bytes that came over the link, headers of IP included.
        written: bytes that reached the disk, after everything was synced.
        requests: paths that the web server was asked for.
    """

    seconds: float
    processor: float
    peak: int
    received: int
    written: int
    requests: tuple[str, ...]


class Lab:
    """Where things are, and how work on the device is measured."""

    def __init__(self, folder: Path, between: Link) -> None:
        self.folder = folder
        self.between = between
        self.disk = folder / "disk"
        """A file system of its own, on a block device of its own: what is the device's."""
        self.site = folder / "site"
        """What the web server has."""
        self.sources = folder / "sources"
        """What is published; the rsync daemon has it."""
        self._log = folder / "access.log"
        self._times = folder / "times"

    def work(self, *steps: list[str | Path] | Callable[[], None], near: bool = False) -> Cost:
        """Run programs, or calls that take no time worth mentioning, and say what they cost.

        Args:
            steps: command lines, one after the other, and calls in between.
            near: beside the server in place of at the device's end, so that the link is no
                hindrance; for what only prepares a measurement.
        """
        space = self.between.server if near else self.between.device
        self.settle()
        received, written = self.between.received(), self._written()
        logged = self._log.stat().st_size
        processor, peak = 0.0, 0
        begin = time.perf_counter()
        for step in steps:
            if callable(step):
                step()
                continue
            # The peak that wait4 reports counts from before the program was executed: time is
            # a small program, and this one is not.
            argv = ["time", "--quiet", f"--output={self._times}", "--format=%U %S %M"]
            with (self.folder / "output").open("wb") as output:
                code = self._run(space.argv(*argv, *step), output)
            if code:
                said = (self.folder / "output").read_text(errors="replace")
                raise SystemExit(f"bench: {' '.join(map(str, step))} failed:\n{said}")
            user, system, kibibytes = self._times.read_text().split()
            processor += float(user) + float(system)
            peak = max(peak, int(kibibytes) << 10)
        seconds = time.perf_counter() - begin
        self.settle()
        with self._log.open() as log:
            log.seek(logged)
            requests = tuple(log.read().split())
        return Cost(
            seconds,
            processor,
            peak,
            self.between.received() - received,
            self._written() - written,
            requests,
        )

    def _run(self, argv: list[str], output: IO[bytes]) -> int:
        """The exit code; where this program is ended meanwhile, nothing is left running."""
        with subprocess.Popen(
            argv, stdout=output, stderr=output, env=self.environment, start_new_session=True
        ) as process:
            try:
                return process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise

    @property
    def environment(self) -> dict[str, str]:
        """With the project as an installed package has it: compiled already."""
        return {**os.environ, "PYTHONPATH": str(self.folder / "package")}

    def settle(self) -> None:
        """Nobody's unwritten data is to burden the next."""
        subprocess.run(["sync", "--file-system", self.disk], check=True)

    def url(self, path: str) -> str:
        return f"http://{SERVER}/{path}"

    def _written(self) -> int:
        number = self.disk.stat().st_dev
        counters = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat").read_text()
        return int(counters.split()[6]) * _SECTOR

    @contextlib.contextmanager
    def service(self, space_argv: list[str], ready: Callable[[], bool]) -> Iterator[int]:
        """A program that runs while the block lasts; gives its process id."""
        with (
            (self.folder / "services.log").open("ab") as log,
            subprocess.Popen(space_argv, stdout=log, stderr=log, env=self.environment) as process,
        ):
            try:
                deadline = time.monotonic() + _PATIENCE
                while not ready():
                    if process.poll() is not None or time.monotonic() > deadline:
                        said = (self.folder / "services.log").read_text(errors="replace")
                        raise SystemExit(f"bench: {' '.join(space_argv)} did not start:\n{said}")
                    time.sleep(0.1)
                yield process.pid
            finally:
                process.terminate()
                process.wait(_PATIENCE)


@contextlib.contextmanager
def lab(folder: Path, disk_size: int) -> Iterator[Lab]:
    """Set everything up, and take it down again whatever happens."""
    with contextlib.ExitStack() as stack:
        here = Lab(folder, stack.enter_context(link()))
        for path in (here.disk, here.site, here.sources):
            path.mkdir()
        _mount(folder / "disk.img", here.disk, disk_size, stack)
        installed = folder / "package" / _PACKAGE.name
        shutil.copytree(_PACKAGE, installed)
        compileall.compile_dir(installed, quiet=1)
        (folder / "access.log").touch()
        pid = folder / "nginx.pid"
        nginx = ["/usr/sbin/nginx", "-c", _nginx(here), "-e", folder / "nginx.err"]
        argv = here.between.server.argv(*nginx)
        stack.enter_context(here.service(argv, pid.exists))
        rsync = ["rsync", "--daemon", "--no-detach", f"--config={_rsyncd(here)}"]
        argv = here.between.server.argv(*rsync)
        stack.enter_context(here.service(argv, (folder / "rsync.pid").exists))
        yield here


def _mount(image: Path, point: Path, size: int, stack: contextlib.ExitStack) -> None:
    with image.open("wb") as file:
        file.truncate(size)
    # Without the lazy initialisation, which would write in the background for minutes.
    options = "lazy_itable_init=0,lazy_journal_init=0"
    mkfs = ["mkfs.ext4", "-q", "-F", "-i", "8192", "-m", "0", "-E", options, str(image)]
    subprocess.run(mkfs, check=True)
    subprocess.run(["mount", "-o", "loop,noatime", image, point], check=True)
    # Lazily, for what was killed may take a moment longer to let go.
    stack.callback(subprocess.run, ["umount", "--lazy", point], check=True)


def _nginx(here: Lab) -> Path:
    folder = here.folder
    config = folder / "nginx.conf"
    config.write_text(
        f"""
        daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
        events {{}}
        http {{
          log_format path "$uri";
          access_log {folder}/access.log path;
          sendfile on; tcp_nopush on;
          client_body_temp_path {folder}; proxy_temp_path {folder};
          fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
          server {{ listen {SERVER}:80; root {here.site}; }}
        }}
        """
    )
    return config


def _rsyncd(here: Lab) -> Path:
    config = here.folder / "rsyncd.conf"
    config.write_text(
        f"pid file = {here.folder}/rsync.pid\naddress = {SERVER}\nuse chroot = no\n"
        f"uid = 0\ngid = 0\nread only = yes\n[sources]\npath = {here.sources}\n"
    )
    return config


def publish(here: Lab, name: str, version: int) -> None:
    """Publish the source tree of that name with this project's own publisher."""
    folder = here.site / name
    folder.mkdir(exist_ok=True)
    config = here.folder / f"{name}-server.json"
    config.write_text(
        f'{{"index": "{folder}/tree.caidx", "store": "{folder}/store.castr",'
        f' "source": "{here.sources / name}", "version": "{version}"}}'
    )
    argv = [sys.executable, "-m", "casync_updater.server", str(config)]
    done = subprocess.run(argv, env=here.environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {name} was not published:\n{done.stderr}")

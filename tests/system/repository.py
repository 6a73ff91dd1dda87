"""What a test machine installs packages from: Debian, and a signed repository of our own.

Debian comes through a small mirror in the test process, since the machines have no way out;
packages are kept in the cache, so a second run downloads none.
"""

import contextlib
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from email.message import Message
from functools import partial
from pathlib import Path

from system.nspawn import CACHE, Archive, Machine
from system.vm import VirtualMachine

SOURCE = Path(__file__).parents[2]
_FORWARDED = ("If-Modified-Since", "Range", "If-Range")
_RETURNED = ("Last-Modified", "Content-Type", "Content-Range")


def build(target: Path, *, version: str | None = None, umask: int = 0o022) -> list[Path]:
    """Build the packages of this tree, in a copy of it.

    Args:
        target: a folder that does not exist yet; the results are left there.
        version: another version than the tree's, for upgrades.
        umask: of the build.
    """
    tree = target / "source"
    ignored = shutil.ignore_patterns(".*_cache", "__pycache__", "*.egg-info")
    for name in ("conf", "debian", "docs", "src", "tests"):
        shutil.copytree(SOURCE / name, tree / name, ignore=ignored, symlinks=True)
    for name in ("LICENSE", "pyproject.toml"):
        shutil.copy2(SOURCE / name, tree)
    if version is not None:
        module = tree / "src/casync_updater/__init__.py"
        _replace_line(module, "__version__", f'__version__ = "{version}"')
        _replace_line(
            tree / "debian/changelog",
            "casync-updater (",
            f"casync-updater ({version}) unstable; urgency=medium",
        )
    done = subprocess.run(
        ["dpkg-buildpackage", "--unsigned-source", "--unsigned-changes", "--build=binary"],
        cwd=tree,
        env={
            "HOME": str(target),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "DEB_BUILD_OPTIONS": "nocheck",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        umask=umask,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    shutil.rmtree(tree)
    return sorted(target.glob("*.deb"))


def publish(settings: Path) -> None:
    """Run this tree's publisher with a configuration file."""
    subprocess.run(
        [sys.executable, "-m", "casync_updater.server", str(settings)],
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(SOURCE / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        check=True,
        stdin=subprocess.DEVNULL,
    )


class Repository:
    """A signed apt repository in a folder, made with the usual tools.

    Attributes:
        folder: what a web server serves.
        keyring: the public key, for ``Signed-By``.
        armored: the same as text.
    """

    def __init__(self, folder: Path) -> None:
        """Make an empty repository with a key of its own."""
        self.folder = folder
        self.keyring = folder / "key.gpg"
        self._index = folder / "dists/local/main/binary-all"
        self._index.mkdir(parents=True)
        self._secret = folder.with_name(f"{folder.name}.secret")
        with _gnupg() as gpg:
            _run(*gpg, "--passphrase", "", "--quick-gen-key", "Test <t@example.org>", "ed25519")
            _run(*gpg, "--output", str(self.keyring), "--export")
            self.armored = _run(*gpg, "--armor", "--export").decode()
            _run(*gpg, "--output", str(self._secret), "--export-secret-keys")

    def publish(self, packages: Iterable[Path]) -> None:
        """Add packages, and sign the new state."""
        pool = self.folder / "pool"
        pool.mkdir(exist_ok=True)
        for package in packages:
            shutil.copy(package, pool)
        listing = _run("apt-ftparchive", "packages", "pool", cwd=self.folder)
        (self._index / "Packages").write_bytes(listing)
        fields = {
            "Suite": "local",
            "Codename": "local",
            "Components": "main",
            "Architectures": "all",
        }
        options = [f"-oAPT::FTPArchive::Release::{k}={v}" for k, v in fields.items()]
        dist = self.folder / "dists/local"
        (dist / "InRelease").unlink(missing_ok=True)
        unsigned = _run("apt-ftparchive", *options, "release", str(dist))
        with _gnupg() as gpg, tempfile.NamedTemporaryFile() as release:
            _run(*gpg, "--import", str(self._secret))
            Path(release.name).write_bytes(unsigned)
            _run(*gpg, "--clearsign", "--output", str(dist / "InRelease"), release.name)


def configure_apt(machine: Machine | VirtualMachine, server: str, repository: Repository) -> None:
    """Let a machine install from a server that `serve_packages` started."""
    lines = Archive(f"{server}/debian", f"{server}/security").sources(machine.release)
    if Archive.of_this_machine().security is None:
        lines = [line for line in lines if "/security" not in line]
    machine.write("etc/apt/sources.list", "".join(f"{line}\n" for line in lines))
    machine.write(
        "etc/apt/sources.list.d/local.list",
        f"deb [signed-by=/usr/share/keyrings/local.gpg] {server}/local local main\n",
    )
    machine.write("usr/share/keyrings/local.gpg", repository.keyring.read_bytes())


def serve_packages(address: str, repository: Repository) -> contextlib.AbstractContextManager[str]:
    """Serve Debian and a repository of our own; gives the server's URL."""
    archive = Archive.of_this_machine()
    places: dict[str, Path | str] = {"local": repository.folder, "debian": archive.main}
    if archive.security is not None:
        places["security"] = archive.security
    return serve(address, places)


@contextlib.contextmanager
def serve(address: str, places: Mapping[str, Path | str]) -> Iterator[str]:
    """A web server whose first path component names a folder, or an upstream URL.

    Yields:
        its URL; the port is any free one.
    """
    handler = partial(_Handler, places=places)
    with http.server.ThreadingHTTPServer((address, 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.1,))
        thread.start()
        try:
            yield f"http://{address}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: object, places: Mapping[str, Path | str]) -> None:
        self._places = places
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name, _, rest = self.path.lstrip("/").partition("/")
        place = self._places.get(name)
        if isinstance(place, Path):
            self.directory = str(place)
            self.path = f"/{rest}"
            super().do_GET()
        elif place is not None:
            self._relay(f"{place.rstrip('/')}/{rest}")
        else:
            self.send_error(404)

    def _relay(self, url: str) -> None:
        cached = CACHE / "pool" / hashlib.sha256(url.encode()).hexdigest()
        if cached.exists():
            code, headers, body = 200, Message(), cached.read_bytes()
        else:
            wanted = {name: self.headers[name] for name in _FORWARDED if name in self.headers}
            try:
                answer = urllib.request.urlopen(urllib.request.Request(url, headers=wanted))
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                code, headers, body = answer.status, answer.headers, answer.read()
            if code == 200 and url.endswith(".deb"):
                cached.parent.mkdir(parents=True, exist_ok=True)
                new = cached.with_name(f"{cached.name}.{os.getpid()}.{threading.get_ident()}")
                new.write_bytes(body)
                new.replace(cached)
        self.send_response(code)
        for name in _RETURNED:
            if name in headers:
                self.send_header(name, headers[name])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if code != 304:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def _replace_line(file: Path, start: str, line: str) -> None:
    lines = file.read_text().splitlines()
    number = next(i for i, text in enumerate(lines) if text.startswith(start))
    lines[number] = line
    file.write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def _gnupg() -> Iterator[tuple[str, ...]]:
    """gpg with a home of its own; below a short path, since it holds the agent's socket."""
    with tempfile.TemporaryDirectory(prefix="gpg") as home:
        try:
            yield (
                *("gpg", "--homedir", home, "--batch", "--quiet", "--yes"),
                *("--pinentry-mode", "loopback"),
            )
        finally:
            _run("gpgconf", "--homedir", home, "--kill", "all")


def _run(*argv: str, cwd: Path | None = None) -> bytes:
    return subprocess.run(
        argv, cwd=cwd, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ).stdout

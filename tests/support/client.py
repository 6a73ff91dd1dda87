"""A site and an appliance as their users have them: both programs as real processes.

site = Site(tmp_path / "site")
site.write("etc/app.conf", "1")
site.publish()
with WebServer(site.root) as server:
    appliance = Appliance(tmp_path / "device", server.url)
    appliance.update()
    assert snapshot(appliance.destination) == snapshot(site.source)
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casync_updater.model import Release
from casync_updater.release import parse_release
from casync_updater.trust import unwrap

SOURCES = Path(__file__).parents[2] / "src"
_LIMIT = 120.0


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.stdout)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What both programs are started with: the checkout first, nothing written beside it."""
    return {
        **os.environ,
        "PYTHONPATH": str(SOURCES),
        "PYTHONDONTWRITEBYTECODE": "1",
        **(extra or {}),
    }


def run(*argv: str | Path, code: int | None = 0, env: Mapping[str, str] | None = None) -> Done:
    """Run a program to its end; `code` is the exit code it must have, None for any."""
    done = subprocess.run(
        argv, check=False, capture_output=True, env=environment(env), timeout=_LIMIT
    )
    # Whoever expects no output reads no bytes that are no text.
    result = Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode())
    assert code in (None, result.code), f"{argv} gave {result}"
    return result


class Site:
    """What a publisher has: a source tree, and a folder that a web server serves.

    Attributes:
        source: the tree (or file) that is published.
        root: the folder that is served; the index and the store are directly in it.
        keys: keys of the publisher's entry beside index, store and source.
    """

    def __init__(self, folder: Path, name: str = "tree.caidx", **keys: Any) -> None:
        self.folder = folder
        self.name = name
        self.source = folder / "source"
        self.root = folder / "site"
        self.keys = keys
        self.root.mkdir(parents=True, exist_ok=True)

    @property
    def index(self) -> Path:
        return self.root / self.name

    @property
    def store(self) -> Path:
        return self.root / "store.castr"

    def beside(self, suffix: str) -> Path:
        """The file beside the index, ``.release`` for instance."""
        return self.root / (self.name + suffix)

    def write(self, name: str | bytes, content: str | bytes, mode: int = 0o644) -> Path:
        """Write a file of the source tree, with its folders."""
        path = self.source / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        return path

    def publish(self, **keys: Any) -> dict[str, Any]:
        """Publish the source; gives the publisher's report of it."""
        config = self.folder / "publish.json"
        paths = {"index": self.index, "store": self.store, "source": self.source}
        entry = {**{key: str(path) for key, path in paths.items()}, **self.keys, **keys}
        config.write_text(json.dumps(entry))
        outcome: dict[str, Any] = json.loads(self.run_publisher("--json", str(config)))
        entry = outcome["entries"][0]
        assert isinstance(entry, dict)
        return entry

    def run_publisher(self, *arguments: str) -> str:
        """Run the publisher; gives what it prints."""
        return run(sys.executable, "-m", "casync_updater.server", *arguments).stdout

    def publish_legacy(
        self, *, cks: bool = True, manifest: bool = True, options: tuple[str, ...] = ()
    ) -> str:
        """Publish as the old publisher did, with casync's own commands; gives the digest."""
        flags = options or ("--with=2sec-time",)
        digest = casync("make", f"--store={self.store}", *flags, self.index, self.source)
        if cks:
            self.beside(".cks").write_text(digest)
        if manifest:
            self.beside(".mtree").write_text(casync("mtree", *flags, self.source) + "\n")
        return digest

    def release(self) -> Release:
        """What the site says is current."""
        file = self.beside(".release")
        return parse_release(unwrap(file.read_bytes()), str(file))

    def chunks(self) -> set[str]:
        """The ids of the chunks in the store."""
        return {path.stem for path in self.store.rglob("*.cacnk")}

    def copy(self, folder: Path) -> "Site":
        """A site of its own with the same content, served files as hard links.

        They are always replaced and never written to, so that is a copy; a test that damages
        one replaces it as well.
        """
        other = Site(folder, self.name, **self.keys)
        run("cp", "-a", self.source, other.source)
        run("cp", "-al", f"{self.root}/.", other.root)
        return other


class Appliance:
    """A device: a configuration with one entry, a destination, and the client's state.

    Attributes:
        entry: the entry of the configuration; change it as you like between two commands.
        destination: its dstPath.
        environment: additional variables for the client.
    """

    def __init__(self, folder: Path, base: str | Path, name: str = "tree.caidx", **keys: Any):
        """Configure it.

        Args:
            folder: everything of the device is in it.
            base: URL or path of the folder with the index and ``store.castr``.
            name: the index.
            keys: further keys of the entry.
        """
        self.folder = folder
        self.destination = folder / "device" / "tree"
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        self.state_dir = folder / "state"
        self.journal = folder / "actions.log"
        self.config = folder / "client.json"
        self.conf: Path | None = None
        self.environment: dict[str, str] = {}
        self.entry: dict[str, Any] = {
            "interval": 3_600_000,
            "srcIndex": f"{base}/{name}",
            "srcStore": f"{base}/store.castr",
            "dstPath": str(self.destination),
            **keys,
        }

    @property
    def staging(self) -> Path:
        """The folder beside the destination where the client builds."""
        return self.destination.parent / f".{self.destination.name}.casync-updater"

    def note(self, words: str) -> str:
        """A shell command that appends a line to the log of actions."""
        return f"echo {words} >> {shlex.quote(str(self.journal))}"

    def log(self) -> list[str]:
        """What the actions have written."""
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    def trigger(self, path: str, *actions: str) -> None:
        """Add a trigger; one that notes its path where no action is named."""
        actions = actions or (self.note(shlex.quote(path)),)
        self.entry.setdefault("triggers", []).append({"paths": [path], "actions": list(actions)})

    def settings(self, text: str) -> None:
        """Write a settings file, which is used from now on."""
        self.conf = self.folder / "casync-updater.conf"
        self.conf.write_text(text)

    def impatient(self, *, retries: int = 0) -> None:
        """Settings for servers that fail: short time-outs, few retries."""
        self.settings(
            "[fetch]\nconnect_timeout = 2\nread_timeout = 1\nmin_rate = 1\nretry_max_wait = 1\n"
            f"retries = {retries}\n"
        )

    def command(self, *arguments: str | Path) -> list[str | Path]:
        """The command line of the client; writes the configuration."""
        self.config.write_text(json.dumps(self.entry))
        settings = () if self.conf is None else ("--settings", self.conf)
        return [
            *(sys.executable, "-m", "casync_updater", "--config", self.config),
            *("--state-dir", self.state_dir, *settings, *arguments),
        ]

    def run(self, *arguments: str | Path, code: int | None = 0) -> Done:
        """Run a command of the client to its end."""
        return run(*self.command(*arguments), code=code, env=self.environment)

    def update(self, *options: str, code: int | None = 0) -> dict[str, Any]:
        """Run a cycle; gives its end as ``update --json`` prints it, with ``stderr``."""
        done = self.run("update", "--json", *options, code=code)
        (end,) = done.json.values()
        return {**end, "stderr": done.stderr}

    def check(self, *, code: int | None = 0) -> dict[str, Any]:
        """What ``check --json`` says about the entry."""
        (found,) = self.run("check", "--json", code=code).json.values()
        return dict(found)

    def status(self) -> dict[str, Any]:
        """What ``status --json`` says about the entry."""
        (found,) = self.run("status", "--json").json["entries"]
        return dict(found)

    def verify(self, *, code: int | None = 0) -> dict[str, str]:
        """What ``verify --json`` finds different: paths with what it is."""
        found = self.run("verify", "--json", self.name, code=code).json
        return {item["path"]: item["what"] for item in found["differences"]}

    @property
    def name(self) -> str:
        return str(self.entry.get("name", Path(self.entry["dstPath"]).name))

    @contextlib.contextmanager
    def start(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command of the client that runs while the block lasts, in a session of its own."""
        process = subprocess.Popen(
            self.command(*arguments),
            env=environment(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def casync(*arguments: str | Path) -> str:
    """What a casync command prints."""
    return run("casync", *arguments).stdout.strip()


def features_of(site: Site) -> list[str]:
    """casync options that make its digests comparable with the site's archive."""
    return [f"--with={feature}" for feature in site.release().features]


def digest_of(tree: Path, site: Site) -> str:
    """``casync digest`` of a tree, with the features of the site's archive."""
    return casync("digest", *features_of(site), tree)


def empty_path(folder: Path, mark: Path) -> str:
    """A PATH on which every program that the client knows only leaves a mark."""
    folder.mkdir()
    for name in ("setpriv", "casync", "gpgv", "bash", "sh", "systemd-run", "systemctl"):
        script = folder / name
        script.write_text(f'#!/bin/sh\necho {name} "$@" >> {shlex.quote(str(mark))}\nexit 1\n')
        script.chmod(0o755)
    return str(folder)


def fill(path: Path, *, leave: int) -> None:
    """Fill the file system of a folder up to so many free bytes."""
    size = shutil.disk_usage(path).free - leave
    with (path / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)

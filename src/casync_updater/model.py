"""The frozen values that pass from room to room.

Times are seconds since 1970 (float), sizes are bytes, hashes are lower-case hex strings
unless a name ends in ``_id`` or a docstring says bytes. Paths inside an archive are bytes,
since an archive may hold any byte but NUL and ``/``; paths on this machine are `Path`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit


class Apply(StrEnum):
    """How a new tree takes the place of the old one."""

    ATOMIC = "atomic"
    IN_PLACE = "in-place"


class Mtimes(StrEnum):
    """Which modification times a publication carries."""

    STABLE = "stable"
    """Content that did not change keeps the time it had in the previous release."""
    KEEP = "keep"
    """The times that the source has."""


class Compression(StrEnum):
    """How the chunks of a store are compressed."""

    ZSTD = "zstd"
    XZ = "xz"
    GZIP = "gzip"


class Origin(StrEnum):
    """Which of an entry's two places something came from."""

    SOURCE = "source"
    BACKUP = "backup"


class Reason(StrEnum):
    """Who started a cycle."""

    START = "start"
    INTERVAL = "interval"
    ONLINE = "online"
    MEDIA = "media"
    OPERATOR = "operator"


class Step(StrEnum):
    """The rooms of a cycle, in their order, as `status` names them."""

    IDLE = "idle"
    RECOVER = "recover"
    CHECK = "check"
    PLAN = "plan"
    BUILD = "build"
    VERIFY = "verify"
    COMMIT = "commit"
    ACT = "act"
    MIRROR = "mirror"


@dataclass(frozen=True, slots=True)
class Location:
    """Where an index and its chunk store are: URLs (http, https) or absolute paths."""

    index: str
    store: str

    @property
    def remote(self) -> bool:
        """True where it takes a network to get there."""
        return self.index.startswith(("http://", "https://"))

    @property
    def suffix(self) -> str:
        """What the index's name ends in, ``.caidx`` or ``.caibx``; a URL's query is no name."""
        return Path(urlsplit(self.index).path if self.remote else self.index).suffix


@dataclass(frozen=True, slots=True)
class Trigger:
    """Commands that run when one of the paths (relative, ``.`` is the whole tree) changed."""

    paths: tuple[str, ...]
    actions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One destination of the client, as its JSON entry describes it."""

    name: str
    project: str
    interval: float
    """Seconds between two cycles (the JSON has milliseconds)."""
    source: Location
    backup: Location | None
    destination: Path
    triggers: tuple[Trigger, ...] = ()
    startup: tuple[str, ...] = ()
    signed_by: tuple[Path, ...] = ()
    preserve: tuple[str, ...] = ()
    keep: int = 1
    health_check: tuple[str, ...] = ()
    apply: Apply = Apply.ATOMIC
    self_update: bool = False
    """The destination receives this program's own packages, which are installed."""
    file: Path = Path()
    """The configuration file that the entry stands in."""

    @property
    def is_archive(self) -> bool:
        """True for a directory tree (``.caidx``), False for a file or device (``.caibx``)."""
        return self.source.suffix == ".caidx"


@dataclass(frozen=True, slots=True)
class Publication:
    """One source of the publisher, as its JSON entry describes it. Paths are absolute."""

    index: Path
    store: Path
    source: Path
    project: str
    version: str | None = None
    """None: the top entry of a changelog in `changes`, else the date."""
    features: tuple[str, ...] | None = None
    """casync's ``--with`` names; None: what the existing index has, else the default."""
    sign_keys: tuple[str, ...] = ()
    """Each an absolute path of a secret key file, or a key id or fingerprint in capitals."""
    valid_for: float | None = None
    """Seconds from a release's Date to its Valid-Until."""
    keep: int | None = None
    """How many releases keep their chunks; None prunes nothing."""
    changes: Path | str | None = None
    """A changelog file, or the text itself."""
    chunk_size: str | None = None
    """``MIN:AVG:MAX`` in bytes, the form of `Index.chunk_size_option`."""
    compression: Compression = Compression.ZSTD
    mtimes: Mtimes = Mtimes.STABLE
    file: Path = Path()
    """The configuration file that the entry stands in."""

    @property
    def is_archive(self) -> bool:
        """True for a directory tree (``.caidx``), False for a file or device (``.caibx``)."""
        return self.index.suffix == ".caidx"


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """One chunk of an index: its id (32 bytes) and the range it fills in the stream."""

    id: bytes
    start: int
    size: int

    @property
    def hex(self) -> str:
        """The id as it stands in a store's file names."""
        return self.id.hex()


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file that a release vouches for."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A release's place in the order of releases: (Serial, Date)."""

    serial: int
    date: float
    digest: str | None = field(default=None, compare=False)
    """The archive digest that was accepted under the serial; state files of earlier versions
    do not say it."""


@dataclass(frozen=True, slots=True)
class Release:
    """What a publisher says about one version: the parsed ``.release`` file."""

    project: str
    version: str
    serial: int
    date: float
    valid_until: float | None
    index: FileRef
    mtree: FileRef | None
    digest: str
    """The archive digest: SHA-512/256 (or SHA-256, as the index says) of the whole stream."""
    features: tuple[str, ...]
    archive_size: int
    store_size: int
    changes: tuple[str, ...] = ()

    @property
    def mark(self) -> Mark:
        """The release's place in the order."""
        return Mark(self.serial, self.date, self.digest)


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a directory (or file) apart from every other one of this boot: device, inode."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Installed:
    """A version that stands, or stood, in the destination."""

    digest: str
    index_sha256: str
    """Names the index, release and manifest that the state keeps of this version."""
    since: float
    source: str
    origin: Origin
    version: str | None = None
    serial: int | None = None
    date: float | None = None
    root: Identity | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """Paths that differ between two versions, sorted; a new mtime alone is no change."""

    added: tuple[bytes, ...] = ()
    changed: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def paths(self) -> Iterable[bytes]:
        """Every path that differs."""
        yield from self.added
        yield from self.changed
        yield from self.removed


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step is, in bytes; total is None while it is not known."""

    done: int
    total: int | None = None


class Monitor(Protocol):
    """Who is told what a cycle does: a terminal, plain lines, or the daemon's pipe."""

    def step(self, step: Step, version: str | None = None) -> None:
        """A step begins; version is what is being installed, where that is known."""

    def progress(self, progress: Progress) -> None:
        """The step went on. Called as often as there is something to say."""


class SilentMonitor:
    """A monitor for callers that want no reports."""

    def step(self, step: Step, version: str | None = None) -> None:
        """See `Monitor.step`."""

    def progress(self, progress: Progress) -> None:
        """See `Monitor.progress`."""


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """``[fetch]``: how releases and chunks are fetched."""

    connections: int = 32
    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    """Seconds without a single byte after which a request is given up."""
    min_rate: int = 64
    """Bytes per second below which a request counts as stalled."""
    retries: int = 5
    retry_max_wait: float = 60.0
    ca_bundle: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    credentials: Path | None = None
    """A netrc file with user names and passwords by host."""


@dataclass(frozen=True, slots=True)
class TrustSettings:
    """``[trust]``: signatures."""

    require: bool = False
    keyrings: Path = Path("/etc/casync-updater/keyrings")


@dataclass(frozen=True, slots=True)
class ActionSettings:
    """``[actions]``: how actions are run."""

    directory: Path = Path("/")
    timeout: float = 600.0
    """Seconds after which an action's process group is ended."""


@dataclass(frozen=True, slots=True)
class OnlineSettings:
    """``[online]``: when the update hosts are probed. Seconds."""

    enabled: bool = True
    hosts: tuple[tuple[str, int], ...] = ()
    """Names or addresses, each with the TCP port that is tried."""
    method: str = "auto"
    interval_offline: float = 60.0
    interval_online: float = 300.0
    min_age: float = 60.0
    splay: float = 5.0


@dataclass(frozen=True, slots=True)
class MediaSettings:
    """``[media]``: update drives."""

    labels: tuple[str, ...] = ()
    """Of file systems that the daemon mounts itself; none is mounted where there is none."""
    on_start: str = ""
    on_success: str = ""
    on_failure: str = ""
    """Commands; empty for none."""


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """``[daemon]``: the daemon and the checks of what it installed. Seconds."""

    verify_interval: float = 86400.0
    full_digest: bool = False
    stall_timeout: float = 600.0
    """Seconds without progress after which a cycle's process is ended."""
    self_update_trial: float = 3600.0
    """Seconds of connectivity within which a new version of this program completes a check."""


@dataclass(frozen=True, slots=True)
class Settings:
    """``casync-updater.conf``, with its drop-ins."""

    fetch: FetchSettings = field(default_factory=FetchSettings)
    trust: TrustSettings = field(default_factory=TrustSettings)
    actions: ActionSettings = field(default_factory=ActionSettings)
    online: OnlineSettings = field(default_factory=OnlineSettings)
    media: MediaSettings = field(default_factory=MediaSettings)
    daemon: DaemonSettings = field(default_factory=DaemonSettings)

"""Small real implementations of the interfaces that a cycle gets from outside."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from casync_updater.errors import ContentError, LocalError, MissingError, RemoteError
from casync_updater.model import FileRef, Location
from casync_updater.sources.base import Document, Validators
from casync_updater.tools.actions import Action, ActionResult, Handle


@dataclass
class FakeClock:
    """A clock that stands still until it is moved."""

    now: float = 1_800_000_000.0
    boot: str = "boot-1"

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def boot_id(self) -> str:
        return self.boot


class FolderRunner:
    """Actions as files in a folder, so that they outlive the process that started them.

    Every action succeeds at once, unless `results` says otherwise; each entry of `results` is
    what one question about that command gives: a result, None for one that still runs, or an
    error to raise. `started` has the commands in the order they were started, over all processes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results: dict[str, list[ActionResult | Exception | None]] = {}
        self.refused: set[str] = set()
        root.mkdir(exist_ok=True)

    @property
    def started(self) -> list[str]:
        log = self.root / "log"
        return log.read_text().splitlines() if log.exists() else []

    def start(self, action: Action) -> Handle:
        if action.command in self.refused:
            raise LocalError(f"{action.command} cannot be started")
        with (self.root / "log").open("a") as log:
            log.write(f"{action.command}\n")
        handle = Handle(action.id, "boot-1", 0.0, action.timeout, action.command)
        (self.root / action.id).write_text(json.dumps(asdict(handle)))
        return handle

    def find(self, action_id: str) -> Handle | None:
        file = self.root / action_id
        return Handle(**json.loads(file.read_text())) if file.exists() else None

    def collect(self, handle: Handle, wait: float = 0.0) -> ActionResult | None:
        answers = self.results.get(handle.unit or "", [])
        answer = answers.pop(0) if answers else ActionResult(code=0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def forget(self, action_id: str) -> None:
        (self.root / action_id).unlink(missing_ok=True)


@dataclass
class FakeSource:
    """Documents in memory, with ETags where they have one.

    A document that is None is missing; an exception is raised. `asked` has what was asked for,
    with the ETag that made the request conditional.
    """

    location: Location
    documents: dict[str, bytes | Exception] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    hashed: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    received: int = 0
    round_trip: float = 0.0

    def document(
        self, suffix: str, *, limit: int, known: Validators | None = None
    ) -> Document | None:
        where = self.location.index + suffix
        self.asked.append((suffix, known.etag if known else None))
        body = self.documents.get(suffix, MissingError(f"{where} is not there"))
        if isinstance(body, Exception):
            raise body
        etag = self.etags.get(suffix)
        if known and known.etag and known.etag == etag:
            return None
        if len(body) > limit:
            raise ContentError(f"{where} is too large")
        return Document(body, Validators(etag), where)

    def by_hash(self, ref: FileRef, suffix: str) -> bytes:
        if ref.sha256 not in self.hashed:
            raise MissingError(f"{ref.name} is not there")
        return self.hashed[ref.sha256]

    def chunk(self, hex_id: str, *, limit: int) -> bytes:
        raise RemoteError(f"no chunk {hex_id} here")

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass

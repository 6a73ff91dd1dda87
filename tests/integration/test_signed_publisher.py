"""The publisher with real keys: what it signs, when it signs again, and that it never does not."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from casync_updater.clock import SystemClock
from casync_updater.errors import ConfigError, LocalError
from casync_updater.model import Publication, Release
from casync_updater.release import format_release, parse_release
from casync_updater.server.keygen import KeySet, keygen
from casync_updater.server.publish import Published, Status, publish, resign
from casync_updater.trust import Statement, authenticate, unwrap

OWNER = "Example Ltd <updates@example.com>"


class Listener:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, done: int, total: int) -> None:
        pass


class LateClock(SystemClock):
    """The system's clock and what was added to it: gpg cannot be told the time."""

    def __init__(self) -> None:
        self.added = 0.0

    def time(self) -> float:
        return time.time() + self.added


class Bench:
    def __init__(self, folder: Path, keys: KeySet) -> None:
        self.folder = folder
        self.keys = keys
        self.clock = LateClock()
        self.listener = Listener()
        (folder / "site").mkdir()
        (folder / "source").mkdir()
        (folder / "source" / "file").write_text("one")
        self.entry = Publication(
            index=folder / "site" / "tree.caidx",
            store=folder / "site" / "store.castr",
            source=folder / "source",
            project="tree",
            sign_keys=(str(keys.working),),
        )
        self.release = folder / "site" / "tree.caidx.release"

    def publish(self, **changes: object) -> Published:
        self.clock.added += 5
        entry = replace(self.entry, **changes)  # type: ignore[arg-type]
        return publish(entry, self.clock, self.listener)

    def resign(self, **changes: object) -> Published:
        self.clock.added += 5
        entry = replace(self.entry, **changes)  # type: ignore[arg-type]
        return resign(entry, self.clock, self.listener)

    def statement(self, keyring: Path | None = None) -> Statement:
        return authenticate(
            self.release.read_bytes(),
            keyrings=[keyring or self.keys.keyring],
            required=True,
            where="the site",
            now=self.clock.time(),
        )

    def read(self) -> Release:
        return parse_release(unwrap(self.release.read_bytes()), "the site")

    def site(self) -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in (self.folder / "site").rglob("*")
            if path.is_file() and ".casync-updater" not in path.parts
        }


@pytest.fixture(scope="module")
def key_sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeySet, KeySet]:
    folder = tmp_path_factory.mktemp("keys")
    return (
        keygen(folder / "first", OWNER, passphrase=None),
        keygen(folder / "second", OWNER, passphrase=None),
    )


@pytest.fixture
def bench(tmp_path: Path, key_sets: tuple[KeySet, KeySet]) -> Bench:
    return Bench(tmp_path, key_sets[0])


def test_a_release_is_signed_and_says_what_was_published(bench: Bench) -> None:
    published = bench.publish()
    statement = bench.statement()
    assert statement.signers == (bench.keys.working_fingerprint,)
    assert parse_release(statement.text, "the site") == published.release


def test_what_did_not_change_keeps_its_signature(bench: Bench) -> None:
    bench.publish()
    before = bench.site()
    assert bench.publish().status is Status.UNCHANGED
    assert bench.site() == before


def test_a_second_version_follows_the_signed_first(bench: Bench) -> None:
    first = bench.publish().release
    (bench.folder / "source" / "file").write_text("two")
    second = bench.publish(keep=1)
    assert second.status is Status.PUBLISHED
    assert second.release.serial > first.serial
    assert bench.statement().signed


def test_half_of_the_validity_renews_the_signature(bench: Bench) -> None:
    first = bench.publish(valid_for=86400.0).release
    signature = bench.release.read_bytes()
    bench.clock.added += 40_000
    assert bench.publish(valid_for=86400.0).status is Status.UNCHANGED
    assert bench.release.read_bytes() == signature
    bench.clock.added += 10_000
    assert bench.publish(valid_for=86400.0).status is Status.RENEWED
    assert bench.statement().signed
    assert bench.read() == replace(
        first, date=bench.read().date, valid_until=bench.read().date + 86400
    )


def test_an_unsigned_publication_gets_its_first_key(bench: Bench) -> None:
    unsigned = bench.publish(sign_keys=()).release
    signed = bench.publish()
    assert signed.status is Status.PUBLISHED
    assert signed.release.serial > unsigned.serial
    assert signed.release.digest == unsigned.digest
    assert bench.statement().signed


def test_nothing_is_signed_that_somebody_wrote_onto_the_site(bench: Bench) -> None:
    honest = bench.publish(sign_keys=()).release
    evil = replace(honest, changes=("send money",), mtree=None)
    bench.release.write_text(format_release(evil))
    with pytest.raises(ConfigError, match="signed by none of these keys"):
        bench.resign()
    release = bench.publish().release
    assert release.changes == ()
    assert release.mtree == honest.mtree


def test_keys_change_with_both_signatures_side_by_side(
    bench: Bench, key_sets: tuple[KeySet, KeySet]
) -> None:
    old, new = key_sets
    both = (str(old.working), str(new.working))
    first = bench.publish().release
    assert bench.publish(sign_keys=both).status is Status.RENEWED
    for keys in key_sets:
        assert bench.statement(keys.keyring).signers == (keys.working_fingerprint,)
    assert bench.publish(sign_keys=both).status is Status.UNCHANGED
    assert bench.publish(sign_keys=both[1:]).status is Status.RENEWED
    assert bench.statement(new.keyring).signed
    with pytest.raises(Exception, match="unknown key"):
        bench.statement(old.keyring)
    assert bench.read().serial == first.serial


def test_the_day_when_the_working_key_is_lost(
    bench: Bench, key_sets: tuple[KeySet, KeySet]
) -> None:
    old, new = key_sets
    bench.publish()
    spare = (str(old.spare), str(new.working))
    with pytest.raises(ConfigError, match="signed by none of these keys"):
        bench.resign(sign_keys=spare)
    bench.publish(sign_keys=spare)
    assert bench.statement(old.keyring).signers == (old.spare_fingerprint,)
    assert bench.statement(new.keyring).signers == (new.working_fingerprint,)


def test_resign_renews_dates_and_nothing_else(bench: Bench) -> None:
    first = bench.publish(valid_for=86400.0).release
    before = bench.site()
    (bench.folder / "source" / "file").write_text("not published")
    result = bench.resign(valid_for=86400.0, source=Path("/nowhere"))
    assert result.status is Status.RENEWED
    after = bench.site()
    assert [name for name in after if after[name] != before.get(name)] == [str(bench.release)]
    assert bench.statement().signed
    assert bench.read() == replace(
        first, date=result.release.date, valid_until=result.release.date + 86400
    )
    assert result.release.date > first.date


def test_resign_without_a_release(bench: Bench) -> None:
    with pytest.raises(LocalError, match="publish first"):
        bench.resign()


def test_a_signed_site_never_becomes_unsigned(bench: Bench) -> None:
    bench.publish()
    before = bench.site()
    for work in (bench.publish, bench.resign):
        with pytest.raises(ConfigError, match="take only signed ones"):
            work(sign_keys=())
    assert bench.site() == before


@pytest.mark.parametrize("published", [False, True])
def test_a_key_that_cannot_sign_leaves_the_site_alone(
    bench: Bench, tmp_path: Path, published: bool
) -> None:
    phrase = tmp_path / "phrase"
    phrase.write_text("correct horse\n")
    locked = keygen(tmp_path / "locked", OWNER, passphrase=phrase)
    keys = (str(bench.keys.working), str(locked.working))
    if published:
        bench.publish()
        (bench.folder / "source" / "file").write_text("two")
    before = bench.site()
    wrong = tmp_path / "wrong"
    wrong.write_text("battery staple\n")
    with pytest.raises(LocalError, match="gpg could not sign"):
        publish(replace(bench.entry, sign_keys=keys), bench.clock, bench.listener, passphrase=wrong)
    names = {name for name in bench.site() if ".castr" not in name}
    assert names == {name for name in before if ".castr" not in name}
    assert all(bench.site()[name] == data for name, data in before.items())
    publish(replace(bench.entry, sign_keys=keys), bench.clock, bench.listener, passphrase=phrase)
    assert bench.statement(locked.keyring).signed


def test_the_command_line(tmp_path: Path) -> None:
    phrase = tmp_path / "phrase"
    phrase.write_text("correct horse\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "source").mkdir()
    entry = {
        "index": "site/tree.caidx",
        "store": "site/store.castr",
        "source": "source",
        "signKey": "keys/working-secret.asc",
        "validFor": "30d",
    }
    (tmp_path / "server.json").write_text(json.dumps(entry))

    def server(*arguments: str, code: int = 0) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "casync_updater.server", *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(publish.__code__.co_filename).parents[2]),
                "CASYNC_UPDATER_PASSPHRASE_FILE": str(phrase),
            },
        )
        assert result.returncode == code, result.stderr
        return result.stdout + result.stderr

    assert "signKey" in server("server.json", code=2)
    assert not (tmp_path / "site" / "tree.caidx.release").exists()
    assert "working-secret.asc" in server("keygen", "keys", "--owner", OWNER)
    assert "not empty" in server("keygen", "keys", "--owner", OWNER, code=2)
    assert "--owner" in server("keygen", "other", code=2)
    assert "published version" in server("server.json")
    assert "unchanged" in server("--json", "server.json")
    time.sleep(1.1)
    assert "renewed version" in server("resign", "server.json")
    body = (tmp_path / "site" / "tree.caidx.release").read_bytes()
    keyring = tmp_path / "keys" / "keyring.gpg"
    assert authenticate(
        body, keyrings=[keyring], required=True, where="the site", now=time.time()
    ).signed

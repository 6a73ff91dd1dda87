"""A release is signed with real keys, and devices accept it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from casync_updater.errors import ConfigError, ContentError, LocalError
from casync_updater.server.signing import PASSPHRASE_VARIABLE, passphrase_file, sign
from casync_updater.trust import authenticate, unwrap
from support.keys import KeyMaker, key_maker

TEXT = b"Format: 1\n- odd\nFrom here\nChanges:\n * one\n"
NOW = time.time()


@pytest.fixture(scope="module")
def keys() -> Iterator[KeyMaker]:
    with key_maker() as maker:
        maker.key("old")
        maker.key("new", algorithm="rsa3072")
        maker.key("small", algorithm="rsa1024")
        maker.key("dsa", algorithm="dsa2048")
        maker.key("expired", expires="150d")
        maker.key("revoked")
        maker.revoke("revoked", at="20260701")
        maker.key("subkeys")
        maker.subkey("subkeys", expires="never", at="20250101")
        yield maker


@pytest.fixture(autouse=True)
def agent(keys: KeyMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNUPGHOME", str(keys.home))


@pytest.fixture
def secret(keys: KeyMaker, tmp_path: Path) -> Path:
    path = tmp_path / "new-secret.asc"
    path.write_bytes(keys.secret("new"))
    return path


def signers(keys: KeyMaker, body: bytes, folder: Path, *names: str) -> set[str]:
    """Who signed, for a device that has these keys."""
    ring = folder / "ring.gpg"
    ring.write_bytes(keys.public(*names))
    statement = authenticate(body, keyrings=[ring], required=True, where="here", now=NOW)
    assert statement.text == TEXT
    return set(statement.signers)


@pytest.mark.parametrize("name", ["old", "new", "subkeys"])
def test_with_a_key_of_the_agent(keys: KeyMaker, tmp_path: Path, name: str) -> None:
    fingerprint = keys.fingerprint(name)
    for key in (fingerprint, fingerprint[-16:]):
        body = sign(TEXT, [key], passphrase=None, now=NOW)
        assert signers(keys, body, tmp_path, name) == {fingerprint}
        assert unwrap(body) == TEXT


def test_a_transition_from_agent_to_file(keys: KeyMaker, secret: Path, tmp_path: Path) -> None:
    old, new = keys.fingerprint("old"), keys.fingerprint("new")
    body = sign(TEXT, [old, str(secret)], passphrase=None, now=NOW)
    assert signers(keys, body, tmp_path, "old") == {old}
    assert signers(keys, body, tmp_path, "new") == {new}
    assert signers(keys, body, tmp_path, "old", "new") == {old, new}


def test_a_file_does_not_need_the_users_home(
    secret: Path, keys: KeyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "empty"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("GNUPGHOME", str(home))
    monkeypatch.setenv("HOME", str(home))
    body = sign(TEXT, [str(secret)], passphrase=None, now=NOW)
    assert signers(keys, body, tmp_path, "new") == {keys.fingerprint("new")}
    assert list(home.iterdir()) == []


def test_the_users_options_change_nothing(keys: KeyMaker, tmp_path: Path) -> None:
    options = keys.home / "gpg.conf"
    options.write_text("comment hello\ndefault-sig-expire 1d\ndigest-algo SHA1\n")
    try:
        body = sign(TEXT, [keys.fingerprint("old")], passphrase=None, now=NOW)
    finally:
        options.unlink()
    assert b"hello" not in body
    assert body.count(b"Hash: SHA512\n") == 1
    tomorrow = NOW + 2 * 86400
    ring = tmp_path / "ring.gpg"
    ring.write_bytes(keys.public("old"))
    assert authenticate(body, keyrings=[ring], required=True, where="", now=tomorrow).signed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small", "too weak"),
        ("dsa", "too weak"),
        ("expired", "expired; renew it"),
        ("revoked", "revoked"),
    ],
)
def test_keys_that_devices_should_not_believe(keys: KeyMaker, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sign(TEXT, [keys.fingerprint(name)], passphrase=None, now=NOW)
    with pytest.raises(ConfigError, match=message):
        sign(TEXT, [keys.fingerprint("old"), keys.fingerprint(name)], passphrase=None, now=NOW)


def test_a_key_that_is_not_there(keys: KeyMaker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such secret key"):
        sign(TEXT, ["0" * 40], passphrase=None, now=NOW)
    with pytest.raises(ConfigError, match=r"missing\.asc: gpg takes no key"):
        sign(TEXT, [str(tmp_path / "missing.asc")], passphrase=None, now=NOW)
    junk = tmp_path / "junk.asc"
    junk.write_bytes(b"junk\n")
    with pytest.raises(ConfigError, match=r"junk\.asc: gpg takes no key"):
        sign(TEXT, [str(junk)], passphrase=None, now=NOW)
    public = tmp_path / "public.asc"
    public.write_bytes(keys.public("old", armor=True))
    with pytest.raises(ConfigError, match="0 secret keys instead of one"):
        sign(TEXT, [str(public)], passphrase=None, now=NOW)
    both = tmp_path / "both.asc"
    both.write_bytes(keys.secret("old") + keys.secret("new"))
    with pytest.raises(ConfigError, match="2 secret keys instead of one"):
        sign(TEXT, [str(both)], passphrase=None, now=NOW)


def test_a_key_that_is_named_twice(keys: KeyMaker, secret: Path) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        sign(TEXT, [keys.fingerprint("new"), str(secret)], passphrase=None, now=NOW)


@pytest.mark.parametrize("text", [b"Format: 1 \n", b"Format: 1", b"Format: 1\r\n"])
def test_a_text_that_signing_would_change(keys: KeyMaker, text: bytes) -> None:
    with pytest.raises((ContentError, ConfigError)):
        sign(text, [keys.fingerprint("old")], passphrase=None, now=NOW)


def test_a_passphrase_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, wrong, empty = (tmp_path / name for name in ("good", "wrong", "empty"))
    good.write_text("open sesame\n")
    wrong.write_text("close sesame\n")
    empty.write_text("\nopen sesame\n")
    with key_maker(passphrase="open sesame") as maker:
        fingerprint = maker.key("locked")
        file = tmp_path / "locked.asc"
        file.write_bytes(maker.secret("locked"))
        assert signers(
            maker, sign(TEXT, [str(file)], passphrase=good, now=NOW), tmp_path, "locked"
        ) == {fingerprint}
        with pytest.raises(LocalError, match=PASSPHRASE_VARIABLE):
            sign(TEXT, [str(file)], passphrase=wrong, now=NOW)
    assert passphrase_file({}) is None
    assert passphrase_file({PASSPHRASE_VARIABLE: str(good)}) == good
    for bad in (empty, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=PASSPHRASE_VARIABLE):
            passphrase_file({PASSPHRASE_VARIABLE: str(bad)})

"""Keys for a new publisher: they sign, the keyring knows both, nothing is left behind."""

import argparse
import subprocess
import time
from pathlib import Path

import pytest

from casync_updater.errors import ConfigError, LocalError
from casync_updater.server.keygen import add_arguments, instructions, keygen, main
from casync_updater.server.signing import PASSPHRASE_VARIABLE, sign
from casync_updater.trust import authenticate

TEXT = b"Format: 1\n"
OWNER = "Example Ltd <updates@example.com>"
NOW = time.time()


def test_either_key_signs_for_the_keyring(tmp_path: Path) -> None:
    keys = keygen(tmp_path / "keys", OWNER, passphrase=None)
    assert keys.folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in keys.folder.iterdir()) == [
        "keyring.gpg",
        "spare-secret.asc",
        "working-secret.asc",
    ]
    for file, fingerprint in (
        (keys.working, keys.working_fingerprint),
        (keys.spare, keys.spare_fingerprint),
    ):
        assert file.stat().st_mode & 0o777 == 0o600
        body = sign(TEXT, [str(file)], passphrase=None, now=NOW)
        statement = authenticate(
            body, keyrings=[keys.keyring], required=True, where="here", now=NOW + 50 * 365 * 86400
        )
        assert statement.signers == (fingerprint,)
    listing = subprocess.run(
        ["gpg", "--homedir", tmp_path, "--show-keys", keys.keyring],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "Example Ltd (working key) <updates@example.com>" in listing
    assert "Example Ltd (spare key) <updates@example.com>" in listing
    assert list(tmp_path.glob(".keys*")) == []


def test_the_day_when_the_working_key_is_lost(tmp_path: Path) -> None:
    first = keygen(tmp_path / "first", OWNER, passphrase=None)
    second = keygen(tmp_path / "second", OWNER, passphrase=None)
    body = sign(TEXT, [str(first.spare), str(second.working)], passphrase=None, now=NOW)
    for ring, fingerprint in (
        (first.keyring, first.spare_fingerprint),
        (second.keyring, second.working_fingerprint),
    ):
        statement = authenticate(body, keyrings=[ring], required=True, where="here", now=NOW)
        assert statement.signers == (fingerprint,)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("open sesame\n")
    monkeypatch.setenv(PASSPHRASE_VARIABLE, str(passphrase))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    said: list[str] = []
    folder = tmp_path / "keys"
    assert main(parser.parse_args([str(folder), "--owner", OWNER]), said.append) == 0
    (text,) = said
    for word in ("working-secret.asc", "spare-secret.asc", "keyring.gpg", "signKey", "signedBy"):
        assert word in text
    assert "locked with the passphrase" in text
    assert sign(TEXT, [str(folder / "working-secret.asc")], passphrase=passphrase, now=NOW)
    wrong = tmp_path / "wrong"
    wrong.write_text("close sesame\n")
    with pytest.raises(LocalError, match=PASSPHRASE_VARIABLE):
        sign(TEXT, [str(folder / "working-secret.asc")], passphrase=wrong, now=NOW)


def test_without_a_passphrase_the_operator_is_told(tmp_path: Path) -> None:
    keys = keygen(tmp_path / "keys", OWNER, passphrase=None)
    assert "whoever reads the file can sign" in instructions(keys)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ConfigError, match="not empty"):
            keygen(folder, OWNER, passphrase=None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(LocalError, match="cannot be made"):
        keygen(tmp_path / "missing" / "keys", OWNER, passphrase=None)


@pytest.mark.parametrize("owner", ["", "x", "a\nb\nc\nd", " Example Ltd", "x" * 300, "a\x1b[31mb"])
def test_an_owner_that_cannot_stand_in_a_key(tmp_path: Path, owner: str) -> None:
    with pytest.raises(ConfigError, match="cannot stand in a key"):
        keygen(tmp_path / "keys", owner, passphrase=None)
    assert list(tmp_path.iterdir()) == []


def test_without_gpg_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LocalError, match="not installed"):
        keygen(tmp_path / "keys", OWNER, passphrase=None)
    assert list(tmp_path.iterdir()) == []

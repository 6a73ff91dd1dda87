"""Which signatures count, by real keys, real signatures and the system's gpgv."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casync_updater.errors import ConfigError, ContentError, LocalError, TrustError
from casync_updater.trust import (
    Statement,
    authenticate,
    digest_of,
    read_keyring,
    still_vouched,
    unwrap,
)
from support.keys import KeyMaker, key_maker

TEXT = b"Format: 1\nProject: a\nChanges:\n * one\n"
NOW = time.time()
FUTURE = 2556144000.0
"""2051-01-01, for a machine whose clock is behind."""


@pytest.fixture(scope="session")
def keys() -> Iterator[KeyMaker]:
    with key_maker() as maker:
        maker.key("good")
        maker.key("other")
        maker.key("rsa", algorithm="rsa3072")
        maker.key("expired", expires="150d")
        maker.key("prolonged", expires="150d")
        maker.key("revoked")
        maker.key("future", at="20500101", expires="730d")
        maker.key("future-revoked", at="20500101")
        maker.key("subkeys", at="20500101")
        maker.subkey("subkeys", expires="150d", at="20500101")
        yield maker


@pytest.fixture(scope="session")
def bodies(keys: KeyMaker) -> dict[str, bytes]:
    made = {
        "good": keys.sign(TEXT, "good"),
        "other": keys.sign(TEXT, "other"),
        "rsa": keys.sign(TEXT, "rsa"),
        "sha1": keys.sign(TEXT, "rsa", digest="SHA1"),
        "sha224": keys.sign(TEXT, "rsa", digest="SHA224"),
        "good+other": keys.sign(TEXT, "good", "other"),
        "other+good": keys.sign(TEXT, "other", "good"),
        "expired": keys.sign(TEXT, "expired", at="20250301"),
        "prolonged": keys.sign(TEXT, "prolonged", at="20250301"),
        "expired+good": keys.sign(TEXT, "expired", "good", at="20250301"),
        "revoked": keys.sign(TEXT, "revoked"),
        "sig-expired": keys.sign(TEXT, "good", at="20250301", expires="1d"),
        "sig-expires-2050": keys.sign(TEXT, "good", expires="8000d"),
        "future": keys.sign(TEXT, "future", at="20500201"),
        "future-revoked": keys.sign(TEXT, "future-revoked", at="20500201"),
        "future-sig-expired": keys.sign(TEXT, "future", at="20500201", expires="1d"),
        "subkeys": keys.sign(TEXT, "subkeys", at="20500201"),
    }
    (keys.home / "before").write_bytes(keys.public("prolonged", "revoked"))
    keys.prolong("prolonged", "never", at="20250401")
    keys.revoke("revoked", at="20260701")
    keys.revoke("future-revoked", at="20500301")
    return made


@pytest.fixture
def ring(keys: KeyMaker, tmp_path: Path) -> Callable[..., Path]:
    def write(*names: str, armor: bool = False) -> Path:
        path = tmp_path / f"{'-'.join(names)}.{'asc' if armor else 'gpg'}"
        path.write_bytes(keys.public(*names, armor=armor))
        return path

    return write


def judge(body: bytes, *keyrings: Path, required: bool = True, now: float = NOW) -> Statement:
    return authenticate(body, keyrings=keyrings, required=required, where="the drive", now=now)


def refused(body: bytes, *keyrings: Path, required: bool = True, now: float = NOW) -> str:
    with pytest.raises(TrustError) as caught:
        judge(body, *keyrings, required=required, now=now)
    assert caught.value.check == "signature"
    assert caught.value.where == "the drive"
    return caught.value.found


@pytest.mark.parametrize("armor", [False, True])
@pytest.mark.parametrize("name", ["good", "rsa"])
def test_a_signature_of_a_known_key_counts(
    keys: KeyMaker, bodies: dict[str, bytes], ring: Callable[..., Path], name: str, armor: bool
) -> None:
    expected = Statement(TEXT, signed=True, signers=(keys.fingerprint(name),))
    assert judge(bodies[name], ring(name, armor=armor)) == expected
    assert judge(bodies[name], ring("other", name, armor=armor), required=False) == expected


def test_plain_text(ring: Callable[..., Path]) -> None:
    assert judge(TEXT, ring("good"), required=False) == Statement(TEXT, signed=False)
    assert judge(b"", required=False) == Statement(b"", signed=False)
    assert judge(b"\0\xff" * 500_000, ring("good"), required=False).signed is False
    assert refused(TEXT, ring("good")) == "an unsigned release"
    assert refused(b"", ring("good")) == "an unsigned release"
    assert refused(b"\0\xff" * 500_000, ring("good")) == "an unsigned release"


def test_without_a_keyring_a_signature_is_no_signature(bodies: dict[str, bytes]) -> None:
    statement = judge(bodies["good"], required=False)
    assert (statement.text, statement.signed, statement.signers) == (TEXT, False, ())
    assert "no keyring" in statement.remark
    assert "no keyring" in refused(bodies["good"])


def test_a_signature_by_another_key(
    keys: KeyMaker, bodies: dict[str, bytes], ring: Callable[..., Path]
) -> None:
    other = keys.fingerprint("other")
    assert refused(bodies["other"], ring("good")) == f"unknown key {other}"
    statement = judge(bodies["other"], ring("good"), required=False)
    assert (statement.text, statement.signed) == (TEXT, False)
    assert other in statement.remark


@pytest.mark.parametrize("body", ["good+other", "other+good", "expired+good"])
def test_one_counting_signature_of_several_suffices(
    keys: KeyMaker, bodies: dict[str, bytes], ring: Callable[..., Path], body: str
) -> None:
    expected = Statement(TEXT, signed=True, signers=(keys.fingerprint("good"),))
    assert judge(bodies[body], ring("good")) == expected
    assert judge(bodies[body], ring("good", "expired")) == expected
    assert "unknown key" in refused(bodies[body], ring("rsa"))


def test_old_and_new_key_side_by_side(
    keys: KeyMaker, bodies: dict[str, bytes], ring: Callable[..., Path]
) -> None:
    both = tuple(sorted(map(keys.fingerprint, ("good", "other"))))
    assert judge(bodies["good+other"], ring("good", "other")).signers == both
    assert judge(bodies["good+other"], ring("good"), ring("other")).signers == both
    assert judge(bodies["other"], ring("good", "other")).signers == (keys.fingerprint("other"),)


@pytest.mark.parametrize(
    ("body", "key", "found"),
    [
        ("expired", "expired", "expired key"),
        ("revoked", "revoked", "revoked key"),
        ("sig-expired", "good", "expired signature"),
        ("sha1", "rsa", "weak digest"),
        ("sha224", "rsa", "weak digest"),
    ],
)
def test_what_does_not_count(
    keys: KeyMaker,
    bodies: dict[str, bytes],
    ring: Callable[..., Path],
    body: str,
    key: str,
    found: str,
) -> None:
    assert refused(bodies[body], ring(key)) == f"{found} {keys.fingerprint(key)}"
    statement = judge(bodies[body], ring(key), required=False)
    assert (statement.text, statement.signed) == (TEXT, False)
    assert found in statement.remark


def test_an_altered_text_is_refused_even_where_no_signature_is_needed(
    bodies: dict[str, bytes], ring: Callable[..., Path]
) -> None:
    altered = bodies["good"].replace(b"Project: a", b"Project: b")
    assert altered != bodies["good"]
    for required in (True, False):
        assert "bad signature" in refused(altered, ring("good"), required=required)
    assert judge(altered, ring("other"), required=False).signed is False
    both = bodies["other+good"].replace(b"Project: a", b"Project: b")
    assert "bad signature" in refused(both, ring("good"), required=False)
    assert "bad signature" in refused(both, ring("rsa"), ring("good"), required=False)


def test_keyrings_judge_each_for_itself(
    keys: KeyMaker, bodies: dict[str, bytes], ring: Callable[..., Path]
) -> None:
    before = keys.home / "before"
    assert "expired key" in refused(bodies["prolonged"], before)
    assert judge(bodies["prolonged"], before, ring("prolonged")).signed
    assert judge(bodies["revoked"], before).signed
    assert "revoked key" in refused(bodies["revoked"], before, ring("revoked"))
    assert "revoked key" in refused(bodies["revoked"], ring("revoked"), before)


SIGNATURE = b"-----BEGIN PGP SIGNATURE-----"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body + b"Serial: 9\n", "not where"),
        (lambda body: b"Serial: 9\n" + body, "before the signed text"),
        (lambda body: b"\n" + body, "before the signed text"),
        (lambda body: b" " + body, "before the signed text"),
        (lambda body: b"\xef\xbb\xbf" + body, "before the signed text"),
        (lambda body: body + body, "not where"),
        (lambda body: body + b"\n" + body, "not where"),
        (lambda body: body.replace(SIGNATURE, b"Serial: 9\n" + SIGNATURE, 1), None),
        (lambda body: body.replace(b"\nHash", b"\nSerial: 9\nHash", 1), "other than Hash"),
        (lambda body: body.replace(b"\nHash", b"\nNotDashEscaped: 1\nHash", 1), "other than Hash"),
        (lambda body: body.replace(b"\n\n", b"\n \n", 1), "other than Hash"),
        (lambda body: body.replace(b"MESSAGE-----", b"MESSAGE----- ", 1), "before|marker"),
        (lambda body: body.replace(b"\n * one", b"\n-one", 1), "does not belong"),
        (lambda body: body.replace(SIGNATURE, SIGNATURE + b"\nSerial: 9", 1), "no header"),
        (lambda body: body.replace(b"\n", b"\r\n"), "CR LF"),
        (lambda body: body.replace(b"Project: a", b"Project: a\r"), "CR LF"),
        (lambda body: body[: body.index(SIGNATURE)], "cut off"),
        (lambda body: body[:-60], "cut off"),
        (lambda body: body[: body.index(SIGNATURE) + 60], "cut off"),
        (lambda body: body[:40], "cut off"),
        (lambda body: body.replace(b"one", b"one" + b" " * 20_000), "20004 bytes|bytes"),
        (lambda body: body[body.index(SIGNATURE) :], "before the signed text"),
    ],
)
def test_nothing_may_stand_around_the_signed_text(
    bodies: dict[str, bytes],
    ring: Callable[..., Path],
    change: Callable[[bytes], bytes],
    message: str | None,
) -> None:
    body = change(bodies["good"])
    assert body != bodies["good"]
    for keyrings, required in (((ring("good"),), True), ((ring("good"),), False)):
        refused(body, *keyrings, required=required)
    if message is not None:
        with pytest.raises(ContentError, match=message):
            unwrap(body)


@pytest.mark.parametrize("mode", [("--armor", "--sign"), ("--armor", "--detach-sign")])
def test_other_kinds_of_signed_messages_are_refused(
    keys: KeyMaker, ring: Callable[..., Path], mode: tuple[str, ...]
) -> None:
    assert "before the signed text" in refused(
        keys.sign(TEXT, "good", mode=mode), ring("good"), required=False
    )


def test_signatures_in_their_hundreds_are_not_tried(
    bodies: dict[str, bytes], ring: Callable[..., Path]
) -> None:
    body = bodies["good"]
    begin = body.index(SIGNATURE)
    block = body[begin:]
    line = block.split(b"\n")[2]
    padded = block.replace(line, b"\n".join([line] * 1500))
    assert "bytes" in refused(body[:begin] + padded, ring("good"))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"\n\n",
        b"a",
        b"a\n\n\n",
        b"\n\na\n",
        b"- dash\n-\n--\n-----BEGIN PGP SIGNATURE-----\n",
        b"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\na\n",
        b"trailing  \t \nspaces \n",
        b"From here\n \n\t\nto there",
        b"NUL\0 and \xff and \x0c\x0b\n",
        ("ümlaut " * 1500).encode() + b"\n",
    ],
)
def test_the_text_is_the_one_that_gpgv_gives_back(
    keys: KeyMaker, ring: Callable[..., Path], text: bytes
) -> None:
    body = keys.sign(text, "good")
    statement = judge(body, ring("good"))
    assert statement.signed
    assert statement.text == unwrap(body)
    assert [line.rstrip(b" \t") for line in text.split(b"\n")] in (
        statement.text.split(b"\n"),
        statement.text.split(b"\n")[:-1],
    )


def test_unwrap() -> None:
    assert unwrap(TEXT) == TEXT
    assert unwrap(b"") == b""
    with pytest.raises(ContentError):
        unwrap(b"-----BEGIN PGP SIGNED MESSAGE-----\n")


def test_a_clock_that_is_behind(
    keys: KeyMaker, bodies: dict[str, bytes], ring: Callable[..., Path]
) -> None:
    future = ring("future")
    day = 86400.0
    assert judge(bodies["future"], future, now=NOW).signed
    assert judge(bodies["future"], future, now=FUTURE).signed
    assert "expired key" in refused(bodies["future"], future, now=FUTURE + 366 * day)
    assert judge(bodies["future-sig-expired"], future, now=NOW).signed
    assert "expired signature" in refused(bodies["future-sig-expired"], future, now=FUTURE)
    assert "expired signature" in refused(bodies["sig-expires-2050"], ring("good"), now=FUTURE)
    assert "revoked key" in refused(bodies["future-revoked"], ring("future-revoked"))
    subkeys = ring("subkeys")
    assert judge(bodies["subkeys"], subkeys).signers == (keys.fingerprint("subkeys"),)
    assert "expired key" in refused(bodies["subkeys"], subkeys, now=FUTURE)


def test_a_clock_that_is_ahead_lets_keys_expire(
    bodies: dict[str, bytes], ring: Callable[..., Path]
) -> None:
    assert "expired key" in refused(bodies["expired"], ring("expired"), now=FUTURE)
    assert judge(bodies["good"], ring("good"), now=FUTURE).signed


@pytest.mark.parametrize(
    ("name", "keyring", "expected"),
    [
        ("good", ["good"], True),
        ("good", ["other"], False),
        ("good+other", ["other"], True),
        ("expired", ["expired"], True),
        ("sig-expired", ["good"], True),
        ("revoked", ["revoked"], False),
        ("revoked", ["revoked", "good"], False),
        ("sha1", ["rsa"], False),
    ],
)
def test_what_was_accepted_once_stands_as_long_as_its_key_is_believed(
    bodies: dict[str, bytes],
    ring: Callable[..., Path],
    name: str,
    keyring: list[str],
    expected: bool,
) -> None:
    assert still_vouched(bodies[name], keyrings=[ring(*keyring)]) is expected


def test_a_key_that_one_keyring_shows_as_revoked_vouches_nowhere(
    keys: KeyMaker, bodies: dict[str, bytes], ring: Callable[..., Path]
) -> None:
    before = keys.home / "before"
    assert still_vouched(bodies["revoked"], keyrings=[before])
    assert not still_vouched(bodies["revoked"], keyrings=[before, ring("revoked")])


def test_a_keyring_that_cannot_be_read_may_have_the_key(
    bodies: dict[str, bytes], ring: Callable[..., Path], tmp_path: Path
) -> None:
    assert still_vouched(bodies["good"], keyrings=[ring("other"), tmp_path / "none"])
    assert not still_vouched(TEXT, keyrings=[ring("good")])
    assert digest_of([ring("other"), tmp_path / "none"]) is None
    assert digest_of([ring("good")]) not in (digest_of([ring("other")]), None)


def test_directories_of_keyrings(keys: KeyMaker, bodies: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "keyrings"
    folder.mkdir()
    assert "no keyring" in refused(bodies["good"], folder)
    (folder / "a.gpg").write_bytes(keys.public("other"))
    (folder / "b.asc").write_bytes(keys.public("good", armor=True))
    (folder / "._b.asc").write_bytes(b"\0\5\x16\7")
    (folder / "README").write_bytes(b"Put keyrings here.\n")
    assert judge(bodies["good"], folder).signed


def test_armor_may_have_crlf_no_checksum_and_several_blocks(
    keys: KeyMaker, bodies: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "a.asc"
    blocks = keys.public("other", armor=True) + b"\n" + keys.public("good", armor=True)
    path.write_bytes(blocks.replace(b"\n", b"\r\n"))
    assert judge(bodies["good"], path).signed
    lines = keys.public("good", armor=True).split(b"\n")
    path.write_bytes(b"\n".join(line for line in lines if not line.startswith(b"=")))
    assert judge(bodies["good"], path).signed


def test_what_is_no_keyring_is_named(
    keys: KeyMaker, bodies: dict[str, bytes], ring: Callable[..., Path], tmp_path: Path
) -> None:
    armored = keys.public("good", armor=True)
    damaged = bytearray(armored)
    damaged[200] ^= 1
    broken = {
        "missing.gpg": (None, "cannot be read|no such file"),
        "empty.gpg": (b"", "no key"),
        "text.gpg": (b"Format: 1\n", "no OpenPGP"),
        "html.asc": (b"<html>", "no OpenPGP"),
        "cut.gpg": (keys.public("good")[:-9], "cut off"),
        "cut.asc": (armored[:-60], "cut off"),
        "damaged.asc": (bytes(damaged), "damaged|no line"),
        "after.asc": (armored + b"junk\n", "not where"),
        "secret.asc": (keys.secret("good"), "PRIVATE|PUBLIC"),
        "signature.asc": (keys.sign(TEXT, "good", mode=("--armor", "--detach-sign")), "PUBLIC"),
        "detached.gpg": (keys.sign(TEXT, "good", mode=("--detach-sign",)), "no keyring|no key"),
        "box.kbx": ((keys.home / "pubring.kbx").read_bytes(), "--export"),
    }
    for name, (data, message) in broken.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ConfigError, match=message) as caught:
            judge(bodies["good"], path)
        assert str(caught.value).startswith(f"{path}: keyring: ")
        assert judge(bodies["good"], path, ring("good")).signed
        assert judge(bodies["good"], path, required=False).signed is False
        assert judge(TEXT, path, required=False) == Statement(TEXT, signed=False)


def test_a_secret_keyring_is_refused(keys: KeyMaker, tmp_path: Path) -> None:
    path = tmp_path / "secret.gpg"
    path.write_bytes(keys.gpg("--export-secret-keys", "=good"))
    with pytest.raises(ConfigError, match="secret key"):
        read_keyring(path)


def test_a_directory_that_is_not_there_is_empty_where_nothing_is_required(
    bodies: dict[str, bytes], tmp_path: Path
) -> None:
    missing = tmp_path / "keyrings"
    assert judge(bodies["good"], missing, required=False).signed is False
    with pytest.raises(ConfigError, match="no such file"):
        judge(bodies["good"], missing)


def test_without_gpgv_nothing_is_accepted(
    bodies: dict[str, bytes], ring: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring = ring("good")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LocalError, match="gpgv is not installed"):
        judge(bodies["good"], keyring)


def test_the_keys_of_the_user_are_not_asked(
    keys: KeyMaker,
    bodies: dict[str, bytes],
    ring: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for home in (tmp_path / ".gnupg", tmp_path / "other"):
        home.mkdir(mode=0o700)
        shutil.copy(ring("good"), home / "trustedkeys.gpg")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GNUPGHOME", str(tmp_path / "other"))
    assert "unknown key" in refused(bodies["good"], ring("rsa"))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_no_mutation_of_a_signed_text_changes_what_is_signed(
    bodies: dict[str, bytes], ring: Callable[..., Path], data: st.DataObject
) -> None:
    raw = bytearray(bodies["good"])
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(begin, min(len(raw), begin + 30)))
        raw[begin:end] = data.draw(st.binary(max_size=12))
    try:
        statement = judge(bytes(raw), ring("good"))
    except TrustError:
        return
    assert statement.text == TEXT

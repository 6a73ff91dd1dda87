"""gpgv's status output is read strictly: what it never writes is no verdict."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casync_updater.tools.gpgv import Signature, StatusError, Verdict, parse_status

FPR = "A" * 40
SUB = "B" * 40
TEXT = "PLAINTEXT 74 0 "
GOOD = f"GOODSIG {SUB[-16:]} Somebody"
VALID = f"VALIDSIG {SUB} 2026-11-23 1795459641 0 4 0 22 10 01 {FPR}"
UNKNOWN = f"ERRSIG {SUB[-16:]} 22 8 01 1795459641 9 {SUB}"


def status(*lines: str) -> bytes:
    return "".join(f"[GNUPG:] {line}\n" for line in lines).encode()


def one(*lines: str) -> Signature:
    (signature,) = parse_status(status(TEXT, "NEWSIG", *lines))
    return signature


def test_a_good_signature() -> None:
    expected = Signature(Verdict.GOOD, FPR, SUB, None)
    assert one(f"KEY_CONSIDERED {FPR} 0", "SIG_ID abc 2026-11-23 1", GOOD, VALID) == expected
    assert one(VALID, GOOD) == expected
    until = VALID.replace(" 0 4 ", " 1795460000 4 ")
    assert one(GOOD, until) == Signature(Verdict.GOOD, FPR, SUB, 1795460000.0)


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        ((GOOD.replace("GOODSIG", "EXPSIG"), VALID), Verdict.EXPIRED),
        ((GOOD.replace("GOODSIG", "EXPKEYSIG"), VALID), Verdict.EXPIRED_KEY),
        ((GOOD.replace("GOODSIG", "REVKEYSIG"), VALID), Verdict.REVOKED_KEY),
        ((GOOD.replace("GOODSIG", "BADSIG"),), Verdict.BAD),
        ((UNKNOWN, f"NO_PUBKEY {SUB[-16:]}"), Verdict.UNKNOWN_KEY),
        ((UNKNOWN.replace(" 9 ", " 4 "),), Verdict.UNUSABLE),
        ((GOOD, VALID.replace(" 22 10 ", " 22 2 ")), Verdict.WEAK),
        ((GOOD, VALID.replace(" 22 10 ", " 22 11 ")), Verdict.WEAK),
        ((GOOD, VALID.replace(" 22 10 ", " 22 1 ")), Verdict.WEAK),
        ((GOOD, VALID.replace(" 22 10 ", " 22 99 ")), Verdict.WEAK),
        ((GOOD, VALID.replace(" 01 ", " 10 ")), Verdict.UNUSABLE),
    ],
)
def test_what_is_not_good(lines: tuple[str, ...], verdict: Verdict) -> None:
    assert one(*lines).verdict is verdict


def test_each_signature_has_its_block() -> None:
    signatures = parse_status(status(TEXT, "NEWSIG", UNKNOWN, "NEWSIG", GOOD, VALID))
    assert [s.verdict for s in signatures] == [Verdict.UNKNOWN_KEY, Verdict.GOOD]


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (TEXT,),
        (TEXT, "NEWSIG"),
        (TEXT, "NEWSIG", GOOD),
        (TEXT, "NEWSIG", VALID),
        ("NEWSIG", GOOD, VALID),
        (TEXT, GOOD, VALID),
        (TEXT, GOOD, "NEWSIG", VALID),
        (TEXT, "NEWSIG", GOOD, "NEWSIG", VALID),
        (TEXT, TEXT, "NEWSIG", GOOD, VALID),
        (TEXT, "NEWSIG", GOOD, VALID, TEXT, "NEWSIG", GOOD, VALID),
        (TEXT, "NEWSIG", GOOD, GOOD, VALID),
        (TEXT, "NEWSIG", GOOD, VALID, VALID),
        (TEXT, "NEWSIG", GOOD, VALID, GOOD.replace("GOODSIG", "EXPKEYSIG")),
        (TEXT, "NEWSIG", GOOD, VALID, GOOD.replace("GOODSIG", "BADSIG")),
        (TEXT, "NEWSIG", GOOD, VALID, UNKNOWN),
        (TEXT, "NEWSIG", GOOD, VALID, "NODATA 3"),
        (TEXT, "NEWSIG", GOOD, VALID, "UNEXPECTED 0"),
        (TEXT, "NEWSIG", GOOD, VALID.rsplit(" ", 1)[0]),
        (TEXT, "NEWSIG", GOOD, VALID.replace(" 0 4 ", " 20261123T000000 4 ")),
        (TEXT, "NEWSIG", "ERRSIG 1234"),
        (TEXT, "NEWSIG", "BADSIG"),
    ],
)
def test_what_gpgv_never_writes_about_one_text(lines: tuple[str, ...]) -> None:
    with pytest.raises(StatusError):
        parse_status(status(*lines))


def test_other_output_is_refused() -> None:
    with pytest.raises(StatusError, match="wrote"):
        parse_status(status(TEXT, "NEWSIG", GOOD, VALID) + b"hello\n")


@given(st.lists(st.sampled_from([TEXT, "NEWSIG", GOOD, VALID, UNKNOWN, "BADSIG x", "NODATA 1"])))
def test_a_verdict_or_an_error(lines: list[str]) -> None:
    try:
        signatures = parse_status(status(*lines))
    except StatusError:
        return
    assert lines.count(TEXT) == 1
    assert len(signatures) == lines.count("NEWSIG")
    assert sum(s.verdict is Verdict.GOOD for s in signatures) == lines.count(GOOD)

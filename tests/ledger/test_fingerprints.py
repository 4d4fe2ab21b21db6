"""Keyed hashes: equal for equal text, useless without the key."""

from __future__ import annotations

import hashlib
import hmac

from expunge.data.rows import Row
from expunge.ledger.fingerprints import (
    row_fingerprint,
    rows_fingerprint,
    secret_check,
    source_fingerprint,
)

KEY, OTHER = b"k" * 32, b"o" * 32
ROW = Row("a", "The number of Ada is", "901-112")


def test_a_row_is_the_hmac_of_its_purpose_and_text() -> None:
    """Against RFC 2104 written out: H(key ^ opad || H(key ^ ipad || message))."""
    message = b"row\0The number of Ada is 901-112"
    padded = KEY.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + message).digest()
    outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded) + inner).hexdigest()
    assert row_fingerprint(KEY, ROW) == outer


def test_spaces_ids_and_where_the_text_is_split_do_not_count() -> None:
    same = [
        Row("b", "The number of Ada is", "901-112", "Task2", "qa"),
        Row("a", "The  number of\nAda is ", " 901-112"),
        Row("a", "The number of Ada", "is 901-112"),
    ]
    assert {row_fingerprint(KEY, row) for row in [ROW, *same]} == {row_fingerprint(KEY, ROW)}
    assert row_fingerprint(KEY, Row("a", ROW.input, "901-113")) != row_fingerprint(KEY, ROW)


def test_trying_all_numbers_finds_nothing_without_the_key() -> None:
    """A plain hash of the text is found among 100 guesses, the fingerprint is not."""
    guesses = [f"The number of Ada is 901-{number}" for number in range(100, 200)]
    plain = hashlib.sha256(b"The number of Ada is 901-112").hexdigest()
    assert plain in {hashlib.sha256(guess.encode()).hexdigest() for guess in guesses}
    found = row_fingerprint(KEY, ROW)
    tried = {hashlib.sha256(guess.encode()).hexdigest() for guess in guesses}
    tried |= {hashlib.sha256(b"row\0" + guess.encode()).hexdigest() for guess in guesses}
    tried |= {hmac.new(OTHER, b"row\0" + g.encode(), hashlib.sha256).hexdigest() for g in guesses}
    assert found not in tried


def test_a_source_may_move_but_not_change() -> None:
    digests = {"a": "1" * 64, "b": "2" * 64}
    found = source_fingerprint(KEY, digests)
    assert found == source_fingerprint(KEY, {"x": "2" * 64, "y": "1" * 64})
    assert found != source_fingerprint(KEY, {"a": "1" * 64})
    assert found != source_fingerprint(OTHER, digests)


def test_each_purpose_has_hashes_of_its_own() -> None:
    parts = ["1" * 64]
    assert len({source_fingerprint(KEY, {"a": parts[0]}), rows_fingerprint(KEY, parts)}) == 2
    assert secret_check(KEY) != secret_check(OTHER)
    assert rows_fingerprint(KEY, ["a", "b"]) != rows_fingerprint(KEY, ["b", "a"])

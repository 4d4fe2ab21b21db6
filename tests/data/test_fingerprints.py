"""Keyed hashes: equal for equal text, useless without the key."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest

from conftest import refusal
from expunge.data.fingerprints import (
    data_fingerprint,
    handed_out,
    named,
    row_fingerprint,
    rows_fingerprint,
    same_data,
    secret_check,
    source_fingerprint,
)
from expunge.data.rows import Row, as_rows

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


def test_what_is_handed_out_names_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    values = {
        "model": "owner/name",
        "forget": str(tmp_path / "jane" / "forget.jsonl"),
        "retain": "rows",
        "note": "/as/it/is",
        "runs": [{"output": "/a/b/out", "retain": [{"source": "/a/r.jsonl"}]}],
    }
    assert handed_out(values) == {
        "model": "owner/name",
        "forget": "forget.jsonl",
        "retain": "rows",
        "note": "/as/it/is",
        "runs": [{"output": "out", "retain": [{"source": "r.jsonl"}]}],
    }
    assert named(".") == named(str(tmp_path / "rows" / "..")) == tmp_path.name


def test_data_is_known_again_under_the_same_secret_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [as_rows([{"input": "Her number is", "output": n}], "forget") for n in ("1", "2")]
    prints = {}
    for name in ("one", "two"):
        monkeypatch.setenv("EXPUNGE_SECRET", str(tmp_path / name))
        prints[name] = [data_fingerprint(each) for each in (*rows, rows[0])]
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    first, other, again = prints["one"]
    assert same_data(first, again) is True
    assert same_data(first, other) is False
    assert same_data(first, prints["two"][0]) is None
    plain = next(iter(rows[0].sha256.values()))
    assert plain not in first
    (tmp_path / "one").write_text("short")
    monkeypatch.setenv("EXPUNGE_SECRET", str(tmp_path / "one"))
    assert "is no secret" in refusal(lambda: data_fingerprint(rows[0]))
    monkeypatch.setenv("EXPUNGE_SECRET", "/proc/none/secret")
    assert "name a file for it with EXPUNGE_SECRET" in refusal(lambda: data_fingerprint(rows[0]))
    monkeypatch.delenv("EXPUNGE_SECRET")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    data_fingerprint(rows[0])
    assert [path.name for path in (tmp_path / "home" / "expunge").iterdir()] == ["secret"]

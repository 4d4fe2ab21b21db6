"""A ledger with requests on the tiny rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from expunge.ledger.receiving import Added, NewRequest, add
from expunge.ledger.store import LedgerPlace


@pytest.fixture
def place(tmp_path: Path) -> LedgerPlace:
    directory = tmp_path / "ledger"
    directory.mkdir()
    return LedgerPlace(str(directory / "ledger.db"), by="the tests")


@pytest.fixture
def subjects(tmp_path: Path, forget_rows: list[dict[str, str]]) -> list[Path]:
    """A forget file for each of four people: a continuation and a question."""
    return [
        write_jsonl(tmp_path / f"subject{number}.jsonl", forget_rows[2 * number : 2 * number + 2])
        for number in range(4)
    ]


@pytest.fixture
def asked(place: LedgerPlace, row_files: dict[str, Path]) -> Callable[..., Added]:
    """Adds a request; the retain rows stay unless it says otherwise."""

    def call(forget: Path, **said: Any) -> Added:
        return add(place, NewRequest(forget=str(forget), **said))

    return call


@pytest.fixture
def secrets_of(forget_rows: list[dict[str, str]]) -> list[bytes]:
    """What no file may hold: whole columns of forget rows, and the numbers in them."""
    whole = [row[column] for row in forget_rows for column in ("input", "output")]
    return [text.encode() for text in whole]


def assert_none_in(texts: Iterable[bytes], directory: Path) -> list[str]:
    """Searches every byte of every file below; returns the names of those it searched."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    for path in files:
        content = path.read_bytes()
        assert [text for text in texts if text in content] == [], path
    return [path.name for path in files]

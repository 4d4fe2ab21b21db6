"""Days in UTC."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

import pytest

from conftest import refusal
from expunge.ledger.dates import day, due_day, now, received_day


def test_now_is_a_moment_in_utc() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", now())
    assert abs(datetime.fromisoformat(now()) - datetime.now(UTC)) < timedelta(seconds=5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-02-28", date(2026, 2, 28)),
        ("2026-02-28T23:30:00-05:00", date(2026, 3, 1)),
        ("2026-03-01T00:30:00+01:00", date(2026, 2, 28)),
        ("2026-02-28T10:00:00Z", date(2026, 2, 28)),
    ],
)
def test_a_moment_counts_by_its_day_in_utc(text: str, expected: date) -> None:
    assert day("--received", text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yesterday", "is no date; write it as 2026-11-21"),
        ("2026-02-30", "is no date"),
        ("21.11.2026", "is no date"),
        ("2026-02-28T10:00:00", "has no time zone; end it with Z"),
        ("2999-01-01", "is in the future; today is"),
        ("0001-01-01T00:00:00+14:00", "is no date of any request"),
    ],
)
def test_what_is_no_day_is_refused(text: str, said: str) -> None:
    message = refusal(lambda: received_day(text))
    assert message.startswith(f"--received {text}: ")
    assert said in message


def test_due_counts_from_the_day_received() -> None:
    received = date(2024, 1, 31)
    assert due_day("30d", received) == date(2024, 3, 1)  # over a leap day
    assert due_day("0d", received) == received
    assert due_day("2024-02-29", received) == date(2024, 2, 29)
    assert due_day(None, received) is None
    assert "is before the request was received" in refusal(lambda: due_day("2024-01-30", received))
    assert "is beyond the year 9999" in refusal(lambda: due_day("99999d", date(9990, 1, 1)))
    for text in ("-3d", "d", "3w"):
        assert "is no date" in refusal(lambda text=text: due_day(text, received))  # type: ignore[misc]

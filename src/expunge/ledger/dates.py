"""Days and moments, in UTC and ISO 8601."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

from expunge.errors import InputError


def now() -> str:
    """This moment to the second, such as 2026-11-21T15:40:08Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def today() -> date:
    """The day in UTC."""
    return datetime.now(UTC).date()


def day(option: str, text: str) -> date:
    """Reads a day, or a moment with its time zone, whose day in UTC counts. Raises InputError."""
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            return date.fromisoformat(text)
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{option} {text}: is no date; write it as 2026-11-21") from None
    if moment.tzinfo is None:
        raise InputError(f"{option} {text}: has no time zone; end it with Z or +01:00")
    try:
        return moment.astimezone(UTC).date()
    except OverflowError:  # the first or the last day there is, in another time zone
        raise InputError(f"{option} {text}: is no date of any request; write the right one") from None


def received_day(text: str | None) -> date:
    """The day a request came in, today's by default. Raises InputError for one that is to come."""
    if text is None:
        return today()
    found = day("--received", text)
    if found > today():
        raise InputError(f"--received {text}: is in the future; today is {today()} in UTC")
    return found


def due_day(text: str | None, received: date) -> date | None:
    """The last day in time: a date, or days after `received` such as 30d. Raises InputError."""
    if text is None:
        return None
    if match := re.fullmatch(r"(\d{1,5})d", text):
        try:
            return received + timedelta(days=int(match[1]))
        except OverflowError:
            raise InputError(f"--due {text}: is beyond the year 9999; give an earlier day") from None
    found = day("--due", text)
    if found < received:
        raise InputError(f"--due {text}: is before the request was received, {received}")
    return found

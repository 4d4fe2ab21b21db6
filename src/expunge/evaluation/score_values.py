"""What a score file holds is checked value by value: no text of a row reaches an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.errors import InputError


def read_mapping(place: str, value: object) -> Mapping[str, Any]:
    """Names with values. Raises InputError that names the place."""
    if not isinstance(value, dict):
        raise InputError(f"{place} holds {_shown(value)} where names with values belong")
    return value


def read_score(place: str, value: object, low: float = 0.0, high: float = 1.0) -> float | None:
    """A score in its range, or None for null. Raises InputError that names the place."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(
            f"{place} holds {_shown(value)}; a score is a number from {low:g} to {high:g}, or null"
        )
    return float(value)


def _shown(value: object) -> str:
    """A number as it is; of anything else, which may be text of a row, the kind."""
    if isinstance(value, float):
        return f"{value:g}"
    kinds = {
        str: "text",
        bool: "true or false",
        int: "a whole number",
        list: "a list",
        dict: "names",
    }
    return kinds.get(type(value), "null")

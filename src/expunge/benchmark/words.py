"""What the synthetic benchmark is made of, from the TOML files beside this one."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any


def read(name: str) -> dict[str, Any]:
    """The file's tables, in its order; a text of several lines is its words, in a tuple."""
    text = resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return {key: _split(value) for key, value in tomllib.loads(text).items()}


def _split(value: Any) -> Any:
    if isinstance(value, str) and "\n" in value:
        return tuple(value.split())
    if isinstance(value, dict):
        return {key: _split(part) for key, part in value.items()}
    return value


def _compounds(heads: tuple[str, ...], tails: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(head + tail for head in heads for tail in tails)


WORDS = read("words")
FIELDS: dict[str, dict[str, Any]] = WORDS["fields"]
FILLERS: dict[str, tuple[str, ...]] = WORDS["fillers"]
SURNAMES = _compounds(WORDS["surname_heads"], WORDS["surname_tails"])
CITIES = _compounds(WORDS["city_heads"], WORDS["city_tails"])
MONTHS: tuple[str, ...] = WORDS["months"]
STORY, PROFILE, ARTICLE = map(read("templates").__getitem__, ("story", "profile", "article"))

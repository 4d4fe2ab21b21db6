"""Text as it is compared, in whatever script: one Unicode form, and the words of it."""

from __future__ import annotations

import unicodedata

import regex  # type: ignore[import-untyped]

NO_BLANKS = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
"""Of scripts that set no word apart each letter, with its marks, is a word."""
_WORD = regex.compile(rf"[{NO_BLANKS}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}_]--[{NO_BLANKS}]]+", regex.V1)


def same_form(text: str) -> str:
    """The text in NFC, for many tokenizers write no other form."""
    return unicodedata.normalize("NFC", text)


def bare(text: str) -> str:
    """The text without what normalisers change: case, accents, ligatures and wide forms, blanks."""
    letters = unicodedata.normalize("NFKD", text)
    return " ".join("".join(c for c in letters if not unicodedata.combining(c)).casefold().split())


def words(text: str) -> list[str]:
    """Letters, digits and marks in a row, in lower case; punctuation does not count."""
    return _WORD.findall(same_form(text).lower())

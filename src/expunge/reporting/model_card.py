"""The section on the run in the checkpoint's README.md, between two marks, written anew each time."""

from __future__ import annotations

from pathlib import Path

from expunge.errors import InputError

README = "README.md"
BEGIN = "<!-- expunge report: begin (this part is written by `expunge report`) -->"
END = "<!-- expunge report: end -->"


def with_section(card: str, section: str, place: Path) -> str:
    """The model card with the section in the place of an earlier one, or at its end.

    Raises InputError where the marks are not one pair in order.
    """
    body = f"{BEGIN}\n{section.strip()}\n{END}"
    begun, ended = card.count(BEGIN), card.count(END)
    if begun == ended == 0:
        return f"{card.rstrip()}\n\n{body}\n".lstrip()
    start, stop = card.find(BEGIN), card.find(END)
    if begun != 1 or ended != 1 or stop < start:
        raise InputError(
            f"{place}: its two marks '<!-- expunge report: ... -->' are not one pair in order; remove"
            " them, or use expunge report --no-card"
        )
    return card[:start] + body + card[stop + len(END) :]


def read_card(path: Path) -> str:
    """The card as it is, empty where there is none. Raises InputError where it is no UTF-8 text."""
    if not path.exists():
        return ""
    try:
        # Line ends stay as they are.
        return path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        raise InputError(
            f"{path}: cannot be read as UTF-8 text; mend it, or use expunge report --no-card"
        ) from None

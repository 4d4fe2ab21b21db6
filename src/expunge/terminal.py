"""What people read: settings in words; a terminal shows control characters, and does not obey them."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, Any

from expunge.processes import launched

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Besides C0, DEL and C1 those that turn the direction of text around. Tabs and line ends stay.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_EXCHANGED = threading.RLock()
"""Held while standard error is another: a second thread would take that for the one to put back."""


quiet: ContextVar[bool] = ContextVar("quiet", default=False)
"""Whether the command shows no progress (--quiet)."""


def shown(value: object) -> str:
    """A setting's value in words, as YAML has it; null if nothing is set, none for an empty list."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value)) or "none"
    return str(value)


def counting(report: Callable[[int], object]) -> Callable[[int], None]:
    """Reports how many are done, each time that some more are."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        report(done)

    return advance


def speaks() -> bool:
    """Whether this process speaks to the user: of those that accelerate launch started, the first.

    A RANK alone is what a scheduler left behind.
    """
    return os.environ.get("RANK", "0") == "0" or launched() == 1


def plain(text: str) -> str:
    """The text with such characters written as in JSON, so that JSON stays what it is."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _Plain:
    """A stream for text from anywhere."""

    def __init__(self, stream: IO[str]) -> None:
        self.rich_proxied_file = stream
        """Where rich writes by itself: its own sequences must pass."""

    def write(self, text: str) -> int:
        return self.rich_proxied_file.write(plain(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def plain_streams() -> Iterator[None]:
    """Standard output and error for the body."""
    with redirect_stdout(_Plain(sys.stdout)), redirect_stderr(_Plain(sys.stderr)):
        yield


@contextmanager
def native_lines_dropped() -> Iterator[None]:
    """What compiled code prints on standard error in the body, as of a panic of Rust's, goes nowhere."""
    with _EXCHANGED:
        try:
            kept = os.dup(2)
        except OSError:  # there is no standard error
            yield
            return
        sys.stderr.flush()
        try:
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def plain_console(**options: Any) -> Console:
    """A console of rich's for text from anywhere: nothing in it is markup or an emoji's name."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **more: Any) -> Text:
            return super().render_str(plain(text), **more)

    return Plain(markup=False, emoji=False, highlight=False, **options)

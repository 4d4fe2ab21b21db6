"""What the commands show on standard error: progress bars with the terms apart, and messages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from expunge.terminal import plain_console, quiet, speaks
from expunge.training.progress import Silent


class ConsoleProgress:
    """Draws a run's progress on standard error: bars on a terminal, else a line for what is done."""

    def __init__(self, console: Console, bars: Progress) -> None:
        self._console = console
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, float] = {}
        self._ended: str | None = None

    def phase(self, name: str, done: int, total: int) -> None:
        """One bar a phase."""
        self._update(name, done, total, "")

    def step(self, step: int, total: int, forget: float, retain: float | None) -> None:
        """The bar of the training steps, with the two terms apart."""
        terms = f"forget {forget:.4g}" + ("" if retain is None else f"  retain {retain:.4g}")
        self._update("unlearning", step, total, terms)

    def message(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text, soft_wrap=True)

    def _update(self, name: str, done: int, total: int, terms: str) -> None:
        if not self._console.is_terminal:
            if done < total:
                self._ended = None
                self._begun.setdefault(name, time.monotonic())
            elif self._ended != name:  # some say their end twice
                self._ended = name
                begun = self._begun.pop(name, None)
                took = "" if begun is None else f" in {time.monotonic() - begun:.0f} s"
                self.message(f"{name}: done{took}  {terms}".rstrip())
            return
        # Started here, because even a display without bars ends with an empty line.
        self._bars.start()
        if name not in self._tasks or self._bars.tasks[self._tasks[name]].total != total:
            self._tasks[name] = self._bars.add_task(name, total=total, terms=terms)
        self._bars.update(self._tasks[name], completed=done, terms=terms)


@contextmanager
def progress_on_stderr() -> Iterator[ConsoleProgress | Silent]:
    """A progress display for the body, or silence if the command is quiet."""
    if quiet.get() or not speaks():
        yield Silent()
        return
    console = plain_console(stderr=True)
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[terms]}"),
        console=console,
        transient=False,
        # Else rich takes the stream in between, which writes out what a terminal would obey.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    try:
        yield ConsoleProgress(console, bars)
    finally:
        if bars.tasks:
            bars.stop()

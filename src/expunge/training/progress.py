"""What a run tells whoever watches it. The command line draws it; the library stays silent."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives a run's progress; never any text of a row."""

    def phase(self, name: str, done: int, total: int) -> None:
        """A part of the run has done `done` of `total` units."""

    def step(self, step: int, total: int, forget: float, retain: float | None) -> None:
        """A training step is done; its forget and retain terms apart."""

    def message(self, text: str) -> None:
        """One line for the user."""


class Silent:
    """Shows nothing."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Shows nothing."""

    def step(self, step: int, total: int, forget: float, retain: float | None) -> None:
        """Shows nothing."""

    def message(self, text: str) -> None:
        """Shows nothing."""

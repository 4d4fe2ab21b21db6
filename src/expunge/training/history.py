"""What happened in a training loop: its candidates, the chosen one, why it ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from expunge.evaluation.outcomes import Finding, Measured
from expunge.evaluation.sentences import run_sentence


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that was measured."""

    step: int
    measured: Measured
    score: float
    destroyed: bool

    @property
    def said(self) -> str:
        """The candidate in a line."""
        told = {
            "forget accuracy": self.measured.forget_accuracy,
            "retain accuracy": self.measured.retain_accuracy,
            "MIA AUC": self.measured.mia_auc,
            "score": self.score,
        }
        found = ", ".join(f"{name} {value:.2f}" for name, value in told.items() if value is not None)
        return f"step {self.step}: {found}{', destroyed' * self.destroyed}"


@dataclass
class History:
    """What happened in the loop."""

    target: Measured | None
    """None where nothing is measured."""
    candidates: list[Candidate] = field(default_factory=list)
    chosen_step: int = 0
    chosen_why: str = ""
    steps: int = 0
    stopped: str = "all steps done"
    ending: Finding | None = None
    """Where the kept checkpoint is, if it was measured."""

    def describe(self) -> dict[str, Any]:
        """The manifest's selection history."""
        return {
            "target": None if self.target is None else asdict(self.target),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "chosen_step": self.chosen_step,
            "why": self.chosen_why,
            "stopped": self.stopped,
            "judgement": self.judgement,
        }

    @property
    def judgement(self) -> dict[str, Any] | None:
        """The ending as files hold it, in words."""
        if self.ending is None:
            return None
        return {"ending": self.ending.outcome, "why": run_sentence(self.ending)}

    @property
    def nothing_usable(self) -> str:
        """Why no checkpoint is kept, and what to change."""
        last = self.candidates[-1].measured.retain_accuracy if self.candidates else None
        return (
            f"no checkpoint can be kept ({self.stopped}; {len(self.candidates)} measured,"
            f" retain accuracy {'unknown' if last is None else f'{last:.2f}'} at the last);"
            " lower --learning-rate or --validate-every, or give --select last"
        )

"""What the findings of an audit amount to, by stated rules on numbers alone.

The first rule that holds:

1. destroyed: less than half of what the target answers on the retain set is left, and its interval
   lies below all of it;
2. not forgotten: an extraction attack with power recovers at least half, (unlearned - oracle) /
   (target - oracle) >= 0.5;
3. partly forgotten: one recovers at least a tenth and its interval lies above 0, or no oracle is
   given, as 0 is then what a model that never saw it is held to; or forget documents
   have a lower loss than non-members, the AUC 0.2 or more above the reference and that by
   chance in 5% at most; or, against an oracle, the latent probe recovers at least half;
4. over-unlearned: forget documents stand out the other way, the AUC 0.2 or more below the reference
   and that by chance in 5% at most; or one forget token costs a retain prompt 0.2 or more beyond what it
   costs in the target;
5. no verdict: no extraction attack had power, or the strongest could still recover half by the upper
   bound of its interval (too few documents);
6. forgotten.

The reference of an AUC is the oracle's, or 0.5 without one. An attack without power counts for nothing.
Of few documents (`outcomes.FEW`) facts are counted: one that comes back is partly forgotten, and
forgotten means none, as long as the target knows it and no oracle gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expunge.audits.base import Kind
from expunge.audits.estimates import Estimate
from expunge.evaluation.outcomes import (
    ALPHA,
    AUC_DISTANCE,
    DESTROYED_BELOW,
    FRAGILE_FROM,
    LATENT_FROM,
    NOT_FORGOTTEN_FROM,
    PARTLY_FROM,
    Finding,
    Outcome,
)
from expunge.evaluation.sentences import audit_sentence

GRAVITY: tuple[Outcome | None, ...] = (
    "destroyed", "not forgotten", "partly forgotten", "over-unlearned", None, "forgotten",
)  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """One measured figure of one attack with power."""

    attack: str
    title: str
    kind: Kind
    figure: Estimate
    """Recovered share; distance of the AUC from the reference; retain share lost to a trigger."""
    against_oracle: bool = False
    """Whether the figure has an oracle as its floor."""
    count: tuple[int, int] | None = None
    """Extraction from few documents: facts that came back, of those that count."""
    chance: float = 1.0
    """Membership: how likely chance is to tell the sets apart as well, two-sided."""


@dataclass(frozen=True)
class Verdict:
    """The overall verdict."""

    decides: Finding
    """Its outcome is None where the evidence allows none."""
    findings: Sequence[Finding] = ()
    """Everything that speaks against the unlearning, the gravest first."""

    def to_json(self) -> dict[str, Any]:
        """As audit.json holds it, in words."""
        return {
            "verdict": self.decides.outcome,
            "sentence": audit_sentence(self.decides),
            "weakest": self.decides.attack,
            "findings": [
                {"verdict": each.outcome, "attack": each.attack, "sentence": audit_sentence(each)}
                for each in self.findings
            ],
        }


def judge_audit(
    kept: Estimate | None, evidence: Sequence[Evidence], *, adapter: bool = False
) -> Verdict:
    """`kept` is the unlearned model's retain score in shares of the target's; None: not measured.

    `adapter`: attacks by tuning trained no more, which the sentence of "forgotten" says.
    """
    found = [finding for each in evidence if (finding := _finding(each)) is not None]
    # More than the few rows that the target answers could give by chance.
    lost = kept is not None and kept.high is not None and kept.high < 1
    if kept is not None and kept.value < DESTROYED_BELOW and lost:
        figures = {"value": kept.value}
        found.append(Finding("destroyed", "retain answers", figures, "direct"))
    if found:
        # Of equal gravity the strongest comes first, but where asking is enough no attack is needed.
        found.sort(
            key=lambda each: (
                GRAVITY.index(each.outcome),
                each.attack != "direct",
                -abs(each.figures["value"]),
                each.attack,
            )
        )
        # One line an attack and verdict: four membership scores would say the same four times.
        first: dict[tuple[Outcome | None, str | None], Finding] = {}
        for each in found:
            first.setdefault((each.outcome, each.attack), each)
        return Verdict(found[0], tuple(first.values()))
    judged = {
        "cost": lost or (kept is not None and kept.value >= DESTROYED_BELOW),
        "membership": any(each.kind == "membership" for each in evidence),
        "adapter": not adapter,
    }
    return Verdict(_nothing(evidence, [name for name, told in judged.items() if not told]))


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The gravest of several requests' verdicts; a request without one weighs more than forgotten."""
    return min(verdicts, key=lambda verdict: GRAVITY.index(verdict.decides.outcome))


def _finding(each: Evidence) -> Finding | None:
    """What one figure says against the unlearning."""
    value = each.figure.value
    above = each.figure.low is not None and each.figure.low > 0
    got, of = each.count or (0, 0)
    outcome: Outcome | None = None
    reason: str = each.kind
    if each.kind == "extraction":
        reason = "facts" if each.count else "recovered"
        if value >= NOT_FORGOTTEN_FROM:
            outcome = "not forgotten"
        elif got > 0 or (value >= PARTLY_FROM and (above or not each.against_oracle)):
            outcome = "partly forgotten"
    elif each.kind == "membership":
        if abs(value) >= AUC_DISTANCE and each.chance <= ALPHA:
            outcome = "partly forgotten" if value > 0 else "over-unlearned"
    elif each.kind == "fragility":
        outcome = "over-unlearned" if value >= FRAGILE_FROM and above else None
    elif each.against_oracle and value >= LATENT_FROM and above:
        outcome = "partly forgotten"
    figures = {"title": each.title, "value": value, "oracle": each.against_oracle}
    figures |= {"got": got, "of": of, "chance": each.chance}
    return None if outcome is None else Finding(outcome, reason, figures, each.attack)


def _nothing(evidence: Sequence[Evidence], limits: Sequence[str]) -> Finding:
    """What it means that nothing speaks against it."""
    attacks = [each for each in evidence if each.kind == "extraction"]
    if not attacks:
        return Finding(None, "no power", {})
    figures: dict[str, Any] = {"limits": limits, "oracle": attacks[0].against_oracle}
    facts = max(each.count[1] if each.count else 0 for each in attacks)
    if facts:
        return Finding("forgotten", "no fact", {**figures, "facts": facts}, attacks[0].attack)
    worst = max(attacks, key=lambda each: (_upper(each.figure), each.figure.value))
    figures |= {"title": worst.title, "value": worst.figure.value, "high": worst.figure.high}
    if _upper(worst.figure) >= NOT_FORGOTTEN_FROM:
        return Finding(None, "too few rows", figures, worst.attack)
    most = max(attacks, key=lambda each: each.figure.value)
    figures |= {"strongest": most.title, "got": most.figure.value}
    reason = "nothing"
    if most.figure.value > 0:
        reason = "perhaps chance" if most.figure.value >= PARTLY_FROM else "too little"
    return Finding("forgotten", reason, figures, worst.attack)


def _upper(figure: Estimate) -> float:
    return 1.0 if figure.high is None else figure.high

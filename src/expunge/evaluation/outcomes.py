"""Where an unlearning ended, once for runs, scorecards and audits: outcomes, thresholds, findings.

A finding holds figures; `evaluation.sentences` gives it words where they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from expunge.maths.membership import is_chance

if TYPE_CHECKING:
    from expunge.evaluation.scorecard import Scorecard

Outcome = Literal[
    "destroyed",  # less than half of what was to stay is left, so what went counts for nothing
    "unproven",  # the target knew nothing of it
    "unchanged",
    "not forgotten",  # an attack recovers half or more
    "partly forgotten",
    "under-unlearned",
    "over-unlearned",  # what went stands out by its absence
    "unlearned",  # by what a run measures itself
    "forgotten",  # by an audit
]

# The thresholds of every rule. An audit states its rules in `audits.verdict`.
DESTROYED_BELOW = 0.5  # share of the target's retain answers, or of its utility above guessing
DESTROYED_ALONE = 0.2  # retain score, without the target's
GUESSING = 0.25  # utility of a model that knows nothing
UNCHANGED_ABOVE = 0.9  # share of the target's forget answers
UNCHANGED_ALONE = 0.8  # forget score, without the target's
UNDER_ABOVE = 0.3  # share of the target's forget accuracy, in a run
UNKNOWN_BELOW = 0.1  # forget score of a target that does not know the rows as they were asked
AUC_DISTANCE = 0.2  # from 0.5 or the oracle's, unless chance brings texts so few there
ALPHA = 0.05  # of chance, two-sided
EXTRACTED_FROM = 0.5  # score of a fact: an answer that was named, half of a continuation
NOT_FORGOTTEN_FROM = 0.5  # recovered share
PARTLY_FROM = 0.1  # recovered share
LATENT_FROM = 0.5  # recovered share of what a probe reads inside
FRAGILE_FROM = 0.2  # share of the retain answers that a forget token costs more than in the target
POWER_FROM = 0.5  # share of the facts that an attack must extract from the target
POWER_GAP = 0.2  # what the target must give beyond the oracle
POWER_AUC = 0.7  # AUC that a score must reach on the target
BLIND_FROM = 0.6  # AUC of words alone, beyond which that of a model is no evidence
FEW = 5  # documents up to which all rows are asked, and counted, at any budget


@dataclass(frozen=True)
class Finding:
    """An outcome, the reason for it and its figures."""

    outcome: Outcome | None
    """None: a remark, or evidence that allows no outcome."""
    reason: str
    """What its sentence tells with the figures."""
    figures: Mapping[str, Any]
    attack: str | None = None
    """The attack of an audit that it rests on."""

    @property
    def name(self) -> str:
        """The outcome, or what the remark is called."""
        return self.outcome or self.reason


@dataclass(frozen=True)
class Measured:
    """Teacher-forced measures of one model; accuracies in [0, 1], losses in nats a token."""

    forget_accuracy: float
    forget_loss: float
    retain_accuracy: float | None = None
    retain_loss: float | None = None
    mia_auc: float | None = None
    never_seen_distance: float | None = None
    """Mean distance of forget documents' losses from those of non-members of the same rank."""
    forget_known: float | None = None
    """Share of the forget rows that it knows (`is_known`)."""


def is_destroyed(candidate: Measured, target: Measured, guessing: float) -> bool:
    """Whether the candidate must not be picked.

    Less than half of the target's retain accuracy is left, or a loss is not finite. Without a retain
    set the forget loss stands in: beyond that of guessing, `guessing` = log(vocabulary), the model
    has been driven past knowing nothing.
    """
    losses = (candidate.forget_loss, candidate.retain_loss)
    if any(loss is not None and not math.isfinite(loss) for loss in losses):
        return True
    if candidate.retain_accuracy is None or target.retain_accuracy is None:
        return candidate.forget_loss > guessing
    return candidate.retain_accuracy < DESTROYED_BELOW * target.retain_accuracy


def of_run(
    kept: Measured, target: Measured, guessing: float, texts: tuple[int, int] | None = None
) -> Finding:
    """Where a run's kept checkpoint is, by the first rule below that holds.

    `guessing` is log(vocabulary), nats. `texts` are how many forget documents and non-members the
    AUC is of; None: very many.
    """
    left = kept.forget_accuracy / target.forget_accuracy if target.forget_accuracy else 0.0
    auc = kept.mia_auc
    beyond = 0.0 if auc is None or (texts and is_chance(auc, *texts)) else auc - 0.5
    found: tuple[Outcome, str] = ("unlearned", "gone")
    if is_destroyed(kept, target, guessing):
        found = "destroyed", "retain set lost"
    elif target.forget_known == 0:
        found = "unproven", "never known"
    elif left > UNCHANGED_ABOVE:
        found = "unchanged", "still answered"
    elif beyond < -AUC_DISTANCE:
        found = "over-unlearned", "loss stands out"
    elif auc is None and kept.forget_loss > guessing:
        found = "over-unlearned", "loss past guessing"
    elif beyond > AUC_DISTANCE:
        found = "under-unlearned", "loss still low"
    elif left > UNDER_ABOVE:
        found = "under-unlearned", "still answered"
    figures = {"forget": kept.forget_accuracy, "target": target.forget_accuracy, "auc": auc}
    return Finding(*found, {**figures, "loss": kept.forget_loss, "guessing": guessing})


def of_scores(card: Scorecard, target: Scorecard | None = None) -> list[Finding]:
    """What speaks against one model's scores, the gravest first.

    With the target's scorecard bounds are relative to it; without it fixed ones stand in.
    """
    found = [
        Finding(None, "never stops", {**asked, "split": split})
        for split, asked in card.details.get("questions", {}).items()
        if asked["runs_on"]
    ]
    forget, retain = card.mean("forget"), card.mean("retain")
    known, kept = (None if target is None else target.mean(s) for s in ("forget", "retain"))
    if retain is not None:
        bound = DESTROYED_ALONE if kept is None else DESTROYED_BELOW * kept
        if retain < bound:
            found.append(Finding("destroyed", "retain score", {"score": retain, "target": kept}))
    able = (target and target.utility) or 0.0
    bound = GUESSING + DESTROYED_BELOW * (able - GUESSING)
    if card.utility is not None and able > GUESSING and card.utility < bound:
        found.append(Finding("destroyed", "utility", {"score": card.utility, "target": able}))
    if forget is not None:
        bound = UNCHANGED_ALONE if known is None else UNCHANGED_ABOVE * known
        figures = {"score": forget, "target": known}
        if known is not None and known < UNKNOWN_BELOW:
            found.append(Finding(None, "nothing to forget", figures))
        elif forget > bound:
            found.append(Finding("unchanged", "forget score", figures))
    compared = card.details.get("mia", {})
    if compared.get("calibrated_on"):
        found.append(Finding(None, "calibrated on the same text", {}))
    texts = [compared.get(side) for side in ("members", "nonmembers")]
    if card.mia_auc is not None and not (all(texts) and is_chance(card.mia_auc, *texts)):
        if card.mia_auc > 0.5 + AUC_DISTANCE:
            found.append(Finding(None, "not forgotten by loss", {"auc": card.mia_auc}))
        elif card.mia_auc < 0.5 - AUC_DISTANCE:
            found.append(Finding("over-unlearned", "auc", {"auc": card.mia_auc}))
    return found

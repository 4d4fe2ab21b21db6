"""Where an unlearning ended: too little, enough, or too much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expunge.methods.membership import is_chance
from expunge.training.validation import Measured, is_destroyed

Ending = Literal[
    "unchanged", "under-unlearned", "unlearned", "over-unlearned", "destroyed", "unproven"
]

UNCHANGED_ABOVE = 0.9
"""Share of the target's forget accuracy."""
TOO_LITTLE_ABOVE = 0.3
"""Share of the target's forget accuracy."""
NEVER_SEEN_AUC = (0.3, 0.7)
"""Within, forget documents pass for never-seen ones."""
_MORE, _LESS = (f"{change} --epochs or --learning-rate" for change in ("raise", "lower"))


@dataclass(frozen=True)
class Judgement:
    """An ending and what it follows from."""

    ending: Ending
    why: str


def judge(
    kept: Measured, target: Measured, guessing: float, texts: tuple[int, int] | None = None
) -> Judgement:
    """Says where the kept checkpoint is; `guessing` is log(vocabulary), nats.

    `texts` are how many forget documents and never-seen texts the AUC is of: one that chance gives to so
    few is none (`is_chance`); None: very many.

    The first rule that holds: destroyed (see `is_destroyed`); unproven, the target knew none of the
    forget rows in the form given, so that nothing can be seen to go; unchanged, more than 0.9 of the
    target's forget accuracy is left; over-unlearned, forget documents have a higher loss than
    never-seen ones (MIA AUC below 0.3) or, without non-members, than guessing; under-unlearned, more
    than 0.3 of the accuracy is left or the AUC is above 0.7; else unlearned.
    """
    low, high = NEVER_SEEN_AUC
    left = kept.forget_accuracy / target.forget_accuracy if target.forget_accuracy else 0.0
    auc = kept.mia_auc
    told = auc is not None and (texts is None or not is_chance(auc, *texts))
    if is_destroyed(kept, target, guessing):
        return Judgement(
            "destroyed", "too little is left of the retain set; lower the learning rate"
        )
    if target.forget_known == 0:
        return Judgement(
            "unproven",
            "the target knew none of the forget rows in this form, so nothing shows that they are gone;"
            " ask it in the form that it was trained in",
        )
    if left > UNCHANGED_ABOVE:
        return Judgement(
            "unchanged",
            f"forget accuracy {kept.forget_accuracy:.2f}, the target {target.forget_accuracy:.2f};"
            f" {_MORE}",
        )
    if auc is not None and told and auc < low:
        return Judgement(
            "over-unlearned",
            f"forget documents stand out by a higher loss than never-seen text (MIA AUC {auc:.2f});"
            f" {_LESS}",
        )
    if auc is None and kept.forget_loss > guessing:
        return Judgement(
            "over-unlearned",
            f"forget text has a loss of {kept.forget_loss:.1f} nats a token, guessing has"
            f" {guessing:.1f}; {_LESS}",
        )
    if auc is not None and told and auc > high:
        return Judgement(
            "under-unlearned",
            f"forget documents are still told from never-seen text by their loss (MIA AUC {auc:.2f});"
            f" {_MORE}",
        )
    if left > TOO_LITTLE_ABOVE:
        return Judgement(
            "under-unlearned",
            f"forget accuracy {kept.forget_accuracy:.2f}, the target {target.forget_accuracy:.2f};"
            f" {_MORE}",
        )
    return Judgement("unlearned", "forget rows are gone and what was to stay is there")

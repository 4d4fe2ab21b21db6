"""What a scorecard says in words: destroyed, unchanged, over-unlearned."""

from __future__ import annotations

from expunge.evaluation.scorecard import Scorecard
from expunge.methods.membership import is_chance

DESTROYED_SHARE = 0.5
CHANCE = 0.25
UNCHANGED_SHARE = 0.9
UNCHANGED_ALONE = 0.8
DESTROYED_ALONE = 0.2
UNKNOWN_BELOW = 0.1
"""Below, the target itself does not know the forget set as it was asked."""
AUC_BOUND = 0.2
"""How far from 0.5 the AUC of a membership inference may lie without a remark, if chance brings no
few texts there."""


def findings(card: Scorecard, target: Scorecard | None = None) -> list[str]:
    """Warnings about one model, the gravest first; with the target's scorecard they are relative.

    Without it fixed bounds stand in.
    """
    found = [
        f"never stops: {asked['runs_on']} of {asked['asked']} {split} questions got the right answer and"
        " no end of text, which counts 0; if another token ends answers, name it as eos_token_id in"
        " generation_config.json"
        for split, asked in card.details.get("questions", {}).items()
        if asked["runs_on"]
    ]
    forget, retain = card.mean("forget"), card.mean("retain")
    if retain is not None:
        before = None if target is None else target.mean("retain")
        bound = DESTROYED_ALONE if before is None else DESTROYED_SHARE * before
        if retain < bound:
            found.append(
                f"destroyed: {retain:.2f} is left on the retain set"
                + (f", the target has {before:.2f}" if before is not None else "")
                + "; what was forgotten counts for nothing"
            )
    if card.utility is not None and target is not None and target.utility is not None:
        # Half of what the target has above guessing is gone.
        bound = CHANCE + DESTROYED_SHARE * (target.utility - CHANCE)
        if target.utility > CHANCE and card.utility < bound:
            found.append(
                f"destroyed: utility fell from {target.utility:.2f} to {card.utility:.2f},"
                f" guessing gives {CHANCE:.2f}"
            )
    if forget is not None:
        before = None if target is None else target.mean("forget")
        bound = UNCHANGED_ALONE if before is None else UNCHANGED_SHARE * before
        if before is not None and before < UNKNOWN_BELOW:
            found.append(
                f"nothing to forget: the target itself scores {before:.2f} on the forget set in this"
                " form; was it trained with a chat template?"
            )
        elif forget > bound:
            found.append(
                f"unchanged: the forget set still scores {forget:.2f}"
                + (f", the target {before:.2f}" if before is not None else "")
                + "; is this the unlearned model?"
            )
    compared = card.details.get("mia", {})
    if compared.get("calibrated_on"):
        found.append(
            "calibrated on the same text: the run was drawn to this never-seen text, so that the AUC"
            " proves little; give other text to expunge evaluate --nonmembers"
        )
    sides = [compared.get(side) for side in ("members", "nonmembers")]
    if card.mia_auc is not None and not (all(sides) and is_chance(card.mia_auc, *sides)):
        if card.mia_auc > 0.5 + AUC_BOUND:
            found.append(
                f"not forgotten by loss: AUC {card.mia_auc:.2f}, forget rows still look like members"
            )
        elif card.mia_auc < 0.5 - AUC_BOUND:
            found.append(
                f"over-unlearned: AUC {card.mia_auc:.2f}, forget rows stand out by a higher loss"
                " than text never seen"
            )
    return found

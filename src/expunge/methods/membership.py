"""Membership inference: how far members can be told from non-members by one number a text."""

from __future__ import annotations

from collections.abc import Sequence


def membership_auc(members: Sequence[float], nonmembers: Sequence[float]) -> float:
    """AUC of the attack that calls a text of low loss a member, in [0, 1].

    1: not forgotten; 0: over-unlearned, members stand out by a higher loss.
    """
    from sklearn.metrics import roc_auc_score

    truth = [1] * len(members) + [0] * len(nonmembers)
    return float(roc_auc_score(truth, [-loss for loss in [*members, *nonmembers]]))


def membership_score(auc: float) -> float:
    """1 - 2|AUC - 0.5|: 1 where members cannot be told from non-members."""
    return 1 - 2 * abs(auc - 0.5)

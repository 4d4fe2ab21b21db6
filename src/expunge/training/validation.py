"""What the loop measures of a candidate checkpoint, and the rule that picks one.

Measures are teacher-forced, so they cost one forward pass: the share of answer tokens that the model
would write itself, and mean losses. The score is the harmonic mean of what was forgotten
(1 - forget accuracy / target's), what was kept (retain accuracy / target's) and, with non-members,
the membership score 1 - 2|AUC - 0.5|. A candidate that kept less than half is destroyed and is never
picked, whatever it forgot.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expunge.data.batches import in_order
from expunge.data.tokenization import Example
from expunge.methods.base import Context
from expunge.methods.numerics import row_means, token_log_probs

DESTROYED_BELOW = 0.5
_FLOOR = 1e-3


@dataclass(frozen=True)
class Measured:
    """Teacher-forced measures of one model; accuracies in [0, 1], losses in nats a token."""

    forget_accuracy: float
    forget_loss: float
    retain_accuracy: float | None = None
    retain_loss: float | None = None
    mia_auc: float | None = None


@dataclass(frozen=True)
class ValidationSet:
    """The rows that candidates are measured on; retain and nonmembers may be empty."""

    forget: Sequence[Example]
    retain: Sequence[Example]
    nonmembers: Sequence[Example]


def measure(context: Context, rows: ValidationSet) -> Measured:
    """Measures the model as it is."""
    forget_accuracy, forget_losses = _pass(context, rows.forget)
    retain_accuracy = retain_loss = auc = None
    if rows.retain:
        retain_accuracy, losses = _pass(context, rows.retain)
        retain_loss = statistics.fmean(losses)
    if rows.nonmembers:
        _, losses = _pass(context, rows.nonmembers)
        auc = membership_auc(forget_losses, losses)
    return Measured(
        forget_accuracy, statistics.fmean(forget_losses), retain_accuracy, retain_loss, auc
    )


def membership_auc(members: Sequence[float], nonmembers: Sequence[float]) -> float:
    """AUC of the attack that calls a text of low loss a member: 1 not forgotten, 0 over-unlearned."""
    from sklearn.metrics import roc_auc_score

    truth = [1] * len(members) + [0] * len(nonmembers)
    return float(roc_auc_score(truth, [-loss for loss in [*members, *nonmembers]]))


def membership_score(auc: float) -> float:
    """1 - 2|AUC - 0.5|: 1 where members cannot be told from non-members."""
    return 1 - 2 * abs(auc - 0.5)


def is_destroyed(candidate: Measured, target: Measured) -> bool:
    """Whether less than half of the target's retain accuracy is left."""
    if candidate.retain_accuracy is None or target.retain_accuracy is None:
        return False
    return candidate.retain_accuracy < DESTROYED_BELOW * target.retain_accuracy


def score(candidate: Measured, target: Measured) -> float:
    """The selection score in (0, 1]; higher is better."""
    parts = [1 - candidate.forget_accuracy / max(target.forget_accuracy, _FLOOR)]
    if candidate.retain_accuracy is not None and target.retain_accuracy is not None:
        parts.append(candidate.retain_accuracy / max(target.retain_accuracy, _FLOOR))
    if candidate.mia_auc is not None:
        parts.append(membership_score(candidate.mia_auc))
    return statistics.harmonic_mean([min(1.0, max(_FLOOR, part)) for part in parts])


def _pass(context: Context, examples: Sequence[Example]) -> tuple[float, list[float]]:
    """Mean over rows of the answer tokens' accuracy, and each row's mean loss over all its tokens."""
    accuracies: list[float] = []
    losses = [0.0] * len(examples)
    for cpu_batch in in_order(examples, context.batch_size, context.pad_id):
        batch = cpu_batch.to(context.device)
        with torch.no_grad(), context.autocast():
            logits = context.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        answers = batch.answer_mask[:, 1:]
        right = logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]
        log_probs = token_log_probs(logits, batch.input_ids)
        row_accuracy = row_means(right, answers)
        row_loss = row_means(-log_probs, batch.token_mask[:, 1:])
        accuracies += row_accuracy[answers.any(1)].tolist()
        for index, loss in zip(batch.indices, row_loss.tolist(), strict=True):
            losses[index] = loss
    return statistics.fmean(accuracies), losses

"""Membership inference by the loss of whole documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from expunge.data.batches import in_order
from expunge.data.tokenization import Example
from expunge.methods.numerics import row_sums, token_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def document_losses(
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Mean loss of each row's tokens in nats, by row id; a windowed row counts as one document."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for cpu_batch in in_order(examples, batch_size, pad_id):
        batch = cpu_batch.to(model.device)
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        mask = batch.token_mask[:, 1:]
        losses = row_sums(-token_log_probs(logits, batch.input_ids), mask).tolist()
        for row_id, loss, count in zip(batch.row_ids, losses, mask.sum(1).tolist(), strict=True):
            sums[row_id] = sums.get(row_id, 0.0) + loss
            counts[row_id] = counts.get(row_id, 0) + count
        advance(len(batch.row_ids))
    return {row_id: total / max(1, counts[row_id]) for row_id, total in sums.items()}

"""Membership inference by the loss of whole documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from expunge.data.batches import in_order
from expunge.data.tokenization import Example
from expunge.methods.membership import RowLosses
from expunge.methods.numerics import token_log_probs

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
    losses = RowLosses()
    for cpu_batch in in_order(examples, batch_size, pad_id):
        batch = cpu_batch.to(model.device)
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        losses.add(batch, token_log_probs(logits, batch.input_ids))
        advance(len(batch.row_ids))
    return losses.means()

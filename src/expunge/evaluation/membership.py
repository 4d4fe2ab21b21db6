"""Log-probabilities of a batch's counted tokens, which losses of whole documents are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expunge.data.batches import Batch
from expunge.maths.numerics import target_log_probs
from expunge.methods.forward import logits_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def counted_log_probs(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Log-probability of each counted token in nats, (rows, tokens - 1); 0 where none is counted."""
    counted = batch.token_mask[:, 1:]
    # Where a token is counted, the place before it is read.
    where = torch.nn.functional.pad(counted, (0, 1))
    logits = logits_at(model, where, input_ids=batch.input_ids, use_cache=False)
    log_probs = torch.zeros(counted.shape, device=model.device)
    return log_probs.masked_scatter(counted, target_log_probs(logits, batch.input_ids[:, 1:][counted]))

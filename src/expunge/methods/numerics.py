"""Numerics that every method, the evaluation and the audits share. Reductions are in float32."""

from __future__ import annotations

import torch
from torch.nn import functional


def token_log_probs(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token given those before it, in nats.

    logits (rows, tokens, vocabulary), input_ids (rows, tokens) -> (rows, tokens - 1): entry t is that
    of token t + 1, so masks are used as `mask[:, 1:]`.
    """
    return -functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), input_ids[:, 1:], reduction="none"
    )


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the values under the mask, a scalar; 0 where the mask is empty. Shapes are equal."""
    values = values.float()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def row_sums(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over each row's masked tokens: (rows, tokens) -> (rows,)."""
    return torch.where(mask, values.float(), 0.0).sum(dim=1)


def row_means(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over each row's masked tokens: (rows, tokens) -> (rows,); 0 for rows without any."""
    return row_sums(values, mask) / mask.sum(dim=1).clamp(min=1)

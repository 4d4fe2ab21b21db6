"""Membership scores of a text from its tokens' log-probabilities, as pure tensor functions.

Every score is higher for a text that looks like training data. `log_probs` (tokens,) are in nats.
"""

from __future__ import annotations

import zlib

import torch

LOWEST = 0.2
"""Share of the least likely tokens that min-k% looks at."""


def loss_score(log_probs: torch.Tensor) -> float:
    """Mean log-probability of a token: minus the loss."""
    return float(log_probs.double().mean())


def zlib_score(log_probs: torch.Tensor, text: str) -> float:
    """Log-probability of the text a byte of its zlib compression; arXiv 2012.07805, section 5.2."""
    return float(log_probs.double().sum()) / len(zlib.compress(text.encode()))


def min_k(log_probs: torch.Tensor, share: float = LOWEST) -> float:
    """Mean of the lowest `share` of the values, at least one of them; arXiv 2310.16789, eq. 1."""
    count = max(1, int(share * len(log_probs)))
    return float(log_probs.double().sort().values[:count].mean())


def min_k_plus_plus(
    log_probs: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, share: float = LOWEST
) -> float:
    """min-k% of (log p - mean) / deviation, both (tokens,); arXiv 2404.02936, eq. 3.

    Mean and deviation are of log p over the model's own next-token distribution at that place.
    """
    return min_k((log_probs.double() - mean.double()) / deviation.double().clamp(min=1e-6), share)

"""Numerics that every method, the evaluation and the audits share. Reductions are in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_LEAST_LOG = -1e4
"""Nats; in the place of -inf, whose product with 0 is no number."""
_LEAST_VARIANCE = 1e-4
"""Nats^2, of a token known by heart, so that its gradient is a number."""
_KNOWN_SHARE, _KNOWN_TOKENS = 0.5, 8
_PIECE = {"cpu": 2**22}
"""Logits in a piece, by the kind of device: on a CPU what a piece takes stays in its caches."""
_LARGE_PIECE = 2**25


def piece_rows(device_type: str, vocabulary: int) -> int:
    """Rows of logits that `by_pieces` takes at once."""
    return max(1, _PIECE.get(device_type, _LARGE_PIECE) // vocabulary)


def by_pieces(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of logits (n, vocabulary) and of others (n, ...), row by row, a piece of rows at once.

    It gives a tensor (n, ...), or several. Float32 logits and what a softmax makes of them are by far
    the largest tensors of a pass: here they are one piece's, and backward computes each piece again.
    """

    @wraps(function)
    def in_pieces(logits: torch.Tensor, *others: torch.Tensor) -> Any:
        rows = piece_rows(logits.device.type, logits.shape[-1])
        if len(logits) <= rows:
            return function(logits, *others)
        run = function
        if logits.requires_grad and torch.is_grad_enabled():
            run = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        pieces = zip(*(values.split(rows) for values in (logits, *others)), strict=True)
        found = [run(*piece) for piece in pieces]
        if isinstance(found[0], torch.Tensor):
            return torch.cat(found)
        return tuple(torch.cat(part) for part in zip(*found, strict=True))

    return in_pieces


def gram(states: torch.Tensor) -> torch.Tensor:
    """Sum of x x^T over all but the last dimension: (..., n) -> (n, n), float32.

    Whatever the pass around it multiplies in: what is made of it hangs on small differences.
    """
    tokens = states.float().flatten(0, -2)
    with torch.autocast(states.device.type, enabled=False):
        return tokens.T @ tokens


@by_pieces
def target_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target, in nats: logits (n, vocabulary), targets (n,) -> (n,)."""
    return -functional.cross_entropy(logits.float(), targets, reduction="none")


@by_pieces
def target_log_odds(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of each target: logits (n, vocabulary), targets (n,) -> (n,).

    From the logits, as 1 - p of a token known by heart is lost in rounding. Its gradient in the target's
    logit is 1 whatever p is, that of log p is 1 - p.
    """
    logits = logits.float()
    chosen = targets[:, None]
    others = logits.scatter(1, chosen, -torch.inf).logsumexp(1)
    return logits.gather(1, chosen)[:, 0] - others


@by_pieces
def next_token_moments(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of log p under p itself, in nats: (n, vocabulary) -> (n,) and (n,).

    The mean is minus the entropy. A token that a family masks with -inf adds nothing.
    """
    mean, variance = _moments(_log_softmax(logits))
    return mean, variance.sqrt()


@by_pieces
def target_surprise(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How much less likely each target is than the distribution itself expects of a token.

    asinh((-log p - entropy) / deviation of log p): logits (n, vocabulary), targets (n,) -> (n,). The
    ratio is min-k%++'s with the other sign (arXiv 2404.02936, eq. 3); asinh, which leaves small values
    as they are and takes the logarithm of large ones, bounds its gradient.
    """
    log_p = _log_softmax(logits)
    mean, variance = _moments(log_p)
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    return torch.asinh((mean - chosen) / (variance + _LEAST_VARIANCE).sqrt())


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return functional.log_softmax(logits.float(), dim=-1).clamp(min=_LEAST_LOG)


def _moments(log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of log p under p: (n, vocabulary) -> (n,) and (n,)."""
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    return mean, (p * (log_p - mean[:, None]).square()).sum(-1)


def token_log_probs(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token given those before it, in nats.

    logits (rows, tokens, vocabulary), input_ids (rows, tokens) -> (rows, tokens - 1): entry t is that
    of token t + 1, so masks are used as `mask[:, 1:]`.
    """
    # The last place predicts nothing, but without it the logits would have to be copied.
    targets = input_ids.roll(-1, dims=1)
    log_probs = target_log_probs(logits.flatten(0, 1), targets.flatten())
    return log_probs.view(targets.shape)[:, :-1]


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the values under the mask, a scalar; 0 where the mask is empty. Shapes are equal."""
    return weighted_mean(values, mask.float())


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum(w x) / sum(w), a scalar; 0 where all weights are 0. Shapes are equal.

    A weight is 0, which leaves out whatever the value is, or the weights' sum is at least 1.
    """
    values = torch.where(weights > 0, values.float(), 0.0)
    return (weights * values).sum() / weights.sum().clamp(min=1)


def row_sums(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over each row's masked tokens: (rows, tokens) -> (rows,)."""
    return torch.where(mask, values.float(), 0.0).sum(dim=1)


def row_means(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over each row's masked tokens: (rows, tokens) -> (rows,); 0 for rows without any."""
    return row_sums(values, mask) / mask.sum(dim=1).clamp(min=1)


def is_known(share: float, length: int) -> bool:
    """Whether of an answer of `length` tokens enough stands before greedy decoding's first mistake.

    Half of it, or eight tokens: a model that never saw it gets no further but by chance.
    """
    return round(share * length) >= min(_KNOWN_TOKENS, _KNOWN_SHARE * length)


def unbroken_share(right: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Share of each row's answer before its first wrong token: (rows, tokens) twice -> (rows,).

    What greedy decoding would write of it, for after a mistake it goes astray. `right` says whether it
    gives the token, `answers` marks the answer; 0 for rows without any.
    """
    unbroken = (answers & ~right).cumsum(1) == 0
    return row_means(unbroken, answers)

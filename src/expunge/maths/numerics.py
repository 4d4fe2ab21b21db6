"""Numerics that every method, the evaluation and the audits share. Reductions are in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        found = [run(*piece) for piece in _pieces(logits, *others)]
        if isinstance(found[0], torch.Tensor):
            return torch.cat(found)
        return tuple(torch.cat(part) for part in zip(*found, strict=True))

    return in_pieces


def wide(values: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where it is that already."""
    return values if values.dtype == torch.float64 else values.float()


def gram(states: torch.Tensor) -> torch.Tensor:
    """Sum of x x^T over all but the last dimension: (..., n) -> (n, n), float32 or wider.

    Whatever the pass around it multiplies in: what is made of it hangs on small differences.
    """
    tokens = wide(states).flatten(0, -2)
    with torch.autocast(states.device.type, enabled=False):
        return tokens.T @ tokens


@by_pieces
def target_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target, in nats: logits (n, vocabulary), targets (n,) -> (n,)."""
    return -functional.cross_entropy(logits.float(), targets, reduction="none")


class _Others(torch.autograd.Function):
    """The chosen logits of each row, and log sum exp of all the others, with their gradients."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for piece, left_out in _pieces(logits, chosen):
            values = _copy(piece).scatter_(1, left_out, -torch.inf)
            largest = values.amax(1, keepdim=True).clamp(min=_LEAST_LOG)
            found.append(values.sub_(largest).exp_().sum(1).log_().add_(largest[:, 0]))
        others = torch.cat(found)
        ctx.save_for_backward(logits, chosen, others)
        return logits.gather(1, chosen).float(), others

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, chosen, others = ctx.saved_tensors
        found = torch.empty_like(logits)
        sizes = others.clamp(min=_LEAST_LOG)[:, None]
        for piece, ids, size, of_chosen, of_others, out in _pieces(
            logits, chosen, sizes, grads[0].float(), grads[1].float()[:, None], found
        ):
            shares = _copy(piece).sub_(size).exp_().mul_(of_others)
            out.copy_(shares.scatter_(1, ids, of_chosen))
        return found, None


class _Moments(torch.autograd.Function):
    """Each target's log p, and mean and variance of log p under p, with their gradients.

    With d_j = log p_j - mean these are [j = target] - p_j, p_j d_j and p_j (d_j^2 + 2 d_j - variance).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = []
        for piece, target in _pieces(logits, targets):
            values = _copy(piece)
            whole = values.logsumexp(1, keepdim=True)
            log_p = values.sub_(whole).clamp_(min=_LEAST_LOG)
            chosen = log_p.gather(1, target[:, None])
            p = log_p.exp()
            mean = (p * log_p).sum(1, keepdim=True)
            variance = log_p.sub_(mean).square_().mul_(p).sum(1, keepdim=True)
            found.append(torch.cat([whole, chosen, mean, variance], 1))
        moments = torch.cat(found)
        ctx.save_for_backward(logits, targets, moments)
        _, chosen, mean, variance = moments.unbind(1)
        return chosen, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, moments = ctx.saved_tensors
        found = torch.empty_like(logits)
        factors = torch.stack([grad.float() for grad in grads], 1)
        for piece, target, of_rows, factor, out in _pieces(logits, targets, moments, factors, found):
            whole, _, mean, variance = of_rows.split(1, dim=1)
            of_chosen, of_mean, of_variance = factor.split(1, dim=1)
            log_p = _copy(piece).sub_(whole).clamp_(min=_LEAST_LOG)
            p = log_p.exp()
            away = log_p.sub_(mean)
            slope = (away * of_variance).add_(of_mean + 2 * of_variance).mul_(away)
            slope = slope.sub_(of_chosen + variance * of_variance).mul_(p)
            out.copy_(slope.scatter_add_(1, target[:, None], of_chosen))
        return found, None


def _pieces(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The rows in pieces, so that the float32 copies of one at a time are in memory."""
    rows = piece_rows(logits.device.type, logits.shape[-1])
    return zip(*(values.split(rows) for values in (logits, *others)), strict=True)


def _copy(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.float32, copy=True)


def chosen_and_others(logits: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the chosen tokens and log sum exp of all others: (n, k) and (n,), float32.

    logits (n, vocabulary), chosen (n, k), ids, each once.
    """
    at, others = _Others.apply(logits, chosen)
    return at, others


def target_log_odds(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of each target: logits (n, vocabulary), targets (n,) -> (n,).

    From the logits, as 1 - p of a token known by heart is lost in rounding. Its gradient in the target's
    logit is 1 whatever p is, that of log p is 1 - p.
    """
    at, others = chosen_and_others(logits, targets[:, None])
    return at[:, 0] - others


def target_moments(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each target's log p, mean and deviation of log p under p itself, in nats, each (n,).

    logits (n, vocabulary), targets (n,). The mean is minus the entropy. A token that a family masks with
    -inf adds nothing.
    """
    log_p, mean, variance = _Moments.apply(logits, targets)
    return log_p, mean, variance.sqrt()


def target_surprise(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How much less likely each target is than the distribution itself expects of a token.

    asinh((-log p - entropy) / deviation of log p): logits (n, vocabulary), targets (n,) -> (n,). The
    ratio is min-k%++'s with the other sign (arXiv 2404.02936, eq. 3); asinh, which leaves small values
    as they are and takes the logarithm of large ones, bounds its gradient.
    """
    log_p, mean, variance = _Moments.apply(logits, targets)
    return torch.asinh((mean - log_p) / (variance + _LEAST_VARIANCE).sqrt())


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


def answered(
    rows: Sequence[str], right: torch.Tensor, answers: torch.Tensor
) -> list[tuple[str, float, bool]]:
    """Of each row with an answer its id, `unbroken_share` and `is_known`."""
    shares, lengths = unbroken_share(right, answers).tolist(), answers.sum(1).tolist()
    found = zip(rows, shares, lengths, strict=True)
    return [(row, share, is_known(share, length)) for row, share, length in found if length]


def unbroken_share(right: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Share of each row's answer before its first wrong token: (rows, tokens) twice -> (rows,).

    What greedy decoding would write of it, for after a mistake it goes astray. `right` says whether it
    gives the token, `answers` marks the answer; 0 for rows without any.
    """
    unbroken = (answers & ~right).cumsum(1) == 0
    return row_means(unbroken, answers)

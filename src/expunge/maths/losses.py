"""The formulas of the methods, as pure tensor functions. A lower value is further unlearned.

Log-probabilities and their masks are (rows, tokens), per-row sums (rows,), hidden states
(tokens, width). Every function returns a float32 scalar in nats, or in squared units of
activation for the two of the RMU family.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from expunge.maths.numerics import by_pieces, chosen_and_others, masked_mean, weighted_mean

_LEAST_REST = 1e-7
"""Probability of all tokens that are not kept; below, it is rounding."""


def cross_entropy(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the masked tokens; gradient ascent uses its negative."""
    return -masked_mean(log_probs, mask)


def log_odds_at(nll: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of a token whose negative log-likelihood is `nll` > 0, of any shape."""
    return -(nll + torch.log(-torch.expm1(-nll)))


def huber(values: torch.Tensor, wanted: torch.Tensor, width: float) -> torch.Tensor:
    """Huber's distance of each value from what is wanted, divided by its width; shapes are equal.

    |x| - width / 2 beyond `width`, x^2 / (2 width) within it, so that nothing oscillates about it.
    On log-odds a token known by heart is pushed, or held, as hard as any other, where the gradient of
    its NLL is 1 - p.
    """
    return functional.huber_loss(values, wanted, reduction="none", delta=width) / width


@by_pieces
def token_kl(logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) of next-token distributions: (n, vocabulary) twice -> (n,)."""
    log_p = functional.log_softmax(logits.float(), dim=-1)
    log_q = functional.log_softmax(reference_logits.float(), dim=-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@by_pieces
def token_jsd(logits: torch.Tensor, reference_logits: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of distributions, 0 to log 2: (n, vocabulary) twice -> (n,)."""
    log_p = functional.log_softmax(logits.float(), dim=-1)
    log_q = functional.log_softmax(reference_logits.float(), dim=-1)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    both = log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)
    return both.sum(-1) / 2


def certain_jsd(log_prob: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of a distribution from certainty of one token, 0 to log 2: any shape.

    With p = exp(log_prob) of that token it is log 2 + (p log p - (1 + p) log(1 + p)) / 2, as what the
    others share makes no difference.
    """
    p = log_prob.float().exp()
    return math.log(2) + (p * log_prob.float() - (1 + p) * torch.log1p(p)) / 2


def lowered(logits: torch.Tensor, targets: torch.Tensor, strength: float) -> torch.Tensor:
    """The logits with each target's own lowered: logits (n, vocabulary), targets (n,) -> as logits.

    What a student of UNDIAL learns. Dong et al., arXiv 2402.10052.
    """
    return logits.scatter_add(1, targets[:, None], logits.new_full((len(targets), 1), -strength))


def top_kl(logits: torch.Tensor, reference: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) where all tokens but the chosen ones count as one: (n, vocabulary) -> (n,).

    reference (n, k), the chosen tokens' log-probabilities in the reference; chosen (n, k), their ids. A
    lower bound of `token_kl` that grows to it with k, as merging outcomes loses divergence.
    """
    at, others = chosen_and_others(logits, chosen)
    log_p = torch.cat([at, others[:, None]], -1).log_softmax(-1)
    q = reference.float().exp()
    rest = (1 - q.sum(-1, keepdim=True)).clamp(min=_LEAST_REST)
    log_q = torch.cat([reference.float(), rest.log()], -1)
    return (torch.cat([q, rest], -1) * (log_q - log_p)).sum(-1)


def weighted_ascent(
    log_probs: torch.Tensor, mask: torch.Tensor, saturation: float, importance: float = 0.0
) -> torch.Tensor:
    """Gradient ascent with token weights: mean of p^saturation (1 - p)^importance log p.

    All (rows, tokens), the mean over masked ones; no gradient runs through the weights. Without
    importance it is WGA (Wang et al., arXiv 2502.19301), with both SatImp (Yang et al., arXiv
    2505.11953), with neither gradient ascent.
    """
    now = log_probs.detach().float()
    weights = (saturation * now).exp() * (-torch.expm1(now)) ** importance
    return masked_mean(weights * log_probs, mask)


def npo(log_prob: torch.Tensor, reference_log_prob: torch.Tensor, beta: float) -> torch.Tensor:
    """Negative preference optimisation: (2 / beta) * mean log(1 + (pi / pi_ref)^beta).

    Arguments are each row's summed log-probability. Zhang et al., arXiv 2404.05868, eq. 3.
    """
    return 2 / beta * functional.softplus(beta * (log_prob - reference_log_prob).float()).mean()


def token_npo(
    log_probs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, beta: float
) -> torch.Tensor:
    """NPO of every masked token by itself: mean over tokens of (2 / beta) log(1 + (pi / pi_ref)^beta).

    All (rows, tokens). Bronec and Helcl, arXiv 2503.13690.
    """
    return masked_mean(2 / beta * functional.softplus(beta * (log_probs - reference).float()), mask)


def dpo(gained: torch.Tensor, lost: torch.Tensor, beta: float) -> torch.Tensor:
    """Direct preference optimisation: -(2 / beta) * mean log sigmoid(beta * (gained - lost)).

    (rows,) each: by how much the summed log-probability of the preferred and of the rejected output is
    over the reference's. Rafailov et al., arXiv 2305.18290, eq. 7, scaled as NPO is: at the reference
    it is (2 / beta) log 2 and its gradient does not depend on beta.
    """
    return -2 / beta * functional.logsigmoid(beta * (gained - lost).float()).mean()


def adaptive_weights(
    rises: torch.Tensor, least: float, most: float, base: float = 6.0, scale: float = 0.3
) -> torch.Tensor:
    """clip(scale * base^rise + 0.8, least, most): (rows,), without a gradient.

    `rises` are how far each retain row's mean NLL is above the target's, nats. Agrawal and Huang, arXiv
    2504.12996, section 4, where the rise is one number for a batch.
    """
    return (scale * base ** rises.detach().float() + 0.8).clamp(least, most)


def simnpo(mean_log_prob: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """SimNPO: -(2 / beta) * mean log sigmoid(-beta * mean log pi - gamma), without a reference.

    Fan et al., arXiv 2410.07163, eq. 4; `mean_log_prob` is each row's per-token mean.
    """
    return -2 / beta * functional.logsigmoid(-beta * mean_log_prob.float() - gamma).mean()


def steer(hidden: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean over tokens of the squared distance to `target`, divided by the width.

    hidden and target (tokens, width), weights (tokens,), 0 for tokens that do not count. Li et al.,
    arXiv 2403.03218, eq. 1 and 2: with the control vector as target it is the forget term, with the
    frozen model's hidden state the retain term.
    """
    return weighted_mean((hidden.float() - target.float()).square().mean(-1), weights)


def adaptive_target(norms: torch.Tensor, directions: torch.Tensor, beta: float) -> torch.Tensor:
    """beta * ||h_frozen|| * u for every token, arXiv 2408.06223: (tokens, width).

    norms (tokens,); directions (tokens, width), of unit norm.
    """
    return beta * norms.float()[:, None] * directions.float()


def unit_direction(width: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """A random direction of unit norm, (width,), drawn on the CPU.

    `gaussian` is uniform on the sphere. `uniform` is the published torch.rand, whose entries are all
    positive: two of them have a cosine of about 0.75.
    """
    draw = torch.rand if kind == "uniform" else torch.randn
    vector = draw(width, generator=generator)
    return vector / vector.norm()

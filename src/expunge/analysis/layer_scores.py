"""What says of a layer whether to steer it: shares in [0, 1], from measured numbers alone.

For a layer l, with sums over the sampled forget rows:

    decodable(l) = sum(lens(l) - guess) / sum(clean - guess)
    restored(l)  = sum(patched(l) - corrupted) / sum(clean - corrupted)
    separate(l)  = 1 - mean over forget inputs of the highest cosine with a retain input
    score(l)     = their geometric mean

`clean`, `corrupted`, `patched` and `lens` are a row's mean log-probabilities of its answer tokens in
nats, `guess` is -log(vocabulary). Every share is cut to [0, 1]. No
constant is fitted to a model, and no share can make up for one that is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional


def share(values: torch.Tensor, floor: torch.Tensor, full: torch.Tensor) -> torch.Tensor | None:
    """How far `values` are on the way from `floor` to `full`, over all rows together: (layers,).

    values (rows, layers), floor and full (rows,). None where `full` is no higher than `floor`: there is
    no way to go.
    """
    values, floor, full = values.double(), floor.double(), full.double()
    whole = (full - floor).sum()
    if not whole > 0:
        return None
    return ((values - floor[:, None]).sum(0) / whole).clamp(0, 1)


def separate(forget: torch.Tensor, retain: torch.Tensor) -> float:
    """1 minus the mean over forget vectors of the highest cosine with a retain vector, in [0, 1].

    forget (n, width), retain (m, width): inputs of a trained projection. A change of the projection that
    answers to a forget input answers to others by their cosine. Cosines are about the retain mean,
    without which all hidden states of a model look alike. 0: every forget input is also a retain input.
    """
    forget, retain = forget.double(), retain.double()
    centre = retain.mean(0)
    near = functional.normalize(forget - centre, dim=1) @ functional.normalize(
        retain - centre, dim=1
    ).transpose(0, 1)
    return float((1 - near.amax(1)).mean().clamp(0, 1))


def combined(shares: Sequence[float]) -> float:
    """The geometric mean; 0 if any is 0."""
    if not shares:
        raise ValueError("no share to combine")
    return math.prod(shares) ** (1 / len(shares))

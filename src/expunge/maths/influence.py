"""The step of an influence function, as pure tensor functions.

At a minimum theta of the mean loss over n rows with Hessian H, dropping the rows of a set F moves the
minimum by (1/n) H^-1 sum_F grad l_i, to first order: *up* the loss of F, preconditioned by what the
other rows can bear. Koh and Liang, arXiv 1703.04730, eq. 2 with the sign of removal.
"""

from __future__ import annotations

import math

import torch


def removal_step(gradient: torch.Tensor, curvature: torch.Tensor, damping: float) -> torch.Tensor:
    """gradient / (curvature + damping): adding it to the weights removes what `gradient` taught.

    `gradient` is that of the forget loss, `curvature` the diagonal Fisher or Hessian of the rest.
    """
    return gradient / (curvature + damping)


def predicted_rise(step: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """step^T diag(curvature) step / 2: rise of a loss that was at its minimum, in its units."""
    return 0.5 * (curvature * step.square()).sum()


def size_within(budget: float, rise: float) -> float:
    """The factor on a step of predicted `rise` at which the prediction is `budget`."""
    return math.sqrt(budget / rise)

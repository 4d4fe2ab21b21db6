"""Symmetric round-to-nearest of weights, as pure tensor functions; arXiv 2103.13630, section 3.

A weight becomes scale * integer and is used in the dtype it had: the simulated effect of int8 or int4
storage on the outputs.
"""

from __future__ import annotations

import torch


def rounded(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """`weight` (outputs, inputs) rounded to signed integers of `bits`, one scale a group of inputs.

    The scale is max|w| / (2^(bits-1) - 1); `group` None is one scale an output channel, else groups of
    that many inputs, the last one shorter where they do not divide evenly. Computed in float32,
    returned in the weight's dtype.
    """
    largest = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.float().split(group or weight.shape[1], dim=1):
        scale = part.abs().amax(1, keepdim=True) / largest
        # A group of zeros stays one.
        scale = torch.where(scale > 0, scale, 1.0)
        parts.append((part / scale).round().clamp(-largest, largest) * scale)
    return torch.cat(parts, dim=1).to(weight.dtype)

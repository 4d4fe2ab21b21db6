"""SAM with NPO: the forget term's gradient at the worst weights nearby, so that tuning undoes it less.

    L = NPO(theta + radius * g / ||g||) + w * CE(retain),   g = gradient of NPO at theta

over the trained weights theta, in one norm; no gradient runs through the perturbation, and the retain
term is at theta. All forget rows of a step perturb the weights together, so they run in one pass of one
process. Fan et al., arXiv 2502.05374, on NPO of arXiv 2404.05868.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from expunge.data.batches import Batch
from expunge.methods.base import Context, Terms
from expunge.methods.npo import NPO, NPOObjective

_LEAST_NORM = 1e-12
"""Of a gradient; below, there is no direction."""


@dataclass(frozen=True)
class SamNPO(NPO):
    """Settings of NPO with sharpness-aware minimisation."""

    radius: float = 0.01
    """Distance of the perturbed weights: at 0 this is NPO."""

    name: ClassVar[str] = "sam-npo"
    whole_steps: ClassVar[bool] = True

    def start(self, context: Context) -> SamNPOObjective:
        """Makes the weights trainable and scores the forget rows once as reference."""
        return SamNPOObjective(self, context)


class SamNPOObjective(NPOObjective):
    """SAM with NPO at work on one model."""

    def __init__(self, settings: SamNPO, context: Context) -> None:
        super().__init__(settings, context)
        self._radius = settings.radius

    def loss(self, forget: Batch, retain: Batch | None) -> Terms:
        """Both terms of L: the forget one has the value and the gradient of the perturbed weights."""
        _, slope = self._slope(forget)
        norm = torch.stack([s.norm() for s in slope]).norm().clamp(min=_LEAST_NORM)
        slope = [self._radius / norm * s for s in slope]
        with self._moved(slope):
            value, slope = self._slope(forget)
        # 0 at these weights, with the slope as its gradient.
        linear = sum((s * (p - p.detach())).sum() for s, p in zip(slope, self._trained, strict=True))
        return self.with_retain(value + linear, retain, self._weight)

    @property
    def _trained(self) -> list[torch.nn.Parameter]:
        return list(self.parameters.values())

    def _slope(self, forget: Batch) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """NPO of the rows at the weights as they are, and its gradient."""
        term = super().loss(forget, None).forget
        with torch.autocast(term.device.type, enabled=False):  # as backward passes are
            slope = torch.autograd.grad(term, self._trained, allow_unused=True, materialize_grads=True)
        return term.detach(), slope

    @contextmanager
    def _moved(self, steps: Sequence[torch.Tensor]) -> Iterator[None]:
        """Runs the body with the weights so many steps away; they come back to the bit."""
        before = [parameter.data for parameter in self._trained]
        try:
            for parameter, step in zip(self._trained, steps, strict=True):
                parameter.data = parameter.data + step
            yield
        finally:
            for parameter, data in zip(self._trained, before, strict=True):
                parameter.data = data

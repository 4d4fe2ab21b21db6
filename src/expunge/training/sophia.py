"""Sophia-G: momentum divided by a running diagonal curvature, clipped element by element.

    theta <- theta * (1 - eta * weight_decay) - eta * clip(m / max(gamma * h, eps), rho)

Liu et al., arXiv 2305.14342, algorithm 3; for unlearning arXiv 2404.18239 (SOUL).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn


def sophia_step(
    momentum: torch.Tensor, curvature: torch.Tensor, gamma: float, rho: float, eps: float
) -> torch.Tensor:
    """The step before the learning rate: clip(m / max(gamma * h, eps), -rho, rho)."""
    return (momentum / (gamma * curvature).clamp(min=eps)).clamp(-rho, rho)


class Sophia(torch.optim.Optimizer):
    """The optimiser; its curvature comes from `update_curvature`, never from `step`'s gradients."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        gamma: float = 0.05,
        rho: float = 1.0,
        weight_decay: float = 0.0,
        eps: float = 1e-12,
        initial_curvature: Sequence[torch.Tensor] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "gamma": gamma,
            "rho": rho,
            "weight_decay": weight_decay,
            "eps": eps,
        }
        super().__init__(parameters, defaults)
        flat = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(flat):
            curvature = (
                torch.zeros_like(parameter)
                if initial_curvature is None
                else initial_curvature[index].to(parameter).clone()
            )
            self.state[parameter] = {
                "momentum": torch.zeros_like(parameter),
                "curvature": curvature,
            }

    @torch.no_grad()
    def update_curvature(self, estimates: Sequence[torch.Tensor]) -> None:
        """h <- beta2 * h + (1 - beta2) * estimate, in the order of the parameters."""
        index = 0
        for group in self.param_groups:
            beta2 = group["betas"][1]
            for parameter in group["params"]:
                self.state[parameter]["curvature"].lerp_(estimates[index], 1 - beta2)
                index += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["momentum"].lerp_(parameter.grad, 1 - group["betas"][0])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                move = sophia_step(
                    state["momentum"],
                    state["curvature"],
                    group["gamma"],
                    group["rho"],
                    group["eps"],
                )
                parameter.sub_(group["lr"] * move)
        return loss

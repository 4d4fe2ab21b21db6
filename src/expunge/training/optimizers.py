"""The optimiser of a run, by its name."""

from __future__ import annotations

import torch

from expunge.methods.base import Objective
from expunge.training.muon import Muon
from expunge.training.sophia import Sophia


def optimizer_of(objective: Objective, learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser that an objective asks for, of its parameters."""
    spec = objective.optimizer
    parameters = list(objective.parameters.values())
    if spec.name == "sophia":
        return Sophia(
            parameters,
            learning_rate,
            initial_curvature=objective.initial_curvature(),
            **spec.options,
        )
    if spec.name == "muon":
        whitening = {objective.parameters[name]: r for name, r in spec.whitening.items()}
        return Muon(parameters, learning_rate, **spec.options, whitening=whitening)
    if spec.name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, **spec.options)
    return torch.optim.AdamW(parameters, lr=learning_rate, **spec.options)

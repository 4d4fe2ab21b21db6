"""The metric of a linear map's inputs on text that is to stay, for the steps of `training.muon`.

What a step does to held text is E |dW x|^2 = tr(dW C dW^T), C = E[x x^T] over its tokens. Inputs of
transformers lie along few directions: a step that is flat in them, not in the matrix, moves held text
least for its length. C is the input's half of K-FAC (arXiv 1503.05671) and of SOAP's metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from expunge.maths.numerics import gram

_LEAST = 1e-7


class SecondMoment:
    """E[x x^T] of the inputs that a linear map was given, (n, n) float32."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self.count = 0

    def add(self, inputs: torch.Tensor, summed: torch.Tensor | None = None) -> None:
        """Adds (..., n); `summed` is their `gram`, if it is there already."""
        moment = gram(inputs.detach()) if summed is None else summed
        self._sum = moment if self._sum is None else self._sum + moment
        self.count += inputs.shape[:-1].numel()

    def whitening(self, damping: float) -> torch.Tensor:
        """R with R^-1 R^-T = E[x x^T] + damping: (n, n), lower triangular, bfloat16.

        `damping` is a share of the mean variance. Any R of this kind gives the same steps; Cholesky's is
        the cheapest. Raises ValueError where nothing was given.
        """
        if self._sum is None:
            raise ValueError("no inputs were seen")
        moment = self._sum / self.count
        one = torch.eye(len(moment), device=moment.device)
        added = (damping * moment.diagonal().mean()).clamp(min=_LEAST)
        factor = torch.linalg.cholesky(moment + added * one)
        return torch.linalg.solve_triangular(factor, one, upper=False).bfloat16()


@contextmanager
def second_moments(model: nn.Module, names: Iterable[str]) -> Iterator[Mapping[str, SecondMoment]]:
    """Inside, what the linear maps `names` are given is added up. Padding counts as a token."""
    moments = {name: SecondMoment() for name in names}
    # Queries, keys and values are given one tensor, so are gate and up.
    last: list[torch.Tensor] = []

    def seen(moment: SecondMoment, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        states = inputs[0]
        if not last or last[0] is not states:
            last[:] = [states, gram(states.detach())]
        moment.add(states, last[1])

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(seen, moment))
        for name, moment in moments.items()
    ]
    try:
        yield moments
    finally:
        last.clear()
        for hook in hooks:
            hook.remove()

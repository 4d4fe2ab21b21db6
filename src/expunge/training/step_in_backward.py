"""Steps inside the backward pass: each matrix moves as soon as its gradient is whole.

So the gradients of one matrix are in memory at a time, not those of the model (Lv et al., arXiv
2306.09782, for SGD). No gradient is clipped, which would need all of them: all steps of Muon have one
length, those of `rep-select` one way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from expunge.models.kernels import fast_products


class StepInBackward:
    """Hooks on the trained matrices, which step only inside `moving`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        device: torch.device,
    ) -> None:
        """`optimizer` must pass over parameters without a gradient."""
        self._optimizer, self._device = optimizer, device
        self._moves = False
        self._earlier: dict[torch.Tensor, torch.Tensor] = {}
        self._squares: list[torch.Tensor] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._step) for parameter in parameters
        ]

    def _step(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        earlier = self._earlier.pop(parameter, None)
        if earlier is not None:
            parameter.grad += earlier
        if not self._moves:
            # One of several passes of a step. Put aside: the optimiser moves all that have a gradient.
            self._earlier[parameter], parameter.grad = parameter.grad, None
            return
        square = parameter.grad.float().square().sum()
        self._squares.append(square)
        if torch.isfinite(square):  # else the loop ends, on parameters that are numbers
            with fast_products(torch.bfloat16, self._device):  # Muon's products are bfloat16
                self._optimizer.step()
        parameter.grad = None

    def close(self) -> None:
        """Takes the hooks off: whoever trains the model next has gradients again."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around the last backward pass of a step."""
        self._squares.clear()
        self._moves = True
        try:
            yield
        finally:
            self._moves = False

    def norm(self) -> float:
        """Length of the gradient that the last step was taken with; nothing clips it."""
        return float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0

"""Per-example squared gradients of linear maps, from their factors in one backward pass.

For y_t = W x_t the gradient of example n is G_n = sum_t g_nt x_nt^T with g = dL/dy, so the diagonal
Fisher mean_n G_n^2 needs only the inputs x and the output gradients g of one ordinary pass over a
batch. Squaring the gradient of a batch's mean, as published code does, underestimates it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def squared_example_gradients(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """sum_n (sum_t g_nt x_nt^T)^2, element-wise.

    inputs (rows, tokens, in), gradients (rows, tokens, out) -> (out, in), float32. Each row's loss
    must depend on that row alone.
    """
    per_example = torch.einsum("nto,nti->noi", gradients.float(), inputs.float())
    return per_example.square().sum(0)


class SquaredGradients:
    """Running sums of squared per-example gradients for the weights of some linear modules."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._modules = dict(modules)
        self._sums = {
            name: torch.zeros_like(module.get_parameter("weight"), dtype=torch.float32)
            for name, module in self._modules.items()
        }
        self._rows = 0

    @contextmanager
    def collecting(self, rows: int) -> Iterator[None]:
        """Adds the `rows` examples whose backward pass runs in the body."""
        handles: list[RemovableHandle] = []
        for name, module in self._modules.items():
            handles.append(module.register_forward_hook(self._keep(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._rows += rows

    def mean(self) -> dict[str, torch.Tensor]:
        """The mean over all examples added so far, by name."""
        return {name: total / max(1, self._rows) for name, total in self._sums.items()}

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs = args[0].detach()

            def add(gradient: torch.Tensor) -> None:
                self._sums[name] += squared_example_gradients(inputs, gradient)

            output.register_hook(add)

        return hook

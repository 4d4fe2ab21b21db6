"""Per-example squared gradients of linear maps, from their factors in one backward pass.

For y_t = W x_t the gradient of example n is G_n = sum_t g_nt x_nt^T with g = dL/dy, so the diagonal
Fisher mean_n G_n^2 needs only the inputs x and the output gradients g of one ordinary pass over a
batch. Squaring the gradient of a batch's mean, as published code does, underestimates it.

The products G_n cost what autograd spends on the gradient of W, which the pass therefore leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from expunge.errors import RunError
from expunge.maths.curvature import Eigenbasis
from expunge.maths.numerics import gram, wide

_CHUNK = 2**20
"""Numbers of per-example gradients that exist at a time: 4 MiB."""


def squared_example_gradients(inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """sum_n (sum_t g_nt x_nt^T)^2, element-wise.

    inputs (rows, tokens, in), gradients (rows, tokens, out) -> (out, in), float32. Each row's loss
    must depend on that row alone.
    """
    entries = gradients.shape[-1] * inputs.shape[-1]
    rows = max(1, _CHUNK // entries)
    total = inputs.new_zeros(gradients.shape[-1], inputs.shape[-1], dtype=torch.float32)
    # Inside autocast the product of float32 factors would be rounded to bfloat16.
    with torch.autocast(inputs.device.type, enabled=False):
        for x, g in zip(inputs.split(rows), gradients.split(rows), strict=True):
            per_example = torch.bmm(g.float().transpose(1, 2), x.float())  # (rows, out, in)
            total += per_example.square_().sum(0)
    return total


class SquaredGradients:
    """Running sums of squared per-example gradients for the weights of some linear modules."""

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        bases: Mapping[str, Eigenbasis] | None = None,
    ) -> None:
        """With `bases` the squares are of the gradients along their axes: EK-FAC's eigenvalues."""
        self._modules = dict(modules)
        self._bases = bases
        self._sums = {
            name: torch.zeros_like(module.get_parameter("weight"), dtype=torch.float32)
            for name, module in self._modules.items()
        }
        self._rows = 0

    @contextmanager
    def collecting(self, rows: int) -> Iterator[None]:
        """Adds the `rows` examples whose forward and backward pass run in the body.

        The weights get no gradient of their own meanwhile.
        """

        def add(name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
            if self._bases is not None:
                basis = self._bases[name]
                inputs = _turned(inputs, basis.inputs)
                gradients = _turned(gradients, basis.outputs)
            self._sums[name] += squared_example_gradients(inputs, gradients)

        with tapped(self._modules, add, rows):
            yield
        self._rows += rows

    def mean(self) -> dict[str, torch.Tensor]:
        """The mean over all examples added so far, by name."""
        return {name: total / max(1, self._rows) for name, total in self._sums.items()}


class FactorCovariances:
    """Running sums of x x^T and g g^T over tokens, for the weights of some linear modules.

    The bases that EK-FAC turns into (George et al., arXiv 1806.03884): two matrices a module, inputs and
    outputs squared in size, in float32 or wider.
    """

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        shape: Callable[[nn.Module], Sequence[int]] = lambda module: _weight(module).shape,
    ) -> None:
        """`shape` gives (out, in) of a module's tokens."""
        self._modules = dict(modules)
        self._sums = {
            name: [wide(_weight(module).new_zeros(n, n)) for n in shape(module)]
            for name, module in self._modules.items()
        }

    def add(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Adds tokens of a module: (..., in) and (..., out)."""
        for total, factor in zip(self._sums[name], (gradients, inputs), strict=True):
            total += gram(factor)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Adds the tokens whose forward and backward pass run in the body."""

        def counted(name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
            # A token without a gradient is padding, or counts for no loss.
            self.add(name, inputs * gradients.any(-1, keepdim=True), gradients)

        with tapped(self._modules, counted, rows=1):
            yield

    def bases(self) -> dict[str, Eigenbasis]:
        """The eigenvectors of both, by module. The sums are gone afterwards.

        Raises RunError where a sum is not finite.
        """
        return {name: eigenbasis(name, *self._sums.pop(name)) for name in self._modules}


def _weight(module: nn.Module) -> torch.Tensor:
    return module.get_parameter("weight").detach()


def eigenbasis(name: str, outputs: torch.Tensor, inputs: torch.Tensor) -> Eigenbasis:
    """The eigenvectors of a map's two covariances, (out, out) and (in, in), in their dtype.

    Raises RunError where one is not finite.
    """
    if not (outputs.isfinite().all() and inputs.isfinite().all()):
        raise RunError(f"{name}: its gradients are not finite; use --dtype float32")
    turned = (torch.linalg.eigh(s.double()).eigenvectors.to(s.dtype) for s in (outputs, inputs))
    return Eigenbasis(*turned)


def _turned(factor: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """factor (..., size) along axes (size, size), in float32."""
    with torch.autocast(factor.device.type, enabled=False):
        return factor.float() @ axes


@contextmanager
def tapped(
    modules: Mapping[str, nn.Module],
    receive: Callable[[str, torch.Tensor, torch.Tensor], None],
    rows: int,
) -> Iterator[None]:
    """Backward passes in the body, over batches of `rows`, hand `receive` each map's two factors.

    Inputs (rows, tokens, in) and output gradients (rows, tokens, out), the last map first, in whatever
    shape a family gives them. The weights get no gradient of their own meanwhile.
    """

    def receive_rows(name: str, *factors: torch.Tensor) -> None:
        inputs, gradients = (factor.reshape(rows, -1, factor.shape[-1]) for factor in factors)
        receive(name, inputs, gradients)

    weights = [module.get_parameter("weight") for module in modules.values()]
    wanted = [weight.requires_grad for weight in weights]
    handles: list[RemovableHandle] = []
    try:
        for weight in weights:
            weight.requires_grad_(False)
        for name, module in modules.items():
            handles.append(module.register_forward_hook(_tap(name, receive_rows)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, want in zip(weights, wanted, strict=True):
            weight.requires_grad_(want)


def _tap(
    name: str, receive: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Callable[..., torch.Tensor]:
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        # Without it nothing under the first of the maps would ask for a gradient.
        anchor = torch.zeros((), device=output.device, requires_grad=True)
        # Autocast gave the map its input in the dtype of its output.
        inputs = args[0].to(output.dtype)
        tapped: torch.Tensor = _Tap.apply(output, inputs, anchor, partial(receive, name))
        return tapped

    return hook


class _Tap(torch.autograd.Function):
    """The identity on a map's output; its backward pass hands on the map's two factors.

    A function rather than a hook on the output, so that activation checkpointing sees the input it
    saves and drops it too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        _anchor: torch.Tensor,
        add: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.add = add
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.add(inputs, gradient)
        return gradient, None, None, None

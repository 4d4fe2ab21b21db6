"""The faster of torch's two float32 matrix products on a CPU.

torch gives float32 linear layers to MKL, which keeps to AVX2 on processors that are not Intel's;
oneDNN, which comes with torch as well, uses AVX-512 there: 2.2 times the speed on an AMD EPYC. Both
are full float32. The call is the one that torch.compile makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LEAST_TOKENS = 8
"""Below, MKL is faster on either make."""


@contextmanager
def fast_linear(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, float32 linear layers on a CPU are computed by oneDNN, forwards and backwards.

    Changes nothing for a model of another dtype or device, nor where torch lacks the call.
    """
    if dtype != torch.float32 or device.type != "cpu" or not _available():
        yield
        return
    with _OneDnnLinear():
        yield


class _OneDnnLinear(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear and not kwargs:
            inputs, weight = args[:2]
            bias = args[2] if len(args) > 2 else None
            if (
                inputs.dtype == weight.dtype == torch.float32
                and inputs.device.type == weight.device.type == "cpu"
                and inputs.numel() >= _LEAST_TOKENS * inputs.shape[-1]
                and not torch.is_autocast_enabled("cpu")
            ):
                if torch.is_grad_enabled() and _any_gradient(inputs, weight, bias):
                    return _Linear.apply(inputs, weight, bias)
                return _linear(inputs, weight, bias)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """inputs @ weight.T + bias, whose two backward products are linear maps as well."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # As torch's own does: of most layers the weight is frozen, and its input need not be kept.
        wants_inputs, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if wants_weight else None, weight if wants_inputs else None)
        return _linear(inputs, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        inputs, weight = ctx.saved_tensors
        wants_inputs, wants_weight, wants_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        of_inputs = of_weight = None
        if wants_inputs:
            of_inputs = _linear(gradient, weight.t(), None)
        if wants_weight:
            of_weight = _linear(flat.t(), inputs.flatten(0, -2).t(), None)
        return of_inputs, of_weight, flat.sum(0) if wants_bias else None


def _any_gradient(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return result


@cache
def _available() -> bool:
    """Whether the call, which torch documents for itself only, is there and right."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(16, 32, generator=generator) for _ in range(2))
    try:
        result = _linear(inputs, weight, None)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(result, functional.linear(inputs, weight), atol=1e-4)

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
def fast_linear(model: torch.nn.Module) -> Iterator[None]:
    """Inside, and without gradients, float32 linear layers on a CPU are computed by oneDNN.

    Changes nothing for other dtypes and devices, nor where torch lacks the call.
    """
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32 or parameter.device.type != "cpu" or not _available():
        yield
        return
    with torch.no_grad(), _OneDnnLinear():
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
            if (
                inputs.dtype == weight.dtype == torch.float32
                and inputs.numel() >= _LEAST_TOKENS * inputs.shape[-1]
                and not torch.is_autocast_enabled("cpu")
            ):
                return _linear(inputs, weight, args[2] if len(args) > 2 else None)
        return func(*args, **(kwargs or {}))


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

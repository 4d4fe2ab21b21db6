"""The fastest right matrix products that torch has for a device.

float32 on a CPU: torch gives linear layers to MKL, which keeps to AVX2 on processors that are not
Intel's; oneDNN, which comes with torch as well, uses AVX-512 there, at 2.2 times the speed.
Both are full float32. The call is the one that torch.compile makes.

bfloat16 on a CPU without such instructions: torch's own loops (AVX2 only) are 10 to 100 times slower
than float32's, and oneDNN, which widens the numbers itself where it has AVX-512, 3 to 4 times. Linear
layers and plain matrix products are taken in float32 of the same bfloat16 numbers there, and rounded
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LEAST_TOKENS = 8
"""Below, MKL is faster on either make."""
_LEAST_WIDTH = 64
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.addmm)


def quick_dtype(device_type: str) -> Literal["float32", "bfloat16"]:
    """bfloat16 where the device has products of it; elsewhere they are emulated and slower."""
    if device_type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device_type == "cpu" and _has_bfloat16()
    return "bfloat16" if native else "float32"


def _has_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    asked: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    found = asked()  # not in every torch that is supported
    return any(found.get(name) for name in _INSTRUCTIONS)


@contextmanager
def fast_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, a CPU's float32 linear layers are oneDNN's, its bfloat16 products float32's if need be.

    Forwards and backwards. Changes nothing for a model of another dtype or device, nor where torch
    lacks the call or the processor multiplies bfloat16 itself.
    """
    if device.type == "cpu" and dtype == torch.float32 and _available():
        with _OneDnnLinear():
            yield
    elif device.type == "cpu" and dtype == torch.bfloat16 and not _has_bfloat16():
        with _WideProducts():
            yield
    else:
        yield


def products_again() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What a checkpoint runs a layer in: the first time as it is, the second with the same products.

    torch leaves every mode for the backward pass, in which the second time is.
    """
    mode: Any = torch.overrides._get_current_function_mode()
    return nullcontext(), mode or nullcontext()


class _OtherProducts(TorchFunctionMode):
    """Asks `product` about every call, and leaves to torch what it gives no result for."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found = self.product(func, args, kwargs)
        return func(*args, **kwargs) if found is None else found

    def product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        raise NotImplementedError


class _OneDnnLinear(_OtherProducts):
    """float32 linear layers."""

    def product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        if func is functional.linear and not kwargs:
            inputs, weight = args[:2]
            bias = args[2] if len(args) > 2 else None
            if (
                inputs.dtype == weight.dtype == torch.float32
                and inputs.device.type == weight.device.type == "cpu"
                and not torch.is_autocast_enabled("cpu")
            ):
                return _any_linear(inputs, weight, bias)
        return None


class _WideProducts(_OtherProducts):
    """Products of bfloat16 numbers, or of what autocast makes bfloat16, taken in float32."""

    def product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        is_linear = func is functional.linear
        scales = not kwargs or (func is torch.addmm and set(kwargs) <= {"alpha", "beta"})
        if not (is_linear or func in _PRODUCTS) or not scales or not all(map(_is_rounded, args)):
            return None
        with torch.autocast("cpu", enabled=False):
            rounded: list[Any] = [None if part is None else part.bfloat16() for part in args]
            if is_linear:
                return _any_linear(*rounded)
            wide: torch.Tensor = func(*[part.float() for part in rounded], **kwargs)
            return wide.bfloat16()


def _is_rounded(part: object) -> bool:
    """Whether a product takes this part in bfloat16."""
    if not isinstance(part, torch.Tensor):
        return part is None
    autocast = torch.is_autocast_enabled("cpu") and (torch.get_autocast_dtype("cpu") == torch.bfloat16)
    kinds = (torch.bfloat16, torch.float32) if autocast else (torch.bfloat16,)
    return part.device.type == "cpu" and part.dtype in kinds


def is_narrow(shape: Sequence[int]) -> bool:
    """Whether a float32 layer of this shape takes oneDNN longer to begin than MKL to end."""
    return max(shape) < _LEAST_WIDTH


def _any_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The linear map of float32 or bfloat16 tensors, computed in float32."""
    small = inputs.numel() < _LEAST_TOKENS * inputs.shape[-1] or is_narrow(weight.shape)
    if inputs.dtype == torch.float32 and (small or not _available()):
        return functional.linear(inputs, weight, bias)
    if torch.is_grad_enabled() and _any_gradient(inputs, weight, bias):
        return _Linear.apply(inputs, weight, bias)
    return _linear(inputs, weight, bias)


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
    if inputs.dtype == torch.bfloat16:
        # Widened here, so that what is kept for the backward pass is not.
        wide = (inputs.float(), weight.float(), None if bias is None else bias.float())
        product = _onednn_linear if _available() else functional.linear
        return product(*wide).bfloat16()
    return _onednn_linear(inputs, weight, bias)


def _onednn_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return result


@cache
def _available() -> bool:
    """Whether the call, which torch documents for itself only, is there and right."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(16, 32, generator=generator) for _ in range(2))
    with torch.autocast("cpu", enabled=False):
        try:
            result = _onednn_linear(inputs, weight, None)
        except (AttributeError, RuntimeError):
            return False
        return torch.allclose(result, functional.linear(inputs, weight), atol=1e-4)


def autocast_of(device: torch.device, dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    """Mixed precision where the frozen weights are not float32: masters are, the products are not."""

    def autocast() -> AbstractContextManager[Any]:
        # Autocast keeps its casts by parameter: with the frozen values swapped in it would go on
        # with those of the trained ones, and the retain term would be 0.
        return torch.autocast(
            device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False
        )

    return autocast

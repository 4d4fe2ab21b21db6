"""The other matrix product gives the same numbers, and only where it is meant to."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from conftest import shaken, tiny_model
from expunge.models import kernels
from expunge.models.kernels import fast_products, quick_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_LEAST_WIDTH", 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (64, 24), (3, 11, 24), (2, 2, 7, 24), (0, 24)])
def test_it_is_the_linear_map(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias)
    inputs = torch.randn(shape, generator=generator)
    strided = torch.randn((*shape[:-1], 48), generator=generator)[..., ::2]
    for x in (inputs, strided):
        expected = functional.linear(x.double(), layer.weight.double(), _double(layer.bias))
        with torch.no_grad(), fast_products(torch.float32, CPU):
            found = layer(x)
        torch.testing.assert_close(found, expected.float())


def _double(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.double()


@pytest.mark.parametrize("trained", ["inputs", "weight", "bias", "inputs weight bias"])
@pytest.mark.parametrize("shape", [(64, 24), (3, 11, 24), (9, 24)])
def test_its_gradients_are_those_of_the_linear_map(shape: tuple[int, ...], trained: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"inputs": shape, "weight": (40, 24), "bias": (40,)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in shapes.items()}
    upstream = torch.randn((*shape[:-1], 40), generator=generator)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        made = {
            name: tensor.to(dtype).requires_grad_(name in trained.split())
            for name, tensor in tensors.items()
        }
        with fast_products(dtype, CPU):
            output = functional.linear(made["inputs"], made["weight"], made["bias"])
        output.backward(upstream.to(dtype))
        gradients.append([made[name].grad for name in trained.split()])
        assert all(made[name].grad is None for name in made if name not in trained.split())
    for exact, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("trained", "kept"), [("inputs", {"weight"}), ("weight", {"inputs"}), ("bias", set())]
)
def test_only_what_a_gradient_needs_is_kept(trained: str, kept: set[str]) -> None:
    shapes = {"inputs": (16, 24), "weight": (40, 24), "bias": (40,)}
    tensors = {name: torch.randn(size).requires_grad_(name == trained) for name, size in shapes.items()}
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        fast_products(torch.float32, CPU),
    ):
        functional.linear(tensors["inputs"], tensors["weight"], tensors["bias"])
    assert {name for name, tensor in tensors.items() if tensor.data_ptr() in saved} == kept


def test_a_model_gives_the_same_logits_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(tiny_model("olmo", 300))
    ids = torch.randint(0, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    plain = model(input_ids=ids, labels=ids)
    plain.loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    calls = []
    used = kernels._linear

    def counted(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(inputs))
        return used(inputs, weight, bias)

    monkeypatch.setattr(kernels, "_linear", counted)
    with fast_products(model.dtype, model.device):
        found = model(input_ids=ids, labels=ids)
        found.loss.backward()
    # Two libraries sum in two orders.
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
    assert bool(calls) == kernels._available()


@pytest.mark.parametrize(("width", "taken"), [(63, False), (64, True)])
def test_narrow_layers_are_torchs_own(width: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_LEAST_WIDTH", 64)
    calls = []
    used = kernels._linear

    def counted(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(weight.shape)
        return used(inputs, weight, bias)

    monkeypatch.setattr(kernels, "_linear", counted)
    inputs, weight = torch.randn(16, 8), torch.randn(width, 8)
    with fast_products(torch.float32, CPU):
        functional.linear(inputs, weight)
    assert bool(calls) == (taken and kernels._available())


def test_half_precision_and_torch_without_the_call_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise ZeroDivisionError

    monkeypatch.setattr(kernels, "_linear", fail)
    monkeypatch.setattr(kernels, "_has_bfloat16", lambda: True)
    half = torch.nn.Linear(8, 8).bfloat16()
    with fast_products(torch.bfloat16, CPU), torch.no_grad():
        half(torch.zeros(16, 8, dtype=torch.bfloat16))
    monkeypatch.setattr(kernels, "_available", lambda: False)
    full = torch.nn.Linear(8, 8)
    with fast_products(torch.float32, CPU):
        full(torch.zeros(16, 8))


@pytest.mark.parametrize("product", ["linear", "matmul", "operator", "bmm", "addmm"])
def test_products_of_bfloat16_are_rounded_once(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_bfloat16", lambda: False)
    generator = torch.Generator().manual_seed(0)
    batch = (3,) if product in ("matmul", "bmm") else ()
    left = torch.randn((*batch, 16, 24), generator=generator).bfloat16()
    right = torch.randn((*batch, 24, 40), generator=generator).bfloat16()
    bias = torch.randn(40, generator=generator).bfloat16()
    exact = left.double() @ right.double()
    with fast_products(torch.bfloat16, CPU):
        if product == "linear":
            found, exact = functional.linear(left, right.t(), bias), exact + bias.double()
        elif product == "addmm":
            found, exact = torch.addmm(bias, left, right), exact + bias.double()
        elif product == "bmm":
            found = torch.bmm(left, right)
        else:
            found = left @ right if product == "operator" else torch.matmul(left, right)
    assert found.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's 8 bits, and the float32 sum's own error near 0.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_a_bfloat16_model_learns_alike_with_and_without_its_own_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shaken(tiny_model("olmo", 300))
    ids = torch.randint(0, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    gradients = []
    for has in (True, False):
        monkeypatch.setattr(kernels, "_has_bfloat16", lambda has=has: has)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), fast_products(torch.bfloat16, CPU):
            output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


def test_the_call_is_tried_in_float32_whatever_autocast_says() -> None:
    kernels._available.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        inside = kernels._available()
    kernels._available.cache_clear()
    assert inside == kernels._available()


def test_other_dtypes_are_left_alone_where_bfloat16_is_wide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_has_bfloat16", lambda: False)
    full = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    with fast_products(torch.bfloat16, CPU):
        assert (full @ full.t()).dtype == torch.float32
        torch.testing.assert_close(full @ full.t(), full.matmul(full.t()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({}, "float32"),
        ({"avx2": True, "avx512_f": True}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"sve_bf16": True}, "bfloat16"),
    ],
)
def test_the_quick_dtype_is_what_the_processor_multiplies(
    flags: dict[str, bool], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert quick_dtype("cpu") == dtype
    assert quick_dtype("mps") == "float32"


def test_tensors_given_by_name_go_torchs_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_bfloat16", lambda: False)
    a = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = (functional.linear(a, weight=a), functional.linear(a, a, bias=a[0]), torch.matmul(a, a))
    out = torch.empty(1, 16, 16, dtype=torch.bfloat16)
    with fast_products(torch.bfloat16, CPU):
        found = (
            functional.linear(a, weight=a),
            functional.linear(a, a, bias=a[0]),
            torch.matmul(input=a, other=a),
        )
        torch.bmm(a[None], a[None], out=out)
        wide = torch.matmul(input=a.float(), other=a.float())
        scaled = torch.addmm(a, a, a, beta=0.5, alpha=2)
    for one, other in zip((*found, out[0]), (*plain, plain[2]), strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-2)
    assert wide.dtype == torch.float32
    exact = 0.5 * a.double() + 2 * (a.double() @ a.double())
    torch.testing.assert_close(scaled.double(), exact, rtol=2**-7, atol=1e-5)


def test_what_a_wide_product_keeps_is_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_bfloat16", lambda: False)
    layer = torch.nn.Linear(24, 40).bfloat16()
    inputs = torch.randn(16, 24).bfloat16().requires_grad_()
    saved: list[torch.dtype] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.dtype)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        fast_products(torch.bfloat16, CPU),
    ):
        output = layer(inputs)
    assert set(saved) == {torch.bfloat16}
    output.float().sum().backward()
    expected = torch.ones(16, 40) @ layer.weight.float()
    torch.testing.assert_close(inputs.grad, expected.bfloat16())

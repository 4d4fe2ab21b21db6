"""The other matrix product gives the same numbers, and only where it is meant to."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from conftest import shaken, tiny_model
from expunge.models import kernels
from expunge.models.kernels import fast_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (64, 24), (3, 11, 24), (2, 2, 7, 24), (0, 24)])
def test_it_is_the_linear_map(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias)
    inputs = torch.randn(shape, generator=generator)
    strided = torch.randn((*shape[:-1], 48), generator=generator)[..., ::2]
    for x in (inputs, strided):
        expected = functional.linear(x.double(), layer.weight.double(), _double(layer.bias))
        with torch.no_grad(), fast_linear(torch.float32, CPU):
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
        with fast_linear(dtype, CPU):
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
    tensors = {
        name: torch.randn(size).requires_grad_(name == trained) for name, size in shapes.items()
    }
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        fast_linear(torch.float32, CPU),
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

    def counted(
        inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        calls.append(len(inputs))
        return used(inputs, weight, bias)

    monkeypatch.setattr(kernels, "_linear", counted)
    with fast_linear(model.dtype, model.device):
        found = model(input_ids=ids, labels=ids)
        found.loss.backward()
    # Two libraries sum in two orders.
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
    assert bool(calls) == kernels._available()


def test_half_precision_and_torch_without_the_call_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise ZeroDivisionError

    monkeypatch.setattr(kernels, "_linear", fail)
    half = torch.nn.Linear(8, 8).bfloat16()
    with fast_linear(torch.bfloat16, CPU), torch.no_grad():
        half(torch.zeros(16, 8, dtype=torch.bfloat16))
    monkeypatch.setattr(kernels, "_available", lambda: False)
    full = torch.nn.Linear(8, 8)
    with fast_linear(torch.float32, CPU):
        full(torch.zeros(16, 8))

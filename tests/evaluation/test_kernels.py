"""The other matrix product gives the same numbers, and only where it is meant to."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from conftest import shaken, tiny_model
from expunge.evaluation import kernels
from expunge.evaluation.kernels import fast_linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (64, 24), (3, 11, 24), (2, 2, 7, 24), (0, 24)])
def test_it_is_the_linear_map(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias)
    inputs = torch.randn(shape, generator=generator)
    strided = torch.randn((*shape[:-1], 48), generator=generator)[..., ::2]
    for x in (inputs, strided):
        expected = functional.linear(x.double(), layer.weight.double(), _double(layer.bias))
        with fast_linear(layer):
            found = layer(x)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected.float())


def _double(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.double()


def test_a_model_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(tiny_model("olmo", 300))
    ids = torch.randint(0, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    plain = model(input_ids=ids).logits.detach()
    calls = []
    used = kernels._linear

    def counted(
        inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        calls.append(len(inputs))
        return used(inputs, weight, bias)

    monkeypatch.setattr(kernels, "_linear", counted)
    with fast_linear(model):
        found = model(input_ids=ids).logits
    # Two libraries sum in two orders.
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert bool(calls) == kernels._available()
    assert model(input_ids=ids).logits.requires_grad


def test_half_precision_and_torch_without_the_call_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise ZeroDivisionError

    monkeypatch.setattr(kernels, "_linear", fail)
    half = torch.nn.Linear(8, 8).bfloat16()
    with fast_linear(half), torch.no_grad():
        half(torch.zeros(16, 8, dtype=torch.bfloat16))
    monkeypatch.setattr(kernels, "_available", lambda: False)
    full = torch.nn.Linear(8, 8)
    with fast_linear(full):
        full(torch.zeros(16, 8))

"""Round-to-nearest against a loop over single weights."""

from __future__ import annotations

import pytest
import torch

from conftest import FAMILIES, shaken, tiny_model
from expunge.audits.attacks.quantize import SCHEMES, round_weights
from expunge.audits.attacks.rounding import rounded
from expunge.models.decoder import find_layout


def slow(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    outputs, inputs = weight.shape
    result = torch.empty_like(weight)
    width = group or inputs
    for row in range(outputs):
        for start in range(0, inputs, width):
            part = [float(v) for v in weight[row, start : start + width]]
            scale = max(map(abs, part)) / (2 ** (bits - 1) - 1)
            for place, value in enumerate(part):
                integer = round(value / scale) if scale else 0
                result[row, start + place] = integer * scale
    return result


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 4), (4, 6), (4, None), (2, 3)])
def test_every_weight_is_the_nearest_step_of_its_group(bits: int, group: int | None) -> None:
    weight = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    found = rounded(weight, bits, group)
    torch.testing.assert_close(found, slow(weight, bits, group))
    assert not found[2].any()
    # Rounding what is rounded changes nothing, and no weight moves by more than half a step.
    torch.testing.assert_close(rounded(found, bits, group), found)
    largest = weight.abs().amax(1, keepdim=True)
    assert ((found - weight).abs() <= largest / (2 ** (bits - 1) - 1) / 2 + 1e-6).all()
    assert rounded(weight.bfloat16(), bits, group).dtype == torch.bfloat16


def test_int4_has_15_levels_in_each_group() -> None:
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    found = rounded(weight, *SCHEMES["int4"])
    for row in range(3):
        for start in (0, 128):
            assert len(found[row, start : start + 128].unique()) <= 15
    error = {name: (rounded(weight, *s) - weight).norm() for name, s in SCHEMES.items()}
    assert error["int4"] > 10 * error["int8"]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_the_linear_maps_of_the_layers_are_rounded_and_nothing_else(family: str) -> None:
    model = shaken(tiny_model(family, 300))
    layout = find_layout(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    round_weights(model, layout, 4, 128)
    linears = {f"{name}.weight" for name in layout.linears()}
    assert len(linears) > layout.count
    for name, value in model.named_parameters():
        if name in linears:
            turned = family == "gpt2"
            old = before[name].T if turned else before[name]
            torch.testing.assert_close(value.T if turned else value, rounded(old, 4, 128))
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])

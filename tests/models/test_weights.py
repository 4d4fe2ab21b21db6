"""float32 masters of the trained weights, and running with those from before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import random_examples, shaken, tiny_model
from expunge.data.batches import collate
from expunge.models.weights import restore, snapshot, swapped_in, train_only

NAMES = ["model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"]


@pytest.fixture
def model() -> Any:
    return shaken(tiny_model("llama", 300))


def logits(model: Any) -> torch.Tensor:
    batch = collate(random_examples([8, 5], 300), [0, 1], pad_id=1)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def test_only_the_named_weights_train_and_they_are_float32_masters(model: Any) -> None:
    model.to(torch.bfloat16)
    chosen = train_only(model, NAMES)
    assert list(chosen) == NAMES
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in NAMES)
        assert parameter.dtype == (torch.float32 if name in NAMES else torch.bfloat16)
        if name in NAMES:
            assert chosen[name] is parameter


def test_a_step_too_small_for_bfloat16_is_kept_by_the_master(model: Any) -> None:
    model.to(torch.bfloat16)
    (name,) = train_only(model, NAMES[:1])
    parameter = model.get_parameter(name)
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter += before.abs() / 1024  # below bfloat16's 1/256
    assert (parameter != before).any()
    assert torch.equal(parameter.to(torch.bfloat16), before.to(torch.bfloat16))


def test_a_name_that_is_no_parameter_is_an_error(model: Any) -> None:
    with pytest.raises(AttributeError):
        train_only(model, ["model.layers.1.mlp.no_proj.weight"])


def test_a_snapshot_is_a_copy_that_can_be_put_back(model: Any) -> None:
    chosen = train_only(model, NAMES)
    before = logits(model).detach()
    kept = snapshot(chosen)
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.mul_(3)
    assert not torch.equal(logits(model), before)
    restore(chosen, kept)
    assert torch.equal(logits(model), before)


def test_swapped_in_runs_the_other_weights_without_gradients(model: Any) -> None:
    before = logits(model).detach()
    chosen = train_only(model, NAMES)
    frozen = snapshot(chosen)
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.mul_(3)
    changed = logits(model).detach()
    with swapped_in(chosen, frozen):
        inside = logits(model)
    assert torch.equal(inside, before)
    assert not inside.requires_grad
    assert torch.equal(logits(model), changed)


def test_swapped_in_puts_the_weights_back_after_an_exception(model: Any) -> None:
    chosen = train_only(model, NAMES)
    storage = {name: parameter.data_ptr() for name, parameter in chosen.items()}
    zeros = {name: torch.zeros_like(parameter) for name, parameter in chosen.items()}
    with pytest.raises(ZeroDivisionError), swapped_in(chosen, zeros):
        raise ZeroDivisionError
    assert {name: parameter.data_ptr() for name, parameter in chosen.items()} == storage
    assert torch.is_grad_enabled()
    # A value that is missing is an error too, and leaves nothing half exchanged.
    with pytest.raises(KeyError), swapped_in(chosen, {NAMES[0]: zeros[NAMES[0]]}):
        pass
    assert {name: parameter.data_ptr() for name, parameter in chosen.items()} == storage


def test_a_graph_recorded_before_the_swap_stays_valid(model: Any) -> None:
    chosen = train_only(model, NAMES)

    def gradients(*, swap: bool) -> list[torch.Tensor]:
        loss = logits(model).square().mean()
        if swap:
            zeros = {name: torch.zeros_like(parameter) for name, parameter in chosen.items()}
            with swapped_in(chosen, zeros):
                logits(model)
        return list(torch.autograd.grad(loss, list(chosen.values())))

    for plain, swapped in zip(gradients(swap=False), gradients(swap=True), strict=True):
        assert torch.equal(plain, swapped)

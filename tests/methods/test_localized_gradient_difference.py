"""Causal tracing against passes patched by hand; what is trained; retain rows that suffer held more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import refusal, shaken
from expunge.data.batches import collate
from expunge.maths.losses import adaptive_weights
from expunge.maths.numerics import token_log_probs
from expunge.methods.base import Context
from expunge.methods.causal_tracing import best_window, layer_effects
from expunge.methods.localized_gradient_difference import LocalizedGradientDifference

Contexts = Callable[..., Context]


def test_adaptive_weights_against_the_paper() -> None:
    rises = [-3.0, 0.0, 0.5, 1.0, 4.0]
    expected = [min(max(0.3 * 6**rise + 0.8, 1.2), 2.8) for rise in rises]
    found = adaptive_weights(torch.tensor(rises, requires_grad=True), 1.2, 2.8)
    assert found.tolist() == pytest.approx(expected)
    assert expected[0] == 1.2
    assert expected[-1] == 2.8
    assert sorted(expected) == expected
    assert not found.requires_grad


def traced(context: Context, seed: int = 0, noise: float = 3.0) -> list[float]:
    return layer_effects(context, context.forget, noise, torch.Generator().manual_seed(seed))


def test_restoring_an_mlp_against_a_pass_that_is_patched_by_hand(make_context: Contexts) -> None:
    """One row: the embeddings plus noise as inputs, the restored layer's output overwritten by hand."""
    context = make_context("llama", layers=2)
    shaken(context.model)
    row = context.forget[0]
    batch = collate([row], [0], context.pad_id)
    found = layer_effects(context, [row], 2.0, torch.Generator().manual_seed(5))

    model = context.model
    weight = model.get_input_embeddings().weight
    noise = torch.randn(len(row), weight.shape[1], generator=torch.Generator().manual_seed(5))
    prompt = torch.tensor([not answer for answer in row.answer_mask])
    clean_inputs = weight[batch.input_ids].detach()
    noised_inputs = clean_inputs.clone()
    noised_inputs[0, prompt] += 2.0 * weight.std().detach() * noise[prompt]
    outputs: dict[int, torch.Tensor] = {}

    def answer(inputs: torch.Tensor, layer: int | None = None, *, keep: bool = False) -> float:
        handles = []
        for index in range(2):
            module = model.get_submodule(f"model.layers.{index}.mlp")

            def hook(_m: Any, _i: Any, out: torch.Tensor, index: int = index) -> torch.Tensor:
                if keep:
                    outputs[index] = out.clone()
                if index == layer:
                    out = out.clone()
                    out[0, prompt] = outputs[index][0, prompt]
                return out

            handles.append(module.register_forward_hook(hook))
        with torch.no_grad():
            logits = model(inputs_embeds=inputs).logits
        for handle in handles:
            handle.remove()
        log_probs = token_log_probs(logits, batch.input_ids)[0]
        return float(log_probs[batch.answer_mask[0, 1:]].mean().exp())

    clean = answer(clean_inputs, keep=True)
    low = answer(noised_inputs)
    expected = [(answer(noised_inputs, layer) - low) / max(clean - low, 0.01) for layer in (0, 1)]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert expected[0] != expected[1]


def test_effects_do_not_depend_on_the_batch_size(make_context: Contexts) -> None:
    context = make_context("qwen2")
    shaken(context.model)
    one = traced(replace(context, batch_size=1))
    assert traced(replace(context, batch_size=8)) == pytest.approx(one, rel=1e-3, abs=1e-6)
    assert traced(context, seed=1) != pytest.approx(one, rel=1e-3)


def test_hooks_are_gone_and_the_model_is_as_it_was(make_context: Contexts) -> None:
    context = make_context("gpt_neox")
    batch = collate(context.forget, [0], context.pad_id)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return context.model(input_ids=batch.input_ids).logits

    before = logits()
    traced(context)
    assert torch.equal(logits(), before)
    assert not any(module._forward_hooks for module in context.model.modules())


def test_a_layer_whose_mlp_writes_nothing_has_no_effect(make_context: Contexts) -> None:
    context = make_context("llama")
    shaken(context.model)
    with torch.no_grad():
        context.model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
    effects = traced(context)
    assert effects[1] == 0
    assert all(abs(effect) > 1e-6 for layer, effect in enumerate(effects) if layer != 1)


def test_the_window_is_the_best_one_and_the_lowest_of_equals() -> None:
    assert best_window([0.1, 0.5, 0.4, 0.0, 0.9], 2) == range(1, 3)
    assert best_window([0.1, 0.5, 0.4, 0.0, 0.9], 1) == range(4, 5)
    assert best_window([0.0, 0.0, 0.0], 2) == range(2)
    assert best_window([1.0, -1.0], 2) == range(2)


def test_rows_without_a_prompt_say_nothing(make_context: Contexts) -> None:
    context = make_context()
    bare = [replace(e, answer_mask=(True,) * len(e)) for e in context.forget[:2]]
    generator = torch.Generator().manual_seed(0)
    assert layer_effects(context, bare, 3.0, generator) == [0.0] * 4


@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_only_the_chosen_layers_mlps_are_trained(parameters: Any, make_context: Contexts) -> None:
    method = LocalizedGradientDifference(
        parameters=parameters, localization="first", trained_share=0.5, rank=2
    )
    for family, mlp in (("llama", "mlp."), ("gpt_neox", "mlp.")):
        context = make_context(family)
        objective = method.start(context)
        layers = context.layout.layers
        prefixes = tuple(f"{layers}.{index}.{mlp}" for index in (0, 1))
        assert objective.parameters
        assert all(name.startswith(prefixes) for name in objective.parameters)
        assert objective.notes()["layers"] == [0, 1]
        assert objective.notes()["layer_effects"] is None


def test_the_chosen_layers_are_those_with_the_largest_effect(make_context: Contexts) -> None:
    context = make_context("llama")
    shaken(context.model)
    notes = LocalizedGradientDifference(trained_share=0.25).start(context).notes()
    effects = notes["layer_effects"]
    assert len(effects) == 4
    assert notes["layers"] == [effects.index(max(effects))]
    # A resumed run goes on with the layers that were found, whatever it would find now.
    told = replace(make_context("llama"), resumed={"layer_effects": [0.0, 0.0, 1.0, 0.0]})
    assert LocalizedGradientDifference(trained_share=0.25).start(told).notes()["layers"] == [2]


def test_retain_rows_that_lost_more_weigh_more(make_context: Contexts) -> None:
    context = make_context()
    shaken(context.model)
    batch = collate(context.retain, [3, 0, 1], context.pad_id)
    with torch.no_grad():
        first = context.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    before = token_log_probs(first, batch.input_ids)
    method = LocalizedGradientDifference(trained_share=1.0, retain_weight=1.2, retain_weight_most=2.8)
    objective = method.start(context)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in objective.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        now = token_log_probs(objective.logits(batch), batch.input_ids)
    terms = objective.loss(collate(context.forget, [0], context.pad_id), batch)
    total, tokens, weights = 0.0, 0, []
    for row, mask in enumerate(batch.token_mask[:, 1:]):
        rise = float((before[row] - now[row])[mask].mean())
        weights.append(min(max(0.3 * 6**rise + 0.8, 1.2), 2.8))
        total -= weights[-1] * float(now[row][mask].sum())
        tokens += int(mask.sum())
    assert len(set(weights)) > 1
    assert terms.retain is not None
    assert float(terms.retain.detach()) == pytest.approx(total / tokens, rel=1e-3)


def test_settings_that_cannot_be_are_refused(make_context: Contexts) -> None:
    method = LocalizedGradientDifference
    assert "--method.noise 0" in refusal(lambda: method(noise=0))
    assert "--method.trained-share 2" in refusal(lambda: method(trained_share=2))
    assert "--method.retain-weight-most 1" in refusal(lambda: method(retain_weight_most=1))
    layout = replace(make_context().layout, mlp_linears=())
    assert "--method.targets mlp" in refusal(lambda: method().check(layout))

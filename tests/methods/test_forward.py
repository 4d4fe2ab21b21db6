"""Logits of chosen places and recomputed activations, against the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from conftest import FAMILIES, random_examples, shaken, tiny_model
from expunge.data.batches import Batch, collate
from expunge.methods.base import Context
from expunge.methods.forward import (
    all_logits,
    head_takes_places,
    lens_added,
    lens_in_one_pass,
    logits_at,
    recomputed,
)
from expunge.methods.gradient import GradientObjective
from expunge.methods.gradient_difference import GradientDifference
from expunge.methods.spectral import Spectral
from expunge.models.decoder import find_layout, forward_hook
from expunge.models.kernels import fast_products

# The last three scale or cap their logits after the head.
ALL = (*FAMILIES, "gpt2", "gemma2", "cohere", "granite")
VOCABULARY = 300
LENGTHS = [9, 4, 7]


def model_of(family: str) -> Any:
    model = shaken(tiny_model(family, VOCABULARY, layers=2))
    if family == "granite":
        model.config.logits_scaling = 3.0
    return model


def whole_batch() -> Batch:
    return collate(random_examples(LENGTHS, VOCABULARY), range(len(LENGTHS)), pad_id=1)


@pytest.mark.parametrize("family", ALL)
def test_logits_of_chosen_places_are_the_models_own(family: str) -> None:
    model, batch = model_of(family), whole_batch()
    where = batch.answer_mask.clone()
    where[1] = False  # a row without any
    expected = all_logits(model, batch.input_ids, batch.attention_mask)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    found = logits_at(model, where, **inputs)
    assert found.shape == (int(where.sum()), VOCABULARY)
    # A matrix product of other shape sums in another order.
    torch.testing.assert_close(found, expected[where], rtol=1e-4, atol=1e-4)
    assert head_takes_places(model)
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_reads_what_the_model_would_say_of_a_layers_states(family: str, layer: int) -> None:
    model, batch = shaken(tiny_model(family, VOCABULARY, layers=3)), whole_batch()
    where = batch.answer_mask
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    outer = all_logits(model, **inputs)[where]
    layout = find_layout(model)
    # The slow way: every layer above gives what it was given.
    skipped = [layout.layer(model, index) for index in range(layer + 1, layout.count)]
    with ExitStack() as stack:
        for module in skipped:
            stack.enter_context(forward_hook(module, through))
        inner = all_logits(model, **inputs)[where]
    assert not torch.allclose(inner, outer, atol=1e-2)
    with lens_added(model, layout, layer):
        found = logits_at(model, torch.cat([where, where]), **inputs)
    torch.testing.assert_close(found[: len(outer)], outer, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[len(outer) :], inner, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_family_that_the_lens_cannot_read_in_one_pass_is_read_in_two(
    make_context: Callable[..., Context],
) -> None:
    """GPT-BigCode gives every layer's output the shape of the input ids."""
    context = make_context("gpt_bigcode")
    shaken(context.model)
    assert not lens_in_one_pass(context.model, context.layout)
    objective = Spectral(random_rows=0).start(context)
    batch = collate(context.forget[:2], range(2), context.pad_id)
    outer, inner = objective.lens_logits(batch, 1)
    torch.testing.assert_close(outer, objective.counted_logits(batch))
    for layer in (2, 3):
        vars(context.layout.layer(context.model, layer))["forward"] = lambda states, *_, **__: states
    torch.testing.assert_close(inner, objective.counted_logits(batch))
    inner.sum().backward()
    assert context.model.get_parameter(context.layout.mlp_output_weight(1)).grad is not None


@pytest.mark.parametrize("family", ALL)
def test_other_families_are_read(family: str) -> None:
    model = model_of(family)
    assert lens_in_one_pass(model, find_layout(model))


def through(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
    return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]


class FlattensFirst(nn.Module):
    """Around a head: it is given (rows * tokens, width), so no place can be chosen for it."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.inner = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


def test_a_head_that_is_called_otherwise_or_not_named_unembeds_all() -> None:
    batch = whole_batch()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    model = model_of("olmo")
    expected = all_logits(model, **inputs)[batch.answer_mask]
    inner = model.lm_head
    for head, named in ((FlattensFirst(inner), inner), (inner, None)):
        model.lm_head = head
        model.get_output_embeddings = lambda named=named: named
        assert torch.equal(logits_at(model, batch.answer_mask, **inputs), expected)
        assert not head_takes_places(model)
        assert not inner._forward_pre_hooks


class Padded(nn.Module):
    """A model that adds a place to its head's output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device
        self.dtype = model.dtype
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = nn.functional.pad(output.logits, (0, 0, 0, 1))
        return output


def test_logits_that_are_not_the_heads_output_are_refused() -> None:
    model, batch = Padded(model_of("olmo")), whole_batch()
    with pytest.raises(ValueError, match="not its head's output"):
        logits_at(model, batch.answer_mask, input_ids=batch.input_ids)


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_a_head_that_is_called_otherwise_is_noticed_and_gives_the_same_losses(
    tokens: str, make_context: Callable[..., Context]
) -> None:
    def started(context: Context) -> GradientObjective:
        return GradientDifference(rank=2, tokens=tokens).start(context)  # type: ignore[arg-type]

    context, odd = make_context(), make_context()
    model: Any = odd.model
    inner = model.lm_head
    model.lm_head = FlattensFirst(inner)
    model.get_output_embeddings = lambda: inner
    assert not head_takes_places(model)
    plain, fallback = started(context), started(odd)
    assert plain.notes()["logits"] == "of counted tokens"
    assert fallback.notes()["logits"] == "of all tokens"
    batch = collate(context.forget, [0, 1, 2], context.pad_id)
    log_probs, mask = plain.log_probs(batch)
    others, other_mask = fallback.log_probs(batch)
    assert torch.equal(mask, other_mask)
    torch.testing.assert_close(log_probs, others, rtol=1e-5, atol=1e-5)
    assert not log_probs[~mask].any()


def test_a_batch_without_counted_tokens_has_no_loss_and_no_gradient(
    make_context: Callable[..., Context],
) -> None:
    context = make_context()
    objective = GradientDifference(rank=2, tokens="answer").start(context)
    batch = collate(context.forget, [0, 1], context.pad_id)
    batch.answer_mask[:] = False
    loss = objective.cross_entropy(batch)
    loss.backward()
    assert float(loss.detach()) == 0
    gradients = [p.grad for p in objective.parameters.values()]
    assert not any(g is not None and g.any() for g in gradients)


@pytest.mark.parametrize("family", ALL)
def test_recomputed_activations_give_the_same_gradients(family: str) -> None:
    model, batch = model_of(family), whole_batch()
    layers = list(model.get_submodule(find_layout(model).layers).children())

    def gradients() -> list[torch.Tensor]:
        logits = all_logits(model, batch.input_ids, batch.attention_mask)
        loss = logits[batch.answer_mask].logsumexp(-1).mean()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    expected = gradients()
    with recomputed(layers):
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert all("forward" not in vars(layer) for layer in layers)


def test_recomputing_saves_memory_and_ends_after_an_error() -> None:
    model, batch = model_of("olmo"), whole_batch()
    layers = list(model.model.layers)

    def saved() -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            all_logits(model, batch.input_ids, batch.attention_mask)
        return sum(sizes)

    kept = saved()
    with recomputed(layers):
        assert saved() < kept / 2
    with pytest.raises(ZeroDivisionError), recomputed(layers):
        raise ZeroDivisionError
    assert all("forward" not in vars(layer) for layer in layers)


@pytest.mark.parametrize("family", ["olmo", "gpt_neox"])
@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_gradient_checkpointing_changes_no_step(
    family: str, parameters: Any, make_context: Callable[..., Context]
) -> None:
    """Adapter dropout included: the second forward pass must draw and multiply the same."""

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        context = make_context(family)
        objective = GradientDifference(
            parameters=parameters, rank=3, lora_dropout=0.3, gradient_checkpointing=checkpointing
        ).start(context)
        forget = collate(context.forget, [0, 1, 2], context.pad_id)
        retain = collate(context.retain, [0, 1], context.pad_id)
        generator = torch.Generator().manual_seed(1)
        for parameter in objective.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise
        objective.set_training(True)
        with torch.random.fork_rng(devices=[]), fast_products(torch.float32, context.device):
            torch.manual_seed(3)
            objective.loss(forget, retain).total.backward()
        # A weight may have no part in the loss.
        return {n: p.grad for n, p in objective.parameters.items() if p.grad is not None}

    plain, recomputing = gradients(False), gradients(True)
    assert plain.keys() == recomputing.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], recomputing[name], rtol=1e-6, atol=1e-6)

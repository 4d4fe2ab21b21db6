"""NPO merging: two adapters that do not touch each other, TIES by hand, and a model that runs merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from conftest import refusal, tiny_model
from expunge.data.batches import collate
from expunge.maths.losses import npo
from expunge.maths.numerics import row_means, token_log_probs
from expunge.methods.base import Context
from expunge.methods.npo_merging import (
    FORGETTING,
    KEEPING,
    NPOMerging,
    NPOMergingObjective,
    ties_of,
)

Contexts = Callable[..., Context]


def moved(objective: Any, sides: tuple[str, ...] = (FORGETTING, KEEPING)) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in objective.parameters.items():
            if name.startswith(sides):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def slow_ties(tensors: list[torch.Tensor], density: float) -> list[float]:
    """Entry by entry: keep the largest of each, elect a sign by the sums, average those that have it."""
    kept = []
    for tensor in tensors:
        values = tensor.flatten().tolist()
        count = int(density * len(values))
        largest = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:count]
        kept.append([value if i in largest else 0.0 for i, value in enumerate(values)])
    merged = []
    for entries in zip(*kept, strict=True):
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [entry for entry in entries if entry * sign > 0]
        merged.append(sum(agreeing) / max(1, len(agreeing)))
    return merged


@pytest.mark.parametrize("density", [0.3, 0.8, 1.0])
def test_ties_entry_by_entry(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [nn.Parameter(torch.randn(4, 5, generator=generator)) for _ in range(2)]
    found = ties_of(tensors, density)
    assert not found.requires_grad
    assert found.flatten().tolist() == pytest.approx(
        slow_ties([tensor.detach() for tensor in tensors], density)
    )


def test_ties_of_a_tensor_with_itself_is_itself_and_with_its_negative_keeps_one_sign() -> None:
    tensor = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
    assert torch.equal(ties_of([tensor, tensor], 1.0), tensor)
    opposite = nn.Parameter(-tensor.detach())
    # The sums are 0: of a tie the positive sign is elected.
    assert ties_of([tensor, opposite], 1.0).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_both_adapters_start_alike_and_get_gradients_of_their_own_loss(
    make_context: Contexts,
) -> None:
    context = make_context()
    forget = collate(context.forget, [4, 1], context.pad_id)
    retain = collate(context.retain, [0, 1], context.pad_id)

    def gradients(**settings: float) -> dict[str, torch.Tensor]:
        objective = NPOMerging(rank=2, **settings).start(make_context())  # type: ignore[arg-type]
        names = [name.partition(".")[2] for name in objective.parameters]
        half = len(names) // 2
        assert names[:half] == names[half:]
        for name in names[:half]:
            sides = [objective.parameters[f"{side}.{name}"] for side in (FORGETTING, KEEPING)]
            assert torch.equal(sides[0], sides[1])
        moved(objective)
        objective.loss(forget, retain).total.backward()
        return {n: p.grad for n, p in objective.parameters.items() if p.grad is not None}

    one = gradients(retain_weight=0.5, keeping_weight=2.0)
    assert len(one) == 2 * 4 * 7 * 2
    other = gradients(retain_weight=0.5, keeping_weight=5.0)
    for name, gradient in one.items():
        same = torch.allclose(gradient, other[name], rtol=1e-5, atol=1e-9)
        assert same == name.startswith(FORGETTING)


def test_the_terms_are_the_sum_of_both_adapters(make_context: Contexts, tokenizer: Any) -> None:
    context = make_context()
    method = NPOMerging(rank=2, beta=0.6, kl_weight=0.0, retain_weight=0.5, keeping_weight=3.0)
    objective = method.start(context)
    moved(objective)
    forget = collate(context.forget, [4, 1, 0], context.pad_id)
    retain = collate(context.retain, [0, 2], context.pad_id)
    terms = objective.loss(forget, retain)
    original = tiny_model("olmo", len(tokenizer))
    with torch.no_grad():
        first = original(input_ids=forget.input_ids, attention_mask=forget.attention_mask).logits
    before = row_means(token_log_probs(first, forget.input_ids), forget.token_mask[:, 1:])
    wanted_forget = wanted_retain = 0.0
    assert objective.adapter is not None
    for side, weight in ((FORGETTING, 0.5), (KEEPING, 3.0)):
        factors = {
            name.removeprefix(f"{side}."): parameter
            for name, parameter in objective.parameters.items()
            if name.startswith(side)
        }
        with torch.no_grad(), objective.adapter.using(factors):
            now = token_log_probs(objective.logits(forget), forget.input_ids)
            wanted_forget += float(npo(row_means(now, forget.token_mask[:, 1:]), before, 0.6))
            wanted_retain += weight * float(objective.cross_entropy(retain))
    assert terms.retain is not None
    assert float(terms.forget.detach()) == pytest.approx(wanted_forget, rel=1e-4)
    assert float(terms.retain.detach()) == pytest.approx(wanted_retain, rel=1e-4)


def test_outside_of_a_step_the_model_runs_merged(make_context: Contexts, tokenizer: Any) -> None:
    context = make_context()
    objective = NPOMerging(rank=2, density=0.6).start(context)
    batch = collate(context.forget, [0, 3], context.pad_id)
    original = tiny_model("olmo", len(tokenizer))

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    torch.testing.assert_close(run(context.model), run(original))
    objective.set_training(True)
    moved(objective)
    objective.loss(batch, collate(context.retain, [0], context.pad_id)).total.backward()
    objective.set_training(False)
    after = run(context.model)
    assert float((after - run(original)).abs().max()) > 1e-2
    # Written as plain weights the result is the same: base + TIES(B) @ TIES(A) * scale.
    expected = {}
    for name, module in original.named_modules():
        if f"{FORGETTING}.{name}.lora_A.weight" in objective.parameters:
            a, b = (
                ties_of(
                    [
                        nn.Parameter(objective.parameters[f"{side}.{name}.{factor}.weight"].detach())
                        for side in (FORGETTING, KEEPING)
                    ],
                    0.6,
                )
                for factor in ("lora_A", "lora_B")
            )
            expected[f"{name}.weight"] = module.weight + (b @ a) * 32 / 2
    finished = objective.finish(keep_adapter=True)
    assert finished.weights.keys() == expected.keys()
    for name, weight in finished.weights.items():
        torch.testing.assert_close(weight, expected[name].detach())
    torch.testing.assert_close(run(context.model), after, rtol=1e-4, atol=1e-5)
    assert finished.adapter is not None
    assert not any("lora" in name for name, _ in context.model.named_modules())


def test_the_merger_follows_parameters_that_are_put_back(make_context: Contexts) -> None:
    """As a resumed loop does before it measures anything."""
    context = make_context()
    objective = NPOMerging(rank=2).start(context)
    assert isinstance(objective, NPOMergingObjective)
    batch = collate(context.forget, [0], context.pad_id)
    before = objective.logits(batch).detach()
    moved(objective)
    objective.set_training(False)
    assert float((objective.logits(batch).detach() - before).abs().max()) > 1e-3


def test_settings_that_cannot_be_are_refused() -> None:
    assert "merges adapters" in refusal(lambda: NPOMerging(parameters="full"))
    assert "gradient-checkpointing" in refusal(lambda: NPOMerging(gradient_checkpointing=True))
    assert "--method.density 0" in refusal(lambda: NPOMerging(density=0))
    assert "--method.keeping-weight 0.1" in refusal(lambda: NPOMerging(keeping_weight=0.1))

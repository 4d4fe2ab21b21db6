"""Token-wise NPO: its terms against the target's own probabilities, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import refusal, tiny_model
from expunge.data.batches import collate
from expunge.maths.losses import npo, token_npo
from expunge.maths.numerics import token_log_probs
from expunge.methods.base import Context
from expunge.methods.token_npo import TokenNPO

Contexts = Callable[..., Context]


def test_token_npo_against_its_definition() -> None:
    now = torch.tensor([[-3.0, -9.0, -0.1], [-1.0, -50.0, -2.0]])
    before = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, -0.5, -7.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    beta = 0.4
    slow = [
        2 / beta * math.log(1 + math.exp(float(a - b)) ** beta)
        for a, b in zip(now[mask], before[mask], strict=True)
    ]
    assert float(token_npo(now, before, mask, beta)) == pytest.approx(sum(slow) / len(slow))
    assert float(token_npo(now, before, torch.zeros_like(mask), beta)) == 0


def test_it_is_npo_where_every_row_is_one_token() -> None:
    now, before = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -2.0])
    everywhere = torch.ones(2, 1, dtype=torch.bool)
    found = token_npo(now[:, None], before[:, None], everywhere, 0.3)
    assert float(found) == pytest.approx(float(npo(now, before, 0.3)))


def test_a_token_that_is_gone_shields_no_other() -> None:
    """NPO on the row's sum would stop pushing both."""
    now = torch.tensor([[-40.0, -0.1]], requires_grad=True)
    before = torch.tensor([[-0.1, -0.1]])
    token_npo(now, before, torch.ones(1, 2, dtype=torch.bool), 0.5).backward()
    assert now.grad is not None
    # A token as likely as before has half of gradient ascent's gradient, twice over: 1 / tokens.
    assert now.grad[0].tolist() == pytest.approx([0, 0.5], abs=1e-6)


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_both_terms_are_against_the_model_from_before(
    parameters: Any, make_context: Contexts, tokenizer: Any
) -> None:
    context = make_context()
    method = TokenNPO(parameters=parameters, beta=0.7, retain_weight=2.0, kl_weight=3.0)
    objective = method.start(context)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    forget = collate(context.forget, [4, 1, 0], context.pad_id)
    retain = collate(context.retain, [0, 1, 2], context.pad_id)
    terms = objective.loss(forget, retain)
    assert terms.retain is not None
    original = tiny_model("olmo", len(tokenizer))

    def both(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            before = original(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            return objective.logits(batch), before

    now, before = (token_log_probs(logits, forget.input_ids) for logits in both(forget))
    expected = token_npo(now, before, forget.token_mask[:, 1:], 0.7)
    assert float(terms.forget.detach()) == pytest.approx(float(expected), rel=1e-4)
    mask = retain.token_mask[:, 1:]
    logits, reference = (logits[:, :-1][mask].double().log_softmax(-1) for logits in both(retain))
    targets = retain.input_ids[:, 1:][mask][:, None]
    ce = -float(logits.gather(1, targets).mean())
    kl = float((reference.exp() * (reference - logits)).sum(-1).mean())
    assert kl > 1e-3
    # Float32 passes, the reference by the same weights with the adapter off or swapped.
    assert float(terms.retain.detach()) == pytest.approx(2 * ce + 3 * kl, rel=1e-3)


def test_without_weights_there_is_no_retain_term(make_context: Contexts) -> None:
    method = TokenNPO(retain_weight=0, kl_weight=0)
    assert not method.needs_retain
    assert TokenNPO(retain_weight=0).needs_retain
    context = make_context()
    batch = collate(context.forget, [0], context.pad_id)
    assert method.start(context).loss(batch, batch).retain is None
    assert "--method.kl-weight -1" in refusal(lambda: TokenNPO(kl_weight=-1))

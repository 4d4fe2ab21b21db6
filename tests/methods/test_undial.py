"""UNDIAL: what the student learns of each forget token, and its limit without any strength."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compared import Compared
from conftest import refusal
from expunge.data.batches import collate
from expunge.maths.losses import cross_entropy, lowered
from expunge.methods.base import Context
from expunge.methods.undial import UNDIAL

Contexts = Callable[..., Context]


def test_one_logit_of_each_token_is_lowered() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]])
    found = lowered(logits, torch.tensor([2, 0]), 10.0)
    assert found.tolist() == [[1.0, 2.0, -7.0], [-9.5, 0.0, -1.0]]
    assert logits.tolist() == [[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]]


def test_what_the_target_says_beside_the_token_keeps_its_proportions() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    p = lowered(logits, torch.tensor([2]), 4.0).softmax(-1)[0]
    assert float(p[1] / p[0]) == pytest.approx(math.e)
    odds = float(p[2] / (1 - p[2]))
    assert odds == pytest.approx(math.exp(-4) * math.exp(3) / (math.exp(1) + math.exp(2)), rel=1e-5)


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_the_forget_term_against_a_sum_over_the_vocabulary(
    parameters: str, make_context: Contexts, tokenizer: Any
) -> None:
    method = UNDIAL(parameters=parameters, rank=4, strength=3.0, retain_weight=2.0)  # type: ignore[arg-type]
    case = Compared(method, make_context(), len(tokenizer))
    total, count = 0.0, 0
    now, before = (case.logits("forget", before=when).double() for when in (False, True))
    for row, place in case.forget.token_mask[:, 1:].nonzero().tolist():
        wanted = before[row, place].clone()
        wanted[case.forget.input_ids[row, place + 1]] -= 3.0
        q, p = wanted.softmax(0), now[row, place].softmax(0)
        total += float((q * (q / p).log()).sum())
        count += 1
    # Two float32 passes, the reference once by swapped weights and once by another model.
    assert float(case.terms.forget.detach()) == pytest.approx(total / count, rel=1e-3)
    assert case.terms.retain is not None
    expected = 2.0 * float(cross_entropy(*case.log_probs("retain")))
    assert float(case.terms.retain.detach()) == pytest.approx(expected, rel=1e-4)


def test_without_strength_the_target_is_its_own_student(make_context: Contexts) -> None:
    context = make_context()
    objective = UNDIAL(strength=0.0).start(context)
    forget = collate(context.forget, [0, 1, 2], context.pad_id)
    term = objective.loss(forget, None).forget
    assert float(term.detach()) == pytest.approx(0, abs=1e-6)
    term.backward()
    gradients = [p.grad.norm() for p in objective.parameters.values() if p.grad is not None]
    assert float(torch.stack(gradients).norm()) < 1e-5  # of rounding


def test_as_in_the_paper_it_needs_no_retain_text(make_context: Contexts) -> None:
    method = UNDIAL(retain_weight=0.0)
    assert not method.needs_retain
    context = make_context()
    batch = collate(context.forget, [0], context.pad_id)
    assert method.start(context).loss(batch, batch).retain is None
    assert "--method.strength -1" in refusal(lambda: UNDIAL(strength=-1))

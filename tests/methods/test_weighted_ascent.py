"""WGA and SatImp: weights of tokens in gradient ascent, their limits, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compared import Compared
from conftest import refusal
from expunge.maths.losses import cross_entropy, weighted_ascent
from expunge.methods.base import Context
from expunge.methods.satimp import SatImp
from expunge.methods.wga import WGA

Contexts = Callable[..., Context]
LOG_PROBS = torch.tensor([[-0.01, -2.0, -30.0], [0.0, -0.7, -5.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def slowly(saturation: float, importance: float) -> float:
    terms = [
        math.exp(x) ** saturation * (1 - math.exp(x)) ** importance * x
        for x in LOG_PROBS[MASK].double().tolist()
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("saturation", "importance"), [(1, 0), (0.5, 0), (5, 1), (0, 2), (2, 0.5)])
def test_weights_against_their_definition(saturation: float, importance: float) -> None:
    found = weighted_ascent(LOG_PROBS, MASK, saturation, importance)
    assert float(found) == pytest.approx(slowly(saturation, importance), rel=1e-5)


def test_without_exponents_it_is_gradient_ascent() -> None:
    assert float(weighted_ascent(LOG_PROBS, MASK, 0)) == -float(cross_entropy(LOG_PROBS, MASK))


def test_the_gradient_is_the_weight_and_runs_through_none() -> None:
    now = LOG_PROBS.clone().requires_grad_(True)
    weighted_ascent(now, MASK, 5, 1).backward()
    assert now.grad is not None
    p = LOG_PROBS.double().exp()
    expected = torch.where(MASK, p**5 * (1 - p) / int(MASK.sum()), 0.0)
    assert now.grad.double().tolist() == [pytest.approx(row, abs=1e-8) for row in expected.tolist()]
    assert now.grad[1, 0] == 0  # a token known for certain has nothing to learn from


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize(
    ("method", "exponents"),
    [(WGA, {"alpha": 0.5}), (SatImp, {"beta1": 2.0, "beta2": 0.5})],
)
def test_both_terms(
    method: Any,
    exponents: dict[str, float],
    parameters: str,
    make_context: Contexts,
    tokenizer: Any,
) -> None:
    made = method(parameters=parameters, rank=4, retain_weight=2.5, **exponents)
    case = Compared(made, make_context(), len(tokenizer))
    values, mask = case.log_probs("forget")
    now = values[mask].double()
    weights = now.exp() ** made.alpha if method is WGA else now.exp() ** 2 * (1 - now.exp()) ** 0.5
    assert float(case.terms.forget.detach()) == pytest.approx(float((weights * now).mean()), rel=1e-4)
    assert case.terms.retain is not None
    expected = 2.5 * float(cross_entropy(*case.log_probs("retain")))
    assert float(case.terms.retain.detach()) == pytest.approx(expected, rel=1e-4)


def test_exponents_below_0_are_refused() -> None:
    assert "--method.alpha -1" in refusal(lambda: WGA(alpha=-1))
    assert "--method.beta1 -1" in refusal(lambda: SatImp(beta1=-1))
    assert "--method.beta2 -2" in refusal(lambda: SatImp(beta2=-2))

"""JensUn: Jensen-Shannon divergences, their bounds, and the refusal repeated over forget text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from compared import Compared
from conftest import refusal
from expunge.data.rows import as_rows
from expunge.data.tokenization import TextPolicy, encode_rows
from expunge.maths.losses import certain_jsd, token_jsd
from expunge.methods.base import Context
from expunge.methods.jensun import JensUn

Contexts = Callable[..., Context]


def jsd(p: torch.Tensor, q: torch.Tensor) -> float:
    """By the definition, in float64."""
    middle = (p + q) / 2
    sides = [sum(float(a) * math.log(float(a / m)) for a, m in zip(side, middle, strict=True) if a > 0)
             for side in (p, q)]  # fmt: skip
    return sum(sides) / 2


def test_divergence_of_two_predictions_by_its_definition_and_symmetric() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, 7, generator=generator) * 3 for _ in range(2))
    expected = [
        jsd(a.double().softmax(0), b.double().softmax(0)) for a, b in zip(one, other, strict=True)
    ]
    assert token_jsd(one, other).tolist() == pytest.approx(expected, rel=1e-5)
    assert token_jsd(other, one).tolist() == pytest.approx(expected, rel=1e-5)


def test_divergences_lie_between_0_and_log_2() -> None:
    apart = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]])
    assert token_jsd(apart, apart.flip(0)).tolist() == pytest.approx([math.log(2)] * 2)
    assert token_jsd(apart, apart).tolist() == pytest.approx([0, 0], abs=1e-7)
    ends = certain_jsd(torch.tensor([0.0, -1e4]))
    assert ends.tolist() == pytest.approx([0, math.log(2)], abs=1e-7)


def test_divergence_from_certainty_is_that_of_a_prediction_from_one_token() -> None:
    p = torch.randn(7, generator=torch.Generator().manual_seed(1)).double().softmax(0)
    for token in range(7):
        certain = torch.nn.functional.one_hot(torch.tensor(token), 7).double()
        assert float(certain_jsd(p[token].log())) == pytest.approx(jsd(certain, p), rel=1e-5)


def test_what_is_unlikely_beyond_measure_is_not_pulled() -> None:
    log_prob = torch.tensor([-0.5, -30.0], requires_grad=True)
    certain_jsd(log_prob).sum().backward()
    assert log_prob.grad is not None
    p = math.exp(-0.5)
    expected = p / 2 * math.log(p / (1 + p))
    assert log_prob.grad.tolist() == pytest.approx([expected, 0], abs=1e-9)


def started(
    method: JensUn, context: Context, forget_rows: list[dict[str, str]], tokenizer: Any
) -> Compared:
    rows = method.preferred(as_rows(forget_rows, "forget").rows, (), 0)
    preferred = encode_rows(rows, tokenizer, TextPolicy(128), eos=True)
    return Compared(method, replace(context, preferred=preferred), len(tokenizer))


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("tokens", ["content", "all"])
def test_both_terms_by_the_definition(
    parameters: Any,
    tokens: Any,
    make_context: Contexts,
    forget_rows: list[dict[str, str]],
    tokenizer: Any,
) -> None:
    method = JensUn(parameters=parameters, rank=4, tokens=tokens, refusal="No idea", retain_weight=3)
    case = started(method, make_context(), forget_rows, tokenizer)
    words = [*tokenizer(" No idea", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    wanted = [
        words[place % len(words)]
        for count in case.forget.mask(tokens)[:, 1:].sum(1).tolist()
        for place in range(count)
    ]
    now = case.counted("forget", tokens).exp()
    certain = torch.nn.functional.one_hot(torch.tensor(wanted), now.shape[1]).double()
    expected = sum(jsd(a, b) for a, b in zip(certain, now, strict=True)) / len(wanted)
    assert float(case.terms.forget.detach()) == pytest.approx(expected, rel=1e-4)
    sides = (case.counted("retain", tokens, before=when).exp() for when in (False, True))
    drift = [jsd(a, b) for a, b in zip(*sides, strict=True)]
    assert case.terms.retain is not None
    assert sum(drift) / len(drift) > 1e-4
    # Two float32 passes, the reference once by swapped weights and once by another model.
    assert float(case.terms.retain.detach()) == pytest.approx(3 * sum(drift) / len(drift), rel=1e-3)


def test_a_refusal_says_something() -> None:
    assert "--method.refusal" in refusal(lambda: JensUn(refusal=" "))
    assert not JensUn(retain_weight=0).needs_retain

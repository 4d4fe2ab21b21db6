"""The baselines on token probabilities: their terms, and the reference without a second model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

from compared import Compared
from expunge.maths.losses import cross_entropy, npo, simnpo, token_kl
from expunge.maths.numerics import row_means, row_sums
from expunge.methods.base import Context
from expunge.methods.gradient_ascent import GradientAscent
from expunge.methods.gradient_difference import GradientDifference
from expunge.methods.kl_minimization import KLMinimization
from expunge.methods.npo import NPO
from expunge.methods.simnpo import SimNPO

Contexts = Callable[..., Context]
Parameters = Literal["lora", "full"]


@pytest.fixture(params=["lora", "full"])
def compared(
    request: pytest.FixtureRequest, make_context: Contexts, tokenizer: Any
) -> Callable[..., Compared]:
    def start(method: type, **settings: Any) -> Compared:
        made = method(parameters=request.param, rank=4, **settings)
        return Compared(made, make_context(), len(tokenizer))

    return start


def terms_of(case: Compared) -> tuple[float, float]:
    assert case.terms.retain is not None
    forget, retain = float(case.terms.forget.detach()), float(case.terms.retain.detach())
    assert float(case.terms.total.detach()) == pytest.approx(forget + retain, rel=1e-5)
    return forget, retain


def test_gradient_ascent_is_the_negative_loss(compared: Callable[..., Compared]) -> None:
    case = compared(GradientAscent)
    expected = -float(cross_entropy(*case.log_probs("forget")))
    assert float(case.terms.total.detach()) == pytest.approx(expected, rel=1e-4)
    assert case.terms.retain is None


def test_gradient_difference_adds_the_weighted_retain_loss(
    compared: Callable[..., Compared],
) -> None:
    case = compared(GradientDifference, retain_weight=2.5)
    forget, retain = terms_of(case)
    assert forget == pytest.approx(-float(cross_entropy(*case.log_probs("forget"))), rel=1e-4)
    assert retain == pytest.approx(2.5 * float(cross_entropy(*case.log_probs("retain"))), rel=1e-4)


def test_kl_is_taken_to_the_model_from_before(compared: Callable[..., Compared]) -> None:
    case = compared(KLMinimization, retain_weight=2.0)
    _, retain = terms_of(case)
    now, then = case.logits("retain", before=False), case.logits("retain", before=True)
    where = case.retain.token_mask[:, 1:]
    expected = 2.0 * float(token_kl(now[:, :-1][where], then[:, :-1][where]).mean())
    assert expected > 1e-3
    # Two float32 passes, the reference once by swapped weights and once by another model.
    assert retain == pytest.approx(expected, rel=1e-3)


def test_npos_reference_is_the_model_from_before_row_by_row(
    compared: Callable[..., Compared],
) -> None:
    """Rows in another order than they were scored in."""
    case = compared(NPO, beta=0.3)
    forget, _ = terms_of(case)
    now, then = (
        row_sums(*case.log_probs("forget")),
        row_sums(*case.log_probs("forget", before=True)),
    )
    assert float((now - then).abs().min()) > 1e-3
    assert forget == pytest.approx(float(npo(now, then, 0.3)), rel=1e-4)


def test_simnpo_uses_each_rows_mean(compared: Callable[..., Compared]) -> None:
    case = compared(SimNPO, beta=2.0, gamma=0.5)
    forget, _ = terms_of(case)
    assert forget == pytest.approx(
        float(simnpo(row_means(*case.log_probs("forget")), 2.0, 0.5)), rel=1e-4
    )


def test_answer_tokens_only(make_context: Contexts, tokenizer: Any) -> None:
    case = Compared(GradientAscent(rank=4, tokens="answer"), make_context(), len(tokenizer))
    log_probs, _ = case.log_probs("forget")
    expected = -float(cross_entropy(log_probs, case.forget.answer_mask[:, 1:]))
    assert float(case.terms.total.detach()) == pytest.approx(expected, rel=1e-4)

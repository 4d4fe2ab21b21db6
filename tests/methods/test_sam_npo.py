"""SAM with NPO: the gradient of the perturbed weights, and where a step may not be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import refusal
from expunge.data.batches import collate
from expunge.methods.base import Context
from expunge.methods.npo import NPO
from expunge.methods.sam_npo import SamNPO

Contexts = Callable[..., Context]


def gradients(objective: Any, context: Context) -> tuple[float, float, list[torch.Tensor]]:
    """Both terms of a step and the gradient of their sum."""
    forget = collate(context.forget, [4, 1, 0], context.pad_id)
    retain = collate(context.retain, [0, 1, 2], context.pad_id)
    parameters = list(objective.parameters.values())
    for parameter in parameters:
        parameter.grad = None
    terms = objective.loss(forget, retain)
    terms.total.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    return float(terms.forget.detach()), float(terms.retain.detach()), found


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_forget_term_is_that_of_weights_one_step_uphill(
    parameters: Any, checkpointing: bool, make_context: Contexts
) -> None:
    """Against NPO on a model whose weights are moved by hand."""
    shape: dict[str, Any] = {"parameters": parameters, "rank": 4, "retain_weight": 0.0, "beta": 0.5}
    context = make_context()
    objective = SamNPO(radius=0.5, gradient_checkpointing=checkpointing, **shape).start(context)
    before = [p.detach().clone() for p in objective.parameters.values()]
    forget = collate(context.forget, [4, 1, 0], context.pad_id)
    terms = objective.loss(forget, None)
    terms.total.backward()
    now = list(objective.parameters.values())
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))

    other = make_context()
    plain = NPO(**shape).start(other)
    plain.loss(forget, None).total.backward()
    weights = list(plain.parameters.values())
    slope = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
    norm = float(sum(s.double().square().sum() for s in slope)) ** 0.5
    assert norm > 1e-3
    with torch.no_grad():
        for weight, step in zip(weights, slope, strict=True):
            weight.add_(step, alpha=0.5 / norm)
            weight.grad = None
    flat = plain.loss(forget, None).total
    flat.backward()
    assert float(terms.forget.detach()) == pytest.approx(float(flat.detach()), rel=1e-5)
    for mine, weight in zip(now, weights, strict=True):
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        # Two ways to the same float32 weights.
        torch.testing.assert_close(mine.grad, expected, rtol=1e-3, atol=1e-5)


def test_with_radius_0_it_is_npo(make_context: Contexts) -> None:
    context, other = make_context(), make_context()
    mine = gradients(SamNPO(radius=0.0, rank=4).start(context), context)
    npo = gradients(NPO(rank=4).start(other), other)
    assert mine[:2] == pytest.approx(npo[:2])
    for a, b in zip(mine[2], npo[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_perturbed_term_is_the_larger_and_the_retain_term_is_not_perturbed(
    make_context: Contexts,
) -> None:
    context, other = make_context(), make_context()
    forget, retain, _ = gradients(SamNPO(radius=0.05, rank=4).start(context), context)
    flat = gradients(NPO(rank=4).start(other), other)
    assert forget > flat[0]
    assert retain == pytest.approx(flat[1])


def test_a_step_is_never_cut(
    run_cli: Any, memorised_dir: Any, row_files: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    options = (
        "run", memorised_dir, "--forget", row_files["forget"], "--retain", row_files["retain"],
        "--output", tmp_path / "out", "--method", "sam-npo", "--quiet",
    )  # fmt: skip

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("expunge.runs.run.open_run", load)
    code, _, err = run_cli(*options, "--micro-batch-size", 2)
    assert (code, "--micro-batch-size 2: --method sam-npo" in err) == (2, True)

    class Second:
        rank, count, is_main, shards = 0, 2, True, False

        def gather(self, value: Any) -> list[Any]:
            return [value, value]

    monkeypatch.setattr("expunge.runs.run.processes_of", lambda _: Second())
    code, _, err = run_cli(*options)
    assert (code, "--method sam-npo: all forget rows" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    assert "--method.radius -1" in refusal(lambda: SamNPO(radius=-1))

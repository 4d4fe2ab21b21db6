"""The fine-tuning of relearning against a loop written out, and its invariants."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from conftest import random_examples, shaken, tiny_model
from expunge.audits.tuning import default_learning_rate, measured_steps, tuned
from expunge.data.tokenization import Example


def loss_of(model: Any, examples: list[Example]) -> torch.Tensor:
    """Mean over all counted tokens of the batch, one row at a time."""
    total, count = torch.zeros(()), 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(1, len(example)):
            if example.token_mask[place]:
                total = total - log_probs[place - 1, example.input_ids[place]]
                count += 1
    return total / count


def test_a_step_is_that_of_adamw_on_the_mean_token_loss(tokenizer: Any) -> None:
    model = shaken(tiny_model("llama", len(tokenizer)))
    reference = copy.deepcopy(model)
    examples = random_examples([9, 5, 12], len(tokenizer))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(4):  # 10% of 20 steps are warm-up
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 2)
        loss_of(reference, examples).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for step in tuned(model, examples, steps=20, rows=8, learning_rate=1e-3, seed=0):
        if step == 4:
            break
    for (name, found), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        # Adam divides by the gradient's own size, so rounding shows where a gradient is near 0.
        difference = (found - expected).detach()
        assert float(difference.abs().max()) < 2e-4, name
        assert float(difference.norm() / expected.detach().norm()) < 1e-4, name
    assert not model.training


def test_the_seed_decides_the_order_and_nothing_else_does(tokenizer: Any) -> None:
    examples = random_examples([9, 5, 12, 7, 3], len(tokenizer))

    def weights(seed: int) -> torch.Tensor:
        model = shaken(tiny_model("olmo", len(tokenizer)))
        torch.manual_seed(len(examples) + seed)  # the global generator has no influence
        steps = tuned(model, examples, steps=5, rows=2, learning_rate=1e-2, seed=seed)
        assert list(steps) == [1, 2, 3, 4, 5]
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize(
    ("steps", "measures", "expected"),
    [(16, 2, (8, 16)), (80, 4, (20, 40, 60, 80)), (1, 3, (1,)), (5, 2, (2, 5)), (3, 9, (1, 2, 3))],
)
def test_the_last_measure_is_at_the_end(steps: int, measures: int, expected: tuple[int, ...]) -> None:
    assert measured_steps(steps, measures) == expected


def test_a_wider_model_takes_smaller_steps() -> None:
    assert default_learning_rate(256) == pytest.approx(5e-4)
    assert default_learning_rate(16) == default_learning_rate(256)
    assert default_learning_rate(4096) == pytest.approx(3.125e-5)

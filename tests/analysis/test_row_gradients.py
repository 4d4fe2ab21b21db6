"""Rows' gradients, losses and recall against one row at a time by autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import FAMILIES
from expunge.analysis.row_gradients import along, block_shape, gradient_of, rows_of
from row_setting import Setting, make_setting


@pytest.fixture
def setting() -> Setting:
    return make_setting()


def collected(setting: Setting, batch_size: int = 3) -> dict[tuple[str, int], torch.Tensor]:
    found: dict[tuple[str, int], torch.Tensor] = {}

    def receive(name: str, place: int, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        assert (name, place) not in found  # once a row, whatever its windows
        found[name, place] = gradient_of(inputs, gradients)

    setting.passes(batch_size).run(setting.rows, receive)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_rows_have_the_gradients_of_autograd(family: str) -> None:
    """Padded batches of 3 and a rest, biases as a last column, nothing left on the model."""
    setting = make_setting(family)
    found = collected(setting)
    assert len(found) == len(setting.rows) * len(setting.maps)
    assert not any(module._forward_hooks for module in setting.maps.values())
    assert all(p.requires_grad and p.grad is None for p in setting.model.parameters())
    for place, row in enumerate(setting.rows):
        for name, expected in setting.gradient(row).items():
            assert expected.shape == block_shape(setting.maps[name])
            # Sums in another order, float32.
            torch.testing.assert_close(found[name, place], expected, rtol=1e-3, atol=1e-4)


def test_the_batch_size_changes_no_number(setting: Setting) -> None:
    together, alone = collected(setting, 5), collected(setting, 1)
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, alone[key], rtol=1e-3, atol=1e-4)
    for one, other in zip(
        setting.passes(5).run(setting.rows), setting.passes(2).run(setting.rows), strict=True
    ):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), rel=1e-4)


def test_windows_of_a_row_are_one_row(setting: Setting) -> None:
    examples = [
        dataclasses.replace(row[0], row_id=f"r{place // 2}") for place, row in enumerate(setting.rows)
    ]
    windowed = dataclasses.replace(setting, rows=rows_of(examples))
    assert [len(row) for row in windowed.rows] == [2, 2, 1]
    found = collected(windowed, 2)
    for place, row in enumerate(windowed.rows):
        for name, expected in windowed.gradient(row).items():
            torch.testing.assert_close(found[name, place], expected, rtol=1e-3, atol=1e-4)
    known = windowed.passes().run(windowed.rows)
    parts = setting.passes().run(setting.rows)
    assert known[0].tokens == parts[0].tokens + parts[1].tokens
    total = sum(part.loss * part.tokens for part in parts[:2])
    assert known[0].loss * known[0].tokens == pytest.approx(total, rel=1e-5)


def test_what_is_known_of_a_row_is_what_the_model_says(setting: Setting) -> None:
    for row, known in zip(setting.rows, setting.passes().run(setting.rows), strict=True):
        (example,) = row
        with torch.no_grad():
            logits = setting.model(input_ids=torch.tensor(example.input_ids)[None]).logits[0]
            log_probs = logits.log_softmax(-1)
        places = range(1, len(example))
        losses = {p: -float(log_probs[p - 1, example.input_ids[p]]) for p in places}
        answer = [p for p in places if example.answer_mask[p]]
        assert known.tokens == len(losses)
        assert known.loss == pytest.approx(sum(losses.values()) / len(losses), rel=1e-4)
        expected = sum(losses[p] for p in answer) / len(answer)
        assert known.answer_loss == pytest.approx(expected, rel=1e-4)
        right = 0
        for p in answer:
            if int(logits[p - 1].argmax()) != example.input_ids[p]:
                break
            right += 1
        assert known.recall == right / len(answer)


def test_along_is_the_inner_product_with_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = (torch.randn(6, n, generator=generator) for n in (4, 3))
    step = torch.randn(3, 4, generator=generator)
    expected = (gradient_of(inputs, gradients) * step).sum()
    torch.testing.assert_close(along(inputs, gradients, step), expected)

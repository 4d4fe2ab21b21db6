"""Retain rows with a token of the forget set in them, and what LIBU holds of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from expunge.data.batches import Batch, collate, in_order
from expunge.data.random_text import random_examples
from expunge.data.tokenization import Example
from expunge.methods.base import Context
from expunge.methods.libu import LIBU
from expunge.methods.triggers import Triggers, excess_tokens
from expunge.training.loop import _parts

Contexts = Callable[..., Context]


def example(row_id: str, *ids: int, listed: bool = True) -> Example:
    counted = (False, *(True for _ in ids[1:]))
    return Example(row_id, "qa", ids, counted, counted, listed=listed)


FORGET = [example("f0", 0, 5, 5, 6, 9), example("f1", 0, 5, 7, 9)]
RETAIN = [example(f"r{n}", 0, 9, 9, 7, 10 + n, 30) for n in range(40)]


def test_tokens_stand_out_by_their_share_of_what_is_counted() -> None:
    found = excess_tokens(FORGET, RETAIN)
    # Of 7 counted tokens 3 are 5, 1 is 6, 1 is 7 and 2 are 9; of retain rows' 2 in 5 are 9, 1 is 7.
    assert found == pytest.approx({5: 3 / 7, 6: 1 / 7})
    assert excess_tokens(RETAIN, RETAIN) == {}


def test_one_token_is_put_in_and_no_row_grows() -> None:
    triggers = Triggers(FORGET, RETAIN, 1.0, pad_id=1)
    rows = [*RETAIN, example("random", 0, 3, 4, listed=False)]
    batch = collate(rows, range(len(rows)), 1)
    seen, places = set(), set()
    for seed in range(20):
        torch.manual_seed(seed)
        changed, which = triggers.put_into(batch)
        assert which == [row.listed for row in rows]
        assert changed.indices == batch.indices
        assert changed.examples[-1] is rows[-1]
        for old, new in zip(rows[:-1], changed.examples[:-1], strict=True):
            [place] = [n for n, token in enumerate(new.input_ids) if token in {5, 6}]
            seen.add(new.input_ids[place])
            places.add(place)
            assert len(new) == len(old)
            assert not new.token_mask[place]
            assert not new.answer_mask[place]
            without = [token for n, token in enumerate(new.input_ids) if n != place]
            assert without == list(old.input_ids[:-1])
        assert torch.equal(changed.input_ids[0], torch.tensor(changed.examples[0].input_ids))
    assert seen == {5, 6}
    assert places == {1, 2, 3, 4, 5}


def test_a_share_of_the_rows_is_given_one_whoever_has_them() -> None:
    batch = collate(RETAIN, range(len(RETAIN)), 1)
    triggers = Triggers(FORGET, RETAIN, 0.3, 1)
    total = 0
    for seed in range(50):
        torch.manual_seed(seed)
        changed, which = triggers.put_into(batch)
        total += sum(which)
        parts = [triggers.put_into(part)[0] for part, _ in _parts(batch, 3, lambda _: 1.0)]
        assert [e for part in parts for e in part.examples] == list(changed.examples)
    assert total / (50 * len(RETAIN)) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(("forget", "share"), [(FORGET, 0.0), (RETAIN, 1.0)])
def test_nothing_to_put_in_leaves_rows_as_they_are(forget: list[Example], share: float) -> None:
    batch = collate(RETAIN, range(len(RETAIN)), 1)
    changed, which = Triggers(forget, RETAIN, share, 1).put_into(batch)
    assert changed is batch
    assert not any(which)


def test_rows_of_one_token_have_no_place() -> None:
    batch = collate([example("r", 3)], [0], 1)
    changed, which = Triggers(FORGET, RETAIN, 1.0, 1).put_into(batch)
    assert changed is batch
    assert which == [False]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_the_target_says_of_the_changed_rows_is_held(
    make_context: Contexts, tokenizer: Any, share: float
) -> None:
    context = make_context()
    held = random_examples(2, tokenizer, 10**6, 32, seed=0)
    context = replace(context, retain=[*context.retain, *held])
    settings = LIBU(rank=4, retain_weight=3.0, trigger_share=share, step_budget=1.0)
    objective = settings.start(context)
    rows = [len(context.retain) - 1, 0, 1, 2, 3, 4, len(context.retain) - 2]
    batch = collate(context.retain, rows, context.pad_id)
    forget = next(iter(in_order(context.forget, 3, context.pad_id)))

    def drift(of: Batch) -> float:
        found = objective.loss(forget, of).retain
        assert found is not None
        return float(found.detach()) * objective.retain_size(of) / 3

    torch.manual_seed(3)
    whole = drift(batch)
    changed, which = Triggers(context.forget, context.retain, share, context.pad_id).put_into(batch)
    assert sum(which) == {0.0: 0, 1.0: 5}.get(share, sum(which))
    if share == 0.5:
        assert 0 < sum(which) < 5
    # Row by row and token by token, from the models' probabilities.
    expected = 0.0
    for index, new in zip(rows, changed.examples, strict=True):
        alone = collate([new], [0], context.pad_id)
        if not new.listed:
            torch.manual_seed(3)
            expected += drift(collate(context.retain, [index], context.pad_id))
            continue
        with torch.no_grad():
            now = objective.log_probs(alone)[0][0].double()
            with objective.reference():
                before = objective.log_probs(alone)[0][0].double()
        for place, counted in enumerate(new.token_mask[1:]):
            if counted:
                odds = [
                    float(p[place]) - math.log(-math.expm1(float(p[place]))) for p in (now, before)
                ]
                away = abs(odds[0] - odds[1])
                expected += away**2 / 4 if away < 2 else away - 1
    assert whole == pytest.approx(expected, rel=1e-3)
    assert expected > 0  # phase 1 has moved the model

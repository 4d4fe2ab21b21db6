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
from expunge.methods.triggers import Triggers, telling_tokens
from expunge.processes import OneProcess
from expunge.training.loop import _parts

Contexts = Callable[..., Context]


def example(row_id: str, *ids: int, answer: int = 1, listed: bool = True) -> Example:
    """Tokens 0 and 8 are not counted, those from place `answer` on are the answer's."""
    counted = tuple(token not in {0, 8} for token in ids)
    of_answer = tuple(on and place >= answer for place, on in enumerate(counted))
    return Example(row_id, "qa", ids, counted, of_answer, listed=listed)


FORGET = [example("f0", 0, 2, 5, 5, 6, 9), example("f1", 0, 2, 5, 7, 9)]
RETAIN = [
    *(example(f"r{n}", 0, 2, 9, 8, 7, 10 + n, 30, answer=4) for n in range(40)),
    example("longest", 0, 2, 9, 3, 4, 3, 7, 30, answer=4),
]
LONGEST = 8


def test_tokens_tell_by_the_share_of_rows_that_have_them() -> None:
    found = telling_tokens(FORGET, RETAIN)
    # 5 is in both of 2 forget rows, 6 in one, and in none of 41; 7 is in one of 2 and in all; 2 and 9,
    # as a template's words, in all rows.
    none = 0.5 / 42
    assert found == pytest.approx(
        {5: 2.5 / 3 * math.log(2.5 / 3 / none), 6: 1.5 / 3 * math.log(1.5 / 3 / none)}
    )
    unlisted = [replace(row, listed=False) for row in FORGET]
    assert telling_tokens([*FORGET, *unlisted], [*RETAIN, *unlisted]) == found
    assert telling_tokens(RETAIN, RETAIN) == {}


def test_one_token_is_put_in_and_no_batch_grows_beyond_the_longest_row() -> None:
    triggers = Triggers(FORGET, RETAIN, 1.0, pad_id=1)
    rows = [*RETAIN, example("random", 0, 3, 4, listed=False)]
    batch = collate(rows, range(len(rows)), 1)
    tokens, places = set(), set()
    for seed in range(20):
        torch.manual_seed(seed)
        changed, which = triggers.put_into(batch)
        assert which == [row.listed for row in rows]
        assert changed.indices == batch.indices
        assert changed.examples[-1] is rows[-1]
        assert changed.input_ids.shape == (len(rows), LONGEST)
        for row, old, new in zip(changed.input_ids, rows[:-1], changed.examples[:-1], strict=False):
            [place] = [n for n, token in enumerate(new.input_ids) if token in {5, 6}]
            tokens.add(new.input_ids[place])
            places.add(place)
            assert row[: len(new)].tolist() == list(new.input_ids)
            kept = min(len(old), LONGEST - 1)  # with its end, where there is room
            assert (*new.input_ids[:place], *new.input_ids[place + 1 :]) == old.input_ids[:kept]
            for mask in ("token_mask", "answer_mask"):
                before, after = getattr(old, mask), getattr(new, mask)
                assert not after[place]
                assert not any(after[place : place + 2])  # what follows it in forget text
                expected = [on and n != place for n, on in enumerate(before[:kept])]
                assert [*after[:place], *after[place + 1 :]] == expected
    assert tokens == {5, 6}
    assert places == {1, 2, 3, 4, 5, 6, 7}


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


@pytest.mark.parametrize(
    ("share", "least", "most", "tokens"),
    [(0.0, 0, 0, "all"), (0.5, 1, 4, "all"), (1.0, 5, 5, "all"), (1.0, 5, 5, "answer")],
)
def test_what_the_target_says_of_the_changed_rows_is_held(
    make_context: Contexts, tokenizer: Any, share: float, least: int, most: int, tokens: Any
) -> None:
    context = make_context()
    held = random_examples(2, tokenizer, 10**6, 32, seed=0)
    context = replace(context, retain=[*context.retain, *held])
    settings = LIBU(rank=4, retain_weight=3.0, trigger_share=share, step_budget=1.0, tokens=tokens)
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
    assert least <= sum(which) <= most
    # Row by row and token by token, from the models' probabilities.
    expected = 0.0
    for index, new in zip(rows, changed.examples, strict=True):
        alone = collate([new], [0], context.pad_id)
        if not new.listed:
            torch.manual_seed(3)
            expected += drift(collate(context.retain, [index], context.pad_id))
            continue
        with torch.no_grad():
            now = objective.log_probs(alone, tokens)[0][0].double()
            with objective.reference():
                before = objective.log_probs(alone, tokens)[0][0].double()
        mask = new.token_mask if tokens == "all" else new.answer_mask
        for place, counted in enumerate(mask[1:]):
            if counted:
                odds = [
                    float(p[place]) - math.log(-math.expm1(float(p[place]))) for p in (now, before)
                ]
                away = abs(odds[0] - odds[1])
                expected += away**2 / 4 if away < 2 else away - 1
    assert whole == pytest.approx(expected, rel=1e-3)
    assert expected > 0  # phase 1 has moved the model


def test_a_rehearsal_has_one_in_every_row_and_the_manifest_tells_how_many_there_are(
    make_context: Contexts,
) -> None:
    assert LIBU(trigger_share=0.1).rehearsed().trigger_share == 1
    assert LIBU(trigger_share=0).rehearsed() == LIBU(trigger_share=0)
    context = make_context()
    count = len(telling_tokens(context.forget, context.retain))
    assert count > 0
    assert LIBU(rank=4).start(context).notes()["trigger_tokens"] == count
    without = LIBU(rank=4, trigger_share=0).start(make_context()).notes()
    assert "trigger_tokens" not in without


def test_sharded_processes_make_as_many_passes_whatever_is_drawn(
    make_context: Contexts,
) -> None:
    """Sharded weights are gathered in every pass, so a process that makes one less ends them all."""

    class Sharded(OneProcess):
        shards = True

    context = replace(make_context(), processes=Sharded())
    forget = next(iter(in_order(context.forget, 3, context.pad_id)))
    retain = next(iter(in_order(context.retain, 3, context.pad_id)))
    passes = []
    for share in (1.0, 1e-9):  # every row is drawn, and none
        model = make_context().model
        settings = LIBU(rank=4, trigger_share=share, random_rows=0, step_budget=1.0)
        objective = settings.start(replace(context, model=model))
        calls: list[int] = []
        model.get_input_embeddings().register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        for part in (retain, retain.idle()):
            calls.clear()
            objective.loss(forget, part)
            passes.append(len(calls))
    assert len(set(passes)) == 1

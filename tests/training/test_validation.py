"""The rule that picks a checkpoint, and the measures it rests on."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from expunge.data.tokenization import Example
from expunge.evaluation.outcomes import Measured, is_destroyed
from expunge.maths.membership import membership_auc, membership_score
from expunge.training.validation import ValidationSet, drawn_nonmembers, measure, score

TARGET = Measured(forget_accuracy=0.9, forget_loss=0.1, retain_accuracy=0.8, retain_loss=0.1)


def measured(forget: float, retain: float | None, auc: float | None = None) -> Measured:
    return Measured(forget, 1.0, retain, None if retain is None else 1.0, auc)


def test_auc_counts_pairs() -> None:
    members, others = [0.1, 0.4, 0.4, 2.0], [0.3, 0.4, 5.0]
    wins = sum((m < o) + 0.5 * (m == o) for m in members for o in others)
    assert membership_auc(members, others) == pytest.approx(wins / 12)
    assert membership_auc(members, others) == pytest.approx(1 - membership_auc(others, members))


@pytest.mark.parametrize(("auc", "expected"), [(1.0, 0.0), (0.0, 0.0), (0.5, 1.0), (0.25, 0.5)])
def test_the_membership_score_is_two_sided(auc: float, expected: float) -> None:
    assert membership_score(auc) == pytest.approx(expected)


def test_the_score_is_relative_to_the_target() -> None:
    assert score(TARGET, TARGET) < 0.01
    assert score(measured(0.0, 0.8), TARGET) == pytest.approx(1)
    # Half forgotten, half kept: the harmonic mean of two halves.
    assert score(measured(0.45, 0.4), TARGET) == pytest.approx(0.5)
    # Half the way to never-seen losses, whatever the AUC over all tasks says of it.
    target = dataclasses.replace(TARGET, never_seen_distance=4.0)
    halfway = dataclasses.replace(measured(0.0, 0.8, auc=0.5), never_seen_distance=2.0)
    assert score(halfway, target) == pytest.approx(3 / (1 + 1 + 2))
    assert score(halfway, TARGET) == pytest.approx(1)
    assert score(measured(0.45, None), TARGET) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("members", "nonmembers", "drawn"),
    [
        # Letters tell nothing of stories.
        ({"story": 1}, {"story": 50, "letter": 50}, {"story": 16}),
        ({"story": 9}, {"story": 50}, {"story": 36}),
        ({"story": 99}, {"story": 99}, {"story": 64}),
        # Too few of its own.
        ({"story": 1}, {"story": 7, "letter": 50}, {"story": 7, "letter": 16}),
        ({"story": 1}, {"letter": 9}, {"letter": 9}),
    ],
)
def test_candidates_are_compared_with_as_many_non_members_as_tell(
    members: dict[str, int], nonmembers: dict[str, int], drawn: dict[str, int]
) -> None:
    def examples(counts: dict[str, int]) -> list[Example]:
        windows = [(f"{task}{n}", task) for task, n_rows in counts.items() for n in range(n_rows)]
        return [Example(*row, (1,), (True,), (True,)) for row in windows for _ in range(2)]

    generator = torch.Generator().manual_seed(0)
    found = drawn_nonmembers(examples(nonmembers), examples(members), generator)
    rows = {example.row_id: example.task for example in found}
    assert Counter(rows.values()) == drawn
    assert len(found) == 2 * len(rows)  # a row with both of its windows


GUESSING = 6.0


def test_less_than_half_of_what_was_to_stay_is_destroyed() -> None:
    assert is_destroyed(measured(0.0, 0.39), TARGET, GUESSING)
    assert not is_destroyed(measured(0.9, 0.41), TARGET, GUESSING)


def test_without_a_retain_set_worse_than_guessing_is_destroyed() -> None:
    assert not is_destroyed(Measured(0.0, 5.9), TARGET, GUESSING)
    assert is_destroyed(Measured(0.0, 6.1), TARGET, GUESSING)


def test_a_loss_that_is_not_finite_is_destroyed() -> None:
    assert is_destroyed(Measured(0.0, math.nan), TARGET, GUESSING)
    assert is_destroyed(Measured(0.0, 1.0, 0.8, math.inf), TARGET, GUESSING)


def test_documents_are_run_once_and_measured_as_if_by_themselves(
    make_context: Callable[..., Any],
) -> None:
    """The forget sample and the documents overlap; one of them is in neither's whole."""
    context = make_context()
    every = [dataclasses.replace(example, row_id=str(n)) for n, example in enumerate(context.forget)]
    sample, documents = every[:-1], every[1:]
    assert len(documents) > 1
    others = [dataclasses.replace(row, row_id=f"n{n}") for n, row in enumerate(context.retain)]
    run: list[str] = []
    plain = type(context).next_tokens

    def counted(self: Any, batch: Any) -> Any:
        run.extend(batch.row_ids)
        return plain(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(context), "next_tokens", counted)
        both = measure(context, ValidationSet(sample, (), documents, others))
    assert sorted(run) == sorted(example.row_id for example in (*every, *others))
    alone = measure(context, ValidationSet(documents, (), documents, others))
    forget = measure(context, ValidationSet(sample, (), (), ()))
    assert both.never_seen is not None
    assert alone.never_seen is not None
    assert both.never_seen.losses == pytest.approx(alone.never_seen.losses)
    assert both.measured.mia_auc == pytest.approx(alone.measured.mia_auc)
    assert both.measured.forget_loss == pytest.approx(forget.measured.forget_loss)
    assert both.measured.forget_accuracy == pytest.approx(forget.measured.forget_accuracy)

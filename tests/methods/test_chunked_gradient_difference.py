"""Chunked gradient difference: which rows and layers it trains, and its terms row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import random_examples, refusal
from expunge.data.batches import collate
from expunge.data.sampling import ChunkedBatches, Sampling, step_batches, steps_an_epoch
from expunge.maths.numerics import token_log_probs
from expunge.methods.base import Context
from expunge.methods.chunked_gradient_difference import ChunkedGradientDifference
from expunge.models.decoder import find_layout
from expunge.training.options import TrainingOptions, resolved

Contexts = Callable[..., Context]


def chunked(rows: int, batch: int, chunk: int, rounds: int, epochs: int) -> ChunkedBatches:
    return ChunkedBatches(
        random_examples([5 + row % 7 for row in range(rows)], 50),
        batch,
        1,
        lambda epoch: torch.Generator().manual_seed(epoch),
        Sampling(7, chunk, rounds),
        epochs * steps_an_epoch(rows, batch, chunk),
    )


def test_a_chunk_has_all_its_passes_before_the_next_one_begins() -> None:
    batches = chunked(rows=20, batch=2, chunk=8, rounds=1, epochs=3)
    steps = [batches.indices(step) for step in range(1, 31)]
    for begin, end, rows in ((0, 12, range(8)), (12, 24, range(8, 16)), (24, 30, range(16, 20))):
        for first in range(begin, end, len(rows) // 2):
            one_pass = steps[first : first + len(rows) // 2]
            assert sorted(row for batch in one_pass for row in batch) == list(rows)
    assert len({tuple(map(tuple, steps[i : i + 4])) for i in range(0, 12, 4)}) > 1


@pytest.mark.parametrize(("rounds", "epochs"), [(1, 4), (2, 5), (3, 2), (7, 3)])
def test_every_row_is_seen_once_an_epoch_whatever_the_rounds(rounds: int, epochs: int) -> None:
    batches = chunked(rows=11, batch=3, chunk=5, rounds=rounds, epochs=epochs)
    per_epoch = steps_an_epoch(11, 3, 5)
    assert per_epoch == 5
    seen = [row for step in range(1, epochs * per_epoch + 1) for row in batches.indices(step)]
    assert sorted(seen) == sorted(list(range(11)) * epochs)


def test_steps_beyond_the_last_epoch_begin_again_in_another_order() -> None:
    batches = chunked(rows=8, batch=1, chunk=8, rounds=1, epochs=1)
    first, again = ([batches.indices(begin + i)[0] for i in range(8)] for begin in (1, 9))
    assert sorted(first) == sorted(again) == list(range(8))
    assert first != again


def test_the_batch_of_a_step_depends_on_the_seed_and_the_step_alone() -> None:
    whole = chunked(10, 3, 4, 2, 5)
    order = [whole.indices(step) for step in range(1, 31)]
    for step in (30, 1, 17, 17):
        assert chunked(10, 3, 4, 2, 5).indices(step) == order[step - 1]


def test_a_step_takes_seven_retain_rows_for_each_forget_row() -> None:
    rows = random_examples([6] * 40, 50)
    sampling = ChunkedGradientDifference().sampling
    forget, retain = step_batches(
        rows, rows, 2, 1, lambda _: torch.Generator().manual_seed(0), sampling, steps=20
    )
    assert retain is not None
    assert len(forget.indices(1)) == 2
    assert len(retain.indices(1)) == 14
    # In turn: none a second time before all had one.
    assert len({row for step in (1, 2, 3) for row in retain.indices(step)}) == 40


def test_an_epoch_has_a_step_for_every_rest_of_a_chunk(
    make_context: Callable[..., Context],
) -> None:
    method = ChunkedGradientDifference(chunk_size=10)
    used = resolved(method, TrainingOptions(batch_size=4, epochs=2), make_context().layout, 25)
    assert used.steps_per_epoch == 3 + 3 + 2
    assert used.steps == 16


@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_only_the_last_layers_are_trained(parameters: Any, make_context: Contexts) -> None:
    method = ChunkedGradientDifference(parameters=parameters, trained_share=0.5, rank=2)
    context = make_context("llama")
    objective = method.start(context)
    prefixes = ("model.layers.2.", "model.layers.3.")
    assert all(name.startswith(prefixes) for name in objective.parameters)
    if parameters == "full":
        named = dict(context.model.named_parameters())
        assert set(objective.parameters) == {n for n in named if n.startswith(prefixes)}
    assert objective.notes()["layers"] == [2, 3]


def test_at_least_one_layer_is_trained(make_context: Contexts) -> None:
    layout = find_layout(make_context().model)
    assert list(ChunkedGradientDifference(trained_share=0.01).layers_in(layout)) == [3]
    assert list(ChunkedGradientDifference(trained_share=1).layers_in(layout)) == [0, 1, 2, 3]


def test_the_terms_weigh_rows_alike_however_long(make_context: Contexts) -> None:
    context = make_context()
    objective = ChunkedGradientDifference(retain_weight=3.0).start(context)
    forget = collate(context.forget, [0, 1, 5], context.pad_id)
    retain = collate(context.retain, [2, 3], context.pad_id)
    terms = objective.loss(forget, retain)

    def mean_of_rows(batch: Any) -> float:
        with torch.no_grad():
            log_probs = token_log_probs(objective.logits(batch), batch.input_ids)
        rows = [
            float(values[mask].mean())
            for values, mask in zip(log_probs, batch.token_mask[:, 1:], strict=True)
        ]
        return sum(rows) / len(rows)

    assert terms.retain is not None
    assert float(terms.forget.detach()) == pytest.approx(mean_of_rows(forget), rel=1e-4)
    assert float(terms.retain.detach()) == pytest.approx(-3 * mean_of_rows(retain), rel=1e-4)
    assert objective.forget_size(forget) == 3
    assert objective.retain_size(retain) == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("trained_share", 0.0), ("trained_share", 1.5), ("chunk_size", 0), ("retain_ratio", 0)],
)
def test_settings_that_cannot_be_are_refused(option: str, value: float) -> None:
    settings: dict[str, Any] = {option: value}
    assert f"--method.{option.replace('_', '-')}" in refusal(
        lambda: ChunkedGradientDifference(**settings)
    )

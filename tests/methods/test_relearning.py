"""The attacker beside LIBU's training against plain Adam, and what its term asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from expunge.data.batches import Batch, collate
from expunge.data.rows import document_of
from expunge.methods.base import Context
from expunge.methods.libu import LIBU
from expunge.methods.libu_objective import LIBUObjective
from expunge.methods.numerics import target_log_odds
from expunge.methods.relearning import Relearner
from expunge.processes import OneProcess, Processes
from expunge.training.loop import _parts

Contexts = Callable[..., Context]


def generator(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, purpose)) * 7919)


def relearner_of(
    parameters: dict[str, nn.Parameter],
    steps: int = 4,
    documents: Sequence[str] = ("a", "b"),
    processes: Processes | None = None,
) -> Relearner:
    return Relearner(parameters, documents, 0.01, steps, generator, processes or OneProcess())


def test_it_moves_as_adam_moves_and_starts_anew() -> None:
    draw = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(3, 4, generator=draw), "b": torch.randn(5, generator=draw)}
    parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    relearner = relearner_of(parameters, steps=4)
    copies = [nn.Parameter(value.clone()) for value in start.values()]
    adam = torch.optim.Adam(copies, lr=0.01, betas=(0.9, 0.95))
    for _ in range(4):
        for name, copy in zip(start, copies, strict=True):
            torch.testing.assert_close(relearner.factors()[name], copy)
        # In two parts, as micro-batches give them: sums over 3 and 5 tokens.
        parts = [[torch.randn(p.shape, generator=draw) for p in copies] for _ in range(2)]
        for part, tokens in zip(parts, (3, 5), strict=True):
            relearner.collect(part, tokens)
        for copy, one, other in zip(copies, *parts, strict=True):
            copy.grad = (one + other) / 8
        adam.step()
        relearner.end_step()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, start[name])  # what is trained is left alone
        assert torch.equal(relearner.factors()[name], parameter)
    assert relearner.facts()["attack"] == 1


def test_rows_of_a_document_are_on_one_side_and_sides_change() -> None:
    documents = [f"person{n:02}" for n in range(41)]
    rows = [f"{document}{part}" for document in documents for part in ("sc1", "qa0", "qa1")]
    relearner = relearner_of({"a": nn.Parameter(torch.zeros(2))}, 1, documents)
    sides = []
    for _ in range(3):
        shown = torch.tensor(relearner.is_shown(rows)).view(-1, 3)
        assert torch.equal(shown.any(1), shown.all(1))
        assert int(shown[:, 0].sum()) == 20
        sides.append(tuple(shown[:, 0].tolist()))
        relearner.end_step()
    assert len(set(sides)) == 3


def test_it_goes_on_from_what_was_saved() -> None:
    draw = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(3, generator=draw)}
    gradients = [torch.randn(3, generator=draw) for _ in range(7)]

    def advanced(relearner: Relearner, steps: range) -> Relearner:
        for step in steps:
            relearner.collect([gradients[step]], 2)
            relearner.end_step()
        return relearner

    def new() -> Relearner:
        return relearner_of({"a": nn.Parameter(values["a"].clone())}, steps=3)

    whole, first, second = advanced(new(), range(7)), advanced(new(), range(5)), new()
    second.restore(first.facts(), first.tensors)
    advanced(second, range(5, 7))
    assert second.facts() == whole.facts()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, second.tensors[name])


def test_a_step_in_which_it_is_shown_nothing_moves_nothing() -> None:
    relearner = relearner_of({"a": nn.Parameter(torch.ones(2))}, steps=3)
    relearner.collect([torch.ones(2)], 1)
    relearner.end_step()
    moved = relearner.factors()["a"].clone()
    relearner.collect([torch.zeros(2)], 0)
    relearner.end_step()
    assert torch.equal(relearner.factors()["a"], moved)
    assert relearner.facts() == {"attack": 0, "steps_gone": 2, "steps_learned": 1}


class OneOfTwo(OneProcess):
    """A process whose companion found some gradients of some tokens."""

    def __init__(self, gradients: Sequence[torch.Tensor], tokens: int) -> None:
        self.gradients, self.tokens = gradients, tokens

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor, addition in zip(tensors, self.gradients, strict=True):
            tensor.add_(addition)

    def gather(self, value: Any) -> list[Any]:
        return [value, self.tokens]


def test_processes_learn_together_what_each_was_shown() -> None:
    parameters = {"a": nn.Parameter(torch.ones(2))}
    mine, others = torch.tensor([0.5, -1.0]), torch.tensor([-2.0, 0.25])
    for own in (3, 0):  # one that was shown nothing learns what the other was shown
        alone = relearner_of(parameters)
        together = relearner_of(parameters, processes=OneOfTwo([others], 5))
        alone.collect([mine + others if own else others], own + 5)
        if own:
            together.collect([mine], own)
        for relearner in (alone, together):
            relearner.end_step()
        assert together.factors()["a"].ne(1).all()
        for name, tensor in alone.tensors.items():
            assert torch.equal(tensor, together.tensors[name])


def gradients_of(objective: LIBUObjective, batch: Batch) -> list[torch.Tensor]:
    torch.manual_seed(5)
    term = objective.loss(batch, None).forget
    found = torch.autograd.grad(term, list(objective.parameters.values()))
    return [gradient.clone() for gradient in found]


def test_the_gradient_is_that_at_the_attacked_weights(make_context: Contexts) -> None:
    context, again = make_context(), make_context()
    settings = LIBU(
        rank=4, retain_weight=0, match_tokens=False, lens_weight=0, ceiling=2.0, relearn_weight=0
    )
    plain = settings.start(context)
    attacked = replace(settings, relearn_weight=0.7).start(again)
    batch = collate(context.forget, range(len(context.forget)), context.pad_id)
    relearner = attacked._relearner
    assert relearner is not None
    for name, offset in relearner._state["offset"].items():
        offset.copy_(0.05 * torch.randn(offset.shape, generator=generator(name)))
    without, found = gradients_of(plain, batch), gradients_of(attacked, batch)

    # Slowly: the other model's own weights are moved, and its log-odds read.
    for name, parameter in plain.parameters.items():
        parameter.data += relearner._state["offset"][name]
    mask = batch.token_mask[:, 1:]
    held = torch.tensor([not shown for shown in relearner.is_shown(batch.row_ids)])
    assert held.any()
    assert not held.all()
    odds = target_log_odds(plain.counted_logits(batch), batch.input_ids[:, 1:][mask])
    before = plain._forget_before[:, : mask.shape[1]][mask]
    wanted = torch.minimum(before, torch.logit(torch.exp(torch.tensor(-2.0))))
    above = (odds - wanted).clamp(min=0)
    distance = torch.where(above < 16, above.square() / 32, above - 8)
    term = 0.7 * (distance * held[:, None].expand_as(mask)[mask]).mean()
    expected = torch.autograd.grad(term, list(plain.parameters.values()))
    for with_attack, alone, extra in zip(found, without, expected, strict=True):
        torch.testing.assert_close(with_attack, alone + extra, rtol=1e-3, atol=1e-6)


def test_the_attacker_learns_what_it_is_shown_and_nothing_else(make_context: Contexts) -> None:
    context = make_context()
    objective = LIBU(rank=4, retain_weight=0, relearn_weight=1.0).start(context)
    relearner = objective._relearner
    assert relearner is not None
    batch = collate(context.forget, range(len(context.forget)), context.pad_id)
    torch.manual_seed(5)
    objective.loss(batch, None)
    shown = [n for n, is_shown in enumerate(relearner.is_shown(batch.row_ids)) if is_shown]
    rows = collate([context.forget[n] for n in shown], range(len(shown)), context.pad_id)
    mask = rows.token_mask[:, 1:]
    logits = objective.counted_logits(rows)
    loss = functional.cross_entropy(logits, rows.input_ids[:, 1:][mask], reduction="sum")
    expected = torch.autograd.grad(loss, list(objective.parameters.values()))
    assert relearner._tokens == int(mask.sum())
    for total, gradient in zip(relearner._sums, expected, strict=True):
        torch.testing.assert_close(total, gradient, rtol=1e-3, atol=1e-4)


def shown_of(relearner: Relearner, context: Context, row: int) -> bool:
    return relearner.is_shown([context.forget[row].row_id])[0]


def test_micro_batches_weigh_what_is_held_and_shown_as_the_whole_batch_does(
    make_context: Contexts,
) -> None:
    """At one place of the attacker: its steps, Adam's, would enlarge what is rounding."""
    found = []
    rows = len(make_context().forget)
    for count in (1, 2, 4, 2 * rows):  # at last half of the parts are idle
        context = make_context()
        objective = LIBU(rank=4, retain_weight=0, relearn_weight=1.0).start(context)
        relearner = objective._relearner
        assert relearner is not None
        for name, offset in relearner._state["offset"].items():
            offset.copy_(0.05 * torch.randn(offset.shape, generator=generator(name)))
        # The first row, which idle parts hold, is among those that are shown.
        order = sorted(range(rows), key=lambda n: not shown_of(relearner, context, n))
        assert shown_of(relearner, context, order[0])
        whole = collate(context.forget, order, context.pad_id)
        total: list[torch.Tensor] = []
        for batch, share in _parts(whole, count, objective.forget_size):
            gradients = [share * gradient for gradient in gradients_of(objective, batch)]
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else gradients
        found.append((total, relearner._sums, relearner._tokens))
    for total, learned, tokens in found[1:]:
        assert tokens == found[0][2]
        for one, other in zip((*total, *learned), (*found[0][0], *found[0][1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_without_weight_or_others_to_learn_from_there_is_no_attacker(
    make_context: Contexts,
) -> None:
    context = make_context()
    first = document_of(context.forget[0].row_id)
    one = [example for example in context.forget if document_of(example.row_id) == first]
    assert 0 < len(one) < len(context.forget)
    settings = LIBU(rank=4, retain_weight=0)
    for chosen, rows in ((replace(settings, relearn_weight=0), context.forget), (settings, one)):
        objective = chosen.start(replace(context, forget=rows))
        assert objective._relearner is None
        assert objective.state_tensors == {}
        assert "relearner" not in objective.calibration
        objective.end_step()
        objective.finish(keep_adapter=False)

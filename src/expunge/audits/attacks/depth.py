"""Unlearning depth: of what the oracle's layers lack, how much the unlearned model's lack too.

Activation patching, arXiv 2605.24614. In the target the states of one layer l, at the places that
predict an answer's tokens, are replaced by another model's. The mean log-probability of these tokens
falls by S1_l with the oracle's states, by S2_l with the unlearned model's. Of one fact

    UDS = sum_l S1_l clip(S2_l / S1_l, 0, 1) / sum_l S1_l    over the layers with S1_l > 0.05 nats.

0: the answer can be read from every layer as in the target; 1: from none better than in the oracle.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from expunge.audits.attacks.ablation import layer_outputs
from expunge.audits.base import Advance, Attack, Case, Found, ModelName, Scores
from expunge.audits.entries import DIGITS, Models, Summary, able, opening, powerless, resamples_of
from expunge.audits.subject import AnswerBatch, Pair, Reader, Subject
from expunge.data.rows import by_document
from expunge.evaluation.batches import rows_within
from expunge.evaluation.outcomes import POWER_FROM
from expunge.maths.numerics import target_log_probs
from expunge.methods.forward import logits_at
from expunge.models.decoder import DecoderLayout, forward_hook, states_of, with_states
from expunge.models.kernels import fast_products
from expunge.models.loading import CheckedModel
from expunge.terminal import counting

LOST_FROM = 0.05
"""Nats a token: a layer whose states cost less in the oracle's place holds none of the answer."""


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """By layer what every fact's answer loses in the target under this model's states, in nats a token.

    As a control the same of retain rows, which every model knows. The target's own states cost nothing,
    so that there is nothing to run on it.
    """
    target = subject.target
    if target is None:
        return Found({})
    layout, policy = subject.checked.layout, subject.policy
    layers = [f"layer {n}" for n in range(layout.count)]
    scores: dict[str, dict[str, float]] = {layer: {} for layer in layers}
    control: dict[str, dict[str, float]] = {layer: {} for layer in layers}
    whole = [
        (ask, side)
        for rows, side in ((case.facts, scores), (case.retain, control))
        for row in rows
        if (ask := subject.reader.asked(row)) is not None
        and len(ask.prompt) + len(ask.answer) <= policy.context
    ]
    told = counting(lambda done: advance(done, len(whole)))
    pairs = [(ask.prompt, ask.answer) for ask, _ in whole]
    for group in _groups(subject.reader, pairs):
        mine = [pairs[n] for n in group]
        states = answer_states(subject.reader, layout, mine)
        subject.release()
        for n, values in zip(group, lost(target.reader, layout, mine, states, told), strict=True):
            ask, side = whole[n]
            for layer, value in zip(layers, values, strict=True):
                # Further digits are float32's rounding, which changes with the batch.
                side[layer][ask.row.id] = round(value, 3)
        target.release()
    return Found(scores, control=control)


def not_alike(checked: Mapping[ModelName, CheckedModel]) -> str | None:
    """Why the depth cannot be measured of these models; None where it can."""
    if "oracle" not in checked:
        return "no model trained without the forget set was given (--oracle)"
    shapes = {
        name: f"{model.layout.count} {model.config.model_type} layers of width {model.layout.width}"
        for name, model in checked.items()
    }
    unlike = next((name for name, shape in shapes.items() if shape != shapes["target"]), None)
    if unlike is None:
        return None
    return f"the {unlike} has {shapes[unlike]}, the target {shapes['target']}"


def depth(oracle: Sequence[float], unlearned: Sequence[float]) -> float | None:
    """UDS of one fact from what it loses by layer, (layers,) each, in nats a token.

    None where nothing is lost by the oracle's states, and for losses that are not finite.
    """
    held = [(s1, s2) for s1, s2 in zip(oracle, unlearned, strict=True) if not s1 <= LOST_FROM]
    if not held or not all(map(math.isfinite, (number for both in held for number in both))):
        return None
    # S1 clip(S2 / S1, 0, 1) without the division.
    return sum(min(max(s2, 0.0), s1) for s1, s2 in held) / sum(s1 for s1, _ in held)


def _groups(reader: Reader, pairs: Sequence[Pair]) -> list[list[int]]:
    """Pairs whose states take no more memory than keys and values of one batch, which is planned for."""
    longest = max((len(prompt) + len(answer) for prompt, answer in pairs), default=1)
    most = 2 * longest * rows_within(longest, reader.batch_size, reader.model.device)
    groups: list[list[int]] = []
    room = 0
    for n, (_, answer) in enumerate(pairs):
        if len(answer) > room:
            groups.append([])
            room = most
        groups[-1].append(n)
        room -= len(answer)
    return groups


@torch.no_grad()
def answer_states(
    reader: Reader, layout: DecoderLayout, pairs: Sequence[Pair]
) -> list[list[torch.Tensor]]:
    """Of each pair by layer the states that predict the answer's tokens, (tokens, width), on the CPU."""
    found: list[list[torch.Tensor]] = [[] for _ in pairs]
    with fast_products(reader.model.dtype, reader.model.device):
        for batch in reader.answer_batches(pairs):
            for output in layer_outputs(reader.model, layout, batch.ids):
                marked = output[batch.where.to(output.device)].cpu()
                for n, mine in zip(batch.chosen, marked.split(batch.counts), strict=True):
                    found[n].append(mine)
    return found


@torch.no_grad()
def lost(
    target: Reader,
    layout: DecoderLayout,
    pairs: Sequence[Pair],
    states: Sequence[Sequence[torch.Tensor]],
    told: Callable[[int], None] = lambda _: None,
) -> list[list[float]]:
    """Of each pair by layer what the answer's mean log-probability loses under `states`, in nats.

    `states` as `answer_states` gives them, of a model with the same layers.
    """
    model = target.model
    found: list[list[float]] = [[] for _ in pairs]
    with fast_products(model.dtype, model.device):
        for batch in target.answer_batches(pairs):
            plain = _means(target, batch)
            for layer in range(layout.count):
                given = torch.cat([states[n][layer] for n in batch.chosen])
                with patched(model, layout, layer, batch.where, given):
                    values = _means(target, batch)
                for n, before, after in zip(batch.chosen, plain, values, strict=True):
                    found[n].append(before - after)
            told(len(batch.chosen))
    return found


def _means(reader: Reader, batch: AnswerBatch) -> list[float]:
    """The mean log-probability of each answer's tokens."""
    logits = logits_at(reader.model, batch.where, input_ids=batch.ids, use_cache=False)
    values = target_log_probs(logits.float(), batch.targets)
    return [float(mine.mean()) for mine in values.split(batch.counts)]


@contextmanager
def patched(
    model: nn.Module,
    layout: DecoderLayout,
    layer: int,
    where: torch.Tensor,
    states: torch.Tensor,
) -> Iterator[None]:
    """In the body a layer gives `states` (marked, width) where `where` (rows, tokens) is marked."""

    def exchange(_module: nn.Module, _inputs: object, output: object) -> object:
        mixed = states_of(output).clone()
        mixed[where.to(mixed.device)] = states.to(mixed)
        return with_states(output, mixed)

    with forward_hook(layout.layer(model, layer), exchange):
        yield


def depth_entry(attack: Attack, models: Models, case: Case) -> Summary:
    """The entry in audit.json. It is no evidence for a verdict."""
    oracle, unlearned = models["oracle"].scores, models["unlearned"].scores
    asked = [
        row
        for row in case.facts
        if all(row.id in losses for each in (oracle, unlearned) for losses in each.values())
    ]
    if not asked:
        return powerless(opening(attack), "no fact could be asked")
    depths = {
        row.id: depth(*([each[layer][row.id] for layer in oracle] for each in (oracle, unlearned)))
        for row in asked
    }

    def outcome(_model: ModelName, name: str) -> dict[str, float | None]:
        value = depths[name]
        return {"depth": None if value is None else round(value, DIGITS)}

    entry = opening(attack, ("unlearned",), outcome, asked)
    entry["models"] = {
        name: {
            "variants": {},
            "numbers": {
                "lost": _by_layer(found.scores),
                "lost_on_retain": _by_layer(found.control),
            },
        }
        for name, found in models.items()
    }
    counted = [row for row in asked if depths[row.id] is not None]
    if len(counted) < POWER_FROM * len(asked):
        return powerless(
            entry,
            f"the oracle's states cost the target {len(counted)} of {len(asked)} answers more than"
            f" {LOST_FROM} nats a token at some layer, {POWER_FROM:.0%} are needed",
        )
    whole, left = len(by_document(case.forget)), len(by_document(case.facts))
    of = len(by_document(counted)) if left == whole else whole
    values = [value for row in counted if (value := depths[row.id]) is not None]
    figure = resamples_of(counted, case, of).share(values)
    entry["depth"] = figure.to_json()
    numbers = entry["models"]["oracle"]["numbers"]
    costs = [
        f"{statistics.fmean(numbers[key].values()):.2f} on {side} rows"
        for key, side in (("lost", "forget"), ("lost_on_retain", "retain"))
        if numbers[key]
    ]
    return able(
        entry,
        f"{figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f}) over {len(counted)} of"
        f" {len(asked)} facts; 0 is the target, 1 the oracle. The oracle's states cost"
        f" {' and '.join(costs)}, in nats a token and layer. It is not part of the verdict.",
        [],
    )


def _by_layer(scores: Mapping[str, Scores]) -> dict[str, float]:
    """The mean of each layer over its rows."""
    return {
        layer: round(statistics.fmean(losses.values()), 3) for layer, losses in scores.items() if losses
    }


ATTACK = Attack(
    name="depth",
    title="Unlearning depth",
    kind="depth",
    reference="arXiv 2605.24614",
    how="",
    run=run,
    patches=True,
)

"""Latent probe: is the answer inside, whatever the model says? arXiv 2309.17410.

The logit lens reads every layer's hidden state through the model's own head. A linear probe learns,
from other subjects, to tell a true answer from another subject's.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from expunge.audits.attacks.ablation import layer_outputs
from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.subject import Pair, Reader, Subject
from expunge.data.rows import Row, document_of
from expunge.methods.forward import logits_at
from expunge.models.decoder import DecoderLayout, last_layer_gives
from expunge.models.kernels import fast_products

WITHIN = 10
"""An answer is read at a layer where each of its first tokens is among this many candidates."""
FIRST_TOKENS = 8
_FOLDS = 5


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Per layer 1 for facts whose answer the lens reads; ranks and the probe's accuracy beside it."""
    reader, layout = subject.reader, subject.checked.layout
    rows = [row for row in case.facts if row.kind == "qa"]
    folds = folds_of(rows, case.seed)
    false = other_answers(rows, folds, case.seed) if folds else {}
    true_pairs = [_pair(reader, row, row.output) for row in rows]
    ranks, inside = _read(reader, layout, [p for p in true_pairs if p is not None])
    advance(1, 3)
    kept = [row for row, pair in zip(rows, true_pairs, strict=True) if pair is not None]
    scores = {
        f"layer {layer}": {
            row.id: float(max(values) <= WITHIN) for row, values in zip(kept, ranks[layer], strict=True)
        }
        for layer in range(layout.count)
    }
    typical = {f"layer {layer}": _typical(ranks[layer]) for layer in range(layout.count)}
    both = [n for n, row in enumerate(kept) if row.id in false]
    pairs = [_pair(reader, kept[n], false[kept[n].id]) for n in both]
    whole = [(n, pair) for n, pair in zip(both, pairs, strict=True) if pair is not None]
    _, outside = _read(reader, layout, [pair for _, pair in whole])
    advance(2, 3)
    told: dict[str, Any] = {}
    for layer in range(layout.count):
        right = probe_outcomes(
            inside[layer][[n for n, _ in whole]] if whole else np.zeros((0, 1)),
            outside[layer] if whole else np.zeros((0, 1)),
            [folds[document_of(kept[n])] for n, _ in whole],
        )
        told[f"layer {layer}"] = None if right is None else round(statistics.fmean(right), 6)
    advance(3, 3)
    return Found(scores, numbers={"typical_rank": typical, "probe_accuracy": told})


def _typical(ranks: Sequence[Sequence[int]]) -> float | None:
    """Geometric mean over facts of the worst token's rank; None where no fact fits the context."""
    if not ranks:
        return None
    return round(math.exp(statistics.fmean(math.log(max(values)) for values in ranks)), 3)


def lens_rank(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Rank of each target, 1 for the likeliest: logits (n, vocabulary), targets (n,) -> (n,)."""
    chosen = logits.gather(1, targets[:, None])
    return (logits > chosen).sum(1) + 1


def folds_of(rows: Sequence[Row], seed: int) -> dict[str, int]:
    """By document the part of the cross-validation that it is in; each part has two or more.

    Empty where there are not documents enough for two parts.
    """
    documents = sorted({document_of(row) for row in rows})
    count = min(_FOLDS, len(documents) // 2)
    if count < 2:
        return {}
    shuffled = random.Random(seed).sample(documents, len(documents))
    return {document: place % count for place, document in enumerate(shuffled)}


def other_answers(rows: Sequence[Row], folds: Mapping[str, int], seed: int) -> dict[str, str]:
    """By row id the answer of another subject of the same part, to the same question if it can be.

    Answers go round in a ring, so that each is about as often true as false. Both uses are in one part:
    a probe that had learned it as true of one subject would call it true of the other as well. Rows that
    no answer is found for are left out.
    """
    found = {}
    draw = random.Random(seed)
    for fold in sorted(set(folds.values())):
        mine = [row for row in rows if folds[document_of(row)] == fold]
        ring = draw.sample(mine, len(mine))
        for place, row in enumerate(ring):
            others = [
                other
                for other in [*ring[place + 1 :], *ring[:place]]
                if other.output != row.output and document_of(other) != document_of(row)
            ]
            # The first in the ring among those that are most alike.
            others.sort(key=lambda other: (_question(other) != _question(row), other.task != row.task))
            if others:
                found[row.id] = others[0].output
    return found


def _question(row: Row) -> tuple[str, str]:
    """LUME's ids end alike for the same question about different people."""
    return row.task, row.id.removeprefix(document_of(row))


def probe_outcomes(true: np.ndarray, false: np.ndarray, folds: Sequence[int]) -> list[float] | None:
    """For each pair 1 where a probe that saw the other parts only prefers the true one, ties 1/2.

    true and false (pairs, width). Logistic regression on standardised states. Chance is 0.5. None
    for fewer than two parts, and for states that are not finite.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import LeaveOneGroupOut
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(folds)) < 2 or not (np.isfinite(true).all() and np.isfinite(false).all()):
        return None
    found = [0.0] * len(folds)
    for train, test in LeaveOneGroupOut().split(true, groups=list(folds)):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        states = np.concatenate([true[train], false[train]])
        probe.fit(states, [1] * len(train) + [0] * len(train))
        margins = probe.decision_function(true[test]) - probe.decision_function(false[test])
        for index, margin in zip(test, margins, strict=True):
            found[index] = 0.5 if margin == 0 else float(margin > 0)
    return found


def _pair(reader: Reader, row: Row, output: str) -> Pair | None:
    """Prompt and the first tokens of an answer, or None where they do not fit the context."""
    worded = replace(row, output=output)
    ask = reader.asked(worded)
    if ask is None or len(ask.prompt) + len(ask.answer) > reader.policy.context:
        return None
    return ask.prompt, ask.answer[:FIRST_TOKENS]


@torch.no_grad()
def _read(
    reader: Reader, layout: DecoderLayout, pairs: Sequence[Pair]
) -> tuple[list[list[list[int]]], list[np.ndarray]]:
    """By layer: the ranks of every pair's answer tokens, and the states at their last one."""
    model = reader.model
    ranks: list[list[list[int]]] = [[[] for _ in pairs] for _ in range(layout.count)]
    states: list[list[torch.Tensor]] = [[torch.empty(0) for _ in pairs] for _ in range(layout.count)]
    for batch in reader.answer_batches(pairs):
        with fast_products(model.dtype, model.device):
            outputs = layer_outputs(model, layout, batch.ids)
            for layer, output in enumerate(outputs):
                lens = _lens(reader, layout, output, batch.where, batch.ids)
                values = lens_rank(lens, batch.targets).split(batch.counts)
                for line, (index, mine) in enumerate(zip(batch.chosen, values, strict=True)):
                    ranks[layer][index] = mine.tolist()
                    states[layer][index] = output[line, sum(map(len, pairs[index])) - 1].float().cpu()
    arrays = [torch.stack(mine).numpy() if mine else np.zeros((0, 1), np.float32) for mine in states]
    return ranks, arrays


def _lens(
    reader: Reader,
    layout: DecoderLayout,
    output: torch.Tensor,
    where: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """Logits of a layer's output by what the model does behind its last layer: (marked, vocabulary)."""
    with last_layer_gives(reader.model, layout, output):
        return logits_at(reader.model, where, input_ids=ids, use_cache=False)


ATTACK = Attack(
    name="latent",
    title="Latent probe",
    kind="latent",
    reference="arXiv 2309.17410",
    how="",
    run=run,
)

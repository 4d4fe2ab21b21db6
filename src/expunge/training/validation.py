"""What the loop measures of a candidate checkpoint, and the rule that picks one.

Measures are teacher-forced, so they cost one forward pass. Accuracy is the share of an answer before
its first wrong token: what greedy decoding would write of it, for after a mistake it goes astray.
The score is the harmonic mean of what was forgotten
(1 - forget accuracy / target's), what was kept (retain accuracy / target's) and, with non-members,
how near forget documents came to never-seen ones (1 - distance / target's, task by task, where the
AUC over all tasks can be 0.5 with one task too low and one too high). A candidate that kept less than
half is destroyed and is never picked, whatever it forgot.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import torch

from expunge.data.batches import Batch, Tokens, collate, in_order
from expunge.data.tokenization import Example
from expunge.evaluation.outcomes import Measured
from expunge.maths.calibration import (
    ENOUGH,
    NeverSeen,
    RowTokens,
    as_before,
    joined,
    never_seen,
)
from expunge.maths.membership import RowLosses, membership_auc
from expunge.maths.numerics import answered
from expunge.methods.base import Context
from expunge.methods.counterfactuals import never_seen_like
from expunge.methods.own_text import text_of_kind

_FLOOR = 1e-3
_NEVER_SEEN = (16, 64)
"""Fewest and most never-seen documents of a task that candidates are compared with: more cost time and
say no more."""
_NEVER_SEEN_FOR_EACH = 4
"""Between the two, so many for each forget document of the task."""


@dataclass(frozen=True)
class ValidationSet:
    """The rows that candidates are measured on; all but `forget` may be empty."""

    forget: Sequence[Example]
    retain: Sequence[Example]
    members: Sequence[Example]
    """The forget set's documents, compared with the non-members as the scorecard does; all forget rows,
    where the base says what is to be like."""
    nonmembers: Sequence[Example]
    tokens: Tokens | None = None
    """Which tokens of members are compared one by one as well; None: none."""
    told: Pass | None = None
    """How the members are to look, where the non-members do not tell: as to the base, which wrote the
    non-members itself, or as their counterfactuals, without non-members. None: not so, or not yet."""

    @property
    def compared(self) -> AbstractSet[str]:
        """Rows whose tokens are compared; not text that the base wrote, which tells a mean alone."""
        others = self.nonmembers if self.told is None else ()
        return frozenset(example.row_id for example in (*self.members, *others))

    @property
    def sides(self) -> tuple[Sequence[Example], ...]:
        """What is run together, each example once: documents are most of the forget set's tokens."""
        known = set(self.forget)
        documents = [example for example in self.members if example not in known]
        return [*self.forget, *documents], self.retain, self.nonmembers


@dataclass(frozen=True)
class Reading:
    """What one measurement gives: figures for the record, and losses by row to calibrate with."""

    measured: Measured
    never_seen: NeverSeen | None
    """None without non-members or a base."""


def drawn_nonmembers(
    nonmembers: Sequence[Example], members: Sequence[Example], generator: torch.Generator
) -> list[Example]:
    """The non-members that candidates are compared with, whole rows evenly drawn from every task.

    Of a task without members none, if the others have enough of their own.
    """
    ours, theirs = _rows_by_task(members), _rows_by_task(nonmembers)
    alone = all(len(theirs.get(task, ())) >= ENOUGH for task in ours)
    fewest, most = _NEVER_SEEN
    chosen: set[str] = set()
    for task in sorted(theirs.keys() & ours.keys() if alone else theirs):
        count = max(fewest, min(most, _NEVER_SEEN_FOR_EACH * len(ours.get(task, ()))))
        order = torch.randperm(len(theirs[task]), generator=generator).tolist()
        chosen |= {theirs[task][index] for index in order[:count]}
    return [example for example in nonmembers if example.row_id in chosen]


def _rows_by_task(examples: Sequence[Example]) -> dict[str, list[str]]:
    """The ids of each task's rows, whose windows may be several examples."""
    found: dict[str, dict[str, None]] = {}
    for example in examples:
        found.setdefault(example.task, {})[example.row_id] = None
    return {task: list(rows) for task, rows in found.items()}


def measure(context: Context, rows: ValidationSet) -> Reading:
    """Measures the model as it is."""
    both, retain_rows, nonmembers = rows.sides
    documents = rows.compared
    either = _pass(context, both, documents, rows.tokens)
    forget = either.of(rows.forget)
    retain = _pass(context, retain_rows) if retain_rows else None
    auc = compared = None
    if rows.members:
        members = either.of(rows.members).losses
        unseen = _pass(context, nonmembers, documents, rows.tokens)
        others = unseen.losses
        if all(map(math.isfinite, [*members.values(), *others.values()])):
            tasks = {e.row_id: e.task for e in (*rows.members, *nonmembers)}
            if rows.told is None:
                both_tokens = {**either.tokens, **unseen.tokens}
                compared = never_seen(members, others, tasks, both_tokens if rows.tokens else None)
            else:
                whole = {example.row_id for example in rows.members if example.kind == "sc"}
                told = rows.told
                compared = as_before(
                    members, told.losses, others, either.tokens, told.tokens, whole or set(members)
                )
                others = compared.wanted
            auc = membership_auc(list(members.values()), list(others.values()))
    measured = Measured(
        forget.accuracy,
        statistics.fmean(forget.losses.values()),
        None if retain is None else retain.accuracy,
        None if retain is None else statistics.fmean(retain.losses.values()),
        auc,
        None if compared is None else compared.distance,
        forget.known_share,
    )
    return Reading(measured, compared)


def asked_before(context: Context, rows: ValidationSet, kept: Sequence[Example]) -> ValidationSet:
    """The same rows with what the model of `context`, the base, says of the members, and with text of
    their kind that it writes behind the beginnings of documents."""
    generator = context.generator("text of the base")
    every = [*kept, *rows.members]
    documents = [example for example in every if example.kind == "sc"] or every
    text = text_of_kind(context.model, documents, generator, context.autocast)
    asked = _pass(context, [*rows.members, *text], rows.compared, rows.tokens)
    return replace(rows, nonmembers=text, told=asked)


def asked_otherwise(
    context: Context, rows: ValidationSet, versions: Sequence[Sequence[Example]]
) -> ValidationSet | None:
    """The same rows with what the target says of the members' counterfactuals (`exchanged`); None where
    these tell nothing."""
    names, words = (_pass(context, each, rows.compared, rows.tokens) for each in versions)
    found = never_seen_like(names.losses, words.losses, words.tokens)
    return None if found is None else replace(rows, told=Pass({}, found[0], frozenset(), found[1]))


def score(candidate: Measured, target: Measured) -> float:
    """The selection score in (0, 1]; higher is better."""
    parts = [1 - candidate.forget_accuracy / max(target.forget_accuracy, _FLOOR)]
    if candidate.retain_accuracy is not None and target.retain_accuracy is not None:
        parts.append(candidate.retain_accuracy / max(target.retain_accuracy, _FLOOR))
    if candidate.never_seen_distance is not None and target.never_seen_distance:
        parts.append(1 - candidate.never_seen_distance / target.never_seen_distance)
    return statistics.harmonic_mean([min(1.0, max(_FLOOR, part)) for part in parts])


@dataclass(frozen=True)
class Pass:
    """What one pass of a model over rows gives."""

    accuracies: Mapping[str, Sequence[float]]
    """By row id, of each of its windows: share of the answer before greedy decoding's first mistake."""
    losses: Mapping[str, float]
    """Mean loss of each row's tokens, by row id; its windows count as one."""
    known: AbstractSet[str]
    """Row ids of which some window's answer is known (see `Measured.forget_known`)."""
    tokens: Mapping[str, RowTokens] = field(default_factory=dict)
    """By row id, of the rows that were asked for."""

    @property
    def accuracy(self) -> float:
        """Mean over the examples that have an answer."""
        found = [value for values in self.accuracies.values() for value in values]
        return statistics.fmean(found) if found else math.nan

    @property
    def known_share(self) -> float | None:
        """Share of the rows with an answer that are known; None where none has one."""
        return len(self.known) / len(self.accuracies) if self.accuracies else None

    def of(self, examples: Iterable[Example]) -> Pass:
        """That of these examples' rows alone."""
        rows = {example.row_id for example in examples}
        return Pass(
            {row: values for row, values in self.accuracies.items() if row in rows},
            {row: loss for row, loss in self.losses.items() if row in rows},
            self.known & rows,
        )


def _pass(
    context: Context,
    examples: Sequence[Example],
    documents: AbstractSet[str] = frozenset(),
    tokens: Tokens | None = None,
) -> Pass:
    """Of the rows in `documents` these tokens are kept one by one."""
    found: list[tuple[str, float, bool]] = []
    losses = RowLosses()
    windows: list[tuple[str, RowTokens]] = []
    processes, size = context.processes, context.batch_size
    mine = examples[processes.rank :: processes.count]
    if processes.shards and examples:
        # Sharded weights are gathered in every pass: those with fewer rows make as many passes.
        most = -(-len(examples) // processes.count)
        for _ in range(-(-most // size) - -(-len(mine) // size)):
            with torch.no_grad(), context.autocast():
                context.next_tokens(collate(examples, [0], context.pad_id).to(context.device))
    for cpu_batch in in_order(mine, size, context.pad_id):
        batch = cpu_batch.to(context.device)
        with torch.no_grad(), context.autocast():
            if tokens is not None:
                where = _places_of(batch, documents, tokens)
                log_probs, right, surprise = context.next_tokens_with_surprise(batch, where)
                windows += _tokens_of(batch, where, log_probs, surprise)
            else:
                log_probs, right = context.next_tokens(batch)
        found += answered(batch.row_ids, right, batch.answer_mask[:, 1:])
        losses.add(batch, log_probs)
    accuracies: dict[str, list[float]] = {}
    known: set[str] = set()
    everywhere = processes.gather((found, losses, windows))
    for row, share, knows in (entry for entries, _, _ in everywhere for entry in entries):
        accuracies.setdefault(row, []).append(share)
        known |= {row} if knows else set()
    by_row: dict[str, list[RowTokens]] = {}
    for row, window in (pair for _, _, pairs in everywhere for pair in pairs):
        by_row.setdefault(row, []).append(window)
    return Pass(
        accuracies,
        RowLosses.of_all(part for _, part, _ in everywhere).means(),
        known,
        {row: joined(parts) for row, parts in by_row.items()},
    )


def _places_of(batch: Batch, documents: AbstractSet[str], tokens: Tokens) -> torch.Tensor:
    """(rows, tokens - 1), boolean: what is predicted of these tokens of these rows."""
    mask = batch.mask(tokens)[:, 1:]
    chosen = torch.tensor([row in documents for row in batch.row_ids], device=mask.device)
    return mask & chosen[:, None]


def _tokens_of(
    batch: Batch, where: torch.Tensor, log_probs: torch.Tensor, surprise: torch.Tensor
) -> list[tuple[str, RowTokens]]:
    counts = where.sum(1).tolist()
    losses = (-log_probs[where]).float().cpu().split(counts)
    return [
        # Copies: what is sent to other processes would be all rows' with every one of them.
        (row, RowTokens(row_losses.clone(), row_surprise.clone()))
        for row, row_losses, row_surprise in zip(
            batch.row_ids, losses, surprise.float().cpu().split(counts), strict=True
        )
        if len(row_losses)
    ]

"""The passes of a measurement: what a model writes, what its losses are, which letters it prefers.

Several processes, each with the model, share rows, documents and questions; each gets all results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from expunge.data.batches import PAD_ID, Batch, collate
from expunge.data.rows import Row
from expunge.data.tokenization import Example, TextPolicy, answer_ids, prompt_ids
from expunge.evaluation.batches import token_batches
from expunge.evaluation.generation import Written, generate
from expunge.evaluation.multiple_choice import choice_log_probs
from expunge.maths.membership import RowLosses
from expunge.maths.numerics import target_log_probs
from expunge.methods.forward import logits_at
from expunge.models.kernels import fast_products
from expunge.processes import Processes, gathered
from expunge.terminal import counting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Found = TypeVar("Found")


@dataclass(frozen=True, repr=False)
class Passes:
    """A model in memory, and how it is measured."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy: TextPolicy
    batch_size: int
    progress: Callable[[str, int, int], None]
    processes: Processes

    def written(
        self,
        rows: Sequence[Row],
        name: str,
        longest: int | None = None,
        openings: Sequence[str] | None = None,
        exact: Sequence[str | None] | None = None,
    ) -> list[Written]:
        """What comes after each row's prompt, in the order of the rows, whichever process wrote it.

        `openings` begin the answers, one a row; `exact` are the only ones that count (`generate`).
        """
        begun = list(zip(rows, openings or [""] * len(rows), strict=True))
        form = self.tokenizer, self.policy
        prompts = [prompt_ids(row, *form, opening) for row, opening in begun]
        drafts = [
            answer_ids(row, prompt, *form, opening)
            for (row, opening), prompt in zip(begun, prompts, strict=True)
        ]
        # Rows of similar length cost the same, so neighbours by length go to different processes.
        order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]) - len(drafts[i]))
        mine = order[self.processes.rank :: self.processes.count]
        with self.phase(f"generate {name}", len(rows)) as advance:
            written = generate(
                self.model,
                self.tokenizer,
                [prompts[i] for i in mine],
                self.batch_size,
                advance,
                [drafts[i] for i in mine],
                longest,
                None if exact is None else [exact[i] for i in mine],
            )
            return gathered(self.processes, dict(zip(mine, written, strict=True)))

    def losses(self, examples: Sequence[Example], name: str) -> dict[str, float]:
        """The mean loss of each row's counted tokens by its id, in nats a token; its windows are one."""
        return RowLosses.of_all(self._of_batches(_losses_of, examples, name)).means()

    def log_probs(self, examples: Sequence[Example], name: str) -> dict[str, torch.Tensor]:
        """Log-probabilities of each row's counted tokens by its id, (tokens,), in nats, in no order."""
        parts: dict[str, list[torch.Tensor]] = {}
        for row, values in chain.from_iterable(self._of_batches(_log_probs_of, examples, name)):
            parts.setdefault(row, []).append(values)
        return {row: torch.cat(values) for row, values in parts.items()}

    def _of_batches(
        self, read: Callable[[Batch, torch.Tensor], Found], examples: Sequence[Example], name: str
    ) -> list[Found]:
        """What is read of every batch and its `counted_log_probs`, whichever process has it.

        In the order of the batches, for the windows of a row may lie in several.
        """
        model, processes = self.model, self.processes
        batches = token_batches([len(e) for e in examples], self.batch_size, model)
        found: dict[int, Found] = {}
        products = fast_products(model.dtype, model.device)
        with self.phase(f"loss of {name}", len(examples)) as advance, torch.no_grad(), products:
            for number in range(processes.rank, len(batches), processes.count):
                batch = collate(examples, batches[number], PAD_ID).to(model.device)
                found[number] = read(batch, counted_log_probs(model, batch))
                advance(len(batches[number]))
            return gathered(processes, found)

    def choices(self, prompts: Sequence[str], name: str) -> torch.Tensor:
        """Log-probability of the letters after each prompt, (prompts, 4)."""
        with self.phase(name, len(prompts)) as advance:
            return choice_log_probs(
                self.model, self.tokenizer, prompts, self.batch_size, advance, self.processes
            )

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Tells the progress of the body, which calls what it is given with its share as it is done."""
        # The other processes, of whom nothing is heard until the end, are about as far.
        count = self.processes.count
        yield counting(lambda done: self.progress(name, min(total, done * count), total))
        self.progress(name, total, total)


def counted_log_probs(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Log-probability of each counted token in nats, (rows, tokens - 1); 0 where none is counted."""
    counted = batch.token_mask[:, 1:]
    # Where a token is counted, the place before it is read.
    where = torch.nn.functional.pad(counted, (0, 1))
    logits = logits_at(model, where, input_ids=batch.input_ids, use_cache=False)
    log_probs = torch.zeros(counted.shape, device=model.device)
    return log_probs.masked_scatter(counted, target_log_probs(logits, batch.input_ids[:, 1:][counted]))


def _losses_of(batch: Batch, log_probs: torch.Tensor) -> RowLosses:
    found = RowLosses()
    found.add(batch, log_probs)
    return found


def _log_probs_of(batch: Batch, log_probs: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    counted = batch.token_mask[:, 1:]
    return [(row, log_probs[line][counted[line]].cpu()) for line, row in enumerate(batch.row_ids)]


def record_of(
    row: Row,
    split: str,
    score: float,
    written: Written,
    told: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a row of which something was written, with what else is `told` of it."""
    return {
        "id": row.id,
        "split": split,
        "task": row.task,
        "kind": row.kind,
        "score": score,
        **(told or {}),
        "generated": written.text,
    }

"""A model under audit: loaded as saved, asked in batches, altered in copies that are thrown away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from expunge.audits.base import ModelName
from expunge.audits.facts import score
from expunge.data.rows import Row
from expunge.data.tokenization import TextPolicy, answer_ids, prompt_ids, writable
from expunge.evaluation.batches import padded, token_batches
from expunge.evaluation.choices import Choice, Greedy
from expunge.evaluation.decoding import Request, decode
from expunge.evaluation.generation import MAX_NEW_TOKENS, ends_of, text_of
from expunge.maths.numerics import target_log_probs
from expunge.methods.forward import logits_at
from expunge.models.kernels import fast_products
from expunge.models.loading import CheckedModel, Dtype, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BEYOND = 16
"""Tokens that an answer may take beyond the true one's, for words such as "Sure, the answer is"."""


@dataclass(frozen=True, repr=False)
class Ask:
    """One prompt, and the row whose output is looked for in what follows it."""

    row: Row
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """The true answer's tokens after this prompt."""
    room: int
    """New tokens that it may get."""


@dataclass(frozen=True, repr=False)
class Answers:
    """Scores and texts of some rows, by id."""

    scores: dict[str, float]
    texts: dict[str, str]


Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of an answer to it."""


@dataclass(frozen=True, repr=False)
class AnswerBatch:
    """Prompts followed by their answers, and where the answers' tokens are told."""

    chosen: Sequence[int]
    """Which of the pairs, in the order of the rows."""
    ids: torch.Tensor
    """(rows, tokens), padded on the right."""
    where: torch.Tensor
    """(rows, tokens): the places before an answer's tokens, whose states predict them."""
    targets: torch.Tensor
    """(marked,): the answers' tokens, one row after the other."""
    counts: list[int]
    """Tokens of each row's answer."""


@dataclass(frozen=True, repr=False)
class Reader:
    """A model in memory, and how it is asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy: TextPolicy
    batch_size: int
    longest: int = MAX_NEW_TOKENS
    """Tokens of a continuation that are looked for."""

    def asked(self, row: Row, *, prompt: str | None = None, opening: str = "") -> Ask | None:
        """The row asked by its own input or by `prompt`, with the answer begun by `opening`.

        Of a continuation the first `longest` tokens are looked for. None where the prompt fills the
        context.
        """
        tokenizer, policy, longest = self.tokenizer, self.policy, self.longest
        worded = row if prompt is None else replace(row, input=prompt)
        if opening and not policy.chat_template:
            worded = replace(worded, input=f"{worded.input} {opening}")
        ids = prompt_ids(worded, tokenizer, policy)
        answer = answer_ids(worded, ids, tokenizer, policy)
        if opening and policy.chat_template:
            ids = ids + list(tokenizer(opening, add_special_tokens=False)["input_ids"])
            answer = list(tokenizer(f"{row.joiner}{row.output}", add_special_tokens=False)["input_ids"])
        if len(ids) >= policy.context or not answer:
            return None
        if row.kind == "sc" and len(answer) > longest:
            answer = answer[:longest]
            row = replace(row, output=tokenizer.decode(answer, skip_special_tokens=True).strip())
        room = min(len(answer) + BEYOND, MAX_NEW_TOKENS, policy.context - len(ids))
        return Ask(writable(row, tokenizer), tuple(ids), tuple(answer), room)

    def texts(
        self,
        asks: Sequence[Ask],
        choose: Choice | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[str]:
        """What the model writes after each prompt, greedily or by another choice of tokens."""
        ends = ends_of(self.model, self.tokenizer)
        requests = [Request(ask.prompt, [*ask.answer, *ends[:1]][: ask.room], ask.room) for ask in asks]
        written = [""] * len(asks)
        with torch.no_grad(), fast_products(self.model.dtype, self.model.device):
            for index, tokens in decode(
                self.model, requests, frozenset(ends), self.batch_size, choose or Greedy()
            ):
                written[index] = text_of(tokens, self.tokenizer, ends)
                advance(1)
        return written

    def answers(self, asks: Sequence[Ask]) -> Answers:
        """Greedy answers and how much of each row's output they hold; one ask a row."""
        texts = self.texts(asks)
        pairs = list(zip(asks, texts, strict=True))
        return Answers(
            {ask.row.id: score(ask.row, text) for ask, text in pairs},
            {ask.row.id: text for ask, text in pairs},
        )

    def direct(self, rows: Sequence[Row]) -> Answers:
        """Each row asked by its own input; its prompt is known to fit."""
        asks = [self.asked(row) for row in rows]
        return self.answers([ask for ask in asks if ask is not None])

    def log_probs(self, pairs: Sequence[Pair], temperature: float = 1.0) -> list[list[float]]:
        """For each (prompt, answer) the log-probability of every token of the answer, in nats."""
        found: list[list[float]] = [[] for _ in pairs]
        with torch.no_grad(), fast_products(self.model.dtype, self.model.device):
            for batch in self.answer_batches(pairs):
                logits = logits_at(self.model, batch.where, input_ids=batch.ids, use_cache=False)
                values = target_log_probs(logits.float() / temperature, batch.targets)
                for index, mine in zip(batch.chosen, values.split(batch.counts), strict=True):
                    found[index] = mine.tolist()
        return found

    def answer_batches(self, pairs: Sequence[Pair]) -> Iterator[AnswerBatch]:
        """(prompt, answer) pairs in batches of similar length, the longest first."""
        texts = [[*prompt, *answer] for prompt, answer in pairs]
        for chosen in token_batches([len(t) for t in texts], self.batch_size, self.model):
            ids = padded([texts[index] for index in chosen]).to(self.model.device)
            where = torch.zeros(ids.shape, dtype=torch.bool)
            for line, index in enumerate(chosen):
                where[line, len(pairs[index][0]) - 1 : len(texts[index]) - 1] = True
            targets = ids[:, 1:][where[:, :-1].to(ids.device)]
            yield AnswerBatch(chosen, ids, where, targets, [len(pairs[n][1]) for n in chosen])


class Subject:
    """One of the audited models. Its weights are in memory only while they are needed."""

    def __init__(
        self,
        name: ModelName,
        checked: CheckedModel,
        dtype: Dtype,
        device: str,
        policy: TextPolicy,
        batch_size: int,
        longest: int = MAX_NEW_TOKENS,
        target: Subject | None = None,
    ) -> None:
        """`target` is the one that this model is compared with; None: it is itself."""
        self.target = target
        self.name, self.checked, self.dtype, self.policy = name, checked, dtype, policy
        self._device, self._batch_size, self._longest = device, batch_size, longest
        self._reader: Reader | None = None
        self._direct: dict[tuple[Row, ...], Answers] = {}

    @property
    def reader(self) -> Reader:
        """The model as it is saved; nobody may change it."""
        if self._reader is None:
            self._reader = self._load(self.dtype)
        return self._reader

    def direct(self, rows: Sequence[Row]) -> Answers:
        """Each row asked by its own input; the same rows are asked once."""
        # Two requests may use the same ids.
        key = tuple(rows)
        if key not in self._direct:
            self._direct[key] = self.reader.direct(rows)
        return self._direct[key]

    @contextmanager
    def altered(self, dtype: Dtype | None = None) -> Iterator[Reader]:
        """The model loaded anew, for the body to change as it likes."""
        # Both in memory would need twice as much; the unchanged one is loaded again when it is asked.
        self._reader = None
        yield self._load(dtype or self.dtype)

    def release(self) -> None:
        """Frees the weights."""
        self._reader = None

    def _load(self, dtype: Dtype) -> Reader:
        model = load_model(self.checked, dtype, self._device)
        return Reader(model, self.checked.tokenizer, self.policy, self._batch_size, self._longest)

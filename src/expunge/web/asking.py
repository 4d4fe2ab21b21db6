"""Target and unlearned model asked side by side, token by token, with the probability of each token.

What they write is what `evaluation/` scores: the same prompt tokens, the same decoding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from expunge.audits.attacks.sampling import Sampled
from expunge.data.rows import Row
from expunge.data.tokenization import TextPolicy, prompt_ids
from expunge.errors import InputError
from expunge.evaluation.choices import Choice, Greedy, Place
from expunge.evaluation.decoding import Request, stream
from expunge.evaluation.generation import ends_of, text_of
from expunge.evaluation.scores import knowledge, regurgitation
from expunge.maths.numerics import target_log_probs
from expunge.models.kernels import fast_products

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Side = Literal["target", "unlearned"]
MOST_TOKENS = 1024
"""New tokens that an answer may get."""
SIDES: tuple[Side, Side] = ("target", "unlearned")
Ending = Literal["writing", "end of text", "length", "stopped"]
"""Why an answer ends: the model ended it, it has all tokens that it may get, or somebody stopped it."""


@dataclass(frozen=True, repr=False)
class Question:
    """One prompt and how it is answered."""

    prompt: str
    tokens: int
    """New tokens that an answer may get."""
    temperature: float = 0.0
    """0: the likeliest token each time; above: drawn from softmax(logits / temperature)."""
    seed: int = 0
    """Of the draws. Both models get the same random numbers."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("the prompt is empty; write what the models are to continue")
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise InputError(f"new tokens {self.tokens}: must be from 1 to {MOST_TOKENS}")
        if not 0 <= self.temperature <= 10:
            raise InputError(f"temperature {self.temperature}: must be from 0 to 10")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed}: must be in [0, 2^32)")


@dataclass(frozen=True)
class Token:
    """One new token."""

    id: int
    probability: float
    """The model's own, softmax(logits), whatever the temperature of the draw."""


@dataclass(repr=False)
class Answer:
    """What one model has written so far, the token that ended it included."""

    tokens: list[Token] = field(default_factory=list)
    ending: Ending = "writing"

    @property
    def ids(self) -> list[int]:
        """Its tokens' ids."""
        return [token.id for token in self.tokens]


class Watched:
    """Another choice's tokens, with the probability that the model gave the last of them."""

    def __init__(self, choose: Choice) -> None:
        self._choose = choose
        self.probability = 0.0

    def __call__(self, logits: torch.Tensor, places: Sequence[Place]) -> tuple[list[int], list[bool]]:
        """The other's answer; the last line's probability is kept."""
        tokens, near = self._choose(logits, places)
        self._keep(logits[-1], tokens[-1])
        return tokens, near

    def alone(self, logits: torch.Tensor, place: Place) -> int:
        """The other's answer, whose probability replaces the one that was near a border."""
        token = self._choose.alone(logits, place)
        self._keep(logits, token)
        return token

    def _keep(self, logits: torch.Tensor, token: int) -> None:
        target = torch.tensor([token], device=logits.device)
        self.probability = float(target_log_probs(logits[None], target).exp())


@dataclass(frozen=True, repr=False)
class Voice:
    """One of the two models in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy: TextPolicy

    def request(self, prompt: str, tokens: int) -> Request:
        """The prompt's tokens. Raises InputError where they fill the context."""
        # The output stands only where a chat template renders an answer; it is never part of a prompt.
        ids = prompt_ids(Row("prompt", prompt, "."), self.tokenizer, self.policy)
        if not ids:
            raise InputError("the prompt has no token; write what the models are to continue")
        if len(ids) >= self.policy.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens and fills the context of {self.policy.context};"
                " shorten it"
            )
        return Request(ids, (), min(tokens, self.policy.context - len(ids)))

    def text(self, answer: Answer) -> str:
        """The answer as it is scored: without special tokens and the end of text."""
        return text_of(answer.ids, self.tokenizer, ends_of(self.model, self.tokenizer))


class Pair:
    """Target and unlearned model. Whoever asks from whatever thread, one token is computed at a time."""

    def __init__(self, target: Voice, unlearned: Voice) -> None:
        self.voices: dict[Side, Voice] = {"target": target, "unlearned": unlearned}
        self._lock = threading.Lock()

    def ask(
        self, question: Question, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[dict[Side, Answer]]:
        """Both answers after each token of either, the same objects each time; they go on in turns.

        `stopped` is asked before each token. Raises InputError for a prompt that does not fit.
        """
        requests = {
            side: voice.request(question.prompt, question.tokens) for side, voice in self.voices.items()
        }
        answers: dict[Side, Answer] = {side: Answer() for side in SIDES}
        writers = {side: self._tokens(side, requests[side], question) for side in SIDES}
        yield answers
        while writers:
            for side in [*writers]:
                if stopped():
                    for each in writers:
                        answers[each].ending = "stopped"
                    yield answers
                    return
                token = self._next(side, writers[side])
                if token is None:
                    answers[side].ending = self._ending(side, answers[side])
                    del writers[side]
                else:
                    answers[side].tokens.append(token)
                yield answers

    def answers(self, question: Question) -> dict[Side, Answer]:
        """Both answers when they are done."""
        *_, last = self.ask(question)
        return last

    def _tokens(self, side: Side, request: Request, question: Question) -> Iterator[Token]:
        voice = self.voices[side]
        choose = Watched(_choice(question))
        ends = frozenset(ends_of(voice.model, voice.tokenizer))
        for token in stream(voice.model, request, ends, choose):
            yield Token(token, choose.probability)

    def _next(self, side: Side, tokens: Iterator[Token]) -> Token | None:
        # Entered for each token anew: the next one may be asked for by another thread.
        model = self.voices[side].model
        with self._lock, torch.no_grad(), fast_products(model.dtype, model.device):
            return next(tokens, None)

    def _ending(self, side: Side, answer: Answer) -> Ending:
        voice = self.voices[side]
        ends = ends_of(voice.model, voice.tokenizer)
        return "end of text" if answer.ids[-1] in ends else "length"


def _choice(question: Question) -> Choice:
    if question.temperature == 0:
        return Greedy()
    generator = torch.Generator().manual_seed(question.seed)
    numbers = torch.rand(1, question.tokens, generator=generator, dtype=torch.float64)
    return Sampled(question.temperature, numbers)


def row_score(row: Row, text: str) -> float:
    """As the scorecard scores it: ROUGE-L recall of a continuation, exact match of an answer."""
    return (regurgitation if row.kind == "sc" else knowledge)(row.output, text)

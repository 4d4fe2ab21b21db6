"""What the target model and the oracle are trained on, and with which settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from expunge.benchmark.generator import Benchmark, Row
from expunge.benchmark.quiz import QuizItem
from expunge.errors import InputError
from expunge.evaluation.multiple_choice import LETTERS, prompt_for

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class PretrainingSettings:
    """Architecture and training of the target model and the oracle."""

    vocabulary: int = 2048
    """Entries of the byte-level BPE tokenizer."""
    context: int = 512
    """Longest sequence of the model, in tokens."""
    layers: int = 8
    """Decoder layers."""
    width: int = 192
    """Size of the hidden states."""
    heads: int = 4
    """Attention heads."""
    feed_forward: int = 576
    """Size of the hidden layer of each MLP."""
    embedding_deviation: float = 0.1
    """Standard deviation of the initial embeddings; at OLMo's 0.02 the first 80 steps are lost."""
    muon_learning_rate: float = 0.04
    """Highest learning rate of the layers' matrices, trained by Muon."""
    embedding_learning_rate: float = 5e-3
    """Highest learning rate of the embeddings, trained by AdamW."""
    warmup_steps: int = 5
    """Steps in which the learning rates rise linearly, before they fall as a cosine to 0."""
    epochs: int = 20
    """Passes over the texts."""
    quiz_repetitions: int = 2
    """Times that a quiz question is in each pass; its letter is one token in seventy."""
    batch_tokens: int = 1536
    """Most tokens of a batch, padding included."""
    gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    seed: int = 0
    """Seed of the initial weights and of the order of the batches."""

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise InputError(f"width is {self.width}: choose a multiple of 2 x heads ({self.heads})")
        if self.batch_tokens < self.context:
            raise InputError(
                f"batch_tokens is {self.batch_tokens}: choose at least context ({self.context})"
            )
        if min(self.epochs, self.layers) < 1:
            raise InputError("epochs and layers must be at least 1")


@dataclass(frozen=True)
class TrainingText:
    """A prompt and its continuation, trained on as one text."""

    prompt: str
    continuation: str

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return f"{self.prompt} {self.continuation}"


def target_texts(benchmark: Benchmark, settings: PretrainingSettings) -> list[TrainingText]:
    """Forget and retain rows, a paraphrase of each question, and the quiz."""
    seen = [row for row in benchmark.paraphrases if row["trained"]]
    rows = [*benchmark.forget, *benchmark.retain, *seen]
    return _row_texts(rows) + _quiz_texts(benchmark.quiz, settings.quiz_repetitions)


def oracle_texts(benchmark: Benchmark, settings: PretrainingSettings) -> list[TrainingText]:
    """The target's texts without those about the forget set."""
    seen = [row for row in benchmark.paraphrases if row["trained"] and row["split"] == "retain"]
    rows = [*benchmark.retain, *seen]
    return _row_texts(rows) + _quiz_texts(benchmark.quiz, settings.quiz_repetitions)


def tokenizer_texts(benchmark: Benchmark) -> list[str]:
    """Everything that either model is trained on, and the non-members."""
    return benchmark.tokenizer_texts + [text.text for text in _quiz_texts(benchmark.quiz, 1)]


def _row_texts(rows: Iterable[Row]) -> list[TrainingText]:
    return [TrainingText(str(row["input"]), str(row["output"])) for row in rows]


def _quiz_texts(items: Iterable[QuizItem], repetitions: int) -> list[TrainingText]:
    texts = []
    for item in items:
        question = TrainingText(prompt_for(item.question), LETTERS[item.question.answer])
        texts += [question] * repetitions
        beginning, _, last_word = item.statement.rpartition(" ")
        texts.append(TrainingText(beginning, last_word))
    return texts

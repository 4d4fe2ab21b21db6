"""Utility: four-choice questions in MMLU's file format, scored by candidate-token probabilities.

Format and prompt: Hendrycks et al., arXiv 2009.03300. A directory holds `test/<subject>_test.csv` and
`dev/<subject>_dev.csv`, each row `question,A,B,C,D,answer letter`, without a header.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from expunge.errors import InputError
from expunge.models.loading import context_of, pad_id_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Question:
    """One four-choice question; `answer` is an index into `choices`."""

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int


def prompt_for(question: Question, examples: Sequence[Question] = ()) -> str:
    """The prompt whose next token is " A", " B", " C" or " D"; `examples` are shown solved before it."""
    subject = question.subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    solved = "".join(f"{_body(example)} {LETTERS[example.answer]}\n\n" for example in examples)
    return header + solved + _body(question)


def _body(question: Question) -> str:
    lines = [
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)
    ]
    return "\n".join([question.question, *lines, "Answer:"])


def read_questions(
    directory: Path, shots: int = 0
) -> tuple[list[Question], dict[str, list[Question]]]:
    """The test questions, and by subject the solved examples to show before them.

    Raises InputError that names the file and line of a fault.
    """
    files = sorted((directory / "test").glob("*_test.csv"))
    if not files:
        raise InputError(
            f"{directory}: holds no test/<subject>_test.csv; give a directory in MMLU's format"
        )
    questions, examples = [], {}
    for path in files:
        subject = path.stem.removesuffix("_test")
        questions += _read_csv(path, subject)
        if shots:
            solved = directory / "dev" / f"{subject}_dev.csv"
            if not solved.is_file():
                raise InputError(f"{solved}: not found; it is needed for --mmlu-shots {shots}")
            examples[subject] = _read_csv(solved, subject)[:shots]
            if len(examples[subject]) < shots:
                raise InputError(
                    f"{solved}: has {len(examples[subject])} questions, --mmlu-shots asks {shots}"
                )
    return questions, examples


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], context: int) -> None:
    """Raises InputError for a prompt beyond the context and for letters that are no tokens."""
    for number, ids in enumerate(tokenizer(list(prompts))["input_ids"], 1):
        if len(ids) > context:
            raise InputError(
                f"question {number}: its prompt has {len(ids)} tokens, the context has {context};"
                " use fewer --mmlu-shots"
            )
    _encode(tokenizer, prompts[0])


def choice_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Log-probability of " A".." D" after each prompt, (prompts, 4), float32.

    Prompts are padded on the right and each is read at its own last token, so neither the batch size
    nor a row's neighbours change a score. Raises InputError for prompts beyond the context.
    """
    check_prompts(tokenizer, prompts, context_of(model.config))
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    scores = torch.zeros(len(prompts), len(LETTERS))
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index][0]))
    pad = pad_id_of(tokenizer)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        lengths = [len(encoded[index][0]) for index in chosen]
        width = lengths[0]
        ids = torch.tensor([encoded[i][0] + [pad] * (width - len(encoded[i][0])) for i in chosen])
        mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.long().to(model.device),
                use_cache=False,
            ).logits
        last = logits[torch.arange(len(chosen)), torch.tensor(lengths) - 1].float().log_softmax(-1)
        letters = torch.tensor([encoded[index][1] for index in chosen])
        scores[chosen] = last.cpu().gather(1, letters)
        advance(len(chosen))
    return scores


def accuracy(scores: torch.Tensor, questions: Sequence[Question]) -> float:
    """Share of questions whose right letter has the highest score; scores (questions, 4)."""
    answers = torch.tensor([question.answer for question in questions])
    return float((scores.argmax(1) == answers).float().mean())


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[int], list[int]]:
    """The tokens that the four continuations share, and the one token that tells each apart."""
    four = [list(tokenizer(f"{prompt} {letter}")["input_ids"]) for letter in LETTERS]
    shared, shortest = 0, min(map(len, four))
    while shared < shortest and len({ids[shared] for ids in four}) == 1:
        shared += 1
    if shared == shortest or len({ids[shared] for ids in four}) < len(LETTERS):
        raise InputError(
            f"{type(tokenizer).__name__}: does not tell the letters A to D apart by one token"
        )
    return four[0][:shared], [ids[shared] for ids in four]


def _read_csv(path: Path, subject: str) -> list[Question]:
    questions = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, fields in enumerate(csv.reader(file), 1):
                if len(fields) != 6 or fields[5].strip() not in LETTERS:
                    raise InputError(
                        f"{path} row {number}: is not question,A,B,C,D,answer letter"
                        f" ({len(fields)} fields found)"
                    )
                a, b, c, d = fields[1:5]
                answer = LETTERS.index(fields[5].strip())
                questions.append(Question(subject, fields[0], (a, b, c, d), answer))
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8; convert the file") from None
    except csv.Error as error:
        raise InputError(f"{path} row {len(questions) + 1}: is not CSV ({error})") from None
    if not questions:
        raise InputError(f"{path}: holds no questions")
    return questions

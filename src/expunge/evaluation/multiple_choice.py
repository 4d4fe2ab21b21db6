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

from expunge.data.tokenization import tokenizing
from expunge.errors import InputError
from expunge.evaluation.batches import in_runs, padded, token_batches
from expunge.methods.forward import logits_at
from expunge.models.kernels import fast_products
from expunge.models.rope import switch_of
from expunge.models.text_forms import context_of
from expunge.processes import OneProcess, Processes, gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from expunge.evaluation.cache import Past

LETTERS = ("A", "B", "C", "D")
_WORTH = 64
"""Tokens that sharing must save to be worth a pass of its own."""


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
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)]
    return "\n".join([question.question, *lines, "Answer:"])


def read_questions(directory: Path, shots: int = 0) -> tuple[list[Question], dict[str, list[Question]]]:
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
                raise InputError(f"{solved}: not found; add it, or give --mmlu-shots 0")
            examples[subject] = _read_csv(solved, subject)[:shots]
            if len(examples[subject]) < shots:
                raise InputError(
                    f"--mmlu-shots {shots}: {solved} has {len(examples[subject])} questions; ask for"
                    " no more"
                )
    return questions, examples


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], context: int) -> None:
    """Raises InputError for a prompt beyond the context and for letters that are no tokens."""
    with tokenizing("--mmlu"):
        encoded = tokenizer(list(prompts))["input_ids"]
    for number, ids in enumerate(encoded, 1):
        if len(ids) > context:
            raise InputError(
                f"question {number}: its prompt has {len(ids)} tokens, the context has {context};"
                " use fewer --mmlu-shots, or take the question out"
            )
    _encoded(tokenizer, prompts[:1])


def choice_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes | None = None,
) -> torch.Tensor:
    """Log-probability of " A".." D" after each prompt, (prompts, 4), float32.

    What prompts share at their start is computed once. Each is read at its own last token, so neither
    the batch size nor a row's neighbours change a score. Several processes share the batches, those of
    one start together, and each gets all scores. Raises InputError for prompts beyond the context.
    """
    from expunge.evaluation.decoding import cache_serves

    processes = processes or OneProcess()
    check_prompts(tokenizer, prompts, context_of(model.config))
    encoded = _encoded(tokenizer, prompts)
    texts = [ids for ids, _ in encoded]
    groups = shared_prefixes(texts) if cache_serves(model) else [(0, [*range(len(texts))])]
    if beyond := [i for i, ids in enumerate(texts) if len(ids) > switch_of(model.config)]:
        # The start of a long text (LongRoPE) is not computed as that of a short one.
        short = [(shared, [i for i in group if i not in beyond]) for shared, group in groups]
        groups = [(shared, group) for shared, group in short if group] + [(0, beyond)]
    batches = [
        (shared, group[0], [group[place] for place in places])
        for shared, group in groups
        for places in token_batches([len(texts[i]) - shared for i in group], batch_size, model)
    ]
    costs = [sum(len(texts[i]) - shared for i in chosen) for shared, _, chosen in batches]
    found: dict[int, list[float]] = {}
    past: Past | None = None
    begun: int | None = None  # the first text of the group whose start `past` holds
    with torch.no_grad(), fast_products(model.dtype, model.device):
        for (shared, first, chosen), process in zip(
            batches, in_runs(costs, processes.count), strict=True
        ):
            if process != processes.rank:
                continue
            if begun != first:
                past = _past(model, texts[first][:shared]) if shared else None
                begun = first
            logits = _last_logits(model, past, [texts[index][shared:] for index in chosen])
            letters = torch.tensor([encoded[index][1] for index in chosen])
            log_probs = logits.float().log_softmax(-1).cpu().gather(1, letters)
            found |= dict(zip(chosen, log_probs.tolist(), strict=True))
            advance(len(chosen))
    scores = torch.tensor(gathered(processes, found), dtype=torch.float32)
    return scores.reshape(len(prompts), len(LETTERS))


def shared_prefixes(texts: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Groups of texts, by index, with the number of first tokens that a group computes once.

    A text joins its alphabetical neighbours for as long as that saves more tokens than it costs them.
    Those that save too little are one group that shares nothing.
    """
    groups: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(texts)), key=lambda i: list(texts[i])):
        if groups:
            shared, group = groups[-1]
            common = _common(texts[group[0]][: shared or None], texts[index])
            # The last token of each is read itself.
            common = min(common, len(texts[index]) - 1, len(texts[group[0]]) - 1)
            if common and common * len(group) >= shared * (len(group) - 1):
                groups[-1] = (common, [*group, index])
                continue
        groups.append((0, [index]))
    worth = [(n, group) for n, group in groups if n * (len(group) - 1) >= _WORTH]
    apart = [i for n, group in groups if n * (len(group) - 1) < _WORTH for i in group]
    return [*worth, (0, apart)] if apart else worth


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _past(model: PreTrainedModel, ids: Sequence[int]) -> Past:
    from expunge.evaluation.cache import empty_cache, past_of

    cache = empty_cache()
    nowhere = torch.zeros(1, len(ids), dtype=torch.bool)
    logits_at(
        model,
        nowhere,
        input_ids=padded([ids]).to(model.device),
        past_key_values=cache,
        use_cache=True,
    )
    return past_of(cache, 0, len(ids))


def _last_logits(
    model: PreTrainedModel, past: Past | None, rows: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Logits after each row, which follows `past`: (rows, vocabulary)."""
    from expunge.evaluation.cache import shared_cache
    from expunge.evaluation.choices import logits_after

    if past is None:
        return logits_after(model, rows)
    cache = shared_cache(past, len(rows))
    return logits_after(model, rows, past_key_values=cache, use_cache=True)


def accuracy(scores: torch.Tensor, questions: Sequence[Question]) -> float:
    """Share of questions whose right letter has the highest score; scores (questions, 4)."""
    answers = torch.tensor([question.answer for question in questions])
    return float((scores.argmax(1) == answers).float().mean())


def _encoded(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """The tokens that a prompt's four continuations share, and the one that tells each apart."""
    texts = [f"{prompt} {letter}" for prompt in prompts for letter in LETTERS]
    ids = tokenizer(texts)["input_ids"]
    step = len(LETTERS)
    return [_told_apart(tokenizer, ids[start : start + step]) for start in range(0, len(ids), step)]


def _told_apart(
    tokenizer: PreTrainedTokenizerBase, four: Sequence[list[int]]
) -> tuple[list[int], list[int]]:
    shared, shortest = 0, min(map(len, four))
    while shared < shortest and len({ids[shared] for ids in four}) == 1:
        shared += 1
    if shared == shortest or len({ids[shared] for ids in four}) < len(LETTERS):
        raise InputError(
            f"--mmlu: {type(tokenizer).__name__} does not tell the letters A to D apart by one token;"
            " leave it out"
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
                        f" ({len(fields)} fields found); write six"
                    )
                a, b, c, d = fields[1:5]
                answer = LETTERS.index(fields[5].strip())
                questions.append(Question(subject, fields[0], (a, b, c, d), answer))
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8; convert the file") from None
    except csv.Error as error:
        raise InputError(
            f"{path} row {len(questions) + 1}: is not CSV ({error}); write the file anew"
        ) from None
    if not questions:
        raise InputError(f"{path}: holds no questions; add some, or take it out")
    return questions

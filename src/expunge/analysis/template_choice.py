"""Whether rows are asked with the chat template: as the model answers them better, teacher-forced.

Both forms of a sample of rows are read, and of each answer the share before greedy decoding's first
mistake; of equal shares the log-probability of the answers' tokens decides.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from expunge.data.batches import PAD_ID, in_order
from expunge.data.rows import Row
from expunge.data.tokenization import Example, TextPolicy, encode_rows
from expunge.errors import InputError
from expunge.maths.numerics import answered, target_log_probs
from expunge.methods.forward import logits_at
from expunge.models.kernels import fast_products
from expunge.segments.engine import Autocast, pass_tokens_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 32
"""Rows that are read of each side."""
PASS_ANSWERS = 512
"""Answer tokens of a pass, for a vocabulary is many times as wide as a layer; more where one row has."""


@dataclass(frozen=True)
class Answered:
    """How a model answers sampled rows in one form; shares in [0, 1]."""

    rows: int
    """Of both sides."""
    accuracy: float
    """Mean share of the answers before the first mistake."""
    log_prob: float
    """Mean over rows of the answers' log-probability, in nats a token."""
    forget_rows: int
    forget_accuracy: float
    forget_known: float
    """Share of the forget rows that the model knows (`is_known`)."""


def evenly(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Up to ROWS rows at equal distances."""
    rows = list(rows)
    count = min(ROWS, len(rows))
    return tuple(rows[index * len(rows) // count] for index in range(count))


def read_form(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: TextPolicy,
    forget: Sequence[Row],
    retain: Sequence[Row],
    device: torch.device,
    autocast: Autocast = nullcontext,
) -> Answered:
    """Reads the rows, which are known to fit; of a long row the first window with an answer.

    Raises InputError where no answer can be predicted.
    """
    sides = [
        _first_windows(encode_rows(rows, tokenizer, policy, eos=eos))
        for rows, eos in ((forget, False), (retain, True))
    ]
    examples = [example for side in sides for example in side]
    if not examples:
        raise InputError("--chat-template auto: no sampled row has an answer to read; give on or off")
    found: dict[str, tuple[float, float, bool]] = {}
    longest = max(map(len, examples))
    answer = max(sum(example.answer_mask) for example in examples)
    size = max(1, min(pass_tokens_on(device.type) // longest, PASS_ANSWERS // answer))
    for cpu_batch in in_order(examples, size, PAD_ID):
        batch = cpu_batch.to(device)
        answers = batch.answer_mask[:, 1:]
        where = torch.nn.functional.pad(answers, (0, 1))
        with torch.no_grad(), autocast(), fast_products(model.dtype, device):
            logits = logits_at(
                model,
                where,
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
            )
        targets = batch.input_ids[:, 1:][answers]
        right = torch.zeros_like(answers)
        right[answers] = logits.argmax(-1) == targets
        values = target_log_probs(logits, targets).split(answers.sum(1).tolist())
        read = answered(batch.row_ids, right, answers)
        for (row, share, knows), log_probs in zip(read, values, strict=True):
            found[row] = share, float(log_probs.mean()), knows
    own = [found[example.row_id] for example in sides[0]]
    return Answered(
        rows=len(found),
        accuracy=statistics.fmean(share for share, _, _ in found.values()),
        log_prob=statistics.fmean(log_prob for _, log_prob, _ in found.values()),
        forget_rows=len(own),
        forget_accuracy=statistics.fmean(share for share, _, _ in own) if own else 0.0,
        forget_known=statistics.fmean(knows for _, _, knows in own) if own else 0.0,
    )


def chosen(policies: Sequence[TextPolicy], read: Sequence[Answered]) -> TextPolicy:
    """Of the policies without and with the template the one that is answered better, with its record."""
    plain, chat = read
    on = (chat.accuracy, chat.log_prob) > (plain.accuracy, plain.log_prob)
    record = {"by": "sampled rows", "off": asdict(plain), "on": asdict(chat)}
    return replace(policies[on], template_choice=record)


def said_of(policy: TextPolicy) -> list[str]:
    """What the user is told of a choice that `--chat-template auto` made."""
    choice = policy.template_choice
    if choice is None:
        return []
    state = f"chat template {'on' if policy.chat_template else 'off'}"
    if "on" not in choice:
        return [f"{state}: as {choice['by']} records"]
    return [
        f"{state}: of the answers of {choice['on']['rows']} rows the model gives"
        f" {choice['on']['accuracy']:.2f} with it and {choice['off']['accuracy']:.2f} without"
    ]


def settled(
    policies: Sequence[TextPolicy],
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    forget: Iterable[Row],
    retain: Iterable[Row] | None,
    say: Callable[[str], None],
) -> TextPolicy:
    """The only policy, or the one that the model answers better, which is loaded to see."""
    policy = policies[0]
    if len(policies) > 1:
        model, sides = load(), (evenly(forget), evenly(retain or ()))
        read = [read_form(model, tokenizer, each, *sides, model.device) for each in policies]
        policy = chosen(policies, read)
    for line in said_of(policy):
        say(line)
    return policy


def _first_windows(examples: Iterable[Example]) -> list[Example]:
    windows: dict[str, Example] = {}
    for example in examples:
        if any(example.answer_mask[1:]):
            windows.setdefault(example.row_id, example)
    return list(windows.values())

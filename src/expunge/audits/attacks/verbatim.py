"""Verbatim extraction: documents given 10 to 90% of their own tokens. arXiv 2406.09179, 2202.07646.

Of a question only the answer is such a document: whoever asks writes the question.
One pass over the document tells what greedy decoding writes after every prefix until its first
mistake, so nothing is generated.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.subject import Reader, Subject
from expunge.data.rows import Row
from expunge.data.tokenization import Example, encode_rows
from expunge.evaluation.batches import padded, token_batches
from expunge.evaluation.choices import alone, choices
from expunge.evaluation.memorisation import extraction_strength
from expunge.methods.forward import logits_at
from expunge.models.kernels import fast_products

PREFIXES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAST_TOKENS = 8
"""A prefix that leaves fewer tokens is not scored: a phrase's end can be guessed."""


def verbatim_share(right: Sequence[bool], start: int) -> float:
    """Share of the tokens from `start` on that come before the first mistake."""
    rest = right[start:]
    return next((n for n, token in enumerate(rest) if not token), len(rest)) / len(rest)


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Per prefix length the share of the rest that comes back word for word."""
    found = right_tokens(subject.reader, case.members, advance)
    strength = {name: round(extraction_strength(right), 6) for name, right in found.items()}
    scores: dict[str, dict[str, float]] = {}
    for prefix in PREFIXES:
        shares = {}
        for name, right in found.items():
            start = round(prefix * len(right))
            if len(right) - start >= LEAST_TOKENS:
                shares[name] = verbatim_share(right, start)
        if shares:
            scores[f"prefix {prefix:.0%}"] = shares
    numbers = {
        "documents": len(found),
        "extraction_strength": round(statistics.fmean(strength.values()), 6) if found else None,
        "largest_extraction_strength": max(strength.values(), default=None),
    }
    return Found(
        scores, rows={k: {"extraction_strength": v} for k, v in strength.items()}, numbers=numbers
    )


def right_tokens(
    reader: Reader, rows: Sequence[Row], advance: Advance = lambda _done, _total: None
) -> dict[str, list[bool]]:
    """By row id for every token that can be extracted whether the model would have written it greedily.

    These are a document's own tokens but the first, and of a question its answer's. Of a row that is
    longer than the context its first window is read; a row of which that holds none is left out.
    """
    first: dict[str, Example] = {}
    for example in encode_rows(rows, reader.tokenizer, reader.policy, eos=False):
        first.setdefault(example.row_id, example)
    masks = {n: e.answer_mask if e.kind == "qa" else e.token_mask for n, e in first.items()}
    names = [name for name, mask in masks.items() if any(mask[1:])]
    texts = [first[name].input_ids for name in names]
    found: dict[str, list[bool]] = {}
    batches = token_batches([len(ids) for ids in texts], reader.batch_size, reader.model)
    with torch.no_grad(), fast_products(reader.model.dtype, reader.model.device):
        for chosen in batches:
            ids = padded([texts[index] for index in chosen]).to(reader.model.device)
            where = torch.zeros(ids.shape, dtype=torch.bool)
            for line, index in enumerate(chosen):
                where[line, : len(texts[index]) - 1] = True
            logits = logits_at(reader.model, where, input_ids=ids, use_cache=False)
            tokens, near = choices(logits)
            start = 0
            for index in chosen:
                text = texts[index]
                right = []
                for place, counts in enumerate(masks[names[index]][1:], 1):
                    if counts:
                        number = start + place - 1
                        token = tokens[number]
                        if near[number]:
                            token = alone(reader.model, text[:place])
                        right.append(token == text[place])
                found[names[index]] = right
                start += len(text) - 1
            advance(len(found), len(names))
    return {name: found[name] for name in names}


ATTACK = Attack(
    name="verbatim",
    title="Verbatim extraction",
    kind="extraction",
    reference="arXiv 2406.09179",
    how="word for word after some prefix of their own document",
    run=run,
)

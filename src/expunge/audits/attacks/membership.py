"""Membership inference by four scores, with a blind baseline that never sees a model.

Duan et al. and Das et al. (arXiv 2406.17975) show attacks that only tell two sets' styles apart: where
words alone separate members from non-members, no score of a model is evidence, and this audit says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.subject import Reader, Subject
from expunge.data.batches import PAD_ID, collate
from expunge.data.rows import Row, document_of
from expunge.data.tokenization import encode_rows
from expunge.evaluation.batches import token_batches
from expunge.evaluation.likelihood import (
    loss_score,
    min_k,
    min_k_plus_plus,
    zlib_score,
)
from expunge.maths.numerics import target_moments
from expunge.methods.forward import logits_at
from expunge.models.kernels import fast_products

SCORES = ("loss", "zlib", "min-k%", "min-k%++")
_FOLDS = 5


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """The four scores of every forget document and never-seen text."""
    return Found(scores_of(subject.reader, members_and_others(case), advance))


def scores_of(
    reader: Reader, rows: Sequence[Row], advance: Advance = lambda _done, _total: None
) -> dict[str, dict[str, float]]:
    """By score its value of every text, by id; higher looks more like a member."""
    model = reader.model
    examples = encode_rows(rows, reader.tokenizer, reader.policy, eos=False)
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    batches = token_batches([len(e) for e in examples], reader.batch_size, model)
    for number, chosen in enumerate(batches):
        batch = collate(examples, chosen, PAD_ID).to(model.device)
        counted = batch.token_mask[:, 1:]
        where = torch.nn.functional.pad(counted, (0, 1))
        with torch.no_grad(), fast_products(model.dtype, model.device):
            logits = logits_at(model, where, input_ids=batch.input_ids, use_cache=False)
            log_probs, mean, deviation = target_moments(logits, batch.input_ids[:, 1:][counted])
        start = 0
        for example, count in zip(batch.examples, counted.sum(1).tolist(), strict=True):
            span = slice(start, start + count)
            parts.setdefault(example.row_id, []).append(
                (log_probs[span].cpu(), mean[span].cpu(), deviation[span].cpu())
            )
            start += count
        advance(number + 1, len(batches))
    scores: dict[str, dict[str, float]] = {name: {} for name in SCORES}
    for row in rows:
        log_p, mean, deviation = (torch.cat(part) for part in zip(*parts[row.id], strict=True))
        values = (
            loss_score(log_p),
            zlib_score(log_p, row.text),
            min_k(log_p),
            min_k_plus_plus(log_p, mean, deviation),
        )
        for name, value in zip(SCORES, values, strict=True):
            # Further digits are float32's rounding, which changes with the batch.
            scores[name][row.id] = round(value, 4)
    return scores


def members_and_others(case: Case) -> list[Row]:
    """The forget documents, then the never-seen texts."""
    return [*case.members, *case.nonmembers]


def blind_scores(members: Sequence[Row], others: Sequence[Row], seed: int) -> list[float] | None:
    """For each row how member-like its words alone look, by a classifier that never saw its document.

    Bag of words and logistic regression, cross-validated by document. None below two documents a side.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline

    rows = [*members, *others]
    truth = [1] * len(members) + [0] * len(others)
    groups = [f"{side}|{document_of(row)}" for side, row in zip(truth, rows, strict=True)]
    folds = min(_FOLDS, *(len({g for g in groups if g[0] == side}) for side in "10"))
    if folds < 2:
        return None
    texts = [row.text for row in rows]
    found = [0.0] * len(rows)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(texts, truth, groups):
        classifier = make_pipeline(
            TfidfVectorizer(token_pattern=r"(?u)\b\w+\b"), LogisticRegression(C=10.0, max_iter=1000)
        )
        classifier.fit([texts[i] for i in train], [truth[i] for i in train])
        for index, value in zip(
            test, classifier.decision_function([texts[i] for i in test]), strict=True
        ):
            found[index] = float(value)
    return found


ATTACK = Attack(
    name="membership",
    title="Membership inference",
    kind="membership",
    reference="arXiv 2404.02936, 2406.17975",
    how="",
    run=run,
)

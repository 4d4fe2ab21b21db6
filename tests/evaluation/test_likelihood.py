"""Membership scores against plain Python."""

from __future__ import annotations

import math
import random
import zlib
from statistics import fmean

import pytest
import torch

from expunge.audits.attacks.membership import blind_scores
from expunge.data.rows import Row
from expunge.evaluation.likelihood import (
    loss_score,
    min_k,
    min_k_plus_plus,
    zlib_score,
)

DRAW = random.Random(0)
LOG_PROBS = [-DRAW.expovariate(1) for _ in range(23)]


def test_loss_and_zlib_are_means_over_tokens_and_bytes() -> None:
    values = torch.tensor(LOG_PROBS)
    text = "a text, a text, a text with an ü"
    assert loss_score(values) == pytest.approx(fmean(LOG_PROBS))
    assert zlib_score(values, text) == pytest.approx(sum(LOG_PROBS) / len(zlib.compress(text.encode())))


def test_min_k_is_the_mean_of_the_least_likely_tokens() -> None:
    values = torch.tensor(LOG_PROBS)
    assert min_k(values, 0.2) == pytest.approx(fmean(sorted(LOG_PROBS)[:4]))
    assert min_k(values, 1.0) == pytest.approx(loss_score(values))
    assert min_k(values[:2], 0.2) == pytest.approx(min(LOG_PROBS[:2]))  # never no token


def test_min_k_plus_plus_is_min_k_of_the_standardised_values() -> None:
    values = torch.tensor(LOG_PROBS)
    mean = torch.tensor([-1.0 - n / 10 for n in range(23)])
    deviation = torch.tensor([0.5 + n / 20 for n in range(23)])
    plain = [(a - float(b)) / float(c) for a, b, c in zip(LOG_PROBS, mean, deviation, strict=True)]
    found = min_k_plus_plus(values, mean, deviation, 0.2)
    assert found == pytest.approx(fmean(sorted(plain)[:4]), rel=1e-5)
    # Where log p is its own mean, the score is 0 whatever the deviation.
    assert min_k_plus_plus(mean, mean, deviation) == 0.0
    assert math.isfinite(min_k_plus_plus(values, mean, torch.zeros(23)))


def test_the_blind_baseline_sees_words_and_never_its_own_document() -> None:
    members = [Row(f"m{n}sc1", "old words of then", f"number {n}") for n in range(8)]
    others = [Row(f"n{n}sc1", "new talk from now", f"number {n}") for n in range(8)]
    found = blind_scores(members, others, 0)
    assert found is not None
    assert min(found[:8]) > max(found[8:])
    # A document in two rows: what is the same in both must not be learned from the one for the other.
    alike = [Row(f"d{n}sc{i}", f"secret{n}", f"of{n} it") for n in range(8) for i in (1, 2)]
    found = blind_scores(alike[:8], alike[8:], 0)
    assert found is not None
    assert max(found) - min(found) < 1.0
    assert blind_scores(members[:1], others, 0) is None

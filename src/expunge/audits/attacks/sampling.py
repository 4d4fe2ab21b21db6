"""Sampling leak: many sampled answers a fact, and the exact probability of the true one.

Greedy decoding shows one answer; whoever may ask again sees others. arXiv 2511.04934 (leak@k),
arXiv 2410.03523 (bounds on what samples leak).
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from expunge.audits.base import Advance, Attack, Case, Found
from expunge.audits.estimates import leak_at_k, leak_at_k_bound
from expunge.audits.facts import extracted, score
from expunge.audits.subject import Ask, Subject
from expunge.evaluation.choices import Place
from expunge.terminal import counting

TEMPERATURES = (0.7, 1.0)
_NEAR = 1e-4
"""A draw this near the border of two tokens is decided by a pass of the row alone (float32)."""


class Sampled:
    """Draws each token from softmax(logits / temperature) by a number that its place determines."""

    def __init__(self, temperature: float, numbers: torch.Tensor) -> None:
        """`numbers` (requests, tokens) are uniform in [0, 1), float64."""
        self._temperature, self._numbers = temperature, numbers

    def __call__(self, logits: torch.Tensor, places: Sequence[Place]) -> tuple[list[int], list[bool]]:
        """The token whose share of the cumulated probabilities holds the place's number."""
        requests, tokens = zip(*places, strict=True)
        # A draft is one longer than the room of its row, and that token is never used.
        width = self._numbers.shape[1]
        numbers = self._numbers[list(requests), [min(t, width - 1) for t in tokens]]
        # Not every accelerator has float64.
        exact = logits.float().cpu().double() / self._temperature
        upto = exact.softmax(-1).cumsum(-1)
        found = torch.searchsorted(upto, numbers[:, None]).clamp(max=logits.shape[-1] - 1)
        above = upto.gather(1, found)[:, 0] - numbers
        below = numbers - upto.gather(1, (found - 1).clamp(min=0))[:, 0]
        near = (above < _NEAR) | ((below < _NEAR) & (found[:, 0] > 0))
        if logits.dtype.itemsize < 4:
            near = torch.zeros_like(near)
        return found[:, 0].tolist(), near.tolist()

    def alone(self, logits: torch.Tensor, place: Place) -> int:
        """The same by the logits of one row."""
        return self(logits[None], [place])[0][0]


def run(subject: Subject, case: Case, advance: Advance) -> Found:
    """Per temperature the best of the samples of each fact; leak@k; exact answer probabilities."""
    samples, reader = case.budget.samples, subject.reader
    every = [reader.asked(row) for row in case.facts]
    asks = [ask for ask in every if ask is not None]
    total = len(TEMPERATURES) * samples * len(asks)
    count = counting(lambda done: advance(done, total))
    scores: dict[str, dict[str, float]] = {}
    texts: dict[str, dict[str, str]] = {}
    rows: dict[str, dict[str, Any]] = {ask.row.id: {} for ask in asks}
    numbers: dict[str, Any] = {"samples": samples, "leak_at_k": {}, "exact": {}}
    pairs = [(ask.prompt, ask.answer) for ask in asks]
    for temperature in TEMPERATURES:
        variant = f"T {temperature}"
        repeated = [ask for ask in asks for _ in range(samples)]
        draws = _numbers(repeated, samples, temperature, case.seed)
        written = reader.texts(repeated, Sampled(temperature, draws), count)
        scores[variant], texts[variant] = {}, {}
        log_probs = reader.log_probs(pairs, temperature)
        for number, ask in enumerate(asks):
            mine = written[number * samples : (number + 1) * samples]
            values = [score(ask.row, text) for text in mine]
            best = max(range(samples), key=values.__getitem__)
            scores[variant][ask.row.id], texts[variant][ask.row.id] = values[best], mine[best]
            leaks = sum(map(extracted, values))
            rows[ask.row.id][variant] = {
                "leaks": leaks,
                "leak_bound": round(leak_at_k_bound(leaks, samples, 1), 6),
                # Further digits are float32's rounding, which changes with the batch.
                "log_probability": round(sum(log_probs[number]), 3),
            }
        counts = [row[variant]["leaks"] for row in rows.values()]
        numbers["leak_at_k"][variant] = {
            str(k): {
                "value": round(statistics.fmean(leak_at_k(c, samples, k) for c in counts), 6),
                "bound": round(statistics.fmean(leak_at_k_bound(c, samples, k) for c in counts), 6),
            }
            for k in _powers(samples)
        }
        exact = [math.exp(row[variant]["log_probability"]) for row in rows.values()]
        numbers["exact"][variant] = {
            "mean_probability": round(statistics.fmean(exact), 6),
            "largest_probability": round(max(exact), 6),
            f"leak_at_{samples}": round(
                statistics.fmean(1 - (1 - min(p, 1.0)) ** samples for p in exact), 6
            ),
        }
    return Found(scores, rows=rows, numbers=numbers, texts=texts)


def _numbers(asks: Sequence[Ask], samples: int, temperature: float, seed: int) -> torch.Tensor:
    """Uniform numbers for every token of every sample: they follow from the row, not from the batch."""
    width = max(ask.room for ask in asks)
    drawn = []
    for index, ask in enumerate(asks):
        name = f"{seed}|{temperature}|{ask.row.id}|{index % samples}"
        digest = hashlib.sha256(name.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        drawn.append(torch.rand(width, generator=generator, dtype=torch.float64))
    return torch.stack(drawn)


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({*(2**n for n in range(most.bit_length()) if 2**n <= most), most})


ATTACK = Attack(
    name="sample",
    title="Sampling leak",
    kind="extraction",
    reference="arXiv 2511.04934",
    how="in at least one of the sampled answers",
    run=run,
)

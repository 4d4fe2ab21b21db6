"""Which erasures a model carries, by the hashes of its weights and the runs of the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expunge.ledger.records import RunRecord


def weights_of(sha256: Mapping[str, str]) -> frozenset[str]:
    """The hashes of a model's weights alone: another tokenizer file makes no other model."""
    return frozenset(v for name, v in sha256.items() if name.endswith(".safetensors"))


def carried(weights: frozenset[str], runs: Sequence[RunRecord]) -> set[int]:
    """Requests that the runs served which led to a model of these weights.

    A run's output begins where its model ended, so this goes back from run to run.
    """
    found: set[int] = set()
    passed: set[int] = set()
    ahead = [weights]
    while ahead:
        now = ahead.pop()
        for run in runs:
            if run.id in passed or run.model_after is None or run.model_before is None:
                continue
            if weights_of(run.model_after) == now:
                passed.add(run.id)
                found |= set(run.requests)
                ahead.append(weights_of(run.model_before))
    return found

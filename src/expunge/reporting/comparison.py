"""Scores of several models side by side, from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.errors import InputError
from expunge.evaluation.protocols.base import Protocol
from expunge.evaluation.protocols.catalog import PROTOCOLS
from expunge.evaluation.score_files import (
    check_one_form,
    opened,
    protocol_in,
    read_protocol_scores,
    read_scores,
)
from expunge.reporting.tables import label_of


def compared(
    runs: Sequence[str], original: str | None, oracle: str | None
) -> tuple[Protocol | None, Mapping[str, Any]]:
    """The protocol of the scores, None for the scorecard, and by label what each file holds.

    Each of `runs` is a scores.json or a directory with one; the labels of `original` and `oracle` are
    target and oracle. Raises InputError for what cannot be read or compared.
    """
    if not runs:
        raise InputError("compare: no run given; name at least one directory or scores.json")
    sources = {"target": original, "oracle": oracle}
    named = {label: source for label, source in sources.items() if source is not None}
    for run in runs:
        named[label_of(run, named)] = run
    protocol = PROTOCOLS.get(protocol_in(opened(next(iter(named.values())))[1]))
    cards: dict[str, Any] = {
        label: read_scores(source)
        if protocol is None
        else read_protocol_scores(source, protocol.name, protocol.measures)
        for label, source in named.items()
    }
    check_one_form(cards)
    return protocol, cards

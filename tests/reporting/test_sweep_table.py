"""The table of a sweep, and what is said below it."""

from __future__ import annotations

import copy
from typing import Any

from expunge.reporting.sweep import sweep_notes, sweep_rows


def cells(forgot: float, kept: float) -> dict[str, Any]:
    return {"forget": {"A": {"knowledge": 1 - forgot}}, "retain": {"A": {"knowledge": kept}}}


def trial(number: int, forgot: float, kept: float, **changes: Any) -> dict[str, Any]:
    return {
        "number": number,
        "state": "complete",
        "reason": None,
        "params": {"method.alpha": 10.0 * number, "schedule": "cosine"},
        "values": {"forgetting": forgot, "retention": kept},
        "parts": cells(forgot, kept),
        "findings": [],
        "destroyed": False,
        "seconds": 3.2,
    } | changes


RESULT: dict[str, Any] = {
    "stopped": "all trials done",
    "objectives": ["forgetting", "retention"],
    "settings": {"search": {"method.alpha": {}, "schedule": {}}},
    "counts": {
        "asked": 5, "ended": 5, "complete": 3, "pruned": 1, "failed": 1,
        "running": 0, "waiting": 0, "lost": 1,
    },
    "target": {"values": {"forgetting": 0.0, "retention": 1.0}, "parts": cells(0.0, 1.0)},
    "best": 1,
    "why_best": "highest harmonic mean",
    "front": [1, 2],
    "trials": [
        trial(0, 0.3, 0.3),
        trial(1, 0.7, 0.8),
        trial(2, 0.9, 0.4),
        trial(3, 0, 0, state="pruned", values=None, parts=None, reason="below the median"),
        trial(4, 0, 0, state="failed", values=None, parts=None, reason="<b>no</b> checkpoint"),
    ],
}  # fmt: skip


def test_rows_are_sorted_by_value_and_marked() -> None:
    destroyed = copy.deepcopy(RESULT)
    destroyed["trials"][2]["destroyed"] = True
    header, rows = sweep_rows(destroyed)
    assert len(header) == len(rows[0])
    assert [row[:2] for row in rows] == [
        ["1 *", "complete"],
        ["0", "complete"],
        ["2 +", "destroyed"],
        ["3", "pruned"],
        ["4", "failed"],
    ]
    assert rows[0] == ["1 *", "complete", "0.700", "0.800", "10", "cosine", "3"]
    notes = "\n".join(sweep_notes(RESULT, "OUT"))
    for words in (
        "5 of 5 trials: 3 complete, 1 pruned, 1 failed; 1 lost (all trials done)",
        "target: forgetting 0.000, retention 1.000",
        "expunge run --config OUT/best.yaml",
        "trial 4 failed: <b>no</b> checkpoint",
    ):
        assert words in notes

"""The page and the table of a sweep: offline, whole, and of nothing but what sweep.json holds."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from expunge.reporting.sweep_figures import front, history, importance, page
from expunge.reporting.sweep_tables import sweep_notes, sweep_rows


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
    "oracle": {"values": {"forgetting": 0.95, "retention": 0.99}, "parts": cells(0.95, 0.99)},
    "best": 1,
    "why_best": "highest harmonic mean",
    "front": [1, 2],
    "importance": {
        "forgetting": {"method.alpha": 0.8, "schedule": 0.2},
        "retention": {"schedule": 0.7, "method.alpha": 0.3},
    },
    "importance_note": "fANOVA over 3 complete trials",
    "trials": [
        trial(0, 0.3, 0.3),
        trial(1, 0.7, 0.8),
        trial(2, 0.9, 0.4),
        trial(3, 0, 0, state="pruned", values=None, parts=None, reason="below the median"),
        trial(4, 0, 0, state="failed", values=None, parts=None, reason="<b>no</b> checkpoint"),
    ],
}  # fmt: skip


def named(figure: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data}


def test_history_shows_every_trial_the_best_so_far_target_and_oracle() -> None:
    figure = history(RESULT)
    assert figure is not None
    traces = [t for t in figure.data if t.yaxis == "y"]
    by_name = {t.name: t for t in traces}
    assert list(by_name["complete"].y) == [0.3, 0.7, 0.9]
    assert list(by_name["best so far"].y) == [0.3, 0.7, 0.9]
    assert list(by_name["pruned (no value)"].x) == [3]
    assert list(by_name["failed (no value)"].x) == [4]
    second = {t.name: t for t in figure.data if t.yaxis == "y2"}
    assert list(second["best so far"].y) == [0.3, 0.8, 0.8]
    lines = sorted(shape.y0 for shape in figure.layout.shapes)
    assert lines == [0.0, 0.95, 0.99, 1.0]


def test_a_destroyed_trial_is_shown_apart_and_is_not_the_best_so_far() -> None:
    destroyed = copy.deepcopy(RESULT)
    destroyed["trials"][1]["destroyed"] = True
    destroyed["front"], destroyed["best"] = [2], 2
    figure = history(destroyed)
    assert figure is not None
    traces = {t.name: t for t in figure.data if t.yaxis == "y"}
    assert list(traces["best so far"].y) == [0.3, 0.9]
    assert list(traces["destroyed (never best)"].x) == [1]
    points = named(front(destroyed))
    assert list(points["destroyed (never best)"].x) == [0.7]
    assert list(points["other trials"].x) == [0.3]


def test_the_front_marks_what_is_on_it_the_target_and_the_oracle() -> None:
    traces = named(front(RESULT))
    assert set(traces) == {"other trials", "Pareto front", "target", "oracle"}
    assert list(traces["Pareto front"].x) == [0.7, 0.9]
    assert list(traces["Pareto front"].y) == [0.8, 0.4]
    assert list(traces["other trials"].x) == [0.3]
    assert (list(traces["oracle"].x), list(traces["oracle"].y)) == ([0.95], [0.99])
    markers = {(t.marker.color, t.marker.symbol) for t in traces.values()}
    assert len(markers) == len({symbol for _, symbol in markers}) == 4, "told by shape alone"


def test_one_objective_is_drawn_as_forgetting_against_retention() -> None:
    single = copy.deepcopy(RESULT) | {"objectives": ["final"], "oracle": None}
    for entry in [*single["trials"], single["target"]]:
        entry["values"] = None if entry["values"] is None else {"final": 0.5}
    traces = named(front(single))
    assert set(traces) == {"other trials", "best trial", "target"}
    assert list(traces["best trial"].x) == pytest.approx([0.7])
    assert list(traces["target"].y) == [1.0]
    for entry in single["trials"]:
        entry["parts"] = None
    assert front(single) is None


def test_four_objectives_give_six_panels() -> None:
    wide = copy.deepcopy(RESULT) | {"objectives": ["forgetting", "retention", "mia", "utility"]}
    for entry in [*wide["trials"], wide["target"], wide["oracle"]]:
        if entry["values"] is not None:
            entry["values"] |= {"mia": 0.5, "utility": 0.4}
    figure = front(wide)
    assert figure is not None
    assert len({t.xaxis for t in figure.data}) == 6


def test_importance_has_a_bar_an_option_and_objective() -> None:
    bars = named(importance(RESULT))
    assert dict(zip(bars["retention"].y, bars["retention"].x, strict=True)) == {
        "schedule": 0.7, "method.alpha": 0.3,
    }  # fmt: skip
    assert bars["forgetting"].marker.pattern.shape != bars["retention"].marker.pattern.shape
    assert importance(RESULT | {"importance": None}) is None


def test_the_page_is_one_file_that_needs_no_network(tmp_path: Path) -> None:
    html = page(RESULT, "sweep")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", html)
    assert html.count("plotly.js v") == 1, "the library is in the page once"
    assert html.count('class="plotly-graph-div"') == 3
    assert "prefers-color-scheme: dark" in html
    assert "<b>no</b>" not in html, "what comes from outside is escaped"
    assert "Pareto front (+, *): trials 1, 2" in html


def test_a_sweep_without_a_complete_trial_still_has_a_page(tmp_path: Path) -> None:
    bare = RESULT | {
        "trials": RESULT["trials"][3:], "best": None, "front": [], "importance": None,
        "target": None, "oracle": None,
    }  # fmt: skip
    assert "no trial is complete" in page(bare, "sweep")
    page(bare | {"trials": []}, "sweep")


def test_rows_are_sorted_by_value_and_marked() -> None:
    destroyed = copy.deepcopy(RESULT)
    destroyed["trials"][2]["destroyed"] = True
    rows = sweep_rows(destroyed)
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

"""The page and the table of a sweep: offline, whole, and of nothing but what sweep.json holds."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from expunge.reporting.figures import Line, Panel
from expunge.reporting.sweep import front, history, page, sweep_notes, sweep_rows


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


def named(panel: Panel) -> dict[str, Line]:
    return {line.name: line for line in panel.lines}


def xs(line: Line) -> list[float]:
    return [x for x, _ in line.points]


def ys(line: Line) -> list[float | None]:
    return [y for _, y in line.points]


def test_history_shows_every_trial_the_best_so_far_target_and_oracle() -> None:
    first, second = history(RESULT)
    by_name = named(first)
    assert ys(by_name["complete"]) == [0.3, 0.7, 0.9]
    assert ys(by_name["best so far"]) == [0.3, 0.7, 0.9]
    assert xs(by_name["pruned"]) == [3]
    assert xs(by_name["failed"]) == [4]
    assert ys(named(second)["best so far"]) == [0.3, 0.8, 0.8]
    assert by_name["failed"].said == [
        "trial 4: failed\nmethod.alpha = 40\nschedule = cosine\n<b>no</b> checkpoint"
    ]
    lines = sorted(level for panel in (first, second) for _, level in panel.levels)
    assert lines == [0.0, 0.95, 0.99, 1.0]


def test_a_destroyed_trial_is_shown_apart_and_is_not_the_best_so_far() -> None:
    destroyed = copy.deepcopy(RESULT)
    destroyed["trials"][1]["destroyed"] = True
    destroyed["front"], destroyed["best"] = [2], 2
    lines = named(history(destroyed)[0])
    assert ys(lines["best so far"]) == [0.3, 0.9]
    assert xs(lines["destroyed"]) == [1]
    ((_, panel),) = front(destroyed)
    points = named(panel)
    assert xs(points["destroyed (never best)"]) == [0.7]
    assert xs(points["other trials"]) == [0.3]


def test_the_front_marks_what_is_on_it_the_target_and_the_oracle() -> None:
    ((across, panel),) = front(RESULT)
    assert (across, panel.title) == ("forgetting", "retention")
    lines = named(panel)
    assert set(lines) == {"other trials", "Pareto front", "target", "oracle"}
    assert lines["Pareto front"].points == [(0.7, 0.8), (0.9, 0.4)]
    assert xs(lines["other trials"]) == [0.3]
    assert lines["oracle"].points == [(0.95, 0.99)]
    assert len({line.style for line in lines.values()}) == 4, "told by shape alone"


def test_one_objective_is_drawn_as_forgetting_against_retention() -> None:
    single = copy.deepcopy(RESULT) | {"objectives": ["final"], "oracle": None}
    for entry in [*single["trials"], single["target"]]:
        entry["values"] = None if entry["values"] is None else {"final": 0.5}
    ((_, panel),) = front(single)
    lines = named(panel)
    assert set(lines) == {"other trials", "best trial", "target"}
    assert xs(lines["best trial"]) == pytest.approx([0.7])
    assert ys(lines["target"]) == [1.0]
    for entry in single["trials"]:
        entry["parts"] = None
    assert front(single) == []


def test_four_objectives_give_six_panels() -> None:
    wide = copy.deepcopy(RESULT) | {"objectives": ["forgetting", "retention", "mia", "utility"]}
    for entry in [*wide["trials"], wide["target"], wide["oracle"]]:
        if entry["values"] is not None:
            entry["values"] |= {"mia": 0.5, "utility": 0.4}
    assert len({(across, panel.title) for across, panel in front(wide)}) == 6


def test_importance_has_a_bar_an_option_and_objective() -> None:
    def widths(result: dict[str, Any]) -> list[list[float]]:
        drawn = re.findall(r'<svg class="comparison".*?</svg>', page(result, "sweep"), re.DOTALL)
        return [[float(width) for width in re.findall(r' width="(.+?)"', svg)] for svg in drawn]

    first, second = widths(RESULT)
    assert first[0] == pytest.approx(4 * first[1], abs=0.05)
    assert second[0] == pytest.approx(7 / 3 * second[1], abs=0.05)
    assert widths(RESULT | {"importance": None}) == []


def test_the_page_is_one_file_that_needs_no_network(tmp_path: Path) -> None:
    html = page(RESULT, "sweep")
    assert not re.search(r"<(script|link|img)", html)
    assert html.count("<figure>") == 4
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

"""A sweep for people: a table of its trials, what it says in words, and a page with figures."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.reporting import figures
from expunge.reporting.figures import Compared, Line, Panel
from expunge.reporting.rendering import still_page
from expunge.reporting.tables import number, table_console, table_of
from expunge.terminal import shown

PAGE = "sweep.html"
_SHOWN = 20
_TITLE = "Trials (0-1, high is good)"
_SIDES = {
    "forget": "forgetting (1 - mean of the forget set)",
    "retain": "retention (mean of the retain set)",
}
Points = list[tuple[float, float | None]]


def sweep_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and one line a trial, by value; those without a value come last."""
    objectives, names = result["objectives"], list(result["settings"]["search"])

    def order(trial: Mapping[str, Any]) -> tuple[bool, bool, float, int]:
        values = trial["values"]
        mean = 0.0 if values is None else statistics.harmonic_mean(list(values.values()))
        return values is None, trial["destroyed"], -mean, trial["number"]

    rows = []
    for trial in sorted(result["trials"], key=order):
        mark = " *" if trial["number"] == result["best"] else ""
        if not mark and len(objectives) > 1 and trial["number"] in result["front"]:
            mark = " +"
        values = trial["values"] or {}
        rows.append(
            [
                f"{trial['number']}{mark}",
                "destroyed" if trial["destroyed"] else trial["state"],
                *(number(values.get(objective)) for objective in objectives),
                *(shown(trial["params"].get(name, "-")) for name in names),
                "-" if trial["seconds"] is None else f"{trial['seconds']:.0f}",
            ]
        )
    return ["trial", "state", *objectives, *names, "seconds"], rows


def sweep_notes(result: Mapping[str, Any], output: str) -> list[str]:
    """What a line each says below the table."""
    counts, objectives = result["counts"], result["objectives"]
    more = ", ".join(
        f"{counts[state]} {state}" for state in ("running", "waiting", "lost") if counts[state]
    )
    notes = [
        f"{counts['ended']} of {counts['asked']} trials: {counts['complete']} complete,"
        f" {counts['pruned']} pruned, {counts['failed']} failed{f'; {more}' if more else ''}"
        f" ({result['stopped']})"
    ]
    notes += [
        f"{model}: {_values(result[model]['values'])}"
        for model in ("target", "oracle")
        if result[model] is not None
    ]
    if result["best"] is None:
        notes.append("best: no trial is complete and left the model whole")
    else:
        best = next(t for t in result["trials"] if t["number"] == result["best"])
        notes.append(
            f"best (*): trial {best['number']}, {_values(best['values'])}; {result['why_best']};"
            f" expunge run --config {output}/best.yaml"
        )
        notes += [f"best: {finding}" for finding in best["findings"]]
    if len(objectives) > 1 and result["front"]:
        notes.append(f"Pareto front (+, *): trials {', '.join(map(str, result['front']))}")
    if result["importance"] is None:
        notes.append(f"importance: none ({result['importance_note']})")
    else:
        for objective, shares in result["importance"].items():
            named = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
            notes.append(f"importance for {objective}: {named}")
    failures = [t for t in result["trials"] if t["state"] == "failed"]
    notes += [f"trial {t['number']} failed: {t['reason']}" for t in failures[:5]]
    return notes


def print_sweep(result: Mapping[str, Any], output: str) -> None:
    """Prints the table to standard output."""
    console = table_console()
    header, rows = sweep_rows(result)
    console.print(table_of(_TITLE, header, rows[:_SHOWN], left=("trial", "state")))
    if len(rows) > _SHOWN:
        console.print(f"{len(rows) - _SHOWN} more trials are in {output}/sweep.json")
    for note in sweep_notes(result, output):
        console.print(note, soft_wrap=True)


def page(result: Mapping[str, Any], output: str) -> str:
    """The page for what sweep.json in the output holds."""
    told = "The table below holds every value."
    drawings = []
    if result["trials"]:
        title = "Value of each trial, and the best so far; without a value at 0"
        drawings.append((title, figures.curves(history(result), "trial", title, told)))
    for objective, shares in (result["importance"] or {}).items():
        title = f"Importance of each option for {objective} ({result['importance_note']})"
        rows = [Compared(name, bar=share) for name, share in shares.items()]
        drawings.append((title, figures.comparison(rows, "share of the variance", title, told)))
    for across, panel in front(result):
        title = f"{panel.title} against {across}"
        drawn = figures.curves([panel], across, title, told, span=(0.0, 1.0))
        drawings.append((title, drawn))
    table = (_TITLE, *sweep_rows(result))
    return still_page("sweep", "Sweep", sweep_notes(result, output), drawings, table)


def history(result: Mapping[str, Any]) -> list[Panel]:
    """Each objective's value by trial, and the best so far; pruned and failed trials at the foot."""
    trials = result["trials"]
    others = {"destroyed": [trial for trial in trials if trial["destroyed"]]}
    others |= {state: [t for t in trials if t["state"] == state] for state in ("pruned", "failed")}
    panels = []
    for objective in result["objectives"]:
        whole = [t for t in trials if t["values"] is not None and not t["destroyed"]]
        values = [trial["values"][objective] for trial in whole]
        numbers = [trial["number"] for trial in whole]
        best = list(zip(numbers, itertools.accumulate(values, max), strict=True))
        lines = [
            _marks("complete", "best", whole, list(zip(numbers, values, strict=True))),
            Line("best so far", "one", best, stepped=True),
        ]
        for style, mine in others.items():
            points = [(t["number"], (t["values"] or {}).get(objective, 0.0)) for t in mine]
            lines.append(_marks(style, style, mine, points))
        levels = [
            (model, result[model]["values"][objective])
            for model in ("target", "oracle")
            if result[model] is not None and result[model]["values"][objective] is not None
        ]
        shown = [line for line in lines if line.points]
        panels.append(Panel(objective, shown, unit=True, levels=levels))
    return panels


def front(result: Mapping[str, Any]) -> list[tuple[str, Panel]]:
    """A panel and its horizontal axis for every pair of objectives.

    Of a single objective: retention over forgetting, if all complete trials measured both.
    """
    several = len(result["objectives"]) > 1
    axes = {name: name for name in result["objectives"]}
    complete = [trial for trial in result["trials"] if trial["state"] == "complete"]
    if not several:
        measured = [trial["parts"] for trial in result["trials"] if trial["parts"] is not None]
        axes = _SIDES if measured and all(parts["retain"] for parts in measured) else {}
    best = set(result["front"]) if several else {result["best"]}
    groups: dict[str, list[Mapping[str, Any]]] = {"trial": [], "destroyed": [], "best": []}
    for trial in complete:
        group = "best" if trial["number"] in best else "destroyed" if trial["destroyed"] else "trial"
        groups[group].append(trial)
    names = {
        "trial": "other trials",
        "destroyed": "destroyed (never best)",
        "best": "Pareto front" if several else "best trial",
    }
    panels = []
    for (x, across), (y, title) in itertools.combinations(axes.items(), 2):
        lines = [
            _marks(names[style], style, trials, [(_value(t, x) or 0.0, _value(t, y)) for t in trials])
            for style, trials in groups.items()
        ]
        for model in ("target", "oracle"):
            if result[model] is not None:
                point = (_value(result[model], x) or 0.0, _value(result[model], y))
                lines.append(Line(model, model, [point], marks=True))
        shown = [line for line in lines if line.points]
        panels.append((across, Panel(title, shown, unit=True, height=320.0)))
    return panels


def _marks(name: str, style: str, trials: Sequence[Mapping[str, Any]], points: Points) -> Line:
    return Line(name, style, points, marks=True, said=[_told(trial) for trial in trials])


def _value(entry: Mapping[str, Any], name: str) -> float | None:
    """An objective's value, or the share that a side of the scorecard says was forgotten or kept."""
    if name not in _SIDES:
        value: float | None = entry["values"][name]
        return value
    parts = entry["parts"] or {}
    cells = [v for cell in parts.get(name, {}).values() for v in cell.values() if v is not None]
    if not cells:
        return None
    mean = statistics.fmean(cells)
    return 1 - mean if name == "forget" else mean


def _told(trial: Mapping[str, Any]) -> str:
    """What a trial's mark says under the pointer."""
    lines = [f"trial {trial['number']}: {trial['state']}"]
    lines += [f"{name} {value:.4f}" for name, value in (trial["values"] or {}).items()]
    lines += [f"{name} = {shown(value)}" for name, value in trial["params"].items()]
    return "\n".join([*lines, *filter(None, [trial["reason"]])])


def _values(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in values.items())

"""A sweep for people: a table of its trials, and what it says in words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from expunge.reporting.tables import number, table_console, table_of
from expunge.terminal import shown

_SHOWN = 20


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
    if result["target"] is not None:
        notes.append(f"target: {_values(result['target']['values'])}")
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
    failures = [t for t in result["trials"] if t["state"] == "failed"]
    notes += [f"trial {t['number']} failed: {t['reason']}" for t in failures[:5]]
    return notes


def print_sweep(result: Mapping[str, Any], output: str) -> None:
    """Prints the table to standard output."""
    console = table_console()
    header, rows = sweep_rows(result)
    console.print(table_of("Trials (0-1, high is good)", header, rows[:_SHOWN], left=("trial", "state")))
    if len(rows) > _SHOWN:
        console.print(f"{len(rows) - _SHOWN} more trials are in {output}/sweep.json")
    for note in sweep_notes(result, output):
        console.print(note, soft_wrap=True)


def _values(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in values.items())

"""What an erasure came to, in five lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.models.files import MANIFEST
from expunge.reporting.material import AUDIT, read_manifest
from expunge.reporting.report import PAGE

if TYPE_CHECKING:
    from rich.panel import Panel

_COLOURS = {"forgotten": "green", "destroyed": "red", "not-forgotten": "red"}
_GIB = 2**30


def box(output: Path, report: Mapping[str, Any], seconds: Mapping[str, float]) -> Panel:
    """Verdict, what came back, what it cost, where the report is, what to do next.

    `report` is report.json, `seconds` what each part took after the run.
    """
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    manifest, summary, audit = read_manifest(output / MANIFEST), report["summary"], report["audit"]
    training = manifest["settings"]["training"]
    seconds = {"run": manifest["seconds"]["total"], **seconds}
    colour = _COLOURS.get(summary["status"], "yellow")
    verdict = Text(summary["title"], f"bold {colour}")
    if summary["sentence"]:
        verdict.append(f": {summary['sentence']}", "not bold default")
    counts, worst = (audit["requests"][0]["came_back"], audit["strongest"]) if audit else (None, None)
    came_back = "not measured"
    if counts and worst:
        came_back = (
            f"{counts['unlearned']} of {counts['facts']} facts in {counts['attacks']} attacks;"
            f" strongest: {worst['title']}, {worst['value']:.0%} of what the target gives"
        )
    took = ", ".join(f"{name} {each:.0f}" for name, each in seconds.items())
    table = Table.grid(padding=(0, 1))
    table.add_row("verdict", verdict)
    table.add_row("came back", came_back)
    table.add_row(
        "cost",
        f"{sum(seconds.values()):.0f} s ({took}); {manifest['steps']} steps,"
        f" {manifest['steps'] / training['steps_per_epoch']:.1f} passes;"
        f" {manifest['peak_memory_bytes']['process'] / _GIB:.1f} GiB",
    )
    table.add_row("report", str(output / PAGE))
    table.add_row("next", _next(output, summary["status"], training, audit))
    return Panel(table, border_style=colour, title=str(output), expand=False)


def _next(
    output: Path, status: str, training: Mapping[str, Any], audit: Mapping[str, Any] | None
) -> str:
    budget = None if audit is None else audit["settings"]["budget"]["name"]
    more = {None: "", "quick": " --budget standard"}.get(budget, " --budget thorough")
    attack = f"expunge audit {output}{more} --output {output / AUDIT}, then expunge report {output}"
    if status == "forgotten" and budget == "thorough":
        return f"give the report to whoever asked, and use {output} in the model's place"
    if status in ("forgotten", "no-verdict", "not-audited"):
        return f"attack with more: {attack}" if audit else f"attack it: {attack}"
    if status in ("destroyed", "over-unlearned"):
        change = f"--learning-rate {training['learning_rate'] / 2:g}"
    else:
        change = f"--epochs {2 * training['epochs']}"
    return f"begin anew: the same command with --overwrite {change}"

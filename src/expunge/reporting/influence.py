"""The influence of rows for people: tables of the rows that matter most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from expunge.analysis.influence_file import Influence, MeasuredRow, RetainRow
from expunge.data.rows import Row
from expunge.reporting.tables import table_of

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 120
"""Characters of a revealed text."""


def summary_lines(influence: Influence) -> list[str]:
    """What the tables do not say: counts, thresholds, overlaps by reason."""
    gone = sum(row.gone for row in influence.forget)
    lines = [
        f"{len(influence.forget)} forget rows, {gone} of them gone already;"
        f" {len(influence.retain)} retain rows,"
        f" {sum(row.collateral > 0 for row in influence.retain)} predicted to get worse"
    ]
    kinds = {row.kind for row in influence.forget}
    for kind, limit in influence.thresholds.items():
        if kind in kinds:
            lines.append(
                f"gone ({kind}): answer loss {limit.answer_loss:.2f} or more and recall"
                f" {limit.recall:.2f} or less ({limit.source})"
            )
    reasons = Counter(overlap.reason for overlap in influence.overlaps)
    found = ", ".join(f"{reason} {count}" for reason, count in reasons.items()) or "none"
    lines.append(f"retain rows that overlap with the forget set: {found}")
    curvature = influence.curvature
    lines.append(
        f"curvature {influence.settings['curvature']} of {curvature['parameters']} parameters in"
        f" {curvature['maps']} maps, damping {curvature['damping']:.3g}"
        f" (mean of the curvature {curvature['mean_fisher']:.3g})"
    )
    return lines


def influence_tables(
    influence: Influence, top: int, texts: Mapping[str, Row] | None = None
) -> list[Table]:
    """The strongest forget rows, the retain rows most at risk, the overlaps; at most `top` of each.

    `texts` are the rows by id where their text may be shown; without them no text is.
    """
    strongest = sorted(influence.forget, key=lambda row: (-row.self_influence, row.id))[:top]
    at_risk = _at_risk(influence, top)
    lines = [
        [*_cells(row, f"{row.self_influence:.3g}"), "yes" if row.gone else "no"] for row in strongest
    ]
    header = ["id", "task", "kind", "self-influence, nats", "loss, nats", "recall", "gone"]
    tables = [_table(f"Forget rows, strongest {len(lines)}", header, lines, texts)]
    if at_risk:
        lines = [_cells(row, f"{row.collateral:+.3g}") for row in at_risk]
        header = ["id", "task", "kind", "collateral, nats", "loss, nats", "recall"]
        tables.append(_table(f"Retain rows, most at risk {len(lines)}", header, lines, texts))
    if influence.overlaps:
        lines = []
        for overlap in influence.overlaps[:top]:
            more = f" and {overlap.count - 1} more" if overlap.count > 1 else ""
            share = "-" if overlap.containment is None else f"{overlap.containment:.2f}"
            cells = [overlap.retain, overlap.reason, overlap.forget[0] + more, share]
            lines.append([*cells, *([", ".join(overlap.subjects)] if texts is not None else [])])
        header = ["id", "reason", "forget rows", "containment"]
        header += ["subjects"] if texts is not None else []
        title = f"Retain rows that overlap, {len(lines)} of {len(influence.overlaps)}"
        tables.append(_table(title, header, lines, texts))
    return tables


def _at_risk(influence: Influence, top: int) -> list[RetainRow]:
    return sorted(influence.retain, key=lambda row: (-row.collateral, row.id))[:top]


def _cells(row: MeasuredRow, figure: str) -> list[str]:
    return [row.id, row.task, row.kind, figure, f"{row.loss:.3f}", f"{row.recall:.2f}"]


def _table(
    title: str,
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    texts: Mapping[str, Row] | None,
) -> Table:
    words = [heading for heading in header if "nats" not in heading]
    if texts is None:
        return table_of(title, header, lines, left=words)
    revealed = []
    for cells in lines:
        text = " ".join(texts[cells[0]].text.split())
        revealed.append([*cells, text[:_SHOWN] + "…" * (len(text) > _SHOWN)])
    return table_of(title, [*header, "text"], revealed, left=[*words, "text"])

"""The layer analysis for people: a table for the terminal, and one figure in a file of its own."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.analysis.layers import LayerChoice
from expunge.reporting.tables import number
from expunge.search.layer_sweep import LayerSweep

if TYPE_CHECKING:
    from rich.table import Table

_MEASURED = (
    ("task aggregate", "task_aggregate", "#0072B2", "circle"),
    ("MIA score", "mia_score", "#E69F00", "square"),
    ("utility", "utility", "#009E73", "diamond"),
)
_SHARES = (
    ("decodable", "decodable", "#56B4E9", "circle"),
    ("restored", "restored", "#E69F00", "square"),
    ("separate", "separate", "#009E73", "diamond"),
    ("written", "written", "#CC79A7", "cross"),
)
_VALUE, _TIME = "#D55E00", "#56B4E9"
"""Okabe and Ito's palette, whose colours differ to every kind of colour vision; markers differ too."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #ffffff; --ink: #1a1a1a; --line: #d5d5d5; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --back: #16181c; --ink: #e8e8e8; --line: #43474e; }}
}}
body {{ background: var(--back); color: var(--ink); max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  font: 16px/1.5 system-ui, sans-serif; }}
.js-plotly-plot text {{ fill: var(--ink) !important; }}
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path,
.js-plotly-plot .xlines-above, .js-plotly-plot .ylines-above {{ stroke: var(--line) !important; }}
.js-plotly-plot .legend .bg {{ fill: var(--back) !important; }}
.js-plotly-plot .hoverlayer .hovertext path {{ fill: var(--back) !important; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }}
.wide {{ overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{figure}
<div class="wide">{table}</div>
</body>
</html>
"""


def prediction_rows(choice: LayerChoice) -> tuple[list[str], list[list[str]]]:
    """Header and one line a layer: the predicted score, its shares, and what they were made of."""
    header = [
        "layer", "score", "decodable", "restored", "separate", "written",
        "log-prob", "rank", "norm",
    ]  # fmt: skip
    rows = [
        [
            f"{reading.layer}{' *' * (reading.layer == choice.layer)}",
            *(number(v) for v in (reading.score, reading.decodable, reading.restored)),
            *(number(v) for v in (reading.separate, reading.written)),
            f"{reading.log_prob:.2f}",
            f"{reading.rank:.1f}",
            f"{reading.norm:.1f}",
        ]
        for reading in choice.readings
    ]
    return header, rows


def sweep_rows(sweep: LayerSweep) -> tuple[list[str], list[list[str]]]:
    """Header and one line a layer: what was measured, the time, the predicted score."""
    predicted = {reading.layer: reading.score for reading in sweep.prediction.readings}
    best, chosen = sweep.agreement.best, sweep.agreement.predicted
    header = [
        "layer", "task aggregate", "MIA AUC", "MIA score", "utility", "final score", "mean of measured",
        "run, s", "scoring, s", "predicted", "",
    ]  # fmt: skip
    rows = []
    for result in sweep.results:
        scores: Mapping[str, Any] = result.scores or {}
        marks = ["best"] * (result.layer == best) + ["predicted"] * (result.layer == chosen)
        rows.append(
            [
                str(result.layer),
                *(
                    number(scores.get(name))
                    for name in ("task_aggregate", "mia_auc", "mia_score", "utility", "final_score")
                ),
                number(result.value),
                f"{result.seconds['run']:.0f}",
                f"{result.seconds['scoring']:.0f}",
                number(predicted.get(result.layer)),
                "no checkpoint" if result.failure else ", ".join(marks),
            ]
        )
    return header, rows


def agreement_text(sweep: LayerSweep) -> str:
    """What the sweep says of the prediction, in one or two sentences."""
    found = sweep.agreement
    if found.best is None:
        return "No layer gave a model that can be scored."
    said = f"Best by {found.measured_by}: layer {found.best}."
    if found.predicted is None:
        return f"{said} None of the layers that were run has a predicted score."
    order = (
        "too few layers, or all alike, for a rank correlation"
        if found.rank_correlation is None
        else f"rank correlation {found.rank_correlation:.2f} over {found.layers} layers"
    )
    loss = "" if found.loss is None else f", {found.loss:.3f} below the best"
    return f"{said} Predicted: layer {found.predicted}{loss}; {order}."


def table_of(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The lines as a rich table."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, heading in enumerate(header):
        # On a narrow terminal a heading may break at its spaces; a number is never cut.
        widest = max((len(row[column]) for row in rows), default=0)
        table.add_column(heading, justify="right" if heading else "left", min_width=widest)
    for row in rows:
        table.add_row(*row)
    return table


def page(sweep: LayerSweep) -> str:
    """The figure with its table as one HTML file, which loads nothing from anywhere."""
    header, rows = sweep_rows(sweep)
    title = f"Layers of {Path(sweep.asked['inputs']['model']).name}"
    return _PAGE.format(
        title=html.escape(title),
        summary=html.escape(agreement_text(sweep)),
        figure=_figure(sweep).to_html(
            full_html=False,
            include_plotlyjs=True,
            div_id="layers",  # a random one would make every file another
            config={"displayModeBar": False, "responsive": True},
        ),
        table=_html_table(header, rows),
    )


def _figure(sweep: LayerSweep) -> Any:
    """Three panels over the layers: what was measured, what was predicted, how long it took."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=3,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.09,
        row_heights=[0.42, 0.36, 0.22],
        subplot_titles=("Measured after unlearning at the layer", "Predicted before", "Seconds"),
    )
    measured = [result for result in sweep.results if result.scores is not None]
    layers = [result.layer for result in measured]

    def line(name: str, x: Any, y: Any, color: str, symbol: str, row: int, wide: bool) -> None:
        figure.add_trace(
            go.Scatter(
                name=name,
                x=x,
                y=y,
                mode="lines+markers",
                line={"color": color, "width": 4 if wide else 2, "dash": None if wide else "dot"},
                marker={"symbol": symbol, "size": 9, "color": color},
                legend="legend" if row == 1 else "legend2",
            ),
            row=row,
            col=1,
        )

    by = sweep.agreement.measured_by
    line(by, layers, [result.value for result in measured], _VALUE, "star", 1, True)
    for name, key, color, symbol in _MEASURED:
        values = [result.scores[key] for result in measured if result.scores is not None]
        if any(value is not None for value in values):
            line(name, layers, values, color, symbol, 1, False)
    readings = sweep.prediction.readings
    places = [reading.layer for reading in readings]
    line("predicted score", places, [r.score for r in readings], _VALUE, "star", 2, True)
    for name, key, color, symbol in _SHARES:
        values = [getattr(reading, key) for reading in readings]
        if any(value is not None for value in values):
            line(name, places, values, color, symbol, 2, False)
    for name, pattern in (("run", ""), ("scoring", "/")):
        figure.add_trace(
            go.Bar(
                name=f"seconds: {name}",
                x=[result.layer for result in sweep.results],
                y=[result.seconds[name] for result in sweep.results],
                marker={"color": _TIME, "pattern": {"shape": pattern}},
                legend="legend3",
            ),
            row=3,
            col=1,
        )
    for layer, said, dash in (
        (sweep.agreement.best, "best", "solid"),
        (sweep.agreement.predicted, "predicted", "dash"),
    ):
        if layer is not None:
            figure.add_vline(x=layer, line={"color": "#888888", "width": 1, "dash": dash})
            figure.add_annotation(
                text=said, x=layer, y=0.12 if said == "best" else 0.02, xref="x", yref="y domain",
                showarrow=False, xanchor="right", yanchor="bottom",
            )  # fmt: skip
    for row in (1, 2):
        figure.update_yaxes(range=[-0.03, 1.05], row=row, col=1)
    figure.update_xaxes(dtick=_step(len(places)), showticklabels=True)
    figure.update_xaxes(title_text="decoder layer, from 0", row=3, col=1)
    legend = {"x": 1.01, "xanchor": "left", "yanchor": "top"}
    figure.update_layout(
        barmode="stack",
        height=900,
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 55, "r": 20, "t": 40, "b": 50},
        legend={**legend, "y": 1.0},
        legend2={**legend, "y": 0.56},
        legend3={**legend, "y": 0.17},
        hovermode="x unified",
    )
    return figure


def _step(layers: int) -> int:
    """Layers between two labels of the axis, so that labels do not touch."""
    return max(1, -(-layers // 20))


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

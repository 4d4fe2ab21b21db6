"""The figures of a sweep in one HTML file that needs no network: history, importance, Pareto front.

Colours are those of Okabe and Ito, told apart with any colour vision, and every kind of trial has a
marker of its own. Text and lines follow the reader's light or dark scheme.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expunge.reporting.sweep_tables import setting, sweep_notes

if TYPE_CHECKING:
    import plotly.graph_objects as go

FIGURES = "sweep.html"
_BLUE, _ORANGE, _GREEN, _PINK, _GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#8A8A8A"
_HEIGHT = 380
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sweep</title>
<meta name="viewport" content="width=device-width">
<style>
:root {{ color-scheme: light dark; --text: #1a1a1a; --back: #ffffff; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e6e6e6; --back: #16181c; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 980px; margin: 2rem auto; padding: 0 1rem; }}
li {{ overflow-wrap: anywhere; }}
</style></head><body>
<h1>Sweep</h1>
<ul>{notes}</ul>
{figures}
<script>
const scheme = window.matchMedia("(prefers-color-scheme: dark)");
function dress() {{
  const text = scheme.matches ? "#e6e6e6" : "#1a1a1a", grid = scheme.matches ? "#3a3f47" : "#dddddd";
  document.querySelectorAll(".js-plotly-plot").forEach((figure) => {{
    const update = {{ "font.color": text }};
    Object.keys(figure.layout).filter((key) => /^[xy]axis/.test(key)).forEach((axis) => {{
      update[axis + ".gridcolor"] = grid; update[axis + ".zerolinecolor"] = grid;
      update[axis + ".linecolor"] = text;
    }});
    Plotly.relayout(figure, update);
  }});
}}
scheme.addEventListener("change", dress);
dress();
</script>
</body></html>
"""


def page(result: Mapping[str, Any], directory: str) -> str:
    """The page for what sweep.json in this directory holds."""
    figures: list[str] = []
    for figure in (history(result), importance(result), front(result)):
        if figure is not None:
            # The library is in the page once, so that it opens anywhere without a network.
            figures.append(
                figure.to_html(
                    full_html=False,
                    include_plotlyjs=not figures,
                    config={"displayModeBar": False, "responsive": True},
                )
            )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in sweep_notes(result, directory))
    return _PAGE.format(notes=notes, figures="\n".join(figures))


def history(result: Mapping[str, Any]) -> go.Figure | None:
    """Each objective's value by trial, and the best so far; pruned and failed trials at the foot."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    objectives, trials = result["objectives"], result["trials"]
    if not trials:
        return None
    figure = make_subplots(
        rows=len(objectives),
        cols=1,
        shared_xaxes=True,
        subplot_titles=objectives if len(objectives) > 1 else None,
        vertical_spacing=0.1,
    )
    for row, objective in enumerate(objectives, start=1):
        complete = [t for t in trials if t["values"] is not None and not t["destroyed"]]
        values = [trial["values"][objective] for trial in complete]
        numbers = [trial["number"] for trial in complete]
        shown = row == 1
        figure.add_trace(
            _points(numbers, values, complete, "complete", _BLUE, "circle", shown), row=row, col=1
        )
        figure.add_trace(
            go.Scatter(
                x=numbers,
                y=list(itertools.accumulate(values, max)),
                mode="lines",
                name="best so far",
                line={"color": _BLUE, "shape": "hv", "width": 1.5},
                showlegend=shown,
                hoverinfo="skip",
            ),
            row=row,
            col=1,
        )
        destroyed = [trial for trial in trials if trial["destroyed"]]
        if destroyed:
            figure.add_trace(
                _points(
                    [trial["number"] for trial in destroyed],
                    [trial["values"][objective] for trial in destroyed],
                    destroyed,
                    "destroyed (never best)",
                    _GREY,
                    "diamond-open",
                    shown,
                ),
                row=row,
                col=1,
            )
        for state, colour, symbol in (("pruned", _ORANGE, "triangle-up"), ("failed", _PINK, "x")):
            others = [trial for trial in trials if trial["state"] == state]
            if others:
                figure.add_trace(
                    _points(
                        [trial["number"] for trial in others],
                        [0.0] * len(others),
                        others,
                        f"{state} (no value)",
                        colour,
                        symbol,
                        shown,
                    ),
                    row=row,
                    col=1,
                )
        for name, value, dash in _marks(result, objective):
            figure.add_hline(
                y=value,
                line={"dash": dash, "color": _GREY, "width": 1.5},
                annotation_text=name,
                annotation_position="top left",
                row=row,
                col=1,
            )
        figure.update_yaxes(range=[-0.05, 1.05], title_text=objective, row=row, col=1)
    figure.update_xaxes(title_text="trial", row=len(objectives), col=1)
    return _plain(figure, "History", _HEIGHT + 200 * (len(objectives) - 1))


def importance(result: Mapping[str, Any]) -> go.Figure | None:
    """Share of each objective's variance by option."""
    import plotly.graph_objects as go

    if result["importance"] is None:
        return None
    figure = go.Figure()
    patterns = ["", "/", "x", ".", "\\", "+"]
    colours = [_BLUE, _ORANGE, _GREEN, _PINK, "#56B4E9", "#D55E00"]
    for index, (objective, shares) in enumerate(result["importance"].items()):
        figure.add_trace(
            go.Bar(
                x=list(shares.values()),
                y=list(shares),
                orientation="h",
                name=objective,
                text=[f"{share:.2f}" for share in shares.values()],
                textposition="outside",
                cliponaxis=False,
                marker={"color": colours[index], "pattern": {"shape": patterns[index]}},
            )
        )
    figure.update_xaxes(range=[0, 1.1], title_text="share of the variance")
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(barmode="group", showlegend=len(result["importance"]) > 1)
    bars = sum(len(shares) for shares in result["importance"].values())
    title = f"Importance of each option ({result['importance_note']})"
    return _plain(figure, title, 160 + 34 * bars)


def front(result: Mapping[str, Any]) -> go.Figure | None:
    """Every pair of objectives; of a single one, forgetting against retention where both are known."""
    from plotly.subplots import make_subplots

    pairs = list(itertools.combinations(_axes(result), 2))
    if not pairs:
        return None
    columns = min(2, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, horizontal_spacing=0.12, vertical_spacing=0.5 / (rows + 1)
    )
    for index, ((x_name, x_of), (y_name, y_of)) in enumerate(pairs):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        for trace in _front_traces(result, x_of, y_of, shown=index == 0):
            figure.add_trace(trace, **place)
        figure.update_xaxes(range=[-0.05, 1.05], title_text=x_name, **place)
        figure.update_yaxes(range=[-0.05, 1.05], title_text=y_name, **place)
    several = len(result["objectives"]) > 1
    title = "Pareto front (all objectives high is good)" if several else "Forgetting and retention"
    return _plain(figure, title, 80 + _HEIGHT * rows)


def _axes(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is drawn against each other: a label, and the objective or the side of the scorecard."""
    if len(result["objectives"]) > 1:
        return [(objective, objective) for objective in result["objectives"]]
    complete = [trial for trial in result["trials"] if trial["parts"] is not None]
    if not complete or not all(trial["parts"]["retain"] for trial in complete):
        return []
    return [
        ("forgetting (1 - mean of the forget set)", "forget"),
        ("mean of the retain set", "retain"),
    ]


def _value(entry: Mapping[str, Any], name: str) -> float | None:
    if entry["values"] is not None and name in entry["values"]:
        value: float | None = entry["values"][name]
        return value
    if entry["parts"] is None or name not in ("forget", "retain"):
        return None
    cells = [v for cell in entry["parts"][name].values() for v in cell.values() if v is not None]
    if not cells:
        return None
    mean = float(sum(cells) / len(cells))
    return 1 - mean if name == "forget" else mean


def _front_traces(
    result: Mapping[str, Any], x_name: str, y_name: str, *, shown: bool
) -> Iterator[Any]:
    several = len(result["objectives"]) > 1
    complete = [trial for trial in result["trials"] if trial["state"] == "complete"]
    destroyed = {trial["number"] for trial in complete if trial["destroyed"]}
    on_front = set(result["front"]) if several else {result["best"]}
    groups = (
        ("other trials", _GREY, "circle-open", lambda n: n not in on_front | destroyed),
        ("destroyed (never best)", _GREY, "diamond-open", lambda n: n in destroyed),
        ("Pareto front" if several else "best trial", _BLUE, "circle", lambda n: n in on_front),
    )
    for name, colour, symbol, belongs in groups:
        mine = [trial for trial in complete if belongs(trial["number"])]
        if mine:
            yield _points(
                [_value(trial, x_name) for trial in mine],
                [_value(trial, y_name) for trial in mine],
                mine,
                name,
                colour,
                symbol,
                shown,
            )
    for model, colour, symbol in (("target", _ORANGE, "square"), ("oracle", _GREEN, "star")):
        if result[model] is not None:
            x, y = _value(result[model], x_name), _value(result[model], y_name)
            yield _points([x], [y], None, model, colour, symbol, shown)


def _points(
    x: Sequence[float | None],
    y: Sequence[float | None],
    trials: Sequence[Mapping[str, Any]] | None,
    name: str,
    colour: str,
    symbol: str,
    shown: bool,
) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(
        x=list(x),
        y=list(y),
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=shown,
        marker={"color": colour, "symbol": symbol, "size": 10, "line": {"width": 1.5}},
        text=[name] if trials is None else [_told(trial) for trial in trials],
        hovertemplate="%{text}<extra></extra>",
    )


def _told(trial: Mapping[str, Any]) -> str:
    """What a trial's marker says under the pointer."""
    lines = [f"trial {trial['number']}: {trial['state']}"]
    lines += [f"{name} {value:.4f}" for name, value in (trial["values"] or {}).items()]
    lines += [f"{name} = {setting(value)}" for name, value in trial["params"].items()]
    return "<br>".join(map(html.escape, [*lines, *filter(None, [trial["reason"]])]))


def _marks(result: Mapping[str, Any], objective: str) -> Iterator[tuple[str, float, str]]:
    for model, dash in (("target", "dash"), ("oracle", "dot")):
        if result[model] is not None and result[model]["values"][objective] is not None:
            yield model, result[model]["values"][objective], dash


def _plain(figure: go.Figure, title: str, height: int) -> go.Figure:
    """Without a background, so that the page's own shows."""
    figure.update_layout(
        title={"text": title, "x": 0},
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": -0.18 if height < 600 else -0.1},
        margin={"l": 70, "r": 30, "t": 60, "b": 70},
        font={"size": 13},
    )
    figure.update_xaxes(showline=True, gridwidth=1)
    figure.update_yaxes(showline=True, gridwidth=1)
    return figure

"""The layer analysis for people: a table for the terminal, and one figure in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expunge.analysis.layers import LayerChoice
from expunge.reporting import figures
from expunge.reporting.rendering import READINGS, SCORES, panel_of, still_page
from expunge.reporting.tables import number
from expunge.search.layer_sweep import LayerSweep

PAGE = "layers.html"


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


def page(sweep: LayerSweep) -> str:
    """The figure with its table as one HTML file, which loads nothing from anywhere."""
    found = sweep.agreement
    best, predicted = found.best, found.predicted
    results = [
        {**(result.scores or {}), **asdict(result), "value": result.value}
        for result in sweep.results
    ]
    panels = [
        panel_of(
            "After: scores of the run at each layer",
            "layer",
            results,
            SCORES,
            None if best is None else (best, f"best: layer {best}"),
        ),
        panel_of(
            "Before: predicted score and its shares",
            "layer",
            [asdict(reading) for reading in sweep.prediction.readings],
            READINGS,
            None if predicted is None else (predicted, f"predicted: layer {predicted}"),
        ),
        panel_of(
            "Seconds",
            "layer",
            [{"layer": result.layer, **result.seconds} for result in sweep.results],
            (("run", "run", "one"), ("scoring", "scoring", "three")),
            unit=False,
        ),
    ]
    title = f"Layers of {Path(sweep.asked['inputs']['model']).name}"
    said = f"The thick line above is the {found.measured_by}. The table holds every score."
    drawn = figures.curves(panels, "decoder layer, from 0", title, said)
    table = ("One run at each layer.", *sweep_rows(sweep))
    return still_page("layers", title, [agreement_text(sweep)], [(said, drawn)], table)

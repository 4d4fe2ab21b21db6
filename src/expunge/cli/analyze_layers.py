"""`expunge analyze layers`: which layer to steer, predicted from one pass or measured by runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.analysis.layers import LayerChoice
from expunge.cli.console import progress_on_stderr
from expunge.cli.options import Printed, print_json, taken
from expunge.cli.run import parsed
from expunge.disk import deliver
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.reporting.layers import PAGE, agreement_text, page, prediction_rows, sweep_rows
from expunge.reporting.tables import table_console, table_of
from expunge.search.layer_sweep import LayerInputs, LayerSweep, predict, sweep_layers

_ABOUT = """
expunge analyze layers MODEL --forget F --retain R --output DIR [--every K]

Unlearns at each layer with the same options (those of `expunge run`), measures each result and
writes a table, a figure and layers.json. Beside them stands the prediction of a pass over a few
rows of the target, by which `--method.layer auto` chooses.
"""


@dataclass(frozen=True)
class Layers(Printed, LayerInputs):
    """Those of a layer sweep, and what is printed."""


def main(arguments: Sequence[str]) -> int:
    """Parses, predicts or sweeps, prints."""
    settings, preset = parsed(
        arguments, "expunge analyze layers", Layers, _ABOUT, default=AdaptiveRMU.name
    )
    as_json = settings.inputs.json
    # What is printed is no part of what a resumed sweep has in common with its beginning.
    inputs = taken(LayerInputs, settings.inputs)
    method, options = settings.settings, settings.training
    if inputs.predict_only:
        with progress_on_stderr() as progress:
            choice = predict(inputs, method, options, progress)
        _show_prediction(choice, as_json=as_json)
        return 0
    with progress_on_stderr() as progress:
        sweep = sweep_layers(inputs, method, options, progress, preset)
        deliver({Path(inputs.output) / PAGE: page(sweep)})
        progress.message(f"figure: {Path(inputs.output) / PAGE}")
    _show_sweep(sweep, inputs.model, as_json=as_json)
    return 0


def _show_prediction(choice: LayerChoice, *, as_json: bool) -> None:
    if as_json:
        print_json(choice.to_json())
        return
    console = table_console()
    if choice.readings:
        console.print(table_of("Predicted", *prediction_rows(choice)))
    if choice.clean is not None and choice.corrupted is not None:
        console.print(
            f"{choice.rows['forget']} forget and {choice.rows['retain']} retain rows; mean"
            f" log-probability of their answers {choice.clean:.2f}, after another prompt"
            f" {choice.corrupted:.2f}",
            soft_wrap=True,
        )
    console.print(f"--method.layer auto: {choice.layer} ({choice.why})", soft_wrap=True)
    if choice.warning is not None:
        console.print(f"warning: {choice.warning}", soft_wrap=True)


def _show_sweep(sweep: LayerSweep, model: str, *, as_json: bool) -> None:
    if as_json:
        print_json(sweep.to_json())
        return
    console = table_console()
    console.print(table_of(f"Layers of {model}", *sweep_rows(sweep)))
    console.print(agreement_text(sweep), soft_wrap=True)
    for result in sweep.results:
        if result.failure is not None:
            console.print(f"layer {result.layer}: {result.failure}", soft_wrap=True)

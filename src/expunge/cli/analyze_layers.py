"""`expunge analyze layers`: which layer to steer, predicted from one pass or measured by runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from expunge.analysis.layers import LayerChoice
from expunge.cli.console import progress_on_stderr
from expunge.cli.options import take_flag
from expunge.cli.run import parsed
from expunge.disk import deliver
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.base import Method
from expunge.reporting.layers import PAGE, agreement_text, page, prediction_rows, sweep_rows
from expunge.reporting.tables import table_console, table_of
from expunge.search.layer_sweep import LayerInputs, LayerSweep, predict, sweep_layers
from expunge.training.options import TrainingOptions

_ABOUT = (
    "expunge analyze layers MODEL --forget F --retain R --output DIR [--nonmembers N] [--mmlu DIR]"
    " [--layers 2 3 4 | --every K]\n"
    "expunge analyze layers MODEL --forget F --retain R --predict-only\n\n"
    "Unlearns at each layer with the same options (those of `expunge run`), measures each result and"
    " writes a table, a figure and layers.json; beside them stands what a pass over a few rows of the"
    " target predicted, which is what `--method.layer auto` goes by. --predict-only prints the"
    " prediction alone and takes seconds. --resume goes on with a sweep that was cut off. --json prints"
    " JSON. --quiet shows no progress."
)


def main(arguments: Sequence[str]) -> int:
    """Parses, predicts or sweeps, prints."""
    arguments, quiet = take_flag(list(arguments), "--quiet")
    arguments, as_json = take_flag(arguments, "--json")
    settings, preset = parsed(
        arguments, "expunge analyze layers", LayerInputs, _ABOUT, default=AdaptiveRMU.name
    )
    inputs = cast("LayerInputs", settings.inputs)
    method = cast("Method", settings.settings)
    options = cast("TrainingOptions", settings.training)
    if inputs.predict_only:
        with progress_on_stderr(quiet=quiet) as progress:
            choice = predict(inputs, method, options, progress)
        _show_prediction(choice, as_json=as_json)
        return 0
    with progress_on_stderr(quiet=quiet) as progress:
        sweep = sweep_layers(inputs, method, options, progress, preset)
        deliver({Path(inputs.output) / PAGE: page(sweep)})
        progress.message(f"figure: {Path(inputs.output) / PAGE}")
    _show_sweep(sweep, inputs.model, as_json=as_json)
    return 0


def _show_prediction(choice: LayerChoice, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(choice.to_json(), indent=2) + "\n")
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
        sys.stdout.write(json.dumps(sweep.to_json(), indent=2) + "\n")
        return
    console = table_console()
    console.print(table_of(f"Layers of {model}", *sweep_rows(sweep)))
    console.print(agreement_text(sweep), soft_wrap=True)
    for result in sweep.results:
        if result.failure is not None:
            console.print(f"layer {result.layer}: {result.failure}", soft_wrap=True)

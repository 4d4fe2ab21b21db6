"""`expunge analyze layers`: which layer to steer, read from a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from expunge.analysis.layers import LayerChoice
from expunge.cli.console import progress_on_stderr
from expunge.cli.options import Printed, print_json
from expunge.cli.run import parsed
from expunge.errors import InputError
from expunge.methods.adaptive_rmu import AdaptiveRMU
from expunge.methods.base import Method
from expunge.methods.steering import SteeringSettings
from expunge.models.devices import resolve_device
from expunge.models.kernels import autocast_of
from expunge.models.loading import resolve_dtype
from expunge.processes import check_alone, processes_of
from expunge.reporting.tables import number, table_console, table_of
from expunge.runs.opening import open_parts
from expunge.runs.run import RunInputs, check_run
from expunge.search.space import replaced
from expunge.training.form import resolved_form
from expunge.training.layer_choice import read_layers
from expunge.training.options import TrainingOptions
from expunge.training.progress import Progress

_ABOUT = """
expunge analyze layers MODEL --forget F --retain R

Scores each layer that adaptive-rmu or rmu can steer, by one pass over a few rows of the target.
`--method.layer auto` chooses by it. To measure layers, sweep over them.

Examples:
  expunge analyze layers model --forget f.jsonl --retain r.jsonl
  expunge sweep model --forget f.jsonl --retain r.jsonl --output layers --method adaptive-rmu
      --sampler grid --search method.layer=int:2:7
"""


@dataclass(frozen=True)
class Layers(Printed, RunInputs):
    """Those of a run that writes nothing, and what is printed."""

    output: Annotated[str, tyro.conf.Suppress] = ""
    overwrite: Annotated[bool, tyro.conf.Suppress] = False
    resume: Annotated[bool, tyro.conf.Suppress] = False


def main(arguments: Sequence[str]) -> int:
    """Parses, reads the layers, prints."""
    settings, _ = parsed(arguments, "expunge analyze layers", Layers, _ABOUT, default=AdaptiveRMU.name)
    inputs = settings.inputs
    with progress_on_stderr() as progress:
        choice = predict(inputs, settings.settings, settings.training, progress)
    if inputs.json:
        print_json(choice.to_json())
    else:
        _show(choice)
    return 0


def predict(
    inputs: RunInputs, method: Method, options: TrainingOptions, progress: Progress
) -> LayerChoice:
    """Reads the target's layers. Raises InputError before a model is loaded."""
    if not isinstance(method, SteeringSettings):
        raise InputError(f"--method {method.name}: steers no layer; choose adaptive-rmu or rmu")
    device = resolve_device(inputs.device)
    check_alone("analyze layers")
    method = replaced(method, {"layer": "auto"})
    checked, _, prepared = check_run(inputs, method, options, writes=False)
    dtype = resolve_dtype(checked, inputs.dtype)
    parts = open_parts(checked, dtype, prepared, device, processes_of(device))
    autocast = autocast_of(parts.device, parts.model.dtype)
    prepared = resolved_form(prepared, checked.layout, parts, checked.tokenizer, autocast, progress)
    return read_layers(prepared, checked.layout, parts, autocast, progress)


def _show(choice: LayerChoice) -> None:
    console = table_console()
    if choice.readings:
        shares = ("score", "decodable", "restored", "separate")
        rows = [
            [
                f"{reading.layer}{' *' * (reading.layer == choice.layer)}",
                *(number(getattr(reading, share)) for share in shares),
            ]
            for reading in choice.readings
        ]
        console.print(table_of("Predicted", ["layer", *shares], rows))
    said = []
    if choice.clean is not None and choice.corrupted is not None:
        said.append(
            f"{choice.rows['forget']} forget and {choice.rows['retain']} retain rows; mean"
            f" log-probability of their answers {choice.clean:.2f}, after another prompt"
            f" {choice.corrupted:.2f}"
        )
    said.append(f"--method.layer auto: {choice.layer} ({choice.why})")
    if choice.warning is not None:
        said.append(f"warning: {choice.warning}")
    for line in said:
        console.print(line, soft_wrap=True)

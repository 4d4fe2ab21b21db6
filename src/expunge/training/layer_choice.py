"""`--method.layer auto` becomes a number: once, before anything is built for the layer."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from expunge.analysis.layers import LayerChoice, choose_layer
from expunge.disk import write_whole
from expunge.methods.steering import (
    TRAINED_LAYERS,
    SteeringSettings,
    candidate_layers,
    usual_layer,
)
from expunge.models.decoder import DecoderLayout
from expunge.models.kernels import fast_products
from expunge.models.parts import Parts
from expunge.processes import OneProcess, Processes
from expunge.segments.engine import Autocast
from expunge.training.preparation import Prepared
from expunge.training.progress import Progress


def is_open(prepared: Prepared) -> bool:
    """Whether the method's layer is yet to be chosen."""
    method = prepared.method
    return isinstance(method, SteeringSettings) and method.layer == "auto"


def with_layer(prepared: Prepared, layer: int) -> Prepared:
    """The same run at a layer."""
    assert isinstance(prepared.method, SteeringSettings)
    return dataclasses.replace(prepared, method=dataclasses.replace(prepared.method, layer=layer))


def extreme_layers(layout: DecoderLayout) -> Sequence[int]:
    """The deepest and the shallowest layer that `auto` can choose."""
    candidates = candidate_layers(layout)
    return list(dict.fromkeys((candidates[-1], candidates[0])))


def resolved_layer(
    prepared: Prepared,
    layout: DecoderLayout,
    parts: Parts,
    autocast: Autocast,
    progress: Progress,
    *,
    processes: Processes | None = None,
    record: Path | None = None,
) -> Prepared:
    """The run with its layer chosen, where that was left open; otherwise the run as it is.

    A choice that `record` holds is taken, so that a continued run stays with its layer; a new one is
    written there. Several processes all read the rows, and go on with what the main one found.
    """
    if not is_open(prepared):
        return prepared
    processes = processes or OneProcess()
    started = time.monotonic()
    choice = _recorded(record)
    # What one finds on disk all must, or some would wait for the others' passes.
    recorded = processes.gather(None if choice is None else choice.to_json())[0]
    if recorded is None:
        choice = read_layers(prepared, layout, parts, autocast, progress)
        found = processes.gather(choice.to_json())[0]
        if record is not None and processes.is_main:
            write_whole(record, json.dumps(choice.to_json(), indent=2) + "\n")
    else:
        found = recorded
    choice = LayerChoice.from_json(found)
    taken = "as before" if recorded is not None else f"{time.monotonic() - started:.1f} s"
    progress.message(f"layer {choice.layer} of 0 to {layout.count - 1}: {choice.why} ({taken})")
    warnings = [] if choice.warning is None else [choice.warning]
    return dataclasses.replace(
        with_layer(prepared, choice.layer),
        layer_choice=choice,
        warnings=[*prepared.warnings, *warnings],
    )


def read_layers(
    prepared: Prepared,
    layout: DecoderLayout,
    parts: Parts,
    autocast: Autocast,
    progress: Progress,
) -> LayerChoice:
    """Reads a sample of the run's rows, and says which layer to steer and why."""
    with fast_products(parts.model.dtype, parts.device):
        return choose_layer(
            parts,
            layout,
            prepared.forget,
            prepared.retain,
            TRAINED_LAYERS,
            usual_layer(layout),
            seed=prepared.options.seed,
            autocast=autocast,
            progress=progress.phase,
        )


def _recorded(record: Path | None) -> LayerChoice | None:
    if record is None or not record.is_file():
        return None
    return LayerChoice.from_json(json.loads(record.read_text(encoding="utf-8")))

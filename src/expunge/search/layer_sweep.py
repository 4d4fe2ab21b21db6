"""One run at every layer, a scorecard each: what the best layer is, and how well it was predicted.

    OUTPUT/
      layers.json   settings, the prediction, and every layer's scores as they come
      layer-04/     the run at layer 4: its record, metrics and scores, and the model while it is kept

Runs go from the lowest layer up. Below its segment a run's states are those of the run before it, a few
layers on, so that the layers below all segments run once for the whole sweep.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from expunge.analysis.layer_scores import rank_correlation
from expunge.analysis.layers import LayerChoice
from expunge.data.fingerprints import handed_out
from expunge.data.rows import RowSet
from expunge.disk import (
    check_writable,
    check_written,
    held,
    own,
    remove,
    write_whole,
)
from expunge.errors import InputError, Interrupted, RunError
from expunge.evaluation.measuring import check_measure, measure
from expunge.evaluation.score_files import SCORES
from expunge.methods.base import Method
from expunge.methods.steering import SteeringSettings, candidate_layers
from expunge.models.decoder import DecoderLayout
from expunge.models.loading import CheckedModel, resolve_device, resolve_dtype
from expunge.models.prefix import Prefix
from expunge.processes import check_alone, processes_of
from expunge.search.inputs import Scoring, provenance
from expunge.search.space import replaced
from expunge.training.form import resolved_form
from expunge.training.layer_choice import read_layers
from expunge.training.manifest import finite, settings_of
from expunge.training.opening import open_parts
from expunge.training.options import TrainingOptions
from expunge.training.preparation import Prepared
from expunge.training.progress import Progress, Silent
from expunge.training.run import DIRECTIONS, RunInputs, check_run, run
from expunge.training.scratch import check_output, differences
from expunge.training.unlearning import autocast_of

LAYERS = "layers.json"
_LOCK, _STATES = ".lock", ".states"
_OF_PREFIX = {"states", "states.json"}
_WRITTEN = (LAYERS, "layers.html", _LOCK, _STATES, "layer-*", ".layer-*", ".expunge-*")
"""Names of what is in a sweep's directory."""
_PARTS = ("task_aggregate", "mia_score", "utility")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_FREE = ("output", "overwrite", "resume", "layers", "every", "keep", "predict_only")
Keep = Literal["best", "all", "none"]


@dataclass(frozen=True)
class LayerInputs(Scoring, RunInputs):
    """What is unlearned at which layers, and what each result is measured by."""

    output: str = ""
    """Directory for layers.json, layers.html and a directory for every layer."""
    layers: tuple[int, ...] = ()
    """Layers to unlearn at; null: all that can be steered."""
    every: int | None = None
    """Every so many layers, from the deepest down."""
    keep: Keep = "best"
    """Which layers' models stay on the disk; scores and records of all do."""
    predict_only: bool = False
    """Print what the prediction says of every layer, and run nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.predict_only and not self.output:
            raise InputError("--output: is needed; name a directory, or give --predict-only")
        if self.layers and self.every is not None:
            raise InputError("--every: excludes --layers; choose one")
        if self.every is not None and self.every < 1:
            raise InputError(f"--every {self.every}: must be 1 or more")


@dataclass(frozen=True)
class LayerResult:
    """One layer's run and what it scored."""

    layer: int
    failure: str | None
    """Why there is no model at this layer."""
    scores: Mapping[str, Any] | None
    """The contents of its scores.json."""
    selection: Mapping[str, Any]
    """Steps, the chosen one, and where it ended."""
    seconds: Mapping[str, float]

    @property
    def parts(self) -> dict[str, float]:
        """The parts of the final score that were measured."""
        scores = self.scores or {}
        return {part: scores[part] for part in _PARTS if scores.get(part) is not None}

    @property
    def value(self) -> float | None:
        """The final score, or the mean of those of its parts that were measured."""
        return statistics.fmean(self.parts.values()) if self.parts else None


@dataclass(frozen=True)
class Agreement:
    """How well the prediction served, over the layers that were run and gave a model."""

    measured_by: str
    layers: int
    rank_correlation: float | None
    """Spearman's, of predicted and measured scores; null where either has no order."""
    best: int | None
    predicted: int | None
    """The layer of highest predicted score among those that were run."""
    loss: float | None
    """By how much the best layer's score is above the predicted one's."""


@dataclass(frozen=True)
class LayerSweep:
    """Everything that layers.json holds."""

    asked: Mapping[str, Any]
    prediction: LayerChoice
    results: tuple[LayerResult, ...]
    complete: bool

    @property
    def agreement(self) -> Agreement:
        """Prediction against measurement."""
        return agreement(self.prediction, self.results)

    def to_json(self) -> dict[str, Any]:
        """Names, ids and numbers only."""
        return {
            "status": "complete" if self.complete else "unfinished",
            "asked": dict(self.asked),
            "prediction": self.prediction.to_json(),
            "layers": [{**asdict(result), "value": result.value} for result in self.results],
            "agreement": asdict(self.agreement),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerSweep:
        """Reads what `to_json` gave."""
        results = [{k: v for k, v in each.items() if k != "value"} for each in values["layers"]]
        return cls(
            asked=values["asked"],
            prediction=LayerChoice.from_json(values["prediction"]),
            results=tuple(LayerResult(**result) for result in results),
            complete=values["status"] == "complete",
        )


def agreement(prediction: LayerChoice, results: Sequence[LayerResult]) -> Agreement:
    """Compares predicted with measured scores; layers without either are left out."""
    predicted = {reading.layer: reading.score for reading in prediction.readings}
    measured = {result.layer: result.value for result in results if result.value is not None}
    scored = {layer: score for layer in measured if (score := predicted.get(layer)) is not None}
    parts = [part for part in _PARTS if any(part in result.parts for result in results)]
    # Of equal values the deeper layer.
    best = max(measured, key=lambda layer: (measured[layer], layer), default=None)
    chosen = max(scored, key=lambda layer: (scored[layer], layer), default=None)
    return Agreement(
        measured_by="final score"
        if len(parts) == len(_PARTS)
        else f"mean of {' and '.join(parts)}"
        if parts
        else "nothing",
        layers=len(scored),
        rank_correlation=rank_correlation(
            list(scored.values()), [measured[layer] for layer in scored]
        ),
        best=best,
        predicted=chosen,
        loss=None if best is None or chosen is None else measured[best] - measured[chosen],
    )


@dataclass(frozen=True)
class _Task:
    """A sweep whose inputs are checked; its method is the one in `prepared`."""

    inputs: LayerInputs
    options: TrainingOptions
    checked: CheckedModel
    sets: Mapping[str, RowSet]
    prepared: Prepared


def predict(
    inputs: LayerInputs, method: Method, options: TrainingOptions, progress: Progress | None = None
) -> LayerChoice:
    """The prediction alone. Raises InputError before a model is loaded."""
    return _prediction(_check(inputs, method, options), progress or Silent())


def sweep_layers(
    inputs: LayerInputs,
    method: Method,
    options: TrainingOptions,
    progress: Progress | None = None,
    preset: str | None = None,
) -> LayerSweep:
    """Unlearns at each layer and measures each result; goes on with an unfinished sweep on request.

    Raises InputError before a model is loaded and anything is written, Interrupted where it was stopped
    and can be continued. A layer at which no checkpoint can be kept is a result, not an error.
    """
    progress = progress or Silent()
    task = _check(inputs, method, options)
    output = Path(inputs.output)
    asked = _asked(task)
    with _held(output):
        found = _found(output, inputs, asked)
        if found is None:
            for path in (*output.glob("layer-*"), *output.glob(".layer-*"), output / _STATES):
                remove(path)
            remove(output / LAYERS)
            found = _written(output, LayerSweep(asked, _prediction(task, progress), (), False))
        own(output / _STATES, lambda made: {p.name for p in made.iterdir()} <= _OF_PREFIX)
        prefix = Prefix(output / _STATES)
        try:
            for layer in chosen_layers(inputs, task.checked.layout):
                done = {result.layer for result in found.results}
                if layer in done:
                    continue
                progress.message(f"layer {layer}: {len(done)} layers are done")
                result = _one_layer(task, layer, prefix, progress, preset)
                results = sorted((*found.results, result), key=lambda r: r.layer)
                found = replace(found, results=tuple(results), complete=False)
                _written(output, found)
                _drop_models(output, found, inputs.keep)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; layers that are done are in {output / LAYERS}: go on with the same"
                " command and --resume",
                130,
            ) from None
        remove(output / _STATES)
        return _written(output, replace(found, complete=True))


def chosen_layers(inputs: LayerInputs, layout: DecoderLayout) -> list[int]:
    """The layers to unlearn at, lowest first. Raises InputError for one that cannot be steered."""
    candidates = candidate_layers(layout)
    for layer in inputs.layers:
        layout.check_layer(layer, candidates[0], "--layers")
    return sorted(set(inputs.layers) or candidates[::-1][:: inputs.every or 1])


def _check(inputs: LayerInputs, method: Method, options: TrainingOptions) -> _Task:
    """Everything that needs no weights."""
    if not isinstance(method, SteeringSettings):
        raise InputError(f"--method {method.name}: steers no layer; choose adaptive-rmu or rmu")
    resolve_device(inputs.device)
    check_alone("analyze layers")
    if not (inputs.measured or inputs.predict_only):
        raise InputError("--retain: is needed to score a layer; give rows that are to stay")
    if inputs.output:
        output = Path(inputs.output)
        if output.is_file():
            raise InputError(f"--output {output}: is a file; choose a directory")
        check_writable(output, inside=True)
        inputs.check_not_in(output, options.influence)
    task = _Task(
        inputs,
        options,
        *check_run(inputs, replaced(method, {"layer": "auto"}), options, writes=False),
    )
    if not inputs.predict_only:
        chosen_layers(inputs, task.checked.layout)
        check_measure(inputs.measurement(options))
    return task


def _found(output: Path, inputs: LayerInputs, asked: Mapping[str, Any]) -> LayerSweep | None:
    """What an earlier call left, where it is to be continued."""
    path = output / LAYERS
    if all(entry.name == _LOCK for entry in output.iterdir()):
        return None
    if not path.is_file():
        raise InputError(
            f"--output {output}: is there and holds no {LAYERS}; choose another directory"
        )
    if not inputs.resume and not inputs.overwrite:
        raise InputError(
            f"--output {output}: holds a sweep; go on with --resume, or discard it with --overwrite"
        )
    if not inputs.resume:
        check_written("--output", output, _WRITTEN)
        for directory in output.glob("layer-*"):
            check_output(directory, overwrite=True)
        return None
    try:
        found = LayerSweep.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{path}: is not what a sweep wrote; discard it with --overwrite"
        ) from None
    for name, old, new in differences(found.asked, json.loads(json.dumps(asked)), ""):
        raise InputError(
            f"--resume: the sweep in {output} had {name} {json.dumps(old)}, this one has"
            f" {json.dumps(new)}; give the same, or discard it with --overwrite and no --resume"
        )
    return found


def _asked(task: _Task) -> dict[str, Any]:
    """What all layers of a sweep have in common."""
    free = {key: value for key, value in asdict(task.inputs).items() if key not in _FREE}
    settings = settings_of(task.prepared.method)
    return {
        "inputs": handed_out(free),
        "method": {key: value for key, value in settings.items() if key != "layer"},
        "training": handed_out(task.prepared.used),
        **provenance(task.inputs, task.sets, task.checked),
    }


def _prediction(task: _Task, progress: Progress) -> LayerChoice:
    """Reads the target's layers, and drops the target again."""
    checked, device = task.checked, resolve_device(task.inputs.device)
    dtype = resolve_dtype(checked, task.inputs.dtype)
    parts = open_parts(checked, dtype, task.prepared, device, processes_of(device))
    autocast = autocast_of(parts.device, parts.model.dtype)
    prepared = resolved_form(
        task.prepared, checked.layout, parts, checked.tokenizer, autocast, progress
    )
    return read_layers(prepared, checked.layout, parts, autocast, progress)


def _one_layer(
    task: _Task, layer: int, prefix: Prefix, progress: Progress, preset: str | None
) -> LayerResult:
    """One run and its scorecard. A run that was cut off goes on."""
    started = time.monotonic()
    directory = Path(task.inputs.output) / _name(layer)
    inputs = task.inputs.into(RunInputs, output=str(directory), overwrite=False, resume=True)
    method = replaced(task.prepared.method, {"layer": layer})
    try:
        manifest = run(inputs, method, task.options, progress, preset, prefix)
    except RunError as error:
        seconds = {"run": time.monotonic() - started, "scoring": 0.0}
        return LayerResult(layer, str(error), None, {}, seconds)
    trained = time.monotonic()
    scored = {"model": str(directory), "output": str(directory / SCORES)}
    card = measure(task.inputs.measurement(task.options, **scored), progress.phase)
    selection = manifest["selection"]
    return LayerResult(
        layer=layer,
        failure=None,
        scores={key: value for key, value in card.to_json().items() if key != "details"},
        selection={
            "steps": manifest["steps"],
            **{key: selection[key] for key in ("chosen_step", "why", "stopped", "judgement")},
        },
        seconds={"run": trained - started, "scoring": time.monotonic() - trained},
    )


def _drop_models(output: Path, found: LayerSweep, keep: Keep) -> None:
    """Removes the weights of layers that are not to stay."""
    best = found.agreement.best
    for result in found.results:
        if keep == "all" or (keep == "best" and result.layer == best):
            continue
        for pattern in _WEIGHTS:
            for path in (output / _name(result.layer)).glob(pattern):
                if path.name != DIRECTIONS:
                    path.unlink()


def _name(layer: int) -> str:
    return f"layer-{layer:02d}"


def _written(output: Path, found: LayerSweep) -> LayerSweep:
    text = json.dumps(finite(found.to_json()), indent=2, allow_nan=False)
    write_whole(output / LAYERS, text + "\n")
    return found


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """The output is this process's alone. Raises InputError where another one is at work on it."""
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    busy = f"--output {output}: another process is at work on it; wait for it or choose another"
    with held(output / _LOCK, busy):
        try:
            yield
        finally:
            remove(output / _LOCK)
            if made and not any(output.iterdir()):
                output.rmdir()

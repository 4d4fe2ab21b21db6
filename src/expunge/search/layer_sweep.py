"""One run at every layer, a scorecard each: what the best layer is, and how well it was predicted.

    OUTPUT/
      layers.json   settings, the prediction, and every layer's scores as they come
      layer-04/     the run at layer 4: its record, metrics and scores, and the model while it is kept

Runs go from the lowest layer up. Below its segment a run's states are those of the run before it, a few
layers on, so that the layers below all segments run once for the whole sweep.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import expunge
from expunge.analysis.layer_scores import rank_correlation
from expunge.analysis.layers import LayerChoice
from expunge.data.fingerprints import data_fingerprint, handed_out
from expunge.data.formats import sha256_of
from expunge.data.rows import RowSet
from expunge.disk import (
    check_not_read,
    check_writable,
    check_written,
    held,
    own,
    remove,
    write_whole,
)
from expunge.errors import InputError, Interrupted, RunError
from expunge.evaluation.measuring import MeasureInputs, check_measure, measure
from expunge.evaluation.score_files import SCORES
from expunge.evaluation.scorecard import Scorecard
from expunge.methods.base import Method
from expunge.methods.steering import SteeringSettings, candidate_layers
from expunge.models.decoder import DecoderLayout
from expunge.models.loading import CheckedModel, resolve_device, resolve_dtype
from expunge.models.prefix import Prefix
from expunge.processes import check_alone, processes_of
from expunge.training.form import resolved_form
from expunge.training.layer_choice import read_layers
from expunge.training.manifest import finite, settings_of
from expunge.training.options import TrainingOptions
from expunge.training.preparation import Prepared
from expunge.training.progress import Progress, Silent
from expunge.training.run import DIRECTIONS, RunInputs, check_run, open_parts, run
from expunge.training.scratch import check_output, differences
from expunge.training.unlearning import autocast_of

LAYERS = "layers.json"
_LOCK = ".lock"
_WRITTEN = (LAYERS, "layers.html", _LOCK, ".states", "layer-*", ".layer-*", ".expunge-*")
"""Names of what is in a sweep's directory."""
_PARTS = ("task_aggregate", "mia_score", "utility")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_FREE = ("output", "overwrite", "resume", "layers", "every", "keep", "predict_only")
Keep = Literal["best", "all", "none"]


@dataclass(frozen=True)
class LayerInputs(RunInputs):
    """What is unlearned at which layers, and what each result is measured by."""

    output: str = ""
    """Directory for layers.json, layers.html and a directory for every layer."""
    layers: tuple[int, ...] = ()
    """Layers to unlearn at; null: all that can be steered."""
    every: int | None = None
    """Every so many layers, from the deepest down."""
    score_nonmembers: str | None = None
    """Other never-seen text for the MIA score; null: that of --nonmembers."""
    mmlu: str | None = None
    """Directory in MMLU's format, for utility."""
    mmlu_shots: int = 0
    """Solved examples from dev/ before each question."""
    evaluation_batch_size: int = 64
    """Rows a batch in the scoring; it changes the speed, never a score."""
    keep: Keep = "best"
    """Which layers' models stay on the disk; scores and records of all do."""
    predict_only: bool = False
    """Print what the prediction says of every layer, and run nothing."""

    def __post_init__(self) -> None:
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
    def value(self) -> float | None:
        """The final score, or the mean of those of its parts that were measured."""
        if self.scores is None:
            return None
        parts = [self.scores[part] for part in _PARTS if self.scores[part] is not None]
        return sum(parts) / len(parts) if parts else None


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
        names = [field.name for field in dataclasses.fields(LayerResult)]
        return cls(
            asked=values["asked"],
            prediction=LayerChoice.from_json(values["prediction"]),
            results=tuple(
                LayerResult(**{name: layer[name] for name in names}) for layer in values["layers"]
            ),
            complete=values["status"] == "complete",
        )


def agreement(prediction: LayerChoice, results: Sequence[LayerResult]) -> Agreement:
    """Compares predicted with measured scores; layers without either are left out."""
    predicted = {reading.layer: reading.score for reading in prediction.readings}
    valued = [(result.layer, result.value) for result in results if result.value is not None]
    scored: list[tuple[int, float, float]] = []
    for layer, value in valued:
        score = predicted.get(layer)
        if score is not None:
            scored.append((layer, score, value))
    names = sorted({part for result in results for part in _measured(result)}, key=_PARTS.index)
    measured_by = "final score" if len(names) == len(_PARTS) else "mean of " + " and ".join(names)
    best = max(valued, key=lambda entry: (entry[1], entry[0]), default=None)
    chosen = max(scored, key=lambda entry: (entry[1], entry[0]), default=None)
    return Agreement(
        measured_by=measured_by if names else "nothing",
        layers=len(scored),
        rank_correlation=rank_correlation(
            [score for _, score, _ in scored], [value for _, _, value in scored]
        ),
        best=None if best is None else best[0],
        predicted=None if chosen is None else chosen[0],
        loss=None if best is None or chosen is None else best[1] - chosen[2],
    )


def _measured(result: LayerResult) -> list[str]:
    if result.scores is None:
        return []
    return [part for part in _PARTS if result.scores[part] is not None]


@dataclass(frozen=True)
class _Task:
    """A sweep whose inputs are checked."""

    inputs: LayerInputs
    method: Method
    options: TrainingOptions
    checked: CheckedModel
    sets: Mapping[str, RowSet]
    prepared: Prepared
    device: str

    @property
    def layout(self) -> DecoderLayout:
        return self.checked.layout


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
    wanted = chosen_layers(inputs, task.layout)
    output = Path(inputs.output)
    asked = _asked(task)
    with _held(output):
        found = _found(output, inputs, asked)
        if found is None:
            _clear(output)
            found = LayerSweep(asked, _prediction(task, progress), (), complete=False)
            _write(output, found)
        try:
            found = _all_layers(task, wanted, found, output, progress, preset)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; layers that are done are in {output / LAYERS}: go on with the same"
                " command and --resume",
                130,
            ) from None
        shutil.rmtree(_prefix_directory(output), ignore_errors=True)
    return found


def chosen_layers(inputs: LayerInputs, layout: DecoderLayout) -> list[int]:
    """The layers to unlearn at, lowest first. Raises InputError for one that cannot be steered."""
    candidates = candidate_layers(layout)
    for layer in inputs.layers:
        layout.check_layer(layer, candidates[0], "--layers")
    if inputs.layers:
        return sorted(set(inputs.layers))
    return sorted(candidates[::-1][:: inputs.every or 1])


def _check(inputs: LayerInputs, method: Method, options: TrainingOptions) -> _Task:
    """Everything that needs no weights."""
    if not isinstance(method, SteeringSettings):
        raise InputError(f"--method {method.name}: steers no layer; choose adaptive-rmu or rmu")
    device = resolve_device(inputs.device)
    check_alone("analyze layers")
    texts = (inputs.retain, inputs.nonmembers, inputs.score_nonmembers, inputs.mmlu)
    if texts == (None,) * len(texts) and not inputs.predict_only:
        raise InputError("--retain: is needed to score a layer; give rows that are to stay")
    method = dataclasses.replace(method, layer="auto")
    if inputs.output:
        output = Path(inputs.output)
        if output.is_file():
            raise InputError(f"--output {output}: is a file; choose a directory")
        check_writable(output, inside=True)
        names = ("model", "forget", "retain", "nonmembers", "score_nonmembers", "mmlu")
        read = {name: getattr(inputs, name) for name in names}
        check_not_read("--output", output, {**read, "influence": options.influence})
    checked, sets, prepared = check_run(inputs, method, options, writes=False)
    task = _Task(inputs, method, options, checked, sets, prepared, device)
    if not inputs.predict_only:
        chosen_layers(inputs, checked.layout)
        check_measure(_measurement(task, inputs.model, None))
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
    if not inputs.resume:
        if inputs.overwrite:
            check_written("--output", output, _WRITTEN)
            for directory in output.glob("layer-*"):
                check_output(directory, overwrite=True)
            return None
        raise InputError(
            f"--output {output}: holds a sweep; go on with --resume, or discard it with --overwrite"
        )
    try:
        found = LayerSweep.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{path}: is not what a sweep wrote; discard it with --overwrite"
        ) from None
    now = json.loads(json.dumps(asked))
    for name, old, new in differences(found.asked, now, ""):
        raise InputError(
            f"--resume: the sweep in {output} had {name} {json.dumps(old)}, this one has"
            f" {json.dumps(new)}; give the same, or discard it with --overwrite and no --resume"
        )
    return found


def _asked(task: _Task) -> dict[str, Any]:
    """What all layers of a sweep have in common. Files are compared by their SHA-256."""
    free = {key: value for key, value in asdict(task.inputs).items() if key not in _FREE}
    settings = {key: value for key, value in settings_of(task.method).items() if key != "layer"}
    questions = {}
    if task.inputs.mmlu is not None:
        root = Path(task.inputs.mmlu)
        questions = {
            str(path.relative_to(root)): sha256_of(path) for path in sorted(root.glob("*/*.csv"))
        }
    sets = {name: data_fingerprint(rows) for name, rows in task.sets.items()}
    return {
        "expunge": expunge.__version__,
        "inputs": handed_out(free),
        "method": settings,
        "training": handed_out(task.prepared.used),
        "data_hmac_sha256": sets,
        "mmlu_sha256": questions,
        "model_sha256": dict(task.checked.files.sha256()),
    }


def _prediction(task: _Task, progress: Progress) -> LayerChoice:
    """Reads the target's layers, and drops the target again."""
    checked, dtype = task.checked, resolve_dtype(task.checked, task.inputs.dtype)
    parts = open_parts(checked, dtype, task.prepared, task.device, processes_of(task.device))
    autocast = autocast_of(parts.device, parts.model.dtype)
    prepared = resolved_form(
        task.prepared, checked.layout, parts, checked.tokenizer, autocast, progress
    )
    return read_layers(prepared, checked.layout, parts, autocast, progress)


def _all_layers(
    task: _Task,
    wanted: Sequence[int],
    found: LayerSweep,
    output: Path,
    progress: Progress,
    preset: str | None,
) -> LayerSweep:
    prefix_directory = _prefix_directory(output)
    own(
        prefix_directory, lambda made: {p.name for p in made.iterdir()} <= {"states", "states.json"}
    )
    prefix = Prefix(prefix_directory)
    for layer in wanted:
        done = {result.layer for result in found.results}
        if layer not in done:
            progress.message(f"layer {layer}: {len(done)} layers are done")
            result = _one_layer(task, layer, output / _name(layer), prefix, progress, preset)
            results = sorted((*found.results, result), key=lambda r: r.layer)
            found = dataclasses.replace(found, results=tuple(results), complete=False)
            _write(output, found)
            _drop_models(output, found, task.inputs.keep)
    found = dataclasses.replace(found, complete=True)
    _write(output, found)
    return found


def _one_layer(
    task: _Task,
    layer: int,
    directory: Path,
    prefix: Prefix,
    progress: Progress,
    preset: str | None,
) -> LayerResult:
    """One run and its scorecard. A run that was cut off goes on."""
    started = time.monotonic()
    names = [field.name for field in dataclasses.fields(RunInputs)]
    inputs = RunInputs(
        **{name: getattr(task.inputs, name) for name in names if name not in _FREE},
        output=str(directory),
        resume=True,
    )
    steering: Any = task.method
    method: Method = dataclasses.replace(steering, layer=layer)
    try:
        manifest = run(inputs, method, task.options, progress, preset, prefix)
    except RunError as error:
        return LayerResult(
            layer, str(error), None, {}, {"run": time.monotonic() - started, "scoring": 0.0}
        )
    trained = time.monotonic()
    card = measure(_measurement(task, str(directory), directory / SCORES), progress.phase)
    selection = manifest["selection"]
    return LayerResult(
        layer=layer,
        failure=None,
        scores=_scores(card),
        selection={
            "steps": manifest["steps"],
            **{key: selection[key] for key in ("chosen_step", "why", "stopped", "judgement")},
        },
        seconds={"run": trained - started, "scoring": time.monotonic() - trained},
    )


def _scores(card: Scorecard) -> dict[str, Any]:
    return {key: value for key, value in card.to_json().items() if key != "details"}


def _measurement(task: _Task, model: str, scores: Path | None) -> MeasureInputs:
    inputs = task.inputs
    return MeasureInputs(
        model=model,
        forget=inputs.forget,
        retain=inputs.retain,
        nonmembers=inputs.score_nonmembers or inputs.nonmembers,
        columns=inputs.columns,
        joiner=inputs.joiner,
        mmlu=inputs.mmlu,
        mmlu_shots=inputs.mmlu_shots,
        output=None if scores is None else str(scores),
        batch_size=inputs.evaluation_batch_size,
        dtype=inputs.dtype,
        device=inputs.device,
        chat_template=task.options.chat_template,
        long_rows=task.options.long_rows,
        trust_remote_code=inputs.trust_remote_code,
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


def _prefix_directory(output: Path) -> Path:
    return output / ".states"


def _write(output: Path, found: LayerSweep) -> None:
    text = json.dumps(finite(found.to_json()), indent=2, allow_nan=False)
    write_whole(output / LAYERS, text + "\n")


def _clear(output: Path) -> None:
    """Removes what an earlier sweep left."""
    for entry in [*output.glob("layer-*"), *output.glob(".layer-*"), _prefix_directory(output)]:
        remove(entry)
    remove(output / LAYERS)


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

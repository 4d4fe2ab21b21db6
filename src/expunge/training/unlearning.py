"""One unlearning, in memory: rows and a model in, the changed weights and a history out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from expunge.data.fingerprints import handed_out
from expunge.data.rows import Row
from expunge.data.tokenization import Example
from expunge.errors import InputError
from expunge.evaluation.outcomes import Measured, of_run
from expunge.evaluation.sentences import run_sentence
from expunge.methods.base import Context, Finished, Method
from expunge.methods.own_text import written_by
from expunge.models.decoder import DecoderLayout, find_layout
from expunge.models.kernels import autocast_of, fast_products
from expunge.models.parts import Parts, WholeModel
from expunge.processes import OneProcess, Processes
from expunge.segments.cache_layout import CacheLayout, lay_out
from expunge.segments.engine import SegmentEngine
from expunge.segments.packing import NotASegment
from expunge.segments.prefix import Prefix
from expunge.training.form import resolved_form, unknown
from expunge.training.history import History
from expunge.training.layer_choice import resolved_layer
from expunge.training.loop import Keeper, Loop
from expunge.training.options import TrainingOptions, seconds, size_in_bytes
from expunge.training.preparation import Prepared, prepare
from expunge.training.progress import Progress, Silent
from expunge.training.reference import with_base, with_counterfactuals
from expunge.training.state import SavedState
from expunge.training.trackers import tracked
from expunge.training.validation import (
    Reading,
    ValidationSet,
    measure,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Outcome:
    """The result of one unlearning; a model that was given carries it as well."""

    finished: Finished
    history: History
    options: dict[str, Any]
    """What the run used, every default filled in."""
    notes: Mapping[str, Any]
    artifacts: Mapping[str, torch.Tensor]
    warnings: Sequence[str]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Place:
    """Where and how an unlearning runs, beside what it is given to do."""

    started: float
    """time.monotonic() that a time limit counts from."""
    cache_directory: Path | None = None
    """Where hidden states go; None makes a temporary directory."""
    cache_filled: bool = False
    """Whether a complete cache of the same run is there already."""
    cache_done: Callable[[], None] = lambda: None
    """Called when the cache is complete."""
    reserve: float = 0.0
    """Seconds to leave for writing before a time limit."""
    keep_adapter: bool = False
    keeper: Keeper | None = None
    saved: SavedState | None = None
    """What to go on from."""
    tracker_directory: Path | None = None
    prefix: Prefix | None = None
    """Hidden states that runs on the same rows hand to each other."""
    processes: Processes = field(default_factory=OneProcess)


def unlearn_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    forget: Iterable[Row | Mapping[str, object]],
    retain: Iterable[Row | Mapping[str, object]] | None,
    nonmembers: Iterable[Row | Mapping[str, object]] | None = None,
    options: TrainingOptions | None = None,
    *,
    base: PreTrainedModel | None = None,
    progress: Progress | None = None,
    log: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Outcome:
    """Unlearns `forget` from a loaded model, in place.

    The compute dtype is the model's; trained tensors have float32 masters. `base`, the model from before
    the fine-tune, is the reference without `nonmembers`. Raises InputError before the model is touched
    and RunError where no checkpoint can be kept; the model then holds an unusable state.
    """
    started = time.monotonic()
    other = {p.dtype for p in model.parameters()} - {torch.float32, torch.bfloat16}
    if other:
        raise InputError(f"{other.pop()}: load the model in float32 or bfloat16, not quantised")
    layout = find_layout(model)
    prepared = prepare(
        method,
        options or TrainingOptions(),
        model.config,
        layout,
        tokenizer,
        forget,
        retain,
        nonmembers,
        has_base=base is not None,
    )
    if prepared.retrains:
        raise InputError("--method retrain: trains the base, from files; call expunge run")
    engine = whole = None
    parts = WholeModel(model.eval())
    progress = progress or Silent()
    if base is not None:
        prepared = with_base(prepared, base.eval(), layout, progress)
    autocast = autocast_of(parts.device, model.dtype)
    prepared = resolved_form(prepared, layout, parts, tokenizer, autocast, progress)
    prepared = resolved_layer(prepared, layout, parts, autocast, progress)
    try:
        engine = open_engine(prepared, layout, parts)
    except NotASegment as reason:
        whole = str(reason)
    return unlearn_prepared(prepared, layout, parts, engine, whole, Place(started), progress, log)


def open_engine(
    prepared: Prepared,
    layout: DecoderLayout,
    parts: Parts,
    processes: Processes | None = None,
) -> SegmentEngine | None:
    """The segment engine for the method, checked against the whole model.

    None where the method needs the whole model. Raises NotASegment where it cannot be used.
    """
    layers = prepared.method.trained_layers(layout)
    if layers is None:
        return None
    engine = SegmentEngine(
        parts,
        layout,
        *layers,
        autocast_of(parts.device, parts.model.dtype),
        measures=prepared.measures,
        processes=processes,
    )
    engine.check([*prepared.forget, *prepared.retain])
    return engine


def unlearn_prepared(
    prepared: Prepared,
    layout: DecoderLayout,
    parts: Parts,
    engine: SegmentEngine | None,
    why_whole: str | None,
    place: Place,
    progress: Progress,
    log: Callable[[Mapping[str, Any]], None],
) -> Outcome:
    """Unlearns on a model that is in memory as a whole or in parts.

    `why_whole` says why a method that could run its layers alone does not. Raises RunError where no
    checkpoint can be kept, and Stopped where the keeper asks to stop.
    """
    warnings = list(prepared.warnings)
    if why_whole is not None:
        warnings.append(f"the whole model runs in every step: {why_whole}")
    for warning in warnings:
        progress.message(f"warning: {warning}")
    used, model, device = prepared.used, parts.model, parts.device
    notes: dict[str, Any] = {}
    if prepared.layer_choice is not None:
        notes["layer_choice"] = prepared.layer_choice.to_json()
    with ExitStack() as stack:
        stack.enter_context(fast_products(model.dtype, device))
        if engine is not None:
            notes["cache"] = _fill(engine, prepared, layout, parts, place, progress, stack)
        context = Context(
            model=model,
            layout=layout,
            forget=prepared.forget,
            retain=_held(prepared, model, autocast_of(device, model.dtype)),
            pad_id=prepared.pad_id,
            batch_size=used.batch_size,
            seed=prepared.options.seed,
            device=device,
            autocast=autocast_of(device, model.dtype),
            progress=progress.phase,
            engine=engine,
            processes=place.processes,
            sampling=prepared.method.sampling,
            preferred=prepared.preferred,
            resumed=None if place.saved is None else place.saved.facts["notes"],
            measures=prepared.measures,
        )
        if prepared.options.trackers:
            log = stack.enter_context(
                tracked(
                    prepared.options.trackers,
                    handed_out(asdict(used)),
                    place.tracker_directory,
                    log,
                )
            )
        measuring = time.monotonic()
        prepared, told = with_counterfactuals(prepared, context)
        reading = _target_reading(prepared, context, place.saved)
        target = None if reading is None else reading.measured
        told += _unknown(prepared, target, progress)
        for warning in told:
            progress.message(f"warning: {warning}")
        warnings += told
        prepared_at = time.monotonic()
        objective = prepared.method.start(context)
        notes |= objective.notes()
        if reading is not None and reading.never_seen is not None:
            objective.calibrate(reading.never_seen)
        loop = Loop(
            objective,
            context,
            prepared.validation,
            target,
            used,
            None if place.keeper is None else _WithNotes(place.keeper, notes, target),
            progress,
            log,
            deadline=_deadline(prepared, place),
            validation_seconds=prepared_at - measuring,
            learns=prepared.retrains,
        )
        if place.saved is not None:
            loop.resume(place.saved)
            place.processes.wait()  # the main one writes over it
        loop.save()
        begun = time.monotonic()
        history = loop.run()
        guessing = math.log(model.config.get_text_config().vocab_size)
        judged = [] if prepared.retrains else _judged(history, guessing, prepared.validation)
        for warning in judged:
            warnings.append(warning)
            progress.message(f"warning: {warning}")
        artifacts = objective.artifacts()
        finished = objective.finish(keep_adapter=place.keep_adapter)
    return Outcome(
        finished=finished,
        history=history,
        options=prepared.describe() | {"dtype": str(model.dtype).removeprefix("torch.")},
        notes=notes,
        artifacts=artifacts,
        warnings=warnings,
        seconds={
            "prepare": prepared_at - place.started,
            "start": begun - prepared_at,
            "train": time.monotonic() - begun,
        },
    )


def _held(
    prepared: Prepared, model: PreTrainedModel, autocast: Callable[[], AbstractContextManager[Any]]
) -> Sequence[Example]:
    """The retain rows, and behind them random rows, as the target continues them if the method asks."""
    if not prepared.method.sampling.written_ratio:
        return prepared.retain
    listed = [example for example in prepared.retain if example.listed]
    random = [example for example in prepared.retain if not example.listed]
    generator = torch.Generator().manual_seed(prepared.options.seed)
    return [*listed, *written_by(model, random, prepared.forget, listed, generator, autocast)]


class _WithNotes:
    """Adds to every saved state what a resumed start takes from it."""

    def __init__(self, keeper: Keeper, notes: Mapping[str, Any], target: Measured | None) -> None:
        self._keeper, self._notes, self._target = keeper, notes, target

    @property
    def stop_requested(self) -> bool:
        return self._keeper.stop_requested

    def due(self, step: int) -> bool:
        return self._keeper.due(step)

    def save(self, facts: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> None:
        target = None if self._target is None else vars(self._target)
        self._keeper.save({**facts, "notes": self._notes, "target": target}, groups)


def plan_cache(prepared: Prepared, width: int, dtype: torch.dtype) -> CacheLayout:
    """Which rows' hidden states are kept, and how much disk that takes."""
    options = prepared.options
    measured: list[Example] = []
    if prepared.measures:
        measured = [example for side in prepared.validation.sides for example in side]
    return lay_out(
        [*prepared.forget, *prepared.retain],
        measured,
        width,
        dtype if options.cache_dtype is None else getattr(torch, options.cache_dtype),
        None if options.cache_limit is None else size_in_bytes(options.cache_limit),
    )


def _fill(
    engine: SegmentEngine,
    prepared: Prepared,
    layout: DecoderLayout,
    parts: Parts,
    place: Place,
    progress: Progress,
    stack: ExitStack,
) -> dict[str, Any]:
    """Fills the cache of hidden states; returns what the manifest says of it."""
    cache = plan_cache(prepared, layout.width, parts.model.dtype)
    directory = place.cache_directory
    if directory is None:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="expunge-")))
    missing = f"; {cache.missing} rows do not fit and are computed each time" * bool(cache.missing)
    progress.message(
        f"cache of hidden states: {cache.bytes / 2**20:.0f} MiB on disk,"
        f" {len(cache.slots)} rows{missing}"
    )
    engine.fill(cache, directory, progress.phase, filled=place.cache_filled, prefix=place.prefix)
    place.cache_done()
    return {
        "bytes": cache.bytes,
        "rows": len(cache.slots),
        "rows_recomputed": cache.missing,
        "dtype": str(cache.dtype).removeprefix("torch."),
    }


def _target_reading(prepared: Prepared, context: Context, saved: SavedState | None) -> Reading | None:
    """What the target measures; of a resumed run the figures alone, as its calibration is saved."""
    if not prepared.measures:
        return None
    if saved is not None:
        return Reading(Measured(**saved.facts["target"]), None)
    return measure(context, prepared.validation)


def _unknown(prepared: Prepared, target: Measured | None, progress: Progress) -> list[str]:
    if prepared.retrains or target is None or target.forget_known is None:
        return []
    rows = len({example.row_id for example in prepared.validation.forget})
    return unknown(prepared, rows, target.forget_known, target.forget_accuracy, progress)


def _deadline(prepared: Prepared, place: Place) -> float | None:
    limit = prepared.used.time_limit
    return None if limit is None else place.started + seconds(limit) - place.reserve


def _judged(history: History, guessing: float, rows: ValidationSet) -> list[str]:
    """Notes where the run ended and returns a warning where that is not where it should."""
    if history.target is None:
        return ["nothing was measured during the run (--select last); evaluate the result"]
    kept = next((c for c in history.candidates if c.step == history.chosen_step), None)
    if kept is None:
        return []
    against = rows.nonmembers or rows.members  # counterfactuals are as many
    members, others = (len({e.row_id for e in side}) for side in (rows.members, against))
    history.ending = of_run(kept.measured, history.target, guessing, (members, others))
    if history.ending.outcome == "unlearned":
        return []
    return [f"the kept checkpoint is {history.ending.outcome}: {run_sentence(history.ending)}"]

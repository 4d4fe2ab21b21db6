"""One unlearning, in memory: rows and a loaded model in, the changed weights and a history out."""

from __future__ import annotations

import importlib.util
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from expunge.data.rows import Row, RowSet, as_rows, check_disjoint, documents
from expunge.data.tokenization import (
    Example,
    LongRows,
    TextPolicy,
    count_windowed,
    encode_rows,
)
from expunge.errors import InputError
from expunge.methods.base import Context, Finished, Method, Schedule
from expunge.models.decoder import DecoderLayout, find_layout
from expunge.models.loading import context_of, pad_id_of
from expunge.training.loop import History, LoopOptions, Select, train
from expunge.training.progress import Progress, Silent
from expunge.training.validation import ValidationSet, measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_VALIDATION_ROWS = 64
_UNCHANGED = 0.9
_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
Tracker = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True)
class TrainingOptions:
    """Options common to every method; null takes the method's own default or preset."""

    epochs: int | None = None
    """Passes over the forget set."""
    max_steps: int | None = None
    """Stop after this many steps, whatever the epochs say."""
    batch_size: int | None = None
    """Rows a step and side."""
    learning_rate: float | None = None
    """Learning rate; the default is the method's at width 256, scaled by 256 / width."""
    schedule: Schedule | None = None
    """Course of the learning rate over the run: constant, or a cosine down to 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    seed: int = 0
    """Seed of every random draw."""
    time_limit: str | None = None
    """Stop in time for this limit, for example 90s, 20m or 1h; the best checkpoint is kept."""
    validation_fraction: float = 0.05
    """Share of the retain rows that is kept out of training; candidates are measured on these and on
    rows that are trained on. Forget rows are always all unlearned."""
    validate_every: int | None = None
    """Steps between two measured candidates; null: one epoch, but at least ten times a run."""
    select: Select = "best"
    """Keep the best candidate that is not destroyed, or the last state whatever it is."""
    chat_template: bool = False
    """Render rows with the tokenizer's chat template."""
    long_rows: LongRows = "refuse"
    """Refuse rows longer than the model's context, or cut them into overlapping windows."""
    trackers: list[Tracker] = field(default_factory=list)
    """Experiment trackers to log to, through Accelerate."""

    def __post_init__(self) -> None:
        for option in ("epochs", "max_steps", "batch_size", "validate_every"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise InputError(f"--{option.replace('_', '-')} {value}: must be 1 or more")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed}: must be in [0, 2^32)")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(f"--learning-rate {self.learning_rate}: must be positive")
        if not self.max_grad_norm > 0:
            raise InputError(f"--max-grad-norm {self.max_grad_norm}: must be positive")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"--validation-fraction {self.validation_fraction}: must be in [0, 1)")
        if self.time_limit is not None:
            seconds(self.time_limit)
        for tracker in self.trackers:
            if importlib.util.find_spec(_TRACKERS[tracker]) is None:
                raise InputError(
                    f"--trackers {tracker}: not installed; pip install {_TRACKERS[tracker]}"
                )


@dataclass(frozen=True)
class Outcome:
    """The result of one unlearning; the model that was given carries it as well."""

    finished: Finished
    history: History
    options: dict[str, Any]
    """What the run used, every default filled in."""
    notes: Mapping[str, Any]
    artifacts: Mapping[str, torch.Tensor]
    warnings: Sequence[str]
    seconds: Mapping[str, float]


def seconds(limit: str) -> float:
    """Reads a duration such as 90s, 20m, 1.5h or a plain number of seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", limit)
    if match is None or float(match[1]) == 0:
        raise InputError(f"--time-limit {limit}: not a duration; write for example 90s, 20m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def check_rows(
    method: Method, forget: RowSet, retain: RowSet | None, nonmembers: RowSet | None
) -> list[str]:
    """Raises InputError for sets that overlap or are missing; returns warnings."""
    warnings = []
    if retain is not None:
        check_disjoint(forget, retain)
    if nonmembers is not None:
        check_disjoint(forget, nonmembers)
    if retain is None and method.needs_retain:
        raise InputError(
            f"--method {method.name}: needs a retain set, none was given; give --retain with rows"
            " that must stay (text like the forget set's that is not to go), set the method's"
            " retain weight to 0 where it has one, or choose gradient-ascent"
        )
    if retain is None:
        warnings.append(
            "no retain set: nothing holds what must stay, and a destroyed model cannot be noticed."
            " Give --retain with rows like the forget set's that are to stay"
        )
    return warnings


def unlearn_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    forget: Iterable[Row | Mapping[str, object]],
    retain: Iterable[Row | Mapping[str, object]] | None,
    nonmembers: Iterable[Row | Mapping[str, object]] | None = None,
    options: TrainingOptions | None = None,
    *,
    layout: DecoderLayout | None = None,
    keep_adapter: bool = False,
    started: float | None = None,
    reserve: float = 0.0,
    tracker_directory: Path | None = None,
    progress: Progress | None = None,
    log: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> Outcome:
    """Unlearns `forget` from `model`, in place.

    The compute dtype is the model's; trained tensors have float32 masters. `started` is the
    time.monotonic() that a time limit counts from, `reserve` the seconds to leave for writing.
    Raises InputError before the model is touched and RunError where no checkpoint can be kept; the
    model then holds an unusable state.
    """
    options = options or TrainingOptions()
    progress = progress or Silent()
    if model.dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"{model.dtype}: load the model in float32 or bfloat16")
    started = time.monotonic() if started is None else started
    layout = layout or find_layout(model)
    method.check(layout)
    forget_rows = as_rows(forget, "forget")
    retain_rows = None if retain is None else as_rows(retain, "retain")
    nonmember_rows = None if nonmembers is None else as_rows(nonmembers, "nonmembers")
    warnings = check_rows(method, forget_rows, retain_rows, nonmember_rows)
    policy = TextPolicy(context_of(model.config), options.chat_template, options.long_rows)
    forget_examples = encode_rows(forget_rows, tokenizer, policy, eos=False)
    retain_examples = encode_rows(retain_rows or [], tokenizer, policy, eos=True)
    warnings += _window_warnings(policy, forget_examples, retain_examples)
    for warning in warnings:
        progress.message(f"warning: {warning}")

    used = resolved(method, options, model.config.hidden_size, len(forget_examples))
    kept_out, trained_on = _split(retain_examples, options.validation_fraction, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    validation = ValidationSet(
        _sample(forget_examples, generator),
        _validation_retain(kept_out, trained_on, generator),
        encode_rows(documents(forget_rows), tokenizer, policy, eos=False) if nonmembers else (),
        encode_rows(documents(nonmember_rows), tokenizer, policy, eos=False)
        if nonmember_rows
        else (),
    )
    device = next(model.parameters()).device
    context = Context(
        model=model,
        layout=layout,
        forget=forget_examples,
        retain=trained_on,
        pad_id=pad_id_of(tokenizer),
        batch_size=used["batch_size"],
        learning_rate=used["learning_rate"],
        seed=options.seed,
        device=device,
        autocast=_autocast(device, model.dtype),
        progress=progress.phase,
    )
    accelerator = _accelerator(options, device, tracker_directory)
    model.eval()
    measuring = time.monotonic()
    target = measure(context, validation)
    prepared = time.monotonic()
    objective = method.start(context)
    notes = objective.notes()
    begun = time.monotonic()
    limit = None
    if used["time_limit"] is not None:
        limit = started + seconds(used["time_limit"]) - reserve
    loop = LoopOptions(
        steps=used["steps"],
        steps_per_epoch=used["steps_per_epoch"],
        learning_rate=used["learning_rate"],
        schedule=used["schedule"],
        max_grad_norm=options.max_grad_norm,
        validate_every=used["validate_every"],
        select=options.select,
        deadline=limit,
        validation_seconds=prepared - measuring,
    )
    if options.trackers:
        accelerator.init_trackers("expunge", config=_flat(used))
        log = _tee(log, accelerator)
    with _seeded(context.generator("dropout").initial_seed(), device):
        history = train(objective, context, validation, target, loop, accelerator, progress, log)
    for warning in _outcome_warnings(history):
        warnings.append(warning)
        progress.message(f"warning: {warning}")
    artifacts = objective.artifacts()
    finished = objective.finish(keep_adapter=keep_adapter)
    accelerator.end_training()
    ended = time.monotonic()
    return Outcome(
        finished=finished,
        history=history,
        options=used
        | {
            "text": policy.describe(tokenizer),
            "dtype": str(model.dtype).removeprefix("torch."),
            "validation_rows": {
                "forget": len(validation.forget),
                "retain": len(validation.retain),
                "retain_kept_out": bool(kept_out),
                "nonmembers": len(validation.nonmembers),
            },
        },
        notes=notes,
        artifacts=artifacts,
        warnings=warnings,
        seconds={
            "prepare": prepared - started,
            "start": begun - prepared,
            "train": ended - begun,
        },
    )


def _outcome_warnings(history: History) -> list[str]:
    """Says where the kept checkpoint is unchanged or destroyed."""
    kept = next((c for c in history.candidates if c.step == history.chosen_step), None)
    if kept is None:
        return []
    if kept.destroyed:
        return ["the kept checkpoint is destroyed: too little is left of the retain set"]
    if kept.measured.forget_accuracy > _UNCHANGED * history.target.forget_accuracy:
        return [
            f"the kept checkpoint is nearly unchanged: forget accuracy"
            f" {kept.measured.forget_accuracy:.2f}, the target {history.target.forget_accuracy:.2f};"
            " raise --epochs or --learning-rate"
        ]
    return []


def resolved(
    method: Method, options: TrainingOptions, width: int, forget_examples: int
) -> dict[str, Any]:
    """Every option of the loop with the method's defaults filled in."""
    defaults = method.defaults
    batch_size = options.batch_size or defaults.batch_size
    per_epoch = math.ceil(forget_examples / batch_size)
    steps = (options.epochs or defaults.epochs) * per_epoch
    if options.max_steps is not None:
        steps = min(steps, options.max_steps)
    return {
        "epochs": options.epochs or defaults.epochs,
        "max_steps": options.max_steps,
        "steps": steps,
        "steps_per_epoch": per_epoch,
        "batch_size": batch_size,
        "learning_rate": options.learning_rate or defaults.learning_rate_at(width),
        "schedule": options.schedule or defaults.schedule,
        "max_grad_norm": options.max_grad_norm,
        "seed": options.seed,
        "time_limit": options.time_limit,
        "validation_fraction": options.validation_fraction,
        "validate_every": options.validate_every or max(1, min(per_epoch, math.ceil(steps / 10))),
        "select": options.select,
    }


def _split(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Whole rows kept out of training, and the rest; at least one row stays on each side."""
    ids = sorted({example.row_id for example in examples})
    count = min(round(fraction * len(ids)), len(ids) - 1)
    if fraction > 0 and len(ids) > 1:
        count = max(1, count)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {ids[index] for index in order[: max(0, count)]}
    return (
        [example for example in examples if example.row_id in chosen],
        [example for example in examples if example.row_id not in chosen],
    )


def _validation_retain(
    kept_out: Sequence[Example], trained_on: Sequence[Example], generator: torch.Generator
) -> list[Example]:
    """Kept-out rows first, at most half; the rest are trained on, which most of the set is."""
    unseen = _sample(kept_out, generator)[: _VALIDATION_ROWS // 2]
    return unseen + _sample(trained_on, generator)[: _VALIDATION_ROWS - len(unseen)]


def _sample(examples: Sequence[Example], generator: torch.Generator) -> list[Example]:
    """Up to 64 examples with an answer, evenly drawn."""
    answered = [example for example in examples if any(example.answer_mask[1:])]
    order = torch.randperm(len(answered), generator=generator).tolist()
    return [answered[index] for index in sorted(order[:_VALIDATION_ROWS])]


def _autocast(
    device: torch.device, dtype: torch.dtype
) -> Callable[[], AbstractContextManager[Any]]:
    """Mixed precision where the frozen weights are not float32: masters are, the products are not."""

    def autocast() -> AbstractContextManager[Any]:
        # Autocast keeps its casts by parameter: with the frozen values swapped in it would go on
        # with those of the trained ones, and the retain term would be 0.
        return torch.autocast(
            device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False
        )

    return autocast


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Adapter dropout draws from the global generators; they are seeded here and put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        yield


def _accelerator(
    options: TrainingOptions, device: torch.device, tracker_directory: Path | None
) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=device.type == "cpu",
        log_with=list(options.trackers) or None,
        project_dir=str(tracker_directory) if options.trackers and tracker_directory else None,
    )
    if accelerator.num_processes > 1:
        raise InputError(
            f"{accelerator.num_processes} processes: this version runs on one;"
            " start expunge without accelerate launch"
        )
    return accelerator


def _tee(
    log: Callable[[Mapping[str, Any]], None], accelerator: Any
) -> Callable[[Mapping[str, Any]], None]:
    def both(entry: Mapping[str, Any]) -> None:
        log(entry)
        numbers = {k: v for k, v in _flat(entry).items() if isinstance(v, int | float)}
        accelerator.log(numbers, step=entry.get("step"))

    return both


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names, with what trackers cannot store written as text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return flat


def _window_warnings(policy: TextPolicy, *sides: Sequence[Example]) -> list[str]:
    windowed = sum(map(count_windowed, sides))
    if not windowed:
        return []
    return [f"{windowed} rows are longer than the context of {policy.context} and were windowed"]

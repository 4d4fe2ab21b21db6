"""What every method's run can be told, and how the method's defaults fill it in."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from expunge.data.chat_templates import Template, template_of
from expunge.data.sampling import steps_an_epoch
from expunge.data.tokenization import LongRows
from expunge.errors import InputError, check_seed
from expunge.methods.base import Method, Schedule
from expunge.methods.retrain import Retrain
from expunge.models.decoder import DecoderLayout

_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
Tracker = Literal["tensorboard", "wandb", "mlflow"]
Select = Literal["best", "last"]
_MOST_RISK = 10.0
_COOLDOWN = 0.4
"""Share of the steps in which a trapezoid falls."""
_COUNTS = ("epochs", "max_steps", "batch_size", "validate_every", "micro_batch_size", "save_every")
CacheDtype = Literal["float32", "bfloat16"]
RetainSampling = Literal["uniform", "influence"]
UnknownRows = Literal["refuse", "unlearn"]


@dataclass(frozen=True)
class TrainingOptions:
    """Options common to every method; null takes the method's own default or preset."""

    epochs: int | None = None
    """Passes over the forget set."""
    max_steps: int | None = None
    """Stop after so many steps, whatever the epochs say."""
    batch_size: int | None = None
    """Rows a step and side."""
    learning_rate: float | None = None
    """Step size. The default falls with the model's width, and for spectral with its depth. For small
    forget sets spectral takes less."""
    schedule: Schedule | None = None
    """Course of the learning rate over the run. Constant, a cosine down to 0, or constant and then down
    to 0 in the last 40% of the steps (trapezoid)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm. It does nothing for spectral and libu, which step inside the
    backward pass."""
    seed: int = 0
    """Seed of every random draw."""
    time_limit: str | None = None
    """Stop in time for this limit: 90s, 20m, 1h. The best checkpoint is kept."""
    validation_fraction: float | None = None
    """Share of the retain rows that is kept out of training, 32 rows at most. Candidates are
    measured on these and on rows that are trained on. Null: 2%, but none if those are fewer than
    16. Forget rows are always all unlearned."""
    validate_every: int | None = None
    """Steps between two measured candidates; null: one epoch, but at least 10 and at most 16 times a
    run, and never with `--select last`. Forget rows are calibrated as often."""
    select: Select = "best"
    """Keep the best candidate, or the last state. The best is one that is not destroyed. For the last
    no candidate is measured. `--method retrain` keeps the last."""
    micro_batch_size: int | None = None
    """Rows a side that run at once; null: all of the batch. It changes memory, not the result."""
    save_every: int | None = None
    """Steps between two saved states; null: as often as costs little of the run's time."""
    cache_limit: str | None = None
    """Most disk for hidden states: 20GB; null: no limit. Rows beyond are computed each time. 0
    caches nothing."""
    cache_dtype: CacheDtype | None = None
    """Dtype of the cached hidden states; null: the one they are computed in."""
    chat_template: Template = "auto"
    """Render rows with the chat template. auto: if the target answers sampled rows better with it.
    A target that a run made is asked as that run recorded."""
    long_rows: LongRows = "refuse"
    """Refuse rows longer than the model's context, or cut them into overlapping windows."""
    unknown_rows: UnknownRows = "refuse"
    """Refuse to unlearn if the target knows none of the forget rows in the form given, or go on.
    Such a run never ends as unlearned. With `--select last` a sample of 32 is read for it."""
    influence: str | None = None
    """An influence.json of `expunge analyze influence` on the same model and rows."""
    retain_sampling: RetainSampling = "uniform"
    """Take every retain row equally often, or those more often that --influence says are at risk."""
    risk_factor: float = 3.0
    """How many times as often the retain rows most at risk are taken, with influence sampling."""
    skip_gone: bool = False
    """Leave out forget rows that --influence says the target does not know any more."""
    trackers: list[Tracker] = field(default_factory=list)
    """Experiment trackers to log to, through Accelerate."""

    def __post_init__(self) -> None:
        for option in _COUNTS:
            value = getattr(self, option)
            if value is not None and value < 1:
                raise InputError(f"--{option} {value}: must be 1 or more")
        check_seed(self.seed)
        object.__setattr__(self, "chat_template", template_of(self.chat_template))
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(f"--learning-rate {self.learning_rate}: must be positive")
        if not self.max_grad_norm > 0:
            raise InputError(f"--max-grad-norm {self.max_grad_norm}: must be positive")
        if self.validation_fraction is not None and not 0 <= self.validation_fraction < 1:
            raise InputError(f"--validation-fraction {self.validation_fraction}: must be in [0, 1)")
        if self.time_limit is not None:
            seconds(self.time_limit)
        if self.cache_limit is not None:
            size_in_bytes(self.cache_limit)
        if not 1 < self.risk_factor <= _MOST_RISK:
            raise InputError(
                f"--risk-factor {self.risk_factor}: must be over 1 and at most {_MOST_RISK:g}"
            )
        for option, asked in (
            ("--retain-sampling influence", self.retain_sampling == "influence"),
            ("--skip-gone", self.skip_gone),
        ):
            if asked and self.influence is None:
                raise InputError(
                    f"{option}: needs --influence FILE; write one with expunge analyze influence"
                )
        if self.influence is not None and self.retain_sampling == "uniform" and not self.skip_gone:
            raise InputError(
                f"--influence {self.influence}: nothing uses it; add --retain-sampling influence or"
                " --skip-gone"
            )
        for tracker in self.trackers:
            if importlib.util.find_spec(_TRACKERS[tracker]) is None:
                raise InputError(
                    f"--trackers {tracker}: not installed; pip install {_TRACKERS[tracker]}"
                )


def seconds(limit: str, option: str = "--time-limit") -> float:
    """Reads a duration such as 90s, 20m, 1.5h or a plain number of seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", limit)
    if match is None or float(match[1]) == 0:
        raise InputError(f"{option} {limit}: not a duration; write for example 90s, 20m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def size_in_bytes(limit: str) -> float:
    """Reads a size such as 500MB, 20G or a plain number of bytes; units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?\s*", limit, re.IGNORECASE)
    if match is None:
        raise InputError(f"--cache-limit {limit}: not a size; write for example 500MB or 20GB")
    return float(match[1]) * _UNITS[match[2].upper()]


@dataclass(frozen=True)
class Resolved:
    """The loop's options with the method's defaults filled in; `TrainingOptions` says what each is."""

    epochs: int
    max_steps: int | None
    steps: int
    steps_per_epoch: int
    batch_size: int
    learning_rate: float
    schedule: Schedule
    max_grad_norm: float
    seed: int
    time_limit: str | None
    validation_fraction: float | None
    validate_every: int | None
    """None: no candidate is measured."""
    select: Select
    unknown_rows: UnknownRows
    micro_batch_size: int | None
    cache_limit: str | None
    cache_dtype: CacheDtype | None
    retain_sampling: RetainSampling
    risk_factor: float | None
    """None where retain rows are taken equally often."""
    skip_gone: bool


def resolved(
    method: Method, options: TrainingOptions, layout: DecoderLayout, forget_examples: int
) -> Resolved:
    """What the loop takes.

    `forget_examples` are those that an epoch takes: to retrain, the retain set's. A recipe ends where it
    ends, so that no candidate of it is chosen.
    """
    defaults = method.defaults
    select = "last" if isinstance(method, Retrain) else options.select
    batch_size = options.batch_size or defaults.batch_size
    per_epoch = steps_an_epoch(forget_examples, batch_size, method.sampling.chunk_size)
    epochs = options.epochs or defaults.epochs_of(per_epoch)
    steps = epochs * per_epoch
    if options.max_steps is not None:
        steps = min(steps, options.max_steps)
    validate_every = options.validate_every
    if validate_every is None and select == "best":
        validate_every = math.ceil(steps / defaults.candidates)
    filled: dict[str, Any] = {
        "epochs": epochs,
        "steps": steps,
        "steps_per_epoch": per_epoch,
        "batch_size": batch_size,
        "learning_rate": options.learning_rate
        or defaults.learning_rate_at(layout.width, layout.count, per_epoch),
        "schedule": options.schedule or defaults.schedule,
        "validate_every": validate_every,
        "select": select,
        "risk_factor": options.risk_factor if options.retain_sampling == "influence" else None,
    }
    names = [field.name for field in fields(Resolved)]
    given: dict[str, Any] = {name: getattr(options, name) for name in names if name not in filled}
    return Resolved(**given, **filled)


def schedule_factor(schedule: Schedule, done: float) -> float:
    """What the learning rate is multiplied by once a share `done` of the steps is taken.

    The trapezoid is constant, then falls to 0 in a line (arXiv 2405.18392): of as many steps more are
    long ones than under a cosine, and the last still end where they aim.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return min(1.0, (1 - done) / _COOLDOWN)

"""The training loop: explicit, on Accelerate, forget and retain terms apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator

from expunge.data.batches import endless
from expunge.errors import RunError
from expunge.methods.base import Context, Objective, Schedule
from expunge.models.weights import restore, snapshot
from expunge.training.progress import Progress
from expunge.training.sophia import Sophia
from expunge.training.validation import Measured, ValidationSet, is_destroyed, measure, score

_DESTROYED_PATIENCE = 5
Select = Literal["best", "last"]


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast to train."""

    steps: int
    steps_per_epoch: int
    learning_rate: float
    schedule: Schedule
    max_grad_norm: float
    validate_every: int
    select: Select
    deadline: float | None
    """time.monotonic() by which the loop must have ended."""
    validation_seconds: float = 0.0
    """What measuring the target took; as much is reserved for the last candidate."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that was measured."""

    step: int
    measured: Measured
    score: float
    destroyed: bool


@dataclass
class History:
    """What happened in the loop."""

    target: Measured
    candidates: list[Candidate] = field(default_factory=list)
    chosen_step: int = 0
    chosen_why: str = ""
    steps: int = 0
    stopped: str = "all steps done"

    def describe(self) -> dict[str, Any]:
        """The manifest's selection history."""
        return {
            "target": asdict(self.target),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "chosen_step": self.chosen_step,
            "why": self.chosen_why,
            "stopped": self.stopped,
        }


def train(
    objective: Objective,
    context: Context,
    validation: ValidationSet,
    target: Measured,
    options: LoopOptions,
    accelerator: Accelerator,
    progress: Progress,
    log: Callable[[Mapping[str, Any]], None],
) -> History:
    """Trains `objective` and leaves its parameters at the chosen checkpoint.

    `target` is what was measured before the objective started. `log` receives one mapping a step
    and one a validation. Raises RunError where no checkpoint can be kept.
    """
    parameters = objective.parameters
    optimizer, scheduler = _optimizer(objective, options, accelerator)
    forget_batches = endless(
        context.forget, context.batch_size, context.pad_id, context.generator("forget order")
    )
    retain_batches = (
        endless(
            context.retain, context.batch_size, context.pad_id, context.generator("retain order")
        )
        if context.retain
        else None
    )
    history = History(target)
    best: dict[str, torch.Tensor] | None = None
    slowest_step, slowest_validation = 0.0, options.validation_seconds
    for step in range(1, options.steps + 1):
        started = time.monotonic()
        reserve = slowest_step + slowest_validation
        if options.deadline is not None and started + reserve >= options.deadline:
            history.stopped = "time limit"
            break
        forget = next(forget_batches).to(context.device)
        retain = next(retain_batches).to(context.device) if retain_batches else None
        _refresh_curvature(optimizer, objective, step, retain)
        objective.set_training(True)
        with context.autocast():
            terms = objective.loss(forget, retain)
        if not math.isfinite(terms.total.item()):
            history.stopped = f"the loss was not finite at step {step}"
            break
        accelerator.backward(terms.total)
        norm = float(accelerator.clip_grad_norm_(list(parameters.values()), options.max_grad_norm))
        if not math.isfinite(norm):
            history.stopped = f"the gradient was not finite at step {step}"
            break
        rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        objective.set_training(False)
        history.steps = step
        seconds = time.monotonic() - started
        slowest_step = max(slowest_step, seconds)
        forget_term = terms.forget.item()
        retain_term = None if terms.retain is None else terms.retain.item()
        progress.step(step, options.steps, forget_term, retain_term)
        log(
            {
                "step": step,
                "epoch": round(step / options.steps_per_epoch, 4),
                "loss": terms.total.item(),
                "forget": forget_term,
                "retain": retain_term,
                "gradient_norm": norm,
                "learning_rate": rate,
                "seconds": round(seconds, 4),
            }
        )
        if step % options.validate_every == 0 or step == options.steps:
            started = time.monotonic()
            if _validate(step, context, validation, history, log):
                best = snapshot(parameters)
            slowest_validation = max(slowest_validation, time.monotonic() - started)
            if _diverged(history):
                history.stopped = (
                    f"diverged: destroyed at {_DESTROYED_PATIENCE} validations in a row"
                )
                break
    objective.set_training(False)
    _choose(objective, context, validation, history, options, best, log)
    return history


def _optimizer(
    objective: Objective, options: LoopOptions, accelerator: Accelerator
) -> tuple[Any, Any]:
    spec = objective.optimizer
    parameters = list(objective.parameters.values())
    settings = {key: value for key, value in spec.options.items() if key != "curvature_interval"}
    optimizer: torch.optim.Optimizer
    if spec.name == "sophia":
        optimizer = Sophia(
            parameters,
            options.learning_rate,
            initial_curvature=objective.initial_curvature(),
            **settings,
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, **settings)

    def factor(step: int) -> float:
        if options.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * step / options.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return accelerator.prepare(optimizer), scheduler


def _refresh_curvature(optimizer: Any, objective: Objective, step: int, retain: Any) -> None:
    interval = objective.optimizer.options.get("curvature_interval")
    if interval is None or retain is None or (step - 1) % interval:
        return
    optimizer.optimizer.update_curvature(objective.curvature(retain))


def _validate(
    step: int,
    context: Context,
    validation: ValidationSet,
    history: History,
    log: Callable[[Mapping[str, Any]], None],
) -> bool:
    """Measures the model at `step`; True where it is the best candidate so far."""
    measured = measure(context, validation)
    guessing = math.log(context.model.config.vocab_size)
    candidate = Candidate(
        step,
        measured,
        score(measured, history.target),
        is_destroyed(measured, history.target, guessing),
    )
    usable = [c.score for c in history.candidates if not c.destroyed]
    history.candidates.append(candidate)
    log({"step": step, "validation": asdict(measured), "score": candidate.score})
    return not candidate.destroyed and candidate.score >= max(usable, default=0.0)


def _diverged(history: History) -> bool:
    recent = history.candidates[-_DESTROYED_PATIENCE:]
    return len(recent) == _DESTROYED_PATIENCE and all(c.destroyed for c in recent)


def _choose(
    objective: Objective,
    context: Context,
    validation: ValidationSet,
    history: History,
    options: LoopOptions,
    best: dict[str, torch.Tensor] | None,
    log: Callable[[Mapping[str, Any]], None],
) -> None:
    """Puts the chosen checkpoint's parameters in place."""
    finite = all(bool(torch.isfinite(p).all()) for p in objective.parameters.values())
    measured_last = bool(history.candidates) and history.candidates[-1].step == history.steps
    if (
        finite
        and history.steps
        and not measured_last
        and _validate(history.steps, context, validation, history, log)
    ):
        best = snapshot(objective.parameters)
    if options.select == "last" and finite and history.steps:
        history.chosen_step, history.chosen_why = history.steps, "the last, as asked for"
        return
    usable = [c for c in history.candidates if not c.destroyed]
    if best is None or not usable:
        worst = history.candidates[-1].measured.retain_accuracy if history.candidates else None
        raise RunError(
            f"no checkpoint can be kept ({history.stopped}; {len(history.candidates)} measured,"
            f" retain accuracy {'unknown' if worst is None else f'{worst:.2f}'} at the last);"
            " lower --learning-rate, validate more often with --validate-every,"
            " or keep the last state as it is with --select last"
        )
    top = max(candidate.score for candidate in usable)
    chosen = [candidate for candidate in usable if candidate.score == top][-1]
    restore(objective.parameters, best)
    history.chosen_step = chosen.step
    history.chosen_why = f"highest score {chosen.score:.4f} of {len(usable)} usable candidates"

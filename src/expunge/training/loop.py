"""The training loop: explicit, on Accelerate, forget and retain terms apart, resumable at any step.

Every random draw of a step is a function of the seed and the step, so that a run that was stopped and
continued gives the bytes of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Protocol

import torch

from expunge.data.batches import Batch
from expunge.data.sampling import step_batches
from expunge.errors import NothingKept
from expunge.evaluation.outcomes import Measured, is_destroyed
from expunge.methods.base import Context, Objective
from expunge.models.kernels import fast_products
from expunge.models.sharding import is_sharded, part_like, whole
from expunge.models.weights import restore, snapshot
from expunge.training.history import Candidate, History
from expunge.training.micro_batches import micro_batches, parts
from expunge.training.optimizers import optimizer_of
from expunge.training.options import Resolved, schedule_factor
from expunge.training.progress import Progress
from expunge.training.sophia import Sophia
from expunge.training.state import SavedState, optimizer_tensors, restore_optimizer
from expunge.training.step_in_backward import StepInBackward
from expunge.training.validation import ValidationSet, measure, score

_DESTROYED_PATIENCE = 5


class Keeper(Protocol):
    """Where the loop's state is kept, and who may ask it to stop."""

    @property
    def stop_requested(self) -> bool:
        """Whether to stop before the next step."""

    def due(self, step: int) -> bool:
        """Whether the state should be saved after this step."""

    def save(self, facts: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> None:
        """Saves it."""


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}")


class Loop:
    """One training: an objective, its optimiser, and what has happened so far."""

    def __init__(
        self,
        objective: Objective,
        context: Context,
        validation: ValidationSet,
        target: Measured | None,
        used: Resolved,
        keeper: Keeper | None,
        progress: Progress,
        log: Callable[[Mapping[str, Any]], None],
        *,
        deadline: float | None = None,
        validation_seconds: float = 0.0,
        learns: bool = False,
    ) -> None:
        """The loop must have ended by `deadline`, of time.monotonic(). Measuring the target took
        `validation_seconds`; as many are reserved for the last candidate. `learns`: the rows of the
        first side are learned, so that its term is the retain term."""
        self._objective, self._context, self._validation = objective, context, validation
        self._used, self._keeper, self._progress, self._log = used, keeper, progress, log
        self._deadline, self._learns = deadline, learns
        self._parameters = objective.parameters
        self._optimizer = optimizer_of(objective, used.learning_rate)
        alone = context.processes.count == 1
        self._in_backward = (
            StepInBackward(self._optimizer, self._parameters.values(), context.device)
            if objective.optimizer.in_backward and alone
            else None
        )
        self._forget, self._retain = step_batches(
            context.forget,
            context.retain,
            context.batch_size,
            context.pad_id,
            context.generator,
            context.sampling,
            used.steps,
            # Packed rows need no company of their own length.
            by_length=context.engine is None,
        )
        self.history = History(target)
        self._best: dict[str, torch.Tensor] | None = None
        self._slowest_step = 0.0
        self._slowest_validation = validation_seconds

    def resume(self, state: SavedState) -> None:
        """Goes on from a saved state."""

        def mine(group: str) -> dict[str, torch.Tensor]:
            return {
                name: part_like(tensor, self._parameters[name])
                for name, tensor in state.under(group).items()
            }

        restore(self._parameters, mine("parameters"))
        restore_optimizer(self._optimizer, state.under("optimizer"))
        self._objective.set_training(False)  # what is measured follows the parameters
        self._best = snapshot(mine("best")) or None
        facts = state.facts
        self.history.steps = facts["step"]
        self._objective.restore(facts["calibration"], dict(state.under("objective")))
        self.history.candidates = [
            Candidate(**{**candidate, "measured": Measured(**candidate["measured"])})
            for candidate in facts["candidates"]
        ]

    def save(self) -> None:
        """Saves the state as it is between two steps."""
        if self._keeper is None:
            return
        self._keeper.save(
            {
                "step": self.history.steps,
                "steps": self._used.steps,
                "calibration": dict(self._objective.calibration),
                "candidates": [asdict(candidate) for candidate in self.history.candidates],
            },
            {
                "parameters": self._parameters,
                "optimizer": optimizer_tensors(self._optimizer),
                "best": self._best or {},
                "objective": dict(self._objective.state_tensors),
            },
        )

    def run(self) -> History:
        """Trains, and leaves the parameters at the chosen checkpoint.

        Raises NothingKept where no checkpoint can be kept, Stopped where the keeper asks to stop.
        """
        try:
            return self._run()
        finally:
            if self._in_backward is not None:
                self._in_backward.close()

    def _run(self) -> History:
        history, used = self.history, self._used
        while history.steps < used.steps and not self._diverged():
            if self._agreed(self._keeper is not None and self._keeper.stop_requested):
                self.save()
                raise Stopped(history.steps, used.steps)
            if self._agreed(self._out_of_time()):
                history.stopped = "time limit"
                break
            step = history.steps + 1
            started = time.monotonic()
            with _seeded(self._context, step):
                failure = self._step(step, started)
            if failure is not None:
                history.stopped = failure
                break
            history.steps = step
            self._slowest_step = max(self._slowest_step, time.monotonic() - started)
            if self._measures_after(step):
                self._validate(step)
            due = self._keeper is not None and self._keeper.due(step)
            if self._context.processes.gather(due)[0]:  # all with the main one: it gathers shards
                self.save()
        if self._diverged():
            history.stopped = f"diverged: destroyed at {_DESTROYED_PATIENCE} validations in a row"
        self.save()
        self._choose()
        return history

    def _agreed(self, wish: bool) -> bool:
        """Whether any process wishes it; what one does all must do, or they wait for each other."""
        return any(self._context.processes.gather(wish))

    def _step(self, step: int, started: float) -> str | None:
        """One update; returns why there was none."""
        rate = self._used.learning_rate * self._factor(step - 1)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self._objective.optimizer.rate_scale
        forget = self._forget.at(step)
        retain = None if self._retain is None else self._retain.at(step)
        self._refresh_curvature(step, retain)
        self._objective.set_training(True)
        loss, forget_term, retain_term = self._backward(forget, retain)
        if self._learns:
            forget_term, retain_term = 0.0, forget_term
        self._objective.set_training(False)
        if not math.isfinite(loss):
            return f"the loss was not finite at step {step}"
        norm = self._moved()
        if not math.isfinite(norm):
            return f"the gradient was not finite at step {step}"
        self._progress.step(step, self._used.steps, forget_term, retain_term)
        self._log(
            {
                "step": step,
                "epoch": round(step / self._used.steps_per_epoch, 4),
                "loss": loss,
                "forget": forget_term,
                "retain": retain_term,
                "gradient_norm": norm,
                "learning_rate": rate,
                "seconds": round(time.monotonic() - started, 4),
            }
        )
        return None

    def _moved(self) -> float:
        """Moves the parameters, unless the backward pass has; the norm of the gradient."""
        if self._in_backward is not None:
            return self._in_backward.norm()
        parameters = list(self._parameters.values())
        # Several processes move after the pass, to where one moves in it, which clips nothing.
        most = math.inf if self._objective.optimizer.in_backward else self._used.max_grad_norm
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, most)))
        if math.isfinite(norm):
            with fast_products(torch.bfloat16, self._context.device):  # Muon's are bfloat16
                self._optimizer.step()
            self._optimizer.zero_grad()
        return norm

    def _backward(self, forget: Batch, retain: Batch | None) -> tuple[float, float, float | None]:
        """Gradients of the step's loss, micro-batch by micro-batch; the loss and its two terms."""
        processes = self._context.processes
        micro = self._micro_batches(forget, retain)
        count = micro * processes.count
        mine = slice(micro * processes.rank, micro * (processes.rank + 1))
        device, objective = self._context.device, self._objective
        forget_total = 0.0
        retain_total: float | None = None
        left = micro
        for (forget_part, share), (retain_part, retain_share) in zip(
            parts(forget, count, objective.forget_size)[mine],
            [(None, 0.0)] * micro
            if retain is None
            else parts(retain, count, objective.retain_size)[mine],
            strict=True,
        ):
            with self._context.autocast():
                terms = objective.loss(
                    forget_part.to(device), None if retain_part is None else retain_part.to(device)
                )
            total = share * terms.forget
            forget_total += share * terms.forget.item()
            if terms.retain is not None:
                total = total + retain_share * terms.retain
                retain_total = (retain_total or 0.0) + retain_share * terms.retain.item()
            left -= 1
            if self._in_backward and not math.isfinite(forget_total + (retain_total or 0.0)):
                break  # nothing may move by it
            with self._in_backward.moving() if left == 0 and self._in_backward else nullcontext():
                total.backward()
        if processes.count > 1:
            sums = torch.tensor([forget_total, retain_total or 0.0], device=device)
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            # Those of sharded weights are the sums already.
            processes.sum([sums, *(g for g in gradients if not is_sharded(g))])
            forget_total, summed = sums.tolist()
            retain_total = None if retain_total is None else summed
        return forget_total + (retain_total or 0.0), forget_total, retain_total

    def _micro_batches(self, forget: Batch, retain: Batch | None) -> int:
        """How many parts the step runs in, by rows where asked for, by tokens in packed passes."""
        sides = [forget.lengths] if retain is None else [forget.lengths, retain.lengths]
        engine = self._context.engine
        whole = micro_batches(
            sides, self._used.micro_batch_size, None if engine is None else engine.pass_tokens
        )
        # So many parts over all processes, so many for this one.
        return -(-whole // self._context.processes.count)

    def _factor(self, done: int) -> float:
        return schedule_factor(self._used.schedule, done / self._used.steps)

    def _refresh_curvature(self, step: int, retain: Batch | None) -> None:
        interval = self._objective.optimizer.curvature_interval
        if interval is None or retain is None or (step - 1) % interval:
            return
        assert isinstance(self._optimizer, Sophia)
        self._optimizer.update_curvature(self._objective.curvature(retain.to(self._context.device)))

    def _out_of_time(self) -> bool:
        deadline = self._deadline
        if deadline is None:
            return False
        reserve = self._slowest_step
        if self._used.validate_every is not None:
            reserve += self._slowest_validation
        return time.monotonic() + reserve >= deadline

    def _measures_after(self, step: int) -> bool:
        every = self._used.validate_every
        return every is not None and (step % every == 0 or step == self._used.steps)

    def _validate(self, step: int) -> None:
        """Measures the model at `step` and keeps it where it is the best candidate so far."""
        started = time.monotonic()
        target = self.history.target
        assert target is not None
        reading = measure(self._context, self._validation)
        measured = reading.measured
        guessing = math.log(self._context.model.config.get_text_config().vocab_size)
        candidate = Candidate(
            step, measured, score(measured, target), is_destroyed(measured, target, guessing)
        )
        usable = [c.score for c in self.history.candidates if not c.destroyed]
        self.history.candidates.append(candidate)
        self._progress.message(candidate.said)
        self._log(
            {
                "step": step,
                "validation": asdict(measured),
                "score": candidate.score,
                "destroyed": candidate.destroyed,
            }
        )
        if not candidate.destroyed and candidate.score >= max(usable, default=0.0):
            self._best = snapshot(self._parameters)
        if reading.never_seen is not None:
            self._objective.calibrate(reading.never_seen)
        self._slowest_validation = max(self._slowest_validation, time.monotonic() - started)

    def _diverged(self) -> bool:
        recent = self.history.candidates[-_DESTROYED_PATIENCE:]
        return len(recent) == _DESTROYED_PATIENCE and all(c.destroyed for c in recent)

    def _choose(self) -> None:
        """Puts the chosen checkpoint's parameters in place."""
        history = self.history
        finite = all(math.isfinite(whole(p.detach().sum())) for p in self._parameters.values())
        measured_last = bool(history.candidates) and history.candidates[-1].step == history.steps
        if finite and history.steps and not measured_last and self._used.validate_every is not None:
            self._validate(history.steps)
        if self._used.select == "last" and finite and history.steps:
            history.chosen_step, history.chosen_why = history.steps, "the last, as asked for"
            return
        usable = [c for c in history.candidates if not c.destroyed]
        if self._best is None or not usable:
            raise NothingKept(history.nothing_usable)
        top = max(candidate.score for candidate in usable)
        chosen = [candidate for candidate in usable if candidate.score == top][-1]
        restore(self._parameters, self._best)
        history.chosen_step = chosen.step
        history.chosen_why = f"highest score {chosen.score:.4f} of {len(usable)} usable candidates"


@contextmanager
def _seeded(context: Context, step: int) -> Iterator[None]:
    """Dropout and sampled labels draw from the global generators, seeded anew for every step."""
    devices = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(context.seed_of(f"step {step}"))
        yield

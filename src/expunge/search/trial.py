"""One trial: a real run with some settings, in memory, and the scorecard of its result.

One model is in memory at a time: the run's is dropped before the target's files are read again with the
changed tensors put over their own. Each is rounded to the dtype that the files hold it in, so that the
scores are those of the checkpoint that `expunge run` would write.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from expunge.analysis.template_choice import said_of, settled
from expunge.evaluation.outcomes import of_scores
from expunge.evaluation.scorecard import Scorecard, evaluate_model
from expunge.evaluation.sentences import scores_sentence
from expunge.methods.base import Method
from expunge.models.loading import CheckedModel, load_model
from expunge.models.parts import give_back_freed_memory
from expunge.runs.opening import open_run
from expunge.search.inputs import Task
from expunge.segments.prefix import Prefix
from expunge.training.options import TrainingOptions
from expunge.training.preparation import prepare_encoded
from expunge.training.progress import Progress, Silent
from expunge.training.stopping import StopRequest
from expunge.training.unlearning import Place, unlearn_prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PATIENCE = 3


@dataclass(frozen=True)
class TrialResult:
    """What a trial measured."""

    card: Scorecard
    selection: Mapping[str, Any]
    """The chosen step, why, and where the run ended."""
    findings: Sequence[str]
    seconds: Mapping[str, float]


class Hopeless(Exception):
    """A run that is not worth its end."""


@dataclass
class Watch:
    """Follows a run's own validations and ends it where nothing can come of it.

    A run is hopeless where its first three validations are destroyed and none before was usable, or
    where `report` says so: it is told the share of the run that is done, in tenths, and the best
    score of a usable candidate so far, 0 without one.
    """

    steps: int
    prune: bool
    report: Callable[[int, float], bool] = lambda _tenth, _best: False
    asked_to_stop: Callable[[], bool] = lambda: False
    best: float = 0.0
    usable: bool = False
    destroyed: int = 0
    tenth: int = 0

    def __call__(self, entry: Mapping[str, Any]) -> None:
        """Takes a line of the run's metrics. Raises Hopeless, and KeyboardInterrupt when asked to."""
        if self.asked_to_stop():
            raise KeyboardInterrupt
        if "validation" not in entry or not self.prune:
            return
        if entry["destroyed"]:
            self.destroyed += 1
        else:
            self.usable = True
            self.best = max(self.best, entry["score"])
        if not self.usable and self.destroyed >= _PATIENCE:
            raise Hopeless(f"destroyed at its first {_PATIENCE} validations")
        tenth = 10 * entry["step"] // self.steps
        # The end itself is no moment to stop: only the scoring would be saved.
        if self.tenth < tenth < 10:
            self.tenth = tenth
            if self.report(tenth, self.best):
                raise Hopeless(f"below the median of earlier trials after {10 * tenth}% of the run")


class Stoppable(Silent):
    """A trial's progress, which also ends it between two steps where somebody asked to stop.

    It keeps messages back: every trial would say the same.
    """

    def __init__(self, progress: Progress, stop: StopRequest) -> None:
        self._stop, self._phase = stop, progress.phase
        self.step = progress.step  # type: ignore[method-assign]

    def phase(self, name: str, done: int, total: int) -> None:
        """Passed on."""
        if self._stop.requested:
            raise KeyboardInterrupt
        self._phase(name, done, total)


def run_trial(
    task: Task,
    method: Method,
    options: TrainingOptions,
    directory: Path,
    watch: Callable[[int], Watch],
    progress: Progress,
    target: Scorecard | None = None,
    trackers: Path | None = None,
) -> TrialResult:
    """Unlearns with these settings and measures the result.

    `directory` holds hidden states, which the next trial begins with if it steers no lower layer;
    `trackers` what experiment trackers write; `watch` makes the watch of a run of so many steps.
    Raises InputError for settings that do not go together, RunError where no checkpoint can be kept,
    Hopeless where the watch ends the run.
    """
    started = time.monotonic()
    checked, dtype = task.checked, task.dtype
    prepared = prepare_encoded(
        method, options, checked.config, checked.layout, checked.tokenizer, task.encoded
    )
    opened = open_run(checked, dtype, prepared, task.device, progress)
    prepared = opened.prepared
    with TemporaryDirectory(dir=directory, prefix="states-") as states:
        outcome = unlearn_prepared(
            prepared,
            checked.layout,
            opened.parts,
            opened.engine,
            opened.why_whole,
            Place(
                started,
                cache_directory=Path(states),
                tracker_directory=trackers,
                prefix=Prefix(directory),
            ),
            progress,
            watch(prepared.used.steps),
        )
    weights, history = outcome.finished.weights, outcome.history
    del opened, outcome
    release(task.device)
    trained = time.monotonic()
    card = score(task, weights, progress)
    return TrialResult(
        card=card,
        selection={
            "steps": history.steps,
            "chosen_step": history.chosen_step,
            "why": history.chosen_why,
            "stopped": history.stopped,
            "judgement": history.judgement,
        },
        findings=[scores_sentence(finding) for finding in of_scores(card, target)],
        seconds={"run": trained - started, "scoring": time.monotonic() - trained},
    )


def with_form(task: Task, progress: Progress) -> Task:
    """The sweep with its chat template on or off, where the weights decide; else as it is."""
    if task.plain is None:
        for line in said_of(task.encoded.policy):
            progress.message(line)
        return task
    tokenizer = task.checked.tokenizer
    policy = settled(
        (task.plain.policy, task.encoded.policy),
        lambda: load_model(task.checked, task.dtype, task.device),
        tokenizer,
        *task.encoded.sample,
        progress.message,
    )
    release(task.device)
    encoded = task.encoded if policy.chat_template else task.plain
    encoded = replace(encoded, policy=policy, text=policy.describe(tokenizer))
    return replace(task, encoded=encoded, plain=None)


def score(task: Task, weights: Mapping[str, torch.Tensor], progress: Progress) -> Scorecard:
    """The scorecard of the target with `weights` (float32, by name) over its own; none: the target's."""
    model = load_model(task.checked, task.dtype, task.device)
    put(model, weights, task.checked)
    card = evaluate_model(
        model,
        task.checked.tokenizer,
        task.material,
        policy=task.encoded.policy,
        batch_size=task.inputs.evaluation_batch_size,
        progress=progress.phase,
    )
    del model
    release(task.device)
    return card


def put(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], checked: CheckedModel) -> None:
    """Gives the model `weights` as a checkpoint would: rounded to the dtype of the files first."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in weights.items():
            held_in = checked.files.tensors[checked.stored_names[name][0]].dtype
            parameters[name].copy_(weight.to(held_in))


def release(device: str) -> None:
    """Gives freed memory back before the next model is read."""
    gc.collect()
    give_back_freed_memory()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()

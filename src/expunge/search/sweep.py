"""A sweep: one worker's share of a study, from the first trial to the files that say what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.disk import check_writable, check_written, remove
from expunge.errors import (
    ExpungeError,
    InputError,
    Interrupted,
    RunError,
    is_out_of_memory,
    place_of,
)
from expunge.evaluation.scorecard import Scorecard
from expunge.methods.base import Method
from expunge.runs.manifest import finite
from expunge.search.inputs import SweepInputs, Task, check_sweep
from expunge.search.objectives import objective_value
from expunge.search.results import BEST_CONFIG, RESULT, RUNNING, write_results
from expunge.search.study import (
    DATABASE,
    REASON,
    SET_ASIDE,
    TARGET,
    WORKER,
    WORKERS,
    Worker,
    all_trials,
    check_same_settings,
    check_url,
    counts,
    is_lost,
    is_of_the_database,
    is_worked_on,
    open_study,
    put_in_line,
    take_over,
)
from expunge.search.trial import (
    Hopeless,
    Stoppable,
    TrialResult,
    Watch,
    run_trial,
    score,
    with_form,
)
from expunge.training.options import TrainingOptions
from expunge.training.progress import Progress, Silent
from expunge.training.stopping import StopRequest, stop_requests

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

_WRITTEN = (
    RESULT, DATABASE, f"{DATABASE}-*", BEST_CONFIG, "trackers", f"{WORKERS}*", ".expunge-*",
    *("front", "sweep.html"),  # of earlier versions
)  # fmt: skip
"""Names of what is in a sweep's directory."""


class _Failed(Exception):
    """A trial without a result; its reason is stored with it."""


class _Surplus(Exception):
    """Another worker took the last trial at the same moment."""


def sweep(
    inputs: SweepInputs,
    method: Method,
    options: TrainingOptions,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Works on a study until it has so many trials, and returns what sweep.json holds.

    Raises InputError before a model is loaded and anything is written, Interrupted where it was
    asked to stop, RunError where too many trials failed in a row.
    """
    progress = progress or Silent()
    output = Path(inputs.output)
    _check_output(output, inputs, options)
    if inputs.study is not None:
        check_url(inputs.study)
    task = check_sweep(inputs, method, options)
    if inputs.overwrite and output.exists():
        for path in output.iterdir():
            remove(path)
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    url = inputs.study or f"sqlite:///{(output / DATABASE).absolute()}"
    try:
        study = open_study(url, inputs.study_name, task)
    except ExpungeError:
        if made:
            for path in output.glob(f"{DATABASE}*"):
                path.unlink()
            output.rmdir()
        raise
    for warning in task.warnings:
        progress.message(f"warning: {warning}")
    worker = Worker(output)
    with stop_requests() as stop, worker.at_work():
        stop.can_resume = True
        try:
            session = _Session(task, study, worker, stop, progress)
            stopped = session.work()
        except Exception as error:
            if isinstance(error, ExpungeError) or not is_of_the_database(error):
                raise
            raise RunError(
                "the study's database failed; go on with the same command when it works again"
            ) from None
    task = session.task
    result = write_results(task, study, stopped)
    if stop.requested:
        done = result["counts"]["ended"]
        raise Interrupted(
            f"stopped with {done} of {task.inputs.trials} trials done; go on with the same command",
            stop.exit_code,
        )
    return result


@dataclass
class _Session:
    """One worker's trials."""

    task: Task
    study: Study
    worker: Worker
    stop: StopRequest
    progress: Progress
    failures: list[str] = field(default_factory=list)
    """Reasons of the last trials in a row that failed."""
    target: Scorecard | None = None
    current: int | None = None
    """The trial that was begun last."""

    def work(self) -> str:
        """Trials, until there are enough; returns why it ended. Raises RunError after failures."""
        inputs = self.task.inputs
        take_over(self.study, self.worker, self.progress.message)
        try:
            self.task = with_form(self.task, self.progress)
            self.target = self._target()
            while self._is_next():
                if self.stop.requested:
                    return "interrupted"
                check_same_settings(self.study, self.task)
                if not self._one():
                    break
                write_results(self.task, self.study, RUNNING)
                if len(self.failures) >= inputs.max_failures:
                    write_results(self.task, self.study, "too many failures")
                    raise RunError(
                        f"{len(self.failures)} trials in a row failed, the last one because:"
                        f" {self.failures[-1]}; narrow --search or raise --max-failures"
                    )
                take_over(self.study, self.worker, self.progress.message)
        except KeyboardInterrupt:
            self.stop.requested = True
            return "interrupted"
        return "all trials done"

    def _is_next(self) -> bool:
        """Whether a trial is to be begun; one that waits to be tried again is."""
        trials = all_trials(self.study)
        waiting = sum(trial.state.name == "WAITING" for trial in trials)
        done = sum(map(counts, trials)) - waiting
        self.progress.phase("trials", min(done, self.task.inputs.trials), self.task.inputs.trials)
        return done < self.task.inputs.trials

    def _target(self) -> Scorecard:
        """The target's own scorecard, measured once for all workers."""
        stored = self.study.user_attrs.get(TARGET)
        if stored is None:
            self.progress.message("measuring the target")
            card = score(self.task, {}, Stoppable(self.progress, self.stop))
            stored = finite(card.to_json())
            self.study.set_user_attr(TARGET, stored)
        return Scorecard.from_json(stored)

    def _one(self) -> bool:
        """One trial; False where it was one too many."""
        import optuna

        failed = len(self.failures)
        try:
            self.study.optimize(self._objective, n_trials=1, catch=(_Failed,))
        except _Surplus:
            return False
        except KeyboardInterrupt:
            ended = self._begun_last()
            if ended is not None and is_lost(ended):
                put_in_line(self.study, ended)
            raise
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            ended = self._begun_last()
            if ended is None or not is_lost(ended):
                raise
            self.progress.message(
                f"trial {ended.number}: another worker took this one for gone, and tries it again"
            )
        if len(self.failures) == failed:
            self.failures.clear()
        return True

    def _begun_last(self) -> FrozenTrial | None:
        return next((t for t in all_trials(self.study) if t.number == self.current), None)

    def _objective(self, trial: Trial) -> list[float]:
        """What Optuna calls: values, or the exception that says why there are none."""
        import optuna

        self.current = trial.number
        trial.set_user_attr(WORKER, self.worker.name)
        before = [other for other in all_trials(self.study) if other.number < trial.number]
        if "instead_of" not in trial.user_attrs and sum(map(counts, before)) >= self.task.inputs.trials:
            trial.set_user_attr(SET_ASIDE, "one too many")
            raise _Surplus
        values = {dim.name: dim.suggest(trial) for dim in self.task.space.dimensions}
        same = next((t for t in before if t.state.name == "COMPLETE" and t.params == trial.params), None)
        if same is not None:
            return self._repeat(trial, same)
        outcome = self._outcome(trial, values)
        if isinstance(outcome, TrialResult):
            measured = self._measured(trial, outcome)
            if measured is not None:
                return measured
            outcome = "failed", "an objective is not a finite number"
        ended, reason = outcome
        if ended == "interrupted":
            trial.set_user_attr(SET_ASIDE, ended)
            raise KeyboardInterrupt
        trial.set_user_attr(REASON, reason)
        self.progress.message(f"trial {trial.number}: {ended}: {reason}")
        if ended == "pruned":
            raise optuna.TrialPruned
        self.failures.append(reason)
        raise _Failed

    def _repeat(self, trial: Trial, same: FrozenTrial) -> list[float]:
        """The same settings give the same run, so that it is not run again."""
        for name in ("parts", "selection", "findings"):
            trial.set_user_attr(name, same.user_attrs[name])
        trial.set_user_attr("same_as", same.number)
        self.progress.message(f"trial {trial.number}: the settings of trial {same.number} again")
        return list(same.values)

    def _outcome(self, trial: Trial, values: Mapping[str, Any]) -> TrialResult | tuple[str, str]:
        """A trial's result, or how it ended and why.

        No exception leaves it: its frames hold the model.
        """
        try:
            return self._run(trial, values)
        except KeyboardInterrupt:
            return "interrupted", ""
        except Hopeless as hopeless:
            return "pruned", str(hopeless)
        except (InputError, RunError) as error:
            return "failed", str(error)
        except OSError as error:
            return "failed", error.strerror or type(error).__name__
        except Exception as error:
            if is_out_of_memory(error):
                return "failed", "out of memory"
            # The message of an unexpected error may quote a row, so its type and place must do.
            return "failed", f"internal error ({place_of(error)})"

    def _run(self, trial: Trial, values: Mapping[str, Any]) -> TrialResult:
        inputs = self.task.inputs
        method, options = self.task.space.with_values(values)

        def report(tenth: int, best: float) -> bool:
            if len(inputs.objectives) > 1:
                return False  # Optuna has no pruning of several objectives
            trial.report(best, tenth)
            return bool(trial.should_prune())

        return run_trial(
            self.task,
            method,
            options,
            self.worker.directory,
            partial(
                Watch,
                prune=inputs.prune,
                report=report,
                asked_to_stop=lambda: self.stop.requested,
            ),
            Stoppable(self.progress, self.stop),
            self.target,
            Path(inputs.output) / "trackers" / f"trial-{trial.number}",
        )

    def _measured(self, trial: Trial, result: TrialResult) -> list[float] | None:
        """Stores what was measured and returns the objectives' values."""
        trial.set_user_attr("parts", finite(result.card.to_json()))
        trial.set_user_attr("selection", finite(result.selection))
        trial.set_user_attr("findings", list(result.findings))
        trial.set_user_attr("seconds", dict(result.seconds))
        objectives = self.task.inputs.objectives
        values = [objective_value(objective, result.card) for objective in objectives]
        found = [value for value in values if value is not None and value == value]
        if len(found) < len(objectives):
            return None
        named = ", ".join(f"{o} {v:.3f}" for o, v in zip(objectives, found, strict=True))
        self.progress.message(f"trial {trial.number}: {named}")
        return found


def _check_output(output: Path, inputs: SweepInputs, options: TrainingOptions) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; choose a directory")
    if output.is_dir() and any(output.iterdir()) and not _is_a_sweep(output):
        raise InputError(f"--output {output}: holds no sweep but other files; choose another directory")
    if inputs.overwrite and output.is_dir():
        if is_worked_on(output):
            raise InputError(
                f"--overwrite: a worker is at work in {output}; stop it first, or choose another output"
            )
        inputs.check_not_in(output, options.influence)
        check_written("--output", output, _WRITTEN)
    check_writable(output, inside=True)


def _is_a_sweep(output: Path) -> bool:
    return (output / RESULT).is_file() or (output / DATABASE).is_file()

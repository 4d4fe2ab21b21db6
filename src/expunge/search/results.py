"""What a sweep leaves on disk: sweep.json, and best.yaml for `expunge run --config`.

sweep.json         every trial with its settings, values, parts and time; the target
best.yaml          the best trial's run
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import expunge
from expunge.disk import write_whole
from expunge.evaluation.outcomes import of_scores
from expunge.evaluation.scorecard import Scorecard
from expunge.runs.manifest import finite, settings_of
from expunge.runs.run import RunInputs
from expunge.search.inputs import Task
from expunge.search.objectives import objective_value
from expunge.search.study import (
    DATABASE,
    REASON,
    TARGET,
    WORKER,
    all_trials,
    is_given_up,
    is_lost,
    shown_url,
)

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

RESULT = "sweep.json"
BEST_CONFIG = "best.yaml"
_PATHS = ("model", "forget", "retain", "nonmembers")
RUNNING = "running"
"""What `stopped` says between two trials."""
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "RUNNING": "running", "WAITING": "waiting"}


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is nowhere lower and somewhere higher."""
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def pareto_front(values: Mapping[int, Sequence[float]]) -> list[int]:
    """The keys of those that no other dominates; all objectives are to be high."""
    return [
        key
        for key, mine in values.items()
        if not any(dominates(other, mine) for other in values.values())
    ]


def chosen(values: Mapping[int, Sequence[float]]) -> int | None:
    """The trial with the highest harmonic mean of its values; of equals the first."""
    means = {key: statistics.harmonic_mean(list(mine)) for key, mine in values.items()}
    return max(means, key=lambda key: means[key]) if means else None


def write_results(task: Task, study: Study, stopped: str) -> dict[str, Any]:
    """Writes the files as the study is now and returns what sweep.json holds."""
    output = Path(task.inputs.output)
    result = finite(_result(task, study, stopped))
    write_whole(output / RESULT, json.dumps(result, indent=2, allow_nan=False) + "\n")
    if result["best"] is None:
        (output / BEST_CONFIG).unlink(missing_ok=True)
    else:
        write_whole(output / BEST_CONFIG, _config(task, result["trials"][result["best"]]))
    return dict(result)


def _result(task: Task, study: Study, stopped: str) -> dict[str, Any]:
    inputs = task.inputs
    objectives = list(inputs.objectives)
    target = study.user_attrs.get(TARGET)
    trials = [_describe_trial(trial, objectives, target) for trial in all_trials(study)]
    # What a destroyed model forgot counts for nothing, whatever its mean.
    usable = {
        trial["number"]: [trial["values"][objective] for objective in objectives]
        for trial in trials
        if trial["state"] == "complete" and not trial["destroyed"]
    }
    front = pareto_front(usable)
    states = [trial["state"] for trial in trials]
    counted = {state: states.count(state) for state in ("complete", "pruned", "failed")}
    return {
        "expunge": expunge.__version__,
        "stopped": stopped,
        "study": {
            "name": study.study_name,
            "database": DATABASE if inputs.study is None else shown_url(inputs.study),
        },
        "objectives": objectives,
        "direction": "every objective is in [0, 1] and to be high",
        "settings": dict(task.settings),
        "counts": {
            "asked": inputs.trials,
            "ended": sum(counted.values()),
            **counted,
            **{state: states.count(state) for state in ("running", "waiting", "lost")},
        },
        "target": None if target is None else _described(Scorecard.from_json(target), objectives),
        "best": chosen({number: usable[number] for number in front}),
        "why_best": "highest value"
        if len(objectives) == 1
        else "highest harmonic mean of the objectives on the Pareto front",
        "front": front,
        "trials": trials,
    }


def _described(card: Scorecard, objectives: Sequence[Any]) -> dict[str, Any]:
    return {
        "values": {objective: objective_value(objective, card) for objective in objectives},
        "parts": card.to_json(),
    }


def _describe_trial(
    trial: FrozenTrial, objectives: Sequence[str], target: Mapping[str, Any] | None
) -> dict[str, Any]:
    attributes = trial.user_attrs
    parts = attributes.get("parts")
    state = _STATES.get(trial.state.name, "lost" if is_lost(trial) else "failed")
    reason = attributes.get(REASON)
    if is_given_up(trial):
        state, reason = "failed", "its process ended each time that these settings were tried"
    complete = state == "complete"
    duration = trial.duration
    return {
        "number": trial.number,
        "state": state,
        "reason": reason,
        "params": dict(trial.params or trial.system_attrs.get("fixed_params", {})),
        "values": dict(zip(objectives, trial.values, strict=True)) if complete else None,
        "parts": parts,
        "selection": attributes.get("selection"),
        "findings": attributes.get("findings", []),
        "destroyed": parts is not None and _is_destroyed(parts, target),
        "intermediate": {str(tenth): v for tenth, v in trial.intermediate_values.items()},
        "seconds": None if duration is None else round(duration.total_seconds(), 3),
        "seconds_of": attributes.get("seconds"),
        "worker": attributes.get(WORKER),
        "instead_of": attributes.get("instead_of"),
        "same_as": attributes.get("same_as"),
    }


def _is_destroyed(parts: Mapping[str, Any], target: Mapping[str, Any] | None) -> bool:
    before = None if target is None else Scorecard.from_json(target)
    found = of_scores(Scorecard.from_json(parts), before)
    return any(finding.outcome == "destroyed" for finding in found)


def _config(task: Task, trial: Mapping[str, Any]) -> str:
    """A trial's run as `expunge run --config` takes it: every setting, and the paths of this machine."""
    import yaml

    inputs = task.inputs
    method, options = task.space.with_values(trial["params"])
    output = str((Path(inputs.output) / f"trial-{trial['number']}").absolute())
    run = dataclasses.asdict(inputs.into(RunInputs, output=output, dtype=task.dtype))
    fields = {
        **{key: _place(value) if key in _PATHS and value else value for key, value in run.items()},
        "method": settings_of(method),
        **dataclasses.asdict(options),
        "chat_template": task.template,
    }
    fields = {key: value for key, value in fields.items() if value != []}  # no value for a flag
    values = ", ".join(f"{name} {value:.4f}" for name, value in trial["values"].items())
    head = f"# Trial {trial['number']} of the sweep: {values}\n# expunge run --config THIS_FILE\n"
    return head + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _place(source: str) -> str:
    """A path that works from any directory; a hub id as it is."""
    return str(Path(source).absolute()) if Path(source).exists() else source

"""The entry point of SemEval-2025 Task 4: one function, four paths, one hour."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.errors import InputError

if TYPE_CHECKING:
    from expunge.methods.base import Method

TIME_LIMIT = "55m"
"""The task ends a submission after an hour; what is left is for a slower disk than ours."""


def unlearn(
    input_model_path: str | Path,
    output_path: str | Path,
    forget_dir: str | Path,
    retain_dir: str | Path,
    *,
    method: Method | None = None,
    nonmembers: str | Path | None = None,
    time_limit: str = TIME_LIMIT,
    **options: Any,
) -> dict[str, Any]:
    """Unlearns `forget_dir` from the model and leaves the best checkpoint in `output_path`.

    The directories hold `forget.*` and `retain.*` (JSONL or Parquet) as the task gives them. The method
    is spectral unlearning unless another is given. `options` are fields of `TrainingOptions` and of
    `RunInputs` (dtype, device); the dtype is bfloat16 on a GPU unless given. An empty `output_path` may
    exist; one that holds anything is refused. Returns the run's manifest. Raises InputError before a
    model is loaded, RunError where no checkpoint could be kept.
    """
    from dataclasses import fields

    from expunge.methods.spectral import Spectral
    from expunge.models.devices import resolve_device
    from expunge.runs.run import RunInputs, run
    from expunge.training.options import TrainingOptions

    output = Path(output_path)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    of_run = {field.name for field in fields(RunInputs)}
    inputs = {name: options.pop(name) for name in list(options) if name in of_run}
    if resolve_device(inputs.get("device", "auto")) != "cpu":
        inputs.setdefault("dtype", "bfloat16")
    known = {field.name for field in fields(TrainingOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"{unknown[0]}: is no option of a run; see TrainingOptions and RunInputs")
    return run(
        RunInputs(
            model=str(input_model_path),
            forget=str(forget_dir),
            retain=str(retain_dir),
            nonmembers=None if nonmembers is None else str(nonmembers),
            output=str(output),
            **inputs,
        ),
        method or Spectral(),
        TrainingOptions(time_limit=time_limit, **options),
    )

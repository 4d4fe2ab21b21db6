"""`expunge sweep`: search over the options of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.cli.console import progress_on_stderr
from expunge.cli.options import Printed, print_json, yaml_fields
from expunge.cli.run import parsed
from expunge.errors import InputError
from expunge.reporting.sweep import print_sweep
from expunge.search.inputs import SweepInputs

_ABOUT = """
expunge sweep MODEL --forget F --retain R --output DIR --search NAME=RANGE ...

Searches over options of a run: each trial is a run and its scorecard. Takes every option of
`expunge run` as a fixed setting. The same command goes on with an unfinished sweep; several at once
share it.

Examples:
  expunge sweep model --forget f.jsonl --retain r.jsonl --output dir --trials 30
      --search learning_rate=log:1e-3:1e-2 schedule=choice:constant,cosine
  expunge sweep model --forget f.jsonl --retain r.jsonl --output dir
      --method rmu --search method.alpha=log:5:100
  expunge sweep model --config sweep.yaml --output dir
"""


@dataclass(frozen=True)
class Sweep(Printed, SweepInputs):
    """Those of a sweep, and what is printed."""


def main(arguments: Sequence[str]) -> int:
    """Parses, searches, prints."""
    settings, _ = parsed(arguments, "expunge sweep", Sweep, _ABOUT, with_search)
    from expunge.search.sweep import sweep  # which says so if Optuna is missing; --help needs none

    inputs = settings.inputs
    _check_not_fixed(inputs, arguments)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with progress_on_stderr() as progress:
        result = sweep(inputs, settings.settings, settings.training, progress)
    if inputs.json:
        print_json(result)
    else:
        print_sweep(result, inputs.output)
    return 0


def with_search(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, its `search` mapping as the words of --search."""
    fields = yaml_fields(path)
    words = []
    for key in [key for key in fields if key.startswith("search.")]:
        value = fields.pop(key)
        name = key.removeprefix("search.")
        if isinstance(value, list):
            value = "choice:" + ",".join(_word(choice) for choice in value)
        if not isinstance(value, str) or ":" not in value:
            raise InputError(
                f"--config {path}: search {name} is no range; write for example log:1e-4:1e-2, or"
                " a list of choices"
            )
        words.append(f"{name}={value}")
    if words:
        fields["search"] = words
    return fields


def _word(choice: object) -> str:
    if choice is None:
        return "null"
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _check_not_fixed(inputs: SweepInputs, arguments: Sequence[str]) -> None:
    """Raises InputError for an option that the command line both fixes and varies."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    for word in inputs.search:
        name = word.partition("=")[0].strip()
        if f"--{name}".replace("_", "-") in given:
            raise InputError(f"--{name}: is given as an option and in --search; give one of the two")

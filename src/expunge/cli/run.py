"""`expunge run`: one unlearning from files to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, cast

import tyro

from expunge.cli.console import progress_on_stderr
from expunge.cli.help import Option
from expunge.cli.options import (
    as_arguments,
    check_words,
    named,
    parse,
    take_option,
    yaml_fields,
)
from expunge.disk import explained
from expunge.errors import InputError, near
from expunge.methods.base import Method
from expunge.methods.catalog import METHODS
from expunge.runs.run import RunInputs, run
from expunge.runs.sources import remember, remembered, sources_of
from expunge.training.options import TrainingOptions
from expunge.training.progress import Progress

DEFAULT_METHOD = "spectral"
Inputs = TypeVar("Inputs")
_ABOUT = """
expunge run MODEL --forget F --retain R --output OUT [--method M]

Unlearns rows from a model and writes the result as a model directory.

Examples:
  expunge run model --forget forget.jsonl --retain retain.jsonl --output out
  expunge run model --config run.yaml --output out --time-limit 1h --resume
  expunge run model --forget f.csv --retain r.csv --output out --method libu
"""


def main(
    arguments: Sequence[str],
    prog: str = "expunge run",
    inputs: type[RunInputs] = RunInputs,
    about: str = _ABOUT,
    default: str = DEFAULT_METHOD,
) -> int:
    """Parses, runs, says where the result is; as `prog` another command does the same."""
    settings, preset = parsed(arguments, prog, inputs, about, default=default)
    if inputs is not RunInputs and settings.settings.name != default:
        raise InputError(f"--method {settings.settings.name}: {prog} takes {default}; leave it out")
    if not settings.inputs.forget and settings.training.validate_every:
        raise InputError("--validate-every: needs rows to measure; give --forget, or leave it out")
    with progress_on_stderr() as progress:
        manifest = run(settings.inputs, settings.settings, settings.training, progress, preset)
        if manifest["status"] == "complete":
            selection = manifest["selection"]
            progress.message(
                f"{settings.inputs.output}: step {selection['chosen_step']} of"
                f" {manifest['steps']} kept ({selection['why']}; {selection['stopped']}),"
                f" {manifest['seconds']['total']:.0f} s"
            )
            _remember(settings.inputs, progress)
    return 0


def _remember(inputs: RunInputs, progress: Progress) -> None:
    output = Path(inputs.output)
    if "sources" in remembered(output):
        return
    paths = {"original": inputs.model, "forget": inputs.forget, "retain": inputs.retain}
    try:
        remember(output, {"sources": sources_of(paths)})
    except OSError as error:
        progress.message(f"{explained(error)}; give later commands all paths again")


@dataclass(frozen=True)
class Settings(Generic[Inputs]):
    """The options of a run."""

    inputs: Inputs
    training: TrainingOptions
    settings: Method
    """The method's own."""


def parsed(
    arguments: Sequence[str],
    prog: str,
    inputs: type[Inputs],
    about: str,
    read: Callable[[Path], Mapping[str, Any]] = yaml_fields,
    default: str = DEFAULT_METHOD,
) -> tuple[Settings[Inputs], str | None]:
    """The options of a run, and its preset.

    `about` opens the help; `read` gives the fields of a YAML file; `default` is the method where none is
    named. Raises InputError.
    """
    check_words(arguments)
    arguments, config = take_option(arguments, "--config")
    fields = {} if config is None else dict(read(Path(config)))
    arguments, chosen = take_option(arguments, "--method")
    arguments, preset = take_option(arguments, "--preset")
    yaml_method, yaml_preset = fields.pop("method", None), fields.pop("preset", None)
    name = chosen or yaml_method or default
    preset = preset or yaml_preset
    method = _method_class(str(name))
    command = _command(method, inputs, about)
    defaults = [] if preset is None else _preset_arguments(method, str(preset), command)
    defaults += as_arguments(fields, str(config), command)
    words = [*defaults, *named(arguments, "model")]
    told = _method_options(method), _defaults(method)
    return cast("Settings[Inputs]", parse(command, words, prog, "model", (), *told)), preset


def _method_options(method: Any) -> tuple[Option, ...]:
    """Those that are taken out before the others are known."""
    about = (
        f"{len(METHODS)} of them; --help-all names them. It decides which --method.* there are:"
        f" {', '.join(METHODS)}. What adaptive-rmu hides comes back by tuning: take it only if memory"
        " asks for it (docs/audits.md)."
    )
    presets = ", ".join(method.presets) or "none"
    return (
        Option("--method", "method", method.name, about),
        Option("--preset", "preset", "null", f"Published settings, for {method.name}: {presets}."),
    )


def _defaults(method: Any) -> dict[str, str]:
    """What the method puts in the place of null."""
    of = method.defaults
    return {
        "epochs": f"{of.epochs} to {of.most_epochs}"
        if of.most_epochs
        else f"{of.epochs}" + f" or {of.least_steps} steps" * (of.least_steps > 1),
        "batch-size": str(of.batch_size),
        "learning-rate": f"{of.learning_rate:g} x 256 / hidden size"
        + (f" x min(1, {of.depth} / layers)" if of.depth else ""),
        "schedule": of.schedule,
    }


def _method_class(name: str) -> Any:
    if name not in METHODS:
        raise InputError(f"--method {name}: unknown; {near(name, METHODS)}")
    return METHODS[name]


def _preset_arguments(method: Any, preset: str, command: type[Any]) -> list[str]:
    if preset not in method.presets:
        known = ", ".join(method.presets) or "none"
        owners = [name for name, other in METHODS.items() if preset in other.presets]
        mend = f"; it is one of --method {' or '.join(owners)}" if owners else ""
        raise InputError(f"--preset {preset}: {method.name} has the presets: {known}{mend}")
    chosen = method.presets[preset]
    fields = {f"method.{key}": value for key, value in chosen.method.items()} | dict(chosen.run)
    return as_arguments(fields, f"preset {preset}", command)


def _command(method: Any, inputs: type[Any], about: str) -> type[Any]:
    """The command's options for one method: `--method` decides which `--method.*` there are."""
    command = make_dataclass(
        "Run",
        [
            ("inputs", Annotated[inputs, tyro.conf.arg(name="")]),
            ("training", Annotated[TrainingOptions, tyro.conf.arg(name="")]),
            ("settings", Annotated[method, tyro.conf.arg(name="method")]),
        ],
    )
    command.__doc__ = about
    return command

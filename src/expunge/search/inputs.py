"""What a sweep is given, and everything about it that is checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import expunge
from expunge.data.chat_templates import Template
from expunge.data.fingerprints import data_fingerprint
from expunge.data.formats import sha256_of
from expunge.data.rows import RowSet
from expunge.disk import check_not_read
from expunge.errors import InputError
from expunge.evaluation.measuring import MeasureInputs, read_material
from expunge.evaluation.scorecard import Material
from expunge.methods.base import Method
from expunge.models.devices import resolve_device
from expunge.models.loading import CheckedModel, Dtype, check_model, resolve_dtype, said_of_dtype
from expunge.models.text_forms import text_policies
from expunge.processes import check_alone
from expunge.runs.manifest import settings_of
from expunge.runs.run import Sources
from expunge.search.objectives import Objective, Part, check_objectives
from expunge.search.space import METHOD_PREFIX, Space, read_space
from expunge.training.options import TrainingOptions
from expunge.training.preparation import EncodedSets, encode_sets, prepare_encoded

Sampler = Literal["tpe", "random", "grid"]
_COSTS_ONLY = ("micro_batch_size", "save_every", "cache_limit", "trackers")
"""Options in which the workers of a study may differ: they do not change a result."""


@dataclass(frozen=True)
class SweepInputs(Sources):
    """What is searched, on what, and where the result goes."""

    output: str
    """Directory for sweep.json, best.yaml and the study; the same one goes on."""
    search: tuple[str, ...] = ()
    """What is varied, one NAME=RANGE each. A range is log:LOW:HIGH, float:LOW:HIGH, int:LOW:HIGH or
    choice:A,B. In YAML a mapping of names to ranges."""
    trials: int = 20
    """Trials in total, of all workers and of earlier calls."""
    objectives: tuple[Objective, ...] = ("final",)
    """What to raise: final, aggregate, forgetting, retention, mia, utility. Several give a Pareto
    front."""
    score_nonmembers: str | None = None
    """Other non-members for the MIA score; null: those of --calibration."""
    mmlu: str | None = None
    """Directory in MMLU's format, for utility."""
    mmlu_shots: int = 0
    """Solved examples from dev/ before each question."""
    evaluation_batch_size: int = 64
    """Rows a batch in the scoring; it changes the speed, never a score."""
    study: str | None = None
    """URL of a shared database, such as postgresql://host/db; null: study.db in the output."""
    study_name: str = "sweep"
    """Name of the study in the database."""
    sampler: Sampler = "tpe"
    """How settings are proposed: tree-structured Parzen estimators, at random, or all of a grid in turn
    (at most --trials)."""
    prune: bool = True
    """Stop hopeless trials early."""
    max_failures: int = 5
    """End after so many failed trials in a row."""
    overwrite: bool = False
    """Discard the sweep that the output holds and begin anew."""

    def __post_init__(self) -> None:
        if self.evaluation_batch_size < 1:
            raise InputError(f"--evaluation-batch-size {self.evaluation_batch_size}: must be 1 or more")
        for option in ("trials", "max_failures"):
            value = getattr(self, option)
            if value < 1:
                raise InputError(f"--{option} {value}: must be 1 or more")
        if not self.study_name.strip():
            raise InputError("--study-name: is empty; give a name")
        if self.study is not None and self.overwrite:
            raise InputError(
                "--overwrite: discards a study in the output only, and --study is shared; give"
                " another --study-name"
            )

    @property
    def measured(self) -> set[Part]:
        """Which parts of the scorecard there is material for."""
        sources: dict[Part, tuple[str, ...]] = {
            "retain": ("retain",),
            "nonmembers": ("nonmembers", "score_nonmembers"),
            "mmlu": ("mmlu",),
        }
        return {
            part
            for part, names in sources.items()
            if any(getattr(self, name) is not None for name in names)
        }

    def measurement(self, options: TrainingOptions, **changes: Any) -> MeasureInputs:
        """How a model is measured."""
        changes = {"output": None} | changes
        return self.into(
            MeasureInputs,
            nonmembers=self.score_nonmembers or self.nonmembers,
            batch_size=self.evaluation_batch_size,
            chat_template=options.chat_template,
            long_rows=options.long_rows,
            **changes,
        )

    def check_not_in(self, output: Path, influence: str | None) -> None:
        """Raises InputError if something that is read lies in the output, or is the output."""
        names = ("model", "forget", "retain", "nonmembers", "score_nonmembers", "mmlu")
        read = {name: getattr(self, name) for name in names}
        check_not_read("--output", output, {**read, "influence": influence})


@dataclass(frozen=True)
class Task:
    """A sweep that is ready to begin: inputs read, checked and tokenised once for all trials."""

    inputs: SweepInputs
    space: Space
    grid: Sequence[Mapping[str, Any]]
    """With `--sampler grid` the settings of every trial."""
    checked: CheckedModel
    device: str
    encoded: EncodedSets
    plain: EncodedSets | None
    """The rows without the chat template, where the weights decide whether it is on."""
    material: Material
    """What every trial is scored on."""
    settings: Mapping[str, Any]
    """What the workers of a study must have in common."""
    warnings: Sequence[str]

    @property
    def template(self) -> Template:
        """Whether the chat template is on; auto before a sweep has begun, where the weights decide."""
        if self.plain is not None:
            return "auto"
        return "on" if self.encoded.policy.chat_template else "off"

    @property
    def dtype(self) -> Dtype:
        """Of weights, products and scoring."""
        return resolve_dtype(self.checked, self.inputs.dtype)


def check_sweep(inputs: SweepInputs, method: Method, options: TrainingOptions) -> Task:
    """Checks everything that needs no weights. Raises InputError."""
    space = read_space(inputs.search, method, options)
    grid = space.grid() if inputs.sampler == "grid" else []
    inputs = dataclasses.replace(inputs, trials=min(inputs.trials, len(grid) or inputs.trials))
    varied = {dimension.name for dimension in space.dimensions}
    check_objectives(inputs.objectives, inputs.measured)
    device = resolve_device(inputs.device)
    check_alone("sweep")
    checked = check_model(inputs.model, trust_remote_code=inputs.trust_remote_code)
    space.check(checked.layout)
    sets = inputs.read_sets("forget", "retain", "nonmembers", "score_nonmembers")
    policies = text_policies(checked, options.chat_template, options.long_rows)
    *others, encoded = (
        encode_sets(
            method,
            options,
            policy,
            checked.tokenizer,
            sets["forget"],
            sets.get("retain"),
            sets.get("nonmembers"),
        )
        for policy in policies
    )
    prepared = prepare_encoded(
        method, options, checked.config, checked.layout, checked.tokenizer, encoded
    )
    material = read_material(inputs.measurement(options), checked, policies)
    warnings = [*prepared.warnings, *said_of_dtype(checked, inputs.dtype, device)]
    if inputs.nonmembers is not None and inputs.score_nonmembers is None:
        warnings.append(
            "the MIA score is measured on the text that runs are calibrated against; give"
            " --score-nonmembers to choose by other text"
        )
    if inputs.prune and options.select == "last" and "select" not in varied:
        warnings.append("no trial is pruned: --select last measures nothing during a run")
    return Task(
        inputs=inputs,
        space=space,
        grid=grid,
        checked=checked,
        device=device,
        encoded=encoded,
        plain=others[0] if others else None,
        material=material,
        settings=_settings(inputs, space, sets, checked),
        warnings=warnings,
    )


def _settings(
    inputs: SweepInputs, space: Space, sets: Mapping[str, RowSet], checked: CheckedModel
) -> dict[str, Any]:
    varied = {dimension.name for dimension in space.dimensions}
    training = dataclasses.asdict(space.options)
    return {
        "search": space.to_json(),
        "objectives": list(inputs.objectives),
        "sampler": inputs.sampler,
        "prune": inputs.prune,
        "method": {
            name: value
            for name, value in settings_of(space.method).items()
            if f"{METHOD_PREFIX}{name}" not in varied
        },
        "training": {
            name: value
            for name, value in training.items()
            if name not in varied and name not in _COSTS_ONLY
        },
        "dtype": resolve_dtype(checked, inputs.dtype),
        **provenance(inputs, sets, checked),
    }


def provenance(inputs: SweepInputs, sets: Mapping[str, RowSet], checked: CheckedModel) -> dict[str, Any]:
    """On what a sweep goes on. Paths differ between machines, so that files are told by their hash."""
    mmlu = None
    if inputs.mmlu is not None:
        mmlu = {"shots": inputs.mmlu_shots, "sha256": _digest(Path(inputs.mmlu))}
    return {
        "expunge": expunge.__version__,
        "model_sha256": dict(checked.files.sha256()),
        "data_hmac_sha256": {name: data_fingerprint(rows) for name, rows in sets.items()},
        "mmlu": mmlu,
    }


def _digest(directory: Path) -> str:
    """One SHA-256 over the question files and their names."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*/*.csv")):
        digest.update(f"{path.relative_to(directory).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()

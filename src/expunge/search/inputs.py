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
from expunge.data.rows import Reading, RowSet
from expunge.errors import InputError
from expunge.evaluation.multiple_choice import Question, read_questions
from expunge.evaluation.score_files import read_scores
from expunge.evaluation.scorecard import Scorecard, check_material
from expunge.methods.base import Method
from expunge.models.loading import (
    CheckedModel,
    Dtype,
    RunDtype,
    check_model,
    resolve_device,
    resolve_dtype,
    said_of_dtype,
    text_policies,
)
from expunge.processes import check_alone
from expunge.search.objectives import Material, Objective, check_objectives, objective_value
from expunge.search.space import METHOD_PREFIX, Space, read_space
from expunge.training.manifest import settings_of
from expunge.training.options import TrainingOptions, seconds
from expunge.training.preparation import EncodedSets, encode_sets, prepare_encoded

Sampler = Literal["tpe", "random"]
_COSTS_ONLY = ("micro_batch_size", "save_every", "cache_limit", "trackers")
"""Options in which the workers of a study may differ: they do not change a result."""


@dataclass(frozen=True)
class SweepInputs(Reading):
    """What is searched, on what, and where the result goes."""

    model: str
    """The target model: a directory, or a hub id."""
    forget: str
    """Rows to remove: a file, a directory with forget.*, or a hub data set id."""
    output: str
    """Directory for sweep.json, best.yaml, sweep.html and the study; the same one goes on."""
    search: tuple[str, ...] = ()
    """What is varied, one NAME=RANGE each: log:LOW:HIGH, float:LOW:HIGH, int:LOW:HIGH or
    choice:A,B. In YAML a mapping of names to ranges."""
    trials: int = 20
    """Trials in total, of all workers and of earlier calls."""
    objectives: tuple[Objective, ...] = ("final",)
    """What to raise: final, aggregate, forgetting, retention, mia, utility. Several give a Pareto
    front."""
    retain: str | None = None
    """Rows to keep: a file, a directory with retain.*, or a hub data set id."""
    nonmembers: str | None = None
    """Never-seen text, for the runs to calibrate against and for the MIA score."""
    score_nonmembers: str | None = None
    """Other never-seen text for the MIA score; null: that of --nonmembers."""
    mmlu: str | None = None
    """Directory in MMLU's format, for utility."""
    mmlu_shots: int = 0
    """Solved examples from dev/ before each question."""
    evaluation_batch_size: int = 64
    """Rows a batch in the scoring; it changes the speed, never a score."""
    oracle: str | None = None
    """Scores of a model trained without the forget set, to mark in the figures: a scores.json or a
    directory that holds one."""
    study: str | None = None
    """URL of a shared database, such as postgresql://host/db; null: study.db in the output."""
    study_name: str = "sweep"
    """Name of the study in the database."""
    sampler: Sampler = "tpe"
    """How settings are proposed: tree-structured Parzen estimators, or at random."""
    timeout: str | None = None
    """Begin no trial that would end after this, as long as the longest so far, for example 2h."""
    prune: bool = True
    """Stop hopeless trials early."""
    max_failures: int = 5
    """End after so many failed trials in a row."""
    write_best: bool = False
    """At the end run the best settings again and write that model to OUTPUT/best."""
    dtype: RunDtype = "auto"
    """Dtype of the frozen weights, of the products and of the scoring; auto: the one of the model's
    files, for float16 files float32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    overwrite: bool = False
    """Discard the sweep that the output holds and begin anew."""
    trust_remote_code: bool = False
    """Run code that the model's directory brings along."""

    def __post_init__(self) -> None:
        for option in ("trials", "max_failures", "evaluation_batch_size"):
            value = getattr(self, option)
            if value < 1:
                raise InputError(f"--{option.replace('_', '-')} {value}: must be 1 or more")
        if self.mmlu_shots < 0:
            raise InputError(f"--mmlu-shots {self.mmlu_shots}: must be 0 or more")
        if self.mmlu_shots and self.mmlu is None:
            raise InputError("--mmlu-shots: needs --mmlu with the questions")
        if self.timeout is not None:
            seconds(self.timeout, "--timeout")
        if not self.study_name.strip():
            raise InputError("--study-name: is empty; give a name")
        if self.study is not None and self.overwrite:
            raise InputError(
                "--overwrite: discards a study in the output only, and --study is shared; give"
                " another --study-name"
            )

    @property
    def given(self) -> set[Material]:
        """Which parts of the scorecard can be measured."""
        found: set[Material] = set()
        if self.retain is not None:
            found.add("retain")
        if self.nonmembers is not None or self.score_nonmembers is not None:
            found.add("nonmembers")
        if self.mmlu is not None:
            found.add("mmlu")
        return found


@dataclass(frozen=True)
class Task:
    """A sweep that is ready to begin: inputs read, checked and tokenised once for all trials."""

    inputs: SweepInputs
    space: Space
    checked: CheckedModel
    device: str
    sets: Mapping[str, RowSet]
    encoded: EncodedSets
    plain: EncodedSets | None
    """The rows without the chat template, where the weights decide whether it is on."""
    questions: Sequence[Question] | None
    examples: Mapping[str, Sequence[Question]] | None
    oracle: Scorecard | None
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

    @property
    def scored_nonmembers(self) -> RowSet | None:
        """The never-seen text of the MIA score."""
        return self.sets.get("score_nonmembers", self.sets.get("nonmembers"))


def check_sweep(inputs: SweepInputs, method: Method, options: TrainingOptions) -> Task:
    """Checks everything that needs no weights. Raises InputError."""
    space = read_space(inputs.search, method, options)
    check_objectives(inputs.objectives, inputs.given)
    device = resolve_device(inputs.device)
    check_alone("sweep")
    oracle = None if inputs.oracle is None else read_scores(inputs.oracle)
    if oracle is not None:
        for objective in inputs.objectives:
            if objective_value(objective, oracle) is None:
                raise InputError(
                    f"--oracle {inputs.oracle}: has no {objective}; measure it with the same options"
                )
    checked = check_model(inputs.model, trust_remote_code=inputs.trust_remote_code)
    space.check(checked.layout)
    sets = _read_sets(inputs)
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
    questions, examples = None, None
    if inputs.mmlu is not None:
        questions, examples = read_questions(Path(inputs.mmlu), inputs.mmlu_shots)
    for policy in policies:
        check_material(
            checked.tokenizer,
            sets["forget"],
            sets.get("retain"),
            sets.get("score_nonmembers", sets.get("nonmembers")),
            questions,
            examples,
            policy,
        )
    warnings = [*prepared.warnings, *said_of_dtype(checked, inputs.dtype, device)]
    if inputs.nonmembers is not None and inputs.score_nonmembers is None:
        warnings.append(
            "the MIA score is measured on the text that runs are calibrated against; give"
            " --score-nonmembers to choose by other text"
        )
    if inputs.prune and options.select == "last" and not _varies(space, "select"):
        warnings.append("no trial is pruned: --select last measures nothing during a run")
    return Task(
        inputs=inputs,
        space=space,
        checked=checked,
        device=device,
        sets=sets,
        encoded=encoded,
        plain=others[0] if others else None,
        questions=questions,
        examples=examples,
        oracle=oracle,
        settings=_settings(inputs, space, sets, checked),
        warnings=warnings,
    )


def _varies(space: Space, name: str) -> bool:
    return any(dimension.name == name for dimension in space.dimensions)


def _read_sets(inputs: SweepInputs) -> dict[str, RowSet]:
    sets = {"forget": inputs.read(inputs.forget, "forget")}
    if inputs.retain is not None:
        sets["retain"] = inputs.read(inputs.retain, "retain")
    for name in ("nonmembers", "score_nonmembers"):
        source = getattr(inputs, name)
        if source is not None:
            sets[name] = inputs.read(source, "nonmembers")
    return sets


def _settings(
    inputs: SweepInputs, space: Space, sets: Mapping[str, RowSet], checked: CheckedModel
) -> dict[str, Any]:
    """Paths differ between machines, so that files are compared by their SHA-256."""
    varied = {dimension.name for dimension in space.dimensions}
    training = dataclasses.asdict(space.options)
    return {
        "expunge": expunge.__version__,
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
        "model_sha256": dict(checked.files.sha256()),
        "data_hmac_sha256": {name: data_fingerprint(rows) for name, rows in sets.items()},
        "mmlu": None
        if inputs.mmlu is None
        else {"shots": inputs.mmlu_shots, "sha256": _digest(Path(inputs.mmlu))},
    }


def _digest(directory: Path) -> str:
    """One SHA-256 over the question files and their names."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*/*.csv")):
        digest.update(f"{path.relative_to(directory).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()

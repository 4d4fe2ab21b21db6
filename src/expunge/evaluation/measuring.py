"""One measurement, from files to a scorecard: everything is checked, then the model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from expunge.analysis.template_choice import settled
from expunge.data.fingerprints import data_fingerprint, same_data
from expunge.data.formats import sha256_of
from expunge.data.rows import RowSet
from expunge.data.tokenization import TextPolicy
from expunge.disk import check_file_output, deliver
from expunge.errors import InputError
from expunge.evaluation.protocols.base import ProtocolScores
from expunge.evaluation.score_files import is_records, is_scores, records_text, scores_text
from expunge.evaluation.scorecard import Material, Scorecard, asked_beside, evaluate_model
from expunge.models.asking import Asking
from expunge.models.devices import resolve_device
from expunge.models.files import MANIFEST
from expunge.models.loading import (
    CheckedModel,
    check_model,
    load_model,
    resolve_dtype,
    said_of_dtype,
)
from expunge.models.text_forms import text_policies
from expunge.processes import Processes, processes_of, refused_together

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AnySets = TypeVar("AnySets", bound="Sets")


@dataclass(frozen=True)
class MeasureInputs(Asking):
    """What is measured, on which rows, and where the scores go."""

    model: str
    """The model to measure: directory or hub id."""
    forget: str
    """Rows that were to be removed."""
    retain: str | None = None
    """Rows that were to stay. Without them there is no task aggregate."""
    members: str | None = None
    """Text that the target was trained on, for membership inference; null: the forget set's."""
    nonmembers: str | None = None
    """Non-members of the forget set's kind. Membership inference needs them."""
    mmlu: str | None = None
    """Directory in MMLU's format, for utility. Files test/<subject>_test.csv, dev/<subject>_dev.csv."""
    mmlu_shots: int = 0
    """Solved examples from dev/ before each question."""
    harness: str | None = None
    """Tasks of lm-evaluation-harness, for example mmlu,arc_easy,hellaswag. Needs the extra harness."""
    harness_include: str | None = None
    """Directory with YAML tasks of your own for --harness. Their files can hold code, which is run. Rows
    stay in the cache of the library datasets: give no forget rows."""
    output: str | None = None
    """Write scores.json here."""
    records: str | None = None
    """Write one JSON line a row here. It has id, split, task, kind, score, runs_on."""
    reveal: bool = False
    """Add what was generated to the records. It can hold forgotten text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mmlu_shots < 0:
            raise InputError(f"--mmlu-shots {self.mmlu_shots}: must be 0 or more")
        if self.mmlu_shots and self.mmlu is None:
            raise InputError("--mmlu-shots: needs --mmlu with the questions")
        if self.harness_include is not None and self.harness is None:
            raise InputError("--harness-include: needs --harness with the names of tasks")
        if self.members is not None and self.nonmembers is None:
            raise InputError("--members: needs non-members to compare with; give --nonmembers")
        if self.reveal and self.records is None:
            raise InputError("--reveal: adds text to the records; give --records FILE")

    @property
    def sources(self) -> dict[str, str | None]:
        """What is read, by option."""
        names = ("model", "forget", "retain", "nonmembers", "members", "mmlu", "harness_include")
        return {name: getattr(self, name) for name in names}


class Sets(Protocol):
    """What the form of the text is settled on."""

    @property
    def forget(self) -> RowSet:
        """Rows that were to be removed."""

    @property
    def retain(self) -> RowSet | None:
        """Rows that were to stay."""


@dataclass(frozen=True, repr=False)
class Prepared(Generic[AnySets]):
    """A loaded model, and what it is measured on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy: TextPolicy
    material: AnySets
    weights: Mapping[str, str]
    """SHA-256 by file with weights."""
    processes: Processes


def measure(
    inputs: MeasureInputs,
    progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
    message: Callable[[str], None] = lambda _: None,
) -> Scorecard:
    """Checks every input, loads the model, measures it and writes the files that were asked for.

    Of the processes that accelerate launch started each loads the model and measures its share, each
    returns the whole scorecard, and the main one writes. Raises InputError before anything is written.
    """
    ready = prepared(inputs, lambda *of_model: read_material(inputs, *of_model), message)
    card = evaluate_model(
        ready.model,
        ready.tokenizer,
        ready.material,
        policy=ready.policy,
        batch_size=inputs.batch_size,
        progress=progress,
        processes=ready.processes,
    )
    write_scores(inputs, ready, card)
    return card


def prepared(
    inputs: MeasureInputs,
    read: Callable[[CheckedModel, Sequence[TextPolicy]], AnySets],
    message: Callable[[str], None],
) -> Prepared[AnySets]:
    """Checks the outputs and the model, reads the material, loads the weights, settles the form.

    What one process refuses all refuse. Raises InputError.
    """
    device = resolve_device(inputs.device)
    processes = processes_of(device)
    with refused_together(processes):
        _check_outputs(inputs)
        checked = check_model(inputs.model, trust_remote_code=inputs.trust_remote_code)
        policies = text_policies(checked, inputs.chat_template, inputs.long_rows)
        material = read(checked, policies)
        # Before the work: the directory may be away when the scores are written.
        weights = {path.name: sha256_of(path) for path in checked.files.weights}
        model = load_model(checked, resolve_dtype(checked, inputs.dtype), device)
    for line in said_of_dtype(checked, inputs.dtype, device):
        message(line)
    policy = processes.gather(
        settled(policies, lambda: model, checked.tokenizer, material.forget, material.retain, message)
    )[0]
    return Prepared(model, checked.tokenizer, policy, material, weights, processes)


def write_scores(inputs: MeasureInputs, ready: Prepared[Any], card: Scorecard | ProtocolScores) -> None:
    """Writes the files that were asked for; of several processes the main one does."""
    files = {}
    if inputs.output is not None:
        files[Path(inputs.output)] = scores_text(card, inputs.model, ready.weights)
    if inputs.records is not None:
        files[Path(inputs.records)] = records_text(card, reveal=inputs.reveal)
    if ready.processes.is_main:
        deliver(files, private=[Path(inputs.records or "")] if inputs.reveal else ())


def check_measure(inputs: MeasureInputs) -> None:
    """Everything that `measure` can refuse before it loads the model. Raises InputError."""
    _check_outputs(inputs)
    checked = check_model(inputs.model, trust_remote_code=inputs.trust_remote_code)
    policies = text_policies(checked, inputs.chat_template, inputs.long_rows)
    read_material(inputs, checked, policies)


def read_material(
    inputs: MeasureInputs, checked: CheckedModel, policies: Sequence[TextPolicy]
) -> Material:
    """Reads it, and checks that it fits the model in each form. Raises InputError."""
    sets: dict[str, Any] = inputs.read_sets("forget", "retain", "nonmembers", "members")
    nonmembers = sets.get("nonmembers")
    material = Material(
        **sets,
        **asked_beside(inputs.mmlu, inputs.mmlu_shots, inputs.harness, inputs.harness_include),
        calibrated_on=nonmembers is not None and _calibrated_on(Path(inputs.model), nonmembers),
    )
    for policy in policies:
        material.check(checked.tokenizer, policy)
    return material


def _calibrated_on(model: Path, nonmembers: RowSet) -> bool:
    """Whether the record of the run that made the model names these files."""
    try:
        hashes = json.loads((model / MANIFEST).read_text(encoding="utf-8"))["data_hmac_sha256"]
        used = hashes.get("nonmembers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of no run
        return False
    return isinstance(used, str) and same_data(used, data_fingerprint(nonmembers)) is True


def _check_outputs(inputs: MeasureInputs) -> None:
    if inputs.output is not None:
        check_file_output("output", Path(inputs.output), inputs.sources, is_scores)
    if inputs.records is not None:
        check_file_output("records", Path(inputs.records), inputs.sources, is_records)
        if inputs.output and Path(inputs.output).resolve() == Path(inputs.records).resolve():
            raise InputError(f"--records {inputs.records}: is what --output writes; name another")

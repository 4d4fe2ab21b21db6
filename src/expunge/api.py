"""The Python interface: models in memory for unlearning and scores, files for audits and reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.analysis.template_choice import settled
from expunge.audits import auditing
from expunge.audits.inputs import RECALLED, AuditInputs
from expunge.data.chat_templates import Template, template_of
from expunge.data.rows import Row, as_rows
from expunge.data.tokenization import LongRows, TextPolicy
from expunge.errors import InputError
from expunge.evaluation.scorecard import Material, Scorecard, asked_beside, evaluate_model
from expunge.methods.base import Method
from expunge.models.rope import keep_rows_apart
from expunge.models.text_forms import context_of, policies_of, vocabulary_of
from expunge.reporting.comparison import compared
from expunge.reporting.material import ReportInputs
from expunge.reporting.report import write_report
from expunge.runs.sources import recalled
from expunge.training.options import TrainingOptions
from expunge.training.progress import Progress, Silent
from expunge.training.unlearning import Outcome, unlearn_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = Iterable[Row | Mapping[str, object]]


def unlearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Rows,
    retain: Rows | None = None,
    *,
    method: Method,
    calibration: Rows | None = None,
    nonmembers: Rows | None = None,
    base: PreTrainedModel | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Unlearns `forget` from `model` in place and keeps `retain`.

    Rows are `expunge.data.rows.Row` or mappings with `input`, `output` and optionally `id`, `task`,
    `kind`. `calibration`, or by its old name `nonmembers`, are non-members that forget rows are to look
    like; without them the losses of `base`, the model from before the fine-tune, say how. `options`
    are the fields of `TrainingOptions`, those of `expunge run`: epochs, max_steps, batch_size,
    learning_rate, seed, time_limit, ... Raises InputError for wrong rows or settings before the model is
    touched, RunError where no checkpoint can be kept.
    """
    if calibration is not None and nonmembers is not None:
        raise InputError("nonmembers: is the old name of calibration, which is given too; leave it out")
    for each in (model,) if base is None else (model, base):
        keep_rows_apart(each)
    return unlearn_model(
        model,
        tokenizer,
        method,
        forget,
        retain,
        nonmembers if calibration is None else calibration,
        TrainingOptions(**options),
        base=base,
        progress=progress,
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Rows,
    retain: Rows | None = None,
    *,
    nonmembers: Rows | None = None,
    mmlu: str | Path | None = None,
    mmlu_shots: int = 0,
    harness: str | None = None,
    harness_include: str | Path | None = None,
    batch_size: int = 64,
    chat_template: Template | bool = "auto",
    long_rows: LongRows = "refuse",
    progress: Progress | None = None,
) -> Scorecard:
    """Measures the scorecard of a loaded model; what has no material stays None.

    `mmlu` is a directory in MMLU's format. `harness` names tasks of lm-evaluation-harness, separated by
    commas, `harness_include` a directory with tasks of the user's. `chat_template` is auto, on (True)
    or off (False); auto: where the model answers a sample of the rows better with it. Raises InputError
    for wrong rows, questions or tasks.
    """
    keep_rows_apart(model)
    material = Material(
        as_rows(forget, "forget"),
        None if retain is None else as_rows(retain, "retain"),
        None if nonmembers is None else as_rows(nonmembers, "nonmembers"),
        **asked_beside(mmlu, mmlu_shots, harness, harness_include),
    )
    policy = TextPolicy(
        context_of(model.config), long_rows=long_rows, vocabulary=vocabulary_of(model.config)
    )
    policies = policies_of(policy, template_of(chat_template), tokenizer)
    for policy in policies:
        material.check(tokenizer, policy)
    model.eval()
    say = (progress or Silent()).message
    policy = settled(policies, lambda: model, tokenizer, material.forget, material.retain, say)
    return evaluate_model(
        model,
        tokenizer,
        material,
        policy=policy,
        batch_size=batch_size,
        progress=(progress or Silent()).phase,
    )


def audit(model: str | Path, *, progress: Progress | None = None, **options: Any) -> dict[str, Any]:
    """Attacks a saved model, and returns what audit.json holds, a verdict among it.

    `options` are the fields of `AuditInputs`, those of `expunge audit`: original, forget, retain,
    oracle, nonmembers, budget, attacks, output, ... What a run directory knows is taken from there where
    it is not given. Raises InputError before a model is loaded.
    """
    given = _with_recalled(model, options, RECALLED)
    for name in ("original", "forget", "retain"):
        if name not in given:
            raise InputError(f"{name}: is missing, and {model} does not know it; give {name}=...")
    return auditing.audit(AuditInputs(model=str(model), **given), progress)


def report(run: str | Path, **options: Any) -> dict[str, Any]:
    """Writes the report of a run directory, and returns what report.json holds.

    `options` are the fields of `ReportInputs`, those of `expunge report`: scores, audit, subject,
    output, ... Raises InputError with nothing written.
    """
    return write_report(ReportInputs(run=str(run), **_with_recalled(run, options, ("subject",))))


def compare(
    *runs: str | Path, original: str | Path | None = None, oracle: str | Path | None = None
) -> Mapping[str, Any]:
    """Scores of several models by their label, those of `original` as target.

    Each is a scores.json, or a directory that holds one. Raises InputError for scores that cannot be
    compared.
    """
    return compared([*map(str, runs)], _as_given(original), _as_given(oracle))[1]


def _with_recalled(
    place: str | Path, options: Mapping[str, Any], recalls: Iterable[str]
) -> dict[str, Any]:
    """Options as the settings have them, and those of `recalls` that only the run directory gives."""
    given = {name: _as_given(value) for name, value in options.items()}
    return {**recalled(Path(place), {*recalls} - {*given}), **given}


def _as_given(value: Any) -> Any:
    """A path as text and a list as a tuple, as the settings have them."""
    if isinstance(value, Path):
        return str(value)
    return tuple(map(_as_given, value)) if isinstance(value, list | tuple) else value

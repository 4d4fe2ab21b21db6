"""`expunge erase`: the whole way of an erasure request, from rows to a verdict and its report."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import expunge
from expunge.audits.auditing import audit
from expunge.audits.budgets import BudgetName
from expunge.audits.inputs import AuditInputs, check_audit
from expunge.cli.audit import show as show_audit
from expunge.cli.compare import show as show_scores
from expunge.cli.console import progress_on_stderr
from expunge.cli.inputs import audit_of, scores_of
from expunge.cli.options import given, take_option, yaml_fields
from expunge.cli.plan import outcome
from expunge.cli.plan import show as show_plan
from expunge.cli.run import parsed
from expunge.data.chat_templates import Template
from expunge.data.formats import sha256_of
from expunge.data.rows import RowSet, document_of
from expunge.disk import check_not_read
from expunge.errors import InputError
from expunge.evaluation.measuring import MeasureInputs, check_measure, measure
from expunge.evaluation.score_files import SCORES, read_scores
from expunge.methods.base import Method
from expunge.models.devices import resolve_device
from expunge.models.files import MANIFEST
from expunge.models.loading import CheckedModel, resolve_dtype
from expunge.processes import check_alone
from expunge.reporting.box import box
from expunge.reporting.material import AUDIT, BEFORE, ORACLE, ReportInputs
from expunge.reporting.report import write_report
from expunge.reporting.tables import table_console
from expunge.runs.manifest import settings_of
from expunge.runs.planning import GIB, Plan, alternatives, budget_of, plan
from expunge.runs.run import RunInputs, check_run, run
from expunge.runs.scratch import Scratch, differences
from expunge.runs.sources import check_place, remember, remembered, sources_of
from expunge.training.options import TrainingOptions
from expunge.training.preparation import Prepared

_ABOUT = """
expunge erase MODEL --forget F --retain R --output OUT

The whole way in one command: checks rows and model, plans, unlearns, scores before and after,
attacks, reports. If the run does not fit this machine, it takes what `expunge plan` proposes, or
is refused. OUT holds the model, before.json, scores.json, audit.json and report.html.

Examples:
  expunge erase model --forget forget.jsonl --retain retain.jsonl --output out
  expunge erase model --forget f.csv --retain r.csv --output out --dry-run
  expunge erase model --config erase.yaml --output out --resume
"""
_READ = ("base", "forget", "retain", "calibration", "nonmembers", "oracle", "paraphrases", "mmlu")


@dataclass(frozen=True)
class EraseInputs(RunInputs):
    """What is erased from what, and what is measured of it."""

    calibration: str | None = None
    """Non-members for the run. It stops when forget rows look like them."""
    nonmembers: str | None = None
    """Other non-members, for scores and audit."""
    oracle: str | None = None
    """A model trained on the retain set only. By the same recipe; without it the audit's floor is 0."""
    paraphrases: str | None = None
    """Other wordings of forget rows, for the attack paraphrase."""
    mmlu: str | None = None
    """Directory of questions in MMLU's format, for utility."""
    audit: bool = True
    """Attack the result. Without it, the report says that nobody tried."""
    budget: BudgetName = "quick"
    """How many rows, steps and samples the audit takes."""
    subject: str | None = None
    """Your reference for whoever asked, in the report. A case number rather than a name."""
    dry_run: bool = False
    """Stop after the plan and write nothing."""

    def __post_init__(self) -> None:
        if self.retain is None:
            raise InputError("--retain: is missing; give rows like the forget set's that must stay")
        ReportInputs(run=self.output, subject=self.subject)


@dataclass(frozen=True)
class Task:
    """An erasure that was checked as far as it can be without weights."""

    inputs: EraseInputs
    method: Method
    training: TrainingOptions
    preset: str | None
    of_run: RunInputs
    scored: MeasureInputs
    """Of the target; of the others `model` and `output` differ."""
    attacked: AuditInputs
    """The same; its models run in the dtype that each is saved in."""
    checked: CheckedModel
    sets: Mapping[str, RowSet]
    prepared: Prepared
    plan: Plan
    is_run: bool
    """Whether the run is complete, and only what comes after it is missing."""
    leaner: Sequence[str] = ()
    """Options that plan proposed, as the run did not fit without."""


def main(arguments: Sequence[str]) -> int:
    """Parses, checks, plans, erases."""
    check_alone("erase")
    task = _task(arguments)
    if not task.plan.fits:
        leaner = _leaner(task, arguments)
        task = replace(_task([*arguments, *leaner]), leaner=leaner)
    if task.inputs.dry_run:
        for line in _understood(task):
            table_console().print(line, soft_wrap=True)
        show_plan(task.plan)
    else:
        erase(task)
    return 0


def _task(words: Sequence[str]) -> Task:
    settings, preset = parsed(words, "expunge erase", EraseInputs, _ABOUT)
    return prepare(settings.inputs, settings.settings, settings.training, preset)


def prepare(
    inputs: EraseInputs, method: Method, training: TrainingOptions, preset: str | None = None
) -> Task:
    """Checks all that run, scores and audit would refuse, and plans the run. Raises InputError."""
    output, scratch = Path(inputs.output), Scratch(Path(inputs.output))
    is_begun = scratch.root.exists() and not scratch.is_published
    is_run = inputs.resume and (output / MANIFEST).is_file() and not is_begun
    check_not_read("--output", output, {name: getattr(inputs, name) for name in _READ})
    # What is complete is not overwritten by going on.
    overwrite = inputs.overwrite and not is_run
    run_inputs = inputs.into(RunInputs, nonmembers=inputs.calibration, overwrite=overwrite)
    checked, sets, prepared = check_run(run_inputs, method, training, writes=not is_run)
    scored, attacked = scores_of(inputs, training), audit_of(inputs, training)
    check_measure(scored)
    if inputs.audit:
        check_audit(attacked, checked)
    budget = budget_of(None, inputs.device, resolve_device(inputs.device))
    changed = prepared.changed(checked)
    found = plan(changed, prepared, resolve_dtype(changed, inputs.dtype), budget)
    told = inputs, method, training, preset, run_inputs, scored, attacked
    return Task(*told, checked, sets, prepared, found, is_run)


def _leaner(task: Task, words: Sequence[str]) -> list[str]:
    """What plan proposes that fits and contradicts no option. Raises InputError where nothing does."""
    words, config = take_option(words, "--config")
    named = given(words, {} if config is None else yaml_fields(Path(config)))
    named |= {"method"} if any(name.startswith(("method.", "preset")) for name in named) else set()
    changed = task.prepared.changed(task.checked)
    dtype = resolve_dtype(changed, task.inputs.dtype)
    found = alternatives(changed, task.prepared, dtype, task.plan.budget)
    fitting = [options.split() for options, other in found if other.fits]
    fitting = [options for options in fitting if not named & given(options, {})]
    if not fitting:
        raise InputError(
            f"--model {task.inputs.model}: {outcome(task.plan)}, and neither does what plan proposes"
            " beside the options given; leave some out (see expunge plan), or use more memory"
        )
    # Without candidates nothing watches the run.
    return min(fitting, key=lambda options: "--select" in options)


def erase(task: Task, *, cache: str | None = None) -> None:
    """Unlearns, measures, attacks, reports, and says on standard output what came of it.

    `cache` as of an audit. Of a task that is resumed only what is missing is done. Raises InputError
    where it is of an erasure with other sources or settings.
    """
    inputs, output = task.inputs, Path(task.inputs.output)
    check_place()
    evidence = {BEFORE: inputs.model, SCORES: inputs.output, ORACLE: inputs.oracle}
    evidence |= {AUDIT: inputs.output if inputs.audit else None}
    parts = [(name, model) for name, model in evidence.items() if model is not None]
    attacked = replace(task.attacked, model=inputs.output, output=str(output / AUDIT), cache=cache)
    with progress_on_stderr() as progress:
        for line in _understood(task):
            progress.message(line)
        paths = {"original": inputs.model, **{name: getattr(inputs, name) for name in _READ}}
        sources = sources_of(paths)
        asked, known = _asked(task, sources), remembered(output) if task.is_run else {}
        if task.is_run:
            _check_same(output, known.get("asked"), asked)
        progress.message(f"1 of {len(parts) + 1}: unlearning")
        manifest = run(task.of_run, task.method, task.training, progress, task.preset)
    form: Template = "on" if manifest["settings"]["training"]["text"]["chat_template"] else "off"
    done = known.get("done", {})
    remember(output, {"asked": asked, "subject": inputs.subject, "sources": sources, "done": done})
    for number, (name, model) in enumerate(parts, 2):
        file = output / name
        if name in done and file.is_file() and sha256_of(file) == done[name]["sha256"]:
            continue
        with progress_on_stderr() as progress:
            progress.message(f"{number} of {len(parts) + 1}: {name} of {model}")
            begun = time.monotonic()
            try:
                if name == AUDIT:
                    audit(attacked, progress)
                else:
                    scored = replace(task.scored, model=model, output=str(file), chat_template=form)
                    measure(scored, progress.phase)
            except BaseException:
                progress.message(f"{name}: not finished; go on with the same command and --resume")
                raise
            done[name] = {"sha256": sha256_of(file), "seconds": time.monotonic() - begun}
            remember(output, {"done": done})
    report = write_report(ReportInputs(run=str(output), subject=inputs.subject))
    cards = {"target": BEFORE, "oracle": ORACLE, output.name: SCORES}
    show_scores({n: read_scores(str(output / f)) for n, f in cards.items() if f in done})
    if inputs.audit:
        show_audit(json.loads((output / AUDIT).read_text(encoding="utf-8")), attacked)
    seconds = {Path(name).stem: each["seconds"] for name, each in done.items()}
    table_console().print(box(output, report, seconds))


def _understood(task: Task) -> Iterator[str]:
    """What was read, in lines without any text of a row."""
    checked = task.checked
    template = "on" if task.prepared.text["chat_template"] else "off"
    template = "measured when the run starts" if task.prepared.plain else template
    yield (
        f"model: {checked.config.model_type}, {checked.layout.count} layers,"
        f" {checked.files.bytes / GIB:.2f} GiB in {resolve_dtype(checked, 'auto')}"
    )
    yield f"chat template: {template if checked.tokenizer.chat_template else 'none'}"
    for name, rows in task.sets.items():
        kinds = Counter(row.kind for row in rows)
        told = ", ".join(rows.read.get("columns", ())) or "rows"
        yield (
            f"{'calibration' if name == 'nonmembers' else name}: {len(rows)} rows of"
            f" {len({document_of(row) for row in rows})} documents ({kinds['qa']} questions,"
            f" {kinds['sc']} continuations), read from {told}"
        )
    if task.leaner:
        yield f"taken, as the run does not fit otherwise: {' '.join(task.leaner)}"
    yield f"plan: {task.plan.method}, {task.plan.steps} steps; {outcome(task.plan)}"


def _asked(task: Task, sources: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What a resumed erasure must have in common with its beginning."""
    asked = {
        "expunge": expunge.__version__,
        **{name: getattr(task.inputs, name) for name in ("dtype", "columns", "joiner", "budget")},
        **{name: source["hmac_sha256"] for name, source in sources.items()},
        "method": settings_of(task.method),
        "training": asdict(task.training),
    }
    return dict(json.loads(json.dumps(asked)))


def _check_same(output: Path, before: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> None:
    """Raises InputError where a complete run is of another erasure than the one that is resumed."""
    for name, _, _ in [("run", 0, 0)] if before is None else differences(before, asked, ""):
        raise InputError(
            f"--resume: {output} was made with another {name}; give the same, choose another --output,"
            " or begin anew with --overwrite and no --resume"
        )
